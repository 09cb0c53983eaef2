package lb_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/health"
	"trivet/identity"
	"trivet/lb"
	"trivet/problem"
)

// cluster is a balancer with real listeners before real TLS nodes.
type cluster struct {
	t         *testing.T
	authority *identity.Authority
	nodes     map[string]*backend
	lb        *lb.Balancer
	registry  *prometheus.Registry
	api       string // host:port
	public    string
	status    string
	requester *identity.Identity
}

func (c *cluster) identity(role identity.Role, name string) *identity.Identity {
	c.t.Helper()
	f, err := c.authority.IssueTo(filepath.Join(c.t.TempDir(), name), identity.Principal{Cluster: "test", Role: role, Name: name}, nil, nil, time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	id, err := identity.Load(f)
	if err != nil {
		c.t.Fatal(err)
	}
	return id
}

// newCluster starts the named nodes ("ca1" and so on; the role is the name without its digit) and a balancer before them.
func newCluster(t *testing.T, timing lb.Timing, names ...string) *cluster {
	t.Helper()
	c := &cluster{t: t, nodes: map[string]*backend{}, registry: prometheus.NewRegistry()}
	var err error
	if c.authority, err = identity.CreateAuthority(filepath.Join(t.TempDir(), "infra"), "test"); err != nil {
		t.Fatal(err)
	}
	c.requester = c.identity(identity.RoleRequester, "alice")
	var list []lb.Node
	for _, name := range names {
		list = append(list, c.add(name))
	}
	id := c.identity(identity.RoleLB, "lb1")
	if c.lb, err = lb.New(lb.Config{Node: "lb1", Version: "test", Identity: id, Nodes: list, Timing: timing, Log: slog.New(slog.DiscardHandler), Metrics: c.registry}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done, started := make(chan error), make(chan struct{})
	go func() { done <- c.lb.Run(ctx, func() { close(started) }) }()
	<-started
	var servers []*http.Server
	listen := func(h http.Handler, config *tls.Config) string {
		l, err := net.Listen("tcp", "127.94.5.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		if config != nil {
			l = tls.NewListener(l, config)
		}
		s := lb.NewServer(h, slog.New(slog.DiscardHandler))
		servers = append(servers, s)
		go s.Serve(l)
		return addr
	}
	c.api = listen(c.lb.API(), id.ServerTLSOptionalClient())
	c.public = listen(c.lb.Public(), nil)
	c.status = listen(c.lb.Status(c.registry), id.ServerTLS())
	t.Cleanup(func() {
		for _, s := range servers {
			s.Close()
		}
		cancel()
		<-done
		for _, n := range c.nodes {
			n.kill()
		}
	})
	return c
}

// add starts one more node and returns how it is reached.
func (c *cluster) add(name string) lb.Node {
	c.t.Helper()
	role := identity.Role(name[:len(name)-1])
	caps := map[string]health.Capability{"ocsp:demo-g1": {OK: true}, "crl:demo-g1": {OK: true}, "aia": {OK: true}}
	if role == identity.RoleCA {
		caps = map[string]health.Capability{"issue:demo": {OK: true}, "revoke": {OK: true}, "read": {OK: true}, "admin": {OK: true}}
	}
	b := &backend{name: name, gate: newGate(), closed: make(chan struct{}), executions: map[string]int{}}
	b.handle.Store(new(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, name) }))
	b.report(health.Report{Node: name, Role: string(role), State: health.OK, Capabilities: caps})
	l, err := net.Listen("tcp", "127.94.3.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	b.server = &http.Server{Handler: b, TLSConfig: c.identity(role, name).ServerTLS(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0), TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}}
	go b.server.Serve(tls.NewListener(&gatedListener{l, b}, b.server.TLSConfig))
	c.nodes[name] = b
	return lb.Node{Name: name, Role: role, Address: l.Addr().String()}
}

// backend is a node: it reports as told, notes what reaches it and answers as told.
type backend struct {
	name   string
	server *http.Server
	gate   *gate
	rep    atomic.Pointer[health.Report]
	handle atomic.Pointer[func(http.ResponseWriter, *http.Request)]
	once   sync.Once
	closed chan struct{}
	conns  atomic.Int64

	mu         sync.Mutex
	seen       []seen
	executions map[string]int // by Idempotency-Key
}

// seen is a request as it reached a node.
type seen struct {
	method, uri, host string
	header            http.Header
	body              []byte
}

func (b *backend) report(r health.Report) { b.rep.Store(&r) }

// lose makes the node report that it lacks capability, because of cause.
func (b *backend) lose(capability, cause string) {
	r := *b.rep.Load()
	caps := map[string]health.Capability{}
	for k, v := range r.Capabilities {
		caps[k] = v
	}
	caps[capability] = health.Capability{OK: cause == "", Cause: cause}
	r.Capabilities = caps
	b.report(r)
}

func (b *backend) answer(f func(http.ResponseWriter, *http.Request)) { b.handle.Store(&f) }

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if p, ok := identity.Peer(r); !ok || p.Role != identity.RoleLB {
		http.Error(w, "balancers only", http.StatusForbidden)
		return
	}
	if r.URL.Path == "/healthz" {
		health.Handler(func() health.Report { return *b.rep.Load() }).ServeHTTP(w, r)
		return
	}
	body, _ := io.ReadAll(r.Body)
	b.mu.Lock()
	b.seen = append(b.seen, seen{r.Method, r.RequestURI, r.Host, r.Header.Clone(), body})
	if key := r.Header.Get("Idempotency-Key"); key != "" {
		b.executions[key]++
	}
	b.mu.Unlock()
	r.Body = io.NopCloser(bytes.NewReader(body))
	(*b.handle.Load())(w, r)
}

