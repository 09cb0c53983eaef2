package ocsp

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"trivet/db"
)

const (
	pollEvery   = 100 * time.Millisecond
	pollSpacing = 10 * time.Millisecond // the least time between two polls, however many ask
	pollTimeout = 2500 * time.Millisecond
	pageSize    = 1000 // rows of one lane

	// recheckEvery is how often lanes that have ended are looked at again: a row beyond an end is an alarm.
	recheckEvery = time.Minute

	// avoidFor is how long a database node that diverged is left alone before it is tried again.
	avoidFor = 10 * time.Second
)

var (
	// errUnread means a row that this version must understand and does not.
	errUnread = errors.New("feed holds a row that this version cannot read: upgrade this node")
	// errSuperseded means that another process has registered under this node's name.
	errSuperseded = errors.New("another process has registered under this node's name: stop one of the two")
)

// divergence means that a database node's history is not a continuation of what was applied: of lane, up to seq.
type divergence struct {
	lane string
	seq  uint64
	what string
}

func (d *divergence) Error() string { return "feed diverges: lane " + d.lane + " " + d.what }

// Head is one causal reading of the record.
type Head struct {
	// Rows beyond the vector asked with, in order of seq within each lane.
	Rows []db.FeedRow
	// More says that there are further rows: nothing follows from this reading but its rows.
	More bool
	// Round says whether a recovery round is under way: then the database may lack revocations that were acknowledged.
	Round db.RoundState
	// Member is this node's newest row in va_member; nil when there is none.
	Member *db.Member
}

// position is how far a lane was applied.
type position struct {
	seq    uint64
	chain  [32]byte
	closed bool
}

// follower applies the change feed, lane by lane, in contiguous prefixes whose hashes extend one another, and holds
// the lease. It is safe for concurrent use.
type follower struct {
	record      Record
	incarnation [16]byte
	clock       func() (time.Duration, error)
	lease       *lease
	catalog     *catalog
	changed     func(is *issuer, s Serial) // the status of a serial changed
	log         *slog.Logger
	metrics     *metrics

	kick   chan struct{}
	joined atomic.Bool  // everything up to one moment was applied at least once
	asked  atomic.Int64 // CLOCK_BOOTTIME before the last complete reading; 0 is none

	registered uint32        // number of this process's newest row in va_member; owned by run
	avoid      string        // database node that diverged; owned by run
	avoidUntil time.Duration // CLOCK_BOOTTIME; owned by run
	recheckAt  time.Duration // CLOCK_BOOTTIME; owned by run

	mu       sync.Mutex
	lanes    map[string]*position // mu
	started  uint64               // mu: readings begun
	finished uint64               // mu: the newest reading that ended
	last     error                // mu: how it ended
	ended    chan struct{}        // mu: closed and replaced at the end of every reading
	halted   error                // mu: why this node must not say good any more; final
	diverged string               // mu: last divergence, for the health report; empty when the last reading was well
}

// run follows the feed until ctx ends. The first thing it does is to register.
func (f *follower) run(ctx context.Context) error {
	for {
		f.mu.Lock()
		f.started++
		n := f.started
		f.mu.Unlock()

		err := f.advance(ctx)

		f.mu.Lock()
		f.finished = n
		if f.last == nil && err != nil && ctx.Err() == nil {
			f.log.Warn("change feed not read, trying again", "err", err)
		} else if f.last != nil && err == nil {
			f.log.Info("change feed is read again")
		}
		f.last = err
		close(f.ended)
		f.ended = make(chan struct{})
		f.mu.Unlock()

		if !f.sleep(ctx) {
			return nil
		}
	}
}

// sleep waits for the next poll: at once when asked, but never sooner than pollSpacing.
func (f *follower) sleep(ctx context.Context) bool {
	least := time.NewTimer(pollSpacing)
	defer least.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-least.C:
	}
	most := time.NewTimer(pollEvery - pollSpacing)
	defer most.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-f.kick:
	case <-most.C:
	}
	return true
}

