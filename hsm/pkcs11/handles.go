package pkcs11

import (
	"bytes"
	"maps"
	"slices"

	p11 "github.com/miekg/pkcs11"
)

// Where the keys are. A module may look at every object, several files each, to find one (SoftHSM does), so that finding each
// of n keys costs n². One process holds the token, so the handles that the last listing saw and those of what was made since
// are remembered, and looked at before they are believed. What is in doubt under one id is looked for; where the handles are
// not what they were, all are listed anew, at the price of one search.

// handles are the objects under one CKA_ID.
type handles struct {
	privates, publics []p11.ObjectHandle
	// unsure: an operation failed in the middle of changing them.
	unsure bool
}

// setHeld takes in what a listing saw; nil means that nothing is known, so that the next who asks lists them.
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
	case len(h.privates)+len(h.publics) == 0 && !h.unsure:
		delete(t.held, string(id))
	default:
		t.held[string(id)] = h
	}
}

// doubt has what is under an id looked for by whoever asks next.
func (t *Token) doubt(id []byte) { t.holds(id, handles{unsure: true}) }

// under lists the objects under an id. The caller holds manage.
func (t *Token) under(id []byte) (privates, publics []p11.ObjectHandle, err error) {
	t.mu.RLock()
	known, h := t.held != nil, t.held[string(id)]
	t.mu.RUnlock()
	switch {
	case known && h.unsure:
		for class, to := range map[uint]*[]p11.ObjectHandle{p11.CKO_PRIVATE_KEY: &h.privates, p11.CKO_PUBLIC_KEY: &h.publics} {
			if *to, err = t.find(attribute{p11.CKA_CLASS, class}, attribute{p11.CKA_ID, id}); err != nil {
				return nil, nil, err
			}
		}
		h.unsure = false
		t.holds(id, h)
	case known && t.still(id, h):
	default:
		if known {
			t.log.Warn("the token's objects are not where they were; they are listed anew", "token", t.label)
		}
		if h, err = t.locate(id); err != nil {
			return nil, nil, err
		}
	}
	return slices.Clone(h.privates), slices.Clone(h.publics), nil
}

// locate lists the handles of all keys, and returns those under id.
func (t *Token) locate(id []byte) (handles, error) {
	t.setHeld(nil)
	publics, err := t.publics()
	if err != nil {
		return handles{}, err
	}
	held := make(map[string]handles, len(publics))
	for id, objects := range publics {
		held[id] = handles{publics: handlesOf(objects)}
	}
	privates, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)})
	if err != nil {
		return handles{}, err
	}
	for _, object := range privates {
		v, err := t.read(object, p11.CKA_ID, p11.CKA_LABEL)
		if err != nil {
			return handles{}, err
		}
		if string(v[1]) != t.transportLabel() {
			h := held[string(v[0])]
			h.privates = append(h.privates, object)
			held[string(v[0])] = h
		}
	}
	t.setHeld(held)
	return held[string(id)], nil
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
	sure := t.held != nil
	for h := range maps.Values(t.held) {
		known += len(h.privates)
		sure = sure && !h.unsure
	}
	t.mu.RUnlock()
	if sure && known == len(objects) {
		return nil
	}
	t.log.Info("the token holds another number of keys than before; they are listed anew", "token", t.label, "private_keys", len(objects), "known", known)
	_, err = t.inventory()
	return err
}
