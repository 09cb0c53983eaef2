package hsmtest_test

import (
	"context"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// members are on the kinds of token there are.
func members(t *testing.T, test func(t *testing.T, l *hsmtest.Lab, m *hsmtest.Member)) {
	for name, make := range map[string]func(*hsmtest.Lab, string, ...string) *hsmtest.Member{"softhsm": (*hsmtest.Lab).Member, "nss": (*hsmtest.Lab).NSS} {
		t.Run(name, func(t *testing.T) {
			l := hsmtest.NewLab(t)
			test(t, l, make(l, "hsmd-a").Serve())
		})
	}
}

func TestAMemberComesBackStale(t *testing.T) {
	members(t, func(t *testing.T, _ *hsmtest.Lab, m *hsmtest.Member) {
		early := newKey(t, m, "early")
		lastWeek := m.Snapshot()
		late := newKey(t, m, "late")
		serial := m.WaitReady().TokenSerial
		m.Restore(lastWeek)
		m.Start()
		if got := m.WaitReady().TokenSerial; got != serial {
			t.Errorf("the token is %s and was %s", got, serial)
		}
		c := m.Client(identity.RoleCA)
		hsmtest.SignAndVerify(t, c, early, 1)
		_, err := sign(t, c, late, 1)
		hsmtest.WantClass(t, err, hsm.ClassNotFound)
	})
}

func TestATokenIsWiped(t *testing.T) {
	members(t, func(t *testing.T, _ *hsmtest.Lab, m *hsmtest.Member) {
		newKey(t, m, "early")
		before := m.WaitReady()
		for _, again := range []func(){m.Wipe, m.Replace} {
			again()
			m.Start()
			after := m.WaitReady()
			if after.Keys != 0 || after.Transport == before.Transport {
				t.Errorf("the token is %+v and was %+v", after, before)
			}
			before = after
		}
	})
}

func TestAPINIsChangedBehindTheAgentsBack(t *testing.T) {
	members(t, func(t *testing.T, _ *hsmtest.Lab, m *hsmtest.Member) {
		k := newKey(t, m, "one")
		hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1) // NSS reads no key any more once its PIN is another one
		m.ChangePIN("another-pin")
		hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
		m.Kill()
		m.Start()
		if code := m.Exit(); code != 78 {
			t.Errorf("exit code %d", code)
		}
		hsmtest.Write(t, m.PIN, "another-pin\n")
		m.Start()
		m.WaitReady()
		hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
	})
}

func TestAMemberIsFrozenAndThawed(t *testing.T) {
	m := hsmtest.NewLab(t).Start("hsmd-a")
	before := m.WaitReady().Incarnation
	m.Freeze()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := m.Client(identity.RoleCA).Health(ctx)
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	m.Thaw()
	if after := m.WaitReady().Incarnation; after != before {
		t.Error("it is another process")
	}
	if after := m.Restart().Incarnation; after == before {
		t.Error("it is the same process")
	}
}

func TestAProxyCutsAMemberOff(t *testing.T) {
	l := hsmtest.NewLab(t)
	m := l.Start("hsmd-a")
	p := l.Proxy(m)
	c := agent.NewClient(m.Name, p.Addr, l.Identity(identity.RoleSync, "sync1"))
	t.Cleanup(c.Close)
	health := func(limit time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		_, err := c.Health(ctx)
		return err
	}
	works := func(when string) {
		t.Helper()
		if err := health(10 * time.Second); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	works("at first")
	p.Cut()
	began := time.Now()
	hsmtest.WantClass(t, health(300*time.Millisecond), hsm.ClassDevice)
	if time.Since(began) < 300*time.Millisecond {
		t.Error("the partition answered")
	}
	p.Heal()
	works("healed")
	p.Refuse()
	began = time.Now()
	hsmtest.WantClass(t, health(10*time.Second), hsm.ClassDevice)
	if time.Since(began) > 5*time.Second {
		t.Error("the refusal did not answer")
	}
	p.Heal()
	works("healed again")

	// The key is made, and nobody hears of it.
	p.CutAnswers()
	spec := hsmtest.Spec("unheard", hsm.PurposeCA)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	_, err := c.Generate(ctx, spec)
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	direct := m.Client(identity.RoleCA)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		list, err := direct.Inventory(within(t, 10*time.Second))
		if err == nil && holds(list, spec.ID) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%+v, %v", list, err)
		}
	}
	p.Heal()
	works("healed at last")
	p.Delay(50 * time.Millisecond)
	began = time.Now()
	works("slow")
	if time.Since(began) < 100*time.Millisecond {
		t.Error("the way there and back took no time")
	}
}
