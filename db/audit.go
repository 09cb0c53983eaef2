package db

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// A database node may claim to be synced and yet hold another past: started from an old data directory whose grastate.dat was touched up,
// founded apart from the others by mistake. Galera does not notice: it goes by numbers, not by contents. The change feed
// shows it, because lanes have no holes and each row's hash covers the one before. So nodes are compared with one another, when they come
// into use and again and again, by causal reads: what one node shows, every other must show to a question asked later.

const (
	auditEvery    = 5 * time.Second
	auditDeadline = 3 * time.Second
	auditLanes    = 64     // the lanes of the newest writers
	auditWindow   = 20_000 // rows of each that a node must show when it comes into use; later ones are all compared, once
)

// stretch is rows of a lane: those after from, up to to.
type stretch struct {
	lane     string
	from, to uint64
}

// finding is why a node is not what the others are.
type finding struct {
	stretch
	cause string
}

// audit is what a Store remembers of its comparisons.
type audit struct {
	one sync.Mutex // one at a time

	mu   sync.Mutex
	seen map[string]uint64 // by lane: up to where the nodes in use were found equal
	off  bool              // the account may not read the feed, or there is none yet
}

const todo = "take it out of use, move its data directory away and start it: it then fetches everything anew (docs/runbooks/database-node-diverged.md)"

// Accuse says that node showed a lane that does not continue after seq as it must. The node is compared with the others, and
// taken out of use if they show another lane. It returns at once.
func (s *Store) Accuse(address, lane string, seq uint64) {
	for _, n := range s.nodes {
		if n.address != address {
			continue
		}
		n.mu.Lock()
		if len(n.accused) < 16 { // one is enough
			n.accused = append(n.accused, stretch{lane: lane, from: seq - min(seq, 1), to: seq + 1})
		}
		n.mu.Unlock()
		n.askProbe()
	}
}

// admit returns why a node whose probe was well may not be used all the same, "" if it may. It is called by the node's prober alone.
func (s *Store) admit(ctx context.Context, n *node, h NodeHealth) (cause string, diverged bool) {
	if cause := s.odd(n, h); cause != "" {
		return cause + ": " + todo, true
	}
	n.mu.Lock()
	inUse, accused, found, due := n.health.Healthy, slices.Clone(n.accused), n.found, time.Since(n.compared) >= auditEvery
	n.mu.Unlock()
	switch {
	case inUse && len(accused) == 0:
		return "", false
	case found != nil && len(accused) == 0 && !due:
		return found.cause + ": " + todo, true
	}
	others := s.inUse(n)
	if len(others) == 0 {
		if found != nil {
			return found.cause + ": " + todo, true
		}
		return "", false // nobody to compare it with: better this one than none
	}
	s.audit.one.Lock()
	defer s.audit.one.Unlock()
	ctx, cancel := context.WithTimeout(ctx, auditDeadline)
	defer cancel()
	extra := accused
	if found != nil {
		extra = append(extra, found.stretch)
	}
	findings, _, err := s.compare(ctx, append(others, n), extra, func(_ string, tip uint64) uint64 { return tip - min(tip, auditWindow) })
	if s.unreadable(err) {
		return "", false
	}
	switch {
	case err != nil && found != nil:
		return found.cause + ": " + todo, true
	case err != nil && inUse:
		return "", false // it stays accused
	case err != nil:
		return "not compared with the other nodes yet: " + err.Error(), false
	}
	s.judge(findings, n)
	n.mu.Lock()
	n.compared, n.accused = time.Now(), nil
	if n.found = findings[n]; n.found != nil {
		cause, diverged = n.found.cause+": "+todo, true
	}
	n.mu.Unlock()
	return cause, diverged
}

// judge takes nodes out of use that a comparison made for another one condemned.
func (s *Store) judge(findings map[*node]*finding, except *node) {
	for n, f := range findings {
		if n == except {
			continue
		}
		n.mu.Lock()
		n.found, n.compared = f, time.Now()
		h := n.health
		n.mu.Unlock()
		h.Cause, h.Diverged = f.cause+": "+todo, true
		s.record(n, h, time.Now())
	}
}

// inUse returns the healthy nodes but one.
func (s *Store) inUse(but *node) []*node {
	var out []*node
	for _, n := range s.nodes {
		if n != but && n.status().Healthy {
			out = append(out, n)
		}
	}
	return out
}

