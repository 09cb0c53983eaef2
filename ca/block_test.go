package ca_test

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/identity"
	"trivet/journal"
)

var olga = identity.Principal{Cluster: "test", Role: identity.RoleCAOperator, Name: "olga"}

func blocker(t testing.TB, n *catest.Node) *ca.Blocker {
	t.Helper()
	b, err := ca.NewBlocker(ca.BlockerConfig{
		Record: n.Store, Journal: n.Journal, Revoker: n.Revoker, Authorities: n.Engine.Authorities, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// spkiOf returns the hash of a CSR's key.
func spkiOf(t testing.TB, csr []byte) []byte {
	t.Helper()
	parsed, err := x509.ParseCertificateRequest(decode(csr))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(parsed.RawSubjectPublicKeyInfo)
	return sum[:]
}

func blocking(spki []byte) ca.BlockRequest {
	return ca.BlockRequest{SPKI: spki, Reason: ca.BlockKeyCompromise, Actor: olga}
}

func TestABlockedKeyIsCertifiedNoMore(t *testing.T) {
	n, keys, cfg := established(t, nil, nil)
	other := catest.Start(t, cfg, keys, catest.Config{Name: "ca2"})
	b := blocker(t, n)
	csr := catest.CSR(t, "www.example.org")
	request := func(key string) ca.Request {
		return ca.Request{Principal: alice, IdempotencyKey: key, Profile: "tls-server", CSR: csr}
	}
	before, err := n.Engine.Issue(soon(t), request("k1"))
	if err != nil {
		t.Fatal(err)
	}
	q := blocking(spkiOf(t, csr))
	for range 2 { // the second finds it blocked and says the same
		got, err := b.Block(soon(t), q)
		if err != nil || got.N != 2 || got.Reason != ca.BlockKeyCompromise || len(got.Uses) != 1 || string(got.Uses[0].Intent.Serial) != string(before.Serial) || got.Uses[0].Revoked != nil {
			t.Fatalf("blocked: %+v, %v", got, err)
		}
	}
	for _, node := range []*catest.Node{n, other, other} {
		if _, err := node.Engine.Issue(soon(t), request("k2")); ca.NameOf(err) != ca.BlockedKey {
			t.Errorf("%s: got %v, want %s", node.Name, err, ca.BlockedKey)
		}
		// What was issued before is shown to whoever asks again.
		if again, err := node.Engine.Issue(soon(t), request("k1")); err != nil || string(again.DER) != string(before.DER) {
			t.Errorf("%s: a repeat of the earlier request: %v", node.Name, err)
		}
	}
	if got := issue(t, n, person(identity.RoleRequester, "alice"), "k3"); got.Replayed {
		t.Error("another key under a new request key")
	}
	q.Revoke = true
	got, err := b.Block(soon(t), q)
	if err != nil || len(got.Uses) != 1 || got.Uses[0].Err != nil || got.Uses[0].Revoked == nil || got.Uses[0].Revoked.Reason != ca.ReasonKeyCompromise {
		t.Fatalf("blocked with revocation: %+v, %v", got, err)
	}
	if got := events(t, n, before); !slices.Equal(got, []string{"revoke keyCompromise"}) {
		t.Errorf("events %v", got)
	}
	if list, err := b.List(soon(t), nil, 10); err != nil || len(list) != 1 {
		t.Errorf("list: %v, %v", list, err)
	}
	if got, err := b.Get(soon(t), q.SPKI, 0); err != nil || len(got.Uses) != 1 || got.Uses[0].Revocation == nil {
		t.Errorf("get: %+v, %v", got, err)
	}
	if got, err := b.Get(soon(t), q.SPKI, 1); err != nil || len(got.Uses) != 0 {
		t.Errorf("get after the last: %+v, %v", got, err)
	}
}

func TestKeysOfTheInstallationAreNotBlocked(t *testing.T) {
	n, keys, _ := established(t, nil, nil)
	b := blocker(t, n)
	for _, id := range []string{"root", "demo"} {
		sum := sha256.Sum256(keys.SPKI(t, id))
		if _, err := b.Block(soon(t), blocking(sum[:])); ca.NameOf(err) != ca.KeyNotPermitted {
			t.Errorf("%s: got %v, want %s", id, err, ca.KeyNotPermitted)
		}
	}
	sum := sha256.Sum256(keys.SPKI(t, "demo-ocsp")) // whose certificate Establish issued
	if _, err := b.Block(soon(t), blocking(sum[:])); ca.NameOf(err) != ca.KeyNotPermitted {
		t.Errorf("a responder's key: got %v, want %s", err, ca.KeyNotPermitted)
	}
	for _, q := range []ca.BlockRequest{
		{SPKI: sum[:31], Reason: ca.BlockOther, Actor: olga}, {SPKI: sum[:], Reason: "because", Actor: olga}, {SPKI: sum[:], Reason: ca.BlockOther, Comment: "\x00", Actor: olga},
	} {
		if _, err := b.Block(soon(t), q); ca.NameOf(err) != ca.MalformedRequest {
			t.Errorf("%+v: %v", q, err)
		}
	}
	if list, err := b.List(soon(t), nil, 10); err != nil || len(list) != 0 {
		t.Errorf("blocked: %v, %v", list, err)
	}
}

func TestRevokingForKeyCompromiseBlocksTheKey(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	b := blocker(t, n)
	a := person(identity.RoleRequester, "alice")
	for _, c := range []struct {
		reason  ca.Reason
		blocked bool
	}{{ca.ReasonSuperseded, false}, {ca.ReasonKeyCompromise, true}} {
		csr := catest.CSR(t, "www.example.org")
		issued, err := n.Engine.Issue(soon(t), ca.Request{Principal: a.String(), IdempotencyKey: fmt.Sprint(c.reason), Profile: "tls-server", CSR: csr})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: c.reason, Actor: a}); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := b.Get(soon(t), spkiOf(t, csr), 0); err != nil || (got != nil) != c.blocked {
			t.Errorf("%v: blocked %+v, %v", c.reason, got, err)
		}
	}
}

// noBlocks is a database that takes revocations and no blocks.
type noBlocks struct{ ca.RevocationRecord }

func (noBlocks) BlockKey(context.Context, db.BlockedKey) (db.BlockedKey, string, error) {
	return db.BlockedKey{}, "", &db.Error{Class: db.NotReady, Op: "block key"}
}

func TestACompromiseIsNotAcknowledgedBeforeTheKeyIsBlocked(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	a := person(identity.RoleRequester, "alice")
	issued := issue(t, n, a, "k")
	var whole ca.RevocationRecord
	n.Revoker.InterposeRecord(func(r ca.RevocationRecord) ca.RevocationRecord { whole = r; return noBlocks{r} })
	q := ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: ca.ReasonKeyCompromise, Actor: a}
	if _, err := n.Revoker.Revoke(soon(t), q); ca.NameOf(err) != ca.OutcomeUnknown {
		t.Errorf("got %v, want %s", err, ca.OutcomeUnknown)
	}
	n.Revoker.InterposeRecord(func(ca.RevocationRecord) ca.RevocationRecord { return whole })
	if _, err := n.Revoker.Revoke(soon(t), q); err != nil {
		t.Fatal(err)
	}
	if got, err := blocker(t, n).List(soon(t), nil, 10); err != nil || len(got) != 1 {
		t.Errorf("after the repeat %d keys are blocked, %v", len(got), err)
	}
}

