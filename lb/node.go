package lb

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"trivet/health"
	"trivet/identity"
)

// Thresholds of a node's standing.
const (
	fall        = 2               // failed probes in a row take a node out
	rise        = 2               // good ones bring it back
	slowToEject = 3               // requests in a row without an answer take it out until a good probe
	penaltyHalf = 2 * time.Second // in which the weight of an error halves
	penaltyMax  = 8
	penaltyMin  = 0.1 // less is none
)

// node is one node: how to reach it and what is known of it.
type node struct {
	Node
	pool  *http.Transport // requests that may be repeated, over kept connections
	fresh *http.Transport // requests that may not: over a kept connection one cannot tell whether a request arrived
	probe *http.Transport // health probes, never queued behind requests
	stop  context.CancelFunc

	inflight atomic.Int64 // requests under way
	gathered atomic.Int64 // of those, such as gather
	overdue  atomic.Int64 // of those under way, such as had no answer when the hedge was due

	mu        sync.Mutex
	up        bool                 // by probes
	timedOut  bool                 // it is down because probes were not answered, rather than refused
	ejected   bool                 // by requests, until a good probe that began after ejectedAt
	ejectedAt time.Time            //
	cause     string               // why it is not up, or was ejected
	report    health.Report        // the last one
	reportAt  time.Time            // when it came
	lastOK    map[string]time.Time // when each capability was last reported good
	repliedAt time.Time            // when a request was last answered
	good, bad int                  // probes in a row
	slow      int                  // requests in a row without an answer in time
	penalty   float64              // decaying count of errors, as of penaltyAt
	penaltyAt time.Time            //
	pace      time.Duration        // decaying mean of what requests that gather take; 0: none came
}

func newNode(n Node, id *identity.Identity, timing Timing) *node {
	transport := func() *http.Transport {
		return &http.Transport{
			TLSClientConfig:        id.ClientTLS(n.Role),
			DialContext:            (&net.Dialer{Timeout: time.Second, KeepAlive: 15 * time.Second}).DialContext,
			TLSHandshakeTimeout:    2 * time.Second,
			MaxIdleConns:           0,
			MaxIdleConnsPerHost:    256,
			IdleConnTimeout:        30 * time.Second, // shorter than the nodes' own, so that ours ends first
			DisableCompression:     true,             // bodies pass as they are
			MaxResponseHeaderBytes: 64 << 10,
			TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{}, // HTTP/1.1 alone
		}
	}
	out := &node{Node: n, pool: transport(), fresh: transport(), probe: transport(), lastOK: map[string]time.Time{}, cause: "not probed yet"}
	out.fresh.DisableKeepAlives = true
	return out
}

// close ends the probing; requests under way go on.
func (n *node) close() {
	if n.stop != nil {
		n.stop()
	}
	n.pool.CloseIdleConnections()
	n.probe.CloseIdleConnections()
}

// standing is what a node's place in the balancing was at one moment.
type standing struct {
	live     bool // up and not ejected
	up       bool
	ejected  bool
	timedOut bool
	report   health.Report
	reportAt time.Time
	heardAt  time.Time // of the last report or answer
	cause    string
}

func (n *node) standing() standing {
	n.mu.Lock()
	defer n.mu.Unlock()
	heard := n.reportAt
	if n.repliedAt.After(heard) {
		heard = n.repliedAt
	}
	return standing{heardAt: heard, live: n.up && !n.ejected, up: n.up, ejected: n.ejected, timedOut: n.timedOut, report: n.report, reportAt: n.reportAt, cause: n.cause}
}

// score is the lower the better: load, made heavier by recent errors, so that a node that fails fast does not attract everything.
func (n *node) score(now time.Time) float64 {
	n.mu.Lock()
	p := n.decayed(now)
	n.mu.Unlock()
	return float64(n.inflight.Load()+1) * (1 + p)
}

// decayed is what is left of the penalty. A little is none: between idle nodes any difference decides, and a node that once failed would stay without work.
func (n *node) decayed(now time.Time) float64 {
	p := n.penalty * math.Exp2(-float64(now.Sub(n.penaltyAt))/float64(penaltyHalf))
	if p < penaltyMin {
		return 0
	}
	return p
}

// blameless tells whether nothing went wrong with the node of late, and no request to it is overdue.
func (n *node) blameless(now time.Time) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.overdue.Load() == 0 && n.decayed(now) == 0
}

// took takes in how long a request that gathers has taken.
func (n *node) took(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pace == 0 {
		n.pace = d
	}
	n.pace += (d - n.pace) / 8
}

func (n *node) paced() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pace
}

func (n *node) penalise(now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.penalty, n.penaltyAt = min(n.decayed(now)+1, penaltyMax), now
}

// replied notes that a request was answered.
func (n *node) replied(now time.Time) {
	n.mu.Lock()
	n.slow, n.repliedAt = 0, now
	n.mu.Unlock()
}

// repliedSince tells whether a request was answered after at. If so, something else that timed out since is no evidence: the machine is busy.
func (n *node) repliedSince(at time.Time) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.repliedAt.After(at)
}

// late notes that a request got no answer in time, and tells whether that is enough to eject the node.
func (n *node) late() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.slow++
	return n.slow >= slowToEject
}