// advance reads until nothing is left and, if all went well, extends the lease from before the last question.
func (f *follower) advance(ctx context.Context) error {
	if f.registered == 0 {
		if err := f.register(ctx); err != nil {
			return err
		}
	}
	except, second := "", false
	for {
		asked, err := f.clock() // before asking: whatever is acknowledged later is not vouched for
		if err != nil {
			return err
		}
		if except == "" && asked < f.avoidUntil {
			except = f.avoid
		}
		recheck := asked >= f.recheckAt
		head, node, err := f.read(ctx, except, recheck)
		if err != nil {
			return err
		}
		if err := f.apply(head.Rows); err != nil {
			var d *divergence
			if !errors.As(err, &d) {
				return err
			}
			f.record.Accuse(node, d.lane, d.seq)
			f.metrics.divergences.Inc()
			f.log.Error("database node has another history than what this node applied: rebuild it by full state transfer",
				"database", node, "err", err)
			f.setDiverged(fmt.Sprintf("database node %s: %v", node, err))
			f.avoid, f.avoidUntil = node, asked+avoidFor
			if second {
				return err
			}
			except, second = node, true
			continue
		}
		if head.More {
			continue
		}
		again, err := f.checkMembership(ctx, head.Member)
		if err != nil {
			return err
		}
		if again {
			continue // only a reading that begins after the registration counts
		}
		if recheck {
			f.recheckAt = asked + recheckEvery
		}
		if node == f.avoid || asked >= f.avoidUntil {
			f.setDiverged("")
		}
		// While the database may lack what was acknowledged, only a node whose lease has never run out since goes on: every
		// acknowledgement waited for it, so that it has what is lost. Any other waits until it has been put back.
		if !head.Round.Open() && !f.lease.valid() {
			return fmt.Errorf("recovery round %d is under way, and this node may not have all that was acknowledged before", head.Round.N)
		}
		f.lease.extend(asked)
		f.asked.Store(int64(asked))
		if !f.joined.Swap(true) {
			f.log.Info("joined: every fact is applied", "lanes", len(f.vector()))
		}
		return nil
	}
}

func (f *follower) read(ctx context.Context, except string, recheck bool) (Head, string, error) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	vector := f.vector()
	if !recheck {
		f.mu.Lock()
		for name, p := range f.lanes {
			if p.closed {
				vector[name] = LaneEnded
			}
		}
		f.mu.Unlock()
	}
	f.metrics.polls.Inc()
	head, node, err := f.record.Head(ctx, except, vector, pageSize)
	if err != nil {
		f.metrics.pollFailures.Inc()
		return Head{}, node, fmt.Errorf("reading the change feed: %w", err)
	}
	return head, node, nil
}

// register makes this process the member of its name. Revocations committed from now on wait for it.
func (f *follower) register(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	n, err := f.record.Join(ctx)
	if err != nil {
		return fmt.Errorf("registering as a member: %w", err)
	}
	f.registered = n
	f.log.Info("registered as a member", "n", n)
	return nil
}

// leave ends the membership of this process, if it has one. It must come after run.
func (f *follower) leave(ctx context.Context) error {
	if f.registered == 0 || errors.Is(f.stopped(), errSuperseded) {
		return nil
	}
	if err := f.record.Leave(ctx, f.registered); err != nil {
		return fmt.Errorf("ending the membership: %w", err)
	}
	return nil
}

// checkMembership decides what the newest membership row means. again is true when this process had to register anew.
func (f *follower) checkMembership(ctx context.Context, m *db.Member) (again bool, err error) {
	f.mu.Lock()
	err = f.halted
	f.mu.Unlock()
	mine := m != nil && bytes.Equal(m.Incarnation, f.incarnation[:])
	switch {
	case err != nil:
		return false, err
	case m != nil && m.Event == memberIn && mine && m.N == f.registered:
		return false, nil
	case m != nil && m.Event == memberIn && !mine && m.N > f.registered:
		f.halt(errSuperseded)
		return false, errSuperseded
	}
	// Counted out, or the database lost the row.
	f.lease.end()
	f.log.Warn("no longer a member, registering again")
	return true, f.register(ctx)
}

// apply takes contiguous prefixes. It stops at the first row that does not continue its lane.
func (f *follower) apply(rows []db.FeedRow) error {
	for i := range rows {
		if err := f.applyRow(&rows[i]); err != nil {
			return err
		}
	}
	return nil
}

func (f *follower) applyRow(row *db.FeedRow) error {
	f.mu.Lock()
	lane := position{}
	if p := f.lanes[row.Lane]; p != nil {
		lane = *p
	}
	f.mu.Unlock()
	switch {
	case row.Seq <= lane.seq:
		return nil // seen
	case lane.closed:
		return &divergence{row.Lane, lane.seq, fmt.Sprintf("has row %d beyond its end %d", row.Seq, lane.seq)}
	case row.Seq != lane.seq+1:
		return &divergence{row.Lane, lane.seq, fmt.Sprintf("has a hole between %d and %d", lane.seq, row.Seq)}
	}
	chain := db.ChainHash(lane.chain, *row)
	if chain != row.Chain {
		return &divergence{row.Lane, lane.seq, fmt.Sprintf("row %d does not extend the hash chain", row.Seq)}
	}
	closed, err := f.merge(row)
	if err != nil {
		err = fmt.Errorf("lane %s row %d: %w", row.Lane, row.Seq, err)
		f.halt(err)
		return err
	}
	// Only now may anybody believe that the row is applied.
	f.mu.Lock()
	f.lanes[row.Lane] = &position{seq: row.Seq, chain: chain, closed: closed}
	f.mu.Unlock()
	f.metrics.applied.Inc()
	return nil
}