// An intent that a dead node left is not finished once its key is blocked, neither by a repeat nor by the sweeper.
func TestAnOpenIntentWhoseKeyIsBlockedIsAbandoned(t *testing.T) {
	for _, how := range []string{"repeat", "sweep"} {
		t.Run(how, func(t *testing.T) {
			p := newPKI(t)
			g := newGate(steps[2])
			defer g.open()
			a, b := p.start(t, "ca1", g.interpose), p.start(t, "ca2", later)
			r := ask(t, "k1")
			first := make(chan error, 1)
			go func() {
				_, err := a.engine.Issue(context.Background(), r)
				first <- err
			}()
			<-g.reached
			spki := spkiOf(t, r.CSR)
			if _, _, err := b.store.BlockKey(t.Context(), db.BlockedKey{SPKI: spki, Reason: ca.BlockOther, Actor: olga.String()}); err != nil {
				t.Fatal(err)
			}
			if uses, err := b.store.KeyUses(t.Context(), "", spki, 0, 10); err != nil || len(uses) != 1 || uses[0].Outcome != nil {
				t.Errorf("the intent under way is not named: %+v, %v", uses, err)
			}
			signed := p.keys.total()
			if how == "repeat" {
				if _, err := b.issue(t, r); ca.NameOf(err) != ca.RequestAbandoned {
					t.Errorf("got %v, want %s", err, ca.RequestAbandoned)
				}
			} else if err := b.engine.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := p.keys.total() - signed; got != 0 {
				t.Errorf("%d signatures", got)
			}
			g.thaw() // its owner signs all the same, and loses
			if err := <-first; ca.NameOf(err) != ca.RequestAbandoned {
				t.Errorf("the owner says %v, want %s", err, ca.RequestAbandoned)
			}
			p.check(t)
		})
	}
}

