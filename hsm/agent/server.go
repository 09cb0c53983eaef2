package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
	"trivet/identity"
)

// Act is one entry of the agent's audit record.
type Act struct {
	Actor   string // principal URI, or the agent's own
	Event   string // the operation as metrics name it: generate, export, destroy, …; signatures; approvals
	Object  string // key id, domain key name, member or site
	Outcome string // begun, ok, or the error class
	Detail  string
}

// Config is everything a Server needs. Token or Activate, and Identity, State, Audit and Fatal are mandatory.
type Config struct {
	// Token is the open token. Nil means that the agent starts locked, and Activate opens the token with the PIN that an
	// operator gives. Activate returns ClassPIN for a PIN that was refused, now or before.
	Token    Token
	Activate func(pin string) (Token, error)
	// Label names the token while it is locked.
	Label    string
	Identity *identity.Identity
	State    *State
	// Approvals is how many people must approve an act that cannot be undone (0: 2).
	Approvals int
	// Member is this agent's name in its group; proofs are bound to it. Empty means the identity's name.
	Member string
	// Incarnation is random per start; proofs are bound to it too.
	Incarnation string
	Version     string
	// Capacity is how many module calls may run at once (0: 16), Queue how many more requests may wait (0: 64).
	Capacity, Queue int
	// CallTimeout is how long one module call may take before the process is given up (0: 2 s). Operations of many
	// calls (import, inventory, domain) have five times that; making an RSA key or opening the token has twenty times, and
	// at least 30 s.
	CallTimeout time.Duration
	// ProbeEvery is the pause between test signatures (0: 1 s).
	ProbeEvery time.Duration
	// Audit makes the act durable before it returns. When it fails the act does not happen, and Fatal is called.
	Audit func(Act) error
	// PINs changes the token's PIN; nil: it cannot be changed here, because of NoPINs. Restart ends the process in good order, to
	// be started again; it returns at once.
	PINs    PINs
	NoPINs  string
	Restart func(why string)
	// Fatal is called once, from its own goroutine, when the process must end. It may take a moment to let answers out.
	Fatal   func(error)
	Now     func() time.Time
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Server serves one token. Handler is safe for concurrent use; Run must run beside it for probes and audit.
type Server struct {
	cfg      Config
	dog      *watchdog
	metrics  *metrics
	opened   atomic.Pointer[Token] // nil while the agent is locked
	draining atomic.Bool
	// fence is read-locked from the checks that let a batch be signed to its last signature, and locked while the site epoch
	// changes or a key is buried: once that is acknowledged, nothing comes out that was let in before.
	fence sync.RWMutex
	probe atomic.Pointer[hsm.Probe]

	countsMu sync.Mutex
	counts   map[signed]uint64 // signatures since the last audit entry, guarded by countsMu
}

// signed is what signature counts are kept by.
type signed struct {
	caller string
	key    hsm.KeyID
}

const (
	// stale is the age at which the newest probe says nothing any more.
	stale = 3 * time.Second
	// countsEvery bounds the signatures that a kill -9 can leave out of the audit counts.
	countsEvery = 10 * time.Second
	// lookEvery is how often the token's keys are counted, see look; less often where that takes longer, so that it never costs more
	// than one part in lookShare of the time.
	lookEvery, lookShare = time.Minute, 1000
	// parallel bounds how many digests of one batch are in the module at once, so that one caller cannot have it all.
	parallel = 4
	// together bounds how many digests of a batch are signed one after another in one place of the module, before whoever waits for it has its turn.
	together = 4
	// managers bounds the management requests that run or wait. They are served one at a time.
	managers = 16
)

// NewServer checks the configuration, and brings the site epochs of token and state together.
func NewServer(cfg Config) (*Server, error) {
	if (cfg.Token == nil) == (cfg.Activate == nil) || cfg.Identity == nil || cfg.State == nil || cfg.Audit == nil || cfg.Fatal == nil || cfg.Incarnation == "" {
		return nil, errors.New("agent: token or activate, identity, state, audit, fatal and incarnation are mandatory")
	}
	if cfg.Member == "" {
		cfg.Member = cfg.Identity.Principal().Name
	}
	setDefault(&cfg.Approvals, 2)
	setDefault(&cfg.Capacity, 16)
	setDefault(&cfg.Queue, 64)
	setDefault(&cfg.CallTimeout, 2*time.Second)
	setDefault(&cfg.ProbeEvery, time.Second)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, counts: map[signed]uint64{}, metrics: newMetrics()}
	s.dog = &watchdog{
		slots: make(chan struct{}, cfg.Capacity), limit: int64(cfg.Capacity + cfg.Queue), turn: make(chan struct{}, 1),
		dead: make(chan struct{}), fatal: cfg.Fatal, metrics: s.metrics,
	}
	if cfg.Token != nil {
		if err := s.open(cfg.Token); err != nil {
			return nil, err
		}
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(s.metrics.calls, s.metrics.seconds, s.metrics.signatures, s.metrics.hung, gauges{s})
	}
	return s, nil
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// open takes a token into use once its site epoch and the state's agree.
func (s *Server) open(t Token) error {
	if err := s.agreeOnEpoch(t); err != nil {
		return err
	}
	// A token without domain key and keys guards nothing: it was initialised since, and belongs to no group. A domain key that
	// comes in says anew whether it is guarded.
	if i := t.Info(); i.KEK == "" && i.NextKEK == "" && i.Keys+i.Faulty == 0 {
		stale := false
		s.cfg.State.read(func(f facts) { stale = f.Guarded || len(f.Transports)+len(f.Domains) > 0 })
		if stale {
			if err := s.change("open", func(f *facts) { f.Guarded, f.Transports, f.Domains = false, nil, nil }); err != nil {
				return err
			}
		}
	}
	s.opened.Store(&t)
	return nil
}

// token is the token in use, or why there is none.
func (s *Server) token(op string) (Token, error) {
	if t := s.opened.Load(); t != nil {
		return *t, nil
	}
	return nil, &hsm.Error{Class: hsm.ClassPIN, Code: hsm.CodeLocked, Op: op, Err: errors.New(s.locked())}
}

// locked says why the token cannot be used before an operator acts, or nothing.
func (s *Server) locked() string {
	if s.opened.Load() != nil {
		return ""
	}
	return fmt.Sprintf("token %s has not been activated since this agent started: an operator must give its PIN (pkictl hsm activate)", s.cfg.Label)
}

// long is the time for what takes as long as it takes.
func (s *Server) long() time.Duration { return max(30*time.Second, 20*s.cfg.CallTimeout) }

// Run makes test signatures and writes signature counts to the audit record until ctx ends. The first test signature is
// made before anything else, so that the health report is true from the start.
func (s *Server) Run(ctx context.Context) error {
	probe, counts, look := time.NewTicker(s.cfg.ProbeEvery), time.NewTicker(countsEvery), time.NewTimer(lookEvery)
	defer probe.Stop()
	defer counts.Stop()
	defer look.Stop()
	var looking sync.WaitGroup
	defer looking.Wait()
	for s.test(ctx); ; {
		select {
		case <-ctx.Done():
			return s.writeCounts()
		case <-probe.C:
			s.test(ctx)
		case <-look.C:
			looking.Go(func() { // no probe is to wait for it
				began := time.Now()
				s.look(ctx)
				look.Reset(max(lookEvery, lookShare*time.Since(began)))
			})
		case <-counts.C:
			if err := s.writeCounts(); err != nil {
				return err
			}
		}
	}
}

// look counts the token's keys, so that Info tells of those that somebody took out, or put in, behind this agent's back. It
// gives way to whoever manages the token.
func (s *Server) look(ctx context.Context) {
	const op = "count"
	t := s.opened.Load()
	if t == nil {
		return
	}
	counter, ok := (*t).(interface{ Count() error })
	if !ok {
		return
	}
	select {
	case s.dog.turn <- struct{}{}:
		defer func() { <-s.dog.turn }()
	default:
		return
	}
	if _, err := call(ctx, s.dog, op, s.long(), func() (none, error) { return none{}, counter.Count() }); err != nil && ctx.Err() == nil {
		s.cfg.Log.Error("the token's keys could not be counted", "error", err)
	}
}

// Drain makes the health report say draining; requests are still served.
func (s *Server) Drain() { s.draining.Store(true) }

// Close closes the token, if it is open. It waits for running calls, so it must not be called once one hangs.
func (s *Server) Close() error {
	t := s.opened.Load()
	if t == nil {
		return nil
	}
	if c, ok := (*t).(interface{ Close() error }); ok {
		return c.Close()
	}
	return nil
}

// Info is what the member says about itself now.
func (s *Server) Info() hsm.Info {
	i := hsm.Info{TokenLabel: s.cfg.Label, Locked: s.locked()}
	if t := s.opened.Load(); t != nil {
		i = (*t).Info()
	}
	epoch := s.cfg.State.epoch()
	i.Site, i.Epoch = epoch.Site, epoch.Epoch
	i.Member, i.Incarnation = s.cfg.Member, s.cfg.Incarnation
	i.InFlight, i.Capacity = int(s.dog.requests.Load()), s.cfg.Capacity
	i.Probe = s.probed()
	s.cfg.State.pin(&i.PIN)
	return i
}

// audit records an act or gives the process up: without a record nothing may happen.
func (s *Server) audit(a Act) error {
	if err := s.cfg.Audit(a); err != nil {
		err = fmt.Errorf("writing the audit record: %w", err)
		s.dog.giveUp(err)
		return &hsm.Error{Class: hsm.ClassDevice, Op: a.Event, Err: err}
	}
	return nil
}

func (s *Server) writeCounts() error {
	s.countsMu.Lock()
	counts := s.counts
	s.counts = map[signed]uint64{}
	s.countsMu.Unlock()
	for by, n := range counts {
		if err := s.audit(Act{by.caller, "signatures", string(by.key), "ok", fmt.Sprintf("count=%d", n)}); err != nil {
			return err
		}
	}
	return nil
}

// Handler is the whole interface: /v1 and health. It relies on TLS by Identity.ServerTLS.
func (s *Server) Handler() http.Handler { return s.routes() }
