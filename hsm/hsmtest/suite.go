// Package hsmtest is the contract of a token as a test suite, and a laboratory of real agents on real SoftHSM tokens to
// run it, and anything built on it, against.
package hsmtest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
)

// Token is the contract under test. An *agent.Client is one; Direct makes one of a token without its agent.
type Token interface {
	Inventory(context.Context) ([]hsm.KeyRecord, error)
	Sign(ctx context.Context, key hsm.KeyID, digests [][]byte) ([][]byte, error)
	Generate(context.Context, hsm.KeySpec) (hsm.KeyRecord, error)
	Export(context.Context, hsm.KeyID) (hsm.Blob, error)
	Import(context.Context, hsm.Blob) (hsm.KeyRecord, error)
	TransportKey(context.Context) ([]byte, error)
	GenerateDomain(ctx context.Context, kek string) error
	ExportDomain(ctx context.Context, transport []byte) (wrapped []byte, kek string, err error)
	ImportDomain(ctx context.Context, kek string, wrapped []byte) error
}

// Direct calls a token in this process. Digests of a batch are signed one after the other.
func Direct(t agent.Token) Token { return direct{t} }

type direct struct{ agent.Token }

func (d direct) Inventory(context.Context) ([]hsm.KeyRecord, error) { return d.Token.Inventory() }
func (d direct) Sign(_ context.Context, key hsm.KeyID, digests [][]byte) ([][]byte, error) {
	if len(digests) < 1 || len(digests) > hsm.MaxBatch {
		return nil, hsm.Errorf(hsm.ClassRequest, "sign", "%d digests", len(digests))
	}
	sigs := make([][]byte, len(digests))
	for i := range digests {
		var err error
		if sigs[i], err = d.Token.Sign(key, digests[i]); err != nil {
			return nil, err
		}
	}
	return sigs, nil
}
func (d direct) Generate(_ context.Context, s hsm.KeySpec) (hsm.KeyRecord, error) {
	return d.Token.Generate(s)
}
func (d direct) Export(_ context.Context, id hsm.KeyID) (hsm.Blob, error) { return d.Token.Export(id) }
func (d direct) Import(_ context.Context, b hsm.Blob) (hsm.KeyRecord, error) {
	return d.Token.Import(b)
}
func (d direct) TransportKey(context.Context) ([]byte, error) { return d.Token.TransportKey() }
func (d direct) GenerateDomain(_ context.Context, kek string) error {
	return d.Token.GenerateDomain(kek)
}
func (d direct) ExportDomain(_ context.Context, transport []byte) ([]byte, string, error) {
	return d.Token.ExportDomain(transport)
}
func (d direct) ImportDomain(_ context.Context, kek string, wrapped []byte) error {
	return d.Token.ImportDomain(kek, wrapped)
}

