package main_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// Whoever holds the sync role carries everything and reads, plants and uses nothing; whoever holds another role does less.
func TestCarriersCannotUseOrPlantKeys(t *testing.T) {
	lab := hsmtest.NewLab(t)
	a, b := lab.Start("hsmd-a"), lab.Start("hsmd-b")
	sync := a.Client(identity.RoleSync)
	ctx := within(t, 60*time.Second)
	if err := sync.GenerateDomain(ctx, "kek-1"); err != nil {
		t.Fatal(err)
	}
	if err := carry(t, lab, "", a, b, false); err != nil { // first set-up: no key yet, nothing to approve
		t.Fatal(err)
	}
	k := newKey(t, a)
	for _, role := range []identity.Role{identity.RoleOCSP, identity.RoleSync, identity.RoleLB, identity.RoleAdmin, identity.RoleHSMD} {
		_, err := a.Client(role).Sign(ctx, hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(1)})
		hsmtest.WantClass(t, err, hsm.ClassDenied)
	}

	blob, err := sync.Export(ctx, k.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	to := b.Client(identity.RoleSync)
	for name, forge := range map[string]func(*hsm.Blob){
		"the CA key as one for OCSP":        func(b *hsm.Blob) { b.Purpose = hsm.PurposeOCSP },
		"the CA key as one for OCSP, twice": func(b *hsm.Blob) { b.Purpose, b.ID = hsm.PurposeOCSP, hsm.NewKeyID() },
		"another key under the CA key's id": func(b *hsm.Blob) { b.SPKI = bytes.Clone(b.SPKI); b.SPKI[len(b.SPKI)-1] ^= 1 },
		"a MAC of somebody's making":        func(b *hsm.Blob) { b.MAC = make([]byte, 32) },
		"no MAC":                            func(b *hsm.Blob) { b.MAC = nil },
	} {
		planted := blob
		forge(&planted)
		for _, target := range []*hsmtest.Member{a, b} {
			if _, err := target.Client(identity.RoleSync).Import(ctx, planted); hsm.ClassOf(err) != hsm.ClassRequest {
				t.Errorf("%s into %s: %v", name, target.Name, err)
			}
		}
	}
	if _, err := to.Import(ctx, blob); err != nil {
		t.Fatal(err)
	}
	_, err = b.Client(identity.RoleOCSP).Sign(ctx, hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(1)})
	hsmtest.WantClass(t, err, hsm.ClassDenied)
	if info := b.WaitReady(); info.Keys != 1 {
		t.Errorf("%d keys in %s", info.Keys, b.Name)
	}
}

// An agent of the cluster is no member until people say so: not for the domain key, whichever member is asked for it.
func TestTheDomainKeyIsForApprovedMembersAlone(t *testing.T) {
	lab := hsmtest.NewLab(t)
	a, b, c := lab.Start("hsmd-a"), lab.Start("hsmd-b"), lab.Start("hsmd-c")
	ctx := within(t, 60*time.Second)
	if err := a.Client(identity.RoleSync).GenerateDomain(ctx, "kek-1"); err != nil {
		t.Fatal(err)
	}
	newKey(t, a)
	wantCode(t, carry(t, lab, "", a, b, false), hsm.ClassDenied, hsm.CodeApproval)
	if err := enroll(t, lab, a, b); err != nil {
		t.Fatal(err)
	}
	// b has the domain key and no other key yet. It lets nobody new in for that.
	wantCode(t, carry(t, lab, "", b, c, false), hsm.ClassDenied, hsm.CodeApproval)
	if err := enroll(t, lab, b, c); err != nil {
		t.Fatal(err)
	}
	// The next domain key goes to those who hold the old one: c has learnt from b who they are.
	if err := c.Client(identity.RoleSync).GenerateDomain(ctx, "kek-2"); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*hsmtest.Member{a, b} {
		if err := carry(t, lab, "kek-2", c, m, false); err != nil {
			t.Errorf("%s: %v", m.Name, err)
		}
	}
	for _, m := range []*hsmtest.Member{a, b, c} {
		if err := m.Client(identity.RoleSync).Rotate(ctx, "kek-2"); err != nil {
			t.Error(err)
		}
		if err := m.Client(identity.RoleSync).DropDomain(ctx, "kek-1"); err != nil {
			t.Error(err)
		}
		if info := m.WaitReady(); info.KEK != "kek-2" || info.NextKEK != "" {
			t.Errorf("%s holds %q and %q", m.Name, info.KEK, info.NextKEK)
		}
	}
}

