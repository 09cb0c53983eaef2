package agent_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
	"trivet/identity"
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

// person is the identity of somebody who approves, or should not.
func (w *world) person(t testing.TB, role identity.Role, name string) *identity.Identity {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	key := identity.Role(string(role) + "/" + name)
	if w.ids[key] == nil {
		f, err := w.authority.IssueTo(filepath.Join(w.dir, string(role)+"-"+name), identity.Principal{Cluster: "lab", Role: role, Name: name}, nil, nil, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if w.ids[key], err = identity.Load(f); err != nil {
			t.Fatal(err)
		}
	}
	return w.ids[key]
}

// propose is a request of somebody who approves nothing.
func (w *world) propose(t testing.TB, action, object string, detail map[string]string) identity.Request {
	t.Helper()
	return proposed(t, w.person(t, identity.RoleSRE, "sam"), action, object, detail, time.Now())
}

// proposals are the proposers' signatures, by the digest of the request.
var proposals sync.Map

func proposed(t testing.TB, by *identity.Identity, action, object string, detail map[string]string, at time.Time) identity.Request {
	t.Helper()
	g, err := by.Propose(action, object, detail, at, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	proposals.Store(string(g.Request.Digest()), g.Proposal)
	return g.Request
}

func proposalOf(r identity.Request) *identity.Approval {
	p, _ := proposals.Load(string(r.Digest()))
	a, _ := p.(*identity.Approval)
	return a
}

// approve is the grant of a request by those people.
func approve(t testing.TB, r identity.Request, people ...*identity.Identity) []byte {
	t.Helper()
	g := identity.Grant{Request: r, Proposal: proposalOf(r)}
	for _, p := range people {
		a, err := p.Approve(r, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		g.Approvals = append(g.Approvals, a)
	}
	b, err := json.Marshal(g)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// grant is what an admin and an operator approved.
func (w *world) grant(t testing.TB, action, object string, detail map[string]string) []byte {
	t.Helper()
	return approve(t, w.propose(t, action, object, detail), w.person(t, identity.RoleAdmin, "admin1"), w.person(t, identity.RoleCAOperator, "operator1"))
}

// faulty is the real token with faults put in front of it, and a site epoch of its own, so that tests share none.
type faulty struct {
	agent.Token
	sign      func(key hsm.KeyID, digest []byte) ([]byte, error) // nil: the real thing
	generate  func(hsm.KeySpec) (hsm.KeyRecord, error)
	destroy   func(hsm.KeyID, []byte) error
	inventory func() ([]hsm.KeyRecord, error)
	mu        sync.Mutex
	epoch     hsm.EpochRecord
}

func (f *faulty) Epoch() (hsm.EpochRecord, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.epoch, nil
}

func (f *faulty) SetEpoch(r hsm.EpochRecord) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.epoch = r
	return nil
}

func (f *faulty) Destroy(key hsm.KeyID, spki []byte) error {
	if f.destroy != nil {
		return f.destroy(key, spki)
	}
	return f.Token.Destroy(key, spki)
}

func (f *faulty) Inventory() ([]hsm.KeyRecord, error) {
	if f.inventory != nil {
		return f.inventory()
	}
	return f.Token.Inventory()
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
	state string // the directory of its state
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

// details is what was said of one event and outcome.
func (a *acts) details(event, outcome string) (out []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range a.list {
		if x.Event == event && x.Outcome == outcome {
			out = append(out, x.Detail)
		}
	}
	return out
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
	s := &served{t: t, world: w, fatal: make(chan error, 10), acts: &acts{}, state: t.TempDir()}
	if _, ok := token.(*faulty); !ok && token != nil {
		token = &faulty{Token: token}
	}
	cfg := agent.Config{
		Token: token, Identity: w.id(t, identity.RoleHSMD), Incarnation: "incarnation-1", ProbeEvery: 20 * time.Millisecond,
		CallTimeout: 10 * time.Second, Audit: s.acts.record, Fatal: func(err error) { s.fatal <- err }, Metrics: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if cfg.State == nil {
		if cfg.State, err = agent.CreateState(s.state); err != nil {
			t.Fatal(err)
		}
	}
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

// request asks for signatures where no site epoch is known.
func request(key hsm.KeyID, digests [][]byte) hsm.SignRequest {
	return hsm.SignRequest{Key: key, Digests: digests}
}

// wantCode fails unless err is a refusal with that code.
func wantCode(t testing.TB, err error, class hsm.Class, code string) {
	t.Helper()
	if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != class || e.Code != code {
		t.Errorf("got %v, want %s (%s)", err, class, code)
	}
}

// newKey makes a key of its own for a test that will spoil it.
func newKey(t testing.TB, w *world, p hsm.Purpose) hsm.KeyRecord {
	t.Helper()
	k, err := w.token.Generate(hsmtest.Spec("for-one-test", p))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sha(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
