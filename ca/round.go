package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/db"
	"trivet/holder"
	"trivet/journal"
)

// Copies gives what this node releases to a second holder; *holder.Copier is it. Add takes records in the order of their numbers, and Wait says
// within a fraction of a second whether another node holds them durably: holder.ErrNoHolder and holder.ErrOldRound are in its errors' chains.
type Copies interface {
	Add(first uint64, payloads [][]byte) (*holder.Ticket, error)
	Wait(ctx context.Context, t *holder.Ticket) error
	Told() bool // every peer knows whether this node requires copies
}

// Held is what this node keeps for others; *holder.Holder is it.
type Held interface {
	Each(fn func(owner, incarnation string, d journal.Done) error) error
	Blocks(fn func(d journal.Done) error) error
	Lanes() map[string]uint64
	Promised(owner string) (since string, ok bool)
}

// RoundRecord is what Rounds asks of the database; *db.Store is it.
type RoundRecord interface {
	Regress() (signs uint64, cause string)
	Nodes() []db.NodeHealth
	RoundState(ctx context.Context) (db.RoundState, error)
	Round(ctx context.Context, n uint64) (*db.RoundReport, error)
	BeginRound(ctx context.Context, r db.Round) error
	EndRound(ctx context.Context, r db.RoundEnd) error
	AppendRecon(ctx context.Context, r db.Recon) error
	LaneTips(ctx context.Context, lanes []string) (map[string]db.LaneTip, error)
	OpenLanes(ctx context.Context) ([]db.LaneInfo, error)
	Writers(ctx context.Context, node string) ([]db.Writer, error)
	OpenLane(ctx context.Context, node string, incarnation [16]byte, index int) (*db.Lane, error)
	CloseLane(ctx context.Context, lane, by string) (bool, error)
	CloseLanes(ctx context.Context, node string, except [16]byte, by string) (int, error)
	CertificatesByKey(ctx context.Context, keys []db.CertificateKey) ([]db.Certificate, error)
	ReadBack(ctx context.Context, except string, reqs [][]byte) (rows []db.Issued, node string, err error)
	RevocationsOf(ctx context.Context, keys []db.CertificateKey) ([]db.Revocation, error)
	NextCRL(ctx context.Context, q db.Querier, issuer string, shard uint32) (db.CRLTip, error)
	InsertCRL(ctx context.Context, c db.CRL) error
	TBS(ctx context.Context, issuer string, serial []byte) ([]byte, error)
	blockRecord
}

// RoundsConfig is what Rounds needs. Fields without a default are mandatory.
type RoundsConfig struct {
	Node    string
	Store   RoundRecord
	Journal *journal.Journal
	Copies  Copies      // nil: nothing is copied
	Held    Held        // nil: nothing is held for others
	Peers   []string    // names of the other CA nodes, whether they live or not
	MACKeys *db.MACKeys // those of the engine; mandatory

	// RequireCopy has nothing released that no second holder has, however many database nodes confirm. Peers are promised it, and only because
	// of that may their copies speak for this node. Whether Copies says so too is up to the caller.
	RequireCopy     bool
	AllowSingleCopy bool          // release with one database node left and no second holder
	Absent          time.Duration // how long a round waits for a node before the copies held for it speak in its place; default 10s
	GiveUp          time.Duration // how long for one of which no copies are held, if nothing is known to be lost; default 30s
	Settle          time.Duration // how long after a round what was under way when it began is given up; must be above any batch's time; default 20s
	Every           time.Duration // how often the database is looked at; default 1s

	Positions func(ctx context.Context) (map[string]map[string]uint64, error) // how far each responder has each lane; nil: not compared
	Fatal     func(error)                                                     // the process must end; mandatory
	Boottime  func() time.Duration                                            // default CLOCK_BOOTTIME
	Log       *slog.Logger                                                    // default slog.Default
	Metrics   prometheus.Registerer                                           // nil: none
}

