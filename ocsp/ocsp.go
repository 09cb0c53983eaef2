// Package ocsp is the validation authority: it follows the change feed of the record into a status table per CA
// generation, keeps an OCSP answer signed for every status, and serves answers, CRLs and issuer certificates from memory.
//
// Status is authoritative, signatures are cache. An answer is served only for the status that the table shows at that
// moment, and good only under a lease: a right that a causal database read gives for five seconds, counted by this
// node's own clock from before the read. A revocation is therefore effective once every node has applied it or its
// lease has provably ended; see LeaseDuration.
package ocsp

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sort"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"trivet/health"
)

// Policy is what a node answers for a good certificate when it has no lease.
type Policy string

const (
	// Strict answers tryLater. Only strict nodes may be counted as lapsed by whoever acknowledges a revocation.
	Strict Policy = "strict"
	// Serve goes on answering good from what was applied last.
	Serve Policy = "serve"
)

// Config is what a VA is made of. Record, Signer and Log are required.
type Config struct {
	// Node is this node's name, as in its identity and in va_member.
	Node string
	// Incarnation is this start of the process: 16 random octets.
	Incarnation [16]byte
	// Version of the program, for the health report.
	Version string
	// Policy without a lease; empty is Strict.
	Policy Policy
	// Record is where facts come from.
	Record Record
	// Signer finds a responder's key by HSM group and key id. It may be called again and again and must honour ctx.
	Signer func(ctx context.Context, group, key string) (Signer, error)
	// Now tells the time that answers show; nil is time.Now. Leases are never counted by it.
	Now func() time.Time
	// BootTime reads the clock that leases are counted by; nil is CLOCK_BOOTTIME.
	BootTime func() (time.Duration, error)
	Log      *slog.Logger
	// Metrics may be nil.
	Metrics prometheus.Registerer
}

// VA is one validation authority node. All methods are safe for concurrent use.
type VA struct {
	cfg       Config
	log       *slog.Logger
	lease     *lease
	feed      *follower
	catalog   *catalog
	presigner *presigner
	metrics   *metrics
	draining  atomic.Bool
	left      atomic.Bool // this node has ended its membership: no good from now on, whatever the policy
}

// New makes a VA. It connects to nothing and knows nothing until Run.
func New(cfg Config) (*VA, error) {
	switch {
	case cfg.Node == "" || cfg.Record == nil || cfg.Signer == nil || cfg.Log == nil:
		return nil, errors.New("validation authority needs a node name, a record, a signer and a logger")
	case cfg.Incarnation == [16]byte{}:
		return nil, errors.New("validation authority needs an incarnation")
	case cfg.Policy == "":
		cfg.Policy = Strict
	case cfg.Policy != Strict && cfg.Policy != Serve:
		return nil, fmt.Errorf("policy %q is not known: use strict or serve", cfg.Policy)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.BootTime == nil {
		cfg.BootTime = BootTime
	}
	v := &VA{cfg: cfg, log: cfg.Log, lease: &lease{clock: cfg.BootTime}}
	v.catalog = &catalog{
		record: cfg.Record, signer: cfg.Signer, log: cfg.Log, wake: make(chan struct{}, 1),
		issuers: map[string]*issuer{}, ids: map[issuerID]*issuer{}, causes: map[string]string{},
	}
	v.feed = &follower{
		record: cfg.Record, incarnation: cfg.Incarnation, clock: cfg.BootTime, lease: v.lease, catalog: v.catalog,
		log: cfg.Log, kick: make(chan struct{}, 1), lanes: map[string]*position{}, ended: make(chan struct{}),
	}
	var err error
	if v.metrics, err = newMetrics(v, cfg.Metrics); err != nil {
		return nil, err
	}
	v.presigner = newPresigner(cfg.Now, cfg.Log, v.metrics)
	v.catalog.ready = v.presigner.signMissing
	v.feed.metrics = v.metrics
	v.feed.changed = v.presigner.changed
	return v, nil
}

// Run joins and follows the feed until ctx ends. Then the node leaves: from that moment it answers good no more, and
// its membership is ended, so that revocations need not wait for it.
func (v *VA) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return v.feed.run(ctx) })
	g.Go(func() error { return v.catalog.run(ctx) })
	g.Go(func() error { return v.presigner.run(ctx) })
	err := g.Wait()
	v.left.Store(true)
	v.lease.end()
	leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if e := v.feed.leave(leave); e != nil {
		v.log.Warn("membership not ended: revocations will wait once for this node's lease", "err", e)
	}
	return err
}

// Drain makes the health report say that nothing new should be sent here. Answers go on.
func (v *VA) Drain() { v.draining.Store(true) }

// Policy returns the node's policy without a lease.
func (v *VA) Policy() Policy { return v.cfg.Policy }

// joined says whether everything was applied up to some moment since the start, and every issuer read.
func (v *VA) joined() bool { return v.feed.joined.Load() && v.catalog.loaded.Load() }

