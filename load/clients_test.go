package load_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/load"
	"trivet/load/history"
)

// testCA is a CA small enough to judge the clients by.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey

	mu   sync.Mutex
	next int64
	byIK map[string]string // Idempotency-Key to PEM
}

func newCA(t *testing.T) *testCA {
	t.Helper()
	key := newKey(t)
	cert := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}, nil, key.Public(), key)
	return &testCA{cert: cert, key: key, next: 100, byIK: map[string]string{}}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t *testing.T, template, parent *x509.Certificate, public crypto.PublicKey, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// serve answers like the API; change may spoil the template of what is issued.
func (ca *testCA) serve(t *testing.T, change func(*x509.Certificate)) *httptest.Server {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var q struct{ Profile, CSR string }
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil || r.URL.Path != "/v1/certificates" || q.Profile != "tls-server" {
			t.Errorf("bad request %s %+v: %v", r.URL, q, err)
		}
		block, _ := pem.Decode([]byte(q.CSR))
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil || csr.CheckSignature() != nil {
			t.Errorf("bad CSR: %v", err)
		}
		ca.mu.Lock()
		defer ca.mu.Unlock()
		text, known := ca.byIK[r.Header.Get("Idempotency-Key")]
		if !known {
			ca.next++
			template := &x509.Certificate{SerialNumber: big.NewInt(ca.next), DNSNames: csr.DNSNames}
			if change != nil {
				change(template)
			}
			text = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: sign(t, template, ca.cert, csr.PublicKey, ca.key).Raw}))
			ca.byIK[r.Header.Get("Idempotency-Key")] = text
		} else {
			w.Header().Set("Idempotency-Replayed", "true")
		}
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"id": testID(t, text), "certificate": text})
	}))
	t.Cleanup(s.Close)
	return s
}

func testID(t *testing.T, text string) string {
	block, _ := pem.Decode([]byte(text))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Error(err)
		return ""
	}
	return fmt.Sprintf("test-g1:%x", cert.SerialNumber.Bytes())
}

func (ca *testCA) issuer(t *testing.T, s *httptest.Server) *load.Issuer {
	t.Helper()
	is := load.NewIssuer(s.URL, load.NewClient(&tls.Config{RootCAs: s.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}, 8))
	t.Cleanup(is.Client.CloseIdleConnections)
	is.Roots = x509.NewCertPool()
	is.Roots.AddCert(ca.cert)
	is.Recorder = &load.Recorder{}
	return is
}

func TestIssuingUnderLoadIsVerifiedAndRecorded(t *testing.T) {
	ca := newCA(t)
	is := ca.issuer(t, ca.serve(t, nil))
	r := load.Run(t.Context(), load.Config{Rate: 200, Duration: 100 * time.Millisecond}, is.Op)
	if r.Failed != 0 || is.Recorder.Len() != r.Requests || len(is.Recorder.Duplicates()) != 0 {
		t.Fatalf("%v; %d recorded, duplicates %v", r, is.Recorder.Len(), is.Recorder.Duplicates())
	}
	names := map[string]bool{}
	for _, a := range is.Recorder.All() {
		if names[a.DNS] || a.Key == "" || a.Serial == "" || len(a.DER) == 0 || a.At.IsZero() {
			t.Fatalf("recorded %+v", a)
		}
		names[a.DNS] = true
	}
}

