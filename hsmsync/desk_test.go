package hsmsync_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// token is a software member as a coordinator sees one: with a transport key that its agent vouches for, and agents'
// rule of which acts need approval. Everything in it but its name goes when it is exchanged.
type token struct {
	*software
	id        *identity.Identity
	now       func() time.Time
	transport []byte
	guard     sync.Mutex
	known     map[string]bool // transport keys it has given its domain key to
	foreign   []hsm.KeyRecord // other objects
	faulty    map[hsm.KeyID]string
	odd       map[hsm.KeyID]string // attributes that differ
}

func (d *desk) token(name string) *token { return tokenOf(d.t, name, d.now) }

func tokenOf(t testing.TB, name string, now func() time.Time) *token {
	k := &token{software: newSoftware(name), id: named(t, identity.RoleHSMD, name), now: now, transport: make([]byte, 32), known: map[string]bool{}, faulty: map[hsm.KeyID]string{}, odd: map[hsm.KeyID]string{}}
	_, _ = rand.Read(k.transport)
	k.serial = hex.EncodeToString(k.transport[:4])
	return k
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func (k *token) Health(ctx context.Context) (hsm.Info, error) {
	i, err := k.software.Health(ctx)
	if err == nil {
		i.Transport = sum(k.transport)
		k.guard.Lock()
		defer k.guard.Unlock()
		i.Foreign, i.Faulty = len(k.foreign), len(k.faulty)
		i.Digest = hsm.InventoryDigest(k.change(k.all()))
	}
	return i, err
}

func (k *token) all() (out []hsm.KeyRecord) {
	k.set(func() { out = k.records() })
	return out
}

// change makes records what the test wants. The caller holds guard.
func (k *token) change(all []hsm.KeyRecord) []hsm.KeyRecord {
	for i := range all {
		all[i].Fault = k.faulty[all[i].ID]
		if a := k.odd[all[i].ID]; a != "" {
			all[i].Attributes = a
		}
	}
	return append(all, k.foreign...)
}

func (k *token) Inventory(ctx context.Context) ([]hsm.KeyRecord, error) {
	all, err := k.software.Inventory(ctx)
	k.guard.Lock()
	defer k.guard.Unlock()
	return k.change(all), err
}

func (k *token) Import(ctx context.Context, b hsm.Blob) (hsm.KeyRecord, error) {
	r, err := k.software.Import(ctx, b)
	if err == nil {
		k.guard.Lock()
		defer k.guard.Unlock()
		delete(k.faulty, b.ID) // as tokens do: completed
	}
	return r, err
}

func (k *token) Challenge(ctx context.Context, group string, id hsm.KeyID, nonce []byte) ([]byte, string, error) {
	k.guard.Lock()
	fault := k.faulty[id]
	k.guard.Unlock()
	if fault != "" {
		return nil, "", hsm.Errorf(hsm.ClassNotFound, "challenge", "%s", fault)
	}
	return k.software.Challenge(ctx, group, id, nonce)
}

func (k *token) TransportKey(ctx context.Context) ([]byte, error) {
	var out []byte
	err := k.do(ctx, "transport", func() error {
		cert := k.id.Certificate()
		digest := sha256.Sum256(append([]byte("hsmd-transport-v1\x00"), k.transport...))
		sig, err := cert.PrivateKey.(crypto.Signer).Sign(rand.Reader, digest[:], crypto.SHA256)
		if err == nil {
			out, err = json.Marshal(map[string]any{"spki": k.transport, "chain": cert.Certificate, "signature": sig})
		}
		return err
	})
	return out, err
}

func (k *token) ExportDomain(ctx context.Context, req hsm.DomainRequest) (wrapped []byte, kek string, err error) {
	err = k.do(ctx, "export-domain", func() error {
		var to struct {
			SPKI []byte `json:"spki"`
		}
		if err := json.Unmarshal(req.Recipient, &to); err != nil {
			return err
		}
		print := sum(to.SPKI)
		if len(k.keys) > 0 && !k.known[print] {
			if err := k.approved(req.Grant, "hsm-enroll", "transport", print); err != nil {
				return err
			}
		}
		if kek = req.KEK; kek != k.kek && kek != k.nextKEK {
			return hsm.Errorf(hsm.ClassRequest, "export-domain", "no domain key %s", kek)
		}
		k.known[print] = true
		wrapped = []byte(print)
		return nil
	})
	return wrapped, kek, err
}

func (k *token) ImportDomain(ctx context.Context, kek string, wrapped []byte) error {
	return k.do(ctx, "import-domain", func() error {
		if string(wrapped) != sum(k.transport) {
			return hsm.Errorf(hsm.ClassRequest, "import-domain", "wrapped for another token")
		}
		return k.join(kek)
	})
}

func (k *token) Destroy(ctx context.Context, req hsm.DestroyRequest) error {
	if err := k.approved(req.Grant, "key-destroy", "spki", sum(req.SPKI)); err != nil {
		return err
	}
	return k.software.Destroy(ctx, req)
}

func (k *token) approved(grant []byte, action, name, value string) error {
	var g identity.Grant
	err := json.Unmarshal(grant, &g)
	if err == nil && (g.Request.Action != action || g.Request.Detail[name] != value) {
		err = errors.New("it is for something else")
	}
	if err == nil {
		_, err = k.id.Approved(g.Request, g.Approvals, 2, k.now(), identity.RoleAdmin, identity.RoleCAOperator)
	}
	if err != nil {
		return &hsm.Error{Class: hsm.ClassDenied, Code: hsm.CodeApproval, Op: action, Err: err}
	}
	return nil
}

var identities sync.Map

// named is the identity of a role and name, for longer than any test lasts in virtual time.
func named(t testing.TB, role identity.Role, name string) *identity.Identity {
	t.Helper()
	p := identity.Principal{Cluster: "test", Role: role, Name: name}
	if id, ok := identities.Load(p); ok {
		return id.(*identity.Identity)
	}
	people.Lock()
	files, err := people.authority.IssueTo(people.dir+"/long-"+string(role)+"-"+name, p, nil, nil, 10000*time.Hour)
	people.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.Load(files)
	if err != nil {
		t.Fatal(err)
	}
	identities.Store(p, id)
	return id
}

// desk is a coordinator over three software members in one group, in virtual time.
type desk struct {
	t       *testing.T
	chain   *memory
	now     func() time.Time
	members []*token
	at      map[string]*token // by name: what answers there
	c       *hsmsync.Coordinator
	force   bool

	mu   sync.Mutex // guards seen
	seen []hsmsync.Progress
}

// atDesk sets a group of members a, b, c up.
func atDesk(t *testing.T, test func(*testing.T, *desk)) {
	atEmptyDesk(t, func(t *testing.T, d *desk) {
		if err := d.setup(hsmsync.Policy{}); err != nil {
			t.Fatal(err)
		}
		test(t, d)
	})
}

func atEmptyDesk(t *testing.T, test func(*testing.T, *desk)) {
	t.Helper()
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		named(t, identity.RoleHSMD, name) // files are read outside the bubble
	}
	for _, role := range []identity.Role{identity.RoleSync, identity.RoleAdmin, identity.RoleCAOperator, identity.RoleCeremony, identity.RoleSRE} {
		named(t, role, string(role)+"1")
	}
	named(t, identity.RoleSync, "sync2")
	real := time.Now()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		d := &desk{t: t, chain: &memory{}, at: map[string]*token{}, now: func() time.Time { return real.Add(time.Since(began)) }}
		for _, name := range []string{"a", "b", "c"} {
			d.members = append(d.members, d.token(name))
			d.at[name] = d.members[len(d.members)-1]
		}
		d.c = d.coordinator("sync1")
		test(t, d)
	})
}

