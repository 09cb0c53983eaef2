package journal

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Query selects records: those for which everything that is given holds. The zero value selects all.
type Query struct {
	Kinds  []Kind    // of one of these kinds
	Done   []string  // of done records only those of one of these kinds: DoneCert, DoneAbandoned, DoneRevocation; without Kinds, no others
	Lane   string    // done records of this lane alone …
	After  uint64    // … with a greater seq
	Event  string    // audit records of this event alone
	Held   string    // held records of this kind of done alone
	Here   bool      // not those in segments that the archive alone has
	Serial string    // records about this serial, lower-case hex; of any issuer
	Since  time.Time // written at this time or later, by the clock of who wrote
	Until  time.Time // written before this time
	From   *Place    // after this record; ErrNoPlace if there is none
}

// wants tells whether e is selected.
func (q *Query) wants(e Entry) (bool, error) {
	switch {
	case q.Event != "" && e.Kind != KindAudit,
		q.Held != "" && e.Kind != KindHeld,
		len(q.Kinds) > 0 && !slices.Contains(q.Kinds, e.Kind),
		(q.Lane != "" || len(q.Done) > 0 && len(q.Kinds) == 0) && e.Kind != KindDone,
		!q.Since.IsZero() && e.Time.Before(q.Since),
		!q.Until.IsZero() && !e.Time.Before(q.Until):
		return false, nil
	case q.Lane == "" && len(q.Done) == 0 && q.Serial == "" && q.Event == "" && q.Held == "":
		return true, nil
	}
	a, err := e.about()
	return err == nil &&
		(q.Lane == "" || a.Lane == q.Lane && a.Seq > q.After) &&
		(len(q.Done) == 0 || e.Kind != KindDone || slices.Contains(q.Done, a.Kind)) &&
		(q.Event == "" || a.Event == q.Event) &&
		(q.Held == "" || a.held != nil && a.held.kind == q.Held) &&
		(q.Serial == "" || a.Serial == q.Serial || e.Kind == KindAudit && strings.HasSuffix(a.Object, ":"+q.Serial)), err
}

// Select calls fn with the records that q selects, oldest first, of those durable when it is called. It reads only segments that may hold such
// records, and fails with ErrArchived if one of them is not here any more. Records of one lane come in the order they were journalled, which need
// not be that of seq, and one may come more than once: what is released again is journalled again. Otherwise it is Replay.
func (j *Journal) Select(q Query, fn func(Entry) error) error {
	tip := j.durable()
	return j.cat.walk(&q, &tip, fn)
}

// Replay calls fn with every record durable when it is called, of all incarnations, oldest first, that is still here. Appending may go on
// meanwhile. An error of fn ends it at once. An entry's payload may be kept.
func (j *Journal) Replay(fn func(Entry) error) error {
	tip := j.durable()
	return j.cat.walk(nil, &tip, fn)
}

// State returns what a start needs to know of everything that is journalled. It reads nothing from the disk.
func (j *Journal) State() (State, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.fold.state()
}

// Lanes returns the numbers that the journal holds done records of, by lane. The first call reads every index.
func (j *Journal) Lanes() (map[string]Range, error) {
	lanes := map[string]Range{}
	add := func(more map[string]Range) {
		for lane, r := range more {
			if before, ok := lanes[lane]; ok {
				r = Range{First: min(r.First, before.First), Last: max(r.Last, before.Last)}
			}
			lanes[lane] = r
		}
	}
	for _, s := range j.cat.all() {
		if err := j.cat.know(&s); err != nil {
			return nil, fmt.Errorf("reading journal: %w", err)
		}
		if s.seal != nil {
			add(s.seal.Lanes)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	add(j.tally.lanes)
	return lanes, nil
}

// Incarnation is one start of the node.
type Incarnation struct {
	ID    [16]byte
	Until time.Time // time of its newest record
}

// Incarnations returns all of this journal, oldest first; the last is the present one. The first call reads every index.
func (j *Journal) Incarnations() ([]Incarnation, error) {
	var all []Incarnation
	add := func(id [16]byte, until time.Time) {
		if n := len(all) - 1; n >= 0 && all[n].ID == id {
			all[n].Until = until
			return
		}
		all = append(all, Incarnation{id, until})
	}
	for _, s := range j.cat.all() {
		if err := j.cat.know(&s); err != nil {
			return nil, fmt.Errorf("reading journal: %w", err)
		}
		if s.seal == nil {
			continue
		}
		for _, r := range s.seal.Runs {
			id, err := hex.DecodeString(r.Incarnation)
			if err != nil || len(id) != 16 {
				return nil, fmt.Errorf("reading journal: %w: the seal of segment %d names incarnation %q", ErrCorrupt, s.number, r.Incarnation)
			}
			add([16]byte(id), r.Until)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, r := range j.tally.runs {
		add(r.incarnation, r.until)
	}
	return all, nil
}
