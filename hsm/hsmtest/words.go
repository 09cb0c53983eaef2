package hsmtest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
)

// Spec is a fresh spec of a P-256 key with a random id.
func Spec(label string, p hsm.Purpose) hsm.KeySpec {
	return hsm.KeySpec{ID: hsm.NewKeyID(), Label: label, Purpose: p, Algorithm: hsm.P256}
}

// outside are keys of this process's making. RSA keys take a while to make, so there are two of each size, used in turn.
var outside struct {
	sync.Mutex
	rsa  map[hsm.Algorithm][]*rsa.PrivateKey
	next int
}

// Outside is a key of this process's making, sealed for a token; the one before was another.
func Outside(t testing.TB, a hsm.Algorithm, transportSPKI []byte) (spki, sealed []byte) {
	t.Helper()
	key, err := outsideKey(a)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if spki, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		t.Fatal(err)
	}
	if sealed, err = hsm.Seal(transportSPKI, pkcs8); err != nil {
		t.Fatal(err)
	}
	return spki, sealed
}

func outsideKey(a hsm.Algorithm) (crypto.Signer, error) {
	switch a {
	case hsm.P256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case hsm.P384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	}
	outside.Lock()
	defer outside.Unlock()
	if outside.rsa == nil {
		outside.rsa = map[hsm.Algorithm][]*rsa.PrivateKey{}
	}
	for len(outside.rsa[a]) < 2 {
		key, err := rsa.GenerateKey(rand.Reader, a.RSABits())
		if err != nil {
			return nil, err
		}
		outside.rsa[a] = append(outside.rsa[a], key)
	}
	outside.next++
	return outside.rsa[a][outside.next%2], nil
}

// Tampered is every way to change one thing about a blob.
func Tampered(b hsm.Blob) map[string]hsm.Blob {
	out := map[string]hsm.Blob{}
	change := func(name string, f func(*hsm.Blob)) {
		c := b
		c.Wrapped, c.SPKI, c.MAC = bytes.Clone(b.Wrapped), bytes.Clone(b.SPKI), bytes.Clone(b.MAC)
		f(&c)
		out[name] = c
	}
	change("empty", func(c *hsm.Blob) { c.Wrapped = nil })
	change("truncated by 8", func(c *hsm.Blob) { c.Wrapped = c.Wrapped[:len(c.Wrapped)-8] })
	change("truncated by 1", func(c *hsm.Blob) { c.Wrapped = c.Wrapped[:len(c.Wrapped)-1] })
	change("one block", func(c *hsm.Blob) { c.Wrapped = c.Wrapped[:8] })
	change("huge", func(c *hsm.Blob) { c.Wrapped = make([]byte, hsm.MaxBlob+8) })
	change("first bit", func(c *hsm.Blob) { c.Wrapped[0] ^= 0x80 })
	change("last bit", func(c *hsm.Blob) { c.Wrapped[len(c.Wrapped)-1] ^= 1 })
	change("purpose", func(c *hsm.Blob) { c.Purpose = hsm.PurposeOCSP })
	change("id", func(c *hsm.Blob) { c.ID = hsm.NewKeyID() })
	change("id and purpose", func(c *hsm.Blob) { c.ID, c.Purpose = hsm.NewKeyID(), hsm.PurposeOCSP })
	change("probe purpose", func(c *hsm.Blob) { c.Purpose = hsm.PurposeProbe })
	change("label", func(c *hsm.Blob) { c.Label += "x" })
	change("algorithm", func(c *hsm.Blob) {
		if c.Algorithm = hsm.P384; b.Algorithm == hsm.P384 {
			c.Algorithm = hsm.P256
		}
	})
	change("not extractable", func(c *hsm.Blob) { c.NonExtractable = true })
	change("domain", func(c *hsm.Blob) { c.KEK = "another" })
	change("spki", func(c *hsm.Blob) { c.SPKI[len(c.SPKI)-1] ^= 1 })
	change("no spki", func(c *hsm.Blob) { c.SPKI = nil })
	change("mac", func(c *hsm.Blob) { c.MAC[0] ^= 1 })
	change("no mac", func(c *hsm.Blob) { c.MAC = nil })
	return out
}

// Digests are n random SHA-256 digests.
func Digests(n int) [][]byte { return DigestsFor(hsm.P256, n) }

// DigestsFor are n random digests, or messages, as keys of that kind sign them.
func DigestsFor(a hsm.Algorithm, n int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		b := make([]byte, hsm.DigestSize)
		_, _ = rand.Read(b) // documented never to fail
		out[i] = a.Digest(b)
	}
	return out
}

// SignAndVerify signs n digests in one batch and verifies each with the record's SPKI.
func SignAndVerify(t *testing.T, token interface {
	Sign(context.Context, hsm.SignRequest) ([][]byte, error)
}, k hsm.KeyRecord, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	digests := DigestsFor(k.Algorithm, n)
	sigs, err := token.Sign(ctx, hsm.SignRequest{Key: k.ID, Digests: digests})
	if err != nil || len(sigs) != n {
		t.Errorf("signing %d digests: %d signatures, %v", n, len(sigs), err)
		return
	}
	for i := range digests {
		if !Verifies(t, k.SPKI, digests[i], sigs[i]) {
			t.Errorf("signature %d of %d does not verify", i, n)
		}
	}
}

// Verifies tells whether sig is a signature over digest by the key with that SPKI.
func Verifies(t *testing.T, spki, digest, sig []byte) bool {
	t.Helper()
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		t.Fatalf("parsing spki: %v", err)
	}
	return hsm.Verify(key, digest, sig) == nil
}

// PublicKey parses the SPKI of an ECDSA key.
func PublicKey(t *testing.T, spki []byte) *ecdsa.PublicKey {
	t.Helper()
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		t.Fatalf("parsing spki: %v", err)
	}
	return key.(*ecdsa.PublicKey)
}

// WantClass fails unless err is an *hsm.Error of one of the classes.
func WantClass(t *testing.T, err error, classes ...hsm.Class) {
	t.Helper()
	if _, ok := errors.AsType[*hsm.Error](err); !ok || !slices.Contains(classes, hsm.ClassOf(err)) {
		t.Errorf("want class %v, got %v", classes, err)
	}
}
