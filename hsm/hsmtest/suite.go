// Package hsmtest is the contract of a token as a test suite, and a laboratory of real agents on real SoftHSM tokens to
// run it, and anything built on it, against.
package hsmtest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
)

// Token is what is under test. An *agent.Client is one; Direct makes one of a token without its agent.
type Token interface {
	Health(context.Context) (hsm.Info, error)
	Inventory(context.Context) ([]hsm.KeyRecord, error)
	Sign(context.Context, hsm.SignRequest) ([][]byte, error)
	Generate(context.Context, hsm.KeySpec) (hsm.KeyRecord, error)
	Export(ctx context.Context, key hsm.KeyID, kek string) (hsm.Blob, error)
	Import(context.Context, hsm.Blob) (hsm.KeyRecord, error)
	Adopt(context.Context, hsm.AdoptRequest) (hsm.KeyRecord, error)
	Destroy(context.Context, hsm.DestroyRequest) error
	TransportKey(context.Context) ([]byte, error)
	GenerateDomain(ctx context.Context, kek string) error
	ExportDomain(context.Context, hsm.DomainRequest) (wrapped []byte, kek string, err error)
	ImportDomain(ctx context.Context, kek string, wrapped []byte) error
	Rotate(ctx context.Context, kek string) error
	DropDomain(ctx context.Context, kek string) error
	SetEpoch(context.Context, hsm.EpochRecord) error
}

// Contract is what every token keeps, whatever its module, and whether it is called directly or through its agent.
type Contract struct {
	Token Token
	// Algorithms are those that the module can make; nil means every cloneable one.
	Algorithms []hsm.Algorithm
	// Grant approves an act for the agent in front of the token; nil where there is none.
	Grant func(t *testing.T, action, object string, detail map[string]string) []byte
	// Member is the agent's name, and SPKI opens what its TransportKey returns; nil where there is none.
	Member string
	SPKI   func(t *testing.T, transport []byte) []byte
}

// Run checks a fresh token with every cloneable algorithm. It leaves keys and the domain key "suite-2" behind.
func Run(t *testing.T, token Token) { Contract{Token: token}.Run(t) }

// group is what the suite's keys belong to.
const group = "suite"

// Run checks that a fresh token keeps the contract.
func (c Contract) Run(t *testing.T) {
	if c.Algorithms == nil {
		c.Algorithms = []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048, hsm.RSA3072, hsm.RSA4096}
	}
	if c.Grant == nil {
		c.Grant = func(*testing.T, string, string, map[string]string) []byte { return nil }
	}
	if c.SPKI == nil {
		c.SPKI = func(_ *testing.T, transport []byte) []byte { return transport }
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s := suite{c, ctx}
	s.empty(t)
	keys := map[hsm.Algorithm]hsm.KeyRecord{}
	for _, a := range c.Algorithms {
		t.Run(string(a), func(t *testing.T) { keys[a] = s.generate(t, a) })
		if t.Failed() {
			return
		}
	}
	s.sign(t, keys[hsm.P256])
	s.nonExtractable(t)
	s.withoutDomain(t, keys[hsm.P256])
	s.domain(t)
	for _, a := range c.Algorithms {
		if a.Cloneable() {
			t.Run(string(a)+" goes out and in", func(t *testing.T) { s.clone(t, keys[a]) })
			t.Run(string(a)+" comes in from outside", func(t *testing.T) { s.adopt(t, a) })
		} else {
			t.Run(string(a)+" is not cloned", func(t *testing.T) {
				_, err := c.Token.Export(ctx, keys[a].ID, "")
				WantClass(t, err, hsm.ClassRequest)
				if err != nil && !strings.Contains(err.Error(), "cannot be cloned") {
					t.Errorf("the error does not say why: %v", err)
				}
			})
		}
	}
	s.blobs(t, keys[hsm.P256], keys[hsm.P384])
	s.rotate(t, keys[hsm.P256])
	s.crowd(t, keys[hsm.P256])
	s.destroy(t, keys)
	s.epoch(t)
}

type suite struct {
	Contract
	ctx context.Context
}

