package pkcs11_test

import (
	"strings"
	"testing"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
)

// faulty is a SoftHSM token whose module has faults on demand.
func faulty(t *testing.T) (*pkcs11.Token, hsmtest.Faults) {
	t.Helper()
	cfg, _ := softHSM.fresh(t)
	module, env, faults := hsmtest.FaultyModule(t, t.TempDir(), cfg.Module)
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		t.Setenv(name, value)
	}
	cfg.Module = module
	return open(t, cfg), faults
}

// blobs are keys that a token has made, exported and destroyed.
func blobs(t *testing.T, token *pkcs11.Token, n int) (out []hsm.Blob) {
	t.Helper()
	must(t, token.GenerateDomain("kek-1"))
	for range n {
		k, err := token.Generate(hsmtest.Spec("demo-g1", hsm.PurposeCA))
		must(t, err)
		b, err := token.Export(k.ID, "")
		must(t, err)
		must(t, token.Destroy(k.ID, k.SPKI))
		out = append(out, b)
	}
	return out
}

// An import that the module fails casts doubt on one key and no other: finding each of n keys by a search costs n².
func TestAFailureMakesNobodySearchForOtherKeys(t *testing.T) {
	token, faults := faulty(t)
	all := blobs(t, token, 4)
	faults.Set("C_UnwrapKey", "fail 0x5 nth 1")
	if _, err := token.Import(all[0]); hsm.ClassOf(err) != hsm.ClassRequest {
		t.Fatalf("a module that fails: %v", err)
	}
	faults.Clear("C_UnwrapKey")
	faults.Set("C_FindObjectsInit", "delay 1")
	for _, b := range all[1:] {
		_, err := token.Import(b)
		must(t, err)
	}
	if n := faults.Calls("C_FindObjectsInit"); n != 0 {
		t.Errorf("%d searches for keys that nothing was wrong with", n)
	}
	_, err := token.Import(all[0])
	must(t, err)
	if n := faults.Calls("C_FindObjectsInit"); n != 2 {
		t.Errorf("%d searches for the two halves in doubt", n)
	}
	for _, b := range all {
		objects(t, token, b.ID, 2)
	}
}

// SoftHSM fails to make an object that a search in another session meets half-made, so that nothing is searched for while a
// key comes in; a key's first signature takes another way.
func TestNothingIsSearchedForWhileAKeyComesIn(t *testing.T) {
	token, faults := faulty(t)
	b := blobs(t, token, 1)[0]
	k, err := token.Generate(hsmtest.Spec("demo-g2", hsm.PurposeCA))
	must(t, err)
	faults.Set("C_UnwrapKey", "hang")
	in := make(chan error)
	go func() {
		_, err := token.Import(b)
		in <- err
	}()
	faults.WaitCalls("C_UnwrapKey", 1)
	faults.Set("C_FindObjectsInit", "delay 1")
	hsmtest.SignAndVerify(t, hsmtest.Direct(token), k, 2)
	if n := faults.Calls("C_FindObjectsInit"); n != 0 {
		t.Errorf("%d searches beside an import", n)
	}
	faults.Clear("C_UnwrapKey")
	must(t, <-in)
}
