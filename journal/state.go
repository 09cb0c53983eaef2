package journal

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"
)

// KeepReleased is how many of the newest released certificates a State names.
const KeepReleased = 64

// State is what a start needs to know of all that was journalled before. It is carried from seal to seal, so that a start reads no further back than
// the newest one.
type State struct {
	Open     []Pending         // intents without done or void, not settled since; oldest first
	Released []Done            // the newest done records of certificates, without DER; oldest first, at most KeepReleased
	CRLs     map[string]uint64 // highest CRL number by issuer
	Round    json.RawMessage   // payload of the newest round record, or nil
	Streams  []Stream          // what is held for others, oldest first
	Promises map[string]string // by owner: incarnation since which it requires copies
}

// Pending is an intent whose fate is not journalled.
type Pending struct {
	Intent Intent
	Time   time.Time // when it was journalled
}

// fold makes a State out of one record after another.
type fold struct {
	open     map[string]openIntent // by issuer:serial
	opened   uint64                // how many were ever opened: their order
	released []Done
	crls     map[string]uint64
	round    json.RawMessage
	streams  streams
	promises map[string]string
}

type openIntent struct {
	order       uint64
	incarnation [16]byte
	time        time.Time
	payload     []byte
}

func newFold() *fold {
	return &fold{open: map[string]openIntent{}, crls: map[string]uint64{}, promises: map[string]string{}, streams: newStreams()}
}

// add takes e, of which a is known; see about.
func (f *fold) add(e Entry, a about) {
	switch e.Kind {
	case KindHeld:
		f.streams.add(a.held)
	case KindPromise:
		if a.Object != "" {
			f.promises[a.Owner] = a.Object
		} else {
			delete(f.promises, a.Owner)
		}
	case KindIntent:
		f.opened++
		f.open[a.id()] = openIntent{order: f.opened, incarnation: e.Incarnation, time: e.Time, payload: bytes.Clone(e.Payload)}
	case KindVoid:
		delete(f.open, a.id())
	case KindDone:
		delete(f.open, a.id())
		if a.Kind != DoneCert {
			return
		}
		f.released = append(f.released, Done{Issuer: a.Issuer, Serial: a.Serial, Ver: a.Ver, Lane: a.Lane, Seq: a.Seq, Kind: a.Kind})
		if len(f.released) >= 4*KeepReleased { // not at every record
			f.released = slices.Clone(f.newest())
		}
	case KindSettled:
		maps.DeleteFunc(f.open, func(_ string, o openIntent) bool { return o.incarnation != e.Incarnation })
	case KindCRL:
		f.crls[a.Issuer] = max(f.crls[a.Issuer], a.Number)
	case KindRound:
		f.round = bytes.Clone(e.Payload)
	}
}

func (f *fold) newest() []Done { return f.released[max(0, len(f.released)-KeepReleased):] }

func (f *fold) inOrder() []openIntent {
	return slices.SortedFunc(maps.Values(f.open), func(a, b openIntent) int { return int(a.order) - int(b.order) })
}

func (f *fold) state() (State, error) {
	s := State{Released: slices.Clone(f.newest()), CRLs: maps.Clone(f.crls), Round: f.round, Streams: f.streams.list(), Promises: maps.Clone(f.promises)}
	for _, o := range f.inOrder() {
		var i Intent
		if err := json.Unmarshal(o.payload, &i); err != nil {
			return State{}, fmt.Errorf("decoding an intent record: %w", err)
		}
		s.Open = append(s.Open, Pending{Intent: i, Time: o.time})
	}
	return s, nil
}

// carrySize is how many bytes of open intents go into one carry record, about.
const carrySize = 1 << 20

// carry returns records that hold what is open.
func (f *fold) carry() ([]Record, error) {
	var recs []Record
	var c Carry
	size := 0
	flush := func() error {
		if len(c.Open) == 0 {
			return nil
		}
		r, err := New(c)
		recs, c, size = append(recs, r), Carry{}, 0
		return err
	}
	for _, o := range f.inOrder() {
		if size += len(o.payload); size > carrySize {
			if err := flush(); err != nil {
				return nil, err
			}
		}
		c.Open = append(c.Open, Carried{Incarnation: hex.EncodeToString(o.incarnation[:]), Time: o.time.UTC(), Intent: o.payload})
	}
	return recs, flush()
}

// resume takes over what a seal and the carry records before it say.
func (f *fold) resume(s *Seal, carried []Carry) error {
	f.released, f.round = s.Released, s.Round
	if s.CRLs != nil {
		f.crls = maps.Clone(s.CRLs)
	}
	f.streams.resume(s.Streams)
	if s.Promises != nil {
		f.promises = maps.Clone(s.Promises)
	}
	for _, c := range carried {
		for _, o := range c.Open {
			e := Entry{Time: o.Time, Record: Record{Kind: KindIntent, Payload: o.Intent}}
			id, err := hex.DecodeString(o.Incarnation)
			if err != nil || len(id) != 16 {
				return fmt.Errorf("%w: a carried intent of incarnation %q", ErrCorrupt, o.Incarnation)
			}
			e.Incarnation = [16]byte(id)
			a, err := e.about()
			if err != nil {
				return err
			}
			f.add(e, a)
		}
	}
	return nil
}