// Run checks that a fresh token keeps the contract. It leaves keys and the domain key "suite" behind.
func Run(t *testing.T, token Token) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	spec := Spec("suite-ca", hsm.PurposeCA)
	k, err := token.Generate(ctx, spec)
	if err != nil {
		t.Fatalf("generating: %v", err)
	}

	t.Run("a generated key is what was asked for", func(t *testing.T) {
		if k.KeySpec != spec || !k.Extractable || !k.Local || k.Attributes == "" || k.Fault != "" || k.Foreign {
			t.Errorf("record %+v", k)
		}
		PublicKey(t, k.SPKI)
	})
	t.Run("generating it again returns the same key", func(t *testing.T) {
		again, err := token.Generate(ctx, spec)
		if err != nil || !bytes.Equal(again.SPKI, k.SPKI) {
			t.Errorf("got %+v, %v", again, err)
		}
	})
	t.Run("an id cannot change its label or purpose", func(t *testing.T) {
		for _, other := range []hsm.KeySpec{{ID: spec.ID, Label: "other", Purpose: hsm.PurposeCA, Algorithm: hsm.P256}, {ID: spec.ID, Label: spec.Label, Purpose: hsm.PurposeOCSP, Algorithm: hsm.P256}} {
			_, err := token.Generate(ctx, other)
			WantClass(t, err, hsm.ClassRequest)
		}
	})
	t.Run("a spec out of bounds is refused", func(t *testing.T) {
		for _, bad := range []func(*hsm.KeySpec){
			func(s *hsm.KeySpec) { s.ID = "" }, func(s *hsm.KeySpec) { s.ID = "zz" }, func(s *hsm.KeySpec) { s.ID += "00" },
			func(s *hsm.KeySpec) { s.Label = "" }, func(s *hsm.KeySpec) { s.Label = "a:b" }, func(s *hsm.KeySpec) { s.Label = string(make([]byte, 65)) },
			func(s *hsm.KeySpec) { s.Purpose = "root" }, func(s *hsm.KeySpec) { s.Purpose = hsm.PurposeProbe },
			func(s *hsm.KeySpec) { s.Algorithm = "Ed25519" }, func(s *hsm.KeySpec) { s.Algorithm = "" },
		} {
			s := Spec("bad", hsm.PurposeCA)
			bad(&s)
			_, err := token.Generate(ctx, s)
			WantClass(t, err, hsm.ClassRequest)
		}
	})
	t.Run("signatures verify, in order, for every batch size", func(t *testing.T) {
		for _, n := range []int{1, 2, 63, hsm.MaxBatch} {
			SignAndVerify(t, token, k, n)
		}
	})
	t.Run("digests out of bounds are refused", func(t *testing.T) {
		for _, digests := range [][][]byte{nil, {{}}, {make([]byte, 31)}, {make([]byte, 33)}, {make([]byte, 32), make([]byte, 64)}, slices.Repeat([][]byte{make([]byte, 32)}, hsm.MaxBatch+1)} {
			_, err := token.Sign(ctx, k.ID, digests)
			WantClass(t, err, hsm.ClassRequest)
		}
	})
	t.Run("an absent key is not found", func(t *testing.T) {
		_, err := token.Sign(ctx, hsm.NewKeyID(), [][]byte{make([]byte, 32)})
		WantClass(t, err, hsm.ClassNotFound)
		_, err = token.Export(ctx, hsm.NewKeyID())
		WantClass(t, err, hsm.ClassNotFound, hsm.ClassRequest)
	})
	t.Run("the inventory lists the key as generated", func(t *testing.T) {
		list, err := token.Inventory(ctx)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(list, func(r hsm.KeyRecord) bool { return r.ID == k.ID })
		if i < 0 || fmt.Sprint(list[i]) != fmt.Sprint(k) {
			t.Errorf("want %+v in %+v", k, list)
		}
	})
	t.Run("nothing is exported or imported without a domain key", func(t *testing.T) {
		_, err := token.Export(ctx, k.ID)
		WantClass(t, err, hsm.ClassRequest)
		transport, err := token.TransportKey(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = token.ExportDomain(ctx, transport)
		WantClass(t, err, hsm.ClassRequest)
	})
	t.Run("one domain key, made once", func(t *testing.T) {
		for range 2 {
			if err := token.GenerateDomain(ctx, "suite"); err != nil {
				t.Fatal(err)
			}
		}
		WantClass(t, token.GenerateDomain(ctx, "another"), hsm.ClassRequest)
		WantClass(t, token.GenerateDomain(ctx, "no good:name"), hsm.ClassRequest)
	})
	t.Run("the domain key comes back to its own token", func(t *testing.T) {
		transport, err := token.TransportKey(ctx)
		if err != nil {
			t.Fatal(err)
		}
		wrapped, kek, err := token.ExportDomain(ctx, transport)
		if err != nil || kek != "suite" {
			t.Fatalf("kek %q, %v", kek, err)
		}
		if err := token.ImportDomain(ctx, kek, wrapped); err != nil {
			t.Error(err)
		}
		WantClass(t, token.ImportDomain(ctx, "another", wrapped), hsm.ClassRequest)
		for _, n := range []int{0, len(wrapped) / 2, len(wrapped) - 1} {
			WantClass(t, token.ImportDomain(ctx, kek, wrapped[:n]), hsm.ClassRequest)
		}
		flipped := bytes.Clone(wrapped)
		flipped[0] ^= 1
		WantClass(t, token.ImportDomain(ctx, kek, flipped), hsm.ClassRequest)
		_, _, err = token.ExportDomain(ctx, []byte("{}"))
		WantClass(t, err, hsm.ClassRequest, hsm.ClassDenied)
	})
	t.Run("a key exported and imported again is the same", func(t *testing.T) {
		b, err := token.Export(ctx, k.ID)
		if err != nil {
			t.Fatal(err)
		}
		if b.KeySpec != spec || !bytes.Equal(b.SPKI, k.SPKI) || b.KEK != "suite" {
			t.Errorf("blob of %+v", b.KeySpec)
		}
		again, err := token.Import(ctx, b)
		if err != nil || fmt.Sprint(again) != fmt.Sprint(k) {
			t.Errorf("got %+v, %v", again, err)
		}
		SignAndVerify(t, token, again, 1)
	})
	t.Run("a blob with anything changed is refused", func(t *testing.T) {
		b, err := token.Export(ctx, k.ID)
		if err != nil {
			t.Fatal(err)
		}
		for name, bad := range Tampered(b) {
			if _, err := token.Import(ctx, bad); hsm.ClassOf(err) != hsm.ClassRequest {
				t.Errorf("%s: %v", name, err)
			}
		}
		SignAndVerify(t, token, k, 1)
	})
	t.Run("eight callers sign at once while keys are made", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 10 {
					SignAndVerify(t, token, k, 8)
				}
			})
		}
		wg.Go(func() {
			for i := range 5 {
				if _, err := token.Generate(ctx, Spec(fmt.Sprintf("busy-%d", i), hsm.PurposeOCSP)); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Wait()
	})
}

