package ca_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/identity"
)

func TestCRLNumbersRiseWhateverTheClockDoes(t *testing.T) {
	now := time.UnixMilli(1_800_000_000_000)
	first, err := ca.CRLNumber(1, now, 0)
	if err != nil || first != 1<<48+1_800_000_000_000 {
		t.Fatalf("%d, %v", first, err)
	}
	for _, at := range []time.Time{now, now.Add(-time.Hour), now.Add(time.Millisecond), now.Add(-20 * 365 * 24 * time.Hour)} {
		next, err := ca.CRLNumber(1, at, first)
		if err != nil || next <= first {
			t.Errorf("after %d at %v: %d, %v", first, at, next, err)
		}
		first = next
	}
	if promoted, err := ca.CRLNumber(2, now.Add(-time.Hour), first); err != nil || promoted <= first || promoted>>48 != 2 {
		t.Errorf("after a promotion: %d, %v", promoted, err)
	}
	if _, err := ca.CRLNumber(1, now, 2<<48); ca.NameOf(err) != ca.WrongSite {
		t.Errorf("a node of an older site epoch goes on: %v", err)
	}
}

func TestCRLKeepsWhatTheDatabaseLost(t *testing.T) {
	now := time.Now()
	event := func(serial byte, kind string, notAfter time.Time) db.Revoked {
		return db.Revoked{Revocation: db.Revocation{Issuer: "demo-g1", Serial: []byte{1, serial}, N: 1, Event: kind, Date: now.Add(-time.Hour)}, NotAfter: notAfter}
	}
	listed := func(serials ...byte) *x509.RevocationList {
		list := &x509.RevocationList{ThisUpdate: now.Add(-time.Hour)}
		for _, s := range serials {
			list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
				x509.RevocationListEntry{SerialNumber: new(big.Int).SetBytes([]byte{1, s}), RevocationTime: now.Add(-2 * time.Hour)})
		}
		return list
	}
	latest := []db.Revoked{
		event(9, db.EventRevoke, now.Add(time.Hour)),       // as usual
		event(2, db.EventHold, now.Add(time.Hour)),         // held is listed
		event(3, db.EventRelease, now.Add(time.Hour)),      // released is not, although the previous CRL lists it
		event(4, db.EventRevoke, now.Add(-2*time.Hour)),    // expired, not yet on a scheduled CRL past its end
		event(5, db.EventRevoke, now.Add(-30*time.Hour)),   // expired, and was
		event(6, db.EventReasonChange, now.Add(time.Hour)), //
		event(7, db.EventRevoke, time.Time{}),              // no certificate is known
	}
	content, lost := ca.ListedSerials(latest, listed(3, 5, 8, 9), now)
	want := [][]byte{{1, 2}, {1, 4}, {1, 6}, {1, 7}, {1, 8}, {1, 9}}
	if !slices.EqualFunc(content, want, bytes.Equal) {
		t.Errorf("content %x, want %x", content, want)
	}
	if len(lost) != 1 || !bytes.Equal(lost[0], []byte{1, 8}) {
		t.Errorf("lost %x, want 0108", lost)
	}
}

// chainOf reads all CRLs of a generation, voids left out, checking numbers and signatures.
func chainOf(t *testing.T, n *catest.Node, issuer string) []*x509.RevocationList {
	t.Helper()
	a, _ := n.Engine.Authorities().Issuer(issuer)
	var lists []*x509.RevocationList
	for i, row := range crlRows(t, n, issuer) {
		if row.n != i+1 {
			t.Errorf("row %d of %s has n %d", i+1, issuer, row.n)
		}
		if row.kind != db.CRLIssued {
			continue
		}
		list, err := x509.ParseRevocationList(row.der)
		if err != nil {
			t.Fatal(err)
		}
		if err := list.CheckSignatureFrom(a.Certificate); err != nil {
			t.Errorf("CRL %d: %v", row.n, err)
		}
		if list.Number.Uint64() != row.number || len(lists) > 0 && list.Number.Cmp(lists[len(lists)-1].Number) <= 0 {
			t.Errorf("CRL %d has number %d, its row %d", row.n, list.Number, row.number)
		}
		if got := list.NextUpdate.Sub(list.ThisUpdate); got != 7*24*time.Hour {
			t.Errorf("CRL %d is valid for %v", row.n, got)
		}
		if !slices.IsSortedFunc(list.RevokedCertificateEntries, func(a, b x509.RevocationListEntry) int { return a.SerialNumber.Cmp(b.SerialNumber) }) {
			t.Errorf("CRL %d is not sorted", row.n)
		}
		lists = append(lists, list)
	}
	return lists
}

