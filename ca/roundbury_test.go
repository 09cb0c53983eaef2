package ca_test

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"trivet/ca"
	"trivet/db/dbtest"
)

// waits is a log that notices when a node puts off what an earlier run left.
type waits struct {
	slog.Handler
	seen atomic.Bool
}

func (w *waits) Enabled(context.Context, slog.Level) bool { return true }

func (w *waits) Handle(_ context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "settling what an earlier run left") {
		w.seen.Store(true)
	}
	return nil
}

// A node's journal has an intent that another node finished, and the database lost both. While the round waits for that node the intent is not buried: it
// would keep its request key from the certificate that is to come back, and a repeat would get another one.
func TestNothingIsBuriedDuringARound(t *testing.T) {
	s := newSite(t, func(c *ca.RoundsConfig) { c.Held = nil }, "ca1", "ca2") // ca1 has no copy of what ca2 knows
	issued := s.issueSome(t, 0, 4, "ca1", "ca2")
	s.nodes["ca1"].stop()
	g := newGate(steps[2])
	defer g.open()
	a := s.up(t, "ca1", g.interpose)
	dbtest.Until(t, "ca1 runs", func() bool { return a.engine.Running() && a.rounds.Status().Err == nil })
	r := s.request(t, "left open")
	go a.engine.Issue(context.Background(), r)
	<-g.reached
	issued["left open"] = s.nodes["ca2"].persist(t, r)
	g.open()
	a.stop()
	s.nodes["ca2"].stop()
	s.lose(t, 0, true)

	log := &waits{Handler: slog.DiscardHandler}
	m := s.up(t, "ca1", func(c *ca.Config) func(*ca.Engine) {
		c.Log = slog.New(log)
		return nil
	})
	dbtest.Until(t, "ca1 puts off what it has left open", func() bool { return log.seen.Load() || m.engine.Running() })
	s.up(t, "ca2", nil)
	s.await(t, "ca1")
	s.await(t, "ca2")
	s.same(t, issued, "ca1", "ca2")
	s.intact(t)
}
