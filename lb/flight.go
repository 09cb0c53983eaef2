package lb

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"trivet/problem"
)

// flight is one client request on its way: the attempts to have it answered by some node.
type flight struct {
	b      *Balancer
	route  route
	method string
	host   string
	uri    string // octet for octet as it came
	header http.Header
	body   []byte

	results  chan *answer
	landed   chan struct{} // closed when nobody listens to results any more
	attempts []*attempt    // under way
	best     *answer       // an answer to fall back on, not a good one
	sent     bool          // some attempt may have reached a node and was not answered
}

// attempt is one try on one node.
type attempt struct {
	node   *node
	began  time.Time
	cancel context.CancelFunc
	late   bool // no answer when the hedge was due

	progress atomic.Int32 // under way, overdue, ended: counts for the node's overdue
}

const (
	overdue = 1 + iota
	ended
)

// delay counts the attempt among those its node has been slow to answer, until it ends.
func (a *attempt) delay() {
	a.node.overdue.Add(1)
	if !a.progress.CompareAndSwap(0, overdue) { // it has ended
		a.node.overdue.Add(-1)
	}
}

func (a *attempt) end() {
	if a.progress.Swap(ended) == overdue {
		a.node.overdue.Add(-1)
	}
}

// answer is how an attempt ended.
type answer struct {
	*attempt
	status int
	header http.Header
	body   []byte        // as far as it is held
	rest   io.ReadCloser // what follows, if it is too long to hold
	err    error
	sent   bool // the request may have reached the node
	dialed bool // err is about a new connection, not one kept too long
}

func (a *answer) discard() {
	if a.rest != nil {
		a.rest.Close()
	}
	a.cancel()
}

// maxAttempts bounds the attempts under way at once for one request.
const maxAttempts = 3

// fly returns the answer to give, or the problem; neither if the client has left. The caller closes a returned answer with discard.
func (f *flight) fly(ctx context.Context) (*answer, *problem.Problem) {
	timing := f.b.cfg.Timing
	slow, total, patience := timing.ReadHedge, timing.ReadTotal, timing.Hope
	if f.route.write {
		slow, total, patience = timing.WriteHedge, timing.WriteTotal, timing.WriteTotal
	}
	if f.route.hedge > 0 {
		slow = f.route.hedge
	}
	began := f.b.cfg.Now()
	deadline := time.NewTimer(total)
	defer deadline.Stop()
	hedge := time.NewTimer(slow)
	defer hedge.Stop()
	f.results, f.landed = make(chan *answer), make(chan struct{})
	var won *answer
	defer func() {
		close(f.landed)
		for _, a := range f.attempts {
			if won == nil || a != won.attempt {
				a.cancel()
			}
		}
		if f.best != nil && f.best != won {
			f.best.discard()
		}
	}()

	var tried []*node
	denied := false
	for round := 0; ; {
		if len(f.attempts) == 0 {
			if n := f.b.pick(f.route, tried); n != nil {
				if round > 0 || len(tried) > 0 {
					f.b.metrics.retries.WithLabelValues(string(f.route.class)).Inc()
				}
				tried = append(tried, n)
				f.start(ctx, n)
				hedge.Reset(slow)
			} else {
				if f.b.cfg.Now().Sub(began) > patience || !f.again() {
					won = f.best
					return won, f.refusal()
				}
				// Everybody failed just now. A database that changes its primary takes a second or two.
				pause := min(50*time.Millisecond<<min(round, 3), 400*time.Millisecond)
				pause = pause/2 + rand.N(pause/2)
				round, tried = round+1, nil
				select {
				case <-time.After(pause):
				case <-deadline.C:
					won = f.best
					return won, f.refusal()
				case <-ctx.Done():
					return nil, nil
				}
				continue
			}
		}
		select {
		case a := <-f.results:
			f.attempts = slices.DeleteFunc(f.attempts, func(o *attempt) bool { return o == a.attempt })
			if f.judge(a) {
				won = a
				return won, nil
			}
			if f.route.once && f.sent {
				return nil, f.refusal()
			}
			if len(f.attempts) > 0 { // do not wait for the slow one alone
				if n := f.b.pick(f.route, tried); n != nil {
					f.b.metrics.retries.WithLabelValues(string(f.route.class)).Inc()
					tried = append(tried, n)
					f.start(ctx, n)
				}
			}
		case <-hedge.C:
			free := f.noteLate()
			hedge.Reset(slow)
			if f.route.once || len(f.attempts) >= maxAttempts {
				continue
			}
			n := f.b.pick(f.route, tried)
			if n == nil {
				continue
			}
			if !free && !f.b.budget.spend(f.b.cfg.Now()) {
				if !denied {
					f.b.metrics.denied.WithLabelValues(string(f.route.class)).Inc()
				}
				denied = true
				hedge.Reset(slow / 8) // the node may be ejected meanwhile, or the budget filled
				continue
			}
			f.b.metrics.hedges.WithLabelValues(string(f.route.class)).Inc()
			tried = append(tried, n)
			f.start(ctx, n)
		case <-deadline.C:
			f.sent = true
			won = f.best
			return won, f.refusal()
		case <-ctx.Done():
			return nil, nil
		}
	}
}

// noteLate holds it against the nodes that they have not answered, and tells whether all of them are out by now: leaving those is no speculation.
func (f *flight) noteLate() (allOut bool) {
	allOut = true
	now, all := f.b.cfg.Now(), f.b.nodes()
	for _, a := range f.attempts {
		if !a.late && !f.route.slowOK {
			f.b.late(a.node)
		}
		a.late = true
		a.delay()
		if f.b.in(all, a.node, a.node.standing(), now) {
			allOut = false
		}
	}
	return allOut
}

