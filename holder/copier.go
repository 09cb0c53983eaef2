package holder

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// ErrNoHolder is in the chain of Wait's error when no other node has the records yet. They are sent again until one has.
var ErrNoHolder = errors.New("no other node holds a copy")

// ErrOldRound is in the chain of Wait's error when another node is in a later recovery round than this one.
var ErrOldRound = errors.New("another node is in a later recovery round")

// ErrDiverged is what CopierConfig.Fatal is called with when a holder has other records of this incarnation: another process runs as this
// node, from a copy of its directory, or this one began from a snapshot.
var ErrDiverged = errors.New("a holder has other records of this incarnation: another process runs with a copy of this node's directory, or this node was restored from a snapshot")

const (
	keepRecords  = 4096 // of the newest records stay in memory; older ones are read from the journal
	firstRest    = 500 * time.Millisecond
	oldRoundRest = 20 * time.Millisecond
	longestRest  = 5 * time.Second // how long a peer that failed is left alone
	idleEvery    = time.Second     // how often a peer that lags is looked after while nothing is released
	knownFor     = 5 * time.Second // after that long without a word a peer is asked what it has: it may have started anew
)

// Peer is another CA node.
type Peer struct {
	Name    string `yaml:"name"`
	Address string `yaml:"address"` // host:port of its API listener
}

// CopierConfig is what a Copier needs. Timeout, Log and Metrics have defaults.
type CopierConfig struct {
	Incarnation string        // this node's, lower-case hex
	Peers       []Peer        // in order of preference
	Client      *http.Client  // speaks mTLS to CA nodes alone
	Timeout     time.Duration // for one batch at one peer; default 250ms
	Round       func() uint64 // recovery round that this node is in
	// CopyRequired tells every peer that this node releases nothing without a copy: see Batch.
	CopyRequired bool
	Log          *slog.Logger
	Metrics      prometheus.Registerer // nil: none

	// Records calls fn with the payload of this incarnation's done records from number from on, in order.
	Records func(from uint64, fn func(n uint64, record []byte) error) error
	// Fatal is called with ErrDiverged: the process must end.
	Fatal func(error)
}

// Copier sends this incarnation's done records to one other node at a time, in order and without gaps. It is safe for concurrent use.
type Copier struct {
	cfg     CopierConfig
	copies  *prometheus.CounterVec
	lagging prometheus.Gauge
	holding prometheus.Gauge

	mu      sync.Mutex
	log     []record // the newest, without gaps
	n       uint64   // number of the last
	chain   []byte   // up to it
	tickets []*Ticket
	wake    chan struct{}
	told    int    // peers that know whether this node requires copies
	held    uint64 // highest number that any peer holds
	holder  string // who; "" while nobody is known to

	// Owned by Run.
	peers   []*peer
	current int
}

type record struct {
	n       uint64
	payload []byte
	before  []byte // chain up to the one before
}

type peer struct {
	Peer
	known bool // n and chain are what it has
	told  bool // it knows whether this node requires copies
	n     uint64
	chain []byte
	rest  time.Duration
	until time.Time // not asked before
	cause error
	heard time.Time // when it answered last
}

// Ticket is a run of records on its way.
type Ticket struct {
	last uint64
	done chan struct{}
	err  error
}

// NewCopier returns a Copier; Run it.
func NewCopier(cfg CopierConfig) (*Copier, error) {
	if cfg.Client == nil || cfg.Round == nil || cfg.Records == nil || cfg.Fatal == nil || cfg.Incarnation == "" {
		return nil, errors.New("holder: a mandatory field of CopierConfig is missing")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 250 * time.Millisecond
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	c := &Copier{cfg: cfg, wake: make(chan struct{}, 1),
		copies: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_ca_copies_total",
			Help: "Batches of released records sent to a second holder, by result: held, failed, old-round, passed-over."}, []string{"result"}),
		lagging: prometheus.NewGauge(prometheus.GaugeOpts{Name: "trivet_ca_copies_lag_records", Help: "Released records that no other node holds."}),
		holding: prometheus.NewGauge(prometheus.GaugeOpts{Name: "trivet_ca_copies_holder", Help: "1 while another CA node takes copies of what this one releases."}),
	}
	for _, p := range cfg.Peers {
		c.peers = append(c.peers, &peer{Peer: p})
	}
	if cfg.Metrics != nil {
		for _, m := range []prometheus.Collector{c.copies, c.lagging, c.holding} {
			if err := cfg.Metrics.Register(m); err != nil {
				return nil, fmt.Errorf("registering metrics: %w", err)
			}
		}
	}
	return c, nil
}

