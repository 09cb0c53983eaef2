package pkcs11_test

import (
	"bytes"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
)

// hollow makes of the newest private key in a SoftHSM directory what a process leaves that is killed inside C_UnwrapKey or
// C_GenerateKeyPair: an object with its name, whose key material never came. Only the value is emptied, or the parameters too.
func hollow(t *testing.T, dir string, before map[string]bool, kinds ...uint64) {
	t.Helper()
	emptied := 0
	for path := range objectFiles(t, dir) {
		if before[path] {
			continue
		}
		b, err := os.ReadFile(path)
		must(t, err)
		// A generation number, then attributes: type, kind (1 octet, 2 number, 3 octets with their length), value.
		var out []byte
		private := false
		for out, b = b[:8:8], b[8:]; len(b) > 0; {
			name, size := binary.BigEndian.Uint64(b), 16
			switch binary.BigEndian.Uint64(b[8:]) {
			case 1:
				size += 1
			case 2:
				size += 8
				private = private || name == p11.CKA_CLASS && binary.BigEndian.Uint64(b[16:]) == p11.CKO_PRIVATE_KEY
			case 3:
				size += 8 + int(binary.BigEndian.Uint64(b[16:]))
			default:
				size += 8 + 8*int(binary.BigEndian.Uint64(b[16:]))
			}
			line := b[:size:size]
			b = b[size:]
			for _, k := range kinds {
				if name == k {
					line = append(line[:16:16], make([]byte, 8)...)
				}
			}
			out = append(out, line...)
		}
		if private {
			must(t, os.WriteFile(path, out, 0o600))
			emptied++
		}
	}
	if emptied != 1 {
		t.Fatalf("emptied %d private keys", emptied)
	}
}

func objectFiles(t *testing.T, dir string) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".object") {
			out[path] = true
		}
		return err
	}))
	return out
}

// What a process leaves that is killed inside the module is replaced by the next import, removed by the next destroy, and
// never used in between.
func TestAHollowKeyIsReplaced(t *testing.T) {
	for name, c := range map[string]struct {
		empty  []uint64
		public bool
	}{
		"without material, unwrapped":   {[]uint64{p11.CKA_VALUE, p11.CKA_EC_PARAMS}, false},
		"without material, generated":   {[]uint64{p11.CKA_VALUE, p11.CKA_EC_PARAMS}, true},
		"without value, unwrapped":      {[]uint64{p11.CKA_VALUE}, false},
		"without value, generated":      {[]uint64{p11.CKA_VALUE}, true},
		"without parameters, unwrapped": {[]uint64{p11.CKA_EC_PARAMS}, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, _ := fresh(t)
			dir := filepath.Dir(cfg.PINFile)
			token, err := pkcs11.Open(cfg)
			must(t, err)
			must(t, token.GenerateDomain("kek-1"))
			before := objectFiles(t, dir)
			k, b := exported(t, token)
			if !c.public {
				must(t, token.DestroyHalves(k.ID, p11.CKO_PUBLIC_KEY))
			}
			closed(t, token)
			hollow(t, dir, before, c.empty...)

			for _, mend := range []func(t *testing.T, token *pkcs11.Token){
				func(t *testing.T, token *pkcs11.Token) {
					back, err := token.Import(b)
					must(t, err)
					objects(t, token, k.ID, 2)
					hsmtest.SignAndVerify(t, hsmtest.Direct(token), back, 1)
				},
				func(t *testing.T, token *pkcs11.Token) {
					back, err := token.Generate(k.KeySpec)
					must(t, err)
					if bytes.Equal(back.SPKI, k.SPKI) {
						t.Error("the hollow key was taken for whole")
					}
					objects(t, token, k.ID, 2)
					hsmtest.SignAndVerify(t, hsmtest.Direct(token), back, 1)
				},
				func(t *testing.T, token *pkcs11.Token) {
					must(t, token.Destroy(k.ID, k.SPKI))
					objects(t, token, k.ID, 0)
				},
			} {
				cfg, _ := softHSM.copied(t, dir)
				token, err := pkcs11.Open(cfg)
				must(t, err)
				if i := token.Info(); i.Keys+i.Faulty != 1 {
					t.Errorf("%+v", i)
				}
				if _, err := token.Sign(k.ID, make([]byte, 32)); hsm.ClassOf(err) != hsm.ClassNotFound && hsm.ClassOf(err) != hsm.ClassDevice {
					t.Errorf("it signed, or: %v", err)
				}
				mend(t, token)
				if i := token.Info(); i.Faulty != 0 {
					t.Errorf("%+v", i)
				}
				closed(t, token)
			}
		})
	}
}

