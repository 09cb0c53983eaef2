package pkcs11

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"

	"github.com/ThalesIgnite/crypto11"
	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// attribute is one line of a template.
type attribute struct {
	kind  uint
	value any
}

// template keeps the order of its lines, because SoftHSM refuses whatever follows MODIFIABLE=false in an unwrap.
func template(parts ...[]attribute) []*p11.Attribute {
	var out []*p11.Attribute
	for _, part := range parts {
		for _, a := range part {
			out = append(out, p11.NewAttribute(a.kind, a.value))
		}
	}
	return out
}

// attributeSet is template for crypto11, which keeps no order.
func attributeSet(parts ...[]attribute) (crypto11.AttributeSet, error) {
	set := crypto11.NewAttributeSet()
	for _, part := range parts {
		for _, a := range part {
			if err := set.Set(a.kind, a.value); err != nil {
				return nil, fmt.Errorf("setting attribute 0x%X: %w", a.kind, err)
			}
		}
	}
	return set, nil
}

func naming(spec hsm.KeySpec, id []byte) []attribute {
	return []attribute{{p11.CKA_ID, id}, {p11.CKA_LABEL, []byte(spec.ObjectLabel())}}
}

// privatePolicy is what every private key of ours looks like, generated or imported: it signs and does nothing else,
// and nobody can change that afterwards, its label (and so its purpose) included. MODIFIABLE stays last.
func privatePolicy(extractable bool) []attribute {
	return []attribute{
		{p11.CKA_TOKEN, true}, {p11.CKA_PRIVATE, true}, {p11.CKA_SENSITIVE, true}, {p11.CKA_SIGN, true},
		{p11.CKA_EXTRACTABLE, extractable},
		{p11.CKA_SIGN_RECOVER, false}, {p11.CKA_DECRYPT, false}, {p11.CKA_UNWRAP, false}, {p11.CKA_DERIVE, false},
		{p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false},
	}
}

func publicPolicy() []attribute {
	return []attribute{
		{p11.CKA_TOKEN, true}, {p11.CKA_PRIVATE, false}, {p11.CKA_VERIFY, true},
		{p11.CKA_ENCRYPT, false}, {p11.CKA_WRAP, false}, {p11.CKA_VERIFY_RECOVER, false}, {p11.CKA_DERIVE, false},
		{p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false},
	}
}

// digested are the attributes of a private key whose digest a clone shares with its original, in this order. LOCAL,
// ALWAYS_SENSITIVE and NEVER_EXTRACTABLE differ by nature and are left out.
var digested = []struct {
	kind uint
	name string
}{
	{p11.CKA_KEY_TYPE, "KEY_TYPE"}, {p11.CKA_LABEL, "LABEL"}, {p11.CKA_EC_PARAMS, "EC_PARAMS"}, {p11.CKA_TOKEN, "TOKEN"},
	{p11.CKA_PRIVATE, "PRIVATE"}, {p11.CKA_SENSITIVE, "SENSITIVE"}, {p11.CKA_EXTRACTABLE, "EXTRACTABLE"},
	{p11.CKA_WRAP_WITH_TRUSTED, "WRAP_WITH_TRUSTED"}, {p11.CKA_SIGN, "SIGN"}, {p11.CKA_SIGN_RECOVER, "SIGN_RECOVER"},
	{p11.CKA_DECRYPT, "DECRYPT"}, {p11.CKA_UNWRAP, "UNWRAP"}, {p11.CKA_DERIVE, "DERIVE"}, {p11.CKA_MODIFIABLE, "MODIFIABLE"},
	{p11.CKA_COPYABLE, "COPYABLE"}, {p11.CKA_ALWAYS_AUTHENTICATE, "ALWAYS_AUTHENTICATE"},
}

// attributeDigest reads the digested attributes of a private key and hashes them as NAME=hex lines; one that the module
// does not know reads as absent.
func (t *Token) attributeDigest(object p11.ObjectHandle) (string, error) {
	h := sha256.New()
	for _, a := range digested {
		value := "absent"
		got, err := t.raw.GetAttributeValue(t.session, object, []*p11.Attribute{p11.NewAttribute(a.kind, nil)})
		switch {
		case is(err, p11.CKR_ATTRIBUTE_TYPE_INVALID):
		case err != nil:
			return "", fmt.Errorf("reading attribute %s: %w", a.name, err)
		default:
			value = hex.EncodeToString(got[0].Value)
		}
		fmt.Fprintf(h, "%s=%s\n", a.name, value)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// obeysPolicy tells whether a private key has exactly the attributes of privatePolicy.
func (t *Token) obeysPolicy(object p11.ObjectHandle, extractable bool) error {
	for _, want := range privatePolicy(extractable) {
		got, err := t.raw.GetAttributeValue(t.session, object, []*p11.Attribute{p11.NewAttribute(want.kind, nil)})
		if err != nil {
			return fmt.Errorf("reading attribute 0x%X: %w", want.kind, err)
		}
		if isTrue(got[0].Value) != want.value {
			return hsm.Errorf(hsm.ClassRequest, "policy", "the token set attribute 0x%X against its template", want.kind)
		}
	}
	return nil
}

func isTrue(b []byte) bool { return len(b) == 1 && b[0] != 0 }

// oidP256 is EC_PARAMS of the one curve there is.
var oidP256 = []byte{0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07}

// parseSPKI accepts a P-256 public key in exactly its DER form, so that equal keys are equal octets.
func parseSPKI(spki []byte) (*ecdsa.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("parsing spki: %w", err)
	}
	pub, ok := key.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, fmt.Errorf("spki is not a P-256 key")
	}
	again, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil || string(again) != string(spki) {
		return nil, fmt.Errorf("spki is not in canonical DER")
	}
	return pub, nil
}

// ecPoint is CKA_EC_POINT: the uncompressed point inside a DER OCTET STRING.
func ecPoint(pub *ecdsa.PublicKey) ([]byte, error) {
	point, err := pub.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encoding the public point: %w", err)
	}
	return asn1.Marshal(point)
}

// spkiOf is the reverse of ecPoint.
func spkiOf(params, point []byte) ([]byte, error) {
	if string(params) != string(oidP256) {
		return nil, fmt.Errorf("curve parameters %x are not P-256", params)
	}
	var octets []byte
	if rest, err := asn1.Unmarshal(point, &octets); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("public point is not one DER octet string")
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), octets)
	if err != nil {
		return nil, fmt.Errorf("parsing the public point: %w", err)
	}
	return x509.MarshalPKIXPublicKey(pub)
}
