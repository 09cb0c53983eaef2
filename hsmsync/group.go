// Package hsmsync makes one virtual HSM of several: a Group of members that hold the same keys. A key of the group
// signs on the least busy member that has proved, in its present incarnation, that it holds the key; work on a member
// that dies, errs or takes too long is done again by another; every signature is verified here before anyone sees it.
//
// Which members and keys there are is decided by the group's log in the database (Chain, State); a Group follows it, and
// goes on signing with what it knows while the database is gone. The Coordinator is what writes the log.
package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/identity"
)

const (
	defaultAttempt = 300 * time.Millisecond
	defaultQueue   = 4096
)

// Member is one HSM behind its agent.
type Member struct {
	Name    string `yaml:"name"`    // as in the agent's own configuration and identity
	Address string `yaml:"address"` // host:port of its mTLS listener
	// Site is where it stands; Standby makes it one that serves only when no active member can. Both matter only as long as the group's log names no members.
	Site    string `yaml:"site,omitempty"`
	Standby bool   `yaml:"standby,omitempty"`
}

// Agent is what is asked of a member; *agent.Client is the real one. Every call needs a deadline and ends with its
// context, is safe for concurrent use and never retries by itself. Errors carry an *hsm.Error, by whose class is decided
// what to do next.
type Agent interface {
	Health(ctx context.Context) (hsm.Info, error)
	Inventory(ctx context.Context) ([]hsm.KeyRecord, error)
	Sign(ctx context.Context, req hsm.SignRequest) ([][]byte, error)
	Challenge(ctx context.Context, group string, key hsm.KeyID, nonce []byte) (sig []byte, incarnation string, err error)
	Generate(ctx context.Context, spec hsm.KeySpec) (hsm.KeyRecord, error)
	// Export wraps with the domain key called kek; empty is the current one.
	Export(ctx context.Context, key hsm.KeyID, kek string) (hsm.Blob, error)
	Import(ctx context.Context, blob hsm.Blob) (hsm.KeyRecord, error)
	Adopt(ctx context.Context, req hsm.AdoptRequest) (hsm.KeyRecord, error)
	Destroy(ctx context.Context, req hsm.DestroyRequest) error
	// Bury has a member remember that a key was destroyed; the approval may have expired.
	Bury(ctx context.Context, req hsm.DestroyRequest) error
	// Retire has a member remember that a key signs no more; the approval may have expired.
	Retire(ctx context.Context, req hsm.RetireRequest) error
	TransportKey(ctx context.Context) ([]byte, error)
	GenerateDomain(ctx context.Context, kek string) error
	ExportDomain(ctx context.Context, req hsm.DomainRequest) (wrapped []byte, kek string, err error)
	ImportDomain(ctx context.Context, kek string, wrapped []byte) error
	Rotate(ctx context.Context, kek string) error
	DropDomain(ctx context.Context, kek string) error
	ForgetTransport(ctx context.Context, transport string) error
	BackupDomain(ctx context.Context, req hsm.BackupRequest) (wrapped []byte, kek string, err error)
	SetEpoch(ctx context.Context, record hsm.EpochRecord) error
	// RotatePIN has a member give its token another PIN, and start anew.
	RotatePIN(ctx context.Context, req hsm.PINRequest) error
	Activate(ctx context.Context, pin string) error
}

