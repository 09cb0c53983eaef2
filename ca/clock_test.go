package ca_test

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/ca"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/journal"
)

func TestTheMiddleClockCounts(t *testing.T) {
	s, ms := time.Second, time.Millisecond
	readings := func(offsetsAndWithin ...time.Duration) (all []db.ClockReading) {
		for i := 0; i < len(offsetsAndWithin); i += 2 {
			all = append(all, db.ClockReading{Offset: offsetsAndWithin[i], Within: offsetsAndWithin[i+1]})
		}
		return all
	}
	for name, c := range map[string]struct {
		readings []db.ClockReading
		want     time.Duration
	}{
		"all agree":                         {readings(1*ms, ms, -1*ms, ms, 0, ms), 0},
		"one peer is wrong":                 {readings(3600*s, ms, 2*ms, ms, 1*ms, 0), 1 * ms},
		"two peers are wrong, both ways":    {readings(3600*s, ms, -3600*s, ms, 0, 0), 0},
		"we are ahead of all":               {readings(5*s, 0, 4*s, 0, 6*s, 0), 5 * s},
		"we are behind all":                 {readings(-5*s, 0, -4*s, 0, -6*s, 0), -5 * s},
		"a slow answer proves nothing":      {readings(2*s, 2*s, 2*s, 2*s, 3*s, 2*s), 0},
		"a slow answer proves a part":       {readings(5*s, 2*s, 5*s, 2*s, 5*s, 2*s), 3 * s},
		"one of two peers says it is wrong": {readings(10*s, 0, 0, 0), 0},
		"two peers, both ways":              {readings(10*s, 0, -10*s, 0), 0},
		"both of two peers":                 {readings(10*s, 0, 3*s, 0), 3 * s},
		"a single peer":                     {readings(-2*s, 0), -2 * s},
	} {
		if got := ca.MedianOffset(c.readings); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// A node whose clock is set signs nothing, says why, and goes on by itself once the clock is right. The database nodes are real.
func TestAClockThatIsOffStopsSigning(t *testing.T) {
	p := newPKI(t)
	var shift atomic.Int64
	registry := prometheus.NewRegistry()
	n := p.start(t, "ca1", func(c *ca.Config) func(*ca.Engine) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(shift.Load())) }
		c.Clocks, c.ClockEvery, c.Metrics = c.Store, 20*time.Millisecond, registry
		return nil
	})
	n.mustIssue(t, ask(t, "before"))
	for _, off := range []time.Duration{time.Hour, -time.Hour, 3 * time.Second, -3 * time.Second} {
		signed := p.keys.total()
		shift.Store(int64(off))
		// At once: nobody has compared the clocks yet.
		_, err := n.issue(t, ask(t, "while"+off.String()))
		if ca.NameOf(err) != ca.Halted || !strings.Contains(err.Error(), "clock") {
			t.Errorf("%s off: got %v, want %s", off, err, ca.Halted)
		}
		dbtest.Until(t, "the offset is measured", func() bool {
			got := counter(t, registry, "trivet_ca_clock_offset_seconds", "")
			return got > off.Seconds()-1 && got < off.Seconds()+1
		})
		if _, err := n.issue(t, ask(t, "while"+off.String())); ca.NameOf(err) != ca.Halted || !strings.Contains(err.Error(), "database nodes") {
			t.Errorf("%s off, measured: got %v, want %s", off, err, ca.Halted)
		}
		if err := n.engine.Health(t.Context())["issue:demo"]; err == nil || !strings.Contains(err.Error(), "clock") {
			t.Errorf("health: %v", err)
		}
		if got := p.keys.total() - signed; got != 0 {
			t.Errorf("%d signatures", got)
		}
		shift.Store(0)
		dbtest.Until(t, "signing goes on", func() bool { return n.engine.Health(t.Context())["issue:demo"] == nil })
		n.mustIssue(t, ask(t, "after"+off.String()))
	}
	shift.Store(int64(400 * time.Millisecond))
	n.mustIssue(t, ask(t, "a little off"))
	shift.Store(0)

	var told []string
	dbtest.Until(t, "every stop and start is in the journal", func() bool {
		told = nil
		if err := n.journal.Replay(func(e journal.Entry) error {
			var a journal.Audit
			if e.Kind == journal.KindAudit && e.Decode(&a) == nil && a.Object == "clock" {
				told = append(told, a.Event)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return strings.Count(strings.Join(told, " "), "clock-off") >= 4 && told[len(told)-1] == "clock-restored"
	})
	p.check(t)
}

// silent are peers that do not answer.
type silent struct{}

func (silent) Clocks(context.Context, func() time.Time) []db.ClockReading { return nil }

// Without a peer to compare with the last verdict stands, and a clock that is set is noticed all the same.
func TestAClockIsWatchedWhileNoPeerAnswers(t *testing.T) {
	p := newPKI(t)
	var shift atomic.Int64
	n := p.start(t, "ca1", func(c *ca.Config) func(*ca.Engine) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(shift.Load())) }
		c.Clocks, c.ClockEvery = silent{}, 10*time.Millisecond
		return nil
	})
	n.mustIssue(t, ask(t, "k1"))
	shift.Store(int64(-time.Hour))
	if _, err := n.issue(t, ask(t, "k2")); ca.NameOf(err) != ca.Halted {
		t.Errorf("got %v, want %s", err, ca.Halted)
	}
	shift.Store(0)
	n.mustIssue(t, ask(t, "k3"))
}

// A node that starts with a wrong clock admits nothing from the first moment on.
func TestAWrongClockAtStartAdmitsNothing(t *testing.T) {
	p := newPKI(t)
	n := p.start(t, "ca1", func(c *ca.Config) func(*ca.Engine) {
		c.Now = func() time.Time { return time.Now().Add(time.Minute) }
		c.Clocks, c.ClockEvery = c.Store, time.Hour
		return nil
	})
	if _, err := n.issue(t, ask(t, "k1")); ca.NameOf(err) != ca.Halted {
		t.Errorf("got %v, want %s", err, ca.Halted)
	}
}
