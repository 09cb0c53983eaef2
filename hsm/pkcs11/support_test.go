package pkcs11_test

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
)

// blanks are directories with one token each, initialised and holding its own keys; tests copy them, since an RSA key
// takes a while.
var blanks string

func TestMain(m *testing.M) {
	if path := os.Getenv("TRIVET_TEST_ACT"); path != "" {
		os.Exit(act(path))
	}
	code := func() int {
		dir, err := os.MkdirTemp("", "token")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		blanks = dir
		return m.Run()
	}()
	os.Exit(code)
}

// kind is a module under test. Tests run one after the other: SoftHSM reads SOFTHSM2_CONF, and NSS its arguments, when it is
// initialised, and one process has one configuration of a module at a time.
type kind struct {
	name string
	make sync.Once
	// at is the token in a directory.
	at func(t testing.TB, dir string) (pkcs11.Config, pkcs11.InitConfig)
}

var (
	softHSM = &kind{name: "softhsm", at: func(t testing.TB, dir string) (pkcs11.Config, pkcs11.InitConfig) {
		module, pin, soPIN := hsmtest.Module(t), filepath.Join(dir, "pin"), filepath.Join(dir, "so-pin")
		hsmtest.Write(t, pin, "1234\n")
		hsmtest.Write(t, soPIN, "5678\n")
		t.Setenv("SOFTHSM2_CONF", hsmtest.SoftHSM(t, dir))
		return pkcs11.Config{Module: module, TokenLabel: "token-a", PINFile: pin},
			pkcs11.InitConfig{Module: module, TokenLabel: "token-a", PINFile: pin, SOPINFile: soPIN}
	}}
	nss = &kind{name: "nss", at: func(t testing.TB, dir string) (pkcs11.Config, pkcs11.InitConfig) {
		module, pin, where := hsmtest.NSS(t), filepath.Join(dir, "pin"), filepath.Join(dir, "tokens")
		hsmtest.Write(t, pin, "1234\n")
		return pkcs11.Config{Module: module, TokenLabel: "token-n", PINFile: pin, Dir: where, Test: true},
			pkcs11.InitConfig{Module: module, TokenLabel: "token-n", PINFile: pin, Dir: where}
	}}
)

// each runs a test with every module.
func each(t *testing.T, test func(t *testing.T, k *kind)) {
	for _, k := range []*kind{softHSM, nss} {
		t.Run(k.name, func(t *testing.T) { test(t, k) })
	}
}

// blank is a directory with an initialised token.
func (k *kind) blank(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(blanks, k.name)
	k.make.Do(func() {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		cfg, init := k.at(t, dir)
		if made, err := pkcs11.Init(init); err != nil || !made {
			t.Fatalf("made %v, %v", made, err)
		}
		token, err := pkcs11.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := token.Close(); err != nil {
			t.Fatal(err)
		}
	})
	return dir
}

// fresh is a new token of its own.
func (k *kind) fresh(t testing.TB) (pkcs11.Config, pkcs11.InitConfig) {
	t.Helper()
	return k.copied(t, k.blank(t))
}

// copied is a copy of the token in a directory.
func (k *kind) copied(t testing.TB, from string) (pkcs11.Config, pkcs11.InitConfig) {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "tokens"), os.DirFS(filepath.Join(from, "tokens"))); err != nil {
		t.Fatal(err)
	}
	return k.at(t, dir)
}

// fresh is a new token of SoftHSM.
func fresh(t testing.TB) (pkcs11.Config, pkcs11.InitConfig) {
	t.Helper()
	return softHSM.fresh(t)
}

func open(t testing.TB, cfg pkcs11.Config) *pkcs11.Token {
	t.Helper()
	token, err := pkcs11.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	})
	return token
}

func closed(t testing.TB, token *pkcs11.Token) {
	t.Helper()
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// exported is a key of a token with a domain, and its blob.
func exported(t testing.TB, token *pkcs11.Token) (hsm.KeyRecord, hsm.Blob) {
	t.Helper()
	k, err := token.Generate(hsmtest.Spec("demo-g1", hsm.PurposeCA))
	must(t, err)
	must(t, token.GenerateDomain("kek-1"))
	b, err := token.Export(k.ID, "")
	must(t, err)
	return k, b
}

func objects(t testing.TB, token *pkcs11.Token, id hsm.KeyID, want int) {
	t.Helper()
	if n, err := token.Objects(id); err != nil || n != want {
		t.Errorf("%d objects with id %s, want %d; %v", n, id, want, err)
	}
}
