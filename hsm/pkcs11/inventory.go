package pkcs11

import (
	"fmt"
	"sort"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// Faults of keys that a process was killed in the middle of making or removing.
const (
	noPublic  = "the public key is missing"
	noPrivate = "the private key is missing"
	hollow    = "the private key is incomplete, or of no known kind"
)

// Inventory reads every private key in the token, every public key of ours that has none, and every secret key that is
// not the domain's. What has no label of ours is foreign: reported, never used. It also refreshes what Key and Info
// answer from.
func (t *Token) Inventory() ([]hsm.KeyRecord, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	return t.inventory()
}

func (t *Token) inventory() ([]hsm.KeyRecord, error) {
	t.setHeld(nil)
	list, held, strangers, err := t.list()
	if err != nil {
		return nil, classify("inventory", err)
	}
	t.setHeld(held)
	keys := make(map[hsm.KeyID]hsm.KeyRecord, len(list))
	foreign := 0
	for _, k := range list {
		if k.Foreign {
			foreign++
			continue
		}
		if _, twice := keys[k.ID]; twice {
			k.Fault = "two private keys have this id"
		}
		keys[k.ID] = k
	}
	t.mu.Lock()
	for id, fault := range t.bad {
		if k, ok := keys[id]; ok && k.Fault == "" {
			k.Fault = fault
			keys[id] = k
		}
	}
	t.keys, t.foreign, t.strangers, t.digest = keys, foreign, strangers, ""
	var gone []hsm.KeyID
	for id := range t.signers {
		if keys[id].Fault != "" || keys[id].ID == "" {
			gone = append(gone, id)
		}
	}
	t.mu.Unlock()
	if len(gone) > 0 {
		t.making.Lock()
		for _, id := range gone {
			t.unmake(id)
		}
		t.making.Unlock()
	}
	for i, k := range list { // the first of two is as faulty as the second
		if !k.Foreign {
			list[i].Fault = keys[k.ID].Fault
		}
	}
	sort.SliceStable(list, func(i, j int) bool { return list[i].ID < list[j].ID })
	return list, nil
}

// list reads the token. Held are the handles of all its private and public keys, but for the transport key; strangers the
// fingerprints of other members' transport keys.
func (t *Token) list() (list []hsm.KeyRecord, held map[string]handles, strangers []string, err error) {
	publics, err := t.publics()
	if err != nil {
		return nil, nil, nil, err
	}
	held = make(map[string]handles, len(publics))
	for id, objects := range publics {
		held[id] = handles{publics: handlesOf(objects)}
	}
	privates, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)})
	if err != nil {
		return nil, nil, nil, err
	}
	used := map[string]bool{}
	for _, handle := range privates {
		o := t.privateObject(handle)
		v, err := o.read(p11.CKA_ID, p11.CKA_LABEL)
		if err != nil {
			return nil, nil, nil, err
		}
		if string(v[1]) == t.transportLabel() {
			continue
		}
		if isTransport(string(v[1])) {
			strangers = append(strangers, t.stranger(handle))
		}
		id := string(v[0])
		k, err := t.record(o, v[0], string(v[1]), publics[id])
		if err != nil {
			return nil, nil, nil, err
		}
		used[id] = true
		held[id] = handles{privates: append(held[id].privates, handle), publics: held[id].publics}
		list = append(list, k)
	}
	for id, objects := range publics {
		if used[id] {
			continue
		}
		k, ours, err := t.lone(id, objects)
		if err != nil {
			return nil, nil, nil, err
		}
		if ours {
			list = append(list, k)
		}
	}
	secrets, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)})
	if err != nil {
		return nil, nil, nil, err
	}
	for _, object := range secrets {
		v, err := t.read(object, p11.CKA_ID, p11.CKA_LABEL)
		if err != nil {
			return nil, nil, nil, err
		}
		if _, _, ok := parseDomainLabel(string(v[1])); !ok && !isNote(string(v[1])) {
			list = append(list, hsm.KeyRecord{KeySpec: hsm.KeySpec{ID: hsm.KeyIDOf(v[0]), Label: string(v[1])}, Foreign: true})
		}
	}
	return list, held, strangers, nil
}

// publics lists the public keys by their ids.
func (t *Token) publics() (map[string][]object, error) {
	found, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)})
	if err != nil {
		return nil, err
	}
	out := make(map[string][]object, len(found))
	for _, handle := range found {
		o := t.publicObject(handle)
		v, err := o.read(p11.CKA_ID)
		if err != nil {
			return nil, err
		}
		out[string(v[0])] = append(out[string(v[0])], o)
	}
	return out, nil
}

