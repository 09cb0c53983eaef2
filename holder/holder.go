// Package holder keeps a second copy of what a CA node has released. A Copier sends a node's done records to another CA node, whose Holder
// appends them to a journal of its own and answers when they are durable: a commit that the database lost and a node whose disk is gone are
// then survivable together (protocols §2 step 7, §3).
package holder

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"trivet/journal"
)

const (
	// MaxRecords and MaxBytes bound one Batch.
	MaxRecords = 1000
	MaxBytes   = 32 << 20
)

// Batch is a run of an owner's done records. An empty one asks for the Tip.
type Batch struct {
	Incarnation string            `json:"incarnation"` // of the owner, lower-case hex
	Round       uint64            `json:"round"`       // recovery round that the owner is in
	From        uint64            `json:"from"`        // number of the first record
	After       []byte            `json:"after"`       // chain up to the record before it
	Records     []json.RawMessage `json:"records"`
	// CopyRequired is the owner's promise that it releases nothing that no holder has. It is absent rather than false, so that
	// holders of an older version take batches of owners that promise nothing.
	CopyRequired bool `json:"copy_required,omitempty"`
}

// Tip is how far a holder has an incarnation's records, and why it took no more.
type Tip struct {
	N      uint64 `json:"n"`
	Chain  []byte `json:"chain"` // empty before the first record
	Round  uint64 `json:"round"` // recovery round that the holder is in
	Reason string `json:"reason,omitempty"`
}

// Reasons of a Tip.
const (
	ReasonGap      = "gap"       // the batch does not begin after N
	ReasonChain    = "chain"     // what came before is not what the holder has: two processes run as one incarnation
	ReasonOldRound = "old-round" // the owner has not entered the recovery round that the holder is in
)

// Chain extends an incarnation's hash chain by a record.
func Chain(before, record []byte) []byte {
	h := sha256.New()
	h.Write(before)
	h.Write(record)
	return h.Sum(nil)
}

// Config is what a Holder needs.
type Config struct {
	Dir  string // of its own journal; created if its parent exists
	Node string // this node's name
	Log  *slog.Logger

	// Round is asked around every appending: it keeps this node from entering another recovery round until leave is called, and
	// returns the round that it is in.
	Round func() (round uint64, leave func())

	// Keep is how long records are held at least; default 90 days. It must be above the age of the oldest backup that the database may be put
	// back to. Afterwards they go when Recorded says that the record has the lanes up to these numbers; without Recorded none ever goes.
	Keep     time.Duration
	Recorded func(ctx context.Context, lanes map[string]uint64) (bool, error)

	SegmentSize int64 // of its journal; default as there

	now func() time.Time // in tests
}

// Holder keeps the records of other nodes. It is safe for concurrent use.
type Holder struct {
	cfg Config
	log *journal.Journal

	mu       sync.Mutex
	streams  map[streamKey]*stream
	newest   map[string]string // incarnation of each owner that was heard of last for the first time
	promises map[string]string // by owner: incarnation since which it releases nothing without a copy

	promising sync.Mutex // one promise at a time, until it is durable
}

type streamKey struct{ owner, incarnation string }

// stream is what is held of one incarnation. mu also keeps appends in order.
type stream struct {
	mu    sync.Mutex
	n     uint64
	chain []byte
	lanes map[string]uint64 // highest seq of each lane that its records name
}

// defaultKeep is above the age of any backup that a database is put back to.
const defaultKeep = 90 * 24 * time.Hour