// Config says what a Group is made of.
type Config struct {
	// Group is the group's name: the name of its log, and bound into every proof.
	Group string
	// Site is where this process runs: with policy `prefer: local` members of that site come first.
	Site string
	// Members are used as long as the group's log names none; they may be empty.
	Members []Member
	// Identity is this process's. Its role decides which keys the group may have proved and sign with.
	Identity *identity.Identity
	// Manifest tells members and keys.
	Manifest Manifest
	// Attempt is how long one member may take over one signature before it is suspect; more for a batch and for a member
	// known to be slow. Another member is asked well before that. Zero means 300 ms.
	Attempt time.Duration
	// Epoch is the site epoch of this process, fixed at its start; members refuse keys of purpose ca and crl to others.
	Epoch uint64
	// Recovery says how failed members come back.
	Recovery Recovery
	// Queue bounds the digests that wait for a member; beyond it signing fails with class overloaded. Zero means 4096.
	Queue int
	// Connect makes the client of a member. Nil means agent.NewClient with Identity.
	Connect func(Member) Agent
	// Now tells the time for proofs; nil means time.Now. Nothing is ordered by it.
	Now func() time.Time
	// Log is required. Metrics may be nil.
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Recovery says how failed members come back. The zero Recovery means every second, without end.
type Recovery struct {
	// Every is the pause between two attempts.
	Every time.Duration
	// Attempts is how many are made before the member is given up until an operator has it recovered: -1 without end, 0
	// none at all.
	Attempts int
}

// Group is one virtual HSM. All methods are safe for concurrent use. Nothing is known of any member until Run runs.
type Group struct {
	cfg     Config
	role    string
	log     *slog.Logger
	metrics *metrics
	reading chan struct{} // holds a token while the log is read: one reading at a time

	// mu guards all below, the members' changing fields included.
	mu      sync.Mutex
	state   *State // what the log amounts to, as last read
	trail   []mark // of its entries, to find where the log read anew differs
	read    bool   // the log has been read at least once
	lost    bool   // the log was seen to be shorter than state,
	left    int    // and to have so many entries
	members []*member
	keys    map[hsm.KeyID]*Key // live ones
	launch  func(*member)      // starts a member's goroutines; nil while Run does not run
	waiting []*Key             // keys with pieces that wait for a member, the one to be served next first
	backlog int                // digests let in and not yet handed to a member
	hedges  float64            // how many more members may be asked beside a slow one, see hedge
	turn    int                // counts what is handed to members
}

// New makes a group. It connects to nothing.
func New(cfg Config) (*Group, error) {
	switch {
	case cfg.Group == "":
		return nil, errors.New("group has no name")
	case cfg.Identity == nil || cfg.Manifest == nil || cfg.Log == nil:
		return nil, fmt.Errorf("group %s needs an identity, a manifest and a logger", cfg.Group)
	case cfg.Recovery.Attempts < -1 || cfg.Recovery.Every < 0 || cfg.Queue < 0:
		return nil, fmt.Errorf("group %s: recovery %+v and queue %d: want attempts of -1 or more, nothing else negative", cfg.Group, cfg.Recovery, cfg.Queue)
	}
	if cfg.Attempt <= 0 {
		cfg.Attempt = defaultAttempt
	}
	if cfg.Queue == 0 {
		cfg.Queue = defaultQueue
	}
	if cfg.Recovery == (Recovery{}) {
		cfg.Recovery = Recovery{Every: recoverEvery, Attempts: -1}
	}
	if cfg.Recovery.Every == 0 {
		cfg.Recovery.Every = recoverEvery
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Connect == nil {
		cfg.Connect = func(m Member) Agent { return agent.NewClient(m.Name, m.Address, cfg.Identity) }
	}
	g := &Group{
		cfg: cfg, role: string(cfg.Identity.Principal().Role), log: cfg.Log.With("group", cfg.Group),
		reading: make(chan struct{}, 1), state: NewState(), keys: map[hsm.KeyID]*Key{}, hedges: maxHedges,
	}
	var err error
	if g.metrics, err = newMetrics(g, cfg.Metrics); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, m := range cfg.Members {
		if m.Name == "" || seen[m.Name] {
			return nil, fmt.Errorf("group %s: member name %q is empty or appears twice", cfg.Group, m.Name)
		}
		seen[m.Name] = true
		l := GroupMember{Name: m.Name, State: MemberActive, MemberEntry: MemberEntry{Address: m.Address, Site: m.Site}}
		if m.Standby {
			l.State = MemberStandby
		}
		g.members = append(g.members, g.newMember(l))
	}
	return g, nil
}

// Run follows the group's log and the members' health, and has members prove their keys, until ctx ends; it then returns
// nil. It must run exactly once for Key to sign.
func (g *Group) Run(ctx context.Context) error {
	var attending sync.WaitGroup
	g.mu.Lock()
	g.launch = func(m *member) {
		mctx, stop := context.WithCancel(ctx)
		m.stop = stop
		attending.Go(func() { g.attend(mctx, m) })
	}
	for _, m := range g.members {
		if m.serves() {
			g.launch(m)
		}
	}
	g.mu.Unlock()
	g.follow(ctx)
	g.mu.Lock()
	g.launch = nil
	for _, m := range g.members {
		m.end()
	}
	g.mu.Unlock()
	attending.Wait()
	return nil
}

// Key returns the live key called id, reading the log when the group does not know it yet; a member then proves it before Key
// returns, or a second passes, so that a key just made is usable at once by whoever made it. The error says what the key is
// instead, or that this process's role may not sign with it.
func (g *Group) Key(ctx context.Context, id string) (*Key, error) {
	k, err := g.live(hsm.KeyID(id))
	if err != nil {
		if rerr := g.refresh(ctx); rerr != nil {
			return nil, fmt.Errorf("%w; reading the log anew: %w", err, rerr)
		}
		if k, err = g.live(hsm.KeyID(id)); err != nil {
			return nil, err
		}
		g.expect(ctx, k)
	}
	if !hsm.MaySign(g.role, k.record.Purpose) {
		return nil, fmt.Errorf("key %s (%s) is for %s: role %q may not sign with it", id, k.record.Label, k.record.Purpose, g.role)
	}
	return k, nil
}

// expect waits until a member has proved a key that has just become known, or it is plain that none does so soon.
func (g *Group) expect(ctx context.Context, k *Key) {
	ctx, cancel := context.WithTimeout(ctx, challengeTimeout)
	defer cancel()
	for {
		g.mu.Lock()
		proved, asked := false, false
		for _, m := range g.members {
			proved = proved || m.proved(k.record.ID)
			_, todo := m.todo[k.record.ID]
			asked = asked || todo && m.stop != nil && m.serves() && !m.blocked() && m.health != healthFailed && m.proofs[k.record.ID].err == ""
		}
		g.mu.Unlock()
		if proved || !asked || !sleep(ctx, 2*time.Millisecond, nil) {
			return
		}
	}
}

// Ready tells how many members hold a verified copy of the key now and may be given work. The error is not nil when
// that is none, and names each member's state.
func (g *Group) Ready(id string) (members int, err error) {
	k, err := g.live(hsm.KeyID(id))
	if err != nil {
		return 0, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	recovering := 0
	for _, m := range g.members {
		switch {
		case !m.may(k) || m.refuses(k):
		case m.health == healthGood:
			members++
		case m.health == healthRecovering:
			recovering++
		}
	}
	if members == 0 { // those are asked when no other is left
		members = recovering
	}
	if members == 0 {
		return 0, g.noMember(k)
	}
	return members, nil
}

// Recover lifts the quarantine of a member, or takes up again what was given up, in this process. It gets no work before
// it has proved each key anew. A recover entry in the group's log does the same in every process.
func (g *Group) Recover(member string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range g.members {
		if m.Name == member {
			g.absolve(m)
			return nil
		}
	}
	return fmt.Errorf("group %s has no member %q", g.cfg.Group, member)
}

func (g *Group) live(id hsm.KeyID) (*Key, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if k := g.keys[id]; k != nil {
		return k, nil
	}
	switch k, known := g.state.Key(id); {
	case g.state.Deleted:
		return nil, fmt.Errorf("key %s: group %s was deleted", id, g.cfg.Group)
	case known && k.State == StateLive:
		return nil, fmt.Errorf("key %s (%s) of group %s cannot be used: its entry in the group's log is damaged", id, k.Label, g.cfg.Group)
	case known:
		return nil, fmt.Errorf("key %s (%s) of group %s is %s, not live", id, k.Label, g.cfg.Group, k.State)
	case !g.read:
		return nil, fmt.Errorf("key %s: the log of group %s has not been read yet", id, g.cfg.Group)
	default:
		return nil, fmt.Errorf("group %s has no key %q", g.cfg.Group, id)
	}
}

// sleep waits for d or until wake, and tells whether ctx goes on.
func sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
	case <-wake:
	}
	return ctx.Err() == nil
}
