package hsmsync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/identity"
)

const (
	// stepTimeout bounds one call to a member, slowTimeout one that makes a key: an RSA key takes seconds.
	stepTimeout, slowTimeout = 10 * time.Second, 90 * time.Second
	// lookTimeout bounds the question who a member is.
	lookTimeout = 3 * time.Second
	// giveUpTimeout bounds the writing of `abandoned` after the caller's context ended.
	giveUpTimeout = 5 * time.Second
	// vendorWait is how long a member may take to receive a key that the vendor clones, when the caller sets no deadline.
	vendorWait = time.Minute
	// maxPayload is what a database row holds.
	maxPayload = 1<<16 - 1
	// maxGroup keeps the name of the group's lease within what names a log.
	maxGroup = 26
)

// CoordinatorConfig says for which group a Coordinator acts, and how.
type CoordinatorConfig struct {
	Group string
	// Identity is this process's; its role must be one that manages keys (sync, ceremony).
	Identity *identity.Identity
	// Chain is the group's log.
	Chain Chain
	// Connect makes the client of a member. Nil means agent.NewClient with Identity.
	Connect func(name, address string) Agent
	// Approvals is how many people must approve an act that needs approval; the members check it again. Zero means 2.
	Approvals int
	// Force has acts done that are refused because of what they would leave: the last member drained, copies too few.
	Force bool
	// Now tells the time for log entries, waiting periods and approvals; nil means time.Now. Nothing is ordered by it.
	Now func() time.Time
	// Log is required. Progress, if not nil, is called as an act goes on, one call at a time. Metrics may be nil.
	Log      *slog.Logger
	Progress func(Progress)
	Metrics  prometheus.Registerer
}

// Progress is how far an act has come.
type Progress struct {
	// Step says what is being done: copy, prove, destroy, …
	Step   string `json:"step"`
	Member string `json:"member,omitempty"`
	Done   int    `json:"done"`
	Total  int    `json:"total"`
}

// Coordinator changes a group: its members, keys, domain key and policy. What it decides is decided by an entry in the
// group's log, so several may be at work at once, in this process and elsewhere: one that was overtaken reads again and
// decides anew. Every act may be repeated: after a crash, a lost answer or a failure it goes on from what is there. It
// needs no running Group. All methods are safe for concurrent use.
type Coordinator struct {
	cfg    CoordinatorConfig
	role   string
	actor  string // principal URI, for the log
	log    *slog.Logger
	reader *reader
	stats  *stats
	dry    *rehearsal // nil unless this is a dry run

	mu      sync.Mutex // guards all below, and calls of Progress
	agents  map[place]Agent
	checked map[string]checked // by member; see Reconcile
	told    map[string]string  // by member; see forget
	minded  map[string]string  // by member; see remind
}

// place is where a member of that name answers.
type place struct{ name, address string }

// NewCoordinator makes a coordinator. It connects to nothing.
func NewCoordinator(cfg CoordinatorConfig) (*Coordinator, error) {
	switch {
	case cfg.Group == "" || len(cfg.Group) > maxGroup:
		return nil, fmt.Errorf("group name %q: want 1 to %d octets", cfg.Group, maxGroup)
	case cfg.Identity == nil || cfg.Chain == nil || cfg.Log == nil:
		return nil, fmt.Errorf("coordinator of group %s needs an identity, a chain and a logger", cfg.Group)
	}
	p := cfg.Identity.Principal()
	if !hsm.MayManage(string(p.Role)) {
		return nil, fmt.Errorf("role %q may not manage the keys of group %s: use an identity of role sync", p.Role, cfg.Group)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Approvals == 0 {
		cfg.Approvals = 2
	}
	if cfg.Connect == nil {
		cfg.Connect = func(name, address string) Agent { return agent.NewClient(name, address, cfg.Identity) }
	}
	c := &Coordinator{
		cfg: cfg, role: string(p.Role), actor: p.String(), log: cfg.Log.With("group", cfg.Group),
		reader: newReader(cfg.Chain, cfg.Group), agents: map[place]Agent{}, checked: map[string]checked{}, told: map[string]string{}, minded: map[string]string{},
	}
	var err error
	c.stats, err = newStats(cfg.Group, cfg.Metrics)
	return c, err
}

// Close closes the connections to the members.
func (c *Coordinator) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.agents {
		if a, ok := a.(interface{ Close() }); ok {
			a.Close()
		}
	}
	clear(c.agents)
}