// mayAnswerGood reads the clock, now, and says whether good may be answered.
func (v *VA) mayAnswerGood() bool {
	if v.left.Load() || v.feed.stopped() != nil {
		return false
	}
	return v.lease.valid() || v.cfg.Policy == Serve
}

// Report says what this node can do now: "ocsp:{issuer}", "crl:{issuer}", "aia".
func (v *VA) Report() health.Report {
	now := v.cfg.Now()
	r := health.Report{
		Node: v.cfg.Node, Role: "ocsp", Incarnation: hex.EncodeToString(v.cfg.Incarnation[:]), Version: v.cfg.Version,
		Time: now, State: health.OK, Capabilities: map[string]health.Capability{},
	}
	base := v.whyNotGood()
	diverged, last := v.feed.state()
	detail := ""
	if last != nil {
		detail = last.Error()
	}
	r.Checks = append(r.Checks,
		health.Check{Name: "feed", OK: last == nil && v.feed.joined.Load(), Detail: detail, AgeMS: max(v.feed.lag(), 0).Milliseconds()},
		health.Check{Name: "lease", OK: v.lease.valid(), Detail: max(v.lease.remaining(), 0).Round(time.Millisecond).String() + " left"},
		health.Check{Name: "database-history", OK: diverged == "", Detail: diverged},
	)
	known := 0
	for _, is := range v.catalog.all() {
		k := is.known.Load()
		if k == nil {
			continue
		}
		known++
		cause := base
		switch resp := is.responder.Load(); {
		case cause != "":
		case resp == nil && v.catalog.cause(is.name) != "":
			cause = v.catalog.cause(is.name)
		case resp == nil:
			cause = "no responder certificate in the record"
		case !now.Before(resp.cert.NotAfter):
			cause = "responder certificate has expired"
		}
		r.Capabilities["ocsp:"+is.name] = health.Capability{OK: cause == "", Cause: cause}

		cause = ""
		switch list := is.crl.Load(); {
		case !v.joined():
			cause = v.whyNotGood()
		case list == nil && v.catalog.cause(is.name) != "":
			cause = v.catalog.cause(is.name)
		case list == nil:
			cause = "no CRL in the record"
		case !now.Before(list.next):
			cause = "CRL has expired"
		}
		r.Capabilities["crl:"+is.name] = health.Capability{OK: cause == "", Cause: cause}
	}
	aia := health.Capability{OK: known > 0 && v.joined()}
	if !aia.OK {
		aia.Cause = "no issuer is known yet"
	}
	r.Capabilities["aia"] = aia
	for _, c := range r.Capabilities {
		if !c.OK {
			r.State = health.Degraded
		}
	}
	for _, c := range r.Checks {
		if !c.OK {
			r.State = health.Degraded
		}
	}
	if v.draining.Load() || v.left.Load() {
		r.State = health.Draining
	}
	return r
}

// whyNotGood returns the cause, common to all issuers, for which good is not answered; empty when it is.
func (v *VA) whyNotGood() string {
	if err := v.feed.stopped(); err != nil {
		return err.Error()
	}
	_, last := v.feed.state()
	switch {
	case !v.joined() && last != nil:
		return "not joined yet: " + last.Error()
	case !v.joined():
		return "not joined yet: facts are being applied"
	case v.mayAnswerGood():
		return ""
	case last != nil:
		return "no lease: " + last.Error()
	}
	return "no lease"
}

// Position is how far this node is, for those who wait for it and those who check it.
type Position struct {
	VA          string            `json:"va"`
	Incarnation string            `json:"incarnation"`
	Policy      Policy            `json:"policy"`
	Joined      bool              `json:"joined"`
	LeaseMS     int64             `json:"lease_ms"` // remaining; 0 is none
	Cause       string            `json:"cause,omitempty"`
	Vector      map[string]uint64 `json:"vector"` // lane to seq
	Issuers     []IssuerPosition  `json:"issuers"`
}

// IssuerPosition is what this node holds of one issuer.
type IssuerPosition struct {
	Issuer string `json:"issuer"`
	Counts
	CRLNumber string `json:"crl_number,omitempty"`
}

// Position returns the node's position.
func (v *VA) Position() Position {
	p := Position{
		VA: v.cfg.Node, Incarnation: hex.EncodeToString(v.cfg.Incarnation[:]), Policy: v.cfg.Policy, Joined: v.joined(),
		LeaseMS: max(v.lease.remaining(), 0).Milliseconds(), Cause: v.whyNotGood(), Vector: v.feed.vector(),
		Issuers: []IssuerPosition{},
	}
	for _, is := range v.catalog.all() {
		i := IssuerPosition{Issuer: is.name, Counts: is.table.Counts()}
		if list := is.crl.Load(); list != nil {
			i.CRLNumber = list.number.String()
		}
		p.Issuers = append(p.Issuers, i)
	}
	sort.Slice(p.Issuers, func(i, j int) bool { return p.Issuers[i].Issuer < p.Issuers[j].Issuer })
	return p
}