// Two keys under each other's names are never used as what they are called, whoever brought that about.
func TestSwappedKeysAreNotUsed(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		a, blob := exported(t, token)
		b, err := token.Generate(hsmtest.Spec("other", hsm.PurposeCA))
		must(t, err)
		other, err := token.Export(b.ID, "")
		must(t, err)

		// On the way in: blobs that are authenticated, each with the other's key.
		x, y := blob, other
		x.Wrapped, y.Wrapped = other.Wrapped, blob.Wrapped
		for _, swapped := range []hsm.Blob{x, y} {
			for _, present := range []bool{true, false} {
				in := swapped
				if !present {
					in.ID = hsm.NewKeyID()
				}
				in, err = token.Rewrap(in)
				must(t, err)
				back, err := token.Import(in)
				if present { // the key that is there is the right one, and stays
					if err != nil || !bytes.Equal(back.SPKI, in.SPKI) {
						t.Errorf("%+v, %v", back, err)
					}
				} else {
					hsmtest.WantClass(t, err, hsm.ClassRequest)
					objects(t, token, in.ID, 0)
				}
			}
		}
		for _, k := range []hsm.KeyRecord{a, b} {
			objects(t, token, k.ID, 2)
			hsmtest.SignAndVerify(t, hsmtest.Direct(token), k, 1)
		}

		// In the token: a public half that is another key's.
		spec := hsmtest.Spec("swapped", hsm.PurposeCA)
		must(t, token.Swap(spec, a.SPKI))
		_, err = token.Inventory()
		must(t, err)
		for range 2 {
			_, err = token.Sign(spec.ID, make([]byte, 32))
			hsmtest.WantClass(t, err, hsm.ClassNotFound)
			_, err = token.Inventory() // does not make it better
			must(t, err)
			if i := token.Info(); i.Faulty != 1 || i.Keys != 2 {
				t.Errorf("%+v", i)
			}
		}
		hsmtest.WantClass(t, token.Destroy(spec.ID, a.SPKI), hsm.ClassRequest)
		objects(t, token, spec.ID, 2)
		taken := blob
		taken.KeySpec = spec
		taken, err = token.Rewrap(taken)
		must(t, err)
		_, err = token.Import(taken)
		hsmtest.WantClass(t, err, hsm.ClassRequest)
		objects(t, token, spec.ID, 2)
	})
}

// A key may be destroyed while it signs: signatures under way are made, later ones find no key, and none looks like a lost
// session.
func TestSignaturesEndWithTheirKey(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		for range 3 {
			k, err := token.Generate(hsmtest.Spec("short-lived", hsm.PurposeCA))
			must(t, err)
			var wg sync.WaitGroup
			started := make(chan struct{}, 8)
			for range 4 {
				wg.Go(func() {
					for first := true; ; first = false {
						_, err := token.Sign(k.ID, make([]byte, 32))
						if first {
							started <- struct{}{}
						}
						if err != nil {
							hsmtest.WantClass(t, err, hsm.ClassNotFound)
							return
						}
					}
				})
			}
			for range 4 {
				<-started
			}
			must(t, token.Destroy(k.ID, k.SPKI))
			wg.Wait()
			objects(t, token, k.ID, 0)
		}
		if n, err := token.Leftovers(); n != 0 || err != nil {
			t.Errorf("%d copies of keys are left in memory, %v", n, err)
		}
	})
}

