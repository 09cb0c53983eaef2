package hsmtest_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// newKey makes a CA key.
func newKey(t testing.TB, m *hsmtest.Member, label string) hsm.KeyRecord {
	t.Helper()
	k, err := m.Client(identity.RoleSync).Generate(within(t, 20*time.Second), hsmtest.Spec(label, hsm.PurposeCA))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func holds(list []hsm.KeyRecord, id hsm.KeyID) bool {
	return slices.ContainsFunc(list, func(k hsm.KeyRecord) bool { return k.ID == id })
}

// sign signs n digests and tells how many signatures are good.
func sign(t *testing.T, c *agent.Client, k hsm.KeyRecord, n int) (good int, err error) {
	t.Helper()
	digests := hsmtest.Digests(n)
	sigs, err := c.Sign(within(t, 20*time.Second), hsm.SignRequest{Key: k.ID, Digests: digests})
	for i, sig := range sigs {
		if hsmtest.Verifies(t, k.SPKI, digests[i], sig) {
			good++
		}
	}
	return good, err
}

func TestSignaturesAreSpoiltOnDemand(t *testing.T) {
	t.Run("softhsm", func(t *testing.T) { spoil(t, (*hsmtest.Lab).Faulty) })
	t.Run("nss", func(t *testing.T) { spoil(t, (*hsmtest.Lab).FaultyNSS) })
}

func spoil(t *testing.T, faulty func(*hsmtest.Lab, string, ...string) (*hsmtest.Member, hsmtest.Faults)) {
	m, faults := faulty(hsmtest.NewLab(t), "hsmd-a", nssPatience)
	m.Serve()
	k, other := newKey(t, m, "one"), newKey(t, m, "two")
	c := m.Client(identity.RoleCA)
	want := func(name string, n, good int) {
		t.Helper()
		if got, err := sign(t, c, k, n); err != nil || got != good {
			t.Errorf("%s: %d of %d signatures are good, want %d; %v", name, got, n, good, err)
		}
	}
	want("no fault", 4, 4)
	// "keys" leaves the agent's own test signatures alone, so that it goes on and believes itself well.
	faults.Set("C_Sign", "keys flip nth 3")
	want("one bit of the third", 4, 3)
	want("and of no other", 4, 4)
	if faults.Calls("C_Sign") != 8 {
		t.Errorf("%d calls were counted", faults.Calls("C_Sign"))
	}
	faults.Set("C_Sign", "keys flip every 2")
	want("every second", 4, 2)
	faults.Set("C_Sign", "keys flip first 1")
	want("the first", 4, 3)
	faults.Clear("C_Sign")
	faults.Set("C_SignInit", "keys other")
	digests := hsmtest.Digests(1)
	sigs, err := c.Sign(within(t, 10*time.Second), hsm.SignRequest{Key: k.ID, Digests: digests})
	if err != nil || !hsmtest.Verifies(t, other.SPKI, digests[0], sigs[0]) || hsmtest.Verifies(t, k.SPKI, digests[0], sigs[0]) {
		t.Errorf("another key did not sign: %v", err)
	}
	faults.Clear("C_SignInit")
	want("healed", 4, 4)
	if info := m.WaitReady(); !info.Probe.OK {
		t.Errorf("%+v", info)
	}
}

// What the module did and says it did not is the hardest fault: the key is there.
func TestDoneAndReportedAsFailed(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
	m.Serve()
	c := m.Client(identity.RoleSync)
	spec := hsmtest.Spec("ghost", hsm.PurposeCA)
	faults.Set("C_GenerateKeyPair", "after fail 0x30")
	if k, err := c.Generate(within(t, 20*time.Second), spec); err == nil {
		t.Fatalf("it reports %+v", k)
	}
	faults.Clear("C_GenerateKeyPair")
	m.Restart()
	list, err := c.Inventory(within(t, 20*time.Second))
	if err != nil || !holds(list, spec.ID) {
		t.Fatalf("%+v, %v", list, err)
	}
	k, err := c.Generate(within(t, 20*time.Second), spec)
	if err != nil {
		t.Fatal(err)
	}
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 2)
}