// odd returns why a node belongs to another history than the others that answer, "" if it does not: their histories are the state UUIDs. Where
// they differ the most nodes are right, then the larger component, then those in use.
func (s *Store) odd(n *node, h NodeHealth) string {
	type side struct{ nodes, size, used int }
	sides := map[string]*side{}
	for _, m := range s.nodes {
		mh := h
		if m != n {
			m.mu.Lock()
			mh = m.answered
			used := m.health.Healthy
			m.mu.Unlock()
			if mh.History == "" {
				continue
			}
			if used {
				mh.Healthy = true
			}
		}
		if sides[mh.History] == nil {
			sides[mh.History] = &side{}
		}
		d := sides[mh.History]
		d.nodes++
		d.size = max(d.size, mh.Size)
		if mh.Healthy {
			d.used++
		}
	}
	mine := sides[h.History]
	for uuid, d := range sides {
		if uuid == h.History || h.History == "" {
			continue
		}
		if d.nodes > mine.nodes || d.nodes == mine.nodes && (d.size > mine.size || d.size == mine.size && d.used > mine.used) {
			return fmt.Sprintf("its history (state UUID %s) is not that of the other nodes (%s)", h.History, uuid)
		}
	}
	return ""
}

// auditAll compares the nodes in use now and then, until ctx ends.
func (s *Store) auditAll(ctx context.Context) {
	tick := time.NewTicker(auditEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.auditOnce(ctx)
	}
}

func (s *Store) auditOnce(ctx context.Context) {
	nodes := s.inUse(nil)
	if len(nodes) < 2 {
		return
	}
	s.audit.mu.Lock()
	seen := maps.Clone(s.audit.seen)
	s.audit.mu.Unlock()
	s.audit.one.Lock()
	defer s.audit.one.Unlock()
	ctx, cancel := context.WithTimeout(ctx, auditDeadline)
	defer cancel()
	findings, tips, err := s.compare(ctx, nodes, nil, func(lane string, tip uint64) uint64 {
		// A tip below what was seen: the whole database went back, which is not for this comparison to judge.
		return min(tip, max(seen[lane], tip-min(tip, auditWindow)))
	})
	if err != nil || s.unreadable(err) {
		return // the probes tell about nodes that do not answer
	}
	s.judge(findings, nil)
	s.audit.mu.Lock()
	defer s.audit.mu.Unlock()
	s.audit.seen = tips
}

// unreadable tells, also by the error given, that comparing is not possible for this account or schema.
func (s *Store) unreadable(err error) bool {
	s.audit.mu.Lock()
	defer s.audit.mu.Unlock()
	switch number(err) {
	case 1142, 1143, 1044, 1146, 1049: // no right to it, no such table or database
		s.audit.off = true
	}
	return s.audit.off
}

// compare reads what the nodes hold of the newest lanes, from where from says for each, and of the stretches in extra, and returns what is
// wrong with those that differ from the rest, and the tips. The most nodes are right; among as many, those that hold more: rows are
// only ever added; then the ones that are longer in use. The last of nodes must be readable; of the others it does without those that are not.
func (s *Store) compare(ctx context.Context, nodes []*node, extra []stretch, from func(lane string, tip uint64) uint64) (map[*node]*finding, map[string]uint64, error) {
	s.audit.mu.Lock()
	off := s.audit.off
	s.audit.mu.Unlock()
	if off {
		return nil, nil, nil
	}
	perNode, readable, err := each(ctx, nodes, func(ctx context.Context, n *node) (map[string]uint64, error) { return laneTips(ctx, n.audit) })
	if err != nil || len(readable) < 2 {
		return nil, nil, err
	}
	tips := map[string]uint64{}
	for _, t := range perNode {
		for lane, tip := range t {
			tips[lane] = max(tips[lane], tip)
		}
	}
	stretches := slices.Clone(extra)
	for lane, tip := range tips {
		if f := from(lane, tip); f < tip {
			stretches = append(stretches, stretch{lane, f, tip})
		}
	}
	holds, readable, err := each(ctx, readable, func(ctx context.Context, n *node) ([]held, error) { return heldOf(ctx, n.audit, stretches) })
	if err != nil || len(readable) < 2 {
		return nil, nil, err
	}
	findings := map[*node]*finding{}
	for i, st := range stretches {
		right := verdict(readable, func(n *node) held { return holds[n][i] })
		for _, n := range readable {
			d := holds[n][i]
			if d == right || findings[n] != nil {
				continue
			}
			cause := fmt.Sprintf("its contents differ from the other nodes': lane %s, rows %d to %d are not theirs", st.lane, st.from+1, st.to)
			if d.rows < right.rows {
				cause = fmt.Sprintf("its contents differ from the other nodes': lane %s lacks %d of the rows %d to %d", st.lane, right.rows-d.rows, st.from+1, st.to)
			}
			findings[n] = &finding{st, cause}
		}
	}
	return findings, tips, nil
}

