package db

import (
	"context"
	"sync"
	"time"
)

// ClockReading is one database node's clock as compared with ours.
type ClockReading struct {
	Node   string
	Offset time.Duration // ours minus the node's
	Within time.Duration // the true offset is at most this far from Offset: half of the time that the answer took
}

// Clocks asks every database node that answers before ctx ends for its time, and compares it with now's. Nodes that do not answer are left out; whether
// they can be written does not matter.
func (s *Store) Clocks(ctx context.Context, now func() time.Time) []ClockReading {
	var mu sync.Mutex
	var out []ClockReading
	var wg sync.WaitGroup
	for _, n := range s.nodes {
		wg.Go(func() {
			var theirs time.Time
			wall, began := now(), time.Now()
			if n.probe.QueryRowContext(ctx, "SELECT UTC_TIMESTAMP(6)").Scan(&theirs) != nil {
				return
			}
			half := time.Since(began) / 2
			mu.Lock()
			defer mu.Unlock()
			out = append(out, ClockReading{Node: n.address, Offset: wall.Round(0).Add(half).Sub(theirs), Within: half})
		})
	}
	wg.Wait()
	return out
}
