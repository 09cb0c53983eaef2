package journal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
)

// held is what is remembered of a held record.
type held struct {
	owner, incarnation string
	n                  uint64
	chain              []byte
	lane, kind         string
	seq                uint64
}

// readHeld returns what a held record says of its stream.
func readHeld(payload []byte) (*held, error) {
	var p Held
	if err := json.Unmarshal(payload, &p); err != nil {
		return nil, fmt.Errorf("decoding a held record: %w", err)
	}
	return heldOf(&p)
}

func heldOf(p *Held) (*held, error) {
	a, ok := skim(p.Record)
	if !ok {
		var d struct {
			Lane string `json:"lane"`
			Kind string `json:"kind"`
			Seq  uint64 `json:"seq"`
		}
		if err := json.Unmarshal(p.Record, &d); err != nil {
			return nil, fmt.Errorf("decoding record %d of %s/%s: %w", p.N, p.Owner, p.Incarnation, err)
		}
		a.Lane, a.Seq, a.Kind = d.Lane, d.Seq, d.Kind
	}
	return &held{owner: p.Owner, incarnation: p.Incarnation, n: p.N, chain: p.Chain, lane: a.Lane, seq: a.Seq, kind: a.Kind}, nil
}

// streams are what a journal holds for others. A start reads the newest seal's, and not the records.
type streams struct {
	byKey map[[2]string]*Stream
	order [][2]string
}

func newStreams() streams { return streams{byKey: map[[2]string]*Stream{}} }

func (s *streams) add(h *held) {
	if h == nil {
		return
	}
	k := [2]string{h.owner, h.incarnation}
	t := s.byKey[k]
	if t == nil {
		t = &Stream{Owner: h.owner, Incarnation: h.incarnation, Lanes: map[string]uint64{}}
		s.byKey[k], s.order = t, append(s.order, k)
	}
	t.N, t.Chain = h.n, bytes.Clone(h.chain)
	if h.lane != "" {
		t.Lanes[h.lane] = max(t.Lanes[h.lane], h.seq)
	}
}

func (s *streams) list() []Stream {
	out := make([]Stream, 0, len(s.order)) // never nil: it was counted
	for _, k := range s.order {
		t := *s.byKey[k]
		t.Lanes = maps.Clone(t.Lanes)
		out = append(out, t)
	}
	return out
}

func (s *streams) resume(list []Stream) {
	*s = newStreams()
	for _, t := range slices.Clone(list) {
		k := [2]string{t.Owner, t.Incarnation}
		t.Lanes = maps.Clone(t.Lanes)
		if t.Lanes == nil {
			t.Lanes = map[string]uint64{}
		}
		s.byKey[k], s.order = &t, append(s.order, k)
	}
}

// count reads what is held in segments up to number that were sealed before seals said so.
func (j *Journal) count(number uint64) error {
	q := Query{Kinds: []Kind{KindHeld}}
	end := tip{number: number}
	return j.cat.walk(&q, &end, func(e Entry) error {
		h, err := readHeld(e.Payload)
		if err == nil {
			j.fold.streams.add(h)
		}
		return err
	})
}
