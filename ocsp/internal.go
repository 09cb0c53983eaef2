package ocsp

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"trivet/health"
	"trivet/identity"
	"trivet/problem"
)

// maxWait bounds wait_ms of /internal/applied.
const maxWait = 5 * time.Second

// Applied answers GET /internal/applied?lane=L&seq=N&wait_ms=1000.
type Applied struct {
	VA          string `json:"va"`
	Incarnation string `json:"incarnation"`
	Applied     bool   `json:"applied"` // the row takes effect in every answer chosen from now on
	Seq         uint64 `json:"seq"`     // how far the lane is
}

// Internal serves the mTLS listener: /livez /readyz /healthz /metrics for every known role, /internal/applied for CA
// nodes, /internal/position for those who operate and check, and the public paths for balancers.
func (v *VA) Internal(metrics prometheus.Gatherer) http.Handler {
	state := health.Handler(v.Report)
	mux := http.NewServeMux()
	mux.Handle("GET /livez", identity.Allow(state, identity.Roles()...))
	mux.Handle("GET /readyz", identity.Allow(state, identity.Roles()...))
	mux.Handle("GET /healthz", identity.Allow(state, identity.Roles()...))
	mux.Handle("GET /metrics", identity.Allow(promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}), identity.Roles()...))
	mux.Handle("GET /internal/applied", identity.Allow(http.HandlerFunc(v.serveApplied), identity.RoleCA))
	mux.Handle("GET /internal/position", identity.Allow(http.HandlerFunc(v.servePosition),
		identity.RoleCA, identity.RoleFsck, identity.RoleCAOperator, identity.RoleAdmin, identity.RoleAuditor, identity.RoleSRE))
	public := identity.Allow(v.Public(), identity.RoleLB)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The mux cleans paths and redirects. What relying parties sent must not pass through it.
		path := rawPath(r.RequestURI)
		for _, prefix := range []string{"/ocsp", "/crl/", "/ca/"} {
			if strings.HasPrefix(path, prefix) {
				public.ServeHTTP(w, r)
				return
			}
		}
		mux.ServeHTTP(w, r)
	})
}

func (v *VA) serveApplied(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	lane := q.Get("lane")
	seq, err := strconv.ParseUint(q.Get("seq"), 10, 64)
	if lane == "" || err != nil || seq == 0 {
		bad(w, "seq", "lane and seq are needed: the position of one row of the change feed")
		return
	}
	wait := time.Second
	if s := q.Get("wait_ms"); s != "" {
		ms, err := strconv.ParseUint(s, 10, 31)
		if err != nil {
			bad(w, "wait_ms", "wait_ms must be a number of milliseconds")
			return
		}
		wait = min(time.Duration(ms)*time.Millisecond, maxWait)
	}
	ctx, cancel := context.WithTimeout(r.Context(), wait)
	defer cancel()
	at, ok := v.feed.applied(ctx, lane, seq)
	writeJSON(w, Applied{VA: v.cfg.Node, Incarnation: hex.EncodeToString(v.cfg.Incarnation[:]), Applied: ok, Seq: at})
}

func (v *VA) servePosition(w http.ResponseWriter, _ *http.Request) { writeJSON(w, v.Position()) }

func bad(w http.ResponseWriter, field, detail string) {
	p := problem.New(http.StatusBadRequest, "malformed-request", detail)
	p.Field = field
	problem.Write(w, p)
}

func writeJSON(w http.ResponseWriter, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		problem.Write(w, problem.New(http.StatusInternalServerError, "internal", "encoding the answer failed"))
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	_, _ = w.Write(append(b, '\n'))
}