// Rounds is this node's part in recovery rounds (protocols §3), and in making sure that what it releases survives. Nothing is released
// while a round is under way, and nothing that was read before one is released after it. It is safe for concurrent use.
type Rounds struct {
	cfg    RoundsConfig
	record RoundRecord
	kick   chan struct{}

	entered chan struct{} // closed once this node is in the newest round and has put back what it knew at its start

	// lock is the release lock: held for reading from the comparison of rounds until a release is on record, and for writing while
	// another round is entered.
	lock  sync.RWMutex
	n     uint64 // round that this node is in
	ready bool   // it has put back what its journals hold

	numbering sync.Mutex // numbers follow one another in the order in which they are handed to Copies
	number    uint64

	mu       sync.Mutex
	lanes    []*movingLane
	ended    uint64        // newest round that this node has seen end, as its journal says
	promised bool          // peers may believe that this node requires copies, as its journal says
	state    db.RoundState // as last read
	saw      time.Time     // when the newest round was first seen
	signs    uint64        // of Regress, seen
	waiting  []string      // what the round waits for
	putBack  putBack       // in this round
	passed   time.Time     // when the last release without a copy was reported
	compared time.Time     // when everything was last compared with the database
	entry    time.Time     // when this node entered the round
	// settle, unless nil, buries what the journal has of before the round and the database has not; unsettled says that it is due.
	settle    func(ctx context.Context, before time.Time) error
	unsettled bool

	conflicts, restored prometheus.Counter
	begun               *prometheus.CounterVec
	uncovered           prometheus.Gauge
	gauge               *prometheus.GaugeVec
}

// NewRounds returns a Rounds. It reads the journal, and the database only in Run.
func NewRounds(cfg RoundsConfig) (*Rounds, error) {
	if cfg.RequireCopy && (cfg.AllowSingleCopy || cfg.Copies == nil || len(cfg.Peers) == 0) {
		return nil, errors.New("ca: a node that requires copies needs a peer, and cannot allow single ones")
	}
	if cfg.Node == "" || cfg.Store == nil || cfg.Journal == nil || cfg.MACKeys == nil || cfg.Fatal == nil {
		return nil, errors.New("ca: a mandatory field of RoundsConfig is missing")
	}
	setDefault(&cfg.Absent, 10*time.Second)
	setDefault(&cfg.GiveUp, 30*time.Second)
	setDefault(&cfg.Settle, 20*time.Second)
	setDefault(&cfg.Every, time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Boottime == nil {
		cfg.Boottime = boottime
	}
	r := &Rounds{cfg: cfg, record: cfg.Store, kick: make(chan struct{}, 1), entered: make(chan struct{}),
		conflicts: prometheus.NewCounter(prometheus.CounterOpts{Name: "trivet_ca_recovery_conflicts_total",
			Help: "Released facts that contradict what the database holds: the operators must look."}),
		restored: prometheus.NewCounter(prometheus.CounterOpts{Name: "trivet_ca_recovery_restored_total",
			Help: "Facts that the database had lost and this node put back."}),
		begun: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_ca_recovery_begun_total",
			Help: "Recovery rounds that this node began, because a loss of commits was proved or suspected."}, []string{"loss"}),
		uncovered: prometheus.NewGauge(prometheus.GaugeOpts{Name: "trivet_ca_recovery_uncovered_nodes",
			Help: "Absent CA nodes that the recovery round waits for because nobody can tell what they released."}),
		gauge: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "trivet_ca_recovery_round",
			Help: "Newest recovery round (what=begun), the newest that ended (ended), and the one that this node has done its part in (done)."}, []string{"what"}),
	}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{r.conflicts, r.restored, r.gauge, r.begun, r.uncovered} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("registering metrics: %w", err)
			}
		}
	}
	for _, loss := range []string{"proved", "suspected"} {
		r.begun.WithLabelValues(loss)
	}
	// From the start: what is held for others depends on it.
	var err error
	if r.n, err = r.readJournal(); err == nil && cfg.RequireCopy && !r.promised {
		r.promised = true // on record before anybody is told
		err = r.note(r.n, "")
	}
	return r, err
}

// Enter keeps this node from entering another round until leave is called, and returns the round that it is in: for holder.Config.
func (r *Rounds) Enter() (round uint64, leave func()) {
	r.lock.RLock()
	return r.n, r.lock.RUnlock
}

// Current returns the round that this node is in.
func (r *Rounds) Current() uint64 {
	r.lock.RLock()
	defer r.lock.RUnlock()
	return r.n
}

// reading is when and in which round something was read that is to be released.
type reading struct {
	began time.Duration // boottime before the question
	state db.RoundState
}

// now begins a reading; its state is what the database answers.
func (r *Rounds) now() reading {
	if r == nil {
		return reading{}
	}
	return reading{began: r.cfg.Boottime()}
}

