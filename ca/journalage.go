package ca

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"trivet/db"
	"trivet/journal"
)

// ErrJournalBehind is in the chain of CheckJournal's error when the database remembers more of this node than its journal does.
var ErrJournalBehind = errors.New("this node's journal is older than the database: it is a copy from before, such as a restored snapshot, or belongs to another machine, or it is new")

// journalAcknowledged is the audit event of an operator's word that an incarnation's records are gone.
const journalAcknowledged = "journal-behind-acknowledged"

const (
	journalSlack = time.Hour           // around an intent's time in which its journal record is looked for
	journalSpan  = 90 * 24 * time.Hour // how far back a node's newest intents are looked for
	journalDepth = 200                 // how many of them
	mostForged   = 4096                // forged intents that are passed over in search of them
)

// WriterRecord is what CheckJournal asks of the database; *db.Store is it.
type WriterRecord interface {
	Writers(ctx context.Context, node string) ([]db.Writer, error)
	IntentsAfter(ctx context.Context, node string, after time.Time, limit int) ([]db.Intent, error)
}

// CheckJournal compares the journal with what the database remembers of the node, before this incarnation has written anything there. Whatever a
// journal lacks, this node cannot put back should the database lose it, and a machine that was cloned must not run twice; so a journal that lacks
// an incarnation, or intents, is refused unless acknowledged names the incarnation, in hex. That is journalled, and counts for ever. An intent for which keys
// do not vouch proves nothing: no CA node wrote it.
func CheckJournal(ctx context.Context, record WriterRecord, keys *db.MACKeys, j *journal.Journal, node string, acknowledged []string) error {
	known := map[string]bool{}
	err := j.Select(journal.Query{Kinds: []journal.Kind{journal.KindStart}}, func(e journal.Entry) error {
		known[hex.EncodeToString(e.Incarnation[:])] = true
		return nil
	})
	if err != nil {
		return fmt.Errorf("comparing the journal with the database: %w", err)
	}
	writers, err := record.Writers(ctx, node)
	if err != nil {
		return err
	}
	var unknown []string
	newest := "" // incarnation that the database knows
	for _, w := range writers {
		if w.Role != roleCA {
			continue
		}
		if newest = hex.EncodeToString(w.Incarnation[:]); !known[newest] {
			unknown = append(unknown, newest)
		}
	}
	if len(unknown) == 0 && newest != "" {
		behind, err := lacksIntents(ctx, record, keys, j, node)
		if err != nil {
			return err
		}
		if behind {
			unknown = append(unknown, newest)
		}
	}
	if len(unknown) > 0 {
		if unknown, err = unacknowledged(j, unknown); err != nil {
			return err
		}
	}
	for _, id := range unknown {
		if !slices.Contains(acknowledged, id) {
			return fmt.Errorf("%w: the database knows incarnation %s of %s; put the right journal in its place, or, if it is gone and no other process runs as %s, add %s to acknowledge_journal in its configuration",
				ErrJournalBehind, id, node, node, id)
		}
		entry, err := journal.New(journal.Audit{Actor: node, Event: journalAcknowledged, Object: id, Outcome: "accepted", Detail: "acknowledge_journal in the configuration"})
		if err == nil {
			err = j.Append(entry)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unacknowledged leaves out the incarnations that operators have given up.
func unacknowledged(j *journal.Journal, ids []string) ([]string, error) {
	given := map[string]bool{}
	err := j.Select(journal.Query{Kinds: []journal.Kind{journal.KindAudit}}, func(e journal.Entry) error {
		var a journal.Audit
		if err := e.Decode(&a); err != nil {
			return err
		}
		if a.Event == journalAcknowledged {
			given[a.Object] = true
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("comparing the journal with the database: %w", err)
	}
	return slices.DeleteFunc(ids, func(id string) bool { return given[id] }), nil
}

// lacksIntents tells whether one of the newest intents that the node put into the database is missing in its journal, where every intent is first: then
// the journal is an older copy of itself, or another process ran beside it from one. Those from before the newest acknowledgement are forgiven.
func lacksIntents(ctx context.Context, record WriterRecord, keys *db.MACKeys, j *journal.Journal, node string) (bool, error) {
	newest, err := newestIntents(ctx, record, keys, node)
	if err != nil || len(newest) == 0 {
		return false, err
	}
	var forgiven time.Time
	err = j.Select(journal.Query{Kinds: []journal.Kind{journal.KindAudit}, Event: journalAcknowledged}, func(e journal.Entry) error {
		forgiven = e.Time
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("comparing the journal with the database: %w", err)
	}
	missing := map[string]bool{}
	for _, i := range newest {
		if i.Created.After(forgiven) {
			missing[hex.EncodeToString(i.Serial)] = true
		}
	}
	since, until := newest[len(newest)-1].Created.Add(-journalSlack), newest[0].Created.Add(journalSlack)
	found := errors.New("found")
	err = j.Select(journal.Query{Kinds: []journal.Kind{journal.KindIntent}, Since: since, Until: until}, func(e journal.Entry) error {
		var i struct {
			Serial string `json:"serial"`
		}
		if err := e.Decode(&i); err != nil {
			return err
		}
		if delete(missing, i.Serial); len(missing) == 0 {
			return found
		}
		return nil
	})
	if err != nil && !errors.Is(err, found) {
		return false, fmt.Errorf("comparing the journal with the database: %w", err)
	}
	return len(missing) > 0, nil
}

// newestIntents returns the newest intents that the node wrote itself, newest first: those of others are few unless somebody else writes to the database.
func newestIntents(ctx context.Context, record WriterRecord, keys *db.MACKeys, node string) ([]db.Intent, error) {
	for limit := journalDepth; ; limit *= 4 {
		rows, err := record.IntentsAfter(ctx, node, time.Now().Add(-journalSpan), limit)
		if err != nil {
			return nil, err
		}
		own := slices.DeleteFunc(slices.Clone(rows), func(i db.Intent) bool { return keys.Verify(&i) != nil })
		switch {
		case len(own) >= journalDepth || len(rows) < limit:
			return own[:min(len(own), journalDepth)], nil
		case limit >= mostForged:
			return nil, fmt.Errorf("comparing the journal with the database: it holds %d intents in the name of %s that no CA node wrote, newer than enough of its own: see docs/runbooks/forged-intent.md",
				len(rows)-len(own), node)
		}
	}
}
