package pkcs11_test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
)

// deed is one call on a token, as a child process that is to die in it gets told.
type deed struct {
	Config  pkcs11.Config
	DieAt   int
	Op      string
	Key     hsm.KeyID
	Spec    hsm.KeySpec
	SPKI    []byte
	Sealed  []byte
	Blob    hsm.Blob
	KEK     string
	Wrapped []byte
	Epoch   hsm.EpochRecord
}

func (d deed) do(token *pkcs11.Token) error {
	var err error
	switch d.Op {
	case "generate":
		_, err = token.Generate(d.Spec)
	case "import":
		_, err = token.Import(d.Blob)
	case "adopt":
		_, err = token.Adopt(d.Spec, d.SPKI, d.Sealed)
	case "destroy":
		err = token.Destroy(d.Key, d.SPKI)
	case "generate-domain":
		err = token.GenerateDomain(d.KEK)
	case "import-domain":
		err = token.ImportDomain(d.KEK, d.Wrapped)
	case "rotate":
		err = token.Rotate(d.KEK)
	case "drop-domain":
		err = token.DropDomain(d.KEK)
	case "set-epoch":
		err = token.SetEpoch(d.Epoch)
	default:
		err = fmt.Errorf("no deed %q", d.Op)
	}
	return err
}

// act is the child: it opens the token and does the deed, and may be dead before either is done.
func act(path string) int {
	err := func() error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var d deed
		if err := json.Unmarshal(b, &d); err != nil {
			return err
		}
		doom := func() error { return os.Setenv("TRIVET_DIE_AT", strconv.Itoa(d.DieAt)) }
		if d.Op == "open" {
			if err := doom(); err != nil {
				return err
			}
		}
		token, err := pkcs11.Open(d.Config)
		if err != nil || d.Op == "open" {
			return err
		}
		if err := doom(); err != nil {
			return err
		}
		return d.do(token)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// dying compiles the module that dies.
func dying(t *testing.T) string {
	t.Helper()
	cc, err := exec.LookPath("cc")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("a C compiler is missing: install gcc")
		}
		t.Skip("a C compiler is missing: install gcc")
	}
	module := filepath.Join(t.TempDir(), "dying.so")
	if out, err := exec.Command(cc, "-shared", "-fPIC", "-O1", "-o", module, "testdata/dying.c", "-ldl").CombinedOutput(); err != nil {
		t.Fatalf("compiling the dying module: %v\n%s", err, out)
	}
	return module
}

// dies has a child do the deed with the token and die before the nth call that changes something. It tells whether it died.
func (d deed) dies(t *testing.T, module string, cfg pkcs11.Config, n int) bool {
	t.Helper()
	d.Config, d.DieAt = cfg, n
	d.Config.Module = module
	b, err := json.Marshal(d)
	must(t, err)
	path := filepath.Join(t.TempDir(), "deed.json")
	hsmtest.Write(t, path, string(b))
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "TRIVET_TEST_ACT="+path, "TRIVET_REAL_MODULE="+cfg.Module)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	t.Fatalf("%s, to die at call %d: %v\n%s", d.Op, n, err, out)
	return false
}