// State is what the group's log says now.
func (c *Coordinator) State(ctx context.Context) (*State, error) { return c.reader.read(ctx) }

// agent is the client of the member called name at address.
func (c *Coordinator) agent(name, address string) Agent {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := place{name, address}
	if c.agents[at] == nil {
		c.agents[at] = c.cfg.Connect(name, address)
	}
	return c.agents[at]
}

// counts reports a step of total things, and returns what is to be called when one more of them is done.
func (c *Coordinator) counts(step, member string, total int) (done func()) {
	p := Progress{Step: step, Member: member, Total: total}
	report := func(more int) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if p.Done += more; c.cfg.Progress != nil && total > 0 {
			c.cfg.Progress(p)
		}
	}
	report(0)
	return func() { report(1) }
}

// decide appends the entry that next wants, which is asked again whenever another coordinator was faster. No entry means
// that there is nothing to do. It returns the state with the entry.
func (c *Coordinator) decide(ctx context.Context, next func(*State) (*Entry, error)) (*State, error) {
	for {
		s, err := c.State(ctx)
		if err != nil {
			return nil, err
		}
		e, err := next(s)
		if err != nil || e == nil {
			return s, err
		}
		if err := c.append(ctx, s, *e); err == nil {
			return s, nil
		} else if !errors.Is(err, ErrTaken) {
			return nil, err
		}
	}
}

// append adds e at the end of the log as s has it, and applies it to s. The error is ErrTaken when the log has gone on
// meanwhile, and leaves open whether e was added when it is another one.
func (c *Coordinator) append(ctx context.Context, s *State, e Entry) error {
	e.N, e.Actor, e.Created = s.Next, c.actor, c.cfg.Now().UTC().Truncate(time.Microsecond)
	fail := func(err error) error {
		return fmt.Errorf("writing entry %d (%s %s) to the log of group %s: %w", e.N, e.Event, e.Subject, c.cfg.Group, err)
	}
	if n := len(e.Payload); n > maxPayload {
		return fail(fmt.Errorf("payload of %d octets is too long: at most %d", n, maxPayload))
	}
	// What cannot follow must not get in: nobody could read the log any more.
	if err := s.Clone().Apply(e); err != nil {
		return err
	}
	err := c.cfg.Chain.Append(ctx, c.cfg.Group, e)
	if err != nil {
		// Perhaps it was written, and only the answer was lost.
		there, rerr := c.cfg.Chain.Log(ctx, c.cfg.Group, e.N)
		switch {
		case rerr != nil || len(there) == 0:
			return fail(err)
		case !there[0].equal(e):
			return fail(ErrTaken)
		}
	}
	return s.Apply(e)
}

// entry makes an entry with a payload.
func entry(event, subject string, payload any) (*Entry, error) {
	b, err := json.Marshal(payload)
	return &Entry{Event: event, Subject: subject, Payload: b}, err
}

// confirm reads the log anew and tells whether it still says what was entered: a COMMIT is no proof that an entry stays.
func (c *Coordinator) confirm(ctx context.Context, what string, is func(*State) bool) error {
	s, err := c.State(ctx)
	if err != nil {
		return fmt.Errorf("reading back that %s: %w", what, err)
	}
	if !is(s) {
		return fmt.Errorf("reading back that %s: the log does not say so: the database lost the entry, or somebody has changed it since; look and try again", what)
	}
	return nil
}

// each calls do for every element at once, limit at a time, and returns the first error.
func each[T any](ctx context.Context, limit int, all []T, do func(ctx context.Context, v T) error) error {
	run, ctx := errgroup.WithContext(ctx)
	run.SetLimit(max(1, limit))
	for _, v := range all {
		run.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return do(ctx, v)
		})
	}
	return run.Wait()
}

// together calls do for 0 to n-1 at once, every one of them whatever becomes of the others or of the caller's context.
func together(n int, do func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { do(i) })
	}
	all.Wait()
}

// within calls do with a deadline.
func within(ctx context.Context, limit time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return do(ctx)
}
