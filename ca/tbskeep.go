package ca

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"trivet/db"
)

const (
	// keepTBSFirst is when a node that started first looks at the partitions, at the latest.
	keepTBSFirst = time.Minute
	// keepTBSFor bounds one keeping: every intent of the days that are to go is looked at, a few thousand in a statement.
	keepTBSFor = 30 * time.Minute
)

// keepTBSLoop makes room for the TBSCertificates of the days to come, and drops those of days whose intents all have an outcome, until ctx ends.
func (e *Engine) keepTBSLoop(ctx context.Context) {
	// Spread over time, so that nodes started together do not meet.
	for pause := rand.N(keepTBSFirst); ; pause = e.cfg.KeepTBSEvery/2 + rand.N(e.cfg.KeepTBSEvery) {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		if err := errors.Join(e.clockError(), e.cfg.Rounds.err()); err != nil {
			continue // it judges nobody's age
		}
		if err := e.keepTBS(ctx); err != nil && ctx.Err() == nil {
			e.cfg.Log.Warn("keeping the partitions of intent_tbs: will try again", "err", err)
		}
	}
}

func (e *Engine) keepTBS(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, keepTBSFor)
	defer cancel()
	state, err := e.record.KeepTBS(ctx, db.TBSKeeping{Node: e.cfg.Node, Keep: e.cfg.KeepTBS})
	if err != nil || !state.Table {
		return err
	}
	if state.Made > 0 || state.Dropped > 0 {
		e.cfg.Log.Info("partitions of intent_tbs", "made", state.Made, "dropped", state.Dropped)
	}
	var bytes int64
	overdue, now := 0, e.cfg.Now()
	for _, p := range state.Partitions {
		bytes += p.Bytes
		// Two days later than it should have gone: between nodes it takes turns.
		if !p.Day.IsZero() && now.Sub(p.Day) > e.cfg.KeepTBS+72*time.Hour {
			overdue++
		}
		if p.Open != "" {
			e.cfg.Log.Warn("a partition of intent_tbs is not dropped: an intent in it has no outcome", "day", p.Day.Format(time.DateOnly), "intent", p.Open)
		}
	}
	if len(state.Old) > 0 {
		e.cfg.Log.Info("TBSCertificates stay in the rows of their intents: these nodes may run a version that looks nowhere else", "nodes", state.Old)
	}
	e.metrics.tbsAhead.Set(float64(state.Ahead(now)))
	e.metrics.tbsOverdue.Set(float64(overdue))
	e.metrics.tbsBytes.Set(float64(bytes))
	e.metrics.tbsInRows.Set(float64(len(state.Old)))
	return nil
}