// Open opens the holder's journal. It reads what was written since the newest segment was sealed, and none of the records before.
func Open(cfg Config) (*Holder, error) {
	if cfg.Round == nil {
		return nil, errors.New("holder: Config.Round is missing")
	}
	if cfg.Keep == 0 {
		cfg.Keep = defaultKeep
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.now == nil {
		cfg.now = time.Now
	}
	h := &Holder{cfg: cfg, streams: map[streamKey]*stream{}, newest: map[string]string{}}
	c := journal.Config{Dir: cfg.Dir, Node: cfg.Node, Log: cfg.Log, SegmentSize: cfg.SegmentSize, Now: cfg.now}
	if cfg.Recorded != nil {
		c.Drop = h.drop
	}
	var err error
	if h.log, err = journal.Open(c); err != nil {
		return nil, fmt.Errorf("opening the copies held for other nodes: %w", err)
	}
	state, err := h.log.State()
	if err != nil {
		h.log.Close()
		return nil, fmt.Errorf("reading the copies held for other nodes: %w", err)
	}
	h.promises = state.Promises
	for _, s := range state.Streams {
		h.streams[streamKey{s.Owner, s.Incarnation}] = &stream{n: s.N, chain: s.Chain, lanes: s.Lanes}
		h.newest[s.Owner] = s.Incarnation
	}
	return h, nil
}

// drop tells whether the records of a segment are needed no more: they are old, and the record has all that they tell of.
func (h *Holder) drop(ctx context.Context, s journal.Seal) bool {
	if h.cfg.now().Sub(s.Last) <= h.cfg.Keep {
		return false
	}
	recorded, err := h.cfg.Recorded(ctx, s.Held)
	if err != nil || !recorded {
		h.cfg.Log.Warn("copies held for other nodes are kept for longer: the record does not show all of them", "segment", s.Segment, "err", err)
		return false
	}
	h.cfg.Log.Info("copies held for other nodes are needed no more", "segment", s.Segment, "records", s.Records, "last", s.Last)
	return true
}

// Failed is closed when nothing more can be held: see journal.Journal.Failed.
func (h *Holder) Failed() <-chan struct{} { return h.log.Failed() }

// Close gives the journal up.
func (h *Holder) Close() error { return h.log.Close() }

func (h *Holder) stream(owner, incarnation string) *stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	k := streamKey{owner, incarnation}
	s := h.streams[k]
	if s == nil {
		s = &stream{lanes: map[string]uint64{}}
		h.streams[k] = s
		h.newest[owner] = incarnation
	}
	return s
}

func (s *stream) take(chain []byte, d journal.Done) {
	s.n, s.chain = s.n+1, chain
	if d.Lane != "" {
		s.lanes[d.Lane] = max(s.lanes[d.Lane], d.Seq)
	}
}

// Put appends a batch of the owner's and returns when it is durable. The Tip's Reason says why nothing of it was taken. An error means that
// the batch makes no sense, or that the journal has failed.
func (h *Holder) Put(owner string, b Batch) (Tip, error) {
	if raw, err := hex.DecodeString(b.Incarnation); err != nil || len(raw) != 16 || owner == "" {
		return Tip{}, fmt.Errorf("holding records of %q: malformed incarnation", owner)
	}
	if len(b.Records) > MaxRecords {
		return Tip{}, fmt.Errorf("holding records of %s: %d records, at most %d", owner, len(b.Records), MaxRecords)
	}
	dones := make([]journal.Done, len(b.Records))
	for i, r := range b.Records {
		if err := json.Unmarshal(r, &dones[i]); err != nil {
			return Tip{}, fmt.Errorf("holding records of %s: record %d: %w", owner, b.From+uint64(i), err)
		}
		if dones[i].N != b.From+uint64(i) {
			return Tip{}, fmt.Errorf("holding records of %s: record %d says that it is record %d", owner, b.From+uint64(i), dones[i].N)
		}
	}
	s := h.stream(owner, b.Incarnation)
	s.mu.Lock()
	defer s.mu.Unlock()
	// The round last, so that nothing that waits stands in its way.
	round, leave := h.cfg.Round()
	defer leave()
	tip := Tip{N: s.n, Chain: s.chain, Round: round}
	switch {
	case b.Round < round:
		tip.Reason = ReasonOldRound
	case len(b.Records) == 0:
	case b.From != s.n+1:
		tip.Reason = ReasonGap
	case !bytes.Equal(b.After, s.chain):
		tip.Reason = ReasonChain
	}
	if tip.Reason == ReasonOldRound || tip.Reason == ReasonChain {
		return tip, nil
	}
	err := h.promise(owner, b)
	if err != nil {
		return Tip{}, err
	}
	if tip.Reason != "" || len(b.Records) == 0 {
		return tip, nil
	}
	chain, chains := s.chain, make([][]byte, len(b.Records))
	records := make([]journal.Record, len(b.Records))
	for i, r := range b.Records {
		chain = Chain(chain, r)
		chains[i] = chain
		if records[i], err = journal.New(journal.Held{Owner: owner, Incarnation: b.Incarnation, N: b.From + uint64(i), Chain: chain, Record: r}); err != nil {
			return Tip{}, err
		}
	}
	if err := h.log.Append(records...); err != nil {
		return Tip{}, fmt.Errorf("holding records of %s: %w", owner, err)
	}
	for i, d := range dones {
		s.take(chains[i], d)
	}
	return Tip{N: s.n, Chain: s.chain, Round: round}, nil
}

