package pkcs11

import (
	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// Classify is what an error of the module becomes.
func Classify(code uint) error { return classify("test", p11.Error(code)) }

// Destroy removes the halves of a key, and forgets it.
func (t *Token) Destroy(id hsm.KeyID, classes ...uint) error {
	t.manage.Lock()
	defer t.manage.Unlock()
	b, err := id.Bytes()
	if err != nil {
		return err
	}
	for _, class := range classes {
		objects, err := t.find(attribute{p11.CKA_CLASS, class}, attribute{p11.CKA_ID, b})
		if err != nil {
			return err
		}
		for _, o := range objects {
			if err := t.raw.DestroyObject(t.session, o); err != nil {
				return err
			}
		}
	}
	return nil
}

// Plant makes an AES key, and a P-256 key pair of that label, that are not ours.
func (t *Token) Plant(label string, id []byte) error {
	t.manage.Lock()
	defer t.manage.Unlock()
	if _, err := t.raw.GenerateKey(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_KEY_GEN, nil)}, template(
		secret(p11.CKK_AES, label), []attribute{{p11.CKA_VALUE_LEN, 32}, {p11.CKA_TOKEN, true}, {p11.CKA_WRAP, true}})); err != nil {
		return err
	}
	name := []attribute{{p11.CKA_ID, id}, {p11.CKA_LABEL, []byte(label)}, {p11.CKA_TOKEN, true}}
	_, _, err := t.raw.GenerateKeyPair(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_EC_KEY_PAIR_GEN, nil)},
		template(name, []attribute{{p11.CKA_EC_PARAMS, oidP256}}), template(name, []attribute{{p11.CKA_SIGN, true}}))
	return err
}

// Attribute reads one attribute of a private key.
func (t *Token) Attribute(id hsm.KeyID, kind uint) ([]byte, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	b, err := id.Bytes()
	if err != nil {
		return nil, err
	}
	_, object, err := t.existing(b)
	if err != nil {
		return nil, err
	}
	v, err := t.read(object, kind)
	if err != nil {
		return nil, err
	}
	return v[0], nil
}

// SetAttribute tries to change one.
func (t *Token) SetAttribute(id hsm.KeyID, kind uint, value any) error {
	t.manage.Lock()
	defer t.manage.Unlock()
	b, err := id.Bytes()
	if err != nil {
		return err
	}
	_, object, err := t.existing(b)
	if err != nil {
		return err
	}
	return t.raw.SetAttributeValue(t.session, object, template([]attribute{{kind, value}}))
}

// Rewrap exports with a spec and SPKI of the test's choice, authenticated: what a bug, not an attacker, could make.
func (t *Token) Rewrap(b hsm.Blob) (hsm.Blob, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domainKeys("test")
	if err != nil {
		return b, err
	}
	b.MAC, err = t.mac(d.mac, b.Authenticated())
	return b, err
}

// Objects counts the objects with an id.
func (t *Token) Objects(id hsm.KeyID) (int, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	b, err := id.Bytes()
	if err != nil {
		return 0, err
	}
	objects, err := t.find(attribute{p11.CKA_ID, b})
	return len(objects), err
}
