package ocsp_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/db"
	"trivet/db/dbtest"
	"trivet/identity"
	"trivet/ocsp"
)

var cluster *dbtest.Cluster

func TestMain(m *testing.M) {
	os.Exit(dbtest.Main(m, "127.93.1", 2, func(c *dbtest.Cluster) { cluster = c }))
}

// writer appends facts as a CA node does.
type writer struct {
	t     *testing.T
	store *db.Store
	lane  *db.Lane
	node  string
}

func newWriter(t *testing.T, store *db.Store, node string) *writer {
	t.Helper()
	var incarnation [16]byte
	rand.Read(incarnation[:])
	lane, err := store.OpenLane(t.Context(), node, incarnation, 0)
	must(t, err)
	return &writer{t, store, lane, node}
}

func (w *writer) append(f db.Fact) uint64 {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	done, err := w.lane.Append(ctx, []db.Fact{f})
	must(w.t, err)
	must(w.t, done[0].Err)
	return done[0].Seq
}

func (w *writer) issue(issuer string, serial []byte) uint64 {
	w.t.Helper()
	hash, req := make([]byte, 32), make([]byte, 32)
	rand.Read(req)
	_, _, err := w.store.InsertIntents(w.t.Context(), []db.Intent{{
		Issuer: issuer, Serial: serial, Req: req, Body: hash, TBS: []byte{0x30, 0}, Profile: "tls-server", ProfileVersion: 1,
		ProfileHash: hash, Requester: "trivet://test/requester/r", SiteEpoch: 1, Node: w.node,
	}})
	must(w.t, err)
	return w.append(db.Fact{Outcome: &db.Outcome{
		Issuer: issuer, Serial: serial, Kind: db.OutcomeCert, DER: []byte{0x30, 0}, NotAfter: time.Now().AddDate(0, 0, 60),
	}})
}

func (w *writer) revoke(issuer string, serial []byte, reason uint8) uint64 {
	w.t.Helper()
	return w.append(db.Fact{Revocation: &db.Revocation{
		Issuer: issuer, Serial: serial, N: 1, Event: db.EventRevoke, Reason: reason, Date: time.Now(), Actor: "trivet://test/ca-operator/o", SiteEpoch: 1,
	}})
}

func (w *writer) generation(a *authority) {
	w.t.Helper()
	issuer := a.name + "-g1"
	must(w.t, w.store.InsertGeneration(w.t.Context(), db.Generation{
		Issuer: issuer, CA: a.name, Generation: 1, Parent: issuer, KeyGroup: "ca", KeyID: "00", SPKI: a.cert.RawSubjectPublicKeyInfo,
	}))
	w.append(db.Fact{Generation: &db.GenerationEvent{Issuer: issuer, N: 1, Event: db.EventCertificate, CertIssuer: issuer, CertSerial: []byte{1}, DER: a.cert.Raw}})
	w.append(db.Fact{Responder: &db.Responder{Issuer: issuer, N: 1, KeyGroup: "va", KeyID: a.name, CertSerial: []byte{2}, DER: a.responder.Raw}})
}

func (w *writer) crl(a *authority, n uint32, number int64) {
	w.t.Helper()
	der := a.crl(w.t, number)
	issuer := a.name + "-g1"
	must(w.t, w.store.InsertCRL(w.t.Context(), db.CRL{
		Issuer: issuer, N: n, Number: uint64(number), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour), TBSHash: make([]byte, 32), Node: w.node, SiteEpoch: 1,
	}))
	w.append(db.Fact{CRL: &db.CRLResult{Issuer: issuer, N: n, Kind: db.CRLIssued, DER: der, Number: uint64(number)}})
}

// database is an empty, migrated database of the test's own, on nodes that are all in sync.
func database(t *testing.T) db.Config {
	t.Helper()
	cluster.Need(t).Whole(t)
	return cluster.New(t)
}

// open is dbtest.Open for tests that take nodes away: what is left of connections to those cannot be closed well.
func open(t *testing.T, cfg db.Config) *db.Store {
	t.Helper()
	store, err := db.Open(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- store.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
		_ = store.Close()
	})
	dbtest.Until(t, "a node can be written", func() bool { return store.Ready() == nil })
	return store
}

// live runs a VA against the cluster.
func live(t *testing.T, cfg db.Config, a *authority, name string, p ocsp.Policy) *ocsp.VA {
	t.Helper()
	store := open(t, cfg)
	var incarnation [16]byte
	rand.Read(incarnation[:])
	va, err := ocsp.New(ocsp.Config{
		Node: name, Incarnation: incarnation, Policy: p,
		Record: ocsp.NewRecord(store, db.Member{VA: name, Policy: string(p), Address: "127.93.2.1:8443", Incarnation: incarnation[:]}),
		Signer: func(context.Context, string, string) (ocsp.Signer, error) { return a.signer, nil },
		Log:    slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelWarn})), Metrics: prometheus.NewRegistry(),
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- va.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
	})
	return va
}

