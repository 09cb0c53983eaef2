package journal

import (
	"encoding/hex"
	"slices"
	"time"
)

// tally counts what a seal says of its segment.
type tally struct {
	records     uint64
	kinds       map[string]uint64
	runs        []run
	lanes       map[string]Range
	held        map[string]uint64
	first, last time.Time
	began       time.Time // time of the first record
}

type run struct {
	incarnation [16]byte
	first, last uint64
	until       time.Time
}

func newTally() *tally {
	return &tally{kinds: map[string]uint64{}, lanes: map[string]Range{}, held: map[string]uint64{}}
}

// doneKind is how Seal.Kinds names a kind of done.
func doneKind(kind string) string { return KindDone.String() + " " + kind }

// heldKind is how it names the kind of done that is held.
func heldKind(kind string) string { return KindHeld.String() + " " + kind }

// auditEvent is how it names an event.
func auditEvent(event string) string { return KindAudit.String() + " " + event }

func (t *tally) add(e Entry, a about) {
	if n := len(t.runs) - 1; n >= 0 && t.runs[n].incarnation == e.Incarnation {
		t.runs[n].last, t.runs[n].until = e.Offset, e.Time
	} else {
		t.runs = append(t.runs, run{incarnation: e.Incarnation, first: e.Offset, last: e.Offset, until: e.Time})
	}
	if e.Kind == KindSeal || e.Kind == KindCarry {
		return
	}
	if t.records++; t.records == 1 {
		t.first, t.last, t.began = e.Time, e.Time, e.Time
	}
	if e.Time.Before(t.first) {
		t.first = e.Time
	}
	if e.Time.After(t.last) {
		t.last = e.Time
	}
	t.kinds[e.Kind.String()]++
	if e.Kind == KindAudit && a.Event != "" {
		t.kinds[auditEvent(a.Event)]++
	}
	if h := a.held; h != nil {
		t.kinds[heldKind(h.kind)]++
		if h.lane != "" {
			t.held[h.lane] = max(t.held[h.lane], h.seq)
		}
	}
	if e.Kind != KindDone {
		return
	}
	t.kinds[doneKind(a.Kind)]++
	r, ok := t.lanes[a.Lane]
	if !ok {
		r = Range{First: a.Seq, Last: a.Seq}
	}
	t.lanes[a.Lane] = Range{First: min(r.First, a.Seq), Last: max(r.Last, a.Seq)}
}

// seal makes the records that end the segment, written in one batch at the time now: what is open, and the Seal.
func (j *Journal) seal(now time.Time) ([]Record, error) {
	recs, err := j.fold.carry()
	if err != nil {
		return nil, err
	}
	t := j.tally
	s := Seal{
		Node: j.cfg.Node, Segment: j.number, Prev: j.prev[:], Records: t.records, Kinds: t.kinds, First: t.first.UTC(), Last: t.last.UTC(),
		Lanes: t.lanes, Released: j.fold.newest(), CRLs: j.fold.crls, Round: j.fold.round,
		Streams: j.fold.streams.list(), Promises: j.fold.promises, Held: t.held,
	}
	if now.Before(s.First) {
		s.First = now.UTC()
	}
	if now.After(s.Last) {
		s.Last = now.UTC()
	}
	for _, r := range t.runs {
		s.Runs = append(s.Runs, Run{Incarnation: hex.EncodeToString(r.incarnation[:]), First: r.first, Last: r.last, Until: r.until.UTC()})
	}
	s.Runs[len(s.Runs)-1].Last = j.next + uint64(len(recs)) // the segment's last record is of this incarnation: see due
	last, err := New(s)
	if err != nil {
		return nil, err
	}
	return append(recs, last), nil
}

// holds tells whether the segment has the record.
func (s *Seal) holds(p Place) bool {
	id := hex.EncodeToString(p.Incarnation[:])
	return slices.ContainsFunc(s.Runs, func(r Run) bool { return r.Incarnation == id && r.First <= p.Offset && p.Offset <= r.Last })
}

// mayHold tells whether the segment may have records that q selects. It never says no wrongly.
func (s *Seal) mayHold(q *Query) bool {
	done := s.Kinds[KindDone.String()] > 0 &&
		(len(q.Done) == 0 || slices.ContainsFunc(q.Done, func(k string) bool { return s.Kinds[doneKind(k)] > 0 }))
	some := len(q.Kinds) == 0 && (len(q.Done) == 0 || done) || slices.ContainsFunc(q.Kinds, func(k Kind) bool {
		return k == KindSeal || k == KindCarry || k == KindDone && done || k != KindDone && s.Kinds[k.String()] > 0
	})
	if !some {
		return false
	}
	if q.Held != "" && s.Kinds[heldKind(q.Held)] == 0 {
		return false
	}
	if q.Event != "" && s.Kinds[auditEvent(q.Event)] == 0 {
		return false
	}
	if q.Lane != "" {
		if r, ok := s.Lanes[q.Lane]; !ok || r.Last <= q.After {
			return false
		}
	}
	return (q.Since.IsZero() || !s.Last.Before(q.Since)) && (q.Until.IsZero() || s.First.Before(q.Until))
}
