package ca

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"trivet/db"
)

const (
	// Lease is how long a responder may answer "good" after it last learnt every revocation there was.
	Lease = 5 * time.Second
	// LeaseMargin is what two clocks that both count CLOCK_BOOTTIME may drift apart during one lease.
	LeaseMargin = 500 * time.Millisecond

	pollWait      = time.Second            // how long a responder may hold a question until it can say yes
	pollSlack     = 500 * time.Millisecond // what the answer may take beyond that
	pollRetry     = 100 * time.Millisecond // pause after a question that failed
	memberEvery   = time.Second            // how often the list of responders is read, for addresses and "out" rows
	memberTimeout = 2 * time.Second        // for one reading or writing of it
)

// Words of the va_member chain.
const (
	memberOut    = "out"
	policyStrict = "strict"
)

// Position is a place in the change feed.
type Position struct {
	Lane string
	Seq  uint64
}

// Reach tells which responders a position has reached.
type Reach struct {
	Applied int      // responders that have applied it
	Lapsed  []string // responders that have not, and can no longer answer "good": their lease has run out
	Pending []string // responders that may still answer as before, "*" for those not known; nil once the position is effective everywhere
}

// Effective tells whether no responder can answer from before the position any more.
func (r Reach) Effective() bool { return len(r.Pending) == 0 }

// BarrierConfig is what a Barrier needs. Fields without a default are mandatory.
type BarrierConfig struct {
	Node    string        // this node's name, written into the rows of members found lapsed
	Members MemberChain   // *db.Store
	Client  *http.Client  // speaks mTLS to responders alone
	Lease   time.Duration // default Lease
	Margin  time.Duration // default LeaseMargin

	// Boottime is a clock that goes on during suspend and that nobody sets; only differences are used. Default CLOCK_BOOTTIME:
	// Go's own monotonic clock stands still in suspend, while a responder's lease must not.
	Boottime func() time.Duration
	Now      func() time.Time // for the time written into rows; default time.Now
	Log      *slog.Logger     // default slog.Default
}

// MemberChain is the list of responders, in the contract of *db.Store: Members is a causal read that returns the newest event of each
// member, and InsertMember fails with class Duplicate when another event took the number.
type MemberChain interface {
	Members(ctx context.Context) ([]db.Member, error)
	InsertMember(ctx context.Context, m db.Member) error
}

// Barrier finds out when a revocation is effective at every responder (protocols §5, form a). It is safe for concurrent use.
//
// A responder answers "good" for at most Lease after the moment before it last asked the database what there is. One that asked before
// the revocation was committed must fall silent within Lease of the commit; one that asked later knows the revocation. Hence at
// commit + Lease + Margin nobody says "good" any more, reached or not, provided that its policy is to fall silent. That holds as well for a process
// whose name another has taken over, and which therefore is asked no more.
type Barrier struct {
	cfg BarrierConfig

	mu     sync.Mutex
	latest map[string]db.Member     // newest known event of each member
	out    map[string]time.Duration // boottime at which a member's present "out" row was first seen here
	moved  map[string]move          // by member that came to another address
}

// move is that a process took the name of one at another address, which may live: it learns that it lost its name when it next asks the database,
// and until then has the lease it has. One at the same address has ended: two cannot listen there.
type move struct {
	from   string
	seen   time.Duration // boottime at which it was first seen here
	strict bool          // the older process falls silent with its lease
}

// NewBarrier returns a Barrier. It connects to nothing.
func NewBarrier(cfg BarrierConfig) (*Barrier, error) {
	if cfg.Members == nil || cfg.Client == nil || cfg.Node == "" {
		return nil, fmt.Errorf("ca: BarrierConfig needs Node, Members and Client")
	}
	setDefault(&cfg.Lease, Lease)
	setDefault(&cfg.Margin, LeaseMargin)
	if cfg.Boottime == nil {
		cfg.Boottime = boottime
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Barrier{cfg: cfg, latest: map[string]db.Member{}, out: map[string]time.Duration{}, moved: map[string]move{}}, nil
}

func boottime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic("reading CLOCK_BOOTTIME: " + err.Error()) // exists since Linux 2.6.39; no lease can be judged without it
	}
	return time.Duration(t.Nano())
}