// judge takes in an answer and tells whether it is the one to give.
func (f *flight) judge(a *answer) bool {
	now := f.b.cfg.Now()
	if a.err != nil {
		a.cancel()
		if a.sent {
			f.sent = true
		}
		if a.dialed && !(timedOut(a.err) && a.node.repliedSince(a.began)) {
			f.b.eject(a.node, "connection", cause(a.err))
		} else {
			a.node.penalise(now)
		}
		f.b.cfg.Log.Debug("attempt failed", "node", a.node.Name, "class", f.route.class, "err", a.err)
		return false
	}
	a.node.replied(now)
	if f.route.gather && a.status < 500 {
		a.node.took(now.Sub(a.began))
	}
	if a.status >= 500 {
		a.node.penalise(now)
	}
	if !f.weak(a) {
		return true
	}
	if f.route.once { // a refusal that says that nothing was done may be taken elsewhere
		if name := problemName(a); a.status != http.StatusServiceUnavailable || name == "" || name == "outcome-unknown" {
			return true
		}
	}
	if f.best != nil {
		f.best.discard()
	}
	f.best = a
	return false
}

// weak tells whether another node may have a better answer.
func (f *flight) weak(a *answer) bool {
	switch {
	case a.status >= 500, a.status < 200:
		return true
	case f.route.write && a.status == http.StatusConflict:
		return problemName(a) == "request-in-progress"
	case f.route.class == classOCSP && a.status == http.StatusOK && len(a.body) == 5 && a.rest == nil:
		// OCSPResponse { responseStatus } alone: tryLater (3) or internalError (2), RFC 6960 §4.2.1
		return bytes.Equal(a.body[:4], []byte{0x30, 0x03, 0x0a, 0x01}) && (a.body[4] == 3 || a.body[4] == 2)
	}
	return false
}

// again tells whether it makes sense to go through the nodes once more.
func (f *flight) again() bool {
	if f.best != nil && f.best.status != http.StatusBadGateway && f.best.status != http.StatusServiceUnavailable &&
		f.best.status != http.StatusGatewayTimeout && f.best.status != http.StatusConflict {
		return false // an answer, if no good one: every node says so
	}
	return f.b.hope(f.route)
}

// refusal is the problem to answer with when there is no answer to pass on; nil if there is.
func (f *flight) refusal() *problem.Problem {
	if f.best != nil {
		return nil
	}
	p := problem.New(http.StatusServiceUnavailable, "unavailable", "no node can do this now: try again")
	if f.sent && f.route.write {
		p = problem.New(http.StatusServiceUnavailable, "outcome-unknown", "no node answered; the request may have been carried out: ask again with the same Idempotency-Key, or look")
	}
	p.Cause = f.b.why(f.route)
	p.RetryAfter = 2
	return p
}

func (f *flight) start(ctx context.Context, n *node) {
	ctx, cancel := context.WithCancel(ctx)
	a := &attempt{node: n, began: f.b.cfg.Now(), cancel: cancel}
	f.attempts = append(f.attempts, a)
	n.inflight.Add(1)
	if f.route.gather {
		n.gathered.Add(1)
	}
	go func() {
		out := f.try(ctx, a)
		n.inflight.Add(-1)
		if f.route.gather {
			n.gathered.Add(-1)
		}
		a.end()
		select {
		case f.results <- out:
		case <-f.landed:
			out.discard()
		}
	}()
}

func (f *flight) try(ctx context.Context, a *attempt) *answer {
	out := &answer{attempt: a}
	reused := false
	trace := &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) { out.sent, reused = true, c.Reused }}
	req := (&http.Request{
		Method: f.method,
		URL:    &url.URL{Scheme: "https", Host: a.node.Address, Opaque: f.uri}, // Opaque goes into the request line as it is
		Host:   f.host,
		Header: f.header.Clone(),
	}).WithContext(httptrace.WithClientTrace(ctx, trace))
	if len(f.body) > 0 {
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(f.body)), int64(len(f.body)) // no GetBody: replays are ours to make
	}
	pool := a.node.pool
	if f.route.once {
		pool = a.node.fresh
	}
	resp, err := pool.RoundTrip(req)
	if err != nil {
		out.err, out.dialed = err, !reused && ctx.Err() == nil
		return out
	}
	out.status, out.header = resp.StatusCode, resp.Header
	if resp.StatusCode == http.StatusSwitchingProtocols {
		resp.Body.Close()
		out.err = errors.New("node switched protocols unasked")
		return out
	}
	switch n := resp.ContentLength; {
	case f.method == http.MethodHead || n == 0:
		resp.Body.Close()
		return out
	case n > 0 && n <= maxHeld:
		out.body = make([]byte, n)
		_, err = io.ReadFull(resp.Body, out.body)
	default:
		if out.body, err = io.ReadAll(io.LimitReader(resp.Body, maxHeld)); err == nil && len(out.body) == maxHeld {
			out.rest = resp.Body
			return out
		}
	}
	resp.Body.Close()
	if err != nil {
		out.err = err
	}
	return out
}

// problemName returns the name of the problem that an answer is, or "".
func problemName(a *answer) string {
	if a.header.Get("Content-Type") != problem.ContentType {
		return ""
	}
	var p problem.Problem
	if json.Unmarshal(a.body, &p) != nil {
		return ""
	}
	return p.Name()
}
