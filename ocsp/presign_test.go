package ocsp_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"trivet/db"
	"trivet/ocsp"
)

// wall is a wall clock that tests move.
type wall struct{ offset atomic.Int64 }

func (w *wall) now() time.Time { return time.Now().Add(time.Duration(w.offset.Load())) }

// TestGoodSignedBeforeARevocationIsNeverServedAfterIt holds a good signature back until its revocation was applied.
func TestGoodSignedBeforeARevocationIsNeverServedAfterIt(t *testing.T) {
	n, a := populated(t)
	gate := make(chan struct{})
	a.signer.gate.Store(&gate)
	victim := []byte{0x42, 0x42}
	n.record.issue("demo-g1", victim)
	n.polled(t)
	eventually(t, "good is signed and held back", func() bool { return a.signer.held.Load() > 0 })
	before := a.signer.held.Load()
	n.record.revoke("demo-g1", victim, 1)
	n.polled(t) // applied: from here on, good is a lie
	eventually(t, "revoked is signed and held back", func() bool { return a.signer.held.Load() > before })
	a.signer.gate.Store(nil)
	close(gate)
	for range 50 {
		expect(t, n, a, victim, "revoked")
		if got := says(ask(t, n.Public(), "/ocsp", a, victim, crypto.SHA256)); got != "revoked" {
			t.Fatalf("SHA-256: %s", got)
		}
	}
	n.settle(t)
	expect(t, n, a, victim, "revoked")
}

func TestRevokedButUnsignedIsTryLaterNeverOldGood(t *testing.T) {
	n, a := populated(t)
	failure := errors.New("no HSM")
	a.signer.fail.Store(&failure)
	n.record.revoke("demo-g1", goodSerial, 1)
	n.polled(t)
	expect(t, n, a, goodSerial, "try later")
	a.signer.fail.Store(nil)
	expect(t, n, a, goodSerial, "revoked")
}

// TestABacklogLeavesTheHSMsToOthers has thousands of certificates to sign for, as after a start: batches go one by one, while what is revoked
// and what is asked for is signed at once.
func TestABacklogLeavesTheHSMsToOthers(t *testing.T) {
	n, a := populated(t)
	gate := make(chan struct{})
	a.signer.gate.Store(&gate)
	for i := range 3000 {
		n.record.issue("demo-g1", []byte{0x61, byte(i >> 8), byte(i)})
	}
	n.polled(t)
	held := a.signer.held.Load()
	n.record.revoke("demo-g1", []byte{0x61, 0, 0}, 1)
	n.polled(t)
	begun, alone := a.signer.begun.Load(), a.signer.alone.Load()
	a.signer.gate.Store(nil)
	close(gate)
	expect(t, n, a, []byte{0x61, 0, 0}, "revoked")
	expect(t, n, a, []byte{0x61, 11, 180}, "good") // one of the last
	n.settle(t)
	begun, alone = a.signer.begun.Load()-begun, a.signer.alone.Load()-alone
	t.Logf("%d batches were held; of %d more %d began alone", held, begun, alone)
	if begun < 30 || alone < begun*2/3 {
		t.Errorf("of %d batches %d began alone", begun, alone)
	}
}

// TestADeadKeyHoldsUpNoOtherIssuer starts with thousands of certificates of two CAs to sign for, one of whose responder keys is gone.
func TestADeadKeyHoldsUpNoOtherIssuer(t *testing.T) {
	dead, well := newAuthority(t, "demo"), newAuthority(t, "other")
	failure := errors.New("no HSM")
	dead.signer.fail.Store(&failure)
	m := newMemory("db1", "db2", "db3")
	m.generation(dead, dead.crl(t, 7))
	m.generation(well, well.crl(t, 7))
	for i := range 3000 {
		m.issue("demo-g1", []byte{0x61, byte(i >> 8), byte(i)})
		m.issue("other-g1", []byte{0x61, byte(i >> 8), byte(i)})
	}
	n := start(t, m, []*authority{dead, well})
	eventually(t, "everything of the other is signed", func() bool {
		for _, is := range n.Position().Issuers {
			if is.Issuer == "other-g1" {
				return n.Position().Joined && is.Unsigned == 0
			}
		}
		return false
	})
	dead.signer.fail.Store(nil)
	n.settle(t)
}

func TestSignatureThatDoesNotVerifyIsNeverReleased(t *testing.T) {
	n, a := populated(t)
	a.signer.corrupt.Store(true)
	fresh := []byte{0x55, 0x01}
	n.record.issue("demo-g1", fresh)
	n.polled(t)
	expect(t, n, a, fresh, "try later")
	twice := requestOf(certIDOf(a, goodSerial), certIDOf(a, revokedSerial))
	if body := post(t, n.Public(), "/ocsp", twice); !bytes.Equal(body, []byte{0x30, 3, 10, 1, 3}) {
		t.Errorf("several certificates over a corrupt key: %x", body)
	}
	expect(t, n, a, goodSerial, "good") // signed before
	a.signer.corrupt.Store(false)
	n.settle(t)
	expect(t, n, a, fresh, "good")
}