// reads is now for what is read without its round: the round is asked for first, and a loss after that is seen by its signs, or by the round.
func (r *Rounds) reads(ctx context.Context) (reading, error) {
	at := r.now()
	if r == nil {
		return at, nil
	}
	state, err := r.record.RoundState(ctx)
	if err != nil {
		return at, databaseError("reading which recovery round there is", err)
	}
	return at.in(state), nil
}

func (at reading) in(s db.RoundState) reading { at.state = s; return at }

// err says why nothing may be released now; nil if it may.
func (r *Rounds) err() error {
	if r == nil {
		return nil
	}
	r.lock.RLock()
	n, ready := r.n, r.ready
	r.lock.RUnlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.explain(n, ready, r.state)
}

func (r *Rounds) explain(n uint64, ready bool, state db.RoundState) error {
	switch {
	case state.N < n:
		return unavailable(DatabaseUnavailable, nil, "the database has gone back to before recovery round %d: what it lost is being put back, repeat the request", n)
	case !ready && n == 0 && state.N == 0:
		return unavailable(DatabaseUnavailable, nil, "this node has just started and still compares its journal with the database: repeat the request")
	case state.N > n, !ready:
		return unavailable(DatabaseUnavailable, nil, "recovery round %d: this node puts back what the database may have lost; repeat the request", max(n, state.N))
	case !state.Open():
		wait := ""
		if len(r.waiting) > 0 {
			wait = ", waiting for " + strings.Join(r.waiting, ", ")
		}
		return unavailable(DatabaseUnavailable, nil, "recovery round %d is under way%s: repeat the request", n, wait)
	}
	return nil
}

// Complete runs read, which asks the database, and says whether what it found may lack something, or show a certificate as it was before it was
// revoked: it does while a recovery round is under way, or about to begin. Whoever promises all there is asks so. Rounds may be nil: then it is read
// alone.
func (r *Rounds) Complete(ctx context.Context, read func() error) error {
	if r == nil {
		return read()
	}
	const doing = "reading which recovery round there is"
	before, err := r.record.RoundState(ctx)
	if err != nil {
		return databaseError(doing, err)
	}
	if err := read(); err != nil {
		return err
	}
	after, err := r.record.RoundState(ctx)
	if err != nil {
		return databaseError(doing, err)
	}
	r.lock.RLock()
	defer r.lock.RUnlock()
	if err := r.current(reading{state: before}); err != nil {
		return err
	}
	return r.current(reading{state: after})
}

// still says whether what was read may be shown without a record of it. Rounds may be nil: then it always may.
func (r *Rounds) still(at reading) error {
	if r == nil {
		return nil
	}
	r.lock.RLock()
	defer r.lock.RUnlock()
	return r.current(at)
}

// done is step 7: the facts, as they were read back, go to the journal and to a second holder, unless a recovery round has begun since. A nil
// error is leave to release them. Rounds may be nil: then it is the journal alone.
func (r *Rounds) done(ctx context.Context, log journalWriter, at reading, dones ...*journal.Done) error {
	if r == nil {
		records := make([]journal.Record, len(dones))
		for i, d := range dones {
			var err error
			if records[i], err = journal.New(*d); err != nil {
				return err
			}
		}
		return log.Append(records...)
	}
	r.lock.RLock()
	defer r.lock.RUnlock()
	if err := r.current(at); err != nil {
		return unknown(err)
	}
	ticket, err := r.write(log, at.state.N, dones)
	if err != nil {
		return err
	}
	if err := r.copied(ctx, ticket, len(dones)); err != nil {
		return unknown(err)
	}
	// However long this process was paused: the others wait for it for as long before they go on without it.
	if r.cfg.Boottime()-at.began > r.cfg.Absent/2 {
		r.hurry()
		return unavailable(OutcomeUnknown, nil, "this node was held up for too long to know what happened meanwhile: repeat the request")
	}
	return nil
}

// unknown says of a refusal that comes after the fact was committed that its fate is open.
func unknown(err error) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	open := *e
	open.Name = OutcomeUnknown
	return &open
}

