package ca

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"trivet/db"
	"trivet/journal"
)

const (
	roundTimeout = 30 * time.Second // for one go at the database's side of a round; what was done stays done
	watchTimeout = 3 * time.Second  // for one look
	compareEvery = 10 * time.Second // how often what is held for others, and what responders have, is compared
)

// Run looks for signs that the database has gone back, begins a round when it finds one, and does this node's part in every round, until ctx
// ends; then it returns nil.
func (r *Rounds) Run(ctx context.Context) error {
	begun, failing := false, false
	tick := time.NewTicker(r.cfg.Every)
	defer tick.Stop()
	for {
		var err error
		if !begun {
			if err = r.start(ctx); err == nil {
				begun = true
				close(r.entered)
			}
		} else {
			err = r.look(ctx)
		}
		if failed := err != nil && ctx.Err() == nil; failed != failing {
			if failing = failed; failed {
				r.cfg.Log.Warn("recovery rounds: trying again until the database answers", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-r.kick:
		}
	}
}

// Entered is closed once this node has done its part in the newest round that there was when it started.
func (r *Rounds) Entered() <-chan struct{} { return r.entered }

// start finds out which round this node is in, from its journal and the database.
func (r *Rounds) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	signs, _ := r.record.Regress()
	state, err := r.read(ctx)
	if err != nil {
		return err
	}
	if journalled := r.Current(); state.N < journalled {
		return r.witness(ctx, state, signs, fmt.Sprintf("the database lacks recovery round %d, which %s was in", journalled, r.cfg.Node), true)
	}
	r.mu.Lock()
	r.signs = signs
	r.mu.Unlock()
	if state.N > 0 && !r.finished(ctx, state.N) {
		return r.enter(ctx, state.N, 0)
	}
	r.lock.Lock()
	r.n = state.N
	r.lock.Unlock()
	cause, err := r.behind(ctx, true)
	if err != nil {
		return err
	}
	if cause != "" {
		return r.witness(ctx, state, signs, cause, true)
	}
	// A commit of an earlier incarnation that is still under way fails from here on. Not before the comparison: it passes over lanes that have ended.
	// A round ends them itself.
	closed, err := r.record.CloseLanes(ctx, r.cfg.Node, r.cfg.Journal.Incarnation(), r.cfg.Node)
	if err != nil {
		return fmt.Errorf("ending the lanes of earlier incarnations: %w", err)
	}
	r.cfg.Log.Info("lanes of earlier incarnations ended", "lanes", closed)
	r.lock.Lock()
	r.ready = true
	r.lock.Unlock()
	return nil
}

// finished tells whether an earlier incarnation did this node's part in the round.
func (r *Rounds) finished(ctx context.Context, n uint64) bool {
	report, err := r.record.Round(ctx, n)
	if err != nil || report == nil {
		return false
	}
	last := lastRecon(report, r.cfg.Node)
	return last != nil && last.Event == db.ReconDone
}

// readJournal returns the newest round that this node was in, and learns which had ended.
func (r *Rounds) readJournal() (uint64, error) {
	s, err := r.cfg.Journal.State()
	if err != nil || s.Round == nil {
		return 0, err
	}
	var p journal.Round
	if err := json.Unmarshal(s.Round, &p); err != nil {
		return 0, fmt.Errorf("decoding the newest round record: %w", err)
	}
	r.ended, r.promised = p.Ended, p.CopyRequired
	return p.N, nil
}

// note journals which round this node is in, and which it has seen end.
func (r *Rounds) note(n uint64, cause string) error {
	r.mu.Lock()
	p := journal.Round{N: n, Ended: r.ended, Cause: cause, CopyRequired: r.promised}
	r.mu.Unlock()
	record, err := journal.New(p)
	if err != nil {
		return err
	}
	return r.cfg.Journal.Append(record)
}

// highest returns the highest number of each lane that this node's journal holds.
func (r *Rounds) highest() (map[string]uint64, error) {
	lanes, err := r.cfg.Journal.Lanes()
	if err != nil {
		return nil, fmt.Errorf("reading the journal: %w", err)
	}
	out := make(map[string]uint64, len(lanes))
	for lane, numbers := range lanes {
		if lane != "" {
			out[lane] = numbers.Last
		}
	}
	return out, nil
}

// read asks the database which round there is.
func (r *Rounds) read(ctx context.Context) (db.RoundState, error) {
	state, err := r.record.RoundState(ctx)
	if err != nil {
		return state, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if state.N != r.state.N || r.saw.IsZero() {
		r.saw, r.waiting = time.Now(), nil
	}
	r.state = state
	r.gauge.WithLabelValues("begun").Set(float64(state.N))
	r.gauge.WithLabelValues("ended").Set(float64(state.Ended))
	if state.Open() {
		r.uncovered.Set(0)
	}
	return state, nil
}

// look is one look at the database.
func (r *Rounds) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, roundTimeout)
	defer cancel()
	signs, cause := r.record.Regress()
	short, stop := context.WithTimeout(ctx, watchTimeout)
	state, err := r.read(short)
	stop()
	if err != nil {
		return err
	}
	r.lock.RLock()
	n, ready := r.n, r.ready
	r.lock.RUnlock()
	switch {
	case state.N < n:
		return r.witness(ctx, state, signs, fmt.Sprintf("the database lacks recovery round %d, which %s was in", n, r.cfg.Node), true)
	case state.N > n:
		return r.enter(ctx, state.N, 0)
	case !ready:
		return r.reconcile(ctx, n)
	}
	r.mu.Lock()
	fresh := signs > r.signs
	due := time.Since(r.compared) >= compareEvery
	r.mu.Unlock()
	lost, err := r.behind(ctx, fresh || due)
	if err != nil {
		return err
	}
	switch {
	case lost != "":
		return r.witness(ctx, state, signs, lost, true)
	case fresh:
		return r.witness(ctx, state, signs, cause, false)
	case !state.Open():
		return r.finish(ctx, n)
	}
	r.mu.Lock()
	news := n > r.ended
	r.ended = max(r.ended, n)
	if r.promised && !r.cfg.RequireCopy && r.cfg.Copies != nil && r.cfg.Copies.Told() {
		r.promised, news = false, true
	}
	r.mu.Unlock()
	if news {
		if err := r.note(n, ""); err != nil {
			return err
		}
	}
	return r.afterwards(ctx)
}