func (d *desk) coordinator(name string) *hsmsync.Coordinator {
	d.t.Helper()
	return d.as(named(d.t, identity.RoleSync, name))
}

func (d *desk) as(id *identity.Identity) *hsmsync.Coordinator {
	d.t.Helper()
	c, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: "ca", Identity: id, Chain: d.chain, Now: d.now, Log: logger(d.t), Force: d.force,
		Connect: func(name, _ string) hsmsync.Agent { return &answering{d: d, name: name} },
		Progress: func(p hsmsync.Progress) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.seen = append(d.seen, p)
		},
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return c
}

// answering is whatever token stands under a name at the moment.
type answering struct {
	hsmsync.Agent // nil: only what is below is called
	d             *desk
	name          string
}

func (a *answering) to() *token { return a.d.at[a.name] }

func (a *answering) Health(ctx context.Context) (hsm.Info, error) {
	if a.to() == nil {
		return hsm.Info{}, dead(ctx, nil)
	}
	return a.to().Health(ctx)
}
func (a *answering) Inventory(ctx context.Context) ([]hsm.KeyRecord, error) {
	return a.to().Inventory(ctx)
}
func (a *answering) Challenge(ctx context.Context, group string, id hsm.KeyID, nonce []byte) ([]byte, string, error) {
	return a.to().Challenge(ctx, group, id, nonce)
}
func (a *answering) Generate(ctx context.Context, s hsm.KeySpec) (hsm.KeyRecord, error) {
	return a.to().Generate(ctx, s)
}
func (a *answering) Export(ctx context.Context, id hsm.KeyID, kek string) (hsm.Blob, error) {
	return a.to().Export(ctx, id, kek)
}
func (a *answering) Import(ctx context.Context, b hsm.Blob) (hsm.KeyRecord, error) {
	return a.to().Import(ctx, b)
}
func (a *answering) Destroy(ctx context.Context, r hsm.DestroyRequest) error {
	return a.to().Destroy(ctx, r)
}
func (a *answering) Retire(ctx context.Context, r hsm.RetireRequest) error {
	return a.to().Retire(ctx, r)
}