func TestNotesOutliveWhoeverWasReplacingThem(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token, err := pkcs11.Open(cfg)
		must(t, err)
		must(t, token.SetEpoch(hsm.EpochRecord{Site: "north", Epoch: 7, Grant: []byte("grant")}))
		must(t, token.WriteNote("epoch", []byte(`{"site":"south","epoch":6}`)))
		must(t, token.WriteNote("epoch", []byte(`no JSON`)))
		must(t, token.WriteNote("domains", []byte(`no JSON`)))
		closed(t, token)
		token = open(t, cfg)
		if e, err := token.Epoch(); err != nil || e.Site != "north" || e.Epoch != 7 || string(e.Grant) != "grant" {
			t.Errorf("%+v, %v", e, err)
		}
		must(t, token.SetEpoch(hsm.EpochRecord{Site: "south", Epoch: 3})) // a repair may go back
		if n, err := token.Notes("epoch"); n != 1 || err != nil {
			t.Errorf("%d notes, %v", n, err)
		}
		must(t, token.GenerateDomain("b"))
		must(t, token.GenerateDomain("a"))
		if i := token.Info(); i.KEK != "b" || i.NextKEK != "a" || i.Foreign != 0 {
			t.Errorf("%+v", i)
		}
		if n, err := token.Notes("domains"); n != 1 || err != nil {
			t.Errorf("%d notes, %v", n, err)
		}
		hsmtest.WantClass(t, token.SetEpoch(hsm.EpochRecord{Site: "x", Epoch: 8, Grant: make([]byte, 64<<10)}), hsm.ClassRequest)
	})
}

// A domain is two keys of full length, whoever sealed it.
func TestWeakDomainsAreRefused(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		spki, err := token.TransportKey()
		must(t, err)
		to, err := hsm.ParseTransport(spki)
		must(t, err)
		for _, sizes := range [][2]int{{16, 32}, {32, 16}, {24, 32}, {32, 64}, {33, 32}, {1, 1}} {
			var wrapped []byte
			for _, n := range sizes {
				half, err := hsm.SealSecret(to, bytes.Repeat([]byte{7}, n))
				must(t, err)
				wrapped = append(wrapped, half...)
			}
			if err := token.ImportDomain("kek-1", wrapped); hsm.ClassOf(err) != hsm.ClassRequest {
				t.Errorf("keys of %v octets: %v", sizes, err)
			}
		}
		if i := token.Info(); i.KEK != "" {
			t.Errorf("%+v", i)
		}
	})
}

func TestAKeyTakenOutBehindTheProcessIsNoticedByCounting(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		kept, err := token.Generate(hsmtest.Spec("kept", hsm.PurposeCA))
		must(t, err)
		lost, err := token.Generate(hsmtest.Spec("lost", hsm.PurposeCA))
		must(t, err)
		must(t, token.Count())
		before := token.Info()
		must(t, token.DestroyHalves(lost.ID, p11.CKO_PRIVATE_KEY))
		if i := token.Info(); i.Digest != before.Digest {
			t.Fatal("the token has told without having been asked")
		}
		must(t, token.Count())
		if i := token.Info(); i.Digest == before.Digest || i.Keys != 1 || i.Faulty != 1 {
			t.Errorf("%+v", i)
		}
		hsmtest.SignAndVerify(t, hsmtest.Direct(token), kept, 1)
		must(t, token.Plant("stranger", []byte("0123456789abcdef")))
		must(t, token.Count())
		if i := token.Info(); i.Foreign == 0 {
			t.Errorf("a key that somebody put in: %+v", i)
		}
	})
}