// merge lets a row take effect.
func (f *follower) merge(row *db.FeedRow) (closed bool, err error) {
	var p db.FeedPayload
	switch row.Kind {
	case db.FeedClosed:
		return true, nil
	case db.FeedGeneration, db.FeedResponder, db.FeedCRL:
		f.catalog.changed()
		return false, nil
	case db.FeedCert, db.FeedAbandoned, db.FeedRevocation:
		if p, err = row.Decode(); err != nil {
			return false, fmt.Errorf("%w: %w", errUnread, err)
		}
	default:
		if row.Kind&db.FeedCritical != 0 {
			return false, fmt.Errorf("%w: kind %#x", errUnread, uint8(row.Kind))
		}
		return false, nil // somebody else's concern
	}
	serial, ok := MakeSerial(row.Serial)
	if !ok {
		return false, fmt.Errorf("%w: serial %q", errUnread, hex.EncodeToString(row.Serial))
	}
	is := f.catalog.issuer(row.Issuer)
	var shown bool
	switch row.Kind {
	case db.FeedCert:
		shown = is.table.MergeOutcome(serial, Outcome{Ver: max(p.Ver, 1), NotAfter: p.NotAfter})
	case db.FeedAbandoned:
		// The feed gives no date: never valid is revoked since 1970-01-01, as RFC 6960 2.2 has it for what was not issued.
		shown = is.table.MergeOutcome(serial, Outcome{Ver: max(p.Ver, 1), Abandoned: true, Date: p.Date})
	case db.FeedRevocation:
		ev := Event{N: p.N, Reason: p.Reason, Date: p.Date}
		switch p.Event {
		case db.EventRevoke, db.EventReasonChange:
			ev.Kind = EventRevoke
		case db.EventHold:
			ev.Kind = EventHold
		case db.EventRelease:
			ev.Kind = EventRelease
		}
		if ev.Kind == 0 || ev.N == 0 {
			return false, fmt.Errorf("%w: revocation event %q number %d", errUnread, p.Event, p.N)
		}
		shown = is.table.MergeEvent(serial, ev)
	}
	if shown {
		f.changed(is, serial)
	}
	return false, nil
}

// halt ends this node's right to say good, for good: only a restart, as another version perhaps, gives it back.
func (f *follower) halt(why error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lease.end()
	if f.halted == nil {
		f.halted = why
		f.log.Error("good is no longer answered", "err", why)
	}
}

func (f *follower) setDiverged(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.diverged = what
}

// stopped returns why good must not be answered, whatever the lease and the policy.
func (f *follower) stopped() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.halted
}

// state returns the last divergence, and how the last reading ended.
func (f *follower) state() (diverged string, last error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.diverged, f.last
}

// vector returns how far each lane is applied.
func (f *follower) vector() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := make(map[string]uint64, len(f.lanes))
	for name, p := range f.lanes {
		v[name] = p.seq
	}
	return v
}

// lag returns the age of the moment up to which everything is applied; -1 s before the first.
func (f *follower) lag() time.Duration {
	asked := f.asked.Load()
	now, err := f.clock()
	if asked == 0 || err != nil {
		return -time.Second
	}
	return now - time.Duration(asked)
}

func (f *follower) hurry() {
	select {
	case f.kick <- struct{}{}:
	default:
	}
}

// poll returns nil when a reading that began after the call has ended well.
func (f *follower) poll(ctx context.Context) error {
	f.mu.Lock()
	want := f.started + 1
	for f.finished < want {
		ended := f.ended
		f.mu.Unlock()
		f.hurry()
		select {
		case <-ended:
		case <-ctx.Done():
			return fmt.Errorf("waiting for a causal read: %w", ctx.Err())
		}
		f.mu.Lock()
	}
	err := f.last
	f.mu.Unlock()
	return err
}

// applied waits until the row is applied or ctx ends, and returns how far the lane is.
func (f *follower) applied(ctx context.Context, lane string, seq uint64) (uint64, bool) {
	for {
		f.mu.Lock()
		var at uint64
		if p := f.lanes[lane]; p != nil {
			at = p.seq
		}
		ended := f.ended
		f.mu.Unlock()
		if at >= seq {
			return at, true
		}
		f.hurry()
		select {
		case <-ended:
		case <-ctx.Done():
			return at, false
		}
	}
}