func TestAReplayIsOneCertificate(t *testing.T) {
	ca := newCA(t)
	is := ca.issuer(t, ca.serve(t, nil))
	q, err := is.Request(1)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := is.Send(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	if is.Recorder.Len() != 1 || len(is.Recorder.Duplicates()) != 0 {
		t.Fatalf("%d recorded, duplicates %v", is.Recorder.Len(), is.Recorder.Duplicates())
	}
	ca.mu.Lock()
	clear(ca.byIK) // the CA forgets
	ca.mu.Unlock()
	if a, err := is.Send(t.Context(), q); err != nil || a.Replayed {
		t.Fatal(a, err)
	}
	if d := is.Recorder.Duplicates(); len(d) != 1 || !strings.Contains(d[0], q.Key) {
		t.Fatalf("two certificates for one request are reported as %q", d)
	}
}

func TestOneSerialTwiceIsADuplicate(t *testing.T) {
	var r load.Recorder
	r.Add(load.Acknowledged{Request: load.Request{Key: "a"}, Issuer: "CN=x", Serial: "1", DER: []byte{1}})
	r.Add(load.Acknowledged{Request: load.Request{Key: "b"}, Issuer: "CN=y", Serial: "1", DER: []byte{2}})
	if d := r.Duplicates(); len(d) != 0 {
		t.Fatalf("one serial of two issuers is reported as %q", d)
	}
	r.Add(load.Acknowledged{Request: load.Request{Key: "c"}, Issuer: "CN=x", Serial: "1", DER: []byte{3}})
	if d := r.Duplicates(); len(d) != 1 {
		t.Fatalf("one serial twice is reported as %q", d)
	}
}

func TestAWrongCertificateIsAFailedRequest(t *testing.T) {
	ca := newCA(t)
	for name, change := range map[string]func(*x509.Certificate){
		"another name": func(c *x509.Certificate) { c.DNSNames = []string{"other.example.org"} },
		"one name more": func(c *x509.Certificate) {
			c.DNSNames = append([]string{"other.example.org"}, c.DNSNames...)
		},
	} {
		is := ca.issuer(t, ca.serve(t, change))
		if err := is.Op(t.Context(), 0); err == nil || is.Recorder.Len() != 0 {
			t.Errorf("%s: error %v, %d recorded", name, err, is.Recorder.Len())
		}
	}
	is := ca.issuer(t, newCA(t).serve(t, nil)) // issued by somebody else
	if err := is.Op(t.Context(), 0); err == nil {
		t.Error("a certificate of another CA passed")
	}
}

func TestAProblemIsToldByItsType(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "2")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, `{"type":"urn:trivet:problem:hsm-unavailable","detail":"no member"}`)
	}))
	defer s.Close()
	err := newCA(t).issuer(t, s).Op(t.Context(), 0)
	var status *load.StatusError
	if !errors.As(err, &status) || status.Status != 503 || status.RetryAfter != "2" || status.Type != "urn:trivet:problem:hsm-unavailable" {
		t.Fatalf("error %v", err)
	}
}

// responder answers like an OCSP responder whose answer template may be spoilt.
func (ca *testCA) responder(t *testing.T, change func(*ocsp.Response, *http.Request)) *httptest.Server {
	key := newKey(t)
	signer := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "responder"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning},
	}, ca.cert, key.Public(), ca.key)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		der, err := io.ReadAll(r.Body)
		if r.Method == http.MethodGet {
			var text string
			if text, err = url.PathUnescape(strings.TrimPrefix(r.URL.EscapedPath(), "/ocsp/test/")); err == nil {
				der, err = base64.StdEncoding.DecodeString(text)
			}
		}
		if err != nil {
			t.Error(err)
		}
		q, err := ocsp.ParseRequest(der)
		if err != nil {
			t.Error(err)
			return
		}
		answer := ocsp.Response{
			Status: ocsp.Good, SerialNumber: q.SerialNumber, ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour),
			Certificate: signer,
		}
		if change != nil {
			change(&answer, r)
		}
		out, err := ocsp.CreateResponse(ca.cert, signer, answer, key)
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write(out)
	}))
	t.Cleanup(s.Close)
	return s
}

func TestOCSPAnswersUnderLoadAreVerified(t *testing.T) {
	ca := newCA(t)
	key := newKey(t)
	var certs []*x509.Certificate
	for i := range 50 { // serials that give '/' and '+' in base64, too
		certs = append(certs, sign(t, &x509.Certificate{SerialNumber: big.NewInt(int64(1000 + 97*i))}, ca.cert, key.Public(), ca.key))
	}
	s := ca.responder(t, nil)
	for _, get := range []bool{false, true} {
		r := &load.Responder{URL: s.URL + "/ocsp/test", Client: load.NewClient(nil, 8), Issuer: ca.cert, GET: get,
			Pick: func(i int) *x509.Certificate { return certs[i%len(certs)] }}
		if res := load.Run(t.Context(), load.Config{Rate: 500, Duration: 100 * time.Millisecond}, r.Op); res.Failed != 0 || res.Requests != 50 {
			t.Errorf("GET %v: %v", get, res)
		}
		r.Client.CloseIdleConnections()
	}
}

