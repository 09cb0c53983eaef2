package db

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A node is asked every probeEvery and must answer within probeDeadline: a frozen node is found
// within their sum. Galera's view changes, which stall commits for over a second, do not stall the probe,
// because it neither writes nor waits for replication.
const (
	probeEvery    = 250 * time.Millisecond
	probeDeadline = 500 * time.Millisecond
)

// Run probes the nodes until ctx ends, and then returns nil. One Run per Store.
func (s *Store) Run(ctx context.Context) error {
	if !s.running.CompareAndSwap(false, true) {
		return errors.New("running database probes: already running")
	}
	defer s.running.Store(false)
	var wg sync.WaitGroup
	for _, n := range s.nodes {
		wg.Go(func() {
			tick := time.NewTicker(probeEvery)
			defer tick.Stop()
			for {
				s.check(ctx, n, true)
				select {
				case <-tick.C:
				case <-n.kick:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	for _, n := range s.nodes {
		wg.Go(func() { s.pingLoop(ctx, n) })
	}
	wg.Go(func() { s.paceLoop(ctx) })
	wg.Go(func() { s.auditAll(ctx) })
	wg.Wait()
	return nil
}

// ensureProbed makes health known where Run is not active: for a tool that makes a few calls.
func (s *Store) ensureProbed(ctx context.Context) {
	if s.running.Load() {
		return
	}
	var wg sync.WaitGroup
	for _, n := range s.nodes {
		wg.Go(func() { s.check(ctx, n, false) })
	}
	wg.Wait()
}

// check probes one node and records the result. With compare, a node that comes into use is compared with the others first.
func (s *Store) check(ctx context.Context, n *node, compare bool) {
	began := time.Now()
	pctx, cancel := context.WithTimeout(ctx, probeDeadline)
	h, err := probe(pctx, n.probe)
	cancel()
	if ctx.Err() != nil {
		return // we are stopping: that says nothing about the node
	}
	h.Took = time.Since(began)
	if err != nil {
		h.Took = 0
		h.Cause = "probe failed: " + err.Error()
		if errors.Is(err, context.DeadlineExceeded) {
			h.Cause = fmt.Sprintf("probe not answered within %s", probeDeadline)
		}
	}
	if h.Cause == "" {
		n.mu.Lock()
		n.answered = h
		n.mu.Unlock()
		if compare {
			h.Cause, h.Diverged = s.admit(ctx, n, h)
		}
		if ctx.Err() != nil {
			return
		}
	} else {
		n.mu.Lock()
		n.answered = NodeHealth{}
		n.mu.Unlock()
	}
	s.signs.observe(n, h.view, h.primary && !h.Diverged, time.Now())
	s.record(n, h, began)
}

// record takes over a probe's result; began is when the probe started.
func (s *Store) record(n *node, h NodeHealth, began time.Time) {
	n.mu.Lock()
	old := n.health
	if h.Cause == "" && began.Before(n.marked) {
		n.mu.Unlock()
		return // a call saw it fail after this probe began
	}
	h.Address, h.Healthy, h.Since, h.Slow = n.address, h.Cause == "", old.Since, ""
	if h.Healthy {
		h.Slow = n.pace.slow
	}
	if h.Healthy != old.Healthy || old.Since.IsZero() {
		h.Since = s.cfg.Now()
	}
	n.health = h
	if !h.Healthy {
		n.drop()
	}
	n.mu.Unlock()
	if h.Diverged != old.Diverged {
		if h.Diverged {
			s.metrics.diverged.WithLabelValues(n.address).Set(1)
			s.cfg.Log.Error("database node diverged and is kept out of use", "node", n.address, "cause", h.Cause)
		} else if h.Healthy {
			s.metrics.diverged.WithLabelValues(n.address).Set(0)
			s.cfg.Log.Info("database node holds what the others do again", "node", n.address)
		} else {
			h.Diverged = old.Diverged // it is down, which is not the same as well
			n.mu.Lock()
			n.health.Diverged = old.Diverged
			n.mu.Unlock()
		}
	}
	if h.Healthy == old.Healthy {
		return
	}
	if h.Healthy {
		s.metrics.healthy.WithLabelValues(n.address).Set(1)
		s.cfg.Log.Info("database node is ready", "node", n.address, "size", h.Size)
	} else {
		s.metrics.healthy.WithLabelValues(n.address).Set(0)
		s.metrics.demoted.WithLabelValues(n.address).Inc()
		s.cfg.Log.Warn("database node demoted, its connections are closed", "node", n.address, "cause", h.Cause)
	}
	s.mu.Lock()
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
}

// demote takes a node out of use because a call learnt that it cannot serve; the next probe may bring it back.
func (s *Store) demote(n *node, cause error) {
	now := time.Now()
	n.mu.Lock()
	n.marked = now
	h := n.health
	n.mu.Unlock()
	h.Cause = cause.Error()
	s.record(n, h, now)
	n.askProbe()
}

// askProbe has the node probed now instead of at the next tick.
func (n *node) askProbe() {
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

// probe asks a node whether it can be written. Health.Cause is "" if so.
func probe(ctx context.Context, db *sql.DB) (NodeHealth, error) {
	var h NodeHealth
	rows, err := db.QueryContext(ctx, `SHOW GLOBAL STATUS WHERE Variable_name IN
		('wsrep_ready', 'wsrep_cluster_status', 'wsrep_local_state', 'wsrep_local_state_comment', 'wsrep_cluster_size', 'wsrep_local_state_uuid',
		'wsrep_cluster_state_uuid', 'wsrep_cluster_conf_id', 'Uptime');
		SELECT @@global.read_only, @@global.wsrep_reject_queries`)
	if err != nil {
		return h, err
	}
	defer rows.Close()
	status := map[string]string{}
	for rows.Next() {
		var name, value string
		if err := rows.Scan(&name, &value); err != nil {
			return h, err
		}
		status[name] = value
	}
	if err := rows.Err(); err != nil {
		return h, err
	}
	h.State = status["wsrep_local_state_comment"]
	h.view.uuid = status["wsrep_cluster_state_uuid"]
	h.view.conf, _ = strconv.ParseUint(status["wsrep_cluster_conf_id"], 10, 64) // the largest number while in no primary component
	age, _ := strconv.Atoi(status["Uptime"])
	h.view.started = time.Now().Add(-time.Duration(age) * time.Second)
	h.primary = status["wsrep_cluster_status"] == "Primary" && status["wsrep_local_state"] == "4"
	h.Size, _ = strconv.Atoi(status["wsrep_cluster_size"]) // "" while it starts
	h.History = status["wsrep_local_state_uuid"]
	if status["wsrep_ready"] != "ON" {
		h.Cause = "not ready: " + h.State
		return h, nil // whatever it says to the second question
	}
	var readOnly bool
	var reject string
	if !rows.NextResultSet() || !rows.Next() {
		return h, cmp.Or(rows.Err(), sql.ErrNoRows)
	}
	if err := rows.Scan(&readOnly, &reject); err != nil {
		return h, err
	}
	switch {
	case status["wsrep_cluster_status"] != "Primary":
		h.Cause = "not in the primary component"
	case status["wsrep_local_state"] != "4":
		h.Cause = "state is " + h.State + ", not Synced"
	case readOnly:
		h.Cause = "read-only"
	case !strings.EqualFold(reject, "NONE"):
		h.Cause = "rejects queries: " + reject
	}
	return h, nil
}

// candidates returns the healthy nodes in order of preference and a channel that closes at the next change.
func (s *Store) candidates() ([]*node, <-chan struct{}) {
	s.mu.Lock()
	changed := s.changed
	s.mu.Unlock()
	var out, slow []*node
	for _, n := range s.nodes {
		switch h := n.status(); {
		case h.Healthy && h.Slow == "":
			out = append(out, n)
		case h.Healthy:
			slow = append(slow, n)
		}
	}
	if len(out) == 0 {
		out = slow // better than none
	}
	return out, changed
}

// await returns the healthy nodes, at least one, or an error when ctx ends first.
func (s *Store) await(ctx context.Context, op string) ([]*node, error) {
	for {
		s.ensureProbed(ctx)
		nodes, changed := s.candidates()
		if len(nodes) > 0 {
			return nodes, nil
		}
		poll := time.NewTimer(probeEvery) // where Run is not active nothing else looks again
		select {
		case <-changed:
		case <-poll.C:
		case <-ctx.Done():
			poll.Stop()
			return nil, &Error{Class: NotReady, Op: op, Err: errors.Join(ctx.Err(), errors.Unwrap(s.Ready()))}
		}
		poll.Stop()
	}
}
