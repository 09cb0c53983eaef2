package db_test

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"trivet/db"
	"trivet/db/dbtest"
)

func TestMigrationsFromThreeNodesAtOnce(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.Empty(t)
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			if err := db.Migrate(soon(t), prefer(cfg, i)); err != nil {
				t.Errorf("node %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	s := dbtest.Open(t, cfg)
	_, err := s.Read(soon(t), "check", "", func(ctx context.Context, c *sql.Conn) error {
		var tables, applied int
		if err := c.QueryRowContext(ctx, "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name NOT LIKE 'goose%'").Scan(&tables); err != nil {
			return err
		}
		if err := c.QueryRowContext(ctx, "SELECT COUNT(*) FROM goose_db_version WHERE version_id = 1").Scan(&applied); err != nil {
			return err
		}
		if tables != len(db.Tables) || applied != 1 {
			t.Errorf("%d tables, migration applied %d times; want %d and once", tables, applied, len(db.Tables))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Three CA nodes on three database nodes send full batches that share one request: all adopt the same intent, all sign it, one
// certificate becomes the record's, and no neighbour in the batches is hindered.
func TestOneWinnerPerKeyWithinFullBatches(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	const rounds, batch = 12, 64
	var stores [3]*db.Store
	var lanes [3]*db.Lane
	for i := range 3 {
		stores[i] = dbtest.Open(t, prefer(cfg, i))
		lanes[i] = openLane(t, stores[i], fmt.Sprintf("ca%d", i+1), incarnation(byte(i+1)))
	}
	for round := range rounds {
		var owners [3]db.Intent
		var won [3]bool
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				node := fmt.Sprintf("ca%d", i+1)
				var in []db.Intent
				for k := range batch {
					if k == batch/2 {
						in = append(in, intent("demo-g1", node, "contested", round))
					} else {
						in = append(in, intent("demo-g1", node, node, round, k))
					}
				}
				rows := insert(t, stores[i], in...)
				var facts []db.Fact
				for k, r := range rows {
					if !bytes.Equal(r.Req, in[k].Req) {
						t.Errorf("round %d: row %d answers another request", round, k)
					}
					if k != batch/2 && !bytes.Equal(r.Serial, in[k].Serial) {
						t.Errorf("round %d: neighbour %d lost its key", round, k)
					}
					facts = append(facts, certificate(r, node))
				}
				owners[i] = rows[batch/2]
				res, err := lanes[i].Append(soon(t), facts)
				if err != nil {
					t.Error(err)
					return
				}
				for k, a := range res {
					switch {
					case k == batch/2 && a.Err == nil:
						won[i] = true
					case k == batch/2 && db.ClassOf(a.Err) == db.Duplicate && a.Seq == 0:
					case a.Err != nil || a.Seq == 0:
						t.Errorf("round %d: neighbour %d: %+v", round, k, a)
					}
				}
			})
		}
		wg.Wait()
		for i := 1; i < 3; i++ {
			if !bytes.Equal(owners[i].Serial, owners[0].Serial) || owners[i].Node != owners[0].Node || !bytes.Equal(owners[i].TBS, owners[0].TBS) {
				t.Errorf("round %d: nodes adopted different intents", round)
			}
		}
		winners := 0
		for i := range 3 {
			if won[i] {
				winners++
			}
		}
		if winners != 1 {
			t.Errorf("round %d: %d winners", round, winners)
		}
		// Whoever asks, wherever, gets the winner's bytes.
		var der []byte
		for i := range 3 {
			got, _, err := stores[i].ReadBack(soon(t), cfg.Nodes[(i+1)%3], [][]byte{owners[0].Req})
			if err != nil {
				t.Fatal(err)
			}
			if got[0].Outcome == nil {
				t.Fatalf("round %d: no outcome", round)
			}
			if der != nil && !bytes.Equal(der, got[0].Outcome.DER) {
				t.Errorf("round %d: two certificates for one request", round)
			}
			der = got[0].Outcome.DER
		}
	}
	if rows := checkLanes(t, stores[0]); len(rows) != rounds*(3*(batch-1)+1) {
		t.Errorf("%d feed rows, want %d", len(rows), rounds*(3*(batch-1)+1))
	}
}

func TestIntentWithoutRequestIsInsertedOnce(t *testing.T) {
	c := cluster.Need(t)
	s := dbtest.Open(t, c.New(t))
	i := intent("demo-g1", "ca1", "lost")
	i.Req = nil
	for range 2 {
		if rows := insert(t, s, i); !bytes.Equal(rows[0].Serial, i.Serial) || rows[0].Req != nil {
			t.Errorf("got %x, req %x", rows[0].Serial, rows[0].Req)
		}
	}
	// A serial that another request holds is not silently passed over.
	j := intent("demo-g1", "ca1", "other")
	j.Serial = i.Serial
	if _, _, err := s.InsertIntents(soon(t), []db.Intent{j}); err == nil {
		t.Error("a taken serial was accepted")
	}
}

// Transactions on three nodes that abort each other all the time go in whole or not at all: every intent has its TBSCertificate and its key's use, and
// there is no more of either.
func TestAbortedTransactionsLeaveNothing(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	const workers, rounds, batch = 4, 80, 8
	var stores [3]*db.Store
	for i := range stores {
		stores[i] = dbtest.Open(t, prefer(cfg, i))
	}
	openLane(t, stores[0], "ca1", incarnation(1)) // who writes says that it knows where TBSCertificates are
	var turn atomic.Int64
	var wg sync.WaitGroup
	for i, s := range stores {
		for w := range workers {
			wg.Go(func() {
				for n := range rounds {
					at := turn.Add(1) / (3 * workers)
					var in []db.Intent
					for k := range batch {
						name := fmt.Sprint("own ", i, w, n, k)
						if k%2 == 0 {
							in = append(in, keyed(name, "contested", at*batch+int64(k)))
						} else {
							in = append(in, keyed(name, name))
						}
					}
					insert(t, s, in...)
				}
			})
		}
	}
	wg.Wait()
	var intents, apart, uses int
	_, err := stores[0].Read(soon(t), "check", "", func(ctx context.Context, c *sql.Conn) error {
		return c.QueryRowContext(ctx, "SELECT (SELECT COUNT(*) FROM intent), (SELECT COUNT(*) FROM intent_tbs), (SELECT COUNT(*) FROM key_use)").Scan(&intents, &apart, &uses)
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := 3 * workers * rounds * batch / 2; intents < want || apart != intents || uses != intents {
		t.Errorf("%d intents (at least %d are wanted), %d TBSCertificates, %d uses of keys", intents, want, apart, uses)
	}
}