// privateObject is a private key with what an inventory asks of those on curves, which most are.
func (t *Token) privateObject(handle p11.ObjectHandle) object {
	return t.object(handle, append(t.flagKinds(), p11.CKA_ID, p11.CKA_LABEL, p11.CKA_LOCAL, p11.CKA_KEY_TYPE, p11.CKA_EC_PARAMS)...)
}

// publicObject is the same of a public key.
func (t *Token) publicObject(handle p11.ObjectHandle) object {
	return t.object(handle, p11.CKA_ID, p11.CKA_LABEL, p11.CKA_KEY_TYPE, p11.CKA_EC_PARAMS, p11.CKA_EC_POINT)
}

func handlesOf(objects []object) []p11.ObjectHandle {
	out := make([]p11.ObjectHandle, len(objects))
	for i, o := range objects {
		out[i] = o.handle
	}
	return out
}

// publicObjects is handlesOf the other way round.
func (t *Token) publicObjects(handles []p11.ObjectHandle) []object {
	out := make([]object, len(handles))
	for i, handle := range handles {
		out[i] = t.publicObject(handle)
	}
	return out
}

// record describes one private key with the public ones of its id.
func (t *Token) record(o object, id []byte, label string, publics []object) (k hsm.KeyRecord, err error) {
	k.ID = hsm.KeyIDOf(id)
	purpose, name, ok := hsm.ParseObjectLabel(label)
	if !ok || len(id) != 16 {
		k.Label, k.Foreign = label, true
		return k, nil
	}
	k.Purpose, k.Label = purpose, name
	v, err := o.read(p11.CKA_EXTRACTABLE, p11.CKA_LOCAL)
	if err != nil {
		return k, err
	}
	k.Extractable, k.Local = isTrue(v[0]), isTrue(v[1])
	k.NonExtractable = !k.Extractable
	if k.Algorithm, err = algorithmOf(o); err != nil {
		return k, err
	}
	flags, err := t.flags(o)
	if err != nil {
		return k, err
	}
	k.Attributes = attributeDigest(k, flags)
	switch len(publics) {
	case 0:
		k.Fault = noPublic
	case 1:
		if k.SPKI, k.Fault, err = publicKey(publics[0]); err != nil {
			return k, err
		}
	default:
		k.Fault = fmt.Sprintf("%d public keys have this id", len(publics))
	}
	if k.Algorithm == "" {
		k.Fault = hollow
	} else if k.Fault == "" {
		if _, err := k.Algorithm.ParsePublic(k.SPKI); err != nil {
			k.Fault = err.Error()
		}
	}
	return k, nil
}

// lone describes public keys without a private one: what remains of a key half made or half destroyed, if they are ours.
func (t *Token) lone(id string, objects []object) (k hsm.KeyRecord, ours bool, err error) {
	v, err := objects[0].read(p11.CKA_LABEL)
	if err != nil {
		return k, false, err
	}
	purpose, name, ok := hsm.ParseObjectLabel(string(v[0]))
	if !ok || len(id) != 16 {
		return k, false, nil
	}
	k.KeySpec = hsm.KeySpec{ID: hsm.KeyIDOf([]byte(id)), Label: name, Purpose: purpose}
	if k.Algorithm, err = algorithmOf(objects[0]); err != nil {
		return k, false, err
	}
	if k.SPKI, _, err = publicKey(objects[0]); err != nil {
		return k, false, err
	}
	k.Fault = noPrivate
	return k, true, nil
}

// pair is everything that the token holds under one id.
type pair struct {
	privates, publics []p11.ObjectHandle
	// record is of the private key, or of the public one where there is no private one.
	record hsm.KeyRecord
}

func (p pair) empty() bool { return len(p.privates)+len(p.publics) == 0 }

func (t *Token) pair(id []byte) (p pair, err error) {
	if p.privates, p.publics, err = t.under(id); err != nil {
		return p, err
	}
	if len(p.privates) > 1 {
		return p, hsm.Errorf(hsm.ClassRequest, "find", "%d private keys in token %s have id %x: an operator must look", len(p.privates), t.label, id)
	}
	if len(p.privates) == 1 {
		o := t.privateObject(p.privates[0])
		v, err := o.read(p11.CKA_LABEL)
		if err != nil {
			return p, err
		}
		p.record, err = t.record(o, id, string(v[0]), t.publicObjects(p.publics))
		return p, err
	}
	if len(p.publics) > 0 {
		ours := false
		if p.record, ours, err = t.lone(string(id), t.publicObjects(p.publics)); err == nil && !ours {
			p.record.Foreign = true
		}
	}
	return p, err
}
