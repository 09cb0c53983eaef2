package agent_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/health"
	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
	"trivet/identity"
	"trivet/problem"
)

// world is one real token, opened once, with a key of every purpose and a domain; and an infrastructure CA.
type world struct {
	token     *pkcs11.Token
	keys      map[hsm.Purpose]hsm.KeyRecord
	authority *identity.Authority
	dir       string
	mu        sync.Mutex
	ids       map[identity.Role]*identity.Identity
}

var (
	tmp  string
	once sync.Once
	w    *world
)

func TestMain(m *testing.M) {
	code := func() int {
		dir, err := os.MkdirTemp("", "agent")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		tmp = dir
		return m.Run()
	}()
	os.Exit(code)
}

func open(t testing.TB) *world {
	t.Helper()
	module := hsmtest.Module(t)
	once.Do(func() {
		if err := os.Setenv("SOFTHSM2_CONF", hsmtest.SoftHSM(t, tmp)); err != nil {
			t.Fatal(err)
		}
		pin := filepath.Join(tmp, "pin")
		hsmtest.Write(t, pin, "1234")
		if _, err := pkcs11.Init(pkcs11.InitConfig{Module: module, TokenLabel: "agent", PINFile: pin, SOPINFile: pin}); err != nil {
			t.Fatal(err)
		}
		token, err := pkcs11.Open(pkcs11.Config{Module: module, TokenLabel: "agent", PINFile: pin, MaxSessions: 18})
		if err != nil {
			t.Fatal(err)
		}
		if err := token.GenerateDomain("kek"); err != nil {
			t.Fatal(err)
		}
		keys := map[hsm.Purpose]hsm.KeyRecord{hsm.PurposeProbe: token.Probe()}
		for _, p := range hsm.Purposes() {
			if p != hsm.PurposeProbe {
				if keys[p], err = token.Generate(hsmtest.Spec("demo-g1", p)); err != nil {
					t.Fatal(err)
				}
			}
		}
		authority, err := identity.CreateAuthority(filepath.Join(tmp, "authority"), "lab")
		if err != nil {
			t.Fatal(err)
		}
		w = &world{token: token, keys: keys, authority: authority, dir: tmp, ids: map[identity.Role]*identity.Identity{}}
	})
	if w == nil {
		t.Fatal("the token could not be made")
	}
	return w
}

// id is the identity of that role, named for it.
func (w *world) id(t testing.TB, role identity.Role) *identity.Identity {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ids[role] == nil {
		f, err := w.authority.IssueTo(filepath.Join(w.dir, string(role)), identity.Principal{Cluster: "lab", Role: role, Name: string(role) + "-a"}, nil, nil, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if w.ids[role], err = identity.Load(f); err != nil {
			t.Fatal(err)
		}
	}
	return w.ids[role]
}

// faulty is the real token with faults put in front of it.
type faulty struct {
	agent.Token
	sign     func(key hsm.KeyID, digest []byte) ([]byte, error) // nil: the real thing
	generate func(hsm.KeySpec) (hsm.KeyRecord, error)
}

func (f *faulty) Sign(key hsm.KeyID, digest []byte) ([]byte, error) {
	if f.sign != nil {
		return f.sign(key, digest)
	}
	return f.Token.Sign(key, digest)
}

func (f *faulty) Generate(s hsm.KeySpec) (hsm.KeyRecord, error) {
	if f.generate != nil {
		return f.generate(s)
	}
	return f.Token.Generate(s)
}

// served is a running server.
type served struct {
	*agent.Server
	t     *testing.T
	world *world
	addr  string
	fatal chan error
	acts  *acts
}

type acts struct {
	mu   sync.Mutex
	list []agent.Act
	fail error
}

func (a *acts) record(act agent.Act) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.list = append(a.list, act)
	return a.fail
}

func (a *acts) events() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for _, x := range a.list {
		out = append(out, x.Event+" "+x.Outcome)
	}
	return out
}

