package agent

import (
	"context"
	"encoding/hex"
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
	Event   string // generate, export, import, domain-generate, domain-export, domain-import, challenge, signatures
	Object  string // key id or domain key name
	Outcome string // begun, ok, or the error class
	Detail  string
}

// Config is everything a Server needs. Token, Identity, Audit and Fatal are mandatory.
type Config struct {
	Token    Token
	Identity *identity.Identity
	// Member is this agent's name in its group; proofs are bound to it. Empty means the identity's name.
	Member string
	// Incarnation is random per start; proofs are bound to it too.
	Incarnation string
	Version     string
	// Capacity is how many module calls may run at once (0: 16), Queue how many more requests may wait (0: 64).
	Capacity, Queue int
	// CallTimeout is how long one module call may take before the process is given up (0: 2 s). Operations of many
	// calls (generate, import, inventory, domain) have five times that.
	CallTimeout time.Duration
	// ProbeEvery is the pause between test signatures (0: 1 s).
	ProbeEvery time.Duration
	// Audit makes the act durable before it returns. When it fails the act does not happen, and Fatal is called.
	Audit func(Act) error
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
	draining atomic.Bool
	probe    atomic.Pointer[hsm.Probe]

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
	// parallel bounds how many digests of one batch are in the module at once, so that one caller cannot have it all.
	parallel = 4
)

// NewServer checks the configuration. The token must be open.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Token == nil || cfg.Identity == nil || cfg.Audit == nil || cfg.Fatal == nil || cfg.Incarnation == "" {
		return nil, errors.New("agent: token, identity, audit, fatal and incarnation are mandatory")
	}
	if cfg.Member == "" {
		cfg.Member = cfg.Identity.Principal().Name
	}
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
	m := newMetrics(cfg.Metrics)
	return &Server{
		cfg: cfg, metrics: m, counts: map[signed]uint64{},
		dog: &watchdog{slots: make(chan struct{}, cfg.Capacity), limit: int64(cfg.Capacity + cfg.Queue),
			dead: make(chan struct{}), fatal: cfg.Fatal, metrics: m},
	}, nil
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Run makes test signatures and writes signature counts to the audit record until ctx ends. The first test signature is
// made before anything else, so that the health report is true from the start.
func (s *Server) Run(ctx context.Context) error {
	probe, counts := time.NewTicker(s.cfg.ProbeEvery), time.NewTicker(countsEvery)
	defer probe.Stop()
	defer counts.Stop()
	for s.test(ctx); ; {
		select {
		case <-ctx.Done():
			return s.writeCounts()
		case <-probe.C:
			s.test(ctx)
		case <-counts.C:
			if err := s.writeCounts(); err != nil {
				return err
			}
		}
	}
}

// Drain makes the health report say draining; requests are still served.
func (s *Server) Drain() { s.draining.Store(true) }

// Info is what the member says about itself now.
func (s *Server) Info() hsm.Info {
	i := s.cfg.Token.Info()
	i.Member, i.Incarnation = s.cfg.Member, s.cfg.Incarnation
	i.InFlight, i.Capacity = int(s.dog.requests.Load()), s.cfg.Capacity
	i.Probe = s.probed()
	return i
}

// sign sends one batch through the module, a few digests at a time: all signatures or an error.
func (s *Server) sign(ctx context.Context, caller string, k hsm.KeyRecord, digests [][]byte) ([][]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sigs := make([][]byte, len(digests))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(parallel, len(digests)) {
		wg.Go(func() {
			for n := int(next.Add(1)) - 1; n < len(digests) && ctx.Err() == nil; n = int(next.Add(1)) - 1 {
				sig, err := call(ctx, s.dog, "sign", s.cfg.CallTimeout, func() ([]byte, error) { return s.cfg.Token.Sign(k.ID, digests[n]) })
				if err != nil {
					cancel(err)
					return
				}
				sigs[n] = sig
			}
		})
	}
	wg.Wait()
	made := 0
	for _, sig := range sigs {
		if sig != nil {
			made++
		}
	}
	s.metrics.signatures.WithLabelValues(string(k.Purpose)).Add(float64(made))
	s.countsMu.Lock()
	s.counts[signed{caller, k.ID}] += uint64(made)
	s.countsMu.Unlock()
	if made == len(digests) {
		return sigs, nil
	}
	err := context.Cause(ctx)
	if hsm.ClassOf(err) == 0 {
		err = &hsm.Error{Class: hsm.ClassDevice, Op: "sign", Err: err}
	}
	return nil, err
}

// challenge proves possession of a key: the agent builds what is signed, and records it before it is signed.
func (s *Server) challenge(ctx context.Context, caller string, k hsm.KeyRecord, req challengeRequest) ([]byte, error) {
	digest := hsm.ChallengeDigest(req.Group, s.cfg.Member, s.cfg.Incarnation, k.ID, req.Nonce)
	if err := s.audit(Act{caller, "challenge", string(k.ID), "begun", "class=pop group=" + req.Group + " digest=" + hex.EncodeToString(digest)}); err != nil {
		return nil, err
	}
	sig, err := call(ctx, s.dog, "challenge", s.cfg.CallTimeout, func() ([]byte, error) { return s.cfg.Token.Sign(k.ID, digest) })
	s.cfg.Log.Info("challenge", "class", "pop", "caller", caller, "group", req.Group, "key", k.ID, "digest", hex.EncodeToString(digest), "ok", err == nil)
	return sig, err
}

// managed runs an act that changes the token or lets a key out, between two audit entries.
func managed[T any](ctx context.Context, s *Server, caller, op, object string, fn func() (T, error)) (T, error) {
	var zero T
	if err := s.audit(Act{caller, op, object, "begun", ""}); err != nil {
		return zero, err
	}
	v, err := call(ctx, s.dog, op, 5*s.cfg.CallTimeout, fn)
	act := Act{caller, op, object, "ok", ""}
	if err != nil {
		act.Outcome, act.Detail = hsm.ClassOf(err).String(), err.Error()
	}
	s.cfg.Log.Info("management", "caller", caller, "op", op, "object", object, "outcome", act.Outcome, "detail", act.Detail)
	if failed := s.audit(act); failed != nil {
		return zero, failed
	}
	return v, err
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
