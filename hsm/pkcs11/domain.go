package pkcs11

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// A domain is two secret keys with one name: the AES-256 key that wraps, and the HMAC key that authenticates blobs.
// Both travel together, each under RSA-OAEP to the receiving token's transport key. OAEP is with SHA-1, the only hash
// that every module offers here; OAEP's security does not rest on the hash's collision resistance.
const (
	kekPrefix      = "trivet-kek:"
	macPrefix      = "trivet-mac:"
	transportLabel = "trivet-transport"
	transportBits  = 3072
)

// parseDomainLabel reads the label of one of a domain's keys.
func parseDomainLabel(label string) (prefix, name string, ok bool) {
	for _, p := range []string{kekPrefix, macPrefix} {
		if name, ok := strings.CutPrefix(label, p); ok && hsm.CheckDomainName(name) == nil {
			return p, name, true
		}
	}
	return "", "", false
}

func keyWrapPad() []*p11.Mechanism {
	return []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_KEY_WRAP_PAD, nil)}
}

func oaep() []*p11.Mechanism {
	return []*p11.Mechanism{p11.NewMechanism(p11.CKM_RSA_PKCS_OAEP,
		p11.NewOAEPParams(p11.CKM_SHA_1, p11.CKG_MGF1_SHA1, p11.CKZ_DATA_SPECIFIED, nil))}
}

// kekPolicy: wraps and unwraps, and nothing that would turn either into reading a key.
func kekPolicy(token bool) []attribute {
	return []attribute{
		{p11.CKA_TOKEN, token}, {p11.CKA_PRIVATE, true}, {p11.CKA_SENSITIVE, true}, {p11.CKA_EXTRACTABLE, true},
		{p11.CKA_WRAP, true}, {p11.CKA_UNWRAP, true}, {p11.CKA_ENCRYPT, false}, {p11.CKA_DECRYPT, false},
		{p11.CKA_SIGN, false}, {p11.CKA_VERIFY, false}, {p11.CKA_DERIVE, false}, {p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false},
	}
}

func macPolicy(token bool) []attribute {
	return []attribute{
		{p11.CKA_TOKEN, token}, {p11.CKA_PRIVATE, true}, {p11.CKA_SENSITIVE, true}, {p11.CKA_EXTRACTABLE, true},
		{p11.CKA_SIGN, true}, {p11.CKA_VERIFY, true}, {p11.CKA_ENCRYPT, false}, {p11.CKA_DECRYPT, false},
		{p11.CKA_WRAP, false}, {p11.CKA_UNWRAP, false}, {p11.CKA_DERIVE, false}, {p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false},
	}
}

func secret(keyType uint, label string) []attribute {
	return []attribute{{p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)}, {p11.CKA_KEY_TYPE, keyType}, {p11.CKA_LABEL, []byte(label)}}
}

// domainKeys is the domain the token holds. A half of one, left by a process that died, counts as none.
type domainKeys struct {
	name     string
	kek, mac p11.ObjectHandle
}

// halves reads the domain's keys as they are; name is empty when there is neither.
func (t *Token) halves() (d domainKeys, err error) {
	objects, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)}, attribute{p11.CKA_TOKEN, true})
	if err != nil {
		return d, err
	}
	for _, object := range objects {
		v, err := t.read(object, p11.CKA_LABEL)
		if err != nil {
			return d, err
		}
		prefix, name, ok := parseDomainLabel(string(v[0]))
		if !ok {
			continue
		}
		at := &d.kek
		if prefix == macPrefix {
			at = &d.mac
		}
		if *at != 0 || d.name != "" && d.name != name {
			return d, hsm.Errorf(hsm.ClassRequest, "domain", "token %s holds more than one domain key (%s, %s): an operator must look", t.label, d.name, name)
		}
		d.name, *at = name, object
	}
	return d, nil
}

// findDomain is the name of the whole domain held, or empty.
func (t *Token) findDomain() (string, error) {
	d, err := t.halves()
	if err != nil {
		return "", classify("domain", err)
	}
	if d.kek == 0 || d.mac == 0 {
		return "", nil
	}
	return d.name, nil
}

// domainKeys is the whole domain held, or ClassRequest.
func (t *Token) domainKeys(op string) (domainKeys, error) {
	d, err := t.halves()
	if err != nil {
		return d, classify(op, err)
	}
	if d.kek == 0 || d.mac == 0 {
		return d, hsm.Errorf(hsm.ClassRequest, op, "token %s holds no domain key yet", t.label)
	}
	return d, nil
}