// eject takes the node out until a good probe that begins later. It tells whether the node was in.
func (n *node) eject(now time.Time, cause string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.penalty, n.penaltyAt = min(n.decayed(now)+1, penaltyMax), now
	was := n.up && !n.ejected
	n.ejected, n.ejectedAt = true, now
	if was {
		n.cause = cause
	}
	return was
}

// change is what a probe changed, to be logged and counted.
type change uint8

const (
	same change = iota
	wentUp
	wentDown
)

// heard takes in a good report of a probe that began at began.
func (n *node) heard(r health.Report, began, now time.Time) change {
	n.mu.Lock()
	defer n.mu.Unlock()
	was := n.up && !n.ejected
	first := n.reportAt.IsZero() && n.bad == 0
	n.good, n.bad = n.good+1, 0
	n.report, n.reportAt = r, now
	if !n.up && (first || n.good >= rise) {
		n.up, n.timedOut = true, false
	}
	if n.ejected && began.After(n.ejectedAt) {
		n.ejected, n.slow = false, 0
	}
	if n.up && !n.ejected {
		n.cause = ""
		for name := range r.Capabilities {
			if r.Can(name) {
				n.lastOK[name] = now
			}
		}
	}
	if !was && n.up && !n.ejected {
		return wentUp
	}
	return same
}

// missed takes in a probe that failed, or has had no answer yet.
func (n *node) missed(cause string, timedOut bool, began time.Time) change {
	n.mu.Lock()
	defer n.mu.Unlock()
	if timedOut && n.repliedAt.After(began) {
		return same
	}
	n.good, n.bad = 0, n.bad+1
	if n.up && n.bad < fall {
		return same
	}
	was := n.up && !n.ejected
	n.up, n.timedOut, n.cause = false, timedOut, cause
	if was {
		return wentDown
	}
	return same
}

// lastOffered returns when the node last reported need, which may end in *.
func (n *node) lastOffered(need string) time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	prefix, any := strings.CutSuffix(need, "*")
	if !any {
		return n.lastOK[need]
	}
	var last time.Time
	for name, at := range n.lastOK {
		if strings.HasPrefix(name, prefix) && at.After(last) {
			last = at
		}
	}
	return last
}

// patience is for how many probe timeouts a probe is waited for. Each counts as a failure, but an answer, however late, is one; giving up early
// would cost a busy node one more TLS handshake each time.
const patience = 4

// poll probes the node until ctx ends. ready is called once, after the first probe.
func (b *Balancer) poll(ctx context.Context, n *node, ready func()) {
	timeout := b.cfg.Timing.ProbeTimeout
	for {
		began := b.cfg.Now()
		answer := make(chan func(), 1)
		go func() {
			report, err := b.ask(ctx, n, patience*timeout)
			answer <- func() { b.probed(ctx, n, report, err, began) }
		}()
		for waiting := true; waiting; {
			due := b.cfg.Now().Add(timeout)
			select {
			case take := <-answer:
				take()
				waiting = false
			case <-time.After(timeout):
				if b.cfg.Now().Sub(due) < timeout && !n.standing().reportAt.IsZero() { // else it is this process that was kept from running
					b.missed(n, context.DeadlineExceeded, began)
				}
			}
		}
		ready()
		ready = func() {}
		every := time.Duration(float64(b.cfg.Timing.ProbeEvery) * (0.8 + 0.4*rand.Float64())) // so that balancers do not probe in step
		select {
		case <-ctx.Done():
			return
		case <-time.After(every):
		}
	}
}

func (b *Balancer) probed(ctx context.Context, n *node, report health.Report, err error, began time.Time) {
	switch {
	case ctx.Err() != nil:
	case err != nil:
		b.missed(n, err, began)
	case n.heard(report, began, b.cfg.Now()) == wentUp:
		b.cfg.Log.Info("node is in", "node", n.Name, "state", report.State)
	}
}

func (b *Balancer) missed(n *node, err error, began time.Time) {
	if n.missed("no health report: "+cause(err), timedOut(err), began) == wentDown {
		b.metrics.ejections.WithLabelValues(n.Name, "probe").Inc()
		b.cfg.Log.Warn("node is out", "node", n.Name, "cause", err.Error())
	}
}

func (b *Balancer) ask(ctx context.Context, n *node, timeout time.Duration) (health.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+n.Address+"/healthz", nil)
	if err != nil {
		return health.Report{}, err
	}
	resp, err := n.probe.RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err() // the transport may word it otherwise
		}
		return health.Report{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReport))
	if err != nil {
		return health.Report{}, err
	}
	if resp.StatusCode != http.StatusOK {
		return health.Report{}, fmt.Errorf("/healthz answered %d", resp.StatusCode)
	}
	var r health.Report
	if err := json.Unmarshal(body, &r); err != nil {
		return health.Report{}, fmt.Errorf("reading /healthz: %w", err)
	}
	return r, nil
}

// timedOut tells whether err is that nothing came, rather than something bad.
func timedOut(err error) bool {
	var t net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &t) && t.Timeout()
}

// cause puts an error in the few words that go to clients: no addresses, no internals.
func cause(err error) string {
	text := err.Error()
	switch {
	case timedOut(err):
		return "no answer in time"
	case strings.Contains(text, "connection refused"):
		return "connection refused"
	case strings.Contains(text, "certificate"), strings.Contains(text, "tls:"), strings.Contains(text, "verifying a peer"), strings.Contains(text, "want role"):
		return "TLS failed"
	case strings.Contains(text, "/healthz"):
		return text
	}
	return "connection lost"
}