// A domain key that was outside the tokens comes into empty ones alone, and a member that took one so does not spread it.
func TestADomainKeyFromOutsideReadsNoKeys(t *testing.T) {
	lab := hsmtest.NewLab(t)
	a, b := lab.Start("hsmd-a"), lab.Start("hsmd-b")
	ctx := within(t, 60*time.Second)
	custodians, err := rsa.GenerateKey(rand.Reader, hsm.TransportBits)
	if err != nil {
		t.Fatal(err)
	}
	recipient, err := x509.MarshalPKIXPublicKey(&custodians.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Client(identity.RoleSync).GenerateDomain(ctx, "kek-1"); err != nil {
		t.Fatal(err)
	}
	k := newKey(t, a)
	blob, err := a.Client(identity.RoleSync).Export(ctx, k.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	backup, _, err := a.Client(identity.RoleSync).BackupDomain(ctx, hsm.BackupRequest{Group: "demo", Recipient: recipient,
		Grant: approved(t, lab, "hsm-backup", "demo", map[string]string{"recipient": sha(recipient)})})
	if err != nil {
		t.Fatal(err)
	}

	// Somebody makes a domain key, knows it, and brings it to b, which is still empty, and to a, which is not.
	for _, m := range []*hsmtest.Member{b, a} {
		evil, err := bring(t, lab, m, make([]byte, 32), make([]byte, 32))
		if err != nil {
			t.Fatal(err)
		}
		err = m.Client(identity.RoleSync).ImportDomain(ctx, "evil", evil)
		if m == b && err != nil {
			t.Fatal(err)
		} else if m == a {
			hsmtest.WantClass(t, err, hsm.ClassDenied)
		}
	}
	// It does not get from b to a.
	hsmtest.WantClass(t, carry(t, lab, "evil", b, a, true), hsm.ClassDenied)
	// b, enrolled beside it, gives nothing away under it.
	if err := enroll(t, lab, a, b); err != nil {
		t.Fatal(err)
	}
	_, err = b.Client(identity.RoleSync).Export(ctx, k.ID, "evil")
	hsmtest.WantClass(t, err, hsm.ClassNotFound)
	if _, err := b.Client(identity.RoleSync).Import(ctx, blob); err != nil {
		t.Fatal(err)
	}
	for _, kek := range []string{"", "evil"} {
		_, err = b.Client(identity.RoleSync).Export(ctx, k.ID, kek)
		hsmtest.WantClass(t, err, hsm.ClassDenied)
	}

	// The custodians restore the group into an empty token: that is what bringing is for.
	c := lab.Start("hsmd-c")
	half := hsm.TransportBits / 8
	kek, err1 := rsa.DecryptOAEP(sha1.New(), nil, custodians, backup[:half], nil)
	mac, err2 := rsa.DecryptOAEP(sha1.New(), nil, custodians, backup[half:], nil)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	restored, err := bring(t, lab, c, kek, mac)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the answer may have been lost
		if err := c.Client(identity.RoleCeremony).ImportDomain(ctx, "kek-1", restored); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Client(identity.RoleCeremony).Import(ctx, blob); err != nil {
		t.Fatal(err)
	}
	prove(t, c, k)
	// It serves as a source for others that are empty, and is rotated to a domain key that nobody outside knows.
	d := lab.Start("hsmd-d")
	if err := enroll(t, lab, c, d); err != nil {
		t.Fatal(err)
	}
	if blob, err = c.Client(identity.RoleSync).Export(ctx, k.ID, "kek-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Client(identity.RoleSync).Import(ctx, blob); err != nil {
		t.Fatal(err)
	}
	if err := c.Client(identity.RoleSync).GenerateDomain(ctx, "kek-2"); err != nil {
		t.Fatal(err)
	}
	if err := carry(t, lab, "kek-2", c, d, false); err != nil {
		t.Fatal(err)
	}
	_, err = d.Client(identity.RoleSync).Export(ctx, k.ID, "kek-1")
	hsmtest.WantClass(t, err, hsm.ClassDenied)
	if _, err := d.Client(identity.RoleSync).Export(ctx, k.ID, "kek-2"); err != nil {
		t.Error(err)
	}
}

// bring wraps a domain key that is known for a member's token.
func bring(t *testing.T, lab *hsmtest.Lab, m *hsmtest.Member, kek, mac []byte) (wrapped []byte, err error) {
	t.Helper()
	transport, err := m.Client(identity.RoleSync).TransportKey(within(t, 10*time.Second))
	if err != nil {
		return nil, err
	}
	spki, _, err := agent.TransportSPKI(lab.Identity(identity.RoleSync, "sync1"), transport, time.Now())
	if err != nil {
		return nil, err
	}
	pub, err := hsm.ParseTransport(spki)
	if err != nil {
		return nil, err
	}
	for _, half := range [][]byte{kek, mac} {
		out, err := hsm.SealSecret(pub, half)
		if err != nil {
			return nil, err
		}
		wrapped = append(wrapped, out...)
	}
	return wrapped, nil
}

// The member's disk is put back to before a promotion, as a restored machine's is: the token remembers.
func TestAnOldDiskDoesNotTakeTheMemberToAnOldEpoch(t *testing.T) {
	lab := hsmtest.NewLab(t)
	m := lab.Start("hsmd-a")
	k := newKey(t, m)
	c := m.Client(identity.RoleCeremony)
	if err := c.SetEpoch(within(t, 10*time.Second), hsm.EpochRecord{Site: "here", Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(m.Dir, "state.json")
	old, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetEpoch(within(t, 10*time.Second), epoch(t, lab, "there", 2)); err != nil {
		t.Fatal(err)
	}
	m.Signal(syscall.SIGTERM)
	if code := m.Exit(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	hsmtest.Write(t, state, string(old))
	m.Start()
	if info := m.WaitReady(); info.Epoch != 2 || info.Site != "there" {
		t.Errorf("epoch %d of %q", info.Epoch, info.Site)
	}
	for n, want := range map[uint64]hsm.Class{0: hsm.ClassDenied, 1: hsm.ClassDenied, 2: 0, 3: hsm.ClassDenied} {
		_, err := m.Client(identity.RoleCA).Sign(within(t, 10*time.Second), hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(1), Epoch: n})
		if hsm.ClassOf(err) != want {
			t.Errorf("signing for epoch %d: %v", n, err)
		}
	}
	wantCode(t, c.SetEpoch(within(t, 10*time.Second), epoch(t, lab, "here", 2)), hsm.ClassDenied, hsm.CodeEpoch)
}

// What was destroyed stays so over restarts, and an approval for one key destroys no other.
func TestDestructionIsForGood(t *testing.T) {
	lab := hsmtest.NewLab(t)
	m := lab.Start("hsmd-a")
	c := m.Client(identity.RoleSync)
	if err := c.GenerateDomain(within(t, 10*time.Second), "kek-1"); err != nil {
		t.Fatal(err)
	}
	k, other := newKey(t, m), newKey(t, m)
	blob, err := c.Export(within(t, 10*time.Second), k.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	grant := approved(t, lab, "key-destroy", "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)})
	req := hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI, Grant: grant}
	if err := c.Destroy(within(t, 10*time.Second), req); err != nil {
		t.Fatal(err)
	}
	m.Kill()
	m.Start()
	m.WaitReady()
	if err := c.Destroy(within(t, 10*time.Second), req); err != nil { // the same act again
		t.Error(err)
	}
	_, err = c.Import(within(t, 10*time.Second), blob)
	wantCode(t, err, hsm.ClassDenied, hsm.CodeDestroyed)
	wantCode(t, c.Destroy(within(t, 10*time.Second), hsm.DestroyRequest{Group: "demo", Key: other.ID, SPKI: other.SPKI, Grant: grant}), hsm.ClassDenied, hsm.CodeApproval)
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), other, 1)
	found := false
	for _, a := range record(t, m) {
		found = found || a.Event == "destroy" && a.Outcome == "ok" && a.Object == string(k.ID) && strings.Contains(a.Detail, "trivet://lab/admin/admin1,trivet://lab/ca-operator/operator1")
	}
	if !found {
		t.Errorf("audit record: %+v", record(t, m))
	}
}

// The agent does not start without what it must not forget, and says what to do.
func TestLostOrDamagedStateIsRefused(t *testing.T) {
	m := hsmtest.NewLab(t).Start("hsmd-a")
	m.Kill()
	state := filepath.Join(m.Dir, "state.json")
	good, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func() error{
		"lost":    func() error { return os.Remove(state) },
		"damaged": func() error { return os.WriteFile(state, good[:len(good)-9], 0o600) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		m.Start()
		if code := m.Exit(); code != 1 || !strings.Contains(m.Log(), "put back the newest copy") {
			t.Errorf("%s: exit code %d", name, code)
		}
	}
	hsmtest.Write(t, state, string(good))
	m.Start()
	m.WaitReady()
}