func (a *answering) Bury(ctx context.Context, r hsm.DestroyRequest) error { return a.to().Bury(ctx, r) }
func (a *answering) TransportKey(ctx context.Context) ([]byte, error) {
	return a.to().TransportKey(ctx)
}
func (a *answering) GenerateDomain(ctx context.Context, kek string) error {
	return a.to().GenerateDomain(ctx, kek)
}
func (a *answering) ExportDomain(ctx context.Context, r hsm.DomainRequest) ([]byte, string, error) {
	return a.to().ExportDomain(ctx, r)
}
func (a *answering) ImportDomain(ctx context.Context, kek string, w []byte) error {
	return a.to().ImportDomain(ctx, kek, w)
}
func (a *answering) Rotate(ctx context.Context, kek string) error { return a.to().Rotate(ctx, kek) }
func (a *answering) DropDomain(ctx context.Context, kek string) error {
	return a.to().DropDomain(ctx, kek)
}
func (a *answering) RotatePIN(ctx context.Context, req hsm.PINRequest) error {
	return a.to().RotatePIN(ctx, req)
}

func (a *answering) ForgetTransport(ctx context.Context, transport string) error {
	return a.to().ForgetTransport(ctx, transport)
}
func (a *answering) SetEpoch(ctx context.Context, r hsm.EpochRecord) error {
	return a.to().SetEpoch(ctx, r)
}

// crew is the members as the configuration lists them.
func crew(names ...string) (out []hsmsync.Member) {
	for _, n := range names {
		out = append(out, hsmsync.Member{Name: n, Address: n + ".example:1", Site: "here"})
	}
	return out
}

func (d *desk) setup(p hsmsync.Policy) error { return d.c.Setup(d.t.Context(), crew("a", "b", "c"), p) }

func (d *desk) create() (hsm.KeyRecord, error) { return d.make("issuing-g1") }

