package api_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"trivet/ca"
	"trivet/ca/api"
	"trivet/ca/catest"
	"trivet/db/dbtest"
	"trivet/health"
	"trivet/identity"
)

// cluster is a real database; nil where MariaDB is not installed.
var cluster *dbtest.Cluster

func TestMain(m *testing.M) {
	raw := func(body io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		b, err := io.ReadAll(body)
		return string(b), err
	}
	for _, media := range []string{"application/pem-certificate-chain", "application/pkix-cert", "application/yaml"} {
		openapi3filter.RegisterBodyDecoder(media, raw)
	}
	os.Exit(dbtest.Main(m, "127.92.2", 2, func(c *dbtest.Cluster) { cluster = c }))
}

// site is a CA node behind both its listeners, with everybody's identities.
type site struct {
	node      *catest.Node
	authority *identity.Authority
	id        *identity.Identity
	public    *httptest.Server
	admin     *httptest.Server
	dir       string

	mu      sync.Mutex
	clients map[identity.Principal]*http.Client
	report  health.Report
}

// newSite starts a node. change may put faults between the interface and the node.
func newSite(t *testing.T, change func(*api.Config)) *site {
	t.Helper()
	node, _ := catest.Established(t, cluster.Need(t).New(t), catest.Config{})
	s := &site{node: node, dir: t.TempDir(), clients: map[identity.Principal]*http.Client{}}
	s.report = health.Report{Node: "ca1", Role: "ca", State: health.OK, Capabilities: map[string]health.Capability{"issue:demo": {OK: true}, "admin": {OK: true}}}
	var err error
	if s.authority, err = identity.CreateAuthority(s.dir+"/infra", "test"); err != nil {
		t.Fatal(err)
	}
	s.id = s.identity(t, person(identity.RoleCA, "ca1"))
	blocker, err := ca.NewBlocker(ca.BlockerConfig{Record: node.Store, Journal: node.Journal, Revoker: node.Revoker, Authorities: node.Engine.Authorities, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	cfg := api.Config{
		Identity: s.id, Issuer: node.Engine, Revoker: node.Revoker, CRLs: node.CRLs, Viewer: ca.NewViewer(node.Engine), Blocker: blocker, Record: node.Store, Rounds: (*ca.Rounds)(nil),
		Journal: node.Journal, Profiles: node.Profiles, BaseURL: "http://pki.test",
		Health: func() health.Report {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.report
		},
		Metrics: promhttp.HandlerFor(prometheus.NewRegistry(), promhttp.HandlerOpts{}), Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	s.public, s.admin = s.serve(t, cfg, api.Public), s.serve(t, cfg, api.Admin)
	return s
}

func (s *site) serve(t *testing.T, cfg api.Config, on api.Listener) *httptest.Server {
	t.Helper()
	handler, err := api.New(cfg, on)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(handler)
	// As far as a handler can tell: without a client certificate the real listener ends at the handshake.
	server.TLS = s.id.ServerTLSOptionalClient()
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	server.StartTLS()
	t.Cleanup(server.Close)
	return server
}

func person(role identity.Role, name string) identity.Principal {
	return identity.Principal{Cluster: "test", Role: role, Name: name}
}

var (
	alice = person(identity.RoleRequester, "alice")
	bob   = person(identity.RoleRequester, "bob")
	rita  = person(identity.RoleRA, "rita")
	olga  = person(identity.RoleCAOperator, "olga")
	carl  = person(identity.RoleAuditor, "carl")
	lb    = person(identity.RoleLB, "lb1")
)

func (s *site) identity(t *testing.T, p identity.Principal) *identity.Identity {
	t.Helper()
	dir := s.dir + "/" + string(p.Role) + "-" + p.Name
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	files, err := s.authority.IssueTo(dir, p, nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.Load(files)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// client returns the client of a principal; the zero one has no certificate.
func (s *site) client(t *testing.T, p identity.Principal) *http.Client {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if c, ok := s.clients[p]; ok {
		return c
	}
	var config *tls.Config
	if p == (identity.Principal{}) {
		config = &tls.Config{InsecureSkipVerify: true}
	} else {
		config = s.identity(t, p).ClientTLS(identity.RoleCA)
	}
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: config}, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(c.CloseIdleConnections)
	s.clients[p] = c
	return c
}

// answer is a response whose body has been read and checked against openapi.yaml.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) problem(t *testing.T) (name, field string) {
	t.Helper()
	var p struct {
		Type, Field string
		RequestID   string `json:"request_id"`
	}
	if a.header.Get("Content-Type") != "application/problem+json" || json.Unmarshal(a.body, &p) != nil {
		t.Errorf("status %d is no problem: %s %s", a.status, a.header.Get("Content-Type"), a.body)
	}
	if p.RequestID == "" || p.RequestID != a.header.Get("X-Request-Id") {
		t.Errorf("request id %q in the body, %q in the header", p.RequestID, a.header.Get("X-Request-Id"))
	}
	if a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == "" {
		t.Error("503 without Retry-After")
	}
	return strings.TrimPrefix(p.Type, "urn:trivet:problem:"), p.Field
}

func (a answer) decode(t *testing.T, v any) {
	t.Helper()
	if err := json.Unmarshal(a.body, v); err != nil {
		t.Fatalf("status %d: %v: %s", a.status, err, a.body)
	}
}

// call makes one request. header is name, value, name, value…
func (s *site) call(t *testing.T, server *httptest.Server, p identity.Principal, method, path, body string, header ...string) answer {
	t.Helper()
	return s.send(t, server, p, request(t, server, method, path, body, header...))
}

func request(t *testing.T, server *httptest.Server, method, path, body string, header ...string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, server.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(header); i += 2 {
		if header[i+1] == "" {
			r.Header.Del(header[i])
			continue
		}
		r.Header.Add(header[i], header[i+1])
		if header[i] == "Content-Type" {
			r.Header.Set(header[i], header[i+1])
		}
	}
	return r
}

func (s *site) send(t *testing.T, server *httptest.Server, p identity.Principal, r *http.Request) answer {
	t.Helper()
	res, err := s.client(t, p).Do(r)
	if err != nil {
		t.Fatalf("%s %s: %v", r.Method, r.URL, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	conform(t, r, res, body)
	return answer{res.StatusCode, res.Header, body}
}

var description = sync.OnceValues(func() (routers.Router, error) {
	doc, err := openapi3.NewLoader().LoadFromData(api.OpenAPI())
	if err != nil {
		return nil, err
	}
	return legacy.NewRouter(doc)
})

// conform checks a response against openapi.yaml.
func conform(t *testing.T, r *http.Request, res *http.Response, body []byte) {
	t.Helper()
	router, err := description()
	if err != nil {
		t.Fatal(err)
	}
	bare := r.Clone(context.Background())
	bare.URL.Host, bare.Host, bare.URL.Scheme = "", "", ""
	route, params, err := router.FindRoute(bare)
	if err != nil {
		if res.StatusCode != http.StatusNotFound && res.StatusCode != http.StatusMethodNotAllowed && res.StatusCode != http.StatusUnauthorized &&
			res.StatusCode != http.StatusForbidden {
			t.Errorf("%s %s, which openapi.yaml does not know, gave %d", r.Method, r.URL.Path, res.StatusCode)
		}
		return
	}
	err = openapi3filter.ValidateResponse(t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: r, PathParams: params, Route: route},
		Status:                 res.StatusCode, Header: res.Header, Body: io.NopCloser(bytes.NewReader(body)),
	})
	if err != nil {
		t.Errorf("%s %s: the response with status %d is not as openapi.yaml says: %v", r.Method, r.URL.Path, res.StatusCode, err)
	}
}

// issueBody is a request for a certificate, as JSON.
func issueBody(t *testing.T, csr []byte, extra string) string {
	t.Helper()
	text, err := json.Marshal(string(csr))
	if err != nil {
		t.Fatal(err)
	}
	return `{"profile":"tls-server","csr":` + string(text) + extra + `}`
}
