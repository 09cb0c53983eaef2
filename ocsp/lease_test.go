package ocsp_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"trivet/ocsp"
)

var errCut = errors.New("cut off by the test")

// cutOff takes the record away and waits until a reading has failed.
func (n *node) cutOff(t *testing.T) {
	t.Helper()
	n.record.cut(errCut)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := n.Poll(ctx); !errors.Is(err, errCut) {
		t.Fatalf("reading from a record that is cut off: %v", err)
	}
}

func TestWithoutLeaseStrictSaysTryLaterAndRevokedStays(t *testing.T) {
	n, a := populated(t)
	n.cutOff(t)
	expect(t, n, a, goodSerial, "good")
	n.clock.advance(n.LeaseRemaining() - 1)
	expect(t, n, a, goodSerial, "good")
	n.clock.advance(1)
	expect(t, n, a, goodSerial, "try later")
	expect(t, n, a, revokedSerial, "revoked")
	expect(t, n, a, absentSerial, "try later")
	if r := n.Report(); r.Capabilities["ocsp:demo-g1"].OK || r.State != "degraded" {
		t.Errorf("health without lease: %+v", r)
	}
	n.record.cut(nil)
	n.polled(t)
	expect(t, n, a, goodSerial, "good")
}

func TestWithoutLeaseServeSaysWhatItKnewLast(t *testing.T) {
	n, a := populated(t, policy(ocsp.Serve))
	n.cutOff(t)
	n.clock.advance(time.Hour)
	expect(t, n, a, goodSerial, "good")
	expect(t, n, a, revokedSerial, "revoked")
	expect(t, n, a, absentSerial, "try later")
}

// TestLeaseRunsFromBeforeTheQuestion: what a reading vouches for is counted from before it was asked for, however late it ends.
func TestLeaseRunsFromBeforeTheQuestion(t *testing.T) {
	n, a := populated(t)
	gate := make(chan struct{})
	n.record.locked(func() { n.record.hold = gate })
	eventually(t, "a reading waits", func() bool {
		waiting := 0
		n.record.locked(func() { waiting = n.record.waiting })
		return waiting > 0
	})
	asked := n.clock.ns.Load()
	n.clock.advance(ocsp.LeaseDuration - time.Second)
	expect(t, n, a, goodSerial, "good")
	last := make(chan struct{}) // the next reading gets no further
	n.record.locked(func() { n.record.hold = last })
	close(gate)
	eventually(t, "the next reading waits", func() bool {
		waiting := 0
		n.record.locked(func() { waiting = n.record.waiting })
		return waiting > 1
	})
	if until := n.clock.ns.Load() + int64(n.LeaseRemaining()); until != asked+int64(ocsp.LeaseDuration) {
		t.Errorf("lease ends %v after its question, want %v", time.Duration(until-asked), ocsp.LeaseDuration)
	}
	n.clock.advance(time.Second)
	expect(t, n, a, goodSerial, "try later")
	n.record.locked(func() { n.record.hold = nil })
	close(last)
	n.polled(t)
	expect(t, n, a, goodSerial, "good")
}

func TestBeforeJoiningNothingIsGoodOrDenied(t *testing.T) {
	a := newAuthority(t, "demo")
	m := newMemory("db1")
	m.generation(a, nil)
	m.issue("demo-g1", goodSerial)
	m.cut(errCut)
	for _, p := range []ocsp.Policy{ocsp.Strict, ocsp.Serve} {
		n := start(t, m, []*authority{a}, policy(p))
		expect(t, n, a, goodSerial, "try later")
		expect(t, n, a, absentSerial, "try later")
		if n.Report().Ready() {
			t.Errorf("%s: ready before it has joined", p)
		}
		n.stop()
	}
}

func TestMemberThatWasCountedOutRegistersAnew(t *testing.T) {
	n, a := populated(t)
	n.record.locked(func() { n.record.member("out", n.record.incarnation) })
	n.polled(t)
	n.record.locked(func() {
		tip := n.record.members[len(n.record.members)-1]
		if tip.N != 3 || tip.Event != "in" {
			t.Errorf("newest membership row: %+v", tip)
		}
	})
	expect(t, n, a, goodSerial, "good")
}

func TestProcessWhoseNameWasTakenFallsSilent(t *testing.T) {
	for _, p := range []ocsp.Policy{ocsp.Strict, ocsp.Serve} {
		n, a := populated(t, policy(p))
		n.record.locked(func() { n.record.member("in", [16]byte{0xee}) })
		eventually(t, "a reading finds it", func() bool { return !n.Report().Capabilities["ocsp:demo-g1"].OK })
		expect(t, n, a, goodSerial, "try later")
		expect(t, n, a, revokedSerial, "revoked")
		n.stop()
		n.record.locked(func() {
			if tip := n.record.members[len(n.record.members)-1]; tip.Event != "in" {
				t.Errorf("%s: leaving ended the other process's membership", p)
			}
		})
	}
}