func (d *desk) make(label string) (hsm.KeyRecord, error) {
	return d.c.CreateKey(d.t.Context(), hsm.KeySpec{Label: label, Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
}

// must creates keys of these labels.
func (d *desk) must(labels ...string) (out []hsm.KeyRecord) {
	d.t.Helper()
	for _, l := range labels {
		r, err := d.make(l)
		if err != nil {
			d.t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

// grant is an approval by two people, in force for a lifetime.
func (d *desk) grant(a hsmsync.Act, lifetime time.Duration) []byte {
	d.t.Helper()
	now := d.now()
	g, err := named(d.t, identity.RoleSRE, "sre1").Propose(a.Action, a.Object, a.Detail, now, lifetime)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, role := range []identity.Role{identity.RoleAdmin, identity.RoleCAOperator} {
		p, err := named(d.t, role, string(role)+"1").Approve(g.Request, now)
		if err != nil {
			d.t.Fatal(err)
		}
		g.Approvals = append(g.Approvals, p)
	}
	b, err := json.Marshal(g)
	if err != nil {
		d.t.Fatal(err)
	}
	return b
}

// newcomer puts a fresh token under a name and returns the request to enroll it.
func (d *desk) newcomer(name string) hsmsync.EnrollRequest {
	d.t.Helper()
	k := d.token(name)
	d.at[name] = k
	return d.request(name)
}

func (d *desk) request(name string) hsmsync.EnrollRequest {
	return hsmsync.EnrollRequest{Name: name, Address: name + ".example:1", Site: "here", Grant: d.grant(d.c.EnrollAct(name, sum(d.at[name].transport)), time.Hour)}
}

func (d *desk) state() *hsmsync.State {
	d.t.Helper()
	entries, err := d.chain.Log(d.t.Context(), "ca", 1)
	if err != nil {
		d.t.Fatal(err)
	}
	s, err := hsmsync.Fold(entries)
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

// live lists the live keys.
func (d *desk) live() (ids []hsm.KeyID) {
	d.t.Helper()
	for _, k := range d.state().In(hsmsync.StateLive) {
		ids = append(ids, k.ID)
	}
	return ids
}

// expect checks the members' states, "a active, b standby".
func (d *desk) expect(want string) {
	d.t.Helper()
	var got []string
	for _, m := range d.state().Members() {
		got = append(got, m.Name+" "+string(m.State))
	}
	if g := strings.Join(got, ", "); g != want {
		d.t.Fatalf("members are %q, want %q", g, want)
	}
}

// same checks that a member holds exactly the given keys.
func (d *desk) same(name string, want ...hsm.KeyRecord) {
	d.t.Helper()
	var got, ids []string
	for _, k := range d.at[name].all() {
		got = append(got, string(k.ID)+sum(k.SPKI))
	}
	for _, k := range want {
		ids = append(ids, string(k.ID)+sum(k.SPKI))
	}
	slices.Sort(got)
	slices.Sort(ids)
	if !slices.Equal(got, ids) {
		d.t.Fatalf("%s holds %d keys %v, want %d %v", name, len(got), got, len(ids), ids)
	}
}

// failed checks that an error says all of these.
func failed(t testing.TB, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one that says %q", want)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Fatalf("error %v, want one that says %q", err, w)
		}
	}
}

func good(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lostAnswer does the operation and reports that it failed.
func lostAnswer(_ context.Context, do func() error) error {
	return errors.Join(do(), hsm.Errorf(hsm.ClassDevice, "call", "answer lost"))
}

// forms are the ways in which a call to a member goes wrong.
var forms = map[string]fault{"not done": failing(hsm.ClassDevice), "done but reported failed": lostAnswer, "hung": hung}

// once has a fault happen at the n-th call from now on and never again.
func once(n int, f fault) fault {
	var mu sync.Mutex
	return func(ctx context.Context, do func() error) error {
		mu.Lock()
		n--
		now := n == 0
		mu.Unlock()
		if now {
			return f(ctx, do)
		}
		return do()
	}
}

func labels(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("key-%d", i))
	}
	return out
}
