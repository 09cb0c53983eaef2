package hsmsync_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsmsync"
	"trivet/identity"
)

// works is a group of real members: hsmd processes on tokens of their own, with faults on demand.
type works struct {
	t      testing.TB
	lab    *hsmtest.Lab
	at     map[string]*hsmtest.Member
	faults map[string]hsmtest.Faults
	chain  *memory
	c      *hsmsync.Coordinator
	config hsmsync.CoordinatorConfig
}

func newWorks(t testing.TB, names ...string) *works {
	t.Helper()
	if testing.Short() {
		t.Skip("needs an HSM")
	}
	w := &works{t: t, lab: hsmtest.NewLab(t), at: map[string]*hsmtest.Member{}, faults: map[string]hsmtest.Faults{}, chain: &memory{}}
	w.config = hsmsync.CoordinatorConfig{
		Group: "ca", Identity: w.lab.Identity(identity.RoleSync, "sync1"), Chain: w.chain,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo})),
	}
	w.c = w.coordinator()
	w.add(names...)
	return w
}

func (w *works) coordinator() *hsmsync.Coordinator {
	w.t.Helper()
	c, err := hsmsync.NewCoordinator(w.config)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(c.Close)
	return c
}

func (w *works) add(names ...string) {
	w.t.Helper()
	for _, n := range names {
		w.at[n], w.faults[n] = w.lab.Faulty(n)
		w.at[n].Serve()
	}
}

func (w *works) soon() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	w.t.Cleanup(cancel)
	return ctx
}

func (w *works) setup(p hsmsync.Policy, names ...string) {
	w.t.Helper()
	var members []hsmsync.Member
	for _, n := range names {
		members = append(members, hsmsync.Member{Name: n, Address: w.at[n].Addr})
	}
	good(w.t, w.c.Setup(w.soon(), members, p))
	good(w.t, w.c.SetEpoch(w.soon(), hsm.EpochRecord{Site: "here", Epoch: 1}))
}

func (w *works) key(label string, a hsm.Algorithm) hsm.KeyRecord {
	w.t.Helper()
	k, err := w.c.CreateKey(w.soon(), hsm.KeySpec{Label: label, Purpose: hsm.PurposeCA, Algorithm: a})
	good(w.t, err)
	return k
}

// request is an approved enrolment.
func (w *works) request(name string) hsmsync.EnrollRequest {
	w.t.Helper()
	_, fingerprint, err := w.c.Inspect(w.soon(), name, w.at[name].Addr)
	good(w.t, err)
	return hsmsync.EnrollRequest{Name: name, Address: w.at[name].Addr, Grant: w.approve(w.c.EnrollAct(name, fingerprint))}
}

// retire retires a key as people approved.
func (w *works) retire(id hsm.KeyID, why string) error {
	w.t.Helper()
	act := wanted(w.t, w.c, func(c *hsmsync.Coordinator) error { return c.RetireKey(w.soon(), id, why) })
	return w.c.RetireKey(w.soon(), id, why, w.approve(act))
}

func (w *works) approve(a hsmsync.Act) []byte { return w.lab.Approved(a.Action, a.Object, a.Detail) }

// wipe gives a member a blank token.
func (w *works) wipe(name string) {
	w.t.Helper()
	m := w.at[name]
	m.Wipe()
	m.Start()
	m.WaitReady()
}

func (w *works) tokens(name string) string { return filepath.Join(w.at[name].Dir, "tokens") }

// replaceToken puts a copy of a token directory in the place of a member's, which does not run; "" empties it.
func (w *works) replaceToken(name, from string) {
	w.t.Helper()
	good(w.t, os.RemoveAll(w.tokens(name)))
	good(w.t, os.MkdirAll(w.tokens(name), 0o700))
	if from != "" {
		good(w.t, os.CopyFS(w.tokens(name), os.DirFS(from)))
	}
}

// keep copies a member's token, as a backup of its directory would.
func (w *works) keep(name string) string {
	w.t.Helper()
	m := w.at[name]
	m.Kill()
	to := filepath.Join(w.t.TempDir(), "tokens")
	good(w.t, os.CopyFS(to, os.DirFS(w.tokens(name))))
	m.Start()
	m.WaitReady()
	return to
}