// Add hands over the records that follow the last ones; first is the number of the first. Calls must be in order of the numbers.
func (c *Copier) Add(first uint64, payloads [][]byte) (*Ticket, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if first != c.n+1 {
		return nil, fmt.Errorf("copying released records: record %d does not follow %d", first, c.n)
	}
	for _, p := range payloads {
		c.n++
		c.log = append(c.log, record{n: c.n, payload: p, before: c.chain})
		c.chain = Chain(c.chain, p)
	}
	if extra := len(c.log) - keepRecords; extra > keepRecords/4 {
		c.log = append([]record(nil), c.log[extra:]...)
	}
	c.lagging.Set(float64(c.n - min(c.n, c.held)))
	t := &Ticket{last: c.n, done: make(chan struct{})}
	if len(c.peers) == 0 {
		t.end(fmt.Errorf("%w: no peers are configured", ErrNoHolder))
		return t, nil
	}
	c.tickets = append(c.tickets, t)
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return t, nil
}

func (t *Ticket) end(err error) {
	t.err = err
	close(t.done)
}

// Wait returns nil once another node holds the ticket's records durably. It returns within a few hundred milliseconds, or when ctx ends.
func (c *Copier) Wait(ctx context.Context, t *Ticket) error {
	timer := time.NewTimer(2 * c.cfg.Timeout)
	defer timer.Stop()
	select {
	case <-t.done:
		return t.err
	case <-timer.C:
		return fmt.Errorf("%w: no answer in time", ErrNoHolder)
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrNoHolder, ctx.Err())
	}
}

// Holder returns who holds this incarnation's records, "" if nobody is known to, and how many no other node has.
func (c *Copier) Holder() (name string, lag uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.holder, c.n - min(c.n, c.held)
}

// Run sends until ctx ends; it then returns nil.
func (c *Copier) Run(ctx context.Context) error {
	tick := time.NewTicker(idleEvery)
	defer tick.Stop()
	for c.catchUp(ctx); ; {
		select {
		case <-ctx.Done():
			c.finish(func(*Ticket) bool { return true }, fmt.Errorf("%w: this node is stopping", ErrNoHolder))
			return nil
		case <-c.wake:
		case <-tick.C:
			for _, p := range c.peers {
				p.known = p.known && time.Since(p.heard) < knownFor
			}
		}
		c.catchUp(ctx)
		c.tell(ctx)
	}
}

// Told reports whether every peer knows whether this incarnation requires copies.
func (c *Copier) Told() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.told == len(c.peers)
}

// tell asks the peers that have not heard of this incarnation what they have, and thereby tells them whether it requires copies.
func (c *Copier) tell(ctx context.Context) {
	for _, p := range c.peers {
		if p.told || time.Now().Before(p.until) || ctx.Err() != nil {
			continue
		}
		p.known = false
		if err := c.sendTo(ctx, p); err != nil && ctx.Err() == nil {
			c.fail(p, err)
		}
	}
}

// catchUp sends until some peer has everything, or none can be reached.
func (c *Copier) catchUp(ctx context.Context) {
	for ctx.Err() == nil {
		c.mu.Lock()
		n := c.n
		c.mu.Unlock()
		p := c.choose()
		if p == nil {
			c.mu.Lock()
			c.holder = ""
			c.holding.Set(0)
			c.mu.Unlock()
			if failed := c.finish(func(*Ticket) bool { return true }, fmt.Errorf("%w: %w", ErrNoHolder, c.causes())); failed > 0 {
				c.copies.WithLabelValues("passed-over").Add(float64(failed))
			}
			return
		}
		if p.known && p.n >= n {
			return
		}
		if err := c.sendTo(ctx, p); err != nil {
			if ctx.Err() != nil {
				return
			}
			c.fail(p, err)
		}
	}
}

// choose returns the peer that is sent to now: the one before, unless it rests.
func (c *Copier) choose() *peer {
	now := time.Now()
	for i := range c.peers {
		at := (c.current + i) % len(c.peers)
		if p := c.peers[at]; !now.Before(p.until) {
			c.current = at
			return p
		}
	}
	return nil
}

func (c *Copier) causes() error {
	var errs []error
	for _, p := range c.peers {
		errs = append(errs, fmt.Errorf("%s: %w", p.Name, p.cause))
	}
	return errors.Join(errs...)
}

func (c *Copier) fail(p *peer, err error) {
	p.cause, p.known = err, false
	if p.rest == 0 {
		p.rest = firstRest
		c.cfg.Log.Warn("a peer does not take copies of what this node releases", "peer", p.Name, "address", p.Address, "err", err)
	} else {
		p.rest = min(2*p.rest, longestRest)
	}
	p.until = time.Now().Add(p.rest)
	c.copies.WithLabelValues("failed").Inc()
}