func (b *backend) requests() []seen {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]seen(nil), b.seen...)
}

// kill is kill -9: the listener and all connections are gone at once.
func (b *backend) kill() {
	b.once.Do(func() { close(b.closed); b.gate.open(); b.server.Close() })
}

// freeze is SIGSTOP: the kernel accepts connections, nobody reads from them.
func (b *backend) freeze() { b.gate.shut() }
func (b *backend) thaw()   { b.gate.open() }

type gate struct {
	mu sync.Mutex
	ch chan struct{} // closed while open
}

func newGate() *gate {
	g := &gate{ch: make(chan struct{})}
	close(g.ch)
	return g
}

func (g *gate) wait() {
	g.mu.Lock()
	ch := g.ch
	g.mu.Unlock()
	<-ch
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ch = make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.ch:
	default:
		close(g.ch)
	}
}

type gatedListener struct {
	net.Listener
	b *backend
}

func (l *gatedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.b.conns.Add(1)
	return &gatedConn{c, l.b.gate}, nil
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c *gatedConn) Read(p []byte) (int, error) {
	c.gate.wait()
	n, err := c.Conn.Read(p)
	c.gate.wait() // what came while it froze is not read either
	return n, err
}

func (c *gatedConn) Write(p []byte) (int, error) {
	c.gate.wait()
	return c.Conn.Write(p)
}

// client returns an HTTP client of the API listener with the given identity, or none.
func (c *cluster) client(id *identity.Identity) *http.Client {
	config := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if id != nil {
		config = id.ClientTLS(identity.RoleLB)
	}
	tr := &http.Transport{TLSClientConfig: config, MaxIdleConnsPerHost: 100}
	c.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// do sends a request and returns status, headers and body.
func (c *cluster) do(client *http.Client, method, url, body string, header ...string) (int, http.Header, string) {
	c.t.Helper()
	status, h, b, err := do(client, method, url, body, header...)
	if err != nil {
		c.t.Fatal(err)
	}
	return status, h, b
}

func do(client *http.Client, method, url, body string, header ...string) (int, http.Header, string, error) {
	req, err := http.NewRequest(method, url, bytes.NewReader([]byte(body)))
	if err != nil {
		return 0, nil, "", err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, string(b), err
}

// raw writes text to addr as it is and returns the first response, or nil if the connection is closed without one.
func raw(t *testing.T, addr, text string) *http.Response {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(conn, text)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body = io.NopCloser(bytes.NewReader(b))
	return resp
}

// rawTLS is raw on the API listener, as id.
func rawTLS(t *testing.T, c *cluster, id *identity.Identity, text string) *http.Response {
	t.Helper()
	conn, err := tls.Dial("tcp", c.api, id.ClientTLS(identity.RoleLB))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(conn, text)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil
	}
	return resp
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func (c *cluster) state(name string) lb.NodeState {
	for _, s := range c.lb.State() {
		if s.Name == name {
			return s
		}
	}
	c.t.Fatalf("no node %s", name)
	return lb.NodeState{}
}

func readProblem(t *testing.T, body string) problem.Problem {
	t.Helper()
	var p problem.Problem
	if err := json.Unmarshal([]byte(body), &p); err != nil {
		t.Fatalf("%q: %v", body, err)
	}
	return p
}

func unavailable(name string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		problem.Write(w, problem.New(503, name, "try again"))
	}
}

// drop ends the connection without an answer, after the request was read.
func drop(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func (c *cluster) apiURL(path string) string    { return "https://" + c.api + path }
func (c *cluster) publicURL(path string) string { return "http://" + c.public + path }