// Each calls fn with every record that is still held, oldest first in each incarnation. An error of fn ends it.
func (h *Holder) Each(fn func(owner, incarnation string, d journal.Done) error) error {
	return h.each(func(held journal.Held, d journal.Done) error { return fn(held.Owner, held.Incarnation, d) })
}

// Blocks is Each for blocks of keys, which it finds without reading the rest.
func (h *Holder) Blocks(fn func(d journal.Done) error) error {
	return h.log.Select(journal.Query{Kinds: []journal.Kind{journal.KindHeld}, Held: journal.DoneBlock, Here: true}, decoded(func(_ journal.Held, d journal.Done) error { return fn(d) }))
}

func (h *Holder) each(fn func(journal.Held, journal.Done) error) error {
	return h.log.Replay(decoded(fn))
}

func decoded(fn func(journal.Held, journal.Done) error) func(journal.Entry) error {
	return func(e journal.Entry) error {
		if e.Kind != journal.KindHeld {
			return nil
		}
		var held journal.Held
		if err := e.Decode(&held); err != nil {
			return err
		}
		var d journal.Done
		if err := json.Unmarshal(held.Record, &d); err != nil {
			return fmt.Errorf("decoding record %d of %s/%s: %w", held.N, held.Owner, held.Incarnation, err)
		}
		return fn(held, d)
	}
}

// Lanes returns the highest number in each lane that any record held names.
func (h *Holder) Lanes() map[string]uint64 {
	out := map[string]uint64{}
	for _, s := range h.all() {
		s.mu.Lock()
		for lane, seq := range s.lanes {
			out[lane] = max(out[lane], seq)
		}
		s.mu.Unlock()
	}
	return out
}

// promise notes durably whether the owner releases anything without a copy. A batch of an incarnation that another has followed comes late, and
// renews nothing.
func (h *Holder) promise(owner string, b Batch) error {
	h.promising.Lock()
	defer h.promising.Unlock()
	h.mu.Lock()
	_, ok := h.promises[owner]
	late := h.newest[owner] != b.Incarnation
	h.mu.Unlock()
	if ok == b.CopyRequired || late && b.CopyRequired {
		return nil
	}
	p := journal.Promise{Owner: owner, Incarnation: b.Incarnation, CopyRequired: b.CopyRequired}
	record, err := journal.New(p)
	if err == nil {
		err = h.log.Append(record)
	}
	if err != nil {
		return fmt.Errorf("holding what %s promises: %w", owner, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.CopyRequired {
		h.promises[owner] = p.Incarnation
	} else {
		delete(h.promises, owner)
	}
	return nil
}

// Promised returns the incarnation since which the owner has released nothing that no holder has. ok is false if it promises no such thing: then
// it may have released what is not among the copies here, nor anywhere else but on its own disk.
func (h *Holder) Promised(owner string) (since string, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	since, ok = h.promises[owner]
	return since, ok
}

func (h *Holder) all() []*stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]*stream, 0, len(h.streams))
	for _, s := range h.streams {
		out = append(out, s)
	}
	return out
}