func able(va *ocsp.VA, capability string) func() bool {
	return func() bool { return va.Report().Capabilities[capability].OK }
}

func TestFollowsARealRecordJudgedByOpenSSL(t *testing.T) {
	openssl := program(t, "openssl")
	cfg := database(t)
	a := newAuthority(t, "demo")
	store := open(t, cfg)
	one, two := newWriter(t, store, "ca1"), newWriter(t, store, "ca2")
	one.generation(a)
	one.issue("demo-g1", goodSerial)

	// The node uses the account it would have: it can read, and add nothing but its own membership.
	own := cfg
	own.User, own.PasswordFile = "ocsp", filepath.Join(t.TempDir(), "password")
	must(t, os.WriteFile(own.PasswordFile, []byte("ocsp-test\n"), 0o600))
	must(t, db.Grant(t.Context(), cfg, []db.UserSpec{{Name: own.User, PasswordFile: own.PasswordFile, Role: "ocsp"}}))
	va := live(t, own, a, "ocsp1", ocsp.Strict) // joins in the middle
	two.issue("demo-g1", revokedSerial)
	seq := two.revoke("demo-g1", revokedSerial, 4)
	one.crl(a, 1, 1001)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if !va.Applied(ctx, two.lane.Name(), seq) {
		t.Fatal("a committed revocation is not applied")
	}
	dbtest.Until(t, "it can do everything", func() bool { return va.Report().State == "ok" })

	server := httptest.NewServer(va.Public())
	defer server.Close()
	judge(t, openssl, server.URL+"/ocsp/demo", a)
	if w := fetch(va.Public(), "/crl/demo-g1.crl"); w.Code != 200 {
		t.Errorf("CRL: %d", w.Code)
	}

	// A member in the record, until it leaves.
	members, err := store.Members(ctx)
	must(t, err)
	if len(members) != 1 || members[0].VA != "ocsp1" || members[0].Event != "in" || members[0].Policy != "strict" {
		t.Errorf("members: %+v", members)
	}
	must(t, store.InsertMember(ctx, db.Member{VA: "ocsp1", N: 2, Event: "out", Policy: "strict", Address: members[0].Address, Incarnation: members[0].Incarnation}))
	dbtest.Until(t, "it has registered anew", func() bool {
		members, err := store.Members(ctx)
		return err == nil && members[0].N == 3 && members[0].Event == "in"
	})

	// A lane's end is followed; its writer goes on in another lane.
	must(t, one.lane.Close(ctx))
	one = newWriter(t, store, "ca1")
	late := []byte{0x31, 0x32}
	one.issue("demo-g1", late)
	if got := says(ask(t, va.Public(), "/ocsp/demo", a, late, crypto.SHA1)); got != "good" {
		t.Errorf("certificate from a new lane: %s", got)
	}
}