// verify checks that everything is as the log says, with so many copies of so many keys.
func (w *works) verify(copies, keys int) {
	w.t.Helper()
	r, err := w.c.Verify(w.soon())
	good(w.t, err)
	if !r.OK || r.Fewest != copies || len(r.Keys) != keys {
		w.t.Fatalf("ok %v, %d copies of %d keys, want %d of %d: %+v", r.OK, r.Fewest, len(r.Keys), copies, keys, r.Findings)
	}
}

func TestARealGroupThroughItsLife(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b", "c", "d")
	w.setup(hsmsync.Policy{DestroyAfter: time.Millisecond}, "a", "b", "c")
	ctx := w.soon()
	var keys []hsm.KeyRecord
	for _, a := range []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048} {
		keys = append(keys, w.key("key-"+string(a), a))
	}
	_, err := w.c.CreateKey(ctx, hsm.KeySpec{Label: "x", Purpose: hsm.PurposeCA, Algorithm: hsm.Ed25519})
	failed(t, err, "no HSM wraps Ed25519")
	w.verify(3, 3)

	r := w.request("d")
	bare := r
	bare.Grant = nil
	failed(t, w.c.Enroll(ctx, bare), "approval of 2 people")
	good(t, w.c.Enroll(ctx, r))
	w.verify(4, 3)
	if i := w.at["d"].WaitReady(); i.Epoch != 1 || i.Site != "here" {
		t.Errorf("%+v", i)
	}

	good(t, w.c.RotateDomain(ctx))
	w.verify(4, 3)
	if i := w.at["d"].WaitReady(); i.NextKEK != "" {
		t.Errorf("the old domain key is there still: %+v", i)
	}

	// A member that is away while the domain key changes, and while a key is made and another destroyed.
	good(t, w.c.Drain(ctx, "b", "maintenance"))
	w.at["b"].Kill()
	good(t, w.c.RotateDomain(ctx))
	late := w.key("late", hsm.P256)
	good(t, w.retire(keys[0].ID, "rolled over"))
	act, err := w.c.DestroyAct(ctx, keys[0].ID)
	good(t, err)
	d, err := w.c.DestroyKey(ctx, keys[0].ID, w.approve(act))
	if err != nil || len(d.Done) != 3 || len(d.Left) != 1 {
		t.Fatalf("%+v %v", d, err)
	}
	w.at["b"].Start()
	w.at["b"].WaitReady()
	report, err := w.c.Reconcile(ctx)
	if err != nil || !report.OK || report.Destroyed != 1 || report.Copied != 1 {
		t.Fatalf("%+v %v", report, err)
	}
	good(t, w.c.Recover(ctx, "b", "done"))
	w.verify(4, 3)

	// A key from outside.
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	good(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	good(t, err)
	spki, err := x509.MarshalPKIXPublicKey(private.Public())
	good(t, err)
	spec := hsm.KeySpec{Label: "old-ca", Purpose: hsm.PurposeCA, Algorithm: hsm.P256}
	grant := w.approve(w.c.ImportAct(spec, spki))
	w.faults["c"].Set("C_UnwrapKey", "fail 0x30 first 9")
	_, err = w.c.ImportKey(ctx, spec.Label, spec.Purpose, spec.Algorithm, pkcs8, grant)
	failed(t, err, "stays pending", "into c")
	w.faults["c"].Clear("C_UnwrapKey")
	w.at["c"].Restart()
	imported, err := w.c.ImportKey(ctx, spec.Label, spec.Purpose, spec.Algorithm, pkcs8, grant) // the same approval
	good(t, err)
	if again, err := w.c.ImportKey(ctx, spec.Label, spec.Purpose, spec.Algorithm, pkcs8, grant); err != nil || again.ID != imported.ID {
		t.Errorf("%+v %v", again, err)
	}
	w.verify(4, 4)

	// A blank token under an old name.
	w.wipe("c")
	failed(t, w.c.Enroll(ctx, w.request("c")), "replace the member")
	good(t, w.c.Replace(ctx, w.request("c")))
	w.verify(4, 4)

	good(t, w.c.Remove(ctx, "d", "sold"))
	w.verify(3, 4)
	if k, _ := w.state().Key(late.ID); k.State != hsmsync.StateLive {
		t.Errorf("%+v", k)
	}
}

func (w *works) state() *hsmsync.State {
	w.t.Helper()
	s, err := w.c.State(w.soon())
	good(w.t, err)
	return s
}

