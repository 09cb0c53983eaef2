package history_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/journal"
	"trivet/load/history"
)

// pki is a CA small enough to make every kind of answer by.
type pki struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

const client = "trivet://test/requester/alice"

func newPKI(t testing.TB) *pki {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &pki{key: key}
	p.cert = p.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	})
	return p
}

func (p *pki) sign(t testing.TB, template *x509.Certificate) *x509.Certificate {
	t.Helper()
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent := p.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, p.key.Public(), p.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (p *pki) leaf(t testing.TB, serial int64, name string) []byte {
	t.Helper()
	return p.sign(t, &x509.Certificate{SerialNumber: big.NewInt(serial), DNSNames: []string{name}}).Raw
}

func (p *pki) status(t testing.TB, serial int64, status int, ends time.Duration) []byte {
	t.Helper()
	der, err := ocsp.CreateResponse(p.cert, p.cert, ocsp.Response{
		Status: status, SerialNumber: big.NewInt(serial), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: time.Now().Add(ends), RevokedAt: time.Now(),
	}, p.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (p *pki) list(t testing.TB, number int64, this time.Time, serials ...int64) []byte {
	t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: this, NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, p.cert, crypto.Signer(p.key))
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// world is a history with all that is kept beside it. A new one has nothing wrong.
type world struct {
	t    testing.TB
	p    *pki
	path string
	log  *history.Log

	rows     []*history.Row
	revoked  []string
	journals []any
	counts   map[string]int // by caller

	meanwhile func() // called before the record is read
}

func id(serial int64) string { return "test-g1:" + hex.EncodeToString(big.NewInt(serial).Bytes()) }

func newWorld(t testing.TB, p *pki) *world {
	t.Helper()
	w := &world{t: t, p: p, path: filepath.Join(t.TempDir(), "history.jsonl"), counts: map[string]int{}}
	var err error
	if w.log, err = history.Create(w.path); err != nil {
		t.Fatal(err)
	}
	return w
}

// whole is a world in which everything happened that can: two certificates on every path, a lost answer, a refusal, a revocation, CRLs.
func whole(t testing.TB, p *pki) *world {
	w := newWorld(t, p)
	one, two := p.leaf(t, 0x1001, "one.example.org"), p.leaf(t, 0x1002, "two.example.org")
	w.do(history.Event{Kind: history.Issue, Key: "k1", Name: "one.example.org"}, history.Event{Outcome: history.Unknown, Status: 503})
	w.issue("k1", 0x1001, one)
	w.issue("k1", 0x1001, one) // a repeat
	w.do(history.Event{Kind: history.Batch, Key: "k2", Name: "two.example.org"}, history.Event{Outcome: history.OK, Status: 201, Object: id(0x1002), Bytes: two})
	w.do(history.Event{Kind: history.Get, Object: id(0x1002)}, history.Event{Outcome: history.OK, Status: 200, Bytes: two})
	w.do(history.Event{Kind: history.Issue, Key: "k3"}, history.Event{Outcome: history.Failed, Status: 422, Problem: "urn:trivet:problem:weak-key"})
	w.do(history.Event{Kind: history.Issue, Key: "k1"}, history.Event{Outcome: history.Failed, Status: 422, Problem: "urn:trivet:problem:idempotency-mismatch"})
	w.do(history.Event{Kind: history.Issue, Key: "k4"}, history.Event{Outcome: history.Unknown}) // and never seen again
	w.log.Begin(history.Event{Kind: history.Issue, Client: client, Key: "k5", Node: "ca1"})      // the client died
	w.ask(0x1001, ocsp.Good, "good")
	w.fetch(p.list(t, 1, time.Now().Add(-2*time.Minute)))
	began := w.log.Begin(history.Event{Kind: history.Status, Node: "va1", Object: id(0x1001)}) // begun before the revocation: may be good
	w.revoke(0x1001)
	began.End(history.Event{Outcome: history.OK, Answer: "good", Bytes: p.status(t, 0x1001, ocsp.Good, time.Hour)})
	w.ask(0x1001, ocsp.Revoked, "revoked")
	w.fetch(p.list(t, 2, time.Now().Add(-time.Minute), 0x1001))
	w.keep("k1", 0x1001, one)
	w.keep("k2", 0x1002, two)
	w.keep("k4", 0x1004, p.leaf(t, 0x1004, "four.example.org")) // unknown outcomes may have come true
	w.journals = append(w.journals, journal.CRL{Issuer: "test-g1", N: 1, Number: 1}, journal.CRL{Issuer: "test-g1", N: 2, Number: 2})
	w.counts["trivet://test/ca/ca1"] = 5
	w.counts["trivet://test/ocsp/ocsp1"] = 100
	return w
}

func (w *world) do(invoke, end history.Event) {
	invoke.Client = client
	if invoke.Node == "" {
		invoke.Node = "ca1"
	}
	w.log.Begin(invoke).End(end)
}

func (w *world) issue(key string, serial int64, der []byte) {
	w.do(history.Event{Kind: history.Issue, Key: key}, history.Event{Outcome: history.OK, Status: 201, Object: id(serial), Bytes: der})
}

func (w *world) ask(serial int64, status int, answer string) {
	w.do(history.Event{Kind: history.Status, Node: "va1", Object: id(serial)},
		history.Event{Outcome: history.OK, Status: 200, Answer: answer, Bytes: w.p.status(w.t, serial, status, time.Hour)})
}

func (w *world) fetch(der []byte) {
	w.do(history.Event{Kind: history.CRL, Node: "va1", Object: "test-g1"}, history.Event{Outcome: history.OK, Status: 200, Bytes: der})
}

func (w *world) revoke(serial int64) {
	w.do(history.Event{Kind: history.Revoke, Object: id(serial)}, history.Event{Outcome: history.OK, Status: 200, Answer: history.Effective})
	w.revoked = append(w.revoked, id(serial))
}

// keep puts a certificate into record and journals.
func (w *world) keep(key string, serial int64, der []byte) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	req := history.RequestKey(client, key)
	tbs := sha256.Sum256(cert.RawTBSCertificate)
	text := strings.TrimPrefix(id(serial), "test-g1:")
	w.rows = append(w.rows, &history.Row{Issuer: "test-g1", Serial: big.NewInt(serial).Bytes(), Req: req[:], Ver: 1, TBS: tbs, Kind: "cert", DER: der})
	w.journals = append(w.journals,
		journal.Sign{Issuer: "test-g1", Serial: text, Digest: tbs[:]},
		journal.Done{Issuer: "test-g1", Serial: text, Ver: 1, DER: der, Kind: journal.DoneCert})
}

func (w *world) Certificates(_ context.Context, fn func(*history.Row) error) error {
	if w.meanwhile != nil {
		w.meanwhile()
	}
	for _, r := range w.rows {
		if err := fn(r); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) Revocations(_ context.Context, fn func(string, []byte) error) error {
	for _, object := range w.revoked {
		issuer, text, _ := strings.Cut(object, ":")
		serial, err := hex.DecodeString(text)
		if err = errors.Join(err, fn(issuer, serial)); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) check() history.Report {
	w.t.Helper()
	if err := w.log.Flush(); err != nil {
		w.t.Fatal(err)
	}
	report, err := history.Check(w.t.Context(), history.Config{
		Path: w.path, Issuers: map[string]*x509.Certificate{"test-g1": w.p.cert}, Record: w,
		Journals: func(_ context.Context, fn func(string, journal.Entry) error) error {
			for _, payload := range w.journals {
				r, err := journal.New(payload)
				if err == nil {
					err = fn("ca1", journal.Entry{Record: r})
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
		Agents: func(_ context.Context, fn func(string, string, string, int) error) error {
			for caller, n := range w.counts {
				if err := fn("hsmd-a", caller, "key", n); err != nil {
					return err
				}
			}
			return nil
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return report
}

func TestATrueHistoryPasses(t *testing.T) {
	r := whole(t, newPKI(t)).check()
	if !r.OK() {
		t.Fatalf("violations: %v", r.Violations)
	}
	for what, n := range map[string]int{"issue": 6, "batch": 1, "get": 1, "unknown": 3, "failed": 2, "record_certificates": 3, "distinct_crls": 2, "agent_signatures": 5, "journal_signatures": 5} {
		if r.Checked[what] != n {
			t.Errorf("%d %s were checked, not %d: %v", r.Checked[what], what, n, r.Checked)
		}
	}
}

// Every rule has a violation that is found, under its name, with the operations that contradict each other.
func TestEveryPlantedViolationIsFoundAndNamed(t *testing.T) {
	p := newPKI(t)
	last := func(w *world) *history.Row { return w.rows[len(w.rows)-1] }
	for _, c := range []struct {
		name  string
		rule  string
		ops   int // named
		plant func(w *world)
	}{
		{"an acknowledged certificate is not in the record", history.Stored, 1, func(w *world) {
			w.issue("a", 0x2001, w.p.leaf(w.t, 0x2001, "a.example.org"))
			w.keep("a", 0x2001, w.p.leaf(w.t, 0x2001, "a.example.org"))
			w.rows = w.rows[:len(w.rows)-1]
		}},
		{"an acknowledged certificate is abandoned in the record", history.Stored, 1, func(w *world) {
			der := w.p.leaf(w.t, 0x2001, "a.example.org")
			w.issue("a", 0x2001, der)
			w.keep("a", 0x2001, der)
			last(w).Kind, last(w).DER = "abandoned", nil
		}},
		{"an acknowledged revocation is not in the record", history.Stored, 1, func(w *world) { w.revoked = nil }},
		{"a recorded revocation (202) is not in the record", history.Stored, 1, func(w *world) {
			w.do(history.Event{Kind: history.Revoke, Object: id(0x1002)}, history.Event{Outcome: history.OK, Status: 202, Answer: history.Recorded})
		}},
		{"one request is answered with two certificates", history.OneReq, 2, func(w *world) {
			der := w.p.leaf(w.t, 0x2001, "one.example.org")
			w.issue("k1", 0x2001, der)
			w.keep("other", 0x2001, der)
		}},
		{"the record has another certificate for a request", history.OneReq, 1, func(w *world) {
			w.rows[0].Req, w.rows[1].Req = w.rows[1].Req, w.rows[0].Req
		}},
		{"a request without a key has two certificates in the record", history.OneReq, 1, func(w *world) {
			w.do(history.Event{Kind: history.Issue, Name: "n.example.org"}, history.Event{Outcome: history.Unknown})
			w.keep("minted-1", 0x2001, w.p.leaf(w.t, 0x2001, "n.example.org"))
			w.keep("minted-2", 0x2002, w.p.leaf(w.t, 0x2002, "n.example.org"))
		}},
		{"one serial is given to two requests", history.OneSerial, 2, func(w *world) {
			w.issue("a", 0x1001, w.rows[0].DER)
		}},
		{"a repeat gives other bytes", history.SameBytes, 2, func(w *world) { w.issue("k1", 0x1001, w.p.leaf(w.t, 0x1001, "one.example.org")) }},
		{"a GET gives other bytes", history.SameBytes, 2, func(w *world) {
			w.do(history.Event{Kind: history.Get, Object: id(0x1001)}, history.Event{Outcome: history.OK, Bytes: w.p.leaf(w.t, 0x1001, "one.example.org")})
		}},
		{"the record has other bytes", history.SameBytes, 1, func(w *world) { w.rows[0].DER = w.p.leaf(w.t, 0x1001, "one.example.org") }},
		{"a journal has other bytes", history.SameBytes, 1, func(w *world) {
			w.journals = append(w.journals, journal.Done{Issuer: "test-g1", Serial: "1001", DER: []byte("x"), Kind: journal.DoneCert})
		}},
		{"no journal has what was released", history.Journaled, 1, func(w *world) {
			w.journals = slices.DeleteFunc(w.journals, func(x any) bool { d, ok := x.(journal.Done); return ok && d.Serial == "1001" })
		}},
		{"a certificate has no sign record", history.Intended, 1, func(w *world) {
			w.journals = slices.DeleteFunc(w.journals, func(x any) bool { s, ok := x.(journal.Sign); return ok && s.Serial == "1001" })
		}},
		{"a sign record has no intent", history.Intended, 0, func(w *world) {
			w.journals = append(w.journals, journal.Sign{Issuer: "test-g1", Serial: "2001", Digest: make([]byte, 32)})
		}},
		{"something else was signed than the intent", history.Intended, 0, func(w *world) { w.rows[0].TBS[0] ^= 1 }},
		{"HSM agents signed more than journals call for", history.Intended, 0, func(w *world) { w.counts["trivet://test/ca/ca2"] = 1 }},
		{"what was refused is answered", history.Refused, 2, func(w *world) {
			der := w.p.leaf(w.t, 0x2001, "three.example.org")
			w.issue("k3", 0x2001, der)
			w.keep("k3", 0x2001, der)
		}},
		{"what was answered is refused", history.Refused, 2, func(w *world) {
			w.do(history.Event{Kind: history.Issue, Key: "k1"}, history.Event{Outcome: history.Failed, Status: 409, Problem: "urn:trivet:problem:request-abandoned"})
		}},
		{"what was refused is in the record", history.Refused, 1, func(w *world) { w.keep("k3", 0x2001, w.p.leaf(w.t, 0x2001, "three.example.org")) }},
		{"good after an effective revocation", history.TrueGood, 2, func(w *world) { w.ask(0x1001, ocsp.Good, "good") }},
		{"good about what was never issued", history.GoodRow, 1, func(w *world) { w.ask(0x3001, ocsp.Good, "good") }},
		{"a node's CRL number falls", history.CRLRises, 2, func(w *world) { w.fetch(w.p.list(w.t, 1, time.Now().Add(-2*time.Minute))) }},
		{"two CRLs have one number", history.CRLRises, 2, func(w *world) { w.fetch(w.p.list(w.t, 2, time.Now().Add(-time.Minute), 0x1001)) }},
		{"a higher number is older", history.CRLRises, 2, func(w *world) { w.fetch(w.p.list(w.t, 3, time.Now().Add(-time.Hour), 0x1001)) }},
		{"a CRL forgets", history.CRLKeeps, 2, func(w *world) { w.fetch(w.p.list(w.t, 3, time.Now())) }},
		{"a certificate of another CA", history.Verifies, 1, func(w *world) {
			der := newPKI(w.t).leaf(w.t, 0x2001, "a.example.org")
			w.issue("a", 0x2001, der)
			w.keep("a", 0x2001, der)
		}},
		{"a certificate under another serial", history.Verifies, 1, func(w *world) {
			der := w.p.leaf(w.t, 0x2002, "a.example.org")
			w.issue("a", 0x2001, der)
			w.keep("a", 0x2001, der)
		}},
		{"an expired OCSP answer", history.Verifies, 1, func(w *world) {
			w.do(history.Event{Kind: history.Status, Object: id(0x1002)},
				history.Event{Outcome: history.OK, Answer: "good", Bytes: w.p.status(w.t, 0x1002, ocsp.Good, -time.Hour)})
		}},
		{"an OCSP answer about another", history.Verifies, 1, func(w *world) {
			w.do(history.Event{Kind: history.Status, Object: id(0x1002)},
				history.Event{Outcome: history.OK, Answer: "good", Bytes: w.p.status(w.t, 0x1001, ocsp.Good, time.Hour)})
		}},
		{"an OCSP answer that does not verify", history.Verifies, 1, func(w *world) {
			w.do(history.Event{Kind: history.Status, Object: id(0x1002)}, history.Event{Outcome: history.OK, Answer: "revoked", Bytes: newPKI(w.t).status(w.t, 0x1002, ocsp.Revoked, time.Hour)})
		}},
		{"a CRL that does not verify", history.Verifies, 1, func(w *world) { w.fetch(newPKI(w.t).list(w.t, 9, time.Now())) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := whole(t, p)
			c.plant(w)
			r := w.check()
			found := slices.IndexFunc(r.Violations, func(v history.Violation) bool { return v.Rule == c.rule && len(v.Operations) == c.ops })
			if found < 0 {
				t.Fatalf("no violation of %s that names %d operations among %v", c.rule, c.ops, r.Violations)
			}
			for _, o := range r.Violations[found].Operations {
				if !strings.HasPrefix(o, "operation ") || !strings.Contains(o, "begun") {
					t.Errorf("the report names an operation as %q", o)
				}
			}
			for _, v := range r.Violations {
				if v.Rule != c.rule && !slices.Contains(with[c.name], v.Rule) {
					t.Errorf("it is called %s, too", v)
				}
			}
		})
	}
}

// with are rules that a planted violation breaks beside its own, by its nature.
var with = map[string][]string{
	"one request is answered with two certificates":              nil,
	"the record has other bytes":                                 nil,
	"an acknowledged certificate is not in the record":           {history.OneReq, history.Intended, history.SameBytes},
	"an acknowledged certificate is abandoned in the record":     nil,
	"the record has another certificate for a request":           nil,
	"one serial is given to two requests":                        {history.OneReq},
	"a repeat gives other bytes":                                 nil,
	"good about what was never issued":                           nil,
	"what was refused is answered":                               {history.Refused},
	"a certificate of another CA":                                nil,
	"HSM agents signed more than journals call for":              nil,
	"a request without a key has two certificates in the record": {history.Intended},
	"a certificate has no sign record":                           {history.Intended},
}

// A hold that was released may be good again; a question begun while it was being released may be either.
func TestAReleasedHoldMayBeGood(t *testing.T) {
	w := whole(t, newPKI(t))
	w.revoke(0x1002)
	w.do(history.Event{Kind: history.Free, Object: id(0x1002)}, history.Event{Outcome: history.Unknown})
	w.ask(0x1002, ocsp.Good, "good")
	if r := w.check(); !r.OK() {
		t.Fatalf("violations: %v", r.Violations)
	}
}

// A cluster that goes on while it is checked has more in the record than the journals had when they were read.
func TestACertificateIssuedMeanwhileIsNoViolation(t *testing.T) {
	w := whole(t, newPKI(t))
	w.meanwhile = func() { w.keep("later", 0x2001, w.p.leaf(t, 0x2001, "later.example.org")) }
	if r := w.check(); !r.OK() || r.Checked["record_certificates"] != 4 {
		t.Fatalf("violations: %v; %v", r.Violations, r.Checked)
	}
}

// What two nodes show need not be of one moment: only each by itself must not go back.
func TestTwoRespondersMayBeApart(t *testing.T) {
	w := whole(t, newPKI(t))
	w.do(history.Event{Kind: history.CRL, Node: "va2", Object: "test-g1"}, history.Event{Outcome: history.OK, Bytes: w.p.list(t, 0, time.Now().Add(-time.Hour))})
	if r := w.check(); !r.OK() {
		t.Fatalf("violations: %v", r.Violations)
	}
}

// Bytes are written once, whoever shows them, and a file that ends within a line is read up to there.
func TestTheFileIsSmallAndMayBeCutOff(t *testing.T) {
	w := whole(t, newPKI(t))
	if err := w.log.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(w.path)
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]int{}
	for line := range bytes.Lines(raw) {
		var e history.Event
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatal(err)
		}
		if e.Bytes != nil {
			shown[e.Digest]++
		}
	}
	for d, n := range shown {
		if n != 1 {
			t.Errorf("%s is in the file %d times", d, n)
		}
	}
	if err := os.WriteFile(w.path, raw[:len(raw)-20], 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := history.Check(t.Context(), history.Config{Path: w.path, Issuers: map[string]*x509.Certificate{"test-g1": w.p.cert}}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.path, append([]byte("{\"op\": 1, \"phase\": \"retu\n"), raw...), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := history.Check(t.Context(), history.Config{Path: w.path}); err == nil {
		t.Error("a damaged line in the middle was passed over")
	}
}

// What is kept of an operation is small: 100,000 issuances fit in a few hundred megabytes.
func TestALongHistoryFitsInMemory(t *testing.T) {
	const n = 20_000
	w := newWorld(t, newPKI(t))
	der := w.p.leaf(t, 0x1001, "one.example.org") // one for all: verifying is not what is measured
	for i := range int64(n) {
		w.log.Begin(history.Event{Kind: history.Issue, Client: client, Node: "ca1", Key: fmt.Sprintf("k%d", i), Name: fmt.Sprintf("n%d.example.org", i)}).
			End(history.Event{Outcome: history.OK, Status: 201, Object: id(0x1000_0000 + i), Bytes: der})
	}
	if err := w.log.Close(); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	r, err := history.Check(t.Context(), history.Config{Path: w.path, Issuers: map[string]*x509.Certificate{"test-g1": w.p.cert}})
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if r.Checked["issue"] != n {
		t.Fatalf("checked %v", r.Checked)
	}
	if peak := (after.HeapSys - min(before.HeapSys, after.HeapSys)) >> 20; peak > 100 {
		t.Errorf("the heap grew by %d MB", peak)
	}
}
