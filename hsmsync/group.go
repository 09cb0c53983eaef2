// Package hsmsync makes one virtual HSM of several: a Group of members that hold the same keys. A key of the group
// signs on the least busy member that has proved, in its present incarnation, that it holds the key; work on a member
// that dies, errs or takes too long is done again by another; every signature is verified here before anyone sees it.
//
// What keys there are is decided by the group's log in the database (Chain, Fold); a Group remembers the live ones and
// goes on signing while the database is gone. The coordinator (CreateDomain, CreateKey) brings keys into being.
package hsmsync

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
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
	defaultAttempt = 300 * time.Millisecond
	// perDigest is added to an attempt's deadline for every digest after the first: a slow HSM signs some 200 a second.
	perDigest = 5 * time.Millisecond
	// A member is asked for its health this often, sooner while it has work, and must answer in healthTimeout.
	healthIdle, healthBusy, healthTimeout = 500 * time.Millisecond, 250 * time.Millisecond, 250 * time.Millisecond
	// missesToFail health answers missed in a row turn a suspect member into a failed one.
	missesToFail     = 3
	challengeTimeout = time.Second
	// A key that could not be proved is tried again after proveAgain.
	proveAgain = time.Second
	// The manifest is read this often; sooner while no reading has succeeded yet.
	manifestEvery, manifestTimeout = 2 * time.Second, 5 * time.Second
)

// Member is one HSM behind its agent.
type Member struct {
	Name    string `yaml:"name"`    // as in the agent's own configuration and identity
	Address string `yaml:"address"` // host:port of its mTLS listener
}

// Agent is what the group asks of a member; *agent.Client is the real one. Every call ends with its context, is safe
// for concurrent use and never retries by itself. Errors carry an *hsm.Error, by whose class the group decides.
type Agent interface {
	Health(ctx context.Context) (hsm.Info, error)
	Sign(ctx context.Context, key hsm.KeyID, digests [][]byte) ([][]byte, error)
	Challenge(ctx context.Context, group string, key hsm.KeyID, nonce []byte) (sig []byte, incarnation string, err error)
	Generate(ctx context.Context, spec hsm.KeySpec) (hsm.KeyRecord, error)
	Export(ctx context.Context, key hsm.KeyID) (hsm.Blob, error)
	Import(ctx context.Context, blob hsm.Blob) (hsm.KeyRecord, error)
	TransportKey(ctx context.Context) ([]byte, error)
	GenerateDomain(ctx context.Context, kek string) error
	ExportDomain(ctx context.Context, transport []byte) (wrapped []byte, kek string, err error)
	ImportDomain(ctx context.Context, kek string, wrapped []byte) error
}

