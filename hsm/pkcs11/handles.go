package pkcs11

import (
	"bytes"
	"maps"
	"slices"

	p11 "github.com/miekg/pkcs11"
)

// Where the keys are. A module may look at every object, several files each, to find one (SoftHSM does), so that finding each
// of n keys costs n². One process holds the token, so the handles that the last listing saw and those of what was made since
// are remembered, and looked at before they are believed. Whatever is in doubt is looked for.

// handles are the objects under one CKA_ID.
type handles struct{ privates, publics []p11.ObjectHandle }

// setHeld takes in what a listing saw; nil means that nothing is known, so that objects are looked for.
func (t *Token) setHeld(held map[string]handles) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.held = held
}

// holds takes in what is under an id now, if anything is known at all.
func (t *Token) holds(id []byte, h handles) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.held == nil:
	case len(h.privates)+len(h.publics) == 0:
		delete(t.held, string(id))
	default:
		t.held[string(id)] = h
	}
}

// under lists the objects under an id. The caller holds manage.
func (t *Token) under(id []byte) (privates, publics []p11.ObjectHandle, err error) {
	t.mu.RLock()
	known, h := t.held != nil, t.held[string(id)]
	t.mu.RUnlock()
	if known && t.still(id, h) {
		return slices.Clone(h.privates), slices.Clone(h.publics), nil
	}
	if known {
		t.log.Warn("the token's objects are not where they were; they are looked for", "token", t.label)
		t.setHeld(nil)
	}
	for class, to := range map[uint]*[]p11.ObjectHandle{p11.CKO_PRIVATE_KEY: &privates, p11.CKO_PUBLIC_KEY: &publics} {
		if *to, err = t.find(attribute{p11.CKA_CLASS, class}, attribute{p11.CKA_ID, id}); err != nil {
			return nil, nil, err
		}
	}
	return privates, publics, nil
}

// still tells whether handles are of what they were. Where the module cannot say, they are looked for, which tells why.
func (t *Token) still(id []byte, h handles) bool {
	for class, objects := range map[uint][]p11.ObjectHandle{p11.CKO_PRIVATE_KEY: h.privates, p11.CKO_PUBLIC_KEY: h.publics} {
		for _, object := range objects {
			v, err := t.read(object, p11.CKA_CLASS, p11.CKA_ID)
			if err != nil || !bytes.Equal(v[0], ulong(class)) || !bytes.Equal(v[1], id) {
				return false
			}
		}
	}
	return true
}

// private is the handle of the one private key under an id; 0 where it is not known.
func (t *Token) private(id []byte) p11.ObjectHandle {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if h := t.held[string(id)]; len(h.privates) == 1 {
		return h.privates[0]
	}
	return 0
}

// Count looks how many private keys the token holds, and lists them anew when that is not what was known: somebody else has
// put some in, or taken some out. It costs much less than Inventory. What the
// token says of its PIN is asked as well.
func (t *Token) Count() error {
	t.manage.Lock()
	defer t.manage.Unlock()
	objects, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)})
	if err != nil {
		return classify("count", err)
	}
	if err := t.lookAtPIN(); err != nil {
		return err
	}
	known := 1 // the transport key
	t.mu.RLock()
	for h := range maps.Values(t.held) {
		known += len(h.privates)
	}
	sure := t.held != nil
	t.mu.RUnlock()
	if sure && known == len(objects) {
		return nil
	}
	t.log.Info("the token holds another number of keys than before; they are listed anew", "token", t.label, "private_keys", len(objects), "known", known)
	_, err = t.inventory()
	return err
}
