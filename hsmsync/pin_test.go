package hsmsync_test

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
)

// supervised starts an agent again whenever it ends, as its supervisor would, until the test is over.
func (w *works) supervised(names ...string) {
	w.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() {
		defer close(over)
		for ctx.Err() == nil {
			for _, n := range names {
				if w.at[n].Ended() {
					w.at[n].Start()
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
	}()
	w.t.Cleanup(func() { stop(); <-over })
}

// rotation rotates PINs as people approved, and returns with what it can be repeated.
func (w *works) rotation(members ...string) hsmsync.PINRotation {
	w.t.Helper()
	r := hsmsync.PINRotation{Members: members, Why: "yearly"}
	r.Grant = w.approve(wanted(w.t, w.c, func(c *hsmsync.Coordinator) error { return c.RotatePINs(w.soon(), r) }))
	return r
}

func (w *works) pin(name string) string {
	w.t.Helper()
	b, err := os.ReadFile(w.at[name].PIN)
	good(w.t, err)
	return string(b)
}

// pins are the findings about PINs.
func pins(r hsmsync.Report) (out []hsmsync.Finding) {
	for _, f := range r.Findings {
		if f.Kind == hsmsync.KindPIN {
			out = append(out, f)
		}
	}
	return out
}

// PINs are rotated one member after the other; one whose token does not take it stops the others, and the same approval goes on from there.
func TestPINsAreRotatedOneMemberAfterTheOther(t *testing.T) {
	w := newWorks(t, "hsmd-a", "hsmd-b", "hsmd-c")
	w.setup(hsmsync.Policy{}, "hsmd-a", "hsmd-b", "hsmd-c")
	w.key("demo-g1", hsm.P256)
	w.supervised("hsmd-a", "hsmd-b", "hsmd-c")
	before := map[string]string{}
	for n := range w.at {
		before[n] = w.pin(n)
	}
	names := []string{"hsmd-a", "hsmd-b", "hsmd-c"}
	r := w.rotation(names...)
	bare := r
	bare.Grant = nil
	bad(t, w.c.RotatePINs(w.soon(), bare), "needs the approval of 2 people")
	bare = r
	bare.Prepared = true
	bad(t, w.c.RotatePINs(w.soon(), bare), `says pin=random`)

	w.faults["hsmd-b"].Set("C_SetPIN", "fail 0xA2")
	bad(t, w.c.RotatePINs(w.soon(), r), "hsmd-b serves with its old PIN")
	for n, want := range map[string]bool{"hsmd-a": true, "hsmd-b": false, "hsmd-c": false} {
		if got := w.pin(n) != before[n]; got != want {
			t.Errorf("%s has a new PIN: %t", n, got)
		}
	}
	report, err := w.c.Verify(w.soon())
	good(t, err)
	found := pins(report)
	if len(found) != 2 || found[0].Member != "hsmd-b" || !found[0].Alarm || found[1].Member != "hsmd-c" || found[1].Alarm {
		t.Errorf("%+v", found)
	}
	w.config.Now = func() time.Time { return time.Now().Add(time.Hour) }
	report, err = w.coordinator().Reconcile(w.soon())
	good(t, err)
	if found := pins(report); len(found) != 2 || !found[1].Alarm {
		t.Errorf("an hour later: %+v", found)
	}
	w.config.Now = nil

	w.faults["hsmd-b"].Clear("C_SetPIN")
	done := w.pin("hsmd-a")
	w.faults["hsmd-c"].Set("C_SetPIN", "after fail 0x30") // done, and reported as failed
	good(t, w.c.RotatePINs(w.soon(), r))
	if w.pin("hsmd-a") != done || w.pin("hsmd-b") == before["hsmd-b"] || w.pin("hsmd-c") == before["hsmd-c"] {
		t.Error("repeated: hsmd-a was rotated again, or hsmd-b or hsmd-c was not")
	}
	w.faults["hsmd-c"].Clear("C_SetPIN")
	good(t, w.c.RotatePINs(w.soon(), r))
	w.verify(3, 1)
	if report, err = w.c.Reconcile(w.soon()); err != nil || len(pins(report)) > 0 {
		t.Errorf("%+v, %v", pins(report), err)
	}
	log, err := w.chain.Log(w.soon(), "ca", 1)
	good(t, err)
	for _, e := range log {
		for n := range w.at {
			if strings.Contains(string(e.Payload), strings.TrimSpace(w.pin(n))) {
				t.Error("a PIN is in the log")
			}
		}
	}
}

// A member whose absence leaves too few is left alone, unless people approve that too.
func TestAPINIsNotRotatedWhereTooFewAreLeft(t *testing.T) {
	w := newWorks(t, "hsmd-a", "hsmd-b", "hsmd-c")
	w.setup(hsmsync.Policy{}, "hsmd-a", "hsmd-b", "hsmd-c")
	w.key("demo-g1", hsm.P256)
	w.supervised("hsmd-a", "hsmd-b")
	r := w.rotation("hsmd-a")
	w.at["hsmd-c"].Kill()
	before := w.pin("hsmd-a")
	bad(t, w.c.RotatePINs(w.soon(), r), "one member that is well would be left, and the policy wants 2 copies")
	w.config.Force = true
	w.c = w.coordinator()
	bad(t, w.c.RotatePINs(w.soon(), r), "does not say force") // that is another act
	if w.pin("hsmd-a") != before {
		t.Error("it was rotated")
	}
	good(t, w.c.RotatePINs(w.soon(), w.rotation("hsmd-a")))
	if w.pin("hsmd-a") == before {
		t.Error("it was not rotated")
	}
	bad(t, w.c.RotatePINs(w.soon(), hsmsync.PINRotation{Members: []string{"hsmd-x"}}), "no member hsmd-x")

	// What an agent refuses is not missed afterwards.
	refused := hsmsync.PINRotation{Members: []string{"hsmd-a"}, Prepared: true}
	refused.Grant = w.approve(wanted(t, w.c, func(c *hsmsync.Coordinator) error { return c.RotatePINs(w.soon(), refused) }))
	bad(t, w.c.RotatePINs(w.soon(), refused), "no prepared PIN")
	report, err := w.c.Verify(w.soon())
	good(t, err)
	if found := pins(report); len(found) > 0 {
		t.Errorf("%+v", found)
	}
}

// What a token says of its PIN is found: somebody has tried wrong ones, or it is locked and the agent could not come back.
func TestAWarningOfTheTokensPINIsFound(t *testing.T) {
	w := newWorks(t, "hsmd-a", "hsmd-b")
	w.setup(hsmsync.Policy{}, "hsmd-a", "hsmd-b")
	if report, err := w.c.Reconcile(w.soon()); err != nil || len(pins(report)) > 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	w.faults["hsmd-a"].Set("pin-locked", "")
	for {
		report, err := w.c.Reconcile(w.soon())
		good(t, err)
		if i := slices.IndexFunc(report.Findings, func(f hsmsync.Finding) bool { return f.Kind == hsmsync.KindPIN }); i >= 0 {
			if f := report.Findings[i]; f.Member != "hsmd-a" || !f.Alarm || !strings.Contains(f.Detail, "is locked") {
				t.Errorf("%+v", f)
			}
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// bad fails unless err says so.
func bad(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v: want %q", err, want)
	}
}
