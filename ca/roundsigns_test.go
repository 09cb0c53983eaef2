package ca_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"trivet/ca"
	"trivet/db"
	"trivet/db/dbtest"
)

// suspect is a database that gives a sign when told to, and fails to begin a round as often as told to.
type suspect struct {
	*watched
	signs atomic.Uint64
	fails atomic.Int32

	before func()                 // called before a round is begun; nil: nothing
	after  atomic.Pointer[func()] // called whenever a round has been seen; nil: nothing
}

func (s *suspect) Regress() (uint64, string) {
	n, cause := s.Store.Regress()
	if more := s.signs.Load(); more > 0 {
		return n + more, "a test"
	}
	return n, cause
}

func (s *suspect) BeginRound(ctx context.Context, r db.Round) error {
	if s.fails.Add(-1) >= 0 {
		return &db.Error{Class: db.NotReady, Op: "begin round", Err: errors.New("a test")}
	}
	if s.before != nil {
		s.before()
	}
	return s.Store.BeginRound(ctx, r)
}

func (s *suspect) RoundState(ctx context.Context) (db.RoundState, error) {
	state, err := s.watched.RoundState(ctx)
	if after := s.after.Load(); err == nil && state.N > 0 && after != nil {
		(*after)()
	}
	return state, err
}

func newSuspect(t *testing.T) (*site, *suspect) {
	t.Helper()
	d := &suspect{watched: &watched{thaw: make(chan struct{})}}
	t.Cleanup(d.open)
	s := newSite(t, func(c *ca.RoundsConfig) {
		if d.Store == nil {
			d.Store = c.Store.(*db.Store)
			c.Store = d
		}
	}, "ca1")
	return s, d
}

// Between a sign that the database went back and the round that it begins nothing is released: a request whose certificate was lost would get
// another one.
func TestNothingIsReleasedOnceThereIsASign(t *testing.T) {
	s, d := newSuspect(t)
	s.issueSome(t, 0, 1, "ca1")
	d.frozen.Store(true) // no look at the database ends
	d.signs.Store(1)
	issued, err := s.nodes["ca1"].issue(t, s.request(t, "meanwhile"))
	if err == nil || !strings.Contains(err.Error(), "may have lost commits") {
		t.Errorf("got %v, %v; want a refusal", issued, err)
	}
	d.frozen.Store(false)
	d.open()
	dbtest.Until(t, "a round has ended", func() bool { st := s.nodes["ca1"].rounds.Status(); return st.State.N > 0 && st.Err == nil })
	s.nodes["ca1"].mustIssue(t, s.request(t, "meanwhile"))
	s.intact(t)
}

// Nor is it while the round begins: a node that has begun one is still in the round before for a moment.
func TestNothingReadBeforeARoundIsReleasedWhileItBegins(t *testing.T) {
	s, d := newSuspect(t)
	m := s.nodes["ca1"]
	var asked atomic.Int32
	d.before = func() {
		release, err := m.rounds.Reading(context.Background())
		if err != nil {
			t.Error(err)
		}
		ask := func() {
			asked.Add(1)
			if release() == nil {
				t.Error("what was read before the round may be released")
			}
		}
		d.after.Store(&ask)
	}
	d.signs.Store(1)
	dbtest.Until(t, "a round has ended", func() bool { st := m.rounds.Status(); return st.State.N > 0 && st.Err == nil })
	if asked.Load() == 0 {
		t.Error("nobody asked while the round began")
	}
	d.after.Store(nil)
}

// A sign is not forgotten because the round could not be begun at once: a database that comes back fails at first.
func TestASignOutlivesARoundThatCouldNotBegin(t *testing.T) {
	s, d := newSuspect(t)
	d.fails.Store(3)
	d.signs.Store(1)
	dbtest.Until(t, "a round has ended", func() bool { st := s.nodes["ca1"].rounds.Status(); return st.State.N > 0 && st.Err == nil })
	s.issueSome(t, 0, 2, "ca1")
	if st := s.nodes["ca1"].rounds.Status(); st.State.N != 1 {
		t.Errorf("one sign began %d rounds", st.State.N)
	}
}

// The database goes back to a moment in the round: what the node wrote of its part is gone, and nobody else can write it.
func TestANodeWhoseOwnPartWasLostDoesItAgain(t *testing.T) {
	s, _ := newSuspect(t)
	issued := s.issueSome(t, 0, 2, "ca1")
	m := s.nodes["ca1"]
	if err := m.store.BeginRound(t.Context(), db.Round{N: 1, Node: "ca1", Cause: "a test"}); err != nil {
		t.Fatal(err)
	}
	ended := func() bool { st := m.rounds.Status(); return st.State.N == 1 && st.Err == nil }
	dbtest.Until(t, "the round has ended", ended)
	for _, table := range []string{"round_end", "recon"} {
		cluster.Exec(t, 0, "DELETE FROM "+s.db.Name+"."+table)
	}
	dbtest.Until(t, "the round has ended again", func() bool {
		r, err := m.store.Round(t.Context(), 1)
		return err == nil && r.End != nil && ended()
	})
	s.same(t, issued, "ca1")
}
