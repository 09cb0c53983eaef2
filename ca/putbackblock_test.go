package ca_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"trivet/ca"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/identity"
)

// A key that an operator blocked and the database lost is blocked again: by the node that did it, or by the one that holds its copies.
func TestAnOperatorsBlockComesBack(t *testing.T) {
	for _, away := range []bool{false, true} {
		t.Run(fmt.Sprintf("its node away %v", away), func(t *testing.T) {
			s := newSite(t, requireCopies, "ca1", "ca2") // or a copy does not speak for the node that is away
			m, other := s.nodes["ca1"], s.nodes["ca2"]
			b, err := ca.NewBlocker(ca.BlockerConfig{
				Record: m.store, Journal: m.journal, Revoker: &ca.Revoker{}, Authorities: m.engine.Authorities, Rounds: m.rounds, Log: slog.New(slog.DiscardHandler),
			})
			if err != nil {
				t.Fatal(err)
			}
			spki := bytes.Repeat([]byte{0xab}, 32)
			actor := identity.Principal{Cluster: "test", Role: identity.RoleCAOperator, Name: "olga"}
			before, err := b.Block(t.Context(), ca.BlockRequest{SPKI: spki, Reason: ca.BlockWeakKey, Comment: "found on a stick", Actor: actor})
			if err != nil {
				t.Fatal(err)
			}
			if away {
				m.stop()
			}
			for _, table := range []string{"blocked_key", "key_use"} {
				cluster.Exec(t, 0, strings.ReplaceAll("DELETE FROM {db}."+table, "{db}", s.db.Name))
			}
			if err := other.store.BeginRound(t.Context(), db.Round{N: 1, Node: "ca2", Cause: "a test"}); err != nil {
				t.Fatal(err)
			}
			dbtest.Until(t, "the round has ended", func() bool { st := other.rounds.Status(); return st.State.N == 1 && st.Err == nil })
			after, err := other.store.Blocked(t.Context(), "", spki)
			if err != nil || len(after) != 1 {
				t.Fatalf("the key's blocks are %+v, %v", after, err)
			}
			if a := after[0]; a.Reason != before.Reason || a.Comment != before.Comment || a.Actor != before.Actor || !a.Created.Equal(before.Created) {
				t.Errorf("it is %+v and was %+v", a, before.BlockedKey)
			}
		})
	}
}