// Pairs of a block and requests for one key, at once, each through another node on another database node. Whoever comes first, the block's answer names
// every certificate that the key ever gets.
func TestBlockingAndIssuingOneKeyExcludeEachOther(t *testing.T) {
	pairs := 1000
	if testing.Short() {
		pairs = 100
	}
	keys := catest.NewKeys(t, catest.KeyIDs...)
	cfg := cluster.Need(t).New(t)
	prefer := func(i int) db.Config {
		c := cfg
		c.Nodes = append(slices.Clone(cfg.Nodes[i:]), cfg.Nodes[:i]...)
		return c
	}
	var nodes []*catest.Node
	for i := range 3 {
		nodes = append(nodes, catest.Start(t, prefer(i), keys, catest.Config{Name: fmt.Sprintf("ca%d", i+1)}))
		if i == 0 {
			if err := ca.Establish(catest.Soon(t), nodes[0].Engine, catest.Spec(t, keys)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, n := range nodes {
		dbtest.Until(t, "the node knows the CA", func() bool {
			a, ok := n.Engine.Authorities().Issuer("demo-g1")
			return ok && a.State == ca.StateActive
		})
	}
	b := blocker(t, nodes[2])
	var issuedFirst, blockedFirst, mixed atomic.Int32
	var wg sync.WaitGroup
	slots := make(chan struct{}, 24)
	for pair := range pairs {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			csr := catest.CSR(t, "www.example.org")
			spki := spkiOf(t, csr)
			var issued [2]*ca.Issued
			var block *ca.Blocking
			var one sync.WaitGroup
			for i := range issued {
				one.Go(func() {
					var err error
					issued[i], err = nodes[i].Engine.Issue(catest.Soon(t), ca.Request{
						Principal: alice, IdempotencyKey: fmt.Sprint(pair, "/", i), Profile: "tls-server", CSR: csr,
					})
					if err != nil && ca.NameOf(err) != ca.BlockedKey {
						t.Errorf("pair %d: %v", pair, err)
					}
				})
			}
			one.Go(func() {
				// Batches wait for company, the block does not: let about half of the requests get ahead of it.
				if pair%2 == 0 {
					dbtest.Until(t, "a request is on record, or refused", func() bool {
						used, err := nodes[2].Store.KeyUses(catest.Soon(t), "", spki, 0, 1)
						return err != nil || len(used) > 0
					})
				}
				var err error
				if block, err = b.Block(catest.Soon(t), blocking(spki)); err != nil {
					t.Errorf("pair %d: blocking: %v", pair, err)
				}
			})
			one.Wait()
			if block == nil {
				return
			}
			named := map[string]bool{}
			for _, u := range block.Uses {
				if u.N > block.N {
					t.Errorf("pair %d: use %d stands above the block %d", pair, u.N, block.N)
				}
				named[string(u.Intent.Serial)] = true
			}
			got := 0
			for _, one := range issued {
				if one == nil {
					continue
				}
				got++
				if !named[string(one.Serial)] {
					t.Errorf("pair %d: %s exists and the block's answer does not name it", pair, one.ID())
				}
			}
			// A refused request has left nothing behind that could become a certificate.
			if len(named) != got {
				t.Errorf("pair %d: %d intents on record, %d certificates", pair, len(named), got)
			}
			switch got {
			case 0:
				blockedFirst.Add(1)
			case 1:
				mixed.Add(1)
			default:
				issuedFirst.Add(1)
			}
		})
	}
	wg.Wait()
	t.Logf("%d pairs: blocked before both %d, between them %d, after both %d", pairs, blockedFirst.Load(), mixed.Load(), issuedFirst.Load())
	if blockedFirst.Load() == 0 || issuedFirst.Load()+mixed.Load() == 0 {
		t.Error("only one order was seen: the test proves nothing")
	}
}

// Whoever blocks is in the journal before and after.
func TestABlockIsInTheJournal(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	sum := sha256.Sum256([]byte("a key from elsewhere"))
	q := blocking(sum[:])
	q.Comment, q.Approvers = "found on a paste site", []string{"trivet://test/ca-operator/otto"}
	if _, err := blocker(t, n).Block(soon(t), q); err != nil {
		t.Fatal(err)
	}
	var outcomes []string
	err := n.Journal.Replay(func(e journal.Entry) error {
		var a journal.Audit
		if e.Kind != journal.KindAudit {
			return nil
		}
		err := e.Decode(&a)
		if a.Event == "key-blocked" && a.Object == "spki:"+hex.EncodeToString(sum[:]) && a.Actor == olga.String() {
			outcomes = append(outcomes, a.Outcome)
		}
		return err
	})
	if err != nil || !slices.Equal(outcomes, []string{"begun", "recorded as 1, 0 certificates"}) {
		t.Errorf("%q, %v", outcomes, err)
	}
}