func serve(t *testing.T, token agent.Token, change func(*agent.Config)) *served {
	t.Helper()
	w := open(t)
	s := &served{t: t, world: w, fatal: make(chan error, 10), acts: &acts{}}
	cfg := agent.Config{
		Token: token, Identity: w.id(t, identity.RoleHSMD), Incarnation: "incarnation-1", ProbeEvery: 20 * time.Millisecond,
		CallTimeout: 10 * time.Second, Audit: s.acts.record, Fatal: func(err error) { s.fatal <- err }, Metrics: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if s.Server, err = agent.NewServer(cfg); err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.91.0.1:0", w.id(t, identity.RoleHSMD).ServerTLS())
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	web := &http.Server{Handler: s.Handler()}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = web.Serve(l) })
	wg.Go(func() { _ = s.Run(ctx) })
	t.Cleanup(func() { cancel(); _ = web.Close(); wg.Wait() })
	return s
}

func (s *served) client(role identity.Role) *agent.Client {
	s.t.Helper()
	c := agent.NewClient("hsmd-a", s.addr, s.world.id(s.t, role))
	s.t.Cleanup(c.Close)
	return c
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits on a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestEveryRolePurposeAndOperation(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	ctx := soon(t)
	sign := map[identity.Role][]hsm.Purpose{
		identity.RoleCA: {hsm.PurposeCA, hsm.PurposeCRL, hsm.PurposeAudit}, identity.RoleOCSP: {hsm.PurposeOCSP},
		identity.RoleCeremony: {hsm.PurposeCA, hsm.PurposeCRL},
	}
	manage := []identity.Role{identity.RoleSync, identity.RoleCeremony}
	read := []identity.Role{identity.RoleCA, identity.RoleOCSP, identity.RoleSync, identity.RoleCeremony, identity.RoleFsck,
		identity.RoleCAOperator, identity.RoleAdmin, identity.RoleAuditor, identity.RoleSRE}
	blob, err := w.token.Export(w.keys[hsm.PurposeCA].ID)
	if err != nil {
		t.Fatal(err)
	}
	transport, err := s.client(identity.RoleSync).TransportKey(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wrapped, kek, err := s.client(identity.RoleSync).ExportDomain(ctx, transport)
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range identity.Roles() {
		c := s.client(role)
		check := func(op string, err error, allowed bool) {
			t.Helper()
			if denied := hsm.ClassOf(err) == hsm.ClassDenied; denied == allowed || allowed && err != nil {
				t.Errorf("%s as %s: %v, want allowed %v", op, role, err, allowed)
			}
		}
		for _, p := range hsm.Purposes() {
			k := w.keys[p]
			_, err := c.Sign(ctx, k.ID, hsmtest.Digests(1))
			check("sign "+string(p), err, slices.Contains(sign[role], p))
			_, _, err = c.Challenge(ctx, "demo", k.ID, make([]byte, 32))
			check("challenge "+string(p), err, role == identity.RoleSync || slices.Contains(sign[role], p))
		}
		may := slices.Contains(manage, role)
		_, err := c.Generate(ctx, w.keys[hsm.PurposeCA].KeySpec)
		check("generate", err, may)
		_, err = c.Export(ctx, w.keys[hsm.PurposeCA].ID)
		check("export", err, may)
		_, err = c.Import(ctx, blob)
		check("import", err, may)
		_, err = c.TransportKey(ctx)
		check("transport key", err, may)
		check("generate domain", c.GenerateDomain(ctx, "kek"), may)
		_, _, err = c.ExportDomain(ctx, transport)
		check("export domain", err, may)
		check("import domain", c.ImportDomain(ctx, kek, wrapped), may)
		_, err = c.Health(ctx)
		check("health", err, slices.Contains(read, role))
		_, err = c.Inventory(ctx)
		check("inventory", err, slices.Contains(read, role))
	}
	if s.acts.events() == nil || len(s.fatal) > 0 {
		t.Errorf("audit %v, fatal %d", s.acts.events(), len(s.fatal))
	}
}

func TestChallengeIsBoundToGroupMemberIncarnationAndKey(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	k, nonce := w.keys[hsm.PurposeCA], bytes.Repeat([]byte{7}, 32)
	sig, incarnation, err := s.client(identity.RoleSync).Challenge(soon(t), "demo", k.ID, nonce)
	if err != nil || incarnation != "incarnation-1" {
		t.Fatalf("%q, %v", incarnation, err)
	}
	pub := hsmtest.PublicKey(t, k.SPKI)
	if !ecdsa.VerifyASN1(pub, hsm.ChallengeDigest("demo", "hsmd-a", incarnation, k.ID, nonce), sig) {
		t.Error("the proof does not verify")
	}
	for _, other := range [][]byte{
		hsm.ChallengeDigest("dem", "ohsmd-a", incarnation, k.ID, nonce), hsm.ChallengeDigest("demo", "hsmd-b", incarnation, k.ID, nonce),
		hsm.ChallengeDigest("demo", "hsmd-a", "incarnation-2", k.ID, nonce), hsm.ChallengeDigest("demo", "hsmd-a", incarnation, k.ID, nonce[1:]),
	} {
		if ecdsa.VerifyASN1(pub, other, sig) {
			t.Error("the proof verifies for something else")
		}
	}
	for _, n := range []int{0, hsm.MinNonce - 1, hsm.MaxNonce + 1} {
		_, _, err := s.client(identity.RoleSync).Challenge(soon(t), "demo", k.ID, make([]byte, n))
		hsmtest.WantClass(t, err, hsm.ClassRequest)
	}
	if !slices.Contains(s.acts.events(), "challenge begun") {
		t.Error("the challenge is not in the audit record")
	}
}

func TestAHungModuleAnswersEverybodyAndEndsTheProcess(t *testing.T) {
	w := open(t)
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	var inside atomic.Int64
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if key == w.token.Probe().ID {
			return w.token.Sign(key, d)
		}
		inside.Add(1)
		<-hang
		return nil, errors.New("too late")
	}}
	s := serve(t, token, func(c *agent.Config) { c.Capacity, c.CallTimeout = 2, 300*time.Millisecond })
	eventually(t, "probe", func() bool { return s.Info().Probe.OK })
	errs := make(chan error, 6)
	for range 6 { // two in the module, four waiting for it
		c := s.client(identity.RoleCA)
		go func() {
			_, err := c.Sign(soon(t), w.keys[hsm.PurposeCA].ID, hsmtest.Digests(1))
			errs <- err
		}()
	}
	for range 6 {
		hsmtest.WantClass(t, <-errs, hsm.ClassDevice)
	}
	if err := <-s.fatal; !strings.Contains(err.Error(), "cannot be cancelled") {
		t.Error(err)
	}
	if inside.Load() != 2 {
		t.Errorf("%d calls in the module, capacity 2", inside.Load())
	}
	if r := s.Report(); r.State != health.Degraded || r.Capabilities["sign"].OK {
		t.Errorf("report %+v", r)
	}
	_, err := s.client(identity.RoleCA).Sign(soon(t), w.keys[hsm.PurposeCA].ID, hsmtest.Digests(1))
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	if len(s.fatal) > 0 {
		t.Error("fatal was called twice")
	}
}

