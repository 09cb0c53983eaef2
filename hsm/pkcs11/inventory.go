package pkcs11

import (
	"fmt"
	"sort"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// Inventory reads every private key in the token, and every secret key that is not the domain's. What has no label of
// ours is foreign: reported, never used. It also refreshes what Key and Info answer from.
func (t *Token) Inventory() ([]hsm.KeyRecord, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	privates, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)}, attribute{p11.CKA_TOKEN, true})
	if err != nil {
		return nil, classify("inventory", err)
	}
	var list []hsm.KeyRecord
	for _, object := range privates {
		k, ours, err := t.record(object)
		if err != nil {
			return nil, classify("inventory", err)
		}
		if ours {
			list = append(list, k)
		}
	}
	secrets, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)}, attribute{p11.CKA_TOKEN, true})
	if err != nil {
		return nil, classify("inventory", err)
	}
	for _, object := range secrets {
		v, err := t.read(object, p11.CKA_ID, p11.CKA_LABEL)
		if err != nil {
			return nil, classify("inventory", err)
		}
		if _, _, ok := parseDomainLabel(string(v[1])); !ok {
			list = append(list, hsm.KeyRecord{KeySpec: hsm.KeySpec{ID: hsm.KeyIDOf(v[0]), Label: string(v[1])}, Foreign: true})
		}
	}

	keys := make(map[hsm.KeyID]hsm.KeyRecord, len(list))
	for i, k := range list {
		if k.Foreign {
			continue
		}
		if _, twice := keys[k.ID]; twice {
			k.Fault = "two private keys have this id"
			list[i] = k
		}
		keys[k.ID] = k
	}
	for i, k := range list { // the first of two is as faulty as the second
		if !k.Foreign && keys[k.ID].Fault != "" {
			list[i].Fault = keys[k.ID].Fault
		}
	}
	t.mu.Lock()
	t.keys = keys
	for id := range t.signers {
		if keys[id].Fault != "" || keys[id].ID == "" {
			delete(t.signers, id)
		}
	}
	t.mu.Unlock()
	sort.Slice(list, func(i, j int) bool { return list[i].ID < list[j].ID })
	return list, nil
}

// record describes one private key; ours is false for the transport key, which is no entry of the inventory.
func (t *Token) record(object p11.ObjectHandle) (k hsm.KeyRecord, ours bool, err error) {
	v, err := t.read(object, p11.CKA_ID, p11.CKA_LABEL, p11.CKA_KEY_TYPE, p11.CKA_EXTRACTABLE, p11.CKA_LOCAL)
	if err != nil {
		return k, false, err
	}
	if string(v[1]) == transportLabel {
		return k, false, nil
	}
	k.ID, k.Extractable, k.Local = hsm.KeyIDOf(v[0]), isTrue(v[3]), isTrue(v[4])
	purpose, name, ok := hsm.ParseObjectLabel(string(v[1]))
	if !ok || len(v[0]) != 16 {
		k.Label, k.Foreign = string(v[1]), true
		return k, true, nil
	}
	k.Purpose, k.Label, k.Algorithm = purpose, name, hsm.P256
	if k.Attributes, err = t.attributeDigest(object); err != nil {
		return k, false, err
	}
	k.SPKI, k.Fault, err = t.publicHalf(v[0])
	return k, true, err
}

// noPublic is the fault of a key whose import was cut short.
const noPublic = "the public key is missing"

// publicHalf reads the public object that goes with an id; what is wrong with it is a fault, not an error.
func (t *Token) publicHalf(id []byte) (spki []byte, fault string, err error) {
	objects, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)}, attribute{p11.CKA_ID, id})
	if err != nil {
		return nil, "", err
	}
	switch len(objects) {
	case 0:
		return nil, noPublic, nil
	case 1:
	default:
		return nil, fmt.Sprintf("%d public keys have this id", len(objects)), nil
	}
	v, err := t.read(objects[0], p11.CKA_KEY_TYPE)
	if err != nil {
		return nil, "", err
	}
	if string(v[0]) != string(p11.NewAttribute(p11.CKA_KEY_TYPE, uint(p11.CKK_EC)).Value) {
		return nil, "the public key is not an elliptic-curve key", nil
	}
	if v, err = t.read(objects[0], p11.CKA_EC_PARAMS, p11.CKA_EC_POINT); err != nil {
		return nil, "", err
	}
	if spki, err = spkiOf(v[0], v[1]); err != nil {
		return nil, err.Error(), nil
	}
	return spki, "", nil
}
