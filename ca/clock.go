package ca

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/db"
	"trivet/journal"
)

// maxClockError is how far this node's clock may be from those of its peers: certificates must not lie about when they were made.
const maxClockError = time.Second

// clockDeadline bounds one look at the peers' clocks.
const clockDeadline = 2 * time.Second

// PeerClocks compares clocks; *db.Store does. now is this node's clock, as injected.
type PeerClocks interface {
	Clocks(ctx context.Context, now func() time.Time) []db.ClockReading
}

// clockGuard knows whether this node's clock may be believed. Without peers it always is. Safe for concurrent use.
type clockGuard struct {
	peers PeerClocks
	now   func() time.Time
	gauge prometheus.Gauge

	mu    sync.Mutex
	cause error         // why it is not believed; nil if it is
	off   time.Duration // when last measured
	wall  time.Time     // when last measured, by the clock itself
	mono  time.Time     // when last measured, by a clock that nobody sets
}

func newClockGuard(peers PeerClocks, now func() time.Time, gauge prometheus.Gauge) *clockGuard {
	c := &clockGuard{peers: peers, now: now, gauge: gauge}
	if peers != nil {
		c.wall, c.mono = now().Round(0), time.Now()
	}
	return c
}

// measure asks the peers once. Where none answers the last verdict stands.
func (c *clockGuard) measure(ctx context.Context) {
	if c.peers == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, clockDeadline)
	defer cancel()
	// Before the question: a clock that is set in between is then found out, one way or the other.
	wall, mono := c.now().Round(0), time.Now()
	readings := c.peers.Clocks(ctx, c.now)
	if len(readings) == 0 {
		return
	}
	off := medianOffset(readings)
	c.gauge.Set(off.Seconds())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off, c.wall, c.mono, c.cause = off, wall, mono, nil
	if off.Abs() > maxClockError {
		side := "ahead of"
		if off < 0 {
			side = "behind"
		}
		c.cause = fmt.Errorf("this node's clock is %s %s those of %d database nodes", off.Abs().Round(10*time.Millisecond), side, len(readings))
	}
}

// medianOffset is by how much this clock differs for certain from the middle one of its peers: what the time of the answers leaves open counts in
// its favour, and so does a tie. One peer whose clock is wrong has no say among three.
func medianOffset(readings []db.ClockReading) time.Duration {
	offsets := make([]time.Duration, len(readings))
	for i, r := range readings {
		switch {
		case r.Offset > r.Within:
			offsets[i] = r.Offset - r.Within
		case r.Offset < -r.Within:
			offsets[i] = r.Offset + r.Within
		}
	}
	slices.Sort(offsets)
	low, high := offsets[(len(offsets)-1)/2], offsets[len(offsets)/2]
	switch {
	case low <= 0 && high >= 0:
		return 0
	case low > 0:
		return low
	}
	return high
}

// err returns nil if the clock may be believed now, else why not. It asks nobody: a clock that was set since the last measurement is found out by one that
// nobody sets.
func (c *clockGuard) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil || c.wall.IsZero() {
		return c.cause
	}
	moved := c.now().Round(0).Sub(c.wall) - time.Since(c.mono)
	if off := c.off + moved; off.Abs() > maxClockError && moved.Abs() > maxClockError/2 {
		return fmt.Errorf("this node's clock was set by %s, and has not been compared with others since", moved.Round(10*time.Millisecond))
	}
	return nil
}

// Clock returns nil while this node's clock may be believed, else what clients are told. Whether somebody's certificate is valid is nothing to be told by
// a clock that is off.
func (e *Engine) Clock() error { return e.clockError() }

// clockError is what clients are told while the clock is off; nil while it is not.
func (e *Engine) clockError() error {
	if err := e.clock.err(); err != nil {
		return unavailable(Halted, nil, "signing is stopped: %v; it goes on by itself once the clock is right", err)
	}
	return nil
}

// clockLoop compares clocks until ctx ends, and records when signing stops and goes on because of them.
func (e *Engine) clockLoop(ctx context.Context) {
	if e.clock.peers == nil {
		return
	}
	tick := time.NewTicker(e.cfg.ClockEvery)
	defer tick.Stop()
	stopped := false
	for {
		if err := e.clock.err(); (err != nil) != stopped {
			event, outcome, level, detail := "clock-restored", "signing goes on", slog.LevelWarn, "the clock agrees with the database nodes' again"
			if err != nil {
				event, outcome, level, detail = "clock-off", "signing stopped", slog.LevelError, err.Error()
			}
			e.cfg.Log.Log(ctx, level, "signing and the clock", "event", event, "detail", detail)
			if err := e.journal(journal.Audit{Actor: e.cfg.Node, Event: event, Object: "clock", Outcome: outcome, Detail: detail}); err == nil {
				stopped = !stopped // else it is recorded once the journal takes it
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		e.clock.measure(ctx)
	}
}