// A process may be killed between any two calls of the module. Whatever it was doing, the token opens again, is in the state
// before or after (never in doubt about its domain, never with a wrong key), and doing the deed again completes it, with
// nothing left over.
func TestADeathBetweenAnyTwoCallsIsMended(t *testing.T) {
	each(t, func(t *testing.T, k *kind) {
		k.blank(t)
		module := dying(t)
		domain := func(t *testing.T, token *pkcs11.Token) []byte {
			t.Helper()
			spki, err := token.TransportKey()
			must(t, err)
			pub, err := hsm.ParseTransport(spki)
			must(t, err)
			var out []byte
			for range 2 {
				secret := make([]byte, 32)
				_, _ = rand.Read(secret) // documented never to fail
				half, err := hsm.SealSecret(pub, secret)
				must(t, err)
				out = append(out, half...)
			}
			return out
		}
		// works checks that keys go out and in under the domain kek.
		works := func(t *testing.T, token *pkcs11.Token, kek string, key hsm.KeyID) {
			t.Helper()
			b, err := token.Export(key, kek)
			must(t, err)
			if _, err := token.Import(b); err != nil || b.KEK != kek {
				t.Errorf("domain %q: %q, %v", kek, b.KEK, err)
			}
		}
		domains := func(t *testing.T, token *pkcs11.Token, allowed ...[2]string) {
			t.Helper()
			i := token.Info()
			for _, a := range allowed {
				if a == [2]string{i.KEK, i.NextKEK} {
					return
				}
			}
			t.Errorf("domains %q and %q, want one of %q", i.KEK, i.NextKEK, allowed)
		}
		whole := func(t *testing.T, token *pkcs11.Token, id hsm.KeyID) {
			t.Helper()
			k, err := token.Key(id)
			must(t, err)
			objects(t, token, id, 2)
			hsmtest.SignAndVerify(t, hsmtest.Direct(token), k, 1)
			if i := token.Info(); i.Faulty != 0 || i.Foreign != 0 {
				t.Errorf("%+v", i)
			}
		}
		// unharmed checks that a key is absent, unusable, or the right one.
		unharmed := func(t *testing.T, token *pkcs11.Token, id hsm.KeyID, spki []byte) {
			t.Helper()
			k, err := token.Key(id)
			if err == nil {
				if spki != nil && !bytes.Equal(k.SPKI, spki) {
					t.Errorf("another key: %+v", k)
				}
				hsmtest.SignAndVerify(t, hsmtest.Direct(token), k, 1)
			} else if hsm.ClassOf(err) != hsm.ClassNotFound {
				t.Error(err)
			}
		}
		type checks struct {
			between, after func(t *testing.T, token *pkcs11.Token)
		}
		for name, prepare := range map[string]func(t *testing.T, token *pkcs11.Token) (deed, checks){
			"opening a token": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				must(t, token.DestroyHalves(token.Probe().ID, p11.CKO_PRIVATE_KEY))
				return deed{Op: "open"}, checks{}
			},
			"generating a key": func(*testing.T, *pkcs11.Token) (deed, checks) {
				d := deed{Op: "generate", Spec: hsmtest.Spec("new", hsm.PurposeCA)}
				return d, checks{func(t *testing.T, token *pkcs11.Token) { unharmed(t, token, d.Spec.ID, nil) },
					func(t *testing.T, token *pkcs11.Token) { whole(t, token, d.Spec.ID) }}
			},
			"importing a key": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				k, b := exported(t, token)
				must(t, token.Destroy(k.ID, k.SPKI))
				return deed{Op: "import", Blob: b}, checks{func(t *testing.T, token *pkcs11.Token) { unharmed(t, token, k.ID, k.SPKI) },
					func(t *testing.T, token *pkcs11.Token) { whole(t, token, k.ID) }}
			},
			"adopting a key": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				transport, err := token.TransportKey()
				must(t, err)
				d := deed{Op: "adopt", Spec: hsmtest.Spec("outside", hsm.PurposeCA)}
				d.Spec.Algorithm = hsm.RSA2048
				d.SPKI, d.Sealed = hsmtest.Outside(t, hsm.RSA2048, transport)
				return d, checks{func(t *testing.T, token *pkcs11.Token) { unharmed(t, token, d.Spec.ID, d.SPKI) },
					func(t *testing.T, token *pkcs11.Token) { whole(t, token, d.Spec.ID) }}
			},
			"destroying a key": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				k, _ := exported(t, token)
				return deed{Op: "destroy", Key: k.ID, SPKI: k.SPKI}, checks{func(t *testing.T, token *pkcs11.Token) { unharmed(t, token, k.ID, k.SPKI) },
					func(t *testing.T, token *pkcs11.Token) {
						objects(t, token, k.ID, 0)
						if i := token.Info(); i.Keys != 0 || i.Faulty != 0 {
							t.Errorf("%+v", i)
						}
					}}
			},
			"making the first domain": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				k, err := token.Generate(hsmtest.Spec("key", hsm.PurposeCA))
				must(t, err)
				return deed{Op: "generate-domain", KEK: "kek-1"}, checks{
					func(t *testing.T, token *pkcs11.Token) { domains(t, token, [2]string{"", ""}, [2]string{"kek-1", ""}) },
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-1", ""})
						works(t, token, "kek-1", k.ID)
					}}
			},
			"making another domain after the first was made by a process that died": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				k, err := token.Generate(hsmtest.Spec("key", hsm.PurposeCA))
				must(t, err)
				must(t, token.GenerateDomain("kek-0"))
				if n, err := token.DestroySecret("trivet-mac:kek-0"); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				return deed{Op: "generate-domain", KEK: "kek-1"}, checks{
					func(t *testing.T, token *pkcs11.Token) { domains(t, token, [2]string{"", ""}, [2]string{"kek-1", ""}) },
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-1", ""})
						works(t, token, "kek-1", k.ID)
						if n, err := token.DestroySecret("trivet-kek:kek-0"); n != 0 || err != nil {
							t.Errorf("%d halves are left, %v", n, err)
						}
					}}
			},
			"importing the next domain": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				k, _ := exported(t, token)
				return deed{Op: "import-domain", KEK: "kek-2", Wrapped: domain(t, token)}, checks{
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-1", ""}, [2]string{"kek-1", "kek-2"})
						works(t, token, "kek-1", k.ID)
					},
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-1", "kek-2"})
						works(t, token, "kek-1", k.ID)
						works(t, token, "kek-2", k.ID)
					}}
			},
			"importing a domain that sorts before the current one": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				exported(t, token)
				return deed{Op: "import-domain", KEK: "a", Wrapped: domain(t, token)}, checks{
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-1", ""}, [2]string{"kek-1", "a"})
					},
					func(t *testing.T, token *pkcs11.Token) { domains(t, token, [2]string{"kek-1", "a"}) }}
			},
			"rotating": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				k, _ := exported(t, token)
				must(t, token.GenerateDomain("kek-2"))
				return deed{Op: "rotate", KEK: "kek-2"}, checks{
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-1", "kek-2"}, [2]string{"kek-2", "kek-1"})
						works(t, token, "kek-1", k.ID)
						works(t, token, "kek-2", k.ID)
					},
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-2", "kek-1"})
						if n, err := token.Notes("domains"); n != 1 || err != nil {
							t.Errorf("%d notes, %v", n, err)
						}
					}}
			},
			"dropping the old domain": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				k, _ := exported(t, token)
				must(t, token.GenerateDomain("kek-2"))
				must(t, token.Rotate("kek-2"))
				return deed{Op: "drop-domain", KEK: "kek-1"}, checks{
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-2", "kek-1"}, [2]string{"kek-2", ""})
						works(t, token, "kek-2", k.ID)
					},
					func(t *testing.T, token *pkcs11.Token) {
						domains(t, token, [2]string{"kek-2", ""})
						works(t, token, "kek-2", k.ID)
						if n, err := token.DestroySecret("trivet-kek:kek-1"); n != 0 || err != nil {
							t.Errorf("%d halves are left, %v", n, err)
						}
					}}
			},
			"dropping the last domain": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				must(t, token.GenerateDomain("kek-1"))
				return deed{Op: "drop-domain", KEK: "kek-1"}, checks{
					func(t *testing.T, token *pkcs11.Token) { domains(t, token, [2]string{"kek-1", ""}, [2]string{"", ""}) },
					func(t *testing.T, token *pkcs11.Token) { domains(t, token, [2]string{"", ""}) }}
			},
			"setting the epoch": func(t *testing.T, token *pkcs11.Token) (deed, checks) {
				must(t, token.SetEpoch(hsm.EpochRecord{Site: "north", Epoch: 1}))
				d := deed{Op: "set-epoch", Epoch: hsm.EpochRecord{Site: "south", Epoch: 2, Grant: bytes.Repeat([]byte("grant"), 2000)}}
				return d, checks{
					func(t *testing.T, token *pkcs11.Token) {
						if e, err := token.Epoch(); err != nil || e.Epoch != 1 && fmt.Sprint(e) != fmt.Sprint(d.Epoch) {
							t.Errorf("%+v, %v", e, err)
						}
					},
					func(t *testing.T, token *pkcs11.Token) {
						if e, err := token.Epoch(); err != nil || fmt.Sprint(e) != fmt.Sprint(d.Epoch) {
							t.Errorf("%+v, %v", e, err)
						}
						if n, err := token.Notes("epoch"); n != 1 || err != nil {
							t.Errorf("%d notes, %v", n, err)
						}
					}}
			},
		} {
			if k == nss && (name == "opening a token" || strings.Contains(name, "sorts before")) {
				continue // nothing differs here, and each opening of a token takes this module a while
			}
			if k == nss && os.Getenv("TRIVET_LONG") == "" && name != "rotating" && name != "destroying a key" {
				continue // minutes: TRIVET_LONG=1 has them all
			}
			t.Run(name, func(t *testing.T) {
				start := t.TempDir()
				must(t, os.CopyFS(filepath.Join(start, "tokens"), os.DirFS(filepath.Join(k.blank(t), "tokens"))))
				cfg, _ := k.at(t, start)
				token, err := pkcs11.Open(cfg)
				must(t, err)
				d, check := prepare(t, token)
				closed(t, token)
				for n := 1; ; n++ {
					cfg, _ := k.copied(t, start)
					died := d.dies(t, module, cfg, n)
					token, err := pkcs11.Open(cfg)
					if err != nil {
						t.Fatalf("dead at call %d: %v", n, err)
					}
					if check.between != nil {
						check.between(t, token)
					}
					if d.Op != "open" {
						must(t, d.do(token))
						check.after(t, token)
					}
					if probes := probes(t, token); probes != 1 {
						t.Errorf("%d probe keys", probes)
					}
					closed(t, token)
					if token, err = pkcs11.Open(cfg); err != nil {
						t.Fatal(err)
					}
					if check.after != nil {
						check.after(t, token)
					}
					closed(t, token)
					if t.Failed() {
						t.Fatalf("after a death at call %d", n)
					}
					if !died {
						t.Logf("died at each of %d calls", n-1)
						return
					}
				}
			})
		}
	})
}

func probes(t *testing.T, token *pkcs11.Token) (n int) {
	t.Helper()
	list, err := token.Inventory()
	must(t, err)
	for _, k := range list {
		if k.Purpose == hsm.PurposeProbe {
			n++
		}
	}
	return n
}
