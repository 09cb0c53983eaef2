package hsm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
)

// Algorithm is a key type with its size, spelled as in profiles.
type Algorithm string

// The algorithms. RSA signs with PKCS#1 v1.5. Ed25519 keys cannot be cloned: no module wraps them (SoftHSM answers
// CKR_KEY_NOT_WRAPPABLE), so that they exist only in groups whose vendor does the cloning.
const (
	P256    Algorithm = "P-256"
	P384    Algorithm = "P-384"
	RSA2048 Algorithm = "RSA-2048"
	RSA3072 Algorithm = "RSA-3072"
	RSA4096 Algorithm = "RSA-4096"
	Ed25519 Algorithm = "Ed25519"
)

// MaxMessage is the greatest length in octets of what an Ed25519 key signs, which is a message and no digest.
const MaxMessage = 4 << 10

// Algorithms lists every algorithm there is.
func Algorithms() []Algorithm { return []Algorithm{P256, P384, RSA2048, RSA3072, RSA4096, Ed25519} }

// Valid tells whether a is one of Algorithms.
func (a Algorithm) Valid() bool { return slices.Contains(Algorithms(), a) }

// Cloneable tells whether keys of that kind can be wrapped with a domain key.
func (a Algorithm) Cloneable() bool { return a.Valid() && a != Ed25519 }

// Hash is the hash whose digests keys of that kind sign; 0 for Ed25519, which signs messages.
func (a Algorithm) Hash() crypto.Hash {
	switch a {
	case Ed25519:
		return 0
	case P384:
		return crypto.SHA384
	}
	return crypto.SHA256
}

// RSABits is the modulus length of an RSA algorithm, 0 for others.
func (a Algorithm) RSABits() int {
	return map[Algorithm]int{RSA2048: 2048, RSA3072: 3072, RSA4096: 4096}[a]
}

// CheckDigest refuses what a key of that kind cannot sign. Challenges are 32 octets whatever the algorithm: see Digest.
func (a Algorithm) CheckDigest(d []byte) error {
	switch h := a.Hash(); {
	case h == 0 && (len(d) == 0 || len(d) > MaxMessage):
		return fmt.Errorf("message of %d octets: %s signs 1 to %d", len(d), a, MaxMessage)
	case h != 0 && len(d) != h.Size():
		return fmt.Errorf("digest of %d octets: %s signs %s digests, which have %d", len(d), a, h, h.Size())
	}
	return nil
}

// Digest is what a key of that kind signs to sign message: its hash, or the message itself.
func (a Algorithm) Digest(message []byte) []byte {
	h := a.Hash()
	if h == 0 {
		return message
	}
	d := h.New()
	d.Write(message)
	return d.Sum(nil)
}

// ParsePublic reads a DER SubjectPublicKeyInfo and refuses a key that is not of that kind.
func (a Algorithm) ParsePublic(spki []byte) (crypto.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("parsing public key: %w", err)
	}
	got, err := AlgorithmOf(key)
	if err == nil && got != a {
		err = fmt.Errorf("public key is %s, not %s", got, a)
	}
	return key, err
}

// AlgorithmOf names a public key's kind.
func AlgorithmOf(key crypto.PublicKey) (Algorithm, error) {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return P256, nil
		case elliptic.P384():
			return P384, nil
		}
	case *rsa.PublicKey:
		for _, a := range Algorithms() {
			if a.RSABits() == k.N.BitLen() {
				return a, nil
			}
		}
	case ed25519.PublicKey:
		return Ed25519, nil
	}
	return "", fmt.Errorf("a public key of type %T and its size are not supported", key)
}

var errSignature = errors.New("signature does not verify")

// Verify checks a signature as Token.Sign returns it: ASN.1 for ECDSA, PKCS#1 v1.5 for RSA.
func Verify(key crypto.PublicKey, digest, sig []byte) error {
	ok := false
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, digest, sig)
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(k, crypto.SHA256, digest, sig) == nil
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, digest, sig)
	}
	if !ok {
		return errSignature
	}
	return nil
}