// Config says what a Group is made of.
type Config struct {
	// Group is the group's name: the name of its log, and bound into every proof.
	Group string
	// Members are all members of the group, in order of preference where nothing else decides.
	Members []Member
	// Identity is this process's. Its role decides which keys the group may prove and sign with.
	Identity *identity.Identity
	// Manifest tells the keys. One that is a Chain as well, as NewManifest's is, lets this group create keys.
	Manifest Manifest
	// Attempt is how long one member may take over one signature before another is asked; a batch may take 5 ms more
	// for each further digest. Zero means 300 ms.
	Attempt time.Duration
	// Connect makes the client of a member. Nil means agent.NewClient with Identity.
	Connect func(Member) Agent
	// Now tells the time for proofs and log entries; nil means time.Now. Nothing is ordered by it.
	Now func() time.Time
	// Log is required. Metrics may be nil.
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Group is one virtual HSM. All methods are safe for concurrent use. Nothing is known of any member until Run runs.
type Group struct {
	cfg     Config
	role    string
	actor   string // principal URI, for the log
	chain   Chain  // nil when the manifest cannot be written
	log     *slog.Logger
	metrics *metrics

	creating sync.Mutex // one act of the coordinator at a time in this process

	// mu guards all below, the members' changing fields included.
	mu       sync.Mutex
	members  []*member
	keys     map[hsm.KeyID]*Key        // live ones
	manifest map[hsm.KeyID]ManifestKey // as last read, whatever the state
	read     bool                      // manifest has been read at least once
	turn     int                       // breaks ties between equally busy members
}

// New makes a group. It connects to nothing.
func New(cfg Config) (*Group, error) {
	switch {
	case cfg.Group == "":
		return nil, errors.New("group has no name")
	case len(cfg.Members) == 0:
		return nil, fmt.Errorf("group %s has no members", cfg.Group)
	case cfg.Identity == nil || cfg.Manifest == nil || cfg.Log == nil:
		return nil, fmt.Errorf("group %s needs an identity, a manifest and a logger", cfg.Group)
	}
	if cfg.Attempt <= 0 {
		cfg.Attempt = defaultAttempt
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Connect == nil {
		cfg.Connect = func(m Member) Agent { return agent.NewClient(m.Name, m.Address, cfg.Identity) }
	}
	p := cfg.Identity.Principal()
	g := &Group{
		cfg: cfg, role: string(p.Role), actor: p.String(), log: cfg.Log.With("group", cfg.Group),
		keys: map[hsm.KeyID]*Key{}, manifest: map[hsm.KeyID]ManifestKey{},
	}
	g.chain, _ = cfg.Manifest.(Chain)
	seen := map[string]bool{}
	for _, m := range cfg.Members {
		if m.Name == "" || seen[m.Name] {
			return nil, fmt.Errorf("group %s: member name %q is empty or appears twice", cfg.Group, m.Name)
		}
		seen[m.Name] = true
		g.members = append(g.members, newMember(m, cfg.Connect(m)))
	}
	var err error
	if g.metrics, err = newMetrics(g, cfg.Metrics); err != nil {
		return nil, err
	}
	return g, nil
}

// Run follows the members' health and the manifest, and has members prove their keys, until ctx ends; it then returns
// nil. It must run exactly once for Key to sign.
func (g *Group) Run(ctx context.Context) error {
	run, ctx := errgroup.WithContext(ctx)
	run.Go(func() error { g.followManifest(ctx); return nil })
	for _, m := range g.members {
		run.Go(func() error { g.watch(ctx, m); return nil })
		run.Go(func() error { g.prove(ctx, m); return nil })
	}
	err := run.Wait()
	for _, m := range g.members {
		if c, ok := m.agent.(interface{ Close() }); ok {
			c.Close()
		}
	}
	return err
}

// Key returns the live key called id, reading the manifest when the group does not know it yet. The error says what
// the key is instead, or that this process's role may not sign with it.
func (g *Group) Key(ctx context.Context, id string) (*Key, error) {
	k, err := g.live(hsm.KeyID(id))
	if err != nil {
		if rerr := g.refresh(ctx); rerr != nil {
			return nil, fmt.Errorf("%w; reading the manifest anew: %w", err, rerr)
		}
		if k, err = g.live(hsm.KeyID(id)); err != nil {
			return nil, err
		}
	}
	if !hsm.MaySign(g.role, k.record.Purpose) {
		return nil, fmt.Errorf("key %s (%s) is for %s: role %q may not sign with it", id, k.record.Label, k.record.Purpose, g.role)
	}
	return k, nil
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
	for _, m := range g.members {
		if m.health == healthGood && m.quarantine == "" && m.proved(k.record.ID) {
			members++
		}
	}
	if members == 0 {
		return 0, g.noMember(k)
	}
	return members, nil
}

// Recover lifts the quarantine of a member. It gets no work before it has proved each key anew.
func (g *Group) Recover(member string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range g.members {
		if m.Name == member {
			if m.quarantine != "" {
				g.log.Info("quarantine lifted", "member", m.Name, "was", m.quarantine)
			}
			m.quarantine = ""
			clear(m.proofs)
			m.wake()
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
	switch k, known := g.manifest[id]; {
	case known:
		return nil, fmt.Errorf("key %s (%s) of group %s is %s, not live", id, k.Label, g.cfg.Group, k.State)
	case !g.read:
		return nil, fmt.Errorf("key %s: the manifest of group %s has not been read yet", id, g.cfg.Group)
	default:
		return nil, fmt.Errorf("group %s has no key %q", g.cfg.Group, id)
	}
}

// followManifest keeps the cache of keys fresh. What was read last stays in force while it cannot be read.
func (g *Group) followManifest(ctx context.Context) {
	healthy := true
	for {
		every := manifestEvery
		rctx, cancel := context.WithTimeout(ctx, manifestTimeout)
		err := g.refresh(rctx)
		cancel()
		if ctx.Err() != nil {
			return
		}
		switch {
		case err != nil && healthy:
			g.log.Warn("manifest cannot be read; the keys known so far stay in use", "error", err)
		case err == nil && !healthy:
			g.log.Info("manifest is read again")
		}
		if healthy = err == nil; !healthy {
			every = healthIdle
		}
		if !sleep(ctx, every, nil) {
			return
		}
	}
}

// refresh reads the manifest and takes it over.
func (g *Group) refresh(ctx context.Context) error {
	keys, err := g.cfg.Manifest.Keys(ctx, g.cfg.Group)
	if err != nil {
		return fmt.Errorf("reading the manifest of group %s: %w", g.cfg.Group, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	// Two readings may arrive in the wrong order; the log only grows, so the longer one is the newer.
	if tip(keys) < g.tip() {
		return nil
	}
	g.read = true
	clear(g.manifest)
	for _, k := range keys {
		g.manifest[k.ID] = k
		if k.State != StateLive {
			continue
		}
		if g.keys[k.ID] != nil {
			continue // a live key's record never changes
		}
		public, err := parsePublic(k.SPKI)
		if err != nil {
			g.log.Error("manifest holds a key that cannot be used", "key", k.ID, "label", k.Label, "error", err)
			continue
		}
		g.keys[k.ID] = &Key{group: g, record: k.KeyRecord, public: public}
	}
	for id := range g.keys {
		if g.manifest[id].State != StateLive {
			g.log.Warn("key is no longer live", "key", id, "state", g.manifest[id].State)
			delete(g.keys, id)
		}
	}
	for _, m := range g.members {
		m.demandProofs()
	}
	return nil
}

// tip is the position of the newest log entry the group knows a key by. The caller holds mu.
func (g *Group) tip() (n uint64) {
	for _, k := range g.manifest {
		n = max(n, k.N)
	}
	return n
}

func tip(keys []ManifestKey) (n uint64) {
	for _, k := range keys {
		n = max(n, k.N)
	}
	return n
}

// parsePublic reads a manifest key's SPKI. P-256 is the one algorithm so far.
func parsePublic(spki []byte) (*ecdsa.PublicKey, error) {
	p, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("parsing public key: %w", err)
	}
	public, ok := p.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, fmt.Errorf("public key is a %T; only ECDSA on P-256 is supported", p)
	}
	return public, nil
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
