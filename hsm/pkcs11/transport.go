package pkcs11

import (
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// A transport key is named after its member, so that one that a vendor's cloning brought along is no second one of this token.
const transportPrefix = hsm.TransportPrefix

func (t *Token) transportLabel() string { return transportNamed(t.member) }

func transportNamed(member string) string {
	if member == "" {
		return transportPrefix
	}
	return transportPrefix + ":" + member
}

// isTransport tells whether an object of that label is some member's transport key.
func isTransport(label string) bool {
	return label == transportPrefix || strings.HasPrefix(label, transportPrefix+":")
}

// stranger is the fingerprint of another member's transport key; empty where it cannot be told.
func (t *Token) stranger(object p11.ObjectHandle) string {
	v, err := t.read(object, p11.CKA_MODULUS, p11.CKA_PUBLIC_EXPONENT)
	if err != nil || len(v[0]) == 0 || len(v[1]) == 0 {
		return ""
	}
	spki, err := transportSPKI(v[0], v[1])
	if err != nil {
		return ""
	}
	return hsm.Fingerprint(spki)
}

// TransportKey is the SPKI of the RSA key that only unwraps a domain key coming into this token, and never leaves it.
func (t *Token) TransportKey() ([]byte, error) { return t.transport, nil }

// transportPrivate is the private half of the transport key. It has no public half in the token: its own attributes say
// what that is.
func (t *Token) transportPrivate() (p11.ObjectHandle, error) {
	objects, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)}, attribute{p11.CKA_LABEL, []byte(t.transportLabel())})
	if err != nil {
		return 0, err
	}
	if len(objects) != 1 {
		return 0, hsm.Errorf(hsm.ClassDevice, "transport", "token %s holds %d transport keys", t.label, len(objects))
	}
	return objects[0], nil
}

// ensureTransport finds or makes the transport key: RSA-3072, unwrap only, never extractable.
func (t *Token) ensureTransport() ([]byte, error) {
	const op = "transport"
	objects, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)}, attribute{p11.CKA_LABEL, []byte(t.transportLabel())})
	if err != nil {
		return nil, classify(op, err)
	}
	if len(objects) > 1 {
		return nil, hsm.Errorf(hsm.ClassRequest, op, "token %s holds %d transport keys of this member: an operator must look", t.label, len(objects))
	}
	if len(objects) == 1 {
		v, err := t.read(objects[0], p11.CKA_MODULUS, p11.CKA_PUBLIC_EXPONENT)
		if err != nil {
			return nil, classify(op, err)
		}
		if len(v[0]) > 0 && len(v[1]) > 0 {
			return transportSPKI(v[0], v[1])
		}
		if err := t.remove(objects[0]); err != nil { // incomplete: its maker was killed
			return nil, classify(op, err)
		}
	}
	id, _ := hsm.NewKeyID().Bytes() // well-formed by construction
	name := []attribute{{p11.CKA_ID, id}, {p11.CKA_LABEL, []byte(t.transportLabel())}}
	_, private, err := t.raw.GenerateKeyPair(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
		template(name, []attribute{{p11.CKA_MODULUS_BITS, hsm.TransportBits}, {p11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}},
			{p11.CKA_TOKEN, false}, {p11.CKA_WRAP, true}, {p11.CKA_ENCRYPT, false}, {p11.CKA_VERIFY, false}}),
		template(name, t.raw.profile.keeps([]attribute{{p11.CKA_TOKEN, true}, {p11.CKA_PRIVATE, true}, {p11.CKA_SENSITIVE, true}, {p11.CKA_EXTRACTABLE, false},
			{p11.CKA_UNWRAP, true}, {p11.CKA_DECRYPT, false}, {p11.CKA_SIGN, false}, {p11.CKA_SIGN_RECOVER, false},
			{p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false}})))
	if err != nil {
		return nil, classify(op, err)
	}
	v, err := t.read(private, p11.CKA_MODULUS, p11.CKA_PUBLIC_EXPONENT)
	if err != nil {
		return nil, classify(op, err)
	}
	return transportSPKI(v[0], v[1])
}

func transportSPKI(modulus, exponent []byte) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: int(new(big.Int).SetBytes(exponent).Int64())})
	if err == nil {
		_, err = hsm.ParseTransport(spki)
	}
	return spki, classify("transport", err)
}

// recipient is a public key, for this session, that secret keys can be wrapped to.
func (t *Token) recipient(pub *rsa.PublicKey) (p11.ObjectHandle, error) {
	return t.raw.CreateObject(t.session, template([]attribute{
		{p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)}, {p11.CKA_KEY_TYPE, uint(p11.CKK_RSA)}, {p11.CKA_TOKEN, false}, {p11.CKA_PRIVATE, false},
		{p11.CKA_WRAP, true}, {p11.CKA_ENCRYPT, false}, {p11.CKA_VERIFY, false},
		{p11.CKA_MODULUS, pub.N.Bytes()}, {p11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(pub.E)).Bytes()},
	}))
}
