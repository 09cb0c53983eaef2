package hsmsync_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
	"trivet/hsmsync"
)

func recovery(every time.Duration, attempts int) func(*bed, *hsmsync.Config) {
	return func(_ *bed, cfg *hsmsync.Config) { cfg.Recovery = hsmsync.Recovery{Every: every, Attempts: attempts} }
}

func TestAMemberIsGivenUpAfterSoManyAttempts(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		m := b.members[0]
		b.chain.enter(t, "recover", "a", hsmsync.Note{}) // before anything happened: it will not count later
		settle()
		m.with("*", dead)
		time.Sleep(time.Minute)
		asked := m.count("health")
		m.with("*", nil)
		time.Sleep(time.Minute)
		if s := b.group.Status().Groups[0].Members[0]; s.State != "failed" || !s.GivenUp || m.count("health") != asked {
			t.Fatalf("%+v, asked %d times more", s, m.count("health")-asked)
		}
		if n := b.metric("recovery_attempts_total", "a"); n != 4 {
			t.Errorf("%v attempts are counted", n)
		}
		b.expectGiven(10, 0, 5, 5)
		b.chain.enter(t, "recover", "a", hsmsync.Note{})
		settle()
		b.expect("active active active")
		b.expectGiven(30, 10, 10, 10)
	}, recovery(2*time.Second, 4))
}

// metric is the value of a series of the group; see series.
func (b *bed) metric(name string, labels ...string) float64 {
	b.t.Helper()
	return series(b.t, b.metrics, name, labels...)
}

// series is the value of a series, or the count of a histogram, found by its labels' values; 0 when there is none.
func series(t testing.TB, r prometheus.Gatherer, name string, labels ...string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "trivet_hsmsync_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			found := 0
			for _, l := range m.GetLabel() {
				if slices.Contains(labels, l.GetValue()) {
					found++
				}
			}
			if found == len(labels) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return 0
}

func TestRecoveryCanBeManual(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[2].with("*", dead)
		settle()
		b.members[2].with("*", nil)
		settle()
		if s := b.group.Status().Groups[0].Members[2]; s.State != "failed" || !s.GivenUp {
			t.Fatalf("%+v", s)
		}
		b.chain.enter(t, "recover", "c", hsmsync.Note{})
		settle()
		b.expect("active active active")
	}, recovery(time.Second, 0))
}

func TestAnEntryInTheLogLiftsAQuarantine(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[1].with("sign", failing(hsm.ClassPIN))
		for range 3 {
			b.sign(1)
		}
		b.expect("active quarantined active")
		b.members[1].with("sign", nil)
		b.chain.enter(t, "recover", "a", hsmsync.Note{})
		settle()
		b.expect("active quarantined active")
		b.chain.enter(t, "recover", "b", hsmsync.Note{})
		settle()
		b.expect("active active active")
	})
}

func TestSigningResumesSoonAfterAllWereLost(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("*", dead)
		}
		time.Sleep(10 * time.Minute)
		b.expect("failed failed failed")
		m := b.members[1]
		m.restart()
		m.with("*", nil)
		began := time.Now()
		for b.states() == "failed failed failed" {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(10 * time.Millisecond)
		b.sign(1) // by a member that is recovering yet, since it has proved this key and there is no other
		t.Logf("signing after %v", time.Since(began))
		if d := time.Since(began); d > 2*time.Second {
			t.Errorf("signing took %v to resume", d)
		}
		for b.states() != "failed active failed" {
			time.Sleep(10 * time.Millisecond)
		}
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("recovery took %v", d)
		}
	})
}

func TestAMemberRecoversWhenItHasProvedEveryKey(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		other := b.newKey("crl-g1", hsm.PurposeCRL, hsm.P256)
		settle()
		m := b.members[0]
		m.with("*", dead)
		settle()
		var lost softKey
		m.set(func() { lost = m.keys[other.ID]; delete(m.keys, other.ID) })
		m.with("*", nil)
		settle()
		b.expect("recovering active active")
		b.expectGiven(10, 0, 5, 5)
		m.set(func() { m.keys[other.ID] = lost })
		settle()
		b.expect("active active active")
	})
}

func TestALockedTokenReturnsOnceActivated(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		m := b.members[0]
		m.set(func() { m.incarnation++; m.locked, m.probe = "not activated yet", hsm.Probe{} })
		m.with("sign", func(_ context.Context, _ func() error) error {
			return &hsm.Error{Class: hsm.ClassPIN, Code: hsm.CodeLocked, Op: "sign"}
		})
		b.given(9)
		settle()
		b.expect("failed active active")
		if s := b.group.Status().Groups[0].Members[0]; !strings.Contains(s.Cause, "not activated yet") {
			t.Errorf("cause %q", s.Cause)
		}
		m.set(func() { m.locked, m.probe = "", hsm.Probe{OK: true} })
		m.with("sign", nil)
		settle()
		b.expect("active active active")
	})
}

func TestATokenThatWasReplacedIsNotUsed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		m := b.members[0]
		m.set(func() { m.serial = "another"; m.incarnation++ })
		settle()
		b.expect("failed active active")
		if s := b.group.Status().Groups[0].Members[0]; !strings.Contains(s.Cause, "replace") {
			t.Errorf("cause %q", s.Cause)
		}
		b.expectGiven(10, 0, 5, 5)
	})
}

func TestWhatIsMeasured(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		time.Sleep(9 * time.Second)
		b.chain.enter(t, "standby", "c", hsmsync.Note{})
		b.members[0].with("*", dead)
		b.members[1].set(func() { b.members[1].probe = hsm.Probe{Cause: "CKR_DEVICE_ERROR"} })
		settle()
		for name, want := range map[string]float64{
			"member_state/a/failed": 1, "member_state/b/failed": 1, "member_state/c/standby": 1, "member_state/c/active": 0,
			"key_copies/issuing-g1": 3, "keys_below_min_copies": 0, "oldest_proof_seconds/c": 14, "log_position": 9, "waiting": 0,
		} {
			part := strings.Split(name, "/")
			if got := b.metric(part[0], part[1:]...); got < want || got > want+1.5 || want == 0 && got != 0 {
				t.Errorf("%s is %v, want %v", name, got, want)
			}
		}
		for _, name := range []string{"probe_failures_total/a/health", "probe_failures_total/b/probe", "recovery_attempts_total/a"} {
			part := strings.Split(name, "/")
			if b.metric(part[0], part[1:]...) == 0 {
				t.Errorf("%s is 0", name)
			}
		}
		b.members[0].set(func() { delete(b.members[0].keys, b.record.ID) })
		b.members[1].set(func() { delete(b.members[1].keys, b.record.ID); b.members[1].probe.OK = true })
		b.members[0].with("*", nil)
		settle()
		if n := b.metric("keys_below_min_copies"); n != 1 {
			t.Errorf("%v keys have too few copies", n)
		}
	})
}