// Run follows the list of responders until ctx ends, so that the time since a member went out is known when a revocation asks. It then
// returns nil. Wait works without it, only slower.
func (b *Barrier) Run(ctx context.Context) error {
	tick := time.NewTicker(memberEvery)
	defer tick.Stop()
	for {
		if _, err := b.members(ctx); err != nil && ctx.Err() == nil {
			b.cfg.Log.Debug("responders not read", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// members reads the newest event of every member.
func (b *Barrier) members(ctx context.Context) ([]db.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	rows, err := b.cfg.Members.Members(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the responders: %w", err)
	}
	seen := b.cfg.Boottime()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range rows {
		old, known := b.latest[m.VA]
		if known && old.N >= m.N {
			continue // a chain never goes back; this reading was overtaken
		}
		b.latest[m.VA] = m
		if m.Event == memberOut {
			b.out[m.VA] = seen
		} else {
			delete(b.out, m.VA)
			if m.Prior != "" && m.Prior != m.Address {
				b.moved[m.VA] = move{m.Prior, seen, m.PriorPolicy == policyStrict}
			}
		}
	}
	all := make([]db.Member, 0, len(b.latest))
	for _, m := range b.latest {
		all = append(all, m)
	}
	slices.SortFunc(all, func(x, y db.Member) int { return strings.Compare(x.VA, y.VA) })
	return all, nil
}

// wait is one member during one Wait.
type wait struct {
	db.Member
	lapse   time.Duration // boottime from which it counts as lapsed; never if zero
	applied bool
	older   bool // it has lost its name, so that its answer says nothing
}

// Positions asks every member that is in how far it has each lane. Those that do not answer within a second are left out.
func (b *Barrier) Positions(ctx context.Context) (map[string]map[string]uint64, error) {
	members, err := b.members(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, pollWait)
	defer cancel()
	var mu sync.Mutex
	var asking sync.WaitGroup
	out := map[string]map[string]uint64{}
	for _, m := range members {
		if m.Event == memberOut {
			continue
		}
		asking.Go(func() {
			vector, err := b.position(ctx, m)
			if err != nil {
				b.cfg.Log.Debug("responder not reached", "va", m.VA, "address", m.Address, "err", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			out[m.VA] = vector
		})
	}
	asking.Wait()
	return out, nil
}

func (b *Barrier) position(ctx context.Context, m db.Member) (map[string]uint64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+m.Address+"/internal/position", nil)
	if err != nil {
		return nil, err
	}
	res, err := b.cfg.Client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", res.StatusCode)
	}
	var answer struct {
		Vector map[string]uint64 `json:"vector"`
	}
	err = json.NewDecoder(io.LimitReader(res.Body, 16<<20)).Decode(&answer)
	return answer.Vector, err
}

// Wait returns when the position is effective at every responder, and otherwise when waiting longer cannot help or ctx ends. It must be
// called after the position was committed and read back. Members are read after that, so that one that joined in between is asked too.
func (b *Barrier) Wait(ctx context.Context, at Position) Reach {
	committed := b.cfg.Boottime()
	limit := committed + b.cfg.Lease + b.cfg.Margin
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	waits, err := b.register(ctx, committed, limit)
	if err != nil {
		return b.unknown(err)
	}
	applied := make(chan int)
	var polls sync.WaitGroup
	defer polls.Wait()
	defer cancel()
	for i := range waits {
		if waits[i].older {
			continue
		}
		polls.Go(func() {
			if b.poll(ctx, waits[i].VA, at) {
				select {
				case applied <- i:
				case <-ctx.Done():
				}
			}
		})
	}

	for {
		now := b.cfg.Boottime()
		next, open := limit, false
		for _, w := range waits {
			if w.applied || (w.lapse != 0 && now >= w.lapse) {
				continue
			}
			open = true
			if w.lapse != 0 {
				next = min(next, w.lapse)
			}
		}
		if !open || now >= limit {
			break
		}
		timer := time.NewTimer(next - now)
		select {
		case i := <-applied:
			waits[i].applied = true
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return b.reach(context.WithoutCancel(ctx), waits)
		}
		timer.Stop()
	}
	return b.reach(ctx, waits)
}

// register reads the members, again and again until limit, and says when each may be counted lapsed. Members that are out for longer
// than a lease are left out.
func (b *Barrier) register(ctx context.Context, committed, limit time.Duration) ([]wait, error) {
	for {
		rows, err := b.members(ctx)
		if err == nil {
			b.mu.Lock()
			defer b.mu.Unlock()
			var waits []wait
			for _, m := range rows {
				w := wait{Member: m}
				switch {
				case m.Event == memberOut:
					w.lapse = b.out[m.VA] + b.cfg.Lease + b.cfg.Margin
					if committed >= w.lapse {
						continue
					}
					w.lapse = min(w.lapse, limit)
				case m.Policy == policyStrict:
					w.lapse = limit
				}
				waits = append(waits, w)
				if older, until := b.older(m.VA); committed < until {
					older.lapse = min(older.lapse, limit)
					waits = append(waits, older)
				}
			}
			return waits, nil
		}
		if b.cfg.Boottime() >= limit {
			return nil, err
		}
		timer := time.NewTimer(pollRetry)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		case <-timer.C:
		}
	}
}

// older is the process that had a member's name at another address, and until when it may have a lease. One that does not fall silent with its lease makes
// revocations pending for as long, and is then left to whoever moved it. The caller holds b.mu.
func (b *Barrier) older(va string) (wait, time.Duration) {
	m, known := b.moved[va]
	if !known {
		return wait{}, 0
	}
	until := m.seen + b.cfg.Lease + b.cfg.Margin
	w := wait{Member: db.Member{VA: va + " at " + m.from, Event: memberOut}, older: true}
	if m.strict {
		w.lapse = until
	}
	return w, until
}

// unknown is the reach when the members could not be read: everyone known, and whoever else there may be, is pending.
func (b *Barrier) unknown(err error) Reach {
	b.cfg.Log.Warn("revocation recorded, its reach is not known", "err", err)
	b.mu.Lock()
	defer b.mu.Unlock()
	var r Reach
	for va := range b.latest {
		r.Pending = append(r.Pending, va)
	}
	if r.Pending == nil {
		r.Pending = []string{"*"}
	}
	slices.Sort(r.Pending)
	return r
}

// reach sums up, and puts lapsed members out.
func (b *Barrier) reach(ctx context.Context, waits []wait) Reach {
	now := b.cfg.Boottime()
	var r Reach
	for _, w := range waits {
		switch {
		case w.applied:
			r.Applied++
		case w.lapse != 0 && now >= w.lapse:
			r.Lapsed = append(r.Lapsed, w.VA)
			if w.Event != memberOut {
				b.putOut(ctx, w.Member)
			}
		default:
			r.Pending = append(r.Pending, w.VA)
		}
	}
	return r
}

// putOut records that a member lapsed, so that the next revocation does not wait for it. Losing the number means that the member came
// back or that another node was first; failing costs the next revocation one more wait.
func (b *Barrier) putOut(ctx context.Context, m db.Member) {
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	m.N, m.Event, m.Created = m.N+1, memberOut, b.cfg.Now()
	switch err := b.cfg.Members.InsertMember(ctx, m); {
	case err == nil:
		b.cfg.Log.Warn("responder lapsed and is out until it joins again", "va", m.VA)
	case db.ClassOf(err) != db.Duplicate:
		b.cfg.Log.Warn("responder lapsed, not recorded as out", "va", m.VA, "err", err)
	}
}

// poll asks one member until it has applied the position, and tells whether it has before ctx ended.
func (b *Barrier) poll(ctx context.Context, va string, at Position) bool {
	for failures := 0; ctx.Err() == nil; {
		b.mu.Lock()
		m := b.latest[va]
		b.mu.Unlock()
		applied, err := b.ask(ctx, m, at)
		if applied {
			return true
		}
		if err == nil {
			failures = 0
			continue
		}
		if failures++; failures == 1 {
			b.cfg.Log.Debug("responder not reached", "va", va, "address", m.Address, "err", err)
		}
		if failures%10 == 0 { // about once a second: it may have come back under another address or incarnation
			_, _ = b.members(ctx)
		}
		timer := time.NewTimer(pollRetry)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
	return false
}

// ask is one long poll. Only an answer of the incarnation that is registered counts: another one may not have caught up yet.
func (b *Barrier) ask(ctx context.Context, m db.Member, at Position) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, pollWait+pollSlack)
	defer cancel()
	query := url.Values{
		"lane":    {at.Lane},
		"seq":     {strconv.FormatUint(at.Seq, 10)},
		"wait_ms": {strconv.FormatInt(pollWait.Milliseconds(), 10)},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+m.Address+"/internal/applied?"+query.Encode(), nil)
	if err != nil {
		return false, fmt.Errorf("asking %s: %w", m.VA, err)
	}
	res, err := b.cfg.Client.Do(req)
	if err != nil {
		return false, fmt.Errorf("asking %s: %w", m.VA, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return false, fmt.Errorf("asking %s: status %d", m.VA, res.StatusCode)
	}
	var answer struct {
		VA          string `json:"va"`
		Incarnation string `json:"incarnation"`
		Applied     bool   `json:"applied"`
		Seq         uint64 `json:"seq"`
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, 4<<10)).Decode(&answer); err != nil {
		return false, fmt.Errorf("reading the answer of %s: %w", m.VA, err)
	}
	if answer.VA != m.VA || answer.Incarnation != hex.EncodeToString(m.Incarnation) {
		b.mu.Lock()
		changed := b.latest[m.VA].N != m.N
		b.mu.Unlock()
		if !changed {
			_, _ = b.members(ctx)
		}
		return false, fmt.Errorf("asking %s: %s, incarnation %s, answered in its place", m.VA, answer.VA, answer.Incarnation)
	}
	return answer.Applied, nil
}
