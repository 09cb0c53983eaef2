// Package catest runs all of package ca for tests, on a real database, with software keys in place of an HSM group.
package catest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/ca"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/journal"
)

// Soon is a deadline that only a hanging call meets.
func Soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// KeyIDs are the keys of the CAs that Spec describes.
var KeyIDs = []string{"root", "root-ocsp", "demo", "demo-ocsp"}

// Keys is a ca.KeySource of P-256 keys in memory. All nodes of a test share one.
type Keys struct {
	mu   sync.Mutex
	keys map[string]*Key
}

// Key is one of them.
type Key struct {
	*ecdsa.PrivateKey
	Refuse func() error // asked before every signature, if set
}

// NewKeys makes keys of the given ids.
func NewKeys(t testing.TB, ids ...string) *Keys {
	t.Helper()
	k := &Keys{keys: map[string]*Key{}}
	for _, id := range ids {
		k.keys[id] = &Key{PrivateKey: newKey(t)}
	}
	return k
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Key returns the key as it is now.
func (k *Keys) Key(_ context.Context, name ca.KeyName) (ca.Signer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key, ok := k.keys[name.ID]
	if !ok {
		return nil, fmt.Errorf("no key %s", name)
	}
	now := *key
	return &now, nil
}

// Change lets a test spoil a key.
func (k *Keys) Change(id string, change func(*Key)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(k.keys[id])
}

// SPKI returns a key's public half.
func (k *Keys) SPKI(t testing.TB, id string) []byte {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	der, err := x509.MarshalPKIXPublicKey(k.keys[id].Public())
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// SignBatch signs SHA-256 digests.
func (k *Key) SignBatch(_ context.Context, digests [][]byte) ([][]byte, error) {
	if k.Refuse != nil {
		if err := k.Refuse(); err != nil {
			return nil, err
		}
	}
	out := make([][]byte, len(digests))
	for i, d := range digests {
		var err error
		if out[i], err = ecdsa.SignASN1(rand.Reader, k.PrivateKey, d); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Profile is the profile "tls-server" of every Node. It allows hold.
const Profile = `
profile: tls-server
version: 1
cas: [demo]
keys: {ec: [P-256], rsa: {min: 2048, max: 4096}}
validity: {default: 90d, max: 100d, backdate: 5m}
names:
  source: csr
  common_name: first-dns
  sans: {dns: {min: 1, max: 100, under: [example.org]}}
extensions:
  key_usage: {ec: [digitalSignature], rsa: [digitalSignature, keyEncipherment]}
  ext_key_usage: [serverAuth]
revocation: {mode: crl+ocsp, hold: true}
`

// Config says how a Node differs from the usual one.
type Config struct {
	Name      string            // default ca1
	Members   ca.MemberChain    // default: the database
	Transport http.RoundTripper // to responders
	VoidAfter time.Duration     // of ca.CRLConfig; default 300ms
}

// Node is everything of package ca that one node runs, but for the CRL and responder jobs, which a test starts itself.
type Node struct {
	Name     string
	Store    *db.Store
	Journal  *journal.Journal
	Lane     *db.Lane
	Status   *db.Lane
	Engine   *ca.Engine
	Profiles *ca.Profiles
	Barrier  *ca.Barrier
	Revoker  *ca.Revoker
	CRLs     *ca.CRLs

	ahead atomic.Int64
}

// Advance sets the engine's clock on.
func (n *Node) Advance(by time.Duration) { n.ahead.Add(int64(by)) }

func (n *Node) now() time.Time { return time.Now().Add(time.Duration(n.ahead.Load())) }

// Start starts a node and stops it with the test. The site is "here", its epoch 1.
func Start(t testing.TB, database db.Config, keys ca.KeySource, c Config) *Node {
	t.Helper()
	if c.Name == "" {
		c.Name = "ca1"
	}
	if c.VoidAfter == 0 {
		c.VoidAfter = 300 * time.Millisecond
	}
	n := &Node{Name: c.Name, Store: dbtest.Open(t, database)}
	if c.Members == nil {
		c.Members = n.Store
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	log := slog.New(slog.DiscardHandler)
	epoch, err := ca.EnsureSite(Soon(t), n.Store, "here")
	must(err)
	n.Journal, err = journal.Open(journal.Config{Dir: t.TempDir(), Node: c.Name, Log: log})
	must(err)
	t.Cleanup(func() { _ = n.Journal.Close() })
	n.Lane, err = n.Store.OpenLane(Soon(t), c.Name, n.Journal.Incarnation(), 0)
	must(err)
	n.Status, err = n.Store.OpenLane(Soon(t), c.Name, n.Journal.Incarnation(), 1)
	must(err)
	profile, err := ca.ParseProfile([]byte(Profile))
	must(err)
	n.Profiles, err = ca.NewProfiles(profile)
	must(err)
	n.Engine, err = ca.New(ca.Config{
		Node: c.Name, Store: n.Store, Journal: n.Journal, Lane: n.Lane, Keys: keys, MACKeys: MACKeys(t), Profiles: n.Profiles, Epoch: epoch, BaseURL: "http://pki.test", Log: log,
		Now: n.now,
	})
	must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Engine.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	n.Barrier, err = ca.NewBarrier(ca.BarrierConfig{Node: c.Name, Members: c.Members, Client: &http.Client{Transport: c.Transport}, Log: log})
	must(err)
	n.Revoker, err = ca.NewRevoker(ca.RevokerConfig{
		Record: n.Store, Lane: n.Status, Journal: n.Journal, Profiles: n.Profiles, Barrier: n.Barrier, Epoch: epoch, Log: log,
	})
	must(err)
	n.CRLs, err = ca.NewCRLs(ca.CRLConfig{Engine: n.Engine, Lane: n.Status, VoidAfter: c.VoidAfter})
	must(err)
	must(n.Engine.Started(Soon(t)))
	return n
}

// MACKeys are those that all nodes of a test share.
func MACKeys(t testing.TB) *db.MACKeys {
	t.Helper()
	keys, err := db.ParseMACKeys([]byte(strings.Repeat("7e57", 16)))
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// Spec is a root CA "root" and an issuing CA "demo" with the keys of KeyIDs.
func Spec(t testing.TB, keys *Keys) ca.EstablishSpec {
	t.Helper()
	generation := func(id string, lifetime time.Duration) ca.GenerationSpec {
		return ca.GenerationSpec{
			CA: id, Generation: 1, Subject: pkix.Name{CommonName: "Test " + id + " G1"}, Lifetime: lifetime, KeyGroup: "main", KeyID: id,
			ResponderGroup: "main", ResponderKeyID: id + "-ocsp", ResponderSPKI: keys.SPKI(t, id+"-ocsp"),
		}
	}
	return ca.EstablishSpec{
		Requester: "trivet://test/ceremony/init", Root: generation("root", 10*365*24*time.Hour), Issuing: generation("demo", 5*365*24*time.Hour),
	}
}

// Established is a node with CAs, on an empty database.
func Established(t testing.TB, database db.Config, c Config) (*Node, *Keys) {
	t.Helper()
	keys := NewKeys(t, KeyIDs...)
	n := Start(t, database, keys, c)
	if err := ca.Establish(Soon(t), n.Engine, Spec(t, keys)); err != nil {
		t.Fatal(err)
	}
	return n, keys
}

// CSR is a PKCS #10 request, PEM, for a new key and the names given.
func CSR(t testing.TB, names ...string) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: names}, newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}
