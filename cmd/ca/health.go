package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"trivet/ca"
	"trivet/health"
	"trivet/identity"
	"trivet/problem"
)

// healthLoop makes the node's report every 250 ms from what is known already: asking costs nothing, and asking often changes nothing.
type healthLoop struct {
	n       *node
	version string

	begun    atomic.Bool // the node serves
	draining atomic.Bool
	latest   atomic.Pointer[health.Report]

	mu   sync.Mutex
	wait error // what the start waits for
}

func newHealthLoop(n *node) *healthLoop {
	h := &healthLoop{n: n, version: version(), wait: errors.New("starting")}
	h.make(context.Background())
	return h
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return info.Main.Version
}

func (h *healthLoop) run(ctx context.Context) error {
	tick := time.NewTicker(healthEvery)
	defer tick.Stop()
	watchdog, _ := daemon.SdWatchdogEnabled(false) // no watchdog is none to feed
	fed := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		h.make(ctx)
		// That this loop goes round is what the watchdog watches.
		if watchdog > 0 && time.Since(fed) >= watchdog/3 {
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
			fed = time.Now()
		}
	}
}

func (h *healthLoop) begin() {
	h.begun.Store(true)
	h.make(context.Background())
}

func (h *healthLoop) drain() {
	h.draining.Store(true)
	h.make(context.Background())
}

func (h *healthLoop) waiting(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wait = err
}

// report returns the newest report; its State follows a drain at once.
func (h *healthLoop) report() health.Report { return *h.latest.Load() }

// make builds the report. The engine, the database's probes and the group keep what it is built from.
func (h *healthLoop) make(ctx context.Context) {
	incarnation := h.n.journal.Incarnation()
	r := &health.Report{
		Node: h.n.cfg.Node, Role: string(identity.RoleCA), Incarnation: hex.EncodeToString(incarnation[:]), Version: h.version, Time: time.Now().UTC(),
		State: health.OK, Capabilities: map[string]health.Capability{},
	}
	check := func(name string, err error, detail string) {
		c := health.Check{Name: name, OK: err == nil, Detail: detail}
		if err != nil {
			c.Detail = err.Error()
		}
		r.Checks = append(r.Checks, c)
	}
	able := func(name string, causes ...error) {
		c := health.Capability{OK: true}
		if err := errors.Join(causes...); err != nil {
			c = health.Capability{Cause: err.Error()}
			r.State = health.Degraded
		}
		r.Capabilities[name] = c
	}

	database := h.n.store.Ready()
	healthy, nodes := 0, h.n.store.Nodes()
	var unfit, diverged []string
	for _, node := range nodes {
		switch {
		case node.Diverged:
			diverged = append(diverged, node.Address+": "+node.Cause)
		case !node.Healthy:
			unfit = append(unfit, "; "+node.Address+": "+node.Cause)
		case node.Slow != "":
			unfit = append(unfit, "; "+node.Address+": "+node.Slow)
		}
		if node.Healthy {
			healthy++
		}
	}
	check("database", database, fmt.Sprintf("%d of %d nodes", healthy, len(nodes))+strings.Join(unfit, ""))
	var history error
	if len(diverged) > 0 {
		history = errors.New(strings.Join(diverged, "; "))
	}
	check("database-history", history, "")
	journal, full := h.journal(check)

	if !h.begun.Load() {
		h.mu.Lock()
		start := h.wait
		h.mu.Unlock()
		check("start", start, "")
		for _, name := range []string{"read", "revoke", "admin"} {
			able(name, start)
		}
		h.publish(r)
		return
	}
	round := h.n.second.rounds.Status()
	holder, lag := h.n.second.copier.Holder()
	var alone error
	if holder == "" && database == nil {
		alone = round.Alone
	}
	able("read", database, journal, round.Err, alone)
	able("revoke", database, journal, round.Err, alone)
	able("admin", journal)
	check("copies", copies(h.n.cfg, holder, lag), "held by "+holder)
	check("recovery", round.Err, fmt.Sprintf("round %d", round.State.N))
	all, err := h.members()
	check("hsm", err, all)
	for _, a := range h.n.engine.Authorities().All() {
		if a.Certificate == nil || a.State == ca.StateExternal {
			continue
		}
		ready, err := h.n.groups.Ready(a.Group, a.KeyID)
		check("hsm:"+a.Issuer, err, fmt.Sprintf("%d members hold the key", ready))
		able("crl:"+a.Issuer, database, journal, err, alone)
	}
	for name, err := range h.issue(ctx) {
		able(name, err, full, alone)
	}
	h.publish(r)
}

