package ca_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/ca"
	"trivet/db"
	"trivet/db/dbtest"
)

// An operator gives up the node that a round waits for, and no other: a name that was mistyped, or a node that is there, is an error.
func TestOnlyANodeThatIsWaitedForIsGivenUp(t *testing.T) {
	registry := prometheus.NewRegistry()
	uncovered := func() float64 {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "trivet_ca_recovery_uncovered_nodes" {
				return f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		return -1
	}
	s := newSite(t, func(c *ca.RoundsConfig) {
		if c.Node == "ca2" {
			c.Metrics = registry
		}
	}, "ca1", "ca2")
	s.issueSome(t, 0, 4, "ca1", "ca2")
	s.nodes["ca1"].stop()
	m := s.nodes["ca2"]
	if _, err := ca.AcknowledgeAbsent(t.Context(), asCA{m.store}, "ca1", "operator", false); err == nil || !strings.Contains(err.Error(), "no recovery round") {
		t.Errorf("without a round: %v", err)
	}
	if err := m.store.BeginRound(t.Context(), db.Round{N: 1, Node: "ca2", Cause: "a test", Proved: true, Created: time.Now().Add(-time.Minute)}); err != nil {
		t.Fatal(err)
	}
	dbtest.Until(t, "it is waited for ca1 alone", func() bool { return slices.Equal(m.rounds.Status().Waiting, []string{"ca1"}) })
	report, err := m.store.Round(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if known, err := ca.Nodes(t.Context(), asCA{m.store}, report); err != nil || !slices.Equal(known, []string{"ca1", "ca2", "init"}) {
		t.Errorf("known are %v, %v", known, err)
	}
	if _, err := ca.AcknowledgeAbsent(t.Context(), asCA{m.store}, "cal", "operator", false); !errors.Is(err, ca.ErrUnknownNode) || !strings.Contains(err.Error(), "ca1, ca2, init") {
		t.Errorf("a name mistyped: %v", err)
	}
	if _, err := ca.AcknowledgeAbsent(t.Context(), asCA{m.store}, "ca2", "operator", false); err == nil || !strings.Contains(err.Error(), "done") {
		t.Errorf("a node that is there: %v", err)
	}
	dbtest.Until(t, "metrics tell of it", func() bool { return uncovered() == 1 })
	if m.rounds.Status().Err == nil {
		t.Fatal("the round went on")
	}
	if n, err := ca.AcknowledgeAbsent(t.Context(), asCA{m.store}, "ca9", "operator", true); err != nil || n != 1 {
		t.Errorf("a node that the record does not know, meant so: %d, %v", n, err)
	}
	if n, err := ca.AcknowledgeAbsent(t.Context(), asCA{m.store}, "ca1", "operator", false); err != nil || n != 1 {
		t.Fatalf("the node that is waited for: %d, %v", n, err)
	}
	dbtest.Until(t, "the round has ended", func() bool { st := m.rounds.Status(); return st.State.N == 1 && st.Err == nil && uncovered() == 0 })
}

// asCA shows the writers of a test, whose role is another, as those of CA nodes.
type asCA struct{ *db.Store }

func (a asCA) WriterNodes(ctx context.Context, _ string) ([]string, error) {
	return a.Store.WriterNodes(ctx, "test")
}
