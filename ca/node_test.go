package ca_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/journal"
)

// keys is a KeySource of software keys. It keeps every digest that it was asked to sign, and injects faults.
type keys struct {
	mu     sync.Mutex
	byID   map[string]*ecdsa.PrivateKey
	signed map[string]int // times, by hex of the digest
	fault  func(ctx context.Context, digests [][]byte) error
	spoil  func(signatures [][]byte)
}

func (k *keys) add(t fataler, id string) *ecdsa.PrivateKey {
	key := newKey(t)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.byID[id] = key
	return key
}

func (k *keys) Key(_ context.Context, name ca.KeyName) (ca.Signer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key, ok := k.byID[name.ID]
	if !ok {
		return nil, fmt.Errorf("no key %s", name)
	}
	return &hsmKey{keys: k, PrivateKey: key}, nil
}

func (k *keys) set(fault func(ctx context.Context, digests [][]byte) error, spoil func([][]byte)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fault, k.spoil = fault, spoil
}

func (k *keys) times(digest []byte) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.signed[hex.EncodeToString(digest)]
}

func (k *keys) total() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for _, times := range k.signed {
		n += times
	}
	return n
}

type hsmKey struct {
	keys *keys
	*ecdsa.PrivateKey
}

func (s *hsmKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signatures, err := s.SignBatch(context.Background(), [][]byte{digest})
	if err != nil {
		return nil, err
	}
	return signatures[0], nil
}

func (s *hsmKey) SignBatch(ctx context.Context, digests [][]byte) ([][]byte, error) {
	s.keys.mu.Lock()
	fault, spoil := s.keys.fault, s.keys.spoil
	for _, d := range digests {
		s.keys.signed[hex.EncodeToString(d)]++
	}
	s.keys.mu.Unlock()
	if fault != nil {
		if err := fault(ctx, digests); err != nil {
			return nil, err
		}
	}
	signatures := make([][]byte, len(digests))
	for i, d := range digests {
		var err error
		if signatures[i], err = ecdsa.SignASN1(rand.Reader, s.PrivateKey, d); err != nil {
			return nil, err
		}
	}
	if spoil != nil {
		spoil(signatures)
	}
	return signatures, nil
}

// pki is a database with a root and an issuing CA in it.
type pki struct {
	db   db.Config
	keys *keys
}

const alice = "trivet://test/requester/alice"

