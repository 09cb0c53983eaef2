package db_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

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
