package ca_test

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
	"trivet/journal"
)

// A revocation for keyCompromise that the database lost comes back together with the block of the key: nobody gets another certificate for it.
func TestABlockComesBackWithItsRevocation(t *testing.T) {
	s := newSite(t, nil, "ca1")
	m := s.nodes["ca1"]
	issued := s.issueSome(t, 0, 1, "ca1")["k0"]
	now := time.Now().UTC().Truncate(time.Microsecond)
	done, err := journal.New(journal.Done{
		Kind: journal.DoneRevocation, Issuer: issued.Issuer, Serial: hex.EncodeToString(issued.Serial), Ver: 1, Created: now,
		Lane: db.LaneName("ca1", m.journal.Incarnation(), 1), Seq: 1,
		Event: &journal.Revocation{N: 1, Event: db.EventRevoke, Reason: "keyCompromise", Date: now.Truncate(time.Second), Actor: "test", SiteEpoch: 1, Created: now},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.journal.Append(done); err != nil {
		t.Fatal(err)
	}
	if err := m.store.BeginRound(t.Context(), db.Round{N: 1, Node: "ca1", Cause: "a test"}); err != nil {
		t.Fatal(err)
	}
	dbtest.Until(t, "the round has ended", func() bool { st := m.rounds.Status(); return st.State.N > 0 && st.Err == nil })
	cert, err := x509.ParseCertificate(issued.DER)
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	blocked, err := m.store.Blocked(t.Context(), "", hash[:])
	if err != nil || len(blocked) != 1 || blocked[0].Reason != "key-compromise" && blocked[0].Reason != "keyCompromise" {
		t.Errorf("the key's blocks are %+v, %v; want one", blocked, err)
	}
	if rows, err := m.store.RevocationsOf(t.Context(), []db.CertificateKey{{Issuer: issued.Issuer, Serial: issued.Serial}}); err != nil || len(rows) != 1 {
		t.Errorf("its events are %+v, %v; want one", rows, err)
	}
}