func TestALostSessionOrDeviceEndsTheProcess(t *testing.T) {
	w := open(t)
	for _, class := range []hsm.Class{hsm.ClassSession, hsm.ClassDevice} {
		var broken atomic.Bool
		token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
			if broken.Load() {
				return nil, &hsm.Error{Class: class, Code: "CKR_TEST", Op: "sign", Err: errors.New("gone")}
			}
			return w.token.Sign(key, d)
		}}
		s := serve(t, token, nil)
		broken.Store(true)
		_, err := s.client(identity.RoleCA).Sign(soon(t), w.keys[hsm.PurposeCA].ID, hsmtest.Digests(3))
		hsmtest.WantClass(t, err, hsm.ClassSession, hsm.ClassDevice)
		<-s.fatal
	}
}

func TestAFullQueueTurnsCallersAway(t *testing.T) {
	w := open(t)
	gate, inside := make(chan struct{}), make(chan struct{}, 10)
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if key != w.token.Probe().ID {
			inside <- struct{}{}
			<-gate
		}
		return w.token.Sign(key, d)
	}}
	s := serve(t, token, func(c *agent.Config) { c.Capacity, c.Queue = 1, 1 })
	c, k := s.client(identity.RoleCA), w.keys[hsm.PurposeCA]
	errs := make(chan error, 2)
	for range 2 {
		go func() { _, err := c.Sign(soon(t), k.ID, hsmtest.Digests(1)); errs <- err }()
	}
	<-inside
	eventually(t, "both are in", func() bool { return s.Info().InFlight == 2 })
	_, err := c.Sign(soon(t), k.ID, hsmtest.Digests(1))
	hsmtest.WantClass(t, err, hsm.ClassOverloaded)
	close(gate)
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if len(s.fatal) > 0 {
		t.Error("load ended the process")
	}
}