// Two nodes on two databases issue CRLs of one generation at once, again and again.
func TestTwoIssuersMeetAtTheNumber(t *testing.T) {
	n, keys, cfg := established(t, nil, nil)
	cfg.Nodes = append(slices.Clone(cfg.Nodes[1:]), cfg.Nodes[0])
	other := catest.Start(t, cfg, keys, catest.Config{Name: "ca2"})
	const each = 6
	var wg sync.WaitGroup
	var mu sync.Mutex
	numbers := map[uint64]bool{}
	for _, node := range []*catest.Node{n, other} {
		wg.Go(func() {
			for range each {
				crl, err := node.CRLs.Issue(soon(t), "demo-g1")
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				if numbers[crl.Number] {
					t.Errorf("number %d was published twice", crl.Number)
				}
				numbers[crl.Number] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if got := len(chainOf(t, n, "demo-g1")); got != 2*each+1 {
		t.Errorf("%d CRLs in the chain, %d were asked for beside the first", got, 2*each)
	}
}

func TestRevocationIsOnTheNextCRL(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	alice := person(identity.RoleRequester, "alice")
	a, _ := n.Engine.Authorities().Issuer("demo-g1")
	due := func() bool {
		t.Helper()
		due, err := n.CRLs.Due(a)
		if err != nil {
			t.Fatal(err)
		}
		return due
	}
	if due() {
		t.Error("a CRL is due although nothing changed")
	}
	var revoked []*ca.Issued
	for i, reason := range []ca.Reason{ca.ReasonUnspecified, ca.ReasonKeyCompromise, ca.ReasonSuperseded} {
		issued := issue(t, n, alice, string(rune('a'+i)))
		done, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: reason, Actor: alice})
		if err != nil || !done.Reach.Effective() {
			t.Fatalf("%v %+v", err, done)
		}
		revoked = append(revoked, issued)
	}
	dbtest.Until(t, "a CRL is due", due)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.CRLs.Run(ctx) }()
	dbtest.Until(t, "the CRL job has published them", func() bool {
		crl, _, err := n.Store.LatestCRL(soon(t), nil, "demo-g1", 0)
		return err == nil && crl.Events == 3
	})
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	lists := chainOf(t, n, "demo-g1")
	newest := lists[len(lists)-1]
	reasons := map[string]int{}
	for _, e := range newest.RevokedCertificateEntries {
		reasons[string(e.SerialNumber.Bytes())] = e.ReasonCode
		if e.ReasonCode == 0 && len(e.Extensions) > 0 {
			t.Error("unspecified is written out")
		}
	}
	for i, want := range []int{0, 1, 4} {
		if got, ok := reasons[string(revoked[i].Serial)]; !ok || got != want {
			t.Errorf("reason %d: listed %v as %d", want, ok, got)
		}
	}
	if due() {
		t.Error("a CRL is due again")
	}
	n.Advance(24*time.Hour + time.Minute)
	if !due() {
		t.Error("a CRL a day old is not due")
	}
}

// Phases: an issuer inserts its row and is gone; the next one waits, gives the row up, and goes on above it.
func TestRowWithoutResultIsGivenUp(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	tip, err := n.Store.NextCRL(soon(t), nil, "demo-g1", 0)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UTC()
	abandoned := db.CRL{Issuer: "demo-g1", N: tip.N + 1, Number: tip.Number + 1_000_000, ThisUpdate: now, NextUpdate: now.Add(time.Hour), TBSHash: make([]byte, 32), Node: "ca9", SiteEpoch: 1}
	if err := n.Store.InsertCRL(soon(t), abandoned); err != nil {
		t.Fatal(err)
	}
	crl, err := n.CRLs.Issue(soon(t), "demo-g1")
	if err != nil {
		t.Fatal(err)
	}
	if crl.Number <= abandoned.Number {
		t.Errorf("number %d is not above the abandoned %d", crl.Number, abandoned.Number)
	}
	rows := crlRows(t, n, "demo-g1")
	if len(rows) != 3 || rows[1].kind != db.CRLVoid || rows[2].kind != db.CRLIssued {
		t.Errorf("rows %+v", rows)
	}
	chainOf(t, n, "demo-g1")
}

// The signing key is not the generation's, or the HSM fails: nothing is published, the number is given up, and the next attempt succeeds.
func TestWrongSignatureIsNeverPublished(t *testing.T) {
	n, keys, _ := established(t, nil, nil)
	before := len(chainOf(t, n, "demo-g1"))
	var good *ecdsa.PrivateKey
	wrong, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys.Change("demo", func(k *catest.Key) { good, k.PrivateKey = k.PrivateKey, wrong })
	if _, err := n.CRLs.Issue(soon(t), "demo-g1"); ca.NameOf(err) != ca.HSMUnavailable {
		t.Errorf("wrong key: %v", err)
	}
	keys.Change("demo", func(k *catest.Key) {
		k.PrivateKey = good
		k.Refuse = func() error { return errors.New("injected: no HSM") }
	})
	if _, err := n.CRLs.Issue(soon(t), "demo-g1"); ca.NameOf(err) != ca.HSMUnavailable {
		t.Errorf("no HSM: %v", err)
	}
	keys.Change("demo", func(k *catest.Key) { k.Refuse = nil })
	if _, err := n.CRLs.Issue(soon(t), "demo-g1"); err != nil {
		t.Error(err)
	}
	if after := len(chainOf(t, n, "demo-g1")); after != before+1 {
		t.Errorf("%d CRLs before, %d after", before, after)
	}
}

// While no HSM signs, a CRL that is due must not use up a number at every look; once one signs again, it comes.
func TestOutageOfTheHSMsDoesNotFillTheRecordWithCRLNumbers(t *testing.T) {
	n, keys, _ := established(t, nil, nil)
	n.Advance(24*time.Hour + time.Minute)
	a, _ := n.Engine.Authorities().Issuer("demo-g1")
	before := len(crlRows(t, n, "demo-g1"))
	keys.Change("demo", func(k *catest.Key) { k.Refuse = func() error { return errors.New("injected: no HSM") } })
	for range 20 {
		if err := n.CRLs.Step(soon(t), a); err != nil && ca.NameOf(err) != ca.HSMUnavailable {
			t.Fatal(err)
		}
	}
	if used := len(crlRows(t, n, "demo-g1")) - before; used != 1 {
		t.Errorf("20 looks used up %d numbers, want 1", used)
	}
	keys.Change("demo", func(k *catest.Key) { k.Refuse = nil })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if err := n.CRLs.Step(soon(t), a); err != nil {
			t.Fatal(err)
		}
		rows := crlRows(t, n, "demo-g1")
		if rows[len(rows)-1].kind == db.CRLIssued {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("no CRL after the outage: %+v", rows)
		}
	}
}