func (s suite) info(t *testing.T) hsm.Info {
	t.Helper()
	i, err := s.Token.Health(s.ctx)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func (s suite) inventory(t *testing.T) []hsm.KeyRecord {
	t.Helper()
	list, err := s.Token.Inventory(s.ctx)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// listed checks that inventory and health show the key as it is, or not at all.
func (s suite) listed(t *testing.T, k hsm.KeyRecord, want bool) {
	t.Helper()
	list := s.inventory(t)
	i := slices.IndexFunc(list, func(r hsm.KeyRecord) bool { return r.ID == k.ID })
	if (i >= 0) != want || want && fmt.Sprint(list[i]) != fmt.Sprint(k) {
		t.Errorf("want %+v (%v) in %+v", k, want, list)
	}
	if info := s.info(t); info.Digest != hsm.InventoryDigest(list) {
		t.Errorf("health says digest %s, the inventory has %s", info.Digest, hsm.InventoryDigest(list))
	}
}

func (s suite) transport(t *testing.T) (sent, spki []byte) {
	t.Helper()
	sent, err := s.Token.TransportKey(s.ctx)
	if err != nil {
		t.Fatal(err)
	}
	return sent, s.SPKI(t, sent)
}

func (s suite) empty(t *testing.T) {
	t.Run("a fresh token is empty and says who it is", func(t *testing.T) {
		_, spki := s.transport(t)
		i := s.info(t)
		if i.Keys != 0 || i.Foreign != 0 || i.Faulty != 0 || i.KEK != "" || i.NextKEK != "" || i.Epoch != 0 || i.Digest != hsm.InventoryDigest(nil) || i.Transport != hsm.Fingerprint(spki) {
			t.Errorf("%+v", i)
		}
	})
}

func (s suite) generate(t *testing.T, a hsm.Algorithm) hsm.KeyRecord {
	spec := Spec("suite-"+string(a), hsm.PurposeCA)
	spec.Algorithm, spec.NonExtractable = a, !a.Cloneable()
	before := s.info(t)
	k, err := s.Token.Generate(s.ctx, spec)
	if err != nil {
		t.Fatalf("generating: %v", err)
	}
	if k.KeySpec != spec || k.Extractable == spec.NonExtractable || k.Attributes == "" || k.Fault != "" || k.Foreign {
		t.Errorf("record %+v", k)
	}
	if after := s.info(t); after.Keys != before.Keys+1 || after.Digest == before.Digest {
		t.Errorf("health was %+v and is %+v", before, after)
	}
	s.listed(t, k, true)
	again, err := s.Token.Generate(s.ctx, spec)
	if err != nil || !bytes.Equal(again.SPKI, k.SPKI) {
		t.Errorf("asked again: %+v, %v", again, err)
	}
	for _, n := range []int{1, 3} {
		SignAndVerify(t, s.Token, k, n)
	}
	for _, n := range []int{0, 31, 33, 47, 49, hsm.MaxMessage + 1} {
		if a.CheckDigest(make([]byte, n)) == nil {
			continue
		}
		_, err := s.Token.Sign(s.ctx, hsm.SignRequest{Key: k.ID, Digests: [][]byte{make([]byte, n)}})
		WantClass(t, err, hsm.ClassRequest)
	}
	return k
}

func (s suite) sign(t *testing.T, k hsm.KeyRecord) {
	t.Run("an id cannot change what it is", func(t *testing.T) {
		for _, change := range []func(*hsm.KeySpec){
			func(s *hsm.KeySpec) { s.Label = "other" }, func(s *hsm.KeySpec) { s.Purpose = hsm.PurposeOCSP },
			func(s *hsm.KeySpec) { s.Algorithm = hsm.P384 }, func(s *hsm.KeySpec) { s.NonExtractable = true },
		} {
			other := k.KeySpec
			change(&other)
			_, err := s.Token.Generate(s.ctx, other)
			WantClass(t, err, hsm.ClassRequest)
		}
		s.listed(t, k, true)
	})
	t.Run("a spec out of bounds is refused", func(t *testing.T) {
		for _, bad := range []func(*hsm.KeySpec){
			func(s *hsm.KeySpec) { s.ID = "" }, func(s *hsm.KeySpec) { s.ID = "zz" }, func(s *hsm.KeySpec) { s.ID += "00" },
			func(s *hsm.KeySpec) { s.Label = "" }, func(s *hsm.KeySpec) { s.Label = "a:b" }, func(s *hsm.KeySpec) { s.Label = string(make([]byte, 65)) },
			func(s *hsm.KeySpec) { s.Purpose = "root" }, func(s *hsm.KeySpec) { s.Purpose = hsm.PurposeProbe },
			func(s *hsm.KeySpec) { s.Algorithm = "RSA-1024" }, func(s *hsm.KeySpec) { s.Algorithm = "" },
		} {
			spec := Spec("bad", hsm.PurposeCA)
			bad(&spec)
			_, err := s.Token.Generate(s.ctx, spec)
			WantClass(t, err, hsm.ClassRequest)
		}
	})
	t.Run("batches are signed in order, and bounded", func(t *testing.T) {
		for _, n := range []int{1, 2, 63, hsm.MaxBatch} {
			SignAndVerify(t, s.Token, k, n)
		}
		for _, digests := range [][][]byte{nil, {{}}, {make([]byte, 32), make([]byte, 64)}, slices.Repeat([][]byte{make([]byte, 32)}, hsm.MaxBatch+1)} {
			_, err := s.Token.Sign(s.ctx, hsm.SignRequest{Key: k.ID, Digests: digests})
			WantClass(t, err, hsm.ClassRequest)
		}
	})
	t.Run("an absent key is not found", func(t *testing.T) {
		_, err := s.Token.Sign(s.ctx, hsm.SignRequest{Key: hsm.NewKeyID(), Digests: Digests(1)})
		WantClass(t, err, hsm.ClassNotFound)
		_, err = s.Token.Export(s.ctx, hsm.NewKeyID(), "")
		WantClass(t, err, hsm.ClassNotFound, hsm.ClassRequest)
	})
}

func (s suite) nonExtractable(t *testing.T) {
	t.Run("a non-extractable key signs and stays", func(t *testing.T) {
		spec := Spec("stays", hsm.PurposeOCSP)
		spec.NonExtractable, spec.Purpose = true, hsm.PurposeCA
		k, err := s.Token.Generate(s.ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		if k.KeySpec != spec || k.Extractable {
			t.Errorf("record %+v", k)
		}
		s.listed(t, k, true)
		SignAndVerify(t, s.Token, k, 2)
		_, err = s.Token.Export(s.ctx, k.ID, "")
		WantClass(t, err, hsm.ClassRequest)
		if err != nil && !strings.Contains(err.Error(), "cannot be cloned") {
			t.Errorf("the error does not say why: %v", err)
		}
		s.remove(t, k)
	})
}

func (s suite) withoutDomain(t *testing.T, k hsm.KeyRecord) {
	t.Run("nothing is exported without a domain key", func(t *testing.T) {
		_, err := s.Token.Export(s.ctx, k.ID, "")
		WantClass(t, err, hsm.ClassRequest)
		_, _, err = s.Token.ExportDomain(s.ctx, s.own(t, ""))
		WantClass(t, err, hsm.ClassRequest)
		WantClass(t, s.Token.Rotate(s.ctx, "suite"), hsm.ClassRequest)
	})
}

// own is the request to wrap a domain for the token itself.
func (s suite) own(t *testing.T, kek string) hsm.DomainRequest {
	t.Helper()
	sent, spki := s.transport(t)
	return hsm.DomainRequest{Group: group, KEK: kek, Recipient: sent,
		Grant: s.Grant(t, "hsm-enroll", group+"/"+s.Member, map[string]string{"transport": hsm.Fingerprint(spki)})}
}

func (s suite) domain(t *testing.T) {
	t.Run("a domain key is made once", func(t *testing.T) {
		for range 2 {
			if err := s.Token.GenerateDomain(s.ctx, "suite"); err != nil {
				t.Fatal(err)
			}
		}
		WantClass(t, s.Token.GenerateDomain(s.ctx, "no good:name"), hsm.ClassRequest)
		if i := s.info(t); i.KEK != "suite" || i.NextKEK != "" {
			t.Errorf("%+v", i)
		}
	})
	t.Run("the domain key comes back to its own token", func(t *testing.T) {
		wrapped, kek, err := s.Token.ExportDomain(s.ctx, s.own(t, ""))
		if err != nil || kek != "suite" {
			t.Fatalf("kek %q, %v", kek, err)
		}
		for range 2 {
			if err := s.Token.ImportDomain(s.ctx, kek, wrapped); err != nil {
				t.Error(err)
			}
		}
		for _, n := range []int{0, len(wrapped) / 2, len(wrapped) - 1} {
			WantClass(t, s.Token.ImportDomain(s.ctx, kek, wrapped[:n]), hsm.ClassRequest, hsm.ClassDenied)
		}
		for _, at := range []int{0, len(wrapped) / 2, len(wrapped) - 2} {
			flipped := bytes.Clone(wrapped)
			flipped[at] ^= 1
			WantClass(t, s.Token.ImportDomain(s.ctx, kek, flipped), hsm.ClassRequest, hsm.ClassDenied)
		}
		for _, bad := range [][]byte{nil, []byte("{}")} {
			r := s.own(t, "")
			r.Recipient = bad
			_, _, err = s.Token.ExportDomain(s.ctx, r)
			WantClass(t, err, hsm.ClassRequest, hsm.ClassDenied)
		}
		_, _, err = s.Token.ExportDomain(s.ctx, s.own(t, "absent"))
		WantClass(t, err, hsm.ClassRequest)
	})
}

func (s suite) clone(t *testing.T, k hsm.KeyRecord) {
	for _, kek := range []string{"", "suite"} {
		b, err := s.Token.Export(s.ctx, k.ID, kek)
		if err != nil {
			t.Fatal(err)
		}
		if b.KeySpec != k.KeySpec || !bytes.Equal(b.SPKI, k.SPKI) || b.KEK != "suite" || b.Check() != nil {
			t.Errorf("blob of %+v: %v", b.KeySpec, b.Check())
		}
		again, err := s.Token.Import(s.ctx, b)
		if err != nil || fmt.Sprint(again) != fmt.Sprint(k) {
			t.Errorf("imported again: %+v, %v", again, err)
		}
	}
	_, err := s.Token.Export(s.ctx, k.ID, "absent")
	WantClass(t, err, hsm.ClassRequest)
	SignAndVerify(t, s.Token, k, 1)
}

func (s suite) adopt(t *testing.T, a hsm.Algorithm) {
	spec := Spec("outside-"+string(a), hsm.PurposeCA)
	spec.Algorithm = a
	_, to := s.transport(t)
	spki, sealed := Outside(t, a, to)
	other, second := Outside(t, a, to)
	ask := func(spec hsm.KeySpec, spki, sealed []byte) (hsm.KeyRecord, error) {
		return s.Token.Adopt(s.ctx, hsm.AdoptRequest{Group: group, Spec: spec, SPKI: spki, Sealed: sealed,
			Grant: s.Grant(t, "key-import", group+"/"+spec.Label, map[string]string{
				"spki": hsm.Fingerprint(spki), "purpose": string(spec.Purpose), "algorithm": string(spec.Algorithm),
			})})
	}
	flipped := bytes.Clone(sealed)
	flipped[len(flipped)-1] ^= 1
	head := bytes.Clone(sealed)
	head[0] ^= 1
	for name, bad := range map[string][2][]byte{
		"another public key": {other, sealed}, "nothing": {spki, nil}, "the head alone": {spki, sealed[:hsm.TransportBits/8]},
		"truncated": {spki, sealed[:len(sealed)-8]}, "flipped": {spki, flipped}, "flipped head": {spki, head}, "no public key": {nil, sealed},
	} {
		if _, err := ask(spec, bad[0], bad[1]); hsm.ClassOf(err) != hsm.ClassRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	k, err := ask(spec, spki, sealed)
	if err != nil {
		t.Fatal(err)
	}
	if k.KeySpec != spec || !bytes.Equal(k.SPKI, spki) || k.Local || !k.Extractable {
		t.Errorf("record %+v", k)
	}
	s.listed(t, k, true)
	again, err := ask(spec, spki, sealed)
	if err != nil || fmt.Sprint(again) != fmt.Sprint(k) {
		t.Errorf("asked again: %+v, %v", again, err)
	}
	taken := spec
	taken.ID = k.ID
	if _, err := ask(taken, other, second); hsm.ClassOf(err) != hsm.ClassRequest {
		t.Errorf("another key under the same id: %v", err)
	}
	SignAndVerify(t, s.Token, k, 2)
	s.remove(t, k)

	stays := Spec("outside-stays", hsm.PurposeCA)
	stays.Algorithm, stays.NonExtractable = a, true
	if k, err = ask(stays, other, second); err != nil || k.KeySpec != stays || k.Extractable {
		t.Fatalf("%+v, %v", k, err)
	}
	_, err = s.Token.Export(s.ctx, k.ID, "")
	WantClass(t, err, hsm.ClassRequest)
	SignAndVerify(t, s.Token, k, 1)
	s.remove(t, k)
}

func (s suite) blobs(t *testing.T, k, other hsm.KeyRecord) {
	t.Run("a blob with anything changed is refused", func(t *testing.T) {
		b, err := s.Token.Export(s.ctx, k.ID, "")
		if err != nil {
			t.Fatal(err)
		}
		bad := Tampered(b)
		if other.ID != "" {
			o, err := s.Token.Export(s.ctx, other.ID, "")
			if err != nil {
				t.Fatal(err)
			}
			swapped := b
			swapped.Wrapped = o.Wrapped
			bad["another key's octets"] = swapped
			swapped.SPKI, swapped.MAC = o.SPKI, o.MAC
			bad["another key under this id"] = swapped
		}
		for name, blob := range bad {
			if _, err := s.Token.Import(s.ctx, blob); hsm.ClassOf(err) != hsm.ClassRequest {
				t.Errorf("%s: %v", name, err)
			}
		}
		s.listed(t, k, true)
		SignAndVerify(t, s.Token, k, 1)
	})
}

func (s suite) rotate(t *testing.T, k hsm.KeyRecord) {
	t.Run("the domain key is changed while both work", func(t *testing.T) {
		want := func(current, next string) {
			t.Helper()
			if i := s.info(t); i.KEK != current || i.NextKEK != next {
				t.Errorf("domain keys %q and %q, want %q and %q", i.KEK, i.NextKEK, current, next)
			}
		}
		move := func(kek, named string) {
			t.Helper()
			b, err := s.Token.Export(s.ctx, k.ID, kek)
			if err != nil || b.KEK != named {
				t.Fatalf("kek %q: %q, %v", kek, b.KEK, err)
			}
			if _, err := s.Token.Import(s.ctx, b); err != nil {
				t.Errorf("kek %q: %v", named, err)
			}
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		WantClass(t, s.Token.DropDomain(s.ctx, "suite"), hsm.ClassRequest) // it protects keys
		must(s.Token.DropDomain(s.ctx, "never-was"))
		must(s.Token.GenerateDomain(s.ctx, "suite-2"))
		must(s.Token.GenerateDomain(s.ctx, "suite-2"))
		want("suite", "suite-2")
		WantClass(t, s.Token.GenerateDomain(s.ctx, "suite-3"), hsm.ClassRequest) // two are enough
		move("", "suite")
		move("suite-2", "suite-2")
		old, err := s.Token.Export(s.ctx, k.ID, "")
		must(err)
		WantClass(t, s.Token.Rotate(s.ctx, "suite-3"), hsm.ClassRequest)
		for range 2 {
			must(s.Token.Rotate(s.ctx, "suite-2"))
			want("suite-2", "suite")
		}
		WantClass(t, s.Token.DropDomain(s.ctx, "suite-2"), hsm.ClassRequest) // it is the current one
		move("", "suite-2")
		move("suite", "suite")
		for range 2 {
			must(s.Token.DropDomain(s.ctx, "suite"))
			want("suite-2", "")
		}
		_, err = s.Token.Import(s.ctx, old)
		WantClass(t, err, hsm.ClassRequest, hsm.ClassDenied)
		move("", "suite-2")
	})
}

func (s suite) crowd(t *testing.T, k hsm.KeyRecord) {
	t.Run("eight callers sign at once while keys come and go", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 10 {
					SignAndVerify(t, s.Token, k, 8)
				}
			})
		}
		wg.Go(func() {
			for i := range 5 {
				busy, err := s.Token.Generate(s.ctx, Spec(fmt.Sprintf("busy-%d", i), hsm.PurposeCA))
				if err != nil {
					t.Error(err)
					return
				}
				SignAndVerify(t, s.Token, busy, 1)
				s.remove(t, busy)
			}
		})
		wg.Wait()
	})
}

// remove destroys a key and checks that it is gone.
func (s suite) remove(t *testing.T, k hsm.KeyRecord) {
	t.Helper()
	r := hsm.DestroyRequest{Group: group, Key: k.ID, SPKI: k.SPKI,
		Grant: s.Grant(t, "key-destroy", group+"/"+string(k.ID), map[string]string{"spki": hsm.Fingerprint(k.SPKI)})}
	for range 2 {
		if err := s.Token.Destroy(s.ctx, r); err != nil {
			t.Errorf("destroying %s: %v", k.Label, err)
		}
	}
	_, err := s.Token.Sign(s.ctx, hsm.SignRequest{Key: k.ID, Digests: [][]byte{k.Algorithm.Digest([]byte("gone"))}})
	WantClass(t, err, hsm.ClassNotFound, hsm.ClassDenied)
	s.listed(t, k, false)
}

func (s suite) destroy(t *testing.T, keys map[hsm.Algorithm]hsm.KeyRecord) {
	t.Run("only the key that is meant is destroyed", func(t *testing.T) {
		k, other := keys[hsm.P256], keys[hsm.P384]
		for _, spki := range [][]byte{nil, []byte("rubbish"), other.SPKI} {
			err := s.Token.Destroy(s.ctx, hsm.DestroyRequest{Group: group, Key: k.ID, SPKI: spki,
				Grant: s.Grant(t, "key-destroy", group+"/"+string(k.ID), map[string]string{"spki": hsm.Fingerprint(spki)})})
			WantClass(t, err, hsm.ClassRequest)
		}
		s.listed(t, k, true)
		SignAndVerify(t, s.Token, k, 1)
	})
	t.Run("keys are destroyed for good", func(t *testing.T) {
		blobs := map[hsm.Algorithm]hsm.Blob{}
		for a, k := range keys {
			if a.Cloneable() {
				var err error
				if blobs[a], err = s.Token.Export(s.ctx, k.ID, ""); err != nil {
					t.Fatal(err)
				}
			}
			s.remove(t, k)
		}
		if i := s.info(t); i.Keys != 0 {
			t.Errorf("%+v", i)
		}
		for a, blob := range blobs {
			back, err := s.Token.Import(s.ctx, blob)
			if s.Member != "" { // its agent remembers
				WantClass(t, err, hsm.ClassDenied)
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			was := keys[a]
			was.Local = false
			if fmt.Sprint(back) != fmt.Sprint(was) {
				t.Errorf("%+v is back as %+v", was, back)
			}
			s.listed(t, back, true)
			SignAndVerify(t, s.Token, back, 3)
		}
	})
}

func (s suite) epoch(t *testing.T) {
	t.Run("the site epoch is kept", func(t *testing.T) {
		for i, site := range []string{"north", "south"} {
			r := hsm.EpochRecord{Site: site, Epoch: uint64(i + 1)}
			r.Grant = s.Grant(t, "site-promote", site, map[string]string{"epoch": strconv.Itoa(i + 1)})
			for range 2 {
				if err := s.Token.SetEpoch(s.ctx, r); err != nil {
					t.Fatal(err)
				}
			}
			if i := s.info(t); i.Site != r.Site || i.Epoch != r.Epoch {
				t.Errorf("%+v", i)
			}
		}
	})
}