func TestOtherFunctionsFailOnDemand(t *testing.T) {
	lab := hsmtest.NewLab(t)
	a := lab.Start("hsmd-a")
	b, faults := lab.Faulty("hsmd-b")
	b.Serve()
	from, to := a.Client(identity.RoleSync), b.Client(identity.RoleSync)
	if err := from.GenerateDomain(within(t, 10*time.Second), "lab-1"); err != nil {
		t.Fatal(err)
	}
	newKey(t, a, "first")
	if err := b.Join(a); err != nil {
		t.Fatal(err)
	}
	reached := 0
	for _, rule := range [][2]string{
		{"C_UnwrapKey", "fail 0x30"}, {"C_UnwrapKey", "after fail 0x30"}, {"C_UnwrapKey", "after crash"}, {"C_CreateObject", "crash"},
		{"C_CreateObject", "after fail 0x30"}, {"C_CreateObject", "after crash"},
	} {
		k := newKey(t, a, fmt.Sprintf("key-%d", reached))
		blob, err := from.Export(within(t, 10*time.Second), k.ID, "")
		if err != nil {
			t.Fatal(err)
		}
		faults.Set(rule[0], rule[1])
		_, err = to.Import(within(t, 10*time.Second), blob)
		if faults.Calls(rule[0]) > 0 {
			reached++
			if err == nil {
				t.Errorf("%s %s: the import succeeded", rule[0], rule[1])
			}
		}
		faults.Clear(rule[0])
		b.Restart()
		if got, err := to.Import(within(t, 20*time.Second), blob); err != nil || string(got.SPKI) != string(k.SPKI) {
			t.Errorf("after %s %s: %+v, %v", rule[0], rule[1], got, err)
		}
		hsmtest.SignAndVerify(t, b.Client(identity.RoleCA), k, 1)
	}
	if reached < 4 {
		t.Errorf("an import met %d of the faults", reached)
	}
	k := newKey(t, a, "late")
	blob, err := from.Export(within(t, 10*time.Second), k.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	faults.Set("C_UnwrapKey", "delay 300000")
	began := time.Now()
	if _, err := to.Import(within(t, 20*time.Second), blob); err != nil || time.Since(began) < 300*time.Millisecond {
		t.Errorf("after %s: %v", time.Since(began), err)
	}
}

// The key is gone, and the module says that it is not.
func TestADestroyedKeyIsReportedAsThere(t *testing.T) {
	lab := hsmtest.NewLab(t)
	m, faults := lab.Faulty("hsmd-a")
	m.Serve()
	k, c := newKey(t, m, "one"), m.Client(identity.RoleSync)
	r := hsm.DestroyRequest{Group: "lab", Key: k.ID, SPKI: k.SPKI,
		Grant: lab.Approved("key-destroy", "lab/"+string(k.ID), map[string]string{"spki": hsm.Fingerprint(k.SPKI)})}
	faults.Set("C_DestroyObject", "after fail 0x30 first 1")
	if err := c.Destroy(within(t, 20*time.Second), r); err == nil {
		t.Error("it reports success")
	}
	faults.Clear("C_DestroyObject")
	m.Restart()
	if err := c.Destroy(within(t, 20*time.Second), r); err != nil {
		t.Error(err)
	}
	list, err := c.Inventory(within(t, 20*time.Second))
	if err != nil || holds(list, k.ID) {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestTheTokenIsLostAndFound(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
	m.Serve()
	k := newKey(t, m, "one")
	faults.Set("lost", "")
	_, err := sign(t, m.Client(identity.RoleCA), k, 1)
	hsmtest.WantClass(t, err, hsm.ClassDevice, hsm.ClassSession)
	m.Exit()
	m.Start()
	if code := m.Exit(); code == 0 {
		t.Error("it serves without a token")
	}
	faults.Clear("lost")
	m.Start()
	m.WaitReady()
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
}

func TestALockedPINIsNotTried(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
	m.Serve()
	m.Kill()
	faults.Set("pin-locked", "")
	faults.Set("logins", "")
	m.Start()
	if code := m.Exit(); code != 78 || strings.Contains(faults.Read("logins"), "user 1") {
		t.Errorf("exit code %d, %q", code, faults.Read("logins"))
	}
}

func TestAHungModuleIsReached(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a", "call_timeout: 500ms")
	m.Serve()
	k := newKey(t, m, "one")
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
	faults.Set("C_Sign", "keys hang nth 2")
	if _, err := sign(t, m.Client(identity.RoleCA), k, 1); err != nil {
		t.Fatal(err)
	}
	_, err := sign(t, m.Client(identity.RoleCA), k, 1)
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	faults.WaitCalls("C_Sign", 2)
	if code := m.Exit(); code != 1 {
		t.Errorf("exit code %d", code)
	}
}

func TestRateIsKept(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a", "call_timeout: 10s", "probe_every: 2s")
	m.Serve()
	k := newKey(t, m, "one")
	const rate, n = 200, 100
	faults.Rate(rate)
	began := time.Now()
	if good, err := sign(t, m.Client(identity.RoleCA), k, n); err != nil || good != n {
		t.Fatal(good, err)
	}
	if took := time.Since(began); took < (n-1)*time.Second/rate {
		t.Errorf("%d signatures took %s, want %s at least", n, took, (n-1)*time.Second/rate)
	}
	if raceless := time.Since(began); raceless > 4*n*time.Second/rate {
		t.Errorf("%d signatures took %s: the limit is no limit but a brake", n, raceless)
	}
}

func TestARuleThatMakesNoSenseEndsTheProcess(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
	m.Serve()
	faults.Set("C_Sign", "flap")
	if code := m.Exit(); code == 0 || !strings.Contains(m.Log(), "rule of C_Sign not understood: flap") {
		t.Errorf("exit code %d", code)
	}
}
