package db_test

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
)

// BenchmarkIssue is the database side of issuing: intents, outcomes with feed, read-back on another node. One operation is one
// certificate; a lane per batch in flight.
func BenchmarkIssue(b *testing.B) {
	for _, shape := range []struct{ batch, flight int }{{1, 1}, {1, 8}, {32, 2}, {64, 1}, {64, 2}, {64, 4}} {
		b.Run(fmt.Sprintf("batch=%d/flight=%d", shape.batch, shape.flight), func(b *testing.B) {
			c := cluster.Need(b)
			s := dbtest.Open(b, c.New(b))
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			var lanes []*db.Lane
			for w := range shape.flight {
				lanes = append(lanes, openLane(b, s, fmt.Sprintf("ca%d", w), incarnation(byte(w))))
			}
			b.ResetTimer()
			for w, lane := range lanes {
				wg.Go(func() {
					for n := 0; left.Add(-int64(shape.batch)) > -int64(shape.batch); n++ {
						var in []db.Intent
						var facts []db.Fact
						var reqs [][]byte
						for k := range shape.batch {
							in = append(in, intent("demo-g1", "ca", w, n, k))
						}
						for _, r := range insert(b, s, in...) {
							facts, reqs = append(facts, certificate(r, "ca")), append(reqs, r.Req)
						}
						res := appendAll(b, lane, facts...)
						if back, _, err := s.ReadBack(soon(b), res[0].Node, reqs); err != nil || back[0].Outcome == nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "certs/s")
		})
	}
}

// BenchmarkPartitions is what DDL on intent_tbs costs the whole cluster, since nobody commits while it runs: how long it takes, and the longest that
// a batch of intents took meanwhile on each of two nodes, beside the longest before it.
func BenchmarkPartitions(b *testing.B) {
	for _, rows := range []int{0, 50_000, 250_000} {
		b.Run(fmt.Sprintf("rows=%d", rows), func(b *testing.B) {
			c := cluster.Need(b)
			cfg := c.New(b)
			s := dbtest.Open(b, cfg)
			for n := 0; b.Loop(); n++ {
				day := time.Now().UTC().AddDate(0, 0, 20+n)
				name := "p" + day.Format("20060102")
				table := cfg.Name + ".intent_tbs"
				make := fmt.Sprintf("ALTER TABLE %s REORGANIZE PARTITION later INTO (PARTITION %s VALUES LESS THAN ('%s'), PARTITION later VALUES LESS THAN (MAXVALUE))",
					table, name, day.AddDate(0, 0, 1).Format(time.DateOnly))
				b.ReportMetric(float64(stall(b, cfg, "", func() { c.Exec(b, 0, make) }).Milliseconds()), "make-ms")
				for at := 0; at < rows; at += 500 {
					_, err := s.Write(soon(b), "fill", func(ctx context.Context, tx *sql.Tx) error {
						_, err := tx.ExecContext(ctx, `INSERT INTO intent_tbs WITH RECURSIVE n AS (SELECT ? AS i UNION ALL SELECT i + 1 FROM n WHERE i < ?)
							SELECT 'demo-g1', CONCAT(UNHEX(LPAD(HEX(i), 16, '0')), RANDOM_BYTES(12)), ?, RANDOM_BYTES(520) FROM n`, at, at+499, day.Format(time.DateOnly))
						return err
					})
					if err != nil {
						b.Fatal(err)
					}
				}
				drop := "ALTER TABLE " + table + " DROP PARTITION " + name
				b.ReportMetric(float64(stall(b, cfg, "drop", func() { c.Exec(b, 0, drop) }).Milliseconds()), "drop-ms")
			}
		})
	}
}

// stall runs ddl while intents are committed on two nodes, and returns how long it took; with a prefix it reports the longest commits before and meanwhile.
func stall(b *testing.B, cfg db.Config, prefix string, ddl func()) time.Duration {
	b.Helper()
	var mu sync.Mutex
	var took []time.Duration
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for w := range 2 {
		s := dbtest.Open(b, prefer(cfg, w))
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				began := time.Now()
				insert(b, s, withTBS(began, w, n), withTBS(began, w, n, "second"))
				mu.Lock()
				took = append(took, time.Since(began))
				mu.Unlock()
			}
		})
	}
	longest := func() (d time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		d = slices.Max(took)
		took = took[:0]
		return d
	}
	enough := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(took) >= 200
	}
	dbtest.Until(b, "intents are committed", enough)
	longest()
	dbtest.Until(b, "intents are committed", enough)
	before := longest()
	began := time.Now()
	ddl()
	d := time.Since(began)
	dbtest.Until(b, "intents are committed", enough)
	if prefix != "" {
		b.ReportMetric(float64(before.Milliseconds()), "longest-before-ms")
		b.ReportMetric(float64(longest().Milliseconds()), "longest-at-"+prefix+"-ms")
	}
	stop()
	wg.Wait()
	return d
}