func TestAnswersAreRefreshedAtHalfTheirValidity(t *testing.T) {
	w := &wall{}
	n, a := populated(t, func(c *ocsp.Config) { c.Now = w.now })
	first, err := ask(t, n.Public(), "/ocsp", a, revokedSerial, crypto.SHA1)
	must(t, err)
	w.offset.Store(int64(3 * 24 * time.Hour)) // nothing is due before 3.15 days
	n.polled(t)
	// An answer that is queued twice at the start may be signed twice, at that time: the second is no refresh.
	r, err := ask(t, n.Public(), "/ocsp", a, revokedSerial, crypto.SHA1)
	must(t, err)
	if r.ThisUpdate.Sub(first.ThisUpdate) > time.Minute {
		t.Errorf("refreshed before it was due: thisUpdate %v, then %v", first.ThisUpdate, r.ThisUpdate)
	}
	w.offset.Store(int64(85 * time.Hour))
	eventually(t, "refreshed", func() bool {
		r, err := ask(t, n.Public(), "/ocsp", a, revokedSerial, crypto.SHA1)
		must(t, err)
		return r.ThisUpdate.After(first.ThisUpdate)
	})
}

func TestAnswersNeverOutliveTheirSignersCertificate(t *testing.T) {
	w := &wall{}
	n, a := populated(t, func(c *ocsp.Config) { c.Now = w.now })
	w.offset.Store(int64(27 * 24 * time.Hour)) // the responder certificate has 3 days left
	r, err := ask(t, n.Public(), "/ocsp", a, revokedSerial, crypto.SHA1)
	must(t, err)
	if r.NextUpdate.After(a.responder.NotAfter) {
		t.Errorf("nextUpdate %v, the responder's notAfter %v", r.NextUpdate, a.responder.NotAfter)
	}
	w.offset.Store(int64(31 * 24 * time.Hour))
	expect(t, n, a, revokedSerial, "try later")
	if n.Report().Capabilities["ocsp:demo-g1"].OK {
		t.Error("healthy with a responder certificate that has expired")
	}
}

func TestExpiredCertificatesAreAnsweredForOneDay(t *testing.T) {
	w := &wall{}
	n, a := populated(t, func(c *ocsp.Config) { c.Now = w.now })
	brief, gone := []byte{0x77, 1}, []byte{0x77, 2}
	for _, s := range [][]byte{brief, gone} {
		n.record.add("ca1/0", db.FeedCert, "demo-g1", s, db.FeedPayload{NotAfter: time.Now().Add(24 * time.Hour).Unix()})
	}
	n.record.revoke("demo-g1", gone, 0)
	n.polled(t)
	w.offset.Store(int64(47 * time.Hour))
	expect(t, n, a, brief, "good")
	expect(t, n, a, gone, "revoked")
	w.offset.Store(int64(49 * time.Hour))
	expect(t, n, a, brief, "unauthorized")
	expect(t, n, a, gone, "unauthorized")
	expect(t, n, a, goodSerial, "good")
}

func TestResponderCertificatesThatMustNotSignAreRefused(t *testing.T) {
	a, other := newAuthority(t, "demo"), newAuthority(t, "demo")
	bad := map[string]*x509.Certificate{
		"issued by another CA": other.newResponder(t, a.signer.Public(), x509.ExtKeyUsageOCSPSigning),
		"without OCSPSigning":  a.newResponder(t, a.signer.Public(), x509.ExtKeyUsageServerAuth),
		"of another key":       a.newResponder(t, newKey(t).Public(), x509.ExtKeyUsageOCSPSigning),
	}
	for name, cert := range bad {
		t.Run(name, func(t *testing.T) {
			crooked := *a
			crooked.responder = cert
			m := newMemory("db1")
			m.generation(&crooked, nil)
			m.issue("demo-g1", goodSerial)
			n := start(t, m, []*authority{&crooked})
			eventually(t, "refused", func() bool { return n.RefreshCause("demo-g1") != "" })
			n.polled(t)
			expect(t, n, a, goodSerial, "try later")

			m.generation(a, nil) // the right one arrives
			m.add("ca1/0", db.FeedResponder, "demo-g1", []byte{2}, db.FeedPayload{N: 2})
			n.polled(t)
			n.settle(t)
			expect(t, n, a, goodSerial, "good")
		})
	}
}

func TestAbandonedSerialReadsRevoked(t *testing.T) {
	n, a := populated(t)
	gone := []byte{0x66, 1}
	n.record.add("ca1/0", db.FeedAbandoned, "demo-g1", gone, db.FeedPayload{})
	n.polled(t)
	expect(t, n, a, gone, "revoked")
	n.record.add("ca3/0", db.FeedCert, "demo-g1", gone, db.FeedPayload{Ver: 2, NotAfter: time.Now().Add(time.Hour).Unix()})
	n.polled(t)
	expect(t, n, a, gone, "good") // a recovery found that it had been released
}
