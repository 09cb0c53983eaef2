package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"math/big"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// kind is how PKCS#11 spells an algorithm.
type kind struct {
	keyType uint
	// generate and sign are the mechanisms.
	generate, sign uint
	// params is EC_PARAMS, which may also be read as name; bits is MODULUS_BITS.
	params, name []byte
	bits         int
}

var kinds = map[hsm.Algorithm]kind{
	hsm.P256:    {keyType: p11.CKK_EC, generate: p11.CKM_EC_KEY_PAIR_GEN, sign: p11.CKM_ECDSA, params: []byte{0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07}},
	hsm.P384:    {keyType: p11.CKK_EC, generate: p11.CKM_EC_KEY_PAIR_GEN, sign: p11.CKM_ECDSA, params: []byte{0x06, 0x05, 0x2B, 0x81, 0x04, 0x00, 0x22}},
	hsm.RSA2048: {keyType: p11.CKK_RSA, generate: p11.CKM_RSA_PKCS_KEY_PAIR_GEN, sign: p11.CKM_RSA_PKCS, bits: 2048},
	hsm.RSA3072: {keyType: p11.CKK_RSA, generate: p11.CKM_RSA_PKCS_KEY_PAIR_GEN, sign: p11.CKM_RSA_PKCS, bits: 3072},
	hsm.RSA4096: {keyType: p11.CKK_RSA, generate: p11.CKM_RSA_PKCS_KEY_PAIR_GEN, sign: p11.CKM_RSA_PKCS, bits: 4096},
	hsm.Ed25519: {keyType: ckkECEdwards, generate: ckmECEdwardsKeyPairGen, sign: ckmEDDSA, params: []byte{0x06, 0x03, 0x2B, 0x65, 0x70}, name: []byte("\x13\x0Cedwards25519")},
}

// generation is what a public key's template says about the kind of key to generate.
func (k kind) generation() []attribute {
	if k.bits > 0 {
		return []attribute{{p11.CKA_MODULUS_BITS, k.bits}, {p11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}}}
	}
	return []attribute{{p11.CKA_EC_PARAMS, k.params}}
}

// describes tells whether a key of kind k has that EC_PARAMS or MODULUS.
func (k kind) describes(param []byte) bool {
	if k.bits > 0 {
		return new(big.Int).SetBytes(param).BitLen() == k.bits
	}
	return bytes.Equal(param, k.params) || k.name != nil && bytes.Equal(param, k.name)
}

// algorithmOf reads what kind of key an object is, public or private. Empty is a kind that is not ours, or an object that
// a process was killed in the middle of making.
func algorithmOf(o object) (hsm.Algorithm, error) {
	v, err := o.read(p11.CKA_KEY_TYPE)
	if err != nil {
		return "", err
	}
	asked := uint(p11.CKA_EC_PARAMS)
	if bytes.Equal(v[0], ulong(p11.CKK_RSA)) {
		asked = p11.CKA_MODULUS
	}
	param, err := o.read(asked)
	if is(err, p11.CKR_ATTRIBUTE_TYPE_INVALID) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	for a, k := range kinds {
		if bytes.Equal(v[0], ulong(k.keyType)) && k.describes(param[0]) {
			return a, nil
		}
	}
	return "", nil
}

// ulong is a CK_ULONG as attributes hold it.
func ulong(v uint) []byte { return p11.NewAttribute(0, v).Value }

// publicKey reads a public object. What is wrong with it is a fault, not an error.
func publicKey(o object) (spki []byte, fault string, err error) {
	a, err := algorithmOf(o)
	if err != nil {
		return nil, "", err
	}
	var pub crypto.PublicKey
	switch k := kinds[a]; {
	case a == "":
		return nil, "the public key is of no known kind", nil
	case k.bits > 0:
		v, err := o.read(p11.CKA_MODULUS, p11.CKA_PUBLIC_EXPONENT)
		if err != nil {
			return nil, "", err
		}
		e := new(big.Int).SetBytes(v[1])
		if !e.IsInt64() || e.Int64() < 3 || e.Int64() > 1<<31-1 {
			return nil, "the public exponent is out of bounds", nil
		}
		pub = &rsa.PublicKey{N: new(big.Int).SetBytes(v[0]), E: int(e.Int64())}
	default:
		v, err := o.read(p11.CKA_EC_POINT)
		if err != nil {
			return nil, "", err
		}
		if pub, err = pointKey(a, v[0]); err != nil {
			return nil, err.Error(), nil
		}
	}
	if spki, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		return nil, err.Error(), nil
	}
	return spki, "", nil
}

// pointKey reads a CKA_EC_POINT: the point inside a DER OCTET STRING.
func pointKey(a hsm.Algorithm, der []byte) (crypto.PublicKey, error) {
	var point []byte
	if rest, err := asn1.Unmarshal(der, &point); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("the public point is not one DER octet string")
	}
	switch a {
	case hsm.Ed25519:
		if len(point) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("the public point has %d octets", len(point))
		}
		return ed25519.PublicKey(point), nil
	case hsm.P384:
		return ecdsa.ParseUncompressedPublicKey(elliptic.P384(), point)
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
}

// parseSPKI accepts a public key of that kind in exactly its DER form, so that equal keys are equal octets.
func parseSPKI(a hsm.Algorithm, spki []byte) (crypto.PublicKey, error) {
	pub, err := a.ParsePublic(spki)
	if err != nil {
		return nil, err
	}
	again, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil || !bytes.Equal(again, spki) {
		return nil, fmt.Errorf("spki is not in canonical DER")
	}
	return pub, nil
}

// publicTemplate is what makes a public object of pub, beside its names and policy.
func publicTemplate(a hsm.Algorithm, pub crypto.PublicKey) ([]attribute, error) {
	out := []attribute{{p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)}, {p11.CKA_KEY_TYPE, kinds[a].keyType}}
	if k, ok := pub.(*rsa.PublicKey); ok {
		return append(out, attribute{p11.CKA_MODULUS, k.N.Bytes()}, attribute{p11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(k.E)).Bytes()}), nil
	}
	point, err := pointOf(pub)
	if err != nil {
		return nil, err
	}
	der, err := asn1.Marshal(point)
	if err != nil {
		return nil, fmt.Errorf("encoding the public point: %w", err)
	}
	return append(out, attribute{p11.CKA_EC_PARAMS, kinds[a].params}, attribute{p11.CKA_EC_POINT, der}), nil
}

func pointOf(pub crypto.PublicKey) ([]byte, error) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			return nil, fmt.Errorf("encoding the public point: %w", err)
		}
		return point, nil
	case ed25519.PublicKey:
		return k, nil
	}
	return nil, fmt.Errorf("a public key of type %T has no point", pub)
}