// GenerateDomain makes the domain called kek. It does nothing when the token holds it and refuses when it holds another.
func (t *Token) GenerateDomain(kek string) error {
	const op = "generate-domain"
	if err := hsm.CheckDomainName(kek); err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.halves()
	if err != nil {
		return classify(op, err)
	}
	if d.name != "" && d.name != kek {
		return hsm.Errorf(hsm.ClassRequest, op, "token %s already holds domain key %q", t.label, d.name)
	}
	if d.kek == 0 {
		if _, err := t.raw.GenerateKey(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_KEY_GEN, nil)}, template(
			secret(p11.CKK_AES, kekPrefix+kek), []attribute{{p11.CKA_VALUE_LEN, 32}}, kekPolicy(true))); err != nil {
			return classify(op, err)
		}
	}
	if d.mac == 0 {
		if _, err := t.raw.GenerateKey(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_GENERIC_SECRET_KEY_GEN, nil)}, template(
			secret(p11.CKK_GENERIC_SECRET, macPrefix+kek), []attribute{{p11.CKA_VALUE_LEN, 32}}, macPolicy(true))); err != nil {
			return classify(op, err)
		}
	}
	t.holds(kek)
	return nil
}

func (t *Token) holds(kek string) {
	t.mu.Lock()
	t.domain = kek
	t.mu.Unlock()
}

// TransportKey is the SPKI of the RSA key that only unwraps a domain key coming into this token, and never leaves it.
func (t *Token) TransportKey() ([]byte, error) { return t.transport, nil }

// ExportDomain wraps the domain for the token with that transport key. Whether the key really is a token's is for the
// caller to know: whoever holds its private half learns every key of the group.
func (t *Token) ExportDomain(transport []byte) (wrapped []byte, kek string, err error) {
	const op = "export-domain"
	key, err := x509.ParsePKIXPublicKey(transport)
	pub, ok := key.(*rsa.PublicKey)
	if err != nil || !ok || pub.N.BitLen() != transportBits || pub.E != 65537 {
		return nil, "", hsm.Errorf(hsm.ClassRequest, op, "the transport key is not an RSA-%d key with exponent 65537", transportBits)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domainKeys(op)
	if err != nil {
		return nil, "", err
	}
	to, err := t.raw.CreateObject(t.session, template([]attribute{
		{p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)}, {p11.CKA_KEY_TYPE, uint(p11.CKK_RSA)}, {p11.CKA_TOKEN, false}, {p11.CKA_PRIVATE, false},
		{p11.CKA_WRAP, true}, {p11.CKA_ENCRYPT, false}, {p11.CKA_VERIFY, false},
		{p11.CKA_MODULUS, pub.N.Bytes()}, {p11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(pub.E)).Bytes()},
	}))
	if err != nil {
		return nil, "", opaque(op, err)
	}
	defer func() { _ = t.raw.DestroyObject(t.session, to) }() // a session object: gone with the process at the latest
	for _, object := range []p11.ObjectHandle{d.kek, d.mac} {
		half, err := t.raw.WrapKey(t.session, oaep(), to, object)
		if err != nil {
			return nil, "", classify(op, err)
		}
		wrapped = append(wrapped, half...)
	}
	return wrapped, d.name, nil
}

// ImportDomain takes the domain called kek as wrapped by ExportDomain for this token's transport key. It does nothing
// when the token holds that very domain, and refuses when it holds another, be it with the same name.
func (t *Token) ImportDomain(kek string, wrapped []byte) error {
	const op = "import-domain"
	if err := hsm.CheckDomainName(kek); err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	const half = transportBits / 8
	if len(wrapped) != 2*half {
		return hsm.Errorf(hsm.ClassRequest, op, "wrapped domain key of %d octets: must be %d", len(wrapped), 2*half)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.halves()
	if err != nil {
		return classify(op, err)
	}
	if d.name != "" && d.name != kek {
		return hsm.Errorf(hsm.ClassRequest, op, "token %s already holds domain key %q", t.label, d.name)
	}
	transport, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)}, attribute{p11.CKA_LABEL, []byte(transportLabel)})
	if err != nil {
		return classify(op, err)
	}
	if len(transport) != 1 {
		return hsm.Errorf(hsm.ClassDevice, op, "token %s holds %d transport keys", t.label, len(transport))
	}
	// Both halves come in as session objects first: nothing stays in the token unless the whole is good.
	kekIn, err := t.raw.UnwrapKey(t.session, oaep(), transport[0], wrapped[:half], template(secret(p11.CKK_AES, kekPrefix+kek), kekPolicy(false)))
	if err != nil {
		return opaque(op, err)
	}
	defer func() { _ = t.raw.DestroyObject(t.session, kekIn) }()
	macIn, err := t.raw.UnwrapKey(t.session, oaep(), transport[0], wrapped[half:], template(secret(p11.CKK_GENERIC_SECRET, macPrefix+kek), macPolicy(false)))
	if err != nil {
		return opaque(op, err)
	}
	defer func() { _ = t.raw.DestroyObject(t.session, macIn) }()
	if same, err := t.sameDomain(d, domainKeys{kek, kekIn, macIn}); err != nil {
		return classify(op, err)
	} else if !same {
		return hsm.Errorf(hsm.ClassRequest, op, "token %s already holds another domain key called %q", t.label, kek)
	}
	if d.kek == 0 {
		if _, err := t.raw.UnwrapKey(t.session, oaep(), transport[0], wrapped[:half], template(secret(p11.CKK_AES, kekPrefix+kek), kekPolicy(true))); err != nil {
			return opaque(op, err)
		}
	}
	if d.mac == 0 {
		if _, err := t.raw.UnwrapKey(t.session, oaep(), transport[0], wrapped[half:], template(secret(p11.CKK_GENERIC_SECRET, macPrefix+kek), macPolicy(true))); err != nil {
			return opaque(op, err)
		}
	}
	t.holds(kek)
	return nil
}

