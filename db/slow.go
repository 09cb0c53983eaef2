package db

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// A node can answer probes and yet be of no use: its disk hangs, or it is overwhelmed, so that what it should apply piles up. Commits and causal
// reads on it then take far longer than on its peers. So every node is also asked the cheapest causal question now and then. A stall of the whole
// cluster, as at every change of its view, holds up all of them alike and condemns none.
const (
	pingEvery = 500 * time.Millisecond
	pingLimit = 5 * time.Second // of one question

	slowFloor  = 750 * time.Millisecond // what takes less is never slow: Galera's flow control and a busy machine make more than one might think
	slowFactor = 10                     // times as long as the fastest peer
	hungAfter  = 2 * time.Second        // a question outstanding for so long while peers answer: calls in flight are moved elsewhere

	shedLeast = 2 * time.Second // a node that was shed stays so for at least that long, and twice as long each further time
	shedMost  = time.Minute
	calm      = 5 * time.Minute // without being shed: the next time counts as the first again
	recovered = 3               // answers in a row, as fast as the peers', that bring it back
)

// pace is how long a node takes for the causal question. Guarded by the node's mu.
type pace struct {
	asked    time.Time     // the question outstanding; zero when there is none
	answered time.Time     // when the last answered question was asked
	took     time.Duration // of that one

	slow  string // why it gets no new work; "" when it does
	hung  bool   // and none at all is left to it
	until time.Time
	hold  time.Duration // of the last time it was shed
	shed  time.Time     // when
	good  int           // fast answers in a row since

	counted time.Time // the last of those
}

// pingLoop asks one node until ctx ends.
func (s *Store) pingLoop(ctx context.Context, n *node) {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !n.status().Healthy {
			continue // the probe says enough, and closes what hangs
		}
		began := time.Now()
		n.mu.Lock()
		n.pace.asked = began
		n.mu.Unlock()
		pctx, cancel := context.WithTimeout(ctx, pingLimit)
		err := ping(pctx, n.ping)
		cancel()
		n.mu.Lock()
		n.pace.asked = time.Time{}
		if took := time.Since(began); err == nil || took >= slowFloor { // refused at once says nothing about pace
			n.pace.answered, n.pace.took = began, took
		}
		n.mu.Unlock()
	}
}

// paceLoop draws the conclusions until ctx ends.
func (s *Store) paceLoop(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			s.judgePace(now)
		}
	}
}

// judgePace sheds the node that is far slower than its peers, and takes back one that is not any more. At most one node is shed at a
// time, and never the last one: load that follows from node to node would otherwise shed them all.
func (s *Store) judgePace(now time.Time) {
	type view struct {
		node *node
		pace pace
	}
	var all []view
	shed := 0
	for _, n := range s.nodes {
		n.mu.Lock()
		if n.health.Healthy {
			all = append(all, view{n, n.pace})
			if n.pace.slow != "" {
				shed++
			}
		} else {
			n.pace = pace{hold: n.pace.hold, shed: n.pace.shed} // another trouble took over
		}
		n.mu.Unlock()
	}
	for i, v := range all {
		peers := slices.Delete(slices.Clone(all), i, i+1)
		// The fastest peer's answer to a question asked no earlier than this node's.
		since, mine := v.pace.answered, v.pace.took
		if !v.pace.asked.IsZero() && now.Sub(v.pace.asked) > mine {
			since, mine = v.pace.asked, now.Sub(v.pace.asked)
		}
		peer := time.Duration(-1)
		for _, p := range peers {
			if p.pace.slow == "" && p.pace.answered.After(since) && (peer < 0 || p.pace.took < peer) {
				peer = p.pace.took
			}
		}
		late := peer >= 0 && mine >= slowFloor && mine >= slowFactor*peer
		switch {
		case v.pace.slow == "" && late && shed == 0 && len(all) > 1:
			shed++
			s.shed(v.node, now, mine, peer)
		case v.pace.slow != "" && !v.pace.hung && late && !v.pace.asked.IsZero() && mine >= hungAfter:
			s.hang(v.node)
		case v.pace.slow != "":
			s.unshed(v.node, now, late, v.pace.answered)
		}
	}
}

func (s *Store) shed(n *node, now time.Time, mine, peer time.Duration) {
	n.mu.Lock()
	p := &n.pace
	if p.hold == 0 || now.Sub(p.shed) > calm {
		p.hold = shedLeast
	} else {
		p.hold = min(2*p.hold, shedMost)
	}
	p.slow = fmt.Sprintf("slow: a causal read takes %v and more, %v on a peer", mine.Round(time.Millisecond), peer.Round(100*time.Microsecond))
	p.shed, p.until, p.good = now, now.Add(p.hold), 0
	n.health.Slow = p.slow
	why, hold := p.slow, p.hold
	n.mu.Unlock()
	s.metrics.shed.WithLabelValues(n.address).Inc()
	s.metrics.slow.WithLabelValues(n.address).Set(1)
	s.cfg.Log.Warn("database node is far slower than its peers and gets no new work", "node", n.address, "why", why, "at_least", hold.String())
}

// hang gives up what is under way on a node that was shed and still does not answer: it is replayed elsewhere.
func (s *Store) hang(n *node) {
	n.mu.Lock()
	n.pace.hung = true
	n.drop()
	n.mu.Unlock()
	s.metrics.demoted.WithLabelValues(n.address).Inc()
	s.cfg.Log.Warn("database node hangs, its connections are closed", "node", n.address)
}

// unshed counts fast answers and takes the node back when there were enough.
func (s *Store) unshed(n *node, now time.Time, late bool, answered time.Time) {
	n.mu.Lock()
	p := &n.pace
	switch {
	case late, !p.asked.IsZero() && now.Sub(p.asked) >= slowFloor:
		p.good = 0
	case answered.After(p.counted):
		p.counted = answered
		p.good++
	}
	back := p.good >= recovered && now.After(p.until)
	if back {
		p.slow, p.hung = "", false
		n.health.Slow = ""
	}
	n.mu.Unlock()
	if !back {
		return
	}
	s.metrics.slow.WithLabelValues(n.address).Set(0)
	s.cfg.Log.Info("database node keeps up again", "node", n.address)
	s.mu.Lock()
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
}

// ping asks the cheapest question that waits for what others have committed.
func ping(ctx context.Context, q Querier) error {
	var one int
	return q.QueryRowContext(ctx, "SELECT 1").Scan(&one)
}
