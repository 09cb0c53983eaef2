package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/db"
	"trivet/journal"
)

func TestEstablishMakesTwoGenerationsWithCRLsAndResponders(t *testing.T) {
	n, keys, _ := established(t, nil, nil)
	root, ok := n.Engine.Authorities().Issuer("root-g1")
	if !ok || root.Certificate == nil || root.State != ca.StateActive {
		t.Fatalf("root is %+v", root)
	}
	demo, _ := n.Engine.Authorities().Issuer("demo-g1")
	if err := demo.Certificate.CheckSignatureFrom(root.Certificate); err != nil {
		t.Errorf("demo below root: %v", err)
	}
	if err := root.Certificate.CheckSignature(root.Certificate.SignatureAlgorithm, root.Certificate.RawTBSCertificate, root.Certificate.Signature); err != nil {
		t.Errorf("root: %v", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root.Certificate)
	if _, err := demo.Certificate.Verify(x509.VerifyOptions{Roots: pool}); err != nil {
		t.Error(err)
	}
	if !demo.Certificate.MaxPathLenZero || !demo.Certificate.IsCA || demo.Certificate.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("demo's basic constraints and key usage: %v %v %v", demo.Certificate.IsCA, demo.Certificate.MaxPathLenZero, demo.Certificate.KeyUsage)
	}
	if got := demo.Certificate.CRLDistributionPoints; len(got) != 1 || got[0] != "http://pki.test/crl/root-g1.crl" {
		t.Errorf("demo's CDP is %v", got)
	}

	responders, err := n.Store.Responders(soon(t))
	if err != nil || len(responders) != 2 {
		t.Fatalf("%d responders, %v", len(responders), err)
	}
	for _, r := range responders {
		a, _ := n.Engine.Authorities().Issuer(r.Issuer)
		checkResponder(t, a, r, keys)
		crl, result, err := n.Store.LatestCRL(soon(t), nil, r.Issuer, 0)
		if err != nil || crl == nil {
			t.Fatalf("CRL of %s: %v", r.Issuer, err)
		}
		list, err := x509.ParseRevocationList(result.DER)
		if err != nil {
			t.Fatal(err)
		}
		if err := list.CheckSignatureFrom(a.Certificate); err != nil || len(list.RevokedCertificateEntries) != 0 {
			t.Errorf("CRL of %s: %v, %d entries", r.Issuer, err, len(list.RevokedCertificateEntries))
		}
		// An empty CRL precedes the first certificate; a root's own certificate is needed to sign any.
		issued, err := n.Store.Certificate(soon(t), r.Issuer, r.CertSerial)
		if err != nil || issued == nil || issued.Outcome.Created.Before(result.Created) {
			t.Errorf("the responder certificate of %s came before the CRL", r.Issuer)
		}
	}
}

func checkResponder(t *testing.T, a *ca.Authority, r db.Responder, keys *catest.Keys) {
	t.Helper()
	cert, err := x509.ParseCertificate(r.DER)
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.CheckSignatureFrom(a.Certificate); err != nil {
		t.Errorf("responder of %s: %v", r.Issuer, err)
	}
	if len(cert.ExtKeyUsage) != 1 || cert.ExtKeyUsage[0] != x509.ExtKeyUsageOCSPSigning || cert.KeyUsage != x509.KeyUsageDigitalSignature || cert.IsCA {
		t.Errorf("responder of %s: usages %v %v, CA %v", r.Issuer, cert.ExtKeyUsage, cert.KeyUsage, cert.IsCA)
	}
	noCheck := false
	for _, ext := range cert.Extensions {
		if ext.Id.Equal(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 5}) {
			noCheck = !ext.Critical && bytes.Equal(ext.Value, []byte{5, 0})
		}
	}
	if !noCheck {
		t.Errorf("responder of %s has no proper id-pkix-ocsp-nocheck", r.Issuer)
	}
	if len(cert.DNSNames)+len(cert.CRLDistributionPoints)+len(cert.OCSPServer)+len(cert.IssuingCertificateURL) != 0 {
		t.Errorf("responder of %s has SAN, CDP or AIA", r.Issuer)
	}
	if !bytes.Equal(cert.AuthorityKeyId, a.Certificate.SubjectKeyId) || len(cert.SubjectKeyId) == 0 {
		t.Errorf("responder of %s: AKI %x, SKI %x", r.Issuer, cert.AuthorityKeyId, cert.SubjectKeyId)
	}
	if got := cert.NotAfter.Sub(cert.NotBefore) + time.Second; got != 30*24*time.Hour {
		t.Errorf("responder of %s lives %v", r.Issuer, got)
	}
	if !bytes.Equal(cert.RawSubjectPublicKeyInfo, keys.SPKI(t, a.CA+"-ocsp")) {
		t.Errorf("responder of %s has another key", r.Issuer)
	}
}