// insist repeats an act, starting again what has died, until it is done.
func (w *works) insist(act func() error) (failures int) {
	w.t.Helper()
	for {
		err := act()
		for _, m := range w.at {
			if _, err := m.Client(identity.RoleSync).Health(w.soon()); err != nil {
				m.Restart()
			}
		}
		if err == nil {
			return failures
		}
		if failures++; failures > 6 {
			w.t.Fatal(err)
		}
	}
}

func TestARealMemberDiesAtAnyPointOfItsEnrolment(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b", "d")
	w.setup(hsmsync.Policy{}, "a", "b")
	blank := w.keep("d")
	const keys = 4
	for i := range keys {
		w.key(fmt.Sprint("key-", i), hsm.P256)
	}
	for _, fault := range []string{
		"C_UnwrapKey crash nth 1", "C_UnwrapKey after crash nth 3", "C_UnwrapKey after crash nth 5", // domain key, then keys
		"C_CreateObject crash nth 2", "C_CreateObject after crash nth 3", // public halves: a key half written
		"C_UnwrapKey fail 0x30 nth 6", "C_UnwrapKey after fail 0x30 nth 6",
		"C_Sign keys crash nth 2", "C_Sign keys crash nth 7", "C_SignInit keys fail 0x30 nth 6",
	} {
		name, rule, _ := strings.Cut(fault, " ")
		w.at["d"].Kill()
		w.replaceToken("d", blank)
		w.at["d"].Start()
		w.at["d"].WaitReady()
		r := w.request("d")
		w.faults["d"].Set(name, rule)
		failures := w.insist(func() error { return w.c.Enroll(w.soon(), r) })
		w.faults["d"].Clear(name)
		t.Logf("%s: %d failures", fault, failures)
		w.verify(3, keys)
		good(t, w.c.Remove(w.soon(), "d", "the next fault"))
	}
}

