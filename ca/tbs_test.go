package ca_test

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"slices"
	"testing"
	"time"

	"trivet/ca"
	"trivet/db"
	"trivet/identity"
)

// age makes an intent, or all if serial is nil, some days older, in a partition of its own.
func age(t *testing.T, cfg db.Config, days int, serial []byte) {
	t.Helper()
	day := time.Now().UTC().AddDate(0, 0, -days)
	part := func(d time.Time) string {
		return "PARTITION p" + d.Format("20060102") + " VALUES LESS THAN ('" + d.AddDate(0, 0, 1).Format(time.DateOnly) + "')"
	}
	execute(t, cfg, "ALTER TABLE intent_tbs REORGANIZE PARTITION p"+time.Now().UTC().Format("20060102")+" INTO ("+part(day)+", "+part(time.Now().UTC())+")")
	where := ""
	if serial != nil {
		where = fmt.Sprintf(" WHERE serial = x'%x'", serial)
	}
	execute(t, cfg, fmt.Sprintf("UPDATE intent_tbs SET day = day - INTERVAL %d DAY", days)+where)
	execute(t, cfg, fmt.Sprintf("UPDATE intent SET created = created - INTERVAL %d DAY", days)+where)
}

// storedTBS returns how many TBSCertificates the database holds, in rows of intents and apart.
func storedTBS(t *testing.T, s *db.Store) (inRows, apart int) {
	t.Helper()
	if _, err := s.Read(t.Context(), "test", "", func(ctx context.Context, c *sql.Conn) error {
		return c.QueryRowContext(ctx, "SELECT (SELECT COUNT(*) FROM intent WHERE tbs <> ''), (SELECT COUNT(*) FROM intent_tbs)").Scan(&inRows, &apart)
	}); err != nil {
		t.Fatal(err)
	}
	return inRows, apart
}

// An intent that its node left days ago is finished by another, from a partition that would have gone long since; then the partition goes, and
// nothing misses it: the same bytes for a repeat, revocation, and the block of its key.
func TestAnIntentOfAnOldPartitionIsFinishedAndThenNotMissed(t *testing.T) {
	for _, how := range []string{"repeat", "sweep"} {
		t.Run(how, func(t *testing.T) {
			p := newPKI(t)
			g := newGate(steps[2])
			defer g.open()
			a, b := p.start(t, "ca1", g.interpose), p.start(t, "ca2", later)
			r := ask(t, "k1")
			go a.engine.Issue(context.Background(), r)
			<-g.reached
			open, err := b.store.OpenIntents(t.Context(), 0, 10)
			if err != nil || len(open) != 1 {
				t.Fatalf("%d open, %v", len(open), err)
			}
			age(t, p.db, 3, nil)

			state, err := b.store.KeepTBS(t.Context(), db.TBSKeeping{Node: "ca2", Keep: 24 * time.Hour})
			if err != nil || state.Partitions[0].Open != fmt.Sprintf("demo-g1:%x", open[0].Serial) {
				t.Fatalf("an open intent does not keep its partition: %+v, %v", state, err)
			}
			if how == "sweep" {
				if err := b.engine.Sweep(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			issued := b.mustIssue(t, r)
			if !issued.Replayed || !bytes.Equal(issued.Serial, open[0].Serial) {
				t.Errorf("another certificate was made: %s", issued.ID())
			}
			p.check(t)

			if state, err = b.store.KeepTBS(t.Context(), db.TBSKeeping{Node: "ca2", Keep: 24 * time.Hour}); err != nil || state.Dropped != 1 {
				t.Fatalf("%+v, %v", state, err)
			}
			if inRows, apart := storedTBS(t, b.store); inRows+apart != 0 {
				t.Errorf("%d TBSCertificates are still stored in rows, %d apart", inRows, apart)
			}
			c := p.start(t, "ca3", nil) // which never saw the request
			for _, n := range []*node{b, c} {
				if again := n.mustIssue(t, r); !bytes.Equal(again.DER, issued.DER) {
					t.Error("a repeat gets another certificate")
				}
			}
		})
	}
}

func TestRevokingAndBlockingNeedNoStoredTBSCertificate(t *testing.T) {
	n, _, cfg := established(t, nil, nil)
	alice := person(identity.RoleRequester, "alice")
	issued := issue(t, n, alice, "k")
	age(t, cfg, 3, nil)
	if state, err := n.Store.KeepTBS(t.Context(), db.TBSKeeping{Node: "ca1", Keep: 24 * time.Hour}); err != nil || state.Dropped != 1 {
		t.Fatalf("%+v, %v", state, err)
	}
	if inRows, apart := storedTBS(t, n.Store); inRows+apart != 0 {
		t.Fatalf("%d TBSCertificates are still stored in rows, %d apart", inRows, apart)
	}
	if _, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: ca.ReasonKeyCompromise, Actor: alice}); err != nil {
		t.Fatal(err)
	}
	if got := events(t, n, issued); !slices.Equal(got, []string{"revoke keyCompromise"}) {
		t.Errorf("events %v", got)
	}
	if list, err := blocker(t, n).List(soon(t), nil, 10); err != nil || len(list) != 1 {
		t.Errorf("%d keys are blocked, %v", len(list), err)
	}
}