func TestEstablishAgainChangesNothing(t *testing.T) {
	n, keys, cfg := established(t, nil, nil)
	before := journalled(t, n)
	if err := ca.Establish(soon(t), n.Engine, catest.Spec(t, keys)); err != nil {
		t.Fatal(err)
	}
	if after := journalled(t, n); after[journal.KindSign] != before[journal.KindSign] || after[journal.KindCRL] != before[journal.KindCRL] {
		t.Errorf("signatures before %v, after %v", before, after)
	}
	// From another node, with another journal, as after the loss of the machine that began.
	other := catest.Start(t, cfg, keys, catest.Config{Name: "ca2"})
	if err := ca.Establish(soon(t), other.Engine, catest.Spec(t, keys)); err != nil {
		t.Fatal(err)
	}
	generations, err := other.Store.Generations(soon(t))
	if err != nil || len(generations) != 2 || len(generations[0].Log) != 2 || len(generations[1].Log) != 2 {
		t.Errorf("%v %+v", err, generations)
	}
}

func TestEstablishRefusesAnotherKey(t *testing.T) {
	n, keys, _ := established(t, nil, nil)
	spec := catest.Spec(t, keys)
	spec.Issuing.KeyID = "demo-ocsp"
	if err := ca.Establish(soon(t), n.Engine, spec); err == nil || !strings.Contains(err.Error(), "exists with key demo") {
		t.Errorf("got %v", err)
	}
}

// Each signature fails in turn; repeating Establish gets one further each time, and ends with one certificate of each kind.
func TestEstablishGoesOnWhereItStopped(t *testing.T) {
	cfg := cluster.Need(t).New(t)
	keys := catest.NewKeys(t, catest.KeyIDs...)
	n := catest.Start(t, cfg, keys, catest.Config{Name: "ca1"})
	var signed, allowed atomic.Int64
	for _, id := range []string{"root", "demo"} {
		keys.Change(id, func(k *catest.Key) {
			k.Refuse = func() error {
				if signed.Add(1) > allowed.Load() {
					return errors.New("injected: no HSM")
				}
				return nil
			}
		})
	}
	for tries := int64(1); ; tries++ {
		signed.Store(0)
		allowed.Store(1) // one signature a try
		err := ca.Establish(soon(t), n.Engine, catest.Spec(t, keys))
		if err == nil {
			if tries < 6 {
				t.Errorf("six signatures took %d tries of one each", tries)
			}
			break
		}
		if tries > 12 {
			t.Fatalf("still failing: %v", err)
		}
	}
	responders, err := n.Store.Responders(soon(t))
	if err != nil || len(responders) != 2 {
		t.Errorf("%d responders, %v", len(responders), err)
	}
	var certificates int
	for _, issuer := range []string{"root-g1", "demo-g1"} {
		page, err := n.Store.ListCertificates(soon(t), db.Filter{Issuer: issuer})
		if err != nil {
			t.Fatal(err)
		}
		certificates += len(page.Certificates)
	}
	if certificates != 4 { // root, demo, and two responders
		t.Errorf("%d certificates instead of 4", certificates)
	}
}

func TestEnsureSiteHasOneWinner(t *testing.T) {
	cfg := cluster.Need(t).New(t)
	n := catest.Start(t, cfg, catest.NewKeys(t), catest.Config{Name: "ca1"})
	if epoch, err := ca.EnsureSite(soon(t), n.Store, "here"); err != nil || epoch != 1 {
		t.Errorf("again here: %d, %v", epoch, err)
	}
	if _, err := ca.EnsureSite(soon(t), n.Store, "there"); ca.NameOf(err) != ca.WrongSite {
		t.Errorf("there: %v", err)
	}
}

func TestResponderIsRenewedOnceWithTheSameKey(t *testing.T) {
	n, keys, cfg := established(t, nil, nil)
	n.Advance(16 * 24 * time.Hour)
	other := catest.Start(t, cfg, keys, catest.Config{Name: "ca2"})
	other.Advance(16 * 24 * time.Hour)
	var renewers []*ca.Responders
	for _, node := range []*catest.Node{n, other} {
		r, err := ca.NewResponders(ca.RespondersConfig{Engine: node.Engine, Lane: node.Status, Requester: "trivet://test/ca/" + node.Name})
		if err != nil {
			t.Fatal(err)
		}
		renewers = append(renewers, r)
	}
	done := make(chan error)
	for _, r := range renewers {
		go func() { done <- eventually(r.Renew) }()
	}
	for range renewers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	rows, err := n.Store.Responders(soon(t))
	if err != nil || len(rows) != 4 {
		t.Fatalf("%d responder rows, %v: want two of each generation", len(rows), err)
	}
	for _, r := range rows {
		a, _ := n.Engine.Authorities().Issuer(r.Issuer)
		checkResponder(t, a, r, keys)
	}
}

// eventually repeats what fails because another node is at it.
func eventually(fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		err := fn(ctx)
		var e *ca.Error
		if !errors.As(err, &e) || !e.Retryable() || ctx.Err() != nil {
			return err
		}
	}
}

// journalled counts a node's records by kind.
func journalled(t *testing.T, n *catest.Node) map[journal.Kind]int {
	t.Helper()
	count := map[journal.Kind]int{}
	if err := n.Journal.Replay(func(e journal.Entry) error { count[e.Kind]++; return nil }); err != nil {
		t.Fatal(err)
	}
	return count
}
