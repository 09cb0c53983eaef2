package lb

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"trivet/health"
	"trivet/identity"
	"trivet/problem"
)

// API serves /v1, for subscribers and RA clients.
func (b *Balancer) API() http.Handler { return b.handler(routeAPI) }

// Public serves /ocsp, /crl and /ca, for relying parties.
func (b *Balancer) Public() http.Handler { return b.handler(routePublic) }

// Status serves /livez, /readyz, /healthz, /metrics and the table of nodes at /lb/state to any principal of the cluster.
func (b *Balancer) Status(metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", health.Handler(b.Report))
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /lb/state", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		_ = json.NewEncoder(w).Encode(map[string]any{"node": b.cfg.Node, "draining": b.draining.Load(), "nodes": b.State()})
	})
	return identity.Allow(mux, identity.Roles()...)
}

// A plain handler, not a ServeMux: a mux would redirect // in a path.
func (b *Balancer) handler(routes func(method, path string) (route, bool)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := b.cfg.Now()
		id := requestID(r.Header)
		w.Header().Set(headerRequestID, id)
		class, status := b.serve(w, r, id, routes)
		b.metrics.requests.WithLabelValues(string(class), strconv.Itoa(status)).Inc()
		b.metrics.seconds.WithLabelValues(string(class)).Observe(b.cfg.Now().Sub(began).Seconds())
	})
}

// statusGone is counted, never sent: the client left before its answer.
const statusGone = 499

func (b *Balancer) serve(w http.ResponseWriter, r *http.Request, id string, routes func(method, path string) (route, bool)) (class, int) {
	uri, path, ok := target(r)
	var rt route
	if ok {
		rt, ok = routes(r.Method, path)
	}
	if !ok {
		return classOther, refuse(w, problem.New(http.StatusNotFound, "not-found", "there is nothing here"))
	}
	b.budget.earn(b.cfg.Now())
	f := &flight{b: b, route: rt, method: r.Method, host: r.Host, uri: uri, header: outbound(r, id)}
	if len(f.header[headerIdempotency]) > 1 {
		p := problem.New(http.StatusBadRequest, "malformed-request", "the header is there more than once")
		p.Field = headerIdempotency
		return rt.class, refuse(w, p)
	}
	if rt.body > 0 {
		var p *problem.Problem
		if f.body, p = read(w, r, rt.body); p != nil {
			return rt.class, refuse(w, p)
		}
	}
	if rt.class == classIssue {
		f.route.need = b.issueNeed(f.body)
		if len(f.header[headerIdempotency]) == 0 { // so that our own retries are safe
			key := "lb-" + random(16)
			f.header[headerIdempotency] = []string{key}
			w.Header().Set(headerIdempotency, key) // and the client's too
		}
	}
	a, p := f.fly(r.Context())
	switch {
	case p != nil:
		b.cfg.Log.Warn("request not served", "request_id", id, "class", rt.class, "problem", p.Name(), "cause", p.Cause)
		return rt.class, refuse(w, p)
	case a == nil:
		return rt.class, statusGone
	}
	defer a.discard()
	return rt.class, b.answer(w, r, a)
}

func refuse(w http.ResponseWriter, p *problem.Problem) int {
	problem.Write(w, p)
	return p.Status
}

func read(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, *problem.Problem) {
	if r.ContentLength > limit {
		w.Header().Set("Connection", "close") // rather than read what is not wanted
		return nil, problem.New(http.StatusRequestEntityTooLarge, "too-large", fmt.Sprintf("the body may have %d octets", limit))
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, problem.New(http.StatusRequestEntityTooLarge, "too-large", fmt.Sprintf("the body may have %d octets", limit))
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, problem.New(http.StatusRequestTimeout, "request-timeout", "the body took too long to arrive: send the whole request at once, and again")
	case err != nil:
		return nil, problem.New(http.StatusBadRequest, "malformed-request", "the body ended before its time")
	}
	return body, nil
}

// chunkTimeout cuts off a client that does not take a long answer.
const chunkTimeout = 30 * time.Second

// answer passes a node's answer on.
func (b *Balancer) answer(w http.ResponseWriter, r *http.Request, a *answer) int {
	inbound(w.Header(), a.header)
	if a.status == http.StatusServiceUnavailable && w.Header().Get("Retry-After") == "" {
		w.Header().Set("Retry-After", "2")
	}
	if a.rest == nil && r.Method != http.MethodHead && a.status != http.StatusNotModified && a.status != http.StatusNoContent {
		w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
	}
	w.WriteHeader(a.status)
	if _, err := w.Write(a.body); err != nil || a.rest == nil {
		return a.status
	}
	rc := http.NewResponseController(w)
	buf := make([]byte, 64<<10)
	for {
		n, err := a.rest.Read(buf)
		if n > 0 {
			_ = rc.SetWriteDeadline(time.Now().Add(chunkTimeout)) // a recorder in a test has no deadline; then nothing bounds it
			if _, werr := w.Write(buf[:n]); werr != nil {
				return a.status
			}
		}
		if err == io.EOF {
			return a.status
		}
		if err != nil {
			panic(http.ErrAbortHandler) // the client must see that the answer is cut short
		}
	}
}