func TestCallersThatGiveUpLeaveTheQueue(t *testing.T) {
	w := open(t)
	gate, inside := make(chan struct{}), make(chan struct{}, 10)
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if key != w.token.Probe().ID {
			inside <- struct{}{}
			<-gate
		}
		return w.token.Sign(key, d)
	}}
	s := serve(t, token, func(c *agent.Config) { c.Capacity = 1 })
	c, k := s.client(identity.RoleCA), w.keys[hsm.PurposeCA]
	first := make(chan error, 1)
	go func() { _, err := c.Sign(soon(t), k.ID, hsmtest.Digests(1)); first <- err }()
	<-inside
	ctx, cancel := context.WithCancel(soon(t))
	second := make(chan error, 1)
	go func() { _, err := c.Sign(ctx, k.ID, hsmtest.Digests(1)); second <- err }()
	eventually(t, "both are in", func() bool { return s.Info().InFlight == 2 })
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) || hsm.ClassOf(err) != hsm.ClassDevice {
		t.Error(err)
	}
	eventually(t, "the second has left", func() bool { return s.Info().InFlight == 1 })
	close(gate)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if len(inside) > 0 {
		t.Error("the abandoned request was signed")
	}
}

func TestALyingTokenLosesItsCapability(t *testing.T) {
	w := open(t)
	var lie atomic.Bool
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if lie.Load() {
			d = bytes.Repeat([]byte{1}, 32)
		}
		return w.token.Sign(key, d)
	}}
	s := serve(t, token, nil)
	eventually(t, "well", func() bool { return s.Report().Capabilities["sign"].OK })
	lie.Store(true)
	eventually(t, "unwell", func() bool { return !s.Report().Capabilities["sign"].OK })
	if cause := s.Report().Capabilities["sign"].Cause; !strings.Contains(cause, "does not verify") {
		t.Errorf("cause %q", cause)
	}
	lie.Store(false)
	eventually(t, "well again", func() bool { return s.Report().Capabilities["sign"].OK })
}