func TestARealMemberDiesAtAnyPointOfMakingAKey(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b", "c")
	w.setup(hsmsync.Policy{}, "a", "b", "c")
	made := 0
	for _, fault := range []string{
		"a C_GenerateKeyPair crash nth 1", "a C_GenerateKeyPair after crash nth 1", "a C_WrapKey crash nth 1", "b C_UnwrapKey crash nth 1",
		"b C_UnwrapKey after crash nth 1", "b C_CreateObject crash nth 1", "b C_CreateObject after crash nth 1", "c C_Sign keys crash nth 1", "c C_Sign keys crash nth 2",
		"a C_Sign keys crash nth 1", "b C_Sign keys flip nth 1", "b C_Sign keys flip nth 2",
	} {
		f := strings.SplitN(fault, " ", 3)
		w.faults[f[0]].Set(f[1], f[2])
		label := fmt.Sprint("key-", made)
		failures := w.insist(func() error {
			_, err := w.c.CreateKey(w.soon(), hsm.KeySpec{Label: label, Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
			return err
		})
		w.faults[f[0]].Clear(f[1])
		made++
		t.Logf("%s: %d failures", fault, failures)
		w.verify(3, made)
	}
}

func TestRealCoordinatorsAtOnceMakeOneKey(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b", "c")
	w.setup(hsmsync.Policy{}, "a", "b", "c")
	for round, spec := range []hsm.KeySpec{
		{Label: "ec", Purpose: hsm.PurposeCA, Algorithm: hsm.P256}, {Label: "rsa", Purpose: hsm.PurposeOCSP, Algorithm: hsm.RSA2048},
	} {
		var all sync.WaitGroup
		ids := make([]hsm.KeyID, 5)
		for i := range ids {
			c := w.coordinator()
			all.Go(func() {
				k, err := c.CreateKey(w.soon(), spec)
				if err != nil {
					t.Errorf("coordinator %d: %v", i, err)
				}
				ids[i] = k.ID
			})
		}
		all.Wait()
		if slices.ContainsFunc(ids, func(id hsm.KeyID) bool { return id != ids[0] || id == "" }) {
			t.Errorf("they were given %v", ids)
		}
		w.verify(3, round+1)
	}
	for _, k := range w.state().Keys() {
		if k.State != hsmsync.StateLive {
			t.Errorf("key %s (%s) is %s", k.ID, k.Label, k.State)
		}
	}
}

func TestARealMemberDiesAtAnyPointOfARotation(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b", "c")
	w.setup(hsmsync.Policy{}, "a", "b", "c")
	w.key("key", hsm.P256)
	for _, fault := range []string{
		"a C_GenerateKey crash nth 1", "a C_GenerateKey after crash nth 1", "a C_GenerateKey crash nth 2", "a C_WrapKey crash nth 1", "a C_WrapKey crash nth 3",
		"b C_UnwrapKey crash nth 1", "b C_UnwrapKey after crash nth 3", "b C_UnwrapKey crash nth 4",
		"c C_DestroyObject crash nth 3", "c C_DestroyObject after crash nth 3", "c C_DestroyObject after crash nth 4", "c C_CreateObject after crash nth 1",
		"b C_SetAttributeValue after crash nth 1", "b C_SetAttributeValue after crash nth 2",
	} {
		f := strings.SplitN(fault, " ", 3)
		old := w.state().Domain.Name
		w.faults[f[0]].Set(f[1], f[2])
		failures := w.insist(func() error { return w.c.RotateDomain(w.soon()) })
		w.faults[f[0]].Clear(f[1])
		t.Logf("%s: %d failures", fault, failures)
		s := w.state()
		if s.Domain.Name == old || s.Rotate.Name != "" {
			t.Errorf("%s: the domain key is %s, next %q", fault, s.Domain.Name, s.Rotate.Name)
		}
		for _, m := range w.at {
			if i := m.WaitReady(); i.KEK != s.Domain.Name || i.NextKEK != "" {
				t.Errorf("%s: %s holds %q and %q, the group's is %q", fault, m.Name, i.KEK, i.NextKEK, s.Domain.Name)
			}
		}
		w.verify(3, 1)
	}
}

func TestRealTokensThatGoBack(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b", "c")
	w.setup(hsmsync.Policy{DestroyAfter: time.Millisecond}, "a", "b", "c")
	ctx := w.soon()
	first := w.key("first", hsm.P256)
	old := w.keep("c")
	second := w.key("second", hsm.P256)

	restore := func() {
		t.Helper()
		w.at["c"].Kill()
		w.replaceToken("c", old)
		w.at["c"].Start()
		w.at["c"].WaitReady()
	}
	restore()
	r, err := w.c.Reconcile(ctx)
	if err != nil || !r.OK || r.Copied != 1 {
		t.Fatalf("a stale token: %+v %v", r, err)
	}
	w.verify(3, 2)

	// The old token brings a key back that was destroyed.
	good(t, w.retire(first.ID, ""))
	act, err := w.c.DestroyAct(ctx, first.ID)
	good(t, err)
	_, err = w.c.DestroyKey(ctx, first.ID, w.approve(act))
	good(t, err)
	restore()
	// Where the agent remembers that it has used this approval, people have to look, and approve anew.
	r, err = w.c.Reconcile(ctx)
	good(t, err)
	if still := holdsKey(ctx, t, w, "c", first.ID); still == r.OK || still == (r.Destroyed == 1) {
		t.Fatalf("it holds the key: %v; the report says %+v", still, r)
	}
	if !r.OK {
		failed(t, errorOf(r.Findings[0].Detail), "needs a new approval")
		_, err = w.c.DestroyKey(ctx, first.ID, w.approve(act))
		good(t, err)
	}
	if holdsKey(ctx, t, w, "c", first.ID) {
		t.Fatal("the destroyed key is there still")
	}
	w.verify(3, 1)

	// Another key under the id of one that the group has: reported, and left alone.
	third := w.key("third", hsm.P256)
	w.wipe("c")
	client := w.at["c"].Client(identity.RoleSync)
	good(t, client.GenerateDomain(ctx, "foreign"))
	_, err = client.Generate(ctx, third.KeySpec)
	good(t, err)
	r, err = w.c.Reconcile(ctx)
	if err != nil || r.OK || !strings.Contains(kinds(r), "token-changed c") {
		t.Errorf("%s %v", kinds(r), err)
	}
	failed(t, w.c.Replace(ctx, w.request("c")), "initialise it")
	w.wipe("c")
	good(t, w.c.Replace(ctx, w.request("c")))
	w.verify(3, 2)
	_ = second
}

func holdsKey(ctx context.Context, t *testing.T, w *works, name string, id hsm.KeyID) bool {
	t.Helper()
	all, err := w.at[name].Client(identity.RoleSync).Inventory(ctx)
	good(t, err)
	for _, k := range all {
		if k.ID == id {
			return true
		}
	}
	return false
}
