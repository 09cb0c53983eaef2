package pkcs11

import (
	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// Classify is what an error of the module becomes.
func Classify(code uint) error { return classify("test", p11.Error(code)) }

// The names of profiles, by what a library says of itself.
func ProfileOf(manufacturer string) Profile         { return profileOf(manufacturer) }
func ProfileNamed(name string) (Profile, error)     { return profileNamed(name) }
func (t *Token) Profile() Profile                   { return t.raw.profile }
func (t *Token) UseProfile(change func(p *Profile)) { change(&t.raw.profile) }

// DestroyHalves removes the halves of a key that are of those classes.
func (t *Token) DestroyHalves(id hsm.KeyID, classes ...uint) error {
	t.manage.Lock()
	defer t.manage.Unlock()
	b, err := id.Bytes()
	if err != nil {
		return err
	}
	p, err := t.pair(b)
	if err != nil {
		return err
	}
	for _, class := range classes {
		objects := p.privates
		if class == p11.CKO_PUBLIC_KEY {
			objects = p.publics
		}
		if err := t.remove(objects...); err != nil {
			return err
		}
	}
	return nil
}

// DestroySecret removes a secret key by its label, such as one half of a domain.
func (t *Token) DestroySecret(label string) (int, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	objects, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)}, attribute{p11.CKA_LABEL, []byte(label)})
	if err != nil {
		return 0, err
	}
	return len(objects), t.remove(objects...)
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
		template(name, kinds[hsm.P256].generation()), template(name, []attribute{{p11.CKA_SIGN, true}}))
	return err
}

// Swap makes a pair that is called spec, with the public half of another key: what nobody should be able to make, and what a
// handle that names another object after a reset looks like.
func (t *Token) Swap(spec hsm.KeySpec, publicSPKI []byte) error {
	t.manage.Lock()
	defer t.manage.Unlock()
	id, err := spec.ID.Bytes()
	if err != nil {
		return err
	}
	pub, err := parseSPKI(spec.Algorithm, publicSPKI)
	if err != nil {
		return err
	}
	lines, err := publicTemplate(spec.Algorithm, pub)
	if err != nil {
		return err
	}
	if _, err := t.raw.CreateObject(t.session, template(lines, naming(spec, id), t.raw.profile.keeps(publicPolicy()))); err != nil {
		return err
	}
	t.doubt(id) // or nobody would look for it
	k := kinds[spec.Algorithm]
	_, _, err = t.raw.GenerateKeyPair(t.session, []*p11.Mechanism{p11.NewMechanism(k.generate, nil)},
		template(k.generation(), []attribute{{p11.CKA_TOKEN, false}, {p11.CKA_VERIFY, true}}),
		template(naming(spec, id), t.raw.profile.privatePolicy(true)))
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
	p, err := t.pair(b)
	if err != nil {
		return nil, err
	}
	v, err := t.read(p.privates[0], kind)
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
	p, err := t.pair(b)
	if err != nil {
		return err
	}
	return t.raw.SetAttributeValue(t.session, p.privates[0], template([]attribute{{kind, value}}))
}

// Rewrap authenticates a blob of the test's choice: what a bug, not an attacker, could make.
func (t *Token) Rewrap(b hsm.Blob) (hsm.Blob, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domain("test", b.KEK)
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

// WriteNote adds a note of that kind (domains, epoch) beside those that are there, as a process does that is killed before
// it removes them.
func (t *Token) WriteNote(kind string, value []byte) error {
	t.manage.Lock()
	defer t.manage.Unlock()
	return t.put(notePrefix+kind, value)
}

// Notes counts them.
func (t *Token) Notes(kind string) (int, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	notes, err := t.notes(notePrefix + kind)
	return len(notes), err
}

// Logout ends the login of every session.
func (t *Token) Logout() error { return t.raw.Logout(t.session) }

// Leftovers counts the session objects, signing copies among them.
func (t *Token) Leftovers() (int, error) {
	t.manage.Lock()
	defer t.manage.Unlock()
	if err := t.raw.FindObjectsInit(t.session, template([]attribute{{p11.CKA_TOKEN, false}})); err != nil {
		return 0, err
	}
	objects, _, err := t.raw.FindObjects(t.session, 1000)
	if err != nil {
		return 0, err
	}
	return len(objects), t.raw.FindObjectsFinal(t.session)
}