// sendTo asks a peer what it has, or sends it what comes next.
func (c *Copier) sendTo(ctx context.Context, p *peer) error {
	round := c.cfg.Round()
	b := Batch{Incarnation: c.cfg.Incarnation, Round: round, CopyRequired: c.cfg.CopyRequired, Records: []json.RawMessage{}}
	timeout := c.cfg.Timeout
	var err error
	if p.known {
		var behind bool
		if b.Records, behind, err = c.next(p); err != nil {
			return err
		}
		b.From, b.After = p.n+1, p.chain
		if behind {
			timeout *= 8 // nobody waits for records of long ago
		}
	}
	sctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tip, err := send(sctx, c.cfg.Client, p.Address, b)
	if err != nil {
		return err
	}
	p.heard = time.Now()
	switch tip.Reason {
	case "", ReasonGap:
		if err := c.verify(tip); errors.Is(err, ErrDiverged) {
			c.diverged(p, err)
			return err
		} else if err != nil {
			return err
		}
		if !p.known && p.rest > 0 {
			c.cfg.Log.Info("a peer takes copies again", "peer", p.Name, "has", tip.N)
		}
		p.known, p.n, p.chain = true, tip.N, tip.Chain
		p.rest, p.cause = 0, nil
		if !p.told {
			p.told = true
			c.mu.Lock()
			c.told++
			c.mu.Unlock()
		}
		if tip.Reason == "" && len(b.Records) > 0 {
			c.copies.WithLabelValues("held").Inc()
		}
		c.hold(p)
	case ReasonOldRound:
		c.copies.WithLabelValues("old-round").Inc()
		c.finish(func(*Ticket) bool { return true }, fmt.Errorf("%w: %s is in round %d, this node in %d", ErrOldRound, p.Name, tip.Round, round))
		p.until, p.cause = time.Now().Add(oldRoundRest), fmt.Errorf("it is in round %d, this node in %d", tip.Round, round)
	default:
		err := fmt.Errorf("%w (%s: %s at record %d)", ErrDiverged, p.Name, tip.Reason, tip.N)
		c.diverged(p, err)
		return err
	}
	return nil
}

func (c *Copier) diverged(p *peer, err error) {
	c.cfg.Log.Error("copies diverge", "peer", p.Name, "err", err)
	c.cfg.Fatal(err)
}

// hold notes what a peer has.
func (c *Copier) hold(p *peer) {
	c.mu.Lock()
	if c.held = max(c.held, p.n); p == c.peers[c.current] {
		c.holder = p.Name
		c.holding.Set(1)
	}
	c.lagging.Set(float64(c.n - min(c.n, c.held)))
	c.mu.Unlock()
	c.finish(func(t *Ticket) bool { return t.last <= p.n }, nil)
}

// finish ends the tickets that match and returns how many.
func (c *Copier) finish(match func(*Ticket) bool, err error) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	var keep []*Ticket
	for _, t := range c.tickets {
		if match(t) {
			t.end(err)
		} else {
			keep = append(keep, t)
		}
	}
	ended := len(c.tickets) - len(keep)
	c.tickets = keep
	return ended
}

// next returns the records that follow what a peer has. behind says that they were read from the journal.
func (c *Copier) next(p *peer) (records []json.RawMessage, behind bool, err error) {
	const most = MaxBytes / 4
	size := 0
	c.mu.Lock()
	if len(c.log) > 0 && p.n+1 >= c.log[0].n {
		for _, r := range c.log[p.n+1-c.log[0].n:] {
			if size += len(r.payload); len(records) == MaxRecords || size > most && len(records) > 0 {
				break
			}
			records = append(records, r.payload)
		}
		c.mu.Unlock()
		return records, false, nil
	}
	c.mu.Unlock()
	err = c.cfg.Records(p.n+1, func(_ uint64, payload []byte) error {
		if size += len(payload); len(records) == MaxRecords || size > most && len(records) > 0 {
			return errEnough
		}
		records = append(records, payload)
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return nil, true, fmt.Errorf("reading what the peer lacks: %w", err)
	}
	if len(records) == 0 {
		return nil, true, fmt.Errorf("record %d is not in this node's journal", p.n+1)
	}
	return records, true, nil
}

var errEnough = errors.New("enough")

// verify compares a holder's tip with this node's own records.
func (c *Copier) verify(tip Tip) error {
	c.mu.Lock()
	n, first := c.n, uint64(0)
	var want []byte
	known := false
	switch {
	case tip.N == n:
		want, known = c.chain, true
	case len(c.log) > 0 && tip.N < n && tip.N+1 >= c.log[0].n:
		want, known = c.log[tip.N+1-c.log[0].n].before, true
	case len(c.log) > 0:
		first = c.log[0].n
	}
	c.mu.Unlock()
	if tip.N > n {
		return fmt.Errorf("%w: it has %d records, this node %d", ErrDiverged, tip.N, n)
	}
	if !known && first > 0 {
		err := c.cfg.Records(1, func(n uint64, payload []byte) error {
			if n > tip.N {
				return errEnough
			}
			want = Chain(want, payload)
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			return fmt.Errorf("reading this node's records: %w", err)
		}
	}
	if !bytes.Equal(want, tip.Chain) {
		return fmt.Errorf("%w: record %d differs", ErrDiverged, tip.N)
	}
	return nil
}