// The answer to the publishing commit is lost, with and without the commit: the chain stays in order and a CRL comes out.
func TestCRLSurvivesLostAnswers(t *testing.T) {
	for _, applied := range []bool{false, true} {
		n, _, _ := established(t, nil, nil)
		n.CRLs.Interpose(func(l ca.FactLane) ca.FactLane { return &lossyLane{FactLane: l, applied: applied, losses: 1} })
		if _, err := n.CRLs.Issue(soon(t), "demo-g1"); ca.NameOf(err) != ca.OutcomeUnknown {
			t.Errorf("applied %v: %v", applied, err)
		}
		crl, err := n.CRLs.Issue(soon(t), "demo-g1")
		if err != nil {
			t.Fatal(err)
		}
		lists := chainOf(t, n, "demo-g1")
		if newest := lists[len(lists)-1]; newest.Number.Uint64() != crl.Number {
			t.Errorf("applied %v: the newest is %d, %d was returned", applied, newest.Number, crl.Number)
		}
	}
}

// The database lost a revocation that the published CRL shows: it stays on the CRL and comes back into the database.
func TestLostRevocationComesBackFromTheCRL(t *testing.T) {
	n, _, cfg := established(t, nil, nil)
	alice := person(identity.RoleRequester, "alice")
	issued := issue(t, n, alice, "a")
	if _, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: ca.ReasonKeyCompromise, Actor: alice}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.CRLs.Issue(soon(t), "demo-g1"); err != nil {
		t.Fatal(err)
	}
	execute(t, cfg, "DELETE FROM revocation")
	if row, err := n.Store.LatestRevocation(soon(t), issued.Issuer, issued.Serial); err != nil || row != nil {
		t.Fatalf("still there: %+v, %v", row, err)
	}
	crl, err := n.CRLs.Issue(soon(t), "demo-g1")
	if err != nil || crl.Entries != 1 {
		t.Fatalf("%v %+v", err, crl)
	}
	row, err := n.Store.LatestRevocation(soon(t), issued.Issuer, issued.Serial)
	if err != nil || row == nil || row.Event != db.EventRevoke || ca.Reason(row.Reason) != ca.ReasonKeyCompromise {
		t.Errorf("restored %+v, %v", row, err)
	}
}