// newPKI establishes CAs in a database of the test's own.
func newPKI(t testing.TB) *pki {
	t.Helper()
	p := &pki{db: cluster.Need(t).New(t), keys: &keys{byID: map[string]*ecdsa.PrivateKey{}, signed: map[string]int{}}}
	generation := func(name string, lifetime time.Duration) ca.GenerationSpec {
		p.keys.add(t, name+"-key")
		spki, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
		if err != nil {
			t.Fatal(err)
		}
		return ca.GenerationSpec{CA: name, Generation: 1, Subject: pkix.Name{Organization: []string{"Test"}, CommonName: "Test " + name}, Lifetime: lifetime,
			KeyGroup: "ca", KeyID: name + "-key", ResponderGroup: "ca", ResponderKeyID: name + "-ocsp", ResponderSPKI: spki}
	}
	n := p.start(t, "init", nil)
	err := ca.Establish(t.Context(), n.engine, ca.EstablishSpec{Requester: "trivet://test/ceremony/init",
		Root: generation("root", 3650*24*time.Hour), Issuing: generation("demo", 1825*24*time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	n.stop(t)
	return p
}

// node is a running engine with what it needs.
type node struct {
	engine  *ca.Engine
	store   *db.Store
	journal *journal.Journal
	dir     string
	cancel  context.CancelFunc
	done    chan error
	once    sync.Once
	err     error
}

// start starts a node, or a new incarnation of it, whose journal is in a directory of the test's own. prepare may change the
// configuration and returns what to do with the engine before it runs.
func (p *pki) start(t testing.TB, name string, prepare func(*ca.Config) func(*ca.Engine)) *node {
	t.Helper()
	return p.startIn(t, name, filepath.Join(t.TempDir(), name), prepare)
}

func (p *pki) startIn(t testing.TB, name, dir string, prepare func(*ca.Config) func(*ca.Engine)) *node {
	t.Helper()
	n := p.make(t, name, dir, prepare)
	n.run(t)
	return n
}

func (p *pki) make(t testing.TB, name, dir string, prepare func(*ca.Config) func(*ca.Engine)) *node {
	t.Helper()
	n := &node{dir: dir, done: make(chan error, 1), store: dbtest.Open(t, p.db)}
	var err error
	if n.journal, err = journal.Open(journal.Config{Dir: dir, Node: name}); err != nil {
		t.Fatal(err)
	}
	lane, err := n.store.OpenLane(t.Context(), name, n.journal.Incarnation(), 0)
	if err != nil {
		t.Fatal(err)
	}
	profiles, err := ca.DefaultProfiles()
	if err != nil {
		t.Fatal(err)
	}
	cfg := ca.Config{
		Node: name, Store: n.store, Journal: n.journal, Lane: lane, Keys: p.keys, MACKeys: catest.MACKeys(t), Profiles: profiles, Epoch: 1, BaseURL: "http://pki.example.org",
		SweepEvery: time.Hour, SweepAge: time.Millisecond, Log: slog.New(slog.DiscardHandler),
	}
	after := func(*ca.Engine) {}
	if prepare != nil {
		if f := prepare(&cfg); f != nil {
			after = f
		}
	}
	if n.engine, err = ca.New(cfg); err != nil {
		t.Fatal(err)
	}
	after(n.engine)
	return n
}

func (n *node) run(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	go func() { n.done <- n.engine.Run(ctx) }()
	t.Cleanup(func() { n.stop(t) })
	dbtest.Until(t, "the engine runs", func() bool {
		select {
		case err := <-n.done:
			t.Fatalf("the engine ended: %v", err)
		default:
		}
		return n.engine.Running()
	})
}

// stop ends a node, once, and returns Run's error.
func (n *node) stop(t testing.TB) error {
	t.Helper()
	n.once.Do(func() {
		n.cancel()
		n.err = <-n.done
		if err := n.journal.Close(); err != nil && !errors.Is(err, journal.ErrFailed) {
			t.Error(err)
		}
	})
	return n.err
}

// ask makes a request with a key of its own.
func ask(t fataler, key string, names ...string) ca.Request {
	t.Helper()
	if names == nil {
		names = []string{"www.example.org"}
	}
	r := request(makeCSRFor(t, newKey(t), "", names))
	r.IdempotencyKey, r.CA, r.Principal = key, "demo", alice
	return r
}

func (n *node) issue(t testing.TB, r ca.Request) (*ca.Issued, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return n.engine.Issue(ctx, r)
}

func (n *node) mustIssue(t testing.TB, r ca.Request) *ca.Issued {
	t.Helper()
	issued, err := n.issue(t, r)
	if err != nil {
		t.Fatalf("issuing: %v", err)
	}
	return issued
}

// persist repeats a request for as long as it is told that a repeat may help, as clients do: a busy machine's second holder may answer too late.
func (n *node) persist(t testing.TB, r ca.Request) (issued *ca.Issued) {
	t.Helper()
	dbtest.Until(t, "a certificate", func() bool {
		var err error
		issued, err = n.issue(t, r)
		var refused *ca.Error
		if err != nil && (!errors.As(err, &refused) || !refused.Retryable()) {
			t.Fatalf("issuing: %v", err)
		}
		return err == nil
	})
	return issued
}

// check is the invariant checker of these tests: one certificate per request key and per serial, every signature intended, every certificate verifying.
func (p *pki) check(t testing.TB) {
	t.Helper()
	store := dbtest.Open(t, p.db)
	_, err := store.Read(t.Context(), "check", "", func(ctx context.Context, c *sql.Conn) error {
		rows, err := c.QueryContext(ctx, `SELECT i.issuer, i.serial, COALESCE(i.req, ''), COALESCE(t.tbs, i.tbs), COALESCE(o.kind, ''), COALESCE(o.der, '')
			FROM intent i LEFT JOIN outcome o USING (issuer, serial) LEFT JOIN intent_tbs t USING (issuer, serial)`)
		if err != nil {
			return err
		}
		defer rows.Close()
		intended := make(map[string]bool)
		byReq := make(map[string]string)
		for rows.Next() {
			var issuer, kind string
			var serial, req, tbs, der []byte
			if err := rows.Scan(&issuer, &serial, &req, &tbs, &kind, &der); err != nil {
				return err
			}
			id := issuer + ":" + hex.EncodeToString(serial)
			if len(tbs) == 0 {
				tbs = db.TBSOf(der) // it was dropped, or put back with the certificate
			}
			intended[hex.EncodeToString(sha256Sum(tbs))] = true
			if len(req) > 0 {
				if other, ok := byReq[string(req)]; ok {
					t.Errorf("one request key, two serials: %s and %s", id, other)
				}
				byReq[string(req)] = id
			}
			if kind != db.OutcomeCert {
				continue
			}
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				t.Errorf("%s: %v", id, err)
				continue
			}
			p.keys.mu.Lock()
			key := p.keys.byID[issuer[:len(issuer)-3]+"-key"]
			p.keys.mu.Unlock()
			if string(cert.RawTBSCertificate) != string(tbs) || !ecdsa.VerifyASN1(&key.PublicKey, sha256Sum(tbs), cert.Signature) {
				t.Errorf("%s: the certificate on record is not what was intended, or does not verify", id)
			}
		}
		p.keys.mu.Lock()
		defer p.keys.mu.Unlock()
		for digest := range p.keys.signed {
			if !intended[digest] && !p.isCRL(ctx, c, digest) {
				t.Errorf("digest %s was signed without an intent in the database", digest)
			}
		}
		return rows.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func sha256Sum(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:]
}

// isCRL tells whether the digest is that of a CRL on record.
func (p *pki) isCRL(ctx context.Context, c *sql.Conn, digest string) bool {
	raw, err := hex.DecodeString(digest)
	if err != nil {
		return false
	}
	var n int
	return c.QueryRowContext(ctx, "SELECT COUNT(*) FROM crl WHERE tbs_hash = ?", raw).Scan(&n) == nil && n > 0
}
