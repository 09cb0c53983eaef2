package pkcs11

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// errOpen is a module that hands out, wrapped, what it was told to keep.
var errOpen = errors.New("the module wraps keys that are marked as not extractable: it protects nothing, and may only be a member that its configuration marks as `test: true`")

// SelfTest has the module wrap and unwrap throwaway keys with a throwaway domain key, all of them session objects: what
// it makes of them must be what this process computes. Open does it at every start, since what a module can do changes
// with its version and configuration.
func (t *Token) SelfTest() error {
	t.manage.Lock()
	defer t.manage.Unlock()
	_, err := t.selfTest(false)
	return err
}

// selfTest finds the mechanism that is RFC 5649. With test, a module that gives non-extractable keys away passes.
func (t *Token) selfTest(test bool) (keyWrapPad uint, err error) {
	const op = "self-test"
	kek := make([]byte, 32)
	_, _ = rand.Read(kek) // documented never to fail
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, classify(op, err)
	}
	transport, err := t.transportPrivate()
	if err != nil {
		return 0, classify(op, err)
	}
	pub, err := hsm.ParseTransport(t.transport)
	if err != nil {
		return 0, classify(op, err)
	}

	// A secret sealed in Go comes in through OAEP.
	sealed, err := hsm.SealSecret(pub, kek)
	if err != nil {
		return 0, classify(op, err)
	}
	unseal := func(sealed []byte) (p11.ObjectHandle, error) {
		return t.raw.unwrap(t.session, p11.CKM_RSA_PKCS_OAEP, transport, sealed, template(secret(p11.CKK_AES, "self-test"), t.raw.profile.keeps(kekPolicy(false))))
	}
	with, err := unseal(sealed)
	if err != nil {
		return 0, classify(op, fmt.Errorf("unwrapping a key with RSA-OAEP: %w", err))
	}
	defer func() { _ = t.remove(with) }() // session objects, this and those below: gone with the process at the latest

	var object p11.ObjectHandle
	var tried []error
	for _, mechanism := range t.raw.profile.KeyWrapPad {
		if !t.raw.offers(t.slot, mechanism, p11.CKF_WRAP|p11.CKF_UNWRAP) {
			tried = append(tried, fmt.Errorf("mechanism 0x%X is not offered", mechanism))
		} else if object, err = t.roundTrip(mechanism, with, kek, key); err != nil {
			tried = append(tried, fmt.Errorf("mechanism 0x%X: %w", mechanism, err))
		} else {
			keyWrapPad = mechanism
			break
		}
	}
	if keyWrapPad == 0 {
		return 0, hsm.Errorf(hsm.ClassDevice, op, "token %s does not do AES key wrap with padding as in RFC 5649: %w", t.label, errors.Join(tried...))
	}
	defer func() { _ = t.remove(object) }()

	// The secret goes out through OAEP and comes back the same.
	to, err := t.recipient(pub)
	if err != nil {
		return 0, classify(op, err)
	}
	defer func() { _ = t.remove(to) }()
	if sealed, err = t.raw.wrap(t.session, p11.CKM_RSA_PKCS_OAEP, to, with); err != nil {
		return 0, classify(op, fmt.Errorf("wrapping a key with RSA-OAEP: %w", err))
	}
	again, err := unseal(sealed)
	if err != nil {
		return 0, classify(op, fmt.Errorf("unwrapping the module's own RSA-OAEP: %w", err))
	}
	defer func() { _ = t.remove(again) }()
	a, err := t.raw.wrap(t.session, keyWrapPad, with, with)
	b, failed := t.raw.wrap(t.session, keyWrapPad, again, with)
	if err := errors.Join(err, failed); err != nil {
		return 0, classify(op, fmt.Errorf("wrapping a secret key: %w", err))
	}
	if !bytes.Equal(a, b) {
		return 0, hsm.Errorf(hsm.ClassDevice, op, "token %s: a key that went out and in again with RSA-OAEP is another", t.label)
	}

	if err := t.refusals(keyWrapPad, with, object, kek, key); err != nil && (!test || !errors.Is(err, errOpen)) {
		return 0, classify(op, err)
	} else if err != nil {
		t.log.Warn("this token protects nothing", "token", t.label, "error", err)
	}
	return keyWrapPad, nil
}

// thrown is the template of a throwaway private key.
func (t *Token) thrown(key *ecdsa.PrivateKey, extractable bool) ([]*p11.Attribute, error) {
	lines := []attribute{
		{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)}, {p11.CKA_KEY_TYPE, uint(p11.CKK_EC)}, {p11.CKA_TOKEN, false}, {p11.CKA_PRIVATE, true},
		{p11.CKA_SENSITIVE, true}, {p11.CKA_SIGN, true}, {p11.CKA_EXTRACTABLE, extractable},
	}
	if kind := t.raw.profile.ECPoint; kind != 0 {
		point, err := pointOf(&key.PublicKey)
		if err != nil {
			return nil, err
		}
		lines = append(lines, attribute{kind, point})
	}
	return template(lines), nil
}

// roundTrip unwraps what Go has wrapped, and has Go unwrap what the module wraps: both must be the same key.
func (t *Token) roundTrip(mechanism uint, with p11.ObjectHandle, kek []byte, key *ecdsa.PrivateKey) (p11.ObjectHandle, error) {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return 0, err
	}
	wrapped, err := hsm.WrapKey(kek, pkcs8)
	if err != nil {
		return 0, err
	}
	lines, err := t.thrown(key, true)
	if err != nil {
		return 0, err
	}
	object, err := t.raw.unwrap(t.session, mechanism, with, wrapped, lines)
	if err != nil {
		return 0, fmt.Errorf("unwrapping: %w", err)
	}
	out, err := t.raw.wrap(t.session, mechanism, with, object)
	if err != nil {
		err = fmt.Errorf("wrapping: %w", err)
	} else if out, err = hsm.UnwrapKey(kek, out); err == nil {
		back, failed := x509.ParsePKCS8PrivateKey(out)
		if failed != nil || !key.Equal(back) {
			err = errors.New("the key came back another")
		}
	}
	if err != nil {
		_ = t.remove(object) // a session object
		return 0, err
	}
	return object, nil
}

// refusals checks that the module refuses what it must.
func (t *Token) refusals(mechanism uint, with, object p11.ObjectHandle, kek []byte, key *ecdsa.PrivateKey) error {
	if v, err := t.read(object, p11.CKA_VALUE); err == nil && len(v[0]) > 0 {
		return errors.New("a private key marked as sensitive can be read")
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	wrapped, err := hsm.WrapKey(kek, pkcs8)
	if err != nil {
		return err
	}
	lines, err := t.thrown(key, false)
	if err != nil {
		return err
	}
	flipped := bytes.Clone(wrapped)
	flipped[len(flipped)/2] ^= 1
	for name, bad := range map[string][]byte{"changed": flipped, "truncated": wrapped[:len(wrapped)-8]} {
		if wrong, err := t.raw.unwrap(t.session, mechanism, with, bad, lines); err == nil {
			_ = t.remove(wrong)
			return fmt.Errorf("a %s wrapped key was accepted", name)
		}
	}
	kept, err := t.raw.unwrap(t.session, mechanism, with, wrapped, lines)
	if err != nil {
		return fmt.Errorf("unwrapping a non-extractable key: %w", err)
	}
	defer func() { _ = t.remove(kept) }()
	if _, err := t.raw.wrap(t.session, mechanism, with, kept); err == nil {
		return errOpen
	}
	return nil
}
