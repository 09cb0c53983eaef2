// Package api is the HTTP interface of a CA node: certificates, revocation, CAs and profiles behind the balancer; forced CRLs and the audit
// log on a listener of its own. openapi.yaml describes it; Routes says who may do what.
package api

import (
	"context"
	_ "embed" // the interface's description
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"

	"trivet/ca"
	"trivet/db"
	"trivet/health"
	"trivet/identity"
	"trivet/journal"
	"trivet/problem"
)

//go:embed openapi.yaml
var openAPI []byte

// OpenAPI returns the description of the interface, as GET /v1/openapi.yaml does.
func OpenAPI() []byte { return openAPI }

// Issuer issues certificates; *ca.Engine does. Its errors carry a *ca.Error. A certificate it returns may be shown.
type Issuer interface {
	Issue(ctx context.Context, r ca.Request) (*ca.Issued, error)
	Authorities() *ca.Authorities
}

// Revoker revokes; *ca.Revoker does. Its errors carry a *ca.Error.
type Revoker interface {
	Revoke(ctx context.Context, r ca.RevokeRequest) (*ca.Revoked, error)
	Release(ctx context.Context, r ca.ReleaseRequest) (*ca.Revoked, error)
}

// CRLs signs CRLs on demand; *ca.CRLs does.
type CRLs interface {
	Issue(ctx context.Context, issuer string) (*ca.CRL, error)
}

// Record is what the interface reads from the database, causally; *db.Store is it.
type Record interface {
	CertificatesBySerial(ctx context.Context, serial []byte) ([]db.Certificate, error)
	ListCertificates(ctx context.Context, f db.Filter) (db.Page, error)
}

// Rounds says whether what read found in the database may lack something; *ca.Rounds is it. Its errors carry a *ca.Error, or are those of read.
type Rounds interface {
	Complete(ctx context.Context, read func() error) error
}

// Viewer shows certificates; *ca.Viewer does. What it returns may be shown, nil means that there is none. Its errors carry a *ca.Error.
type Viewer interface {
	Certificate(ctx context.Context, issuer string, serial []byte) (*db.Certificate, error)
}

// Journal is this node's own record: written before anything is shown, read by auditors. *journal.Journal is it.
type Journal interface {
	Append(records ...journal.Record) error
	Replay(fn func(journal.Entry) error) error
	Select(q journal.Query, fn func(journal.Entry) error) error
}

// Config is what the interface needs. Fields without a default are mandatory.
type Config struct {
	Identity *identity.Identity   // verifies conveyed client certificates
	Issuer   Issuer               //
	Revoker  Revoker              //
	CRLs     CRLs                 //
	Viewer   Viewer               //
	Blocker  Blocker              //
	Record   Record               //
	Rounds   Rounds               // mandatory
	Journal  Journal              //
	Profiles *ca.Profiles         //
	BaseURL  string               // where relying parties find CRLs, OCSP and issuer certificates
	Health   func() health.Report // cached; must not block
	Metrics  http.Handler         //

	IssueTimeout  time.Duration // for one request to issue; default 10s
	RevokeTimeout time.Duration // for one revocation, the barrier of up to 5.5s included; default 8s
	ReadTimeout   time.Duration // for any other request; default 5s

	Now   func() time.Time // default time.Now
	Clock func() error     // why Now is not to be believed, as an *ca.Error; nil: it always is
	Log   *slog.Logger     // default slog.Default
}

type server struct {
	cfg    Config
	admin  bool // this is the administrative listener
	health http.Handler
}

// New returns the handler of one listener, to be served with mTLS.
func New(cfg Config, on Listener) (http.Handler, error) {
	switch {
	case on != Public && on != Admin:
		return nil, fmt.Errorf("api: a handler serves one listener, not %d", on)
	case cfg.Identity == nil, cfg.Issuer == nil, cfg.Revoker == nil, cfg.CRLs == nil, cfg.Viewer == nil, cfg.Blocker == nil, cfg.Record == nil, cfg.Rounds == nil, cfg.Journal == nil, cfg.Profiles == nil,
		cfg.Health == nil, cfg.Metrics == nil, cfg.BaseURL == "":
		return nil, fmt.Errorf("api: a mandatory field of Config is missing")
	}
	setDefault(&cfg.IssueTimeout, 10*time.Second)
	setDefault(&cfg.RevokeTimeout, 8*time.Second)
	setDefault(&cfg.ReadTimeout, 5*time.Second)
	if cfg.Clock == nil {
		cfg.Clock = func() error { return nil }
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	s := &server{cfg: cfg, admin: on == Admin, health: health.Handler(cfg.Health)}

	gin.SetMode(gin.ReleaseMode)
	r := gin.New()
	r.HandleMethodNotAllowed = true
	r.RedirectTrailingSlash = false
	r.RedirectFixedPath = false
	r.ContextWithFallback = true
	if err := r.SetTrustedProxies(nil); err != nil {
		return nil, fmt.Errorf("api: trusting no proxy: %w", err)
	}
	r.Use(requestID, s.recovered)
	// Even that a path does not exist is told to members of the cluster alone.
	anyone := identity.Roles()
	r.NoRoute(s.permitPeer(anyone), func(c *gin.Context) {
		s.fail(c, problem.New(http.StatusNotFound, "not-found", "there is nothing at this path"))
	})
	r.NoMethod(s.permitPeer(anyone), func(c *gin.Context) {
		s.fail(c, problem.New(http.StatusMethodNotAllowed, "method-not-allowed", "the path does not take "+clip(c.Request.Method)))
	})
	for _, route := range Routes() {
		if route.On&on == 0 {
			continue
		}
		guard := s.permit(route.Roles)
		if route.Peer {
			guard = s.permitPeer(route.Roles)
		}
		r.Handle(route.Method, route.spelling(), guard, func(c *gin.Context) { route.handle(s, c) })
	}
	return r, nil
}

func setDefault(field *time.Duration, value time.Duration) {
	if *field == 0 {
		*field = value
	}
}

// permitPeer guards what a node says about itself: the peer counts, whomever it may speak for.
func (s *server) permitPeer(roles []identity.Role) gin.HandlerFunc {
	return func(c *gin.Context) {
		allowed := false
		identity.Allow(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { allowed = true }), roles...).ServeHTTP(c.Writer, c.Request)
		if !allowed {
			c.Abort()
		}
	}
}

// capability answers with a plain status code, for balancers that understand nothing else.
func capability(name string) func(*server, *gin.Context) {
	return func(s *server, c *gin.Context) {
		status, text := http.StatusOK, "ok\n"
		if !s.cfg.Health().Can(name) {
			status, text = http.StatusServiceUnavailable, "unavailable\n"
		}
		c.Header("Cache-Control", "no-store")
		c.Data(status, "text/plain; charset=utf-8", []byte(text))
	}
}

func (s *server) openAPI(c *gin.Context) {
	c.Data(http.StatusOK, "application/yaml", openAPI)
}
