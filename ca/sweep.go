package ca

import (
	"context"
	"encoding/hex"
	"math/rand/v2"
	"time"

	"trivet/db"
)

const (
	// sweepLimit is how many open intents are taken on at once.
	sweepLimit = 256
	// foreignAge is how much older another node's intent must be than one's own, so that nodes seldom finish the same one.
	foreignAge = 5 * time.Second
	// draftAge is how old an intent of an unknown profile must be to be abandoned: it is the draft of a CA or responder certificate, and only
	// the command that built it can finish it.
	draftAge = 10 * time.Minute
)

// sweepLoop finishes or abandons intents that have waited too long for an outcome, until ctx ends.
func (e *Engine) sweepLoop(ctx context.Context) {
	for {
		// Spread over time, so that nodes started together do not sweep together.
		pause := e.cfg.SweepEvery/2 + rand.N(e.cfg.SweepEvery)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		if e.admit() != nil {
			continue
		}
		if err := e.sweep(ctx); err != nil && ctx.Err() == nil {
			e.cfg.Log.Warn("sweeping open intents", "err", err)
		}
	}
}

// sweep finishes open intents while there are many and it gets on with them: an outage of the HSMs leaves a heap.
func (e *Engine) sweep(ctx context.Context) error {
	for {
		seen, finished, err := e.sweepSome(ctx)
		if err != nil || seen < sweepLimit || finished == 0 {
			return err
		}
	}
}

// sweepSome takes on the oldest open intents that the database shows now and waits for each. It returns how many it saw, and how many it finished
// or abandoned.
func (e *Engine) sweepSome(ctx context.Context) (seen, finished int, err error) {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.BatchTimeout)
	defer cancel()
	rows, err := e.record.OpenIntents(ctx, e.cfg.SweepAge, sweepLimit)
	if err != nil {
		return 0, 0, err
	}
	ended := func(row db.Intent, err error) {
		if e.logSweep(row, err) {
			finished++
		}
	}
	now := e.cfg.Now()
	var taken []db.Intent
	var jobs []*job
	for _, row := range rows {
		age := now.Sub(row.Created)
		if row.Node != e.cfg.Node && age < e.cfg.SweepAge+foreignAge {
			continue
		}
		if len(row.Req) != 32 || len(row.Body) != 32 {
			// A restart put the row there to abandon it, and did not get that far.
			ended(row, e.abandon(ctx, row, "the journal of "+row.Node+" had it and the database had not"))
			continue
		}
		if _, ok := e.cfg.Profiles.Get(row.Profile); !ok {
			if age >= draftAge {
				ended(row, e.abandon(ctx, row, "profile "+row.Profile+" is not known here"))
			}
			continue
		}
		a, ok := e.Authorities().Issuer(row.Issuer)
		if !ok || a.Certificate == nil {
			continue
		}
		j := &job{
			req: [32]byte(row.Req), body: [32]byte(row.Body), intent: row, adopted: true,
			issuer: issuer{a.Issuer, a.Key(), a.Certificate.PublicKey}, recheck: e.recheck,
		}
		if e.join(j) == j { // else a repeat of the request is seeing to it
			taken, jobs = append(taken, row), append(jobs, j)
			e.tasks.Go(func() { e.takeOver(ctx, j, "sweep") })
		}
	}
	for i, j := range jobs {
		_, err := e.wait(ctx, j)
		ended(taken[i], err)
	}
	return len(rows), finished, nil
}

// logSweep says what became of an open intent, and returns whether it is open no longer.
func (e *Engine) logSweep(row db.Intent, err error) bool {
	if err != nil && NameOf(err) != RequestAbandoned {
		e.cfg.Log.Warn("an open intent could not be finished yet", "issuer", row.Issuer, "serial", hex.EncodeToString(row.Serial), "err", err)
		return false
	}
	e.cfg.Log.Info("an open intent was finished", "issuer", row.Issuer, "serial", hex.EncodeToString(row.Serial), "abandoned", err != nil)
	return true
}