// afterwards gives up, some time after a round, the intents that are in the journal and not in the database: whoever asked was told to ask again.
func (r *Rounds) afterwards(ctx context.Context) error {
	r.mu.Lock()
	settle := r.settle
	entry := r.entry
	due := r.unsettled && time.Since(entry) > r.cfg.Settle
	r.mu.Unlock()
	if !due || settle == nil {
		return nil
	}
	if err := settle(ctx, entry); err != nil {
		return fmt.Errorf("settling what was under way when the database went back: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unsettled = false
	return nil
}

// doubt is a lane of which the database shows less than somebody knows.
type doubt struct {
	lane string
	what string
}

// behind returns what the database lacks, "" if nothing.
func (r *Rounds) behind(ctx context.Context, all bool) (string, error) {
	doubts, err := r.doubts(ctx, all)
	if err != nil || len(doubts) == 0 {
		return "", err
	}
	return doubts[0].what, nil
}

// doubts compares what this node knows with what the database shows. all is for every lane of this node's journal, those held for others, and the
// responders' positions; otherwise it is the lanes in use alone.
func (r *Rounds) doubts(ctx context.Context, all bool) ([]doubt, error) {
	known := map[string]uint64{} // read before the question
	who := map[string]string{}
	note := func(lane string, seq uint64, name string) {
		if seq > known[lane] {
			known[lane], who[lane] = seq, name
		}
	}
	for _, m := range r.moving() {
		if l := m.current(); l != nil {
			note(l.Name(), l.Tip(), r.cfg.Node)
		}
	}
	if all {
		highest, err := r.highest()
		if err != nil {
			return nil, err
		}
		for lane, seq := range highest {
			note(lane, seq, r.cfg.Node)
		}
		if r.cfg.Held != nil {
			for lane, seq := range r.cfg.Held.Lanes() {
				note(lane, seq, "a copy at "+r.cfg.Node)
			}
		}
		if r.cfg.Positions != nil {
			positions, err := r.cfg.Positions(ctx)
			if err != nil {
				r.cfg.Log.Debug("responders' positions not read", "err", err)
			}
			for va, vector := range positions {
				for lane, seq := range vector {
					note(lane, seq, "responder "+va)
				}
			}
		}
	}
	lanes := make([]string, 0, len(known))
	for lane, seq := range known {
		if seq > 0 {
			lanes = append(lanes, lane)
		}
	}
	slices.Sort(lanes)
	tips, err := r.record.LaneTips(ctx, lanes)
	if err != nil {
		return nil, err
	}
	if all {
		r.mu.Lock()
		r.compared = time.Now()
		r.mu.Unlock()
	}
	var out []doubt
	for _, lane := range lanes {
		// What is beyond a lane's end was lost before an earlier round, and has been put back since.
		if tip := tips[lane]; !tip.Closed && tip.Seq < known[lane] {
			out = append(out, doubt{lane, fmt.Sprintf("%s has row %d of lane %s, and the database ends at %d", who[lane], known[lane], lane, tip.Seq)})
		}
	}
	return out, nil
}

// witness begins a round above every one known, and enters it. signs were counted before the state was read: the round is younger than they are.
func (r *Rounds) witness(ctx context.Context, state db.RoundState, signs uint64, cause string, proved bool) error {
	n := max(state.N, r.Current()) + 1
	r.cfg.Log.Error("recovery round begins: the database may have lost commits", "round", n, "cause", cause, "proved", proved)
	if err := r.note(n, cause); err != nil {
		return err
	}
	r.begun.WithLabelValues(map[bool]string{true: "proved", false: "suspected"}[proved]).Inc()
	err := r.record.BeginRound(ctx, db.Round{N: n, Node: r.cfg.Node, Cause: cause, Proved: proved})
	if err != nil && db.ClassOf(err) != db.Duplicate {
		return fmt.Errorf("beginning recovery round %d: %w", n, err)
	}
	if state, err = r.read(ctx); err != nil {
		return err
	}
	return r.enter(ctx, state.N, signs)
}

func (r *Rounds) unready() {
	r.lock.Lock()
	defer r.lock.Unlock()
	r.ready = false
}

// enter puts the node into a round: releases under way are finished first, and from then on nothing that was read before is released. With that, and no
// sooner, the signs are dealt with that the round was begun for.
func (r *Rounds) enter(ctx context.Context, n, signs uint64) error {
	r.lock.Lock()
	r.ready = false
	err := r.note(n, "")
	if err == nil {
		r.n = n
		r.mu.Lock()
		r.signs = max(r.signs, signs)
		r.mu.Unlock()
	}
	r.lock.Unlock()
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.putBack, r.entry, r.unsettled = putBack{}, time.Now(), true
	r.mu.Unlock()
	r.cfg.Log.Warn("recovery round entered: nothing is released until it ends", "round", n)
	return r.reconcile(ctx, n)
}