func fetch(h http.Handler, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

// TestDatabaseLossEndsGoodUnderStrictOnly: one of two nodes is frozen. Without a majority there is no causal read; revoked stays, good ends with
// the lease, and both come back with the node.
func TestDatabaseLossEndsGoodUnderStrictOnly(t *testing.T) {
	cfg := database(t)
	a := newAuthority(t, "demo")
	w := newWriter(t, open(t, cfg), "ca1")
	w.generation(a)
	w.issue("demo-g1", goodSerial)
	w.issue("demo-g1", revokedSerial)
	w.revoke("demo-g1", revokedSerial, 0)
	strict, serve := live(t, cfg, a, "ocsp1", ocsp.Strict), live(t, cfg, a, "ocsp2", ocsp.Serve)
	for _, va := range []*ocsp.VA{strict, serve} {
		dbtest.Until(t, "it serves and has signed all", func() bool {
			p := va.Position()
			return able(va, "ocsp:demo-g1")() && len(p.Issuers) == 1 && p.Issuers[0].Good == 1 && p.Issuers[0].Revoked == 1 && p.Issuers[0].Unsigned == 0
		})
	}
	say := func(va *ocsp.VA, serial []byte) string {
		return says(ask(t, va.Public(), "/ocsp", a, serial, crypto.SHA1))
	}
	cluster.Freeze(1)
	defer cluster.Thaw(1)
	dbtest.Until(t, "the lease has run out", func() bool { return strict.LeaseRemaining() <= 0 && serve.LeaseRemaining() <= 0 })
	for _, c := range []struct {
		va     *ocsp.VA
		serial []byte
		want   string
	}{
		{strict, goodSerial, "try later"}, {strict, revokedSerial, "revoked"}, {strict, absentSerial, "try later"},
		{serve, goodSerial, "good"}, {serve, revokedSerial, "revoked"}, {serve, absentSerial, "try later"},
	} {
		if got := say(c.va, c.serial); got != c.want {
			t.Errorf("%s, no database: serial %x is %s, want %s", c.va.Policy(), c.serial, got, c.want)
		}
	}
	cluster.Thaw(1)
	cluster.Whole(t)
	dbtest.Until(t, "strict has its lease again", func() bool { return say(strict, goodSerial) == "good" })
}

func TestInternalListenerAnswersTheBarrierForCAsOnly(t *testing.T) {
	dir := t.TempDir()
	infra, err := identity.CreateAuthority(dir, "test")
	must(t, err)
	load := func(role identity.Role, name string) *identity.Identity {
		f, err := infra.IssueTo(t.TempDir(), identity.Principal{Cluster: "test", Role: role, Name: name}, nil, nil, time.Hour)
		must(t, err)
		id, err := identity.Load(f)
		must(t, err)
		return id
	}
	n, _ := populated(t)
	server := httptest.NewUnstartedServer(n.Internal(prometheus.NewRegistry()))
	server.TLS = load(identity.RoleOCSP, "ocsp1").ServerTLS()
	server.StartTLS()
	defer server.Close()
	get := func(role identity.Role, path string) (int, []byte) {
		client := &http.Client{
			Transport:     &http.Transport{TLSClientConfig: load(role, "x1").ClientTLS(identity.RoleOCSP)},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
		defer client.CloseIdleConnections()
		resp, err := client.Get(server.URL + path)
		must(t, err)
		defer resp.Body.Close()
		var body json.RawMessage
		_ = json.NewDecoder(resp.Body).Decode(&body)
		return resp.StatusCode, body
	}
	for _, c := range []struct {
		role identity.Role
		path string
		want int
	}{
		{identity.RoleCA, "/internal/applied?lane=ca2/0&seq=1", 200}, {identity.RoleLB, "/internal/applied?lane=ca2/0&seq=1", 403},
		{identity.RoleRequester, "/internal/applied?lane=ca2/0&seq=1", 403}, {identity.RoleCA, "/internal/applied?lane=ca2/0", 400},
		{identity.RoleCA, "/internal/applied?lane=ca2/0&seq=x", 400}, {identity.RoleCA, "/internal/applied?lane=ca2/0&seq=1&wait_ms=-1", 400},
		{identity.RoleFsck, "/internal/position", 200}, {identity.RoleLB, "/internal/position", 403},
		{identity.RoleLB, "/healthz", 200}, {identity.RoleLB, "/metrics", 200}, {identity.RoleLB, "/ca/demo-g1.crt", 200},
		{identity.RoleRequester, "/ca/demo-g1.crt", 403}, {identity.RoleLB, "/ocsp/demo//x", 200},
	} {
		if got, body := get(c.role, c.path); got != c.want {
			t.Errorf("%s %s: %d, want %d: %s", c.role, c.path, got, c.want, body)
		}
	}
	var applied ocsp.Applied
	for seq, want := range map[uint64]bool{1: true, 2: false} {
		_, body := get(identity.RoleCA, fmt.Sprintf("/internal/applied?lane=ca2/0&seq=%d&wait_ms=1", seq))
		must(t, json.Unmarshal(body, &applied))
		if applied.VA != "ocsp1" || applied.Applied != want || applied.Seq != 1 {
			t.Errorf("seq %d: %+v", seq, applied)
		}
	}
}

// TestDatabaseNodeOfOldContentsIsNamedAndAnotherRead: one of two nodes comes back with old contents and claims to be synced. The VA that met it
// names it, its store keeps it out of use, and what is answered stays true and current.
func TestDatabaseNodeOfOldContentsIsNamedAndAnotherRead(t *testing.T) {
	cfg := database(t)
	a := newAuthority(t, "demo")
	w := newWriter(t, open(t, cfg), "ca1")
	w.generation(a)
	w.issue("demo-g1", goodSerial)
	va := live(t, cfg, a, "ocsp1", ocsp.Strict)
	dbtest.Until(t, "it serves", able(va, "ocsp:demo-g1"))
	w.issue("demo-g1", revokedSerial)
	w.revoke("demo-g1", revokedSerial, 0)

	cluster.End(1)
	name := "`" + cfg.Name + "`."
	cluster.Tamper(t, 1, "DELETE FROM "+name+"feed WHERE kind = 3", "DELETE FROM "+name+"revocation")
	cluster.Restart(t, 1)
	t.Cleanup(func() { cluster.Renew(t, 1) })
	store := open(t, cfg)
	dbtest.Until(t, "the node is named", func() bool { return store.Nodes()[1].Diverged })
	late := []byte{0x41, 0x42}
	w.issue("demo-g1", late)
	for serial, want := range map[string]string{string(late): "good", string(revokedSerial): "revoked", string(goodSerial): "good"} {
		dbtest.Until(t, "status is "+want, func() bool { return says(ask(t, va.Public(), "/ocsp", a, []byte(serial), crypto.SHA1)) == want })
	}
	newer := live(t, cfg, a, "ocsp2", ocsp.Strict) // one that was not there before
	dbtest.Until(t, "the new one says revoked", func() bool { return says(ask(t, newer.Public(), "/ocsp", a, revokedSerial, crypto.SHA1)) == "revoked" })
}