// Spec is a fresh spec with a random id.
func Spec(label string, p hsm.Purpose) hsm.KeySpec {
	return hsm.KeySpec{ID: hsm.NewKeyID(), Label: label, Purpose: p, Algorithm: hsm.P256}
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
	change("domain", func(c *hsm.Blob) { c.KEK = "another" })
	change("spki", func(c *hsm.Blob) { c.SPKI[len(c.SPKI)-1] ^= 1 })
	change("no spki", func(c *hsm.Blob) { c.SPKI = nil })
	change("mac", func(c *hsm.Blob) { c.MAC[0] ^= 1 })
	change("no mac", func(c *hsm.Blob) { c.MAC = nil })
	return out
}

// Digests are n random SHA-256 digests.
func Digests(n int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		b := make([]byte, hsm.DigestSize)
		_, _ = rand.Read(b) // documented never to fail
		sum := sha256.Sum256(b)
		out[i] = sum[:]
	}
	return out
}

// SignAndVerify signs n digests in one batch and verifies each with the record's SPKI.
func SignAndVerify(t *testing.T, token interface {
	Sign(context.Context, hsm.KeyID, [][]byte) ([][]byte, error)
}, k hsm.KeyRecord, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	digests := Digests(n)
	sigs, err := token.Sign(ctx, k.ID, digests)
	if err != nil || len(sigs) != n {
		t.Errorf("signing %d digests: %d signatures, %v", n, len(sigs), err)
		return
	}
	key := PublicKey(t, k.SPKI)
	for i := range digests {
		if !ecdsa.VerifyASN1(key, digests[i], sigs[i]) {
			t.Errorf("signature %d of %d does not verify", i, n)
		}
	}
}

// Verifies tells whether sig is a signature over digest by the key with that SPKI.
func Verifies(t *testing.T, spki, digest, sig []byte) bool {
	t.Helper()
	return ecdsa.VerifyASN1(PublicKey(t, spki), digest, sig)
}

// PublicKey parses a P-256 SPKI.
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