// verdict returns what is held to be right.
func verdict(nodes []*node, of func(*node) held) held {
	votes := map[held]int{}
	for _, n := range nodes {
		votes[of(n)]++
	}
	best := nodes[0]
	for _, n := range nodes[1:] {
		d, b := of(n), of(best)
		switch {
		case votes[d] != votes[b]:
			if votes[d] > votes[b] {
				best = n
			}
		case d.rows != b.rows:
			if d.rows > b.rows {
				best = n
			}
		default:
			if nh, bh := n.status(), best.status(); nh.Healthy && (!bh.Healthy || nh.Since.Before(bh.Since)) {
				best = n
			}
		}
	}
	return of(best)
}

// each asks the nodes at once. It leaves out those that fail, except the last, whose error it returns, as it does that of a refusal.
func each[T any](ctx context.Context, nodes []*node, ask func(context.Context, *node) (T, error)) (map[*node]T, []*node, error) {
	answers, errs := make([]T, len(nodes)), make([]error, len(nodes))
	var asking sync.WaitGroup
	for i, n := range nodes {
		asking.Go(func() { answers[i], errs[i] = ask(ctx, n) })
	}
	asking.Wait()
	out, readable := map[*node]T{}, []*node(nil)
	for i, n := range nodes {
		switch {
		case errs[i] == nil:
			out[n], readable = answers[i], append(readable, n)
		case i == len(nodes)-1 || number(errs[i]) != 0:
			return nil, nil, fmt.Errorf("comparing %s: %w", n.address, errs[i])
		}
	}
	return out, readable, nil
}

// laneTips returns the newest lanes and their last rows, causally read.
func laneTips(ctx context.Context, q Querier) (map[string]uint64, error) {
	tips := map[string]uint64{}
	err := query(ctx, q, func(r *sql.Rows) error {
		var lane string
		var tip uint64
		err := r.Scan(&lane, &tip)
		tips[lane] = tip
		return err
	}, `SELECT l.lane, COALESCE((SELECT MAX(f.seq) FROM feed f WHERE f.lane = l.lane), 0)
		FROM lane l JOIN writer w USING (incarnation) ORDER BY w.started DESC, l.lane LIMIT ?`, auditLanes)
	return tips, err
}

// held is what a node holds of a stretch.
type held struct {
	rows uint64
	sum  uint64
}

func heldOf(ctx context.Context, q Querier, stretches []stretch) ([]held, error) {
	out := make([]held, len(stretches))
	for at := 0; at < len(stretches); at += 50 {
		part := stretches[at:min(at+50, len(stretches))]
		var text strings.Builder
		var args []any
		for i, st := range part {
			if i > 0 {
				text.WriteString(" UNION ALL ")
			}
			// The hash covers all of the row as it was written; what became of it since is covered by the rest.
			text.WriteString("SELECT ?, COUNT(*), COALESCE(BIT_XOR(CRC32(CONCAT(seq, kind, issuer, serial, payload, chain))), 0) FROM feed WHERE lane = ? AND seq > ? AND seq <= ?")
			args = append(args, at+i, st.lane, st.from, st.to)
		}
		err := query(ctx, q, func(r *sql.Rows) error {
			var i int
			var d held
			if err := r.Scan(&i, &d.rows, &d.sum); err != nil {
				return err
			}
			if i < 0 || i >= len(out) {
				return errors.New("an answer to another question")
			}
			out[i] = d
			return nil
		}, text.String(), args...)
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}