// sameDomain tells whether the halves that the token holds equal those that came in: the same canary gives the same
// octets, since key wrap and HMAC are deterministic.
func (t *Token) sameDomain(held, in domainKeys) (bool, error) {
	if held.kek != 0 {
		canary, err := t.raw.GenerateKey(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_GENERIC_SECRET_KEY_GEN, nil)}, template(
			secret(p11.CKK_GENERIC_SECRET, "canary"), []attribute{{p11.CKA_VALUE_LEN, 32}}, macPolicy(false)))
		if err != nil {
			return false, err
		}
		defer func() { _ = t.raw.DestroyObject(t.session, canary) }()
		a, err := t.raw.WrapKey(t.session, keyWrapPad(), held.kek, canary)
		if err != nil {
			return false, err
		}
		b, err := t.raw.WrapKey(t.session, keyWrapPad(), in.kek, canary)
		if err != nil || !bytes.Equal(a, b) {
			return false, err
		}
	}
	if held.mac != 0 {
		a, err := t.mac(held.mac, []byte("canary"))
		if err != nil {
			return false, err
		}
		b, err := t.mac(in.mac, []byte("canary"))
		if err != nil || !bytes.Equal(a, b) {
			return false, err
		}
	}
	return true, nil
}

// mac is HMAC-SHA256 with a key in the token.
func (t *Token) mac(key p11.ObjectHandle, message []byte) ([]byte, error) {
	if err := t.raw.SignInit(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_SHA256_HMAC, nil)}, key); err != nil {
		return nil, err
	}
	return t.raw.Sign(t.session, message)
}

// ensureTransport finds or makes the transport key pair: RSA-3072, unwrap only, never extractable.
func (t *Token) ensureTransport() ([]byte, error) {
	const op = "transport"
	publics, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)}, attribute{p11.CKA_LABEL, []byte(transportLabel)})
	if err != nil {
		return nil, classify(op, err)
	}
	if len(publics) == 0 {
		id, _ := hsm.NewKeyID().Bytes() // well-formed by construction
		name := []attribute{{p11.CKA_ID, id}, {p11.CKA_LABEL, []byte(transportLabel)}}
		public, _, err := t.raw.GenerateKeyPair(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
			template(name, []attribute{{p11.CKA_MODULUS_BITS, transportBits}, {p11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}},
				{p11.CKA_TOKEN, true}, {p11.CKA_WRAP, true}, {p11.CKA_ENCRYPT, false}, {p11.CKA_VERIFY, false}, {p11.CKA_MODIFIABLE, false}}),
			template(name, []attribute{{p11.CKA_TOKEN, true}, {p11.CKA_PRIVATE, true}, {p11.CKA_SENSITIVE, true}, {p11.CKA_EXTRACTABLE, false},
				{p11.CKA_UNWRAP, true}, {p11.CKA_DECRYPT, false}, {p11.CKA_SIGN, false}, {p11.CKA_SIGN_RECOVER, false},
				{p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false}}))
		if err != nil {
			return nil, classify(op, err)
		}
		publics = []p11.ObjectHandle{public}
	}
	if len(publics) > 1 {
		return nil, hsm.Errorf(hsm.ClassRequest, op, "token %s holds %d transport keys: an operator must look", t.label, len(publics))
	}
	v, err := t.read(publics[0], p11.CKA_MODULUS, p11.CKA_PUBLIC_EXPONENT)
	if err != nil {
		return nil, classify(op, err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(v[0]), E: int(new(big.Int).SetBytes(v[1]).Int64())})
	if err != nil {
		return nil, classify(op, err)
	}
	return spki, nil
}