// journal tells whether the journal can be written to at all, and whether it has room for new work.
func (h *healthLoop) journal(check func(string, error, string)) (failed, full error) {
	select {
	case <-h.n.journal.Failed():
		failed = errors.New("the journal has failed")
		check("journal", failed, "")
		return failed, nil
	default:
	}
	s := h.n.journal.Status()
	full = s.Full
	detail := fmt.Sprintf("%d segments, %d MiB", s.Segments, s.Bytes>>20)
	if s.Unarchived > 0 {
		detail += fmt.Sprintf(", %d not archived yet", s.Unarchived)
	}
	if s.Trouble != nil {
		detail += ": " + s.Trouble.Error()
	}
	check("journal", full, detail)
	return nil, full
}

// copies says why what this node releases has no copy on another one.
func copies(cfg *config, holder string, lag uint64) error {
	if len(cfg.Peers) == 0 || holder != "" && lag == 0 {
		return nil
	}
	if holder == "" {
		return fmt.Errorf("no peer keeps copies of what this node releases: %d records have none", lag)
	}
	return fmt.Errorf("%s lacks copies of %d records and is catching up", holder, lag)
}

// members tells how each member of the HSM groups is, as this node sees it. The error is that some do not serve that should.
func (h *healthLoop) members() (all string, err error) {
	var well, unwell []string
	for _, g := range h.n.groups.Status().Groups {
		for _, m := range g.Members {
			one := m.Name + " " + m.State
			switch m.State {
			case "active", "standby", "drained":
				well = append(well, one)
			default:
				if m.Cause != "" {
					one += " (" + m.Cause + ")"
				}
				unwell = append(unwell, one)
			}
		}
	}
	if all = strings.Join(append(unwell, well...), ", "); len(unwell) > 0 {
		err = errors.New(all)
	}
	return all, err
}

// issue asks the engine what it can issue, and the group whether some member can sign for it now.
func (h *healthLoop) issue(ctx context.Context) map[string]error {
	ctx, cancel := context.WithTimeout(ctx, healthEvery)
	defer cancel()
	capabilities := h.n.engine.Health(ctx)
	snapshot := h.n.engine.Authorities()
	for _, a := range snapshot.All() {
		name := "issue:" + a.CA
		if err, listed := capabilities[name]; !listed || err != nil {
			continue
		}
		if active, err := snapshot.Issuing(a.CA, time.Now()); err == nil {
			if _, err := h.n.groups.Ready(active.Group, active.KeyID); err != nil {
				capabilities[name] = err
			}
		}
	}
	return capabilities
}

func (h *healthLoop) publish(r *health.Report) {
	if h.draining.Load() {
		r.State = health.Draining
	}
	h.latest.Store(r)
}

// handler is what the listeners serve until the node is ready: its health, to members of the cluster, and 503 for all else.
func (h *healthLoop) handler() http.Handler {
	mux := http.NewServeMux()
	reports := health.Handler(h.report)
	for _, path := range []string{"/livez", "/readyz", "/healthz"} {
		mux.Handle("GET "+path, reports)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		p := problem.New(http.StatusServiceUnavailable, ca.DatabaseUnavailable, "the node is starting: repeat the request at another node or later")
		p.RetryAfter = 1
		problem.Write(w, p)
	})
	return identity.Allow(mux, identity.Roles()...)
}

// switchHandler is a handler that is replaced once.
type switchHandler struct{ current atomic.Pointer[http.Handler] }

func (s *switchHandler) set(h http.Handler) { s.current.Store(&h) }

// ServeHTTP serves with the handler in force.
func (s *switchHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	(*s.current.Load()).ServeHTTP(w, r)
}