func TestAnOCSPAnswerThatIsNotTheTrueOneFails(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	key := newKey(t)
	cert := sign(t, &x509.Certificate{SerialNumber: big.NewInt(1000)}, ca.cert, key.Public(), ca.key)
	ask := func(s *httptest.Server, want func(int, *x509.Certificate, *ocsp.Response) error) error {
		r := &load.Responder{URL: s.URL + "/ocsp/test", Client: load.NewClient(nil, 1), Issuer: ca.cert, Want: want,
			Pick: func(int) *x509.Certificate { return cert }}
		defer r.Client.CloseIdleConnections()
		return r.Op(context.Background(), 0)
	}
	for name, change := range map[string]func(*ocsp.Response, *http.Request){
		"revoked":        func(a *ocsp.Response, _ *http.Request) { a.Status, a.RevokedAt = ocsp.Revoked, time.Now() },
		"unknown":        func(a *ocsp.Response, _ *http.Request) { a.Status = ocsp.Unknown },
		"another serial": func(a *ocsp.Response, _ *http.Request) { a.SerialNumber = big.NewInt(1001) },
		"stale":          func(a *ocsp.Response, _ *http.Request) { a.NextUpdate = time.Now().Add(-time.Second) },
		"from tomorrow":  func(a *ocsp.Response, _ *http.Request) { a.ThisUpdate = time.Now().Add(24 * time.Hour) },
		"wrong signer":   func(a *ocsp.Response, _ *http.Request) { a.Certificate = cert },
	} {
		if err := ask(ca.responder(t, change), nil); err == nil {
			t.Errorf("%s: passed as good", name)
		}
	}
	if err := ask(other.responder(t, nil), nil); err == nil {
		t.Error("an answer signed under another CA passed")
	}
	revoked := ca.responder(t, func(a *ocsp.Response, _ *http.Request) { a.Status, a.RevokedAt = ocsp.Revoked, time.Now() })
	if err := ask(revoked, func(_ int, _ *x509.Certificate, a *ocsp.Response) error {
		if a.Status != ocsp.Revoked {
			return errors.New("not revoked")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestClientsTellTheHistoryWhatTheyAskedAndWhatCameBack(t *testing.T) {
	ca := newCA(t)
	log, err := history.Create(filepath.Join(t.TempDir(), "history.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	is := ca.issuer(t, ca.serve(t, nil))
	is.History, is.Principal = log, "trivet://test/requester/alice"
	q, err := is.Request(1)
	if err != nil {
		t.Fatal(err)
	}
	a, err := is.Send(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := is.Send(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		status int
		retry  string
	}{{422, ""}, {409, "1"}, {503, "1"}, {405, ""}} {
		s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if c.retry != "" {
				w.Header().Set("Retry-After", c.retry)
			}
			w.WriteHeader(c.status)
		}))
		other := ca.issuer(t, s)
		other.History, other.Principal = log, is.Principal
		if err := other.Op(t.Context(), c.status); err == nil {
			t.Errorf("status %d passed", c.status)
		}
		s.Close()
		if err := other.Op(t.Context(), c.status); err == nil { // nobody there
			t.Error("no answer passed")
		}
	}
	cert, err := x509.ParseCertificate(a.DER)
	if err != nil {
		t.Fatal(err)
	}
	r := &load.Responder{URL: ca.responder(t, nil).URL + "/ocsp/test", Client: load.NewClient(nil, 1), Issuer: ca.cert, History: log, Generation: "test-g1"}
	defer r.Client.CloseIdleConnections()
	if _, err := r.Ask(t.Context(), cert); err != nil {
		t.Fatal(err)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	report, err := history.Check(t.Context(), history.Config{Path: log.Path(), Issuers: map[string]*x509.Certificate{"test-g1": ca.cert}})
	if err != nil {
		t.Fatal(err)
	}
	for what, n := range map[string]int{"issue": 10, "status": 1, "ok": 3, "failed": 1, "unknown": 7, "verified": 2} {
		if report.Checked[what] != n {
			t.Errorf("%d %s, not %d: %v", report.Checked[what], what, n, report.Checked)
		}
	}
	if !report.OK() {
		t.Errorf("violations: %v", report.Violations)
	}
}
