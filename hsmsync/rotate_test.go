package hsmsync_test

import (
	"fmt"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
)

// oneDomain checks that members hold the group's domain key and no other.
func (d *desk) oneDomain(names ...string) {
	d.t.Helper()
	s := d.state()
	for _, n := range names {
		if m := d.at[n]; m.kek != s.Domain.Name || m.nextKEK != "" || s.Rotate.Name != "" {
			d.t.Fatalf("%s holds %q and %q, the group's is %q, next %q", n, m.kek, m.nextKEK, s.Domain.Name, s.Rotate.Name)
		}
	}
}

func TestTheDomainKeyIsRotated(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		d.must("x")
		old := d.state().Domain.Name
		good(t, d.c.Drain(ctx, "c", ""))
		d.at["c"].with("*", dead)
		good(t, d.c.RotateDomain(ctx))
		d.oneDomain("a", "b")
		if d.state().Domain.Name == old || d.at["c"].kek != old {
			t.Errorf("the domain key is %s", d.state().Domain.Name)
		}
		d.must("y")
		// The one that was away is caught up by the next reconciliation, and receives the key under the new domain key.
		d.at["c"].with("*", nil)
		r, err := d.c.Reconcile(ctx)
		if err != nil || !r.OK || kinds(r) != "domain c, missing c" {
			t.Errorf("%s %v", kinds(r), err)
		}
		d.oneDomain("a", "b", "c")
		good(t, d.c.Recover(ctx, "c", ""))
		good(t, d.c.RotateDomain(ctx))
		d.oneDomain("a", "b", "c")
		d.must("z")
	})
}

func TestRotatingGoesOnAfterAFailureAtAnyPoint(t *testing.T) {
	for _, op := range []string{"health", "transport", "domain", "export-domain", "import-domain", "export", "import", "rotate", "drop"} {
		for form, f := range forms {
			t.Run(op+" "+form, func(t *testing.T) {
				atDesk(t, func(t *testing.T, d *desk) {
					d.must("x")
					old := d.state().Domain.Name
					victim := d.at["b"]
					if op == "domain" || op == "export-domain" || op == "export" {
						victim = d.at["a"]
					}
					for n := 1; ; n++ {
						victim.with(op, once(n, f))
						err := d.c.RotateDomain(t.Context())
						if err == nil {
							break
						}
						victim.with(op, nil)
						d.must(fmt.Sprint("meanwhile-", n)) // keys are made all the same
						if n > 20 {
							t.Fatal(err)
						}
					}
					victim.with(op, nil)
					good(t, d.c.RotateDomain(t.Context()))
					if d.state().Domain.Name == old {
						t.Error("it is the old one")
					}
					d.oneDomain("a", "b", "c")
					if r, err := d.c.Reconcile(t.Context()); err != nil || !r.OK {
						t.Errorf("%s %v", kinds(r), err)
					}
				})
			})
		}
	}
	for _, event := range []string{"domain", "rotated"} {
		for _, written := range []bool{false, true} {
			t.Run(fmt.Sprintf("entry %s written %v", event, written), func(t *testing.T) {
				atDesk(t, func(t *testing.T, d *desk) {
					d.must("x")
					first := true
					hook := func(e hsmsync.Entry) error {
						if e.Event == event && first {
							first = false
							return hsm.Errorf(hsm.ClassDevice, "log", "connection lost")
						}
						return nil
					}
					if written {
						d.chain.after = hook
					} else {
						d.chain.before = hook
					}
					if err := d.c.RotateDomain(t.Context()); err != nil {
						good(t, d.c.RotateDomain(t.Context()))
					}
					d.oneDomain("a", "b", "c")
				})
			})
		}
	}
}

func TestRotatingWantsEveryMemberThatIsNotDrained(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		good(t, d.c.Standby(t.Context(), "c", ""))
		d.at["c"].with("*", dead)
		before := len(d.chain.events())
		failed(t, d.c.RotateDomain(t.Context()), "must be there, or drained", "asking c")
		if len(d.chain.events()) != before {
			t.Errorf("the log grew to %q", d.chain.events())
		}
	})
}

func TestADomainKeyThatIsNotTheSameEverywhereIsFoundOut(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		old := d.state().Domain.Name
		d.at["c"].with("import", failing(hsm.ClassRequest)) // what a token says to a blob of another domain
		failed(t, d.c.RotateDomain(t.Context()), "trying out domain key", "into c")
		if s := d.state(); s.Domain.Name != old || s.Rotate.Name == "" {
			t.Errorf("the domain key is %+v, next %+v", s.Domain, s.Rotate)
		}
		d.at["c"].with("import", nil)
		good(t, d.c.RotateDomain(t.Context()))
		d.oneDomain("a", "b", "c")
	})
}

func TestTwoCoordinatorsRotateOnce(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		for _, m := range d.members {
			for _, op := range []string{"health", "import-domain", "rotate", "domain"} {
				m.with(op, slow(2*time.Millisecond))
			}
		}
		other := d.coordinator("sync2")
		done := make(chan error)
		go func() { done <- other.RotateDomain(t.Context()) }()
		one, two := d.c.RotateDomain(t.Context()), <-done
		for range 3 {
			if one != nil || two != nil {
				one, two = d.c.RotateDomain(t.Context()), nil
			}
		}
		good(t, one)
		d.oneDomain("a", "b", "c")
		if r, err := d.c.Reconcile(t.Context()); err != nil || !r.OK {
			t.Errorf("%s %v", kinds(r), err)
		}
	})
}

func TestAMemberJoinsWhileTheDomainKeyIsRotated(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		keys := d.must("x", "y")
		r := d.newcomer("d")
		d.chain.before = func(e hsmsync.Entry) error {
			if e.Event != "rotated" {
				return nil
			}
			d.chain.before = nil
			return d.coordinator("sync2").Enroll(t.Context(), r)
		}
		if err := d.c.RotateDomain(t.Context()); err != nil {
			failed(t, err, "repeat the rotation")
			good(t, d.c.RotateDomain(t.Context()))
		}
		d.oneDomain("a", "b", "c", "d")
		d.same("d", keys...)
	})
}

func TestALostRotationIsFinished(t *testing.T) {
	for cut, name := range map[int]string{1: "before anyone has rotated", 2: "after the old key was dropped"} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				d.must("x")
				if cut == 1 {
					d.chain.after = func(e hsmsync.Entry) error {
						if e.Event == "rotated" {
							d.chain.entries, d.chain.after = d.chain.entries[:len(d.chain.entries)-1], nil
						}
						return nil
					}
					failed(t, d.c.RotateDomain(t.Context()), "lost the entry")
				} else {
					good(t, d.c.RotateDomain(t.Context()))
					d.chain.cut(1)
				}
				good(t, d.c.RotateDomain(t.Context()))
				d.oneDomain("a", "b", "c")
				d.must("y")
			})
		})
	}
}
