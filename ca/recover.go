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

// tipCheck is how many of the newest released certificates are looked up in the database at start: a database that went back lacks the newest.
const tipCheck = 64

// tail is what a journal says about certificates whose fate this node does not know.
type tail struct {
	open     map[string]journal.Intent // intents without done or void, by certificate id
	released []journal.Done            // the newest, at most tipCheck
}

// readTail reads the whole journal.
func readTail(j *journal.Journal) (tail, error) {
	t := tail{open: make(map[string]journal.Intent)}
	err := j.Replay(func(entry journal.Entry) error {
		switch entry.Kind {
		case journal.KindIntent:
			var i journal.Intent
			if err := entry.Decode(&i); err != nil {
				return err
			}
			t.open[i.Issuer+":"+i.Serial] = i
		case journal.KindVoid:
			var v journal.Void
			if err := entry.Decode(&v); err != nil {
				return err
			}
			delete(t.open, v.Issuer+":"+v.Serial)
		case journal.KindDone:
			var d journal.Done
			if err := entry.Decode(&d); err != nil {
				return err
			}
			delete(t.open, d.Issuer+":"+d.Serial)
			if d.Kind == journal.DoneCert {
				t.released = append(t.released, d)
				if len(t.released) >= 2*tipCheck {
					t.released = append([]journal.Done(nil), t.released[tipCheck:]...)
				}
			}
		}
		return nil
	})
	if err != nil {
		return tail{}, fmt.Errorf("reading the journal: %w", err)
	}
	if extra := len(t.released) - tipCheck; extra > 0 {
		t.released = t.released[extra:]
	}
	return t, nil
}

// recover reads what earlier incarnations of this node journalled and brings the database to know it: an intent that never got there is
// inserted and abandoned, so that a late COMMIT of it loses on the key. Open intents that are there are left to repeats and the sweeper.
// It waits for the database, and fails only if the journal cannot be read or the database lacks what was released.
func (e *Engine) recover(ctx context.Context) error {
	t, err := readTail(e.cfg.Journal)
	if err != nil {
		return err
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
	for id, i := range t.open {
		row, err := e.find(ctx, i.Issuer, i.Serial)
		if err != nil {
			return err
		}
		if row == nil {
			if err := e.bury(ctx, i); err != nil {
				return err
			}
		}
		delete(t.open, id)
	}
	return nil
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
	if _, _, err := e.record.InsertIntents(ctx, []db.Intent{row}); err != nil {
		return fmt.Errorf("inserting the journalled intent %s:%s: %w", i.Issuer, i.Serial, err)
	}
	err = e.abandon(ctx, row, "an earlier run of this node ended before the database had it")
	if NameOf(err) != RequestAbandoned {
		return fmt.Errorf("abandoning the journalled intent %s:%s: %w", i.Issuer, i.Serial, err)
	}
	e.metrics.finished.WithLabelValues("recovered").Inc()
	return nil
}