func TestAnOldProbeSaysNothing(t *testing.T) {
	w := open(t)
	var ahead atomic.Int64
	s := serve(t, w.token, func(c *agent.Config) {
		c.ProbeEvery, c.Now = time.Hour, func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	eventually(t, "well", func() bool { return s.Report().State == health.OK })
	ahead.Store(int64(4 * time.Second))
	if r := s.Report(); r.State != health.Degraded || !strings.Contains(r.Capabilities["sign"].Cause, "old") {
		t.Errorf("%+v", r)
	}
	s.Drain()
	if r := s.Report(); r.State != health.Draining {
		t.Errorf("%+v", r)
	}
}

func TestNoAuditRecordNoAct(t *testing.T) {
	w := open(t)
	var made atomic.Bool
	token := &faulty{Token: w.token, generate: func(hsm.KeySpec) (hsm.KeyRecord, error) {
		made.Store(true)
		return hsm.KeyRecord{}, nil
	}}
	s := serve(t, token, nil)
	s.acts.mu.Lock()
	s.acts.fail = errors.New("disk full")
	s.acts.mu.Unlock()
	_, err := s.client(identity.RoleSync).Generate(soon(t), hsmtest.Spec("x", hsm.PurposeCA))
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	if made.Load() {
		t.Error("the key was made without a record")
	}
	<-s.fatal
}

func TestSignaturesAreCountedInTheAuditRecord(t *testing.T) {
	w := open(t)
	s := &served{acts: &acts{}}
	server, err := agent.NewServer(agent.Config{Token: w.token, Identity: w.id(t, identity.RoleHSMD), Incarnation: "i",
		Audit: s.acts.record, Fatal: func(error) {}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.91.0.1:0", w.id(t, identity.RoleHSMD).ServerTLS())
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: server.Handler()}
	go func() { _ = web.Serve(l) }()
	defer web.Close()
	c := agent.NewClient("hsmd-a", l.Addr().String(), w.id(t, identity.RoleOCSP))
	defer c.Close()
	k := w.keys[hsm.PurposeOCSP]
	for range 2 {
		if _, err := c.Sign(soon(t), k.ID, hsmtest.Digests(5)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := server.Run(ctx); err != nil { // an ended Run writes what is still to be written
		t.Fatal(err)
	}
	want := agent.Act{Actor: "trivet://lab/ocsp/ocsp-a", Event: "signatures", Object: string(k.ID), Outcome: "ok", Detail: "count=10"}
	if !slices.Contains(s.acts.list, want) {
		t.Errorf("want %+v in %+v", want, s.acts.list)
	}
}

func TestADomainKeyGoesOnlyToAnAgentsToken(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	c := s.client(identity.RoleSync)
	spki, err := w.token.TransportKey()
	if err != nil {
		t.Fatal(err)
	}
	forge := func(role identity.Role, change func(map[string]any)) []byte {
		b, err := agent.Attest(w.id(t, role), spki)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(m)
		}
		b, err = json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if _, _, err := c.ExportDomain(soon(t), forge(identity.RoleHSMD, nil)); err != nil {
		t.Fatal(err)
	}
	for name, transport := range map[string][]byte{
		"vouched for by sync": forge(identity.RoleSync, nil), "vouched for by ca": forge(identity.RoleCA, nil),
		"another key": forge(identity.RoleHSMD, func(m map[string]any) { m["spki"] = []byte("another") }),
		"no chain":    forge(identity.RoleHSMD, func(m map[string]any) { m["chain"] = nil }),
		"no signature": forge(identity.RoleHSMD, func(m map[string]any) {
			m["signature"] = nil
		}),
		"bare": spki, "nothing": nil,
	} {
		if _, _, err := c.ExportDomain(soon(t), transport); hsm.ClassOf(err) != hsm.ClassDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBodiesOutOfBoundsAreRefused(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: w.id(t, identity.RoleCA).ClientTLS(identity.RoleHSMD)}}
	defer web.CloseIdleConnections()
	id := string(w.keys[hsm.PurposeCA].ID)
	for _, c := range []struct {
		method, path, body string
		status             int
		name               string
	}{
		{"POST", "/v1/sign", ``, 400, "malformed-request"},
		{"POST", "/v1/sign", `[]`, 400, "malformed-request"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digests":["!"]}`, 400, "malformed-request"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digest":[]}`, 400, "malformed-request"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digests":[]} {}`, 400, "malformed-request"},
		{"POST", "/v1/sign", `{"key":"` + strings.Repeat("a", 40<<10), 413, "too-large"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digests":[]}`, 422, "request-refused"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digests":["AAAA"]}`, 422, "request-refused"},
		{"POST", "/v1/sign", `{"key":"00","digests":["` + strings.Repeat("A", 43) + `="]}`, 404, "not-found"},
		{"POST", "/v1/export", `{"key":"` + id + `"}`, 403, "forbidden"},
		{"GET", "/v1/nothing", ``, 404, "not-found"},
		{"GET", "/v1/sign", ``, 404, "not-found"},
	} {
		req, err := http.NewRequestWithContext(soon(t), c.method, "https://"+s.addr+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := web.Do(req)
		if err != nil {
			t.Fatalf("%.60s: %v", c.body, err)
		}
		var p problem.Problem
		err = json.NewDecoder(resp.Body).Decode(&p)
		_ = resp.Body.Close()
		if resp.StatusCode != c.status || err != nil || p.Name() != c.name {
			t.Errorf("%s %s %.60s: %d %+v %v, want %d %s", c.method, c.path, c.body, resp.StatusCode, p, err, c.status, c.name)
		}
	}
}

func TestHealthEndpointsAreForKnownRolesOnly(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	eventually(t, "well", func() bool { return s.Report().State == health.OK })
	for _, role := range []identity.Role{identity.RoleLB, identity.RoleSRE, identity.RoleRequester} {
		web := &http.Client{Transport: &http.Transport{TLSClientConfig: w.id(t, role).ClientTLS(identity.RoleHSMD)}}
		for _, path := range []string{"/livez", "/readyz", "/healthz"} {
			resp, err := web.Get("https://" + s.addr + path)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("%s as %s: %s", path, role, resp.Status)
			}
		}
		web.CloseIdleConnections()
	}
	bare := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer bare.CloseIdleConnections()
	if resp, err := bare.Get("https://" + s.addr + "/healthz"); err == nil {
		_ = resp.Body.Close()
		t.Errorf("without a certificate: %s", resp.Status)
	}
}

func TestTheClientWantsADeadlineAndTheRightMember(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	_, err := s.client(identity.RoleCA).Health(context.Background())
	hsmtest.WantClass(t, err, hsm.ClassRequest)
	other := agent.NewClient("hsmd-b", s.addr, w.id(t, identity.RoleCA))
	defer other.Close()
	_, err = other.Health(soon(t))
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	if err == nil || !strings.Contains(err.Error(), "want the hsmd called hsmd-b") {
		t.Error(err)
	}
	l, err := net.Listen("tcp", "127.91.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	gone := agent.NewClient("hsmd-a", l.Addr().String(), w.id(t, identity.RoleCA))
	_, err = gone.Health(soon(t))
	hsmtest.WantClass(t, err, hsm.ClassDevice)
}

func TestErrorsKeepClassAndCodeOverTheWire(t *testing.T) {
	w := open(t)
	for _, class := range []hsm.Class{hsm.ClassRequest, hsm.ClassNotFound, hsm.ClassSession, hsm.ClassDevice, hsm.ClassPIN} {
		token := &faulty{Token: w.token, generate: func(hsm.KeySpec) (hsm.KeyRecord, error) {
			return hsm.KeyRecord{}, &hsm.Error{Class: class, Code: "CKR_TEST", Op: "generate", Err: fmt.Errorf("because")}
		}}
		s := serve(t, token, nil)
		_, err := s.client(identity.RoleSync).Generate(soon(t), hsmtest.Spec("x", hsm.PurposeCA))
		e, ok := errors.AsType[*hsm.Error](err)
		if !ok || e.Class != class || e.Code != "CKR_TEST" || !strings.Contains(e.Error(), "because") {
			t.Errorf("%s became %v", class, err)
		}
	}
}

func FuzzRequestBody(f *testing.F) {
	f.Add([]byte(`{"key":"00112233445566778899aabbccddeeff","digests":["AAAA"]}`))
	f.Add([]byte(`{"key":1}{`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var r agent.SignRequest
		if err := agent.Decode(bytes.NewReader(body), &r); err == nil {
			_, _ = r.Key.Bytes()
		}
	})
}

func FuzzTransportKey(f *testing.F) {
	w := open(f)
	id := w.id(f, identity.RoleHSMD)
	good, err := agent.Attest(id, []byte("spki"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"chain":["AA=="]}`))
	f.Fuzz(func(t *testing.T, transport []byte) {
		if spki, _, err := agent.Attested(id, transport, time.Now()); err == nil && string(spki) != "spki" {
			t.Errorf("forged: %q", transport)
		}
	})
}
