package ca

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"

	"trivet/db"
	"trivet/journal"
)

// tail is what a journal says about certificates whose fate this node does not know.
type tail struct {
	open     map[string]journal.Intent // intents without done or void, by certificate id
	released []journal.Done            // the newest: a database that went back lacks these before all others
}

// readTail asks the journal, which keeps it from start to start.
func readTail(j *journal.Journal) (tail, error) {
	s, err := j.State()
	if err != nil {
		return tail{}, fmt.Errorf("reading the journal: %w", err)
	}
	t := tail{open: make(map[string]journal.Intent), released: s.Released}
	for _, i := range s.Open {
		t.open[i.Intent.Issuer+":"+i.Intent.Serial] = i.Intent
	}
	return t, nil
}

// recover reads what earlier incarnations of this node journalled and brings the database to know it: an intent that never got there is
// inserted and abandoned, so that a late COMMIT of it loses on the key. Open intents that are there are left to repeats and the sweeper.
// It waits for the database, and fails only if the journal cannot be read or the database lacks what was released.
func (e *Engine) recover(ctx context.Context) error {
	if r := e.cfg.Rounds; r != nil {
		// What this node released and the database lacks is put back first.
		select {
		case <-r.Entered():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	t, err := readTail(e.cfg.Journal)
	if err != nil {
		return err
	}
	open := len(t.open)
	if e.cfg.Rounds != nil {
		t.released = nil // compared already
	}
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = 100*time.Millisecond, 2*time.Second
	_, err = backoff.Retry(ctx, func() (struct{}, error) {
		if err := e.settle(ctx, &t); err != nil {
			if errors.Is(err, errWentBack) || db.ClassOf(err) == db.None && NameOf(err) == "" {
				return struct{}{}, backoff.Permanent(err)
			}
			e.cfg.Log.Warn("settling what an earlier run left: will try again", "err", err)
			return struct{}{}, err
		}
		return struct{}{}, nil
	}, backoff.WithBackOff(retry), backoff.WithMaxElapsedTime(0))
	if err == nil && open > 0 {
		err = e.journal(journal.Settled{Intents: open}) // so that the next start need not ask again
	}
	return err
}

var errWentBack = errors.New("the database lacks a certificate that this node released: it has gone back in time and needs a recovery round before anything is issued")

// settle does the database side of recover once. What it has settled it removes from t, so that a repeat goes on where it stopped.
func (e *Engine) settle(ctx context.Context, t *tail) error {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.BatchTimeout)
	defer cancel()
	if err := e.Refresh(ctx); err != nil {
		return err
	}
	for len(t.released) > 0 {
		d := t.released[len(t.released)-1]
		row, err := e.find(ctx, d.Issuer, d.Serial)
		if err != nil {
			return err
		}
		if row == nil || row.Outcome == nil {
			return fmt.Errorf("%s:%s: %w", d.Issuer, d.Serial, errWentBack)
		}
		t.released = t.released[:len(t.released)-1]
	}
	// Not during a recovery round: an intent that another node finished may be about to come back, and a buried one would keep its request key from it.
	err := e.cfg.Rounds.Complete(ctx, func() error {
		for id, i := range t.open {
			if row, err := e.find(ctx, i.Issuer, i.Serial); err != nil {
				return err
			} else if row != nil {
				delete(t.open, id)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for id, i := range t.open {
		if err := e.bury(ctx, i); err != nil {
			return err
		}
		delete(t.open, id)
	}
	return nil
}

// settleOpen buries the intents that were under way when the database went back and lost them: a late COMMIT of one then loses on the key, and
// responders that had heard of a certificate learn that it counts as revoked. No batch that has any of them may be under way.
func (e *Engine) settleOpen(ctx context.Context, before time.Time) error {
	t, err := readTail(e.cfg.Journal)
	if err != nil {
		return err
	}
	t.released = nil
	for id, i := range t.open {
		if !i.Created.Before(before) {
			delete(t.open, id)
		}
	}
	return e.settle(ctx, &t)
}

func (e *Engine) find(ctx context.Context, issuer, serial string) (*db.Certificate, error) {
	octets, err := hex.DecodeString(serial)
	if err != nil {
		return nil, fmt.Errorf("reading the journal: serial %q of %s: %w", serial, issuer, err)
	}
	row, err := e.record.Certificate(ctx, issuer, octets)
	if err != nil {
		return nil, fmt.Errorf("looking for %s:%s: %w", issuer, serial, err)
	}
	return row, nil
}

// bury inserts an intent that only the journal knows, without its request key, and abandons it.
func (e *Engine) bury(ctx context.Context, i journal.Intent) error {
	serial, err := hex.DecodeString(i.Serial)
	if err != nil {
		return fmt.Errorf("reading the journal: serial %q of %s: %w", i.Serial, i.Issuer, err)
	}
	body := i.Body
	if len(body) != 32 {
		body = make([]byte, 32)
	}
	row := db.Intent{
		Issuer: i.Issuer, Serial: serial, Ver: 1, Body: body, TBS: i.TBS, Profile: i.Profile, ProfileHash: make([]byte, 32),
		Requester: i.Requester, SiteEpoch: e.cfg.Epoch, Node: e.cfg.Node, Created: e.cfg.Now().UTC(),
	}
	if _, _, err := e.record.InsertIntents(ctx, []db.Intent{e.seal(row)}); err != nil {
		return fmt.Errorf("inserting the journalled intent %s:%s: %w", i.Issuer, i.Serial, err)
	}
	err = e.abandon(ctx, row, "an earlier run of this node ended before the database had it")
	if NameOf(err) != RequestAbandoned {
		return fmt.Errorf("abandoning the journalled intent %s:%s: %w", i.Issuer, i.Serial, err)
	}
	e.metrics.finished.WithLabelValues("recovered").Inc()
	return nil
}
