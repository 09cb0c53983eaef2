package db_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
)

// underFault has writers issue batches without pause, each on its own lane, while a fault happens to the preferred database node.
// Phases: run until some batches are acknowledged; fault; run until the same number again is; stop.
func underFault(t *testing.T, fault func(), repair func()) {
	c := cluster.Need(t)
	s := dbtest.Open(t, c.New(t))
	const writers, batch = 3, 16
	type ack struct {
		req, der []byte
	}
	var mu sync.Mutex
	var acked []ack
	var worst time.Duration
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for w := range writers {
		lane := openLane(t, s, fmt.Sprintf("ca%d", w+1), incarnation(byte(w+1)))
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				began := time.Now()
				var in []db.Intent
				for k := range batch {
					in = append(in, intent("demo-g1", "ca", w, n, k))
				}
				rows, _, err := s.InsertIntents(soon(t), in)
				if err != nil {
					t.Error(err)
					return
				}
				var facts []db.Fact
				var reqs [][]byte
				for _, r := range rows {
					facts = append(facts, certificate(r, "ca"))
					reqs = append(reqs, r.Req)
				}
				res, err := lane.Append(soon(t), facts)
				if err != nil {
					t.Error(err)
					return
				}
				for _, r := range res {
					if r.Err != nil {
						t.Error(r.Err)
					}
				}
				back, _, err := s.ReadBack(soon(t), res[0].Node, reqs)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for k, b := range back {
					if b.Outcome == nil || !bytes.Equal(b.Outcome.DER, facts[k].Outcome.DER) {
						t.Errorf("writer %d batch %d: %d not read back", w, n, k)
						continue
					}
					acked = append(acked, ack{b.Intent.Req, b.Outcome.DER})
				}
				worst = max(worst, time.Since(began))
				mu.Unlock()
			}
		})
	}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(acked)
	}
	more := func(n int) {
		from := count()
		dbtest.Until(t, "more batches are acknowledged", func() bool { return count() >= from+n || t.Failed() })
	}
	more(20 * batch)
	fault()
	more(60 * batch)
	stop()
	wg.Wait()
	t.Logf("%d acknowledged, slowest batch %v", len(acked), worst)
	repair()

	// Nothing acknowledged is lost, on any node; nothing is there twice.
	for i := range c.Nodes {
		for from := 0; from < len(acked); from += 1000 {
			part := acked[from:min(from+1000, len(acked))]
			var reqs [][]byte
			for _, a := range part {
				reqs = append(reqs, a.req)
			}
			back, _, err := s.ReadBack(soon(t), c.Nodes[i].SQL(), reqs)
			if err != nil {
				t.Fatal(err)
			}
			for k, b := range back {
				if b.Outcome == nil || !bytes.Equal(b.Outcome.DER, part[k].der) {
					t.Fatalf("acknowledged certificate %x is lost or changed", part[k].req)
				}
			}
		}
	}
	if rows := checkLanes(t, s); len(rows) < len(acked) {
		t.Errorf("%d feed rows for %d acknowledged certificates", len(rows), len(acked))
	}
}

func TestKillOfThePreferredNode(t *testing.T) {
	c := cluster.Need(t)
	underFault(t, func() { c.Kill(0) }, func() { c.Restart(t, 0); c.Whole(t) })
	if transfers(t, c.Log(0)) {
		t.Error("the killed node took a full state transfer instead of an incremental one")
	}
}

func TestFreezeOfThePreferredNode(t *testing.T) {
	c := cluster.Need(t)
	underFault(t, func() { c.Freeze(0) }, func() { c.Thaw(0); c.Whole(t) })
}