// current compares rounds. The caller holds the release lock.
func (r *Rounds) current(at reading) error {
	// Asked after the reading: a sign is there before a node that came back is read from, but Run has not acted on it.
	signs, cause := r.record.Regress()
	r.mu.Lock()
	defer r.mu.Unlock()
	if signs > r.signs {
		r.hurry()
		return unavailable(DatabaseUnavailable, nil, "the database may have lost commits: %s; a recovery round is about to begin, repeat the request", cause)
	}
	if at.state.N == r.n && r.ready && at.state.Open() {
		return nil
	}
	r.hurry()
	return r.explain(r.n, r.ready, at.state)
}

// putBackRound keeps the rounds that records name: what is put back was released earlier.
const putBackRound = math.MaxUint64

// write numbers the facts, hands them to Copies, and returns when they are durable here.
func (r *Rounds) write(log journalWriter, round uint64, dones []*journal.Done) (*holder.Ticket, error) {
	records := make([]journal.Record, len(dones))
	payloads := make([][]byte, len(dones))
	var ticket *holder.Ticket
	r.numbering.Lock()
	first := r.number + 1
	for i, d := range dones {
		if d.N = first + uint64(i); round != putBackRound {
			d.Round = round
		}
		record, err := journal.New(*d)
		if err != nil {
			r.numbering.Unlock()
			return nil, err
		}
		payloads[i], records[i] = record.Payload, record
	}
	r.number += uint64(len(dones))
	if r.cfg.Copies != nil {
		var err error
		if ticket, err = r.cfg.Copies.Add(first, payloads); err != nil {
			r.numbering.Unlock()
			return nil, err
		}
	}
	r.numbering.Unlock()
	if err := log.Append(records...); err != nil {
		return nil, JournalError(err, "this node cannot record what it does: repeat the request")
	}
	return ticket, nil
}

// copied waits until a second holder has the facts. Without one they are released while two database nodes confirm.
func (r *Rounds) copied(ctx context.Context, ticket *holder.Ticket, n int) error {
	if ticket == nil {
		return r.alone(errors.New("no peers are configured"))
	}
	err := r.cfg.Copies.Wait(ctx, ticket)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, holder.ErrOldRound):
		r.hurry()
		return unavailable(DatabaseUnavailable, err, "a recovery round has begun: repeat the request")
	}
	if err := r.alone(err); err != nil {
		return err
	}
	r.mu.Lock()
	quiet := time.Since(r.passed) < 10*time.Second
	if !quiet {
		r.passed = time.Now()
	}
	r.mu.Unlock()
	if !quiet {
		r.cfg.Log.Error("certificates or revocations are released without a copy on another CA node: should the database and this node's disk be lost together, so are they",
			"records", n, "err", err)
	}
	return nil
}

// alone says whether this node's journal may be the only one that has what is released.
func (r *Rounds) alone(cause error) error {
	if r.cfg.RequireCopy {
		return unavailable(DatabaseUnavailable, cause, "no other CA node keeps a copy of what is released, and this node requires one: repeat the request")
	}
	r.mu.Lock()
	promised := r.promised
	r.mu.Unlock()
	if promised && r.cfg.Copies != nil && !r.cfg.Copies.Told() {
		return unavailable(DatabaseUnavailable, cause, "not every other CA node knows yet that this one requires copies no more: repeat the request")
	}
	if r.cfg.AllowSingleCopy {
		return nil
	}
	healthy := 0
	for _, n := range r.record.Nodes() {
		if n.Healthy {
			healthy++
		}
	}
	if healthy >= 2 {
		return nil
	}
	return unavailable(DatabaseUnavailable, cause, "one database node is left and no other CA node keeps a copy of what is released: repeat the request")
}

// hurry has the database looked at now.
func (r *Rounds) hurry() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// RoundStatus is how things stand, as this node sees it.
type RoundStatus struct {
	State   db.RoundState
	Entered uint64   // round that this node is in
	Ready   bool     // it has done its part
	Waiting []string // what the round waits for
	Settled bool     // nothing from before it is still open in this node's journal alone
	Err     error    // why nothing is released; nil if it is
	Alone   error    // why nothing would be released without a second holder; nil if it would
}

// Status returns it. It asks nobody.
func (r *Rounds) Status() RoundStatus {
	err := r.err()
	r.lock.RLock()
	s := RoundStatus{Entered: r.n, Ready: r.ready, Err: err, Alone: r.alone(nil)}
	r.lock.RUnlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Settled = !r.unsettled
	s.State, s.Waiting = r.state, append([]string(nil), r.waiting...)
	return s
}
