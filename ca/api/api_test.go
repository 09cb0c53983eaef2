package api_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/api"
	"trivet/ca/catest"
	"trivet/health"
	"trivet/identity"
)

type certificate struct {
	ID, CA, Serial, Status, Profile, Requester, Certificate, SHA256 string
	Generation                                                      int
	Chain                                                           []string
	Revocation                                                      *struct {
		Reason   string
		Sequence int
	}
}

// issue issues a certificate and returns it.
func (s *site) issue(t *testing.T, by identity.Principal, key string) certificate {
	t.Helper()
	a := s.call(t, s.public, by, "POST", "/v1/certificates", issueBody(t, catest.CSR(t, "www.example.org"), ""), "Idempotency-Key", key)
	if a.status != http.StatusCreated {
		t.Fatalf("issuing gave %d: %s", a.status, a.body)
	}
	var c certificate
	a.decode(t, &c)
	return c
}

func TestIssueShowListRevoke(t *testing.T) {
	s := newSite(t, nil)
	body := issueBody(t, catest.CSR(t, "www.example.org", "example.org"), `,"reference":"CHG-1"`)
	first := s.call(t, s.public, alice, "POST", "/v1/certificates", body, "Idempotency-Key", "one", "X-Request-Id", "abc-1")
	if first.status != http.StatusCreated || first.header.Get("X-Request-Id") != "abc-1" || first.header.Get("Idempotency-Replayed") != "" {
		t.Fatalf("%d %v %s", first.status, first.header, first.body)
	}
	var c certificate
	first.decode(t, &c)
	if c.Status != "valid" || c.CA != "demo" || c.Generation != 1 || c.Requester != alice.String() || len(c.Chain) != 2 || first.header.Get("Location") != "/v1/certificates/"+c.ID {
		t.Errorf("issued %+v, Location %s", c, first.header.Get("Location"))
	}

	again := s.call(t, s.public, alice, "POST", "/v1/certificates", body, "Idempotency-Key", "one")
	if again.status != http.StatusCreated || again.header.Get("Idempotency-Replayed") != "true" || !bytes.Equal(again.body, first.body) {
		t.Errorf("the repeat: %d %v\n%s\n%s", again.status, again.header, again.body, first.body)
	}

	for media, check := range map[string]func([]byte) bool{
		"application/pkix-cert": func(b []byte) bool { got, err := x509.ParseCertificate(b); return err == nil && got.DNSNames != nil },
		"application/pem-certificate-chain": func(b []byte) bool {
			return bytes.Count(b, []byte("BEGIN CERTIFICATE")) == 3 && strings.HasPrefix(string(b), c.Certificate)
		},
		"text/html, application/pkix-cert;q=0.9": func(b []byte) bool { _, err := x509.ParseCertificate(b); return err == nil },
	} {
		a := s.call(t, s.public, alice, "GET", "/v1/certificates/"+c.ID, "", "Accept", media)
		if a.status != http.StatusOK || !check(a.body) {
			t.Errorf("Accept %s: %d %q", media, a.status, a.body)
		}
		if a := s.call(t, s.public, alice, "POST", "/v1/certificates", body, "Idempotency-Key", "one", "Accept", media); a.status != http.StatusCreated || !check(a.body) {
			t.Errorf("issuing with Accept %s: %d %q", media, a.status, a.body)
		}
	}
	if a := s.call(t, s.public, alice, "GET", "/v1/certificates/"+c.Serial, ""); a.status != http.StatusOK {
		t.Errorf("by bare serial: %d %s", a.status, a.body)
	}

	revoke := "/v1/certificates/" + c.ID + "/revoke"
	done := s.call(t, s.public, alice, "POST", revoke, `{"reason":"superseded","comment":"new one"}`)
	var r struct {
		ID, Status, Reason string
		Sequence           int
		Responders         struct{ Pending []string }
	}
	done.decode(t, &r)
	if done.status != http.StatusOK || r.Status != "revoked" || r.Reason != "superseded" || r.Sequence != 1 || len(r.Responders.Pending) != 0 {
		t.Errorf("revoking: %d %s", done.status, done.body)
	}
	if a := s.call(t, s.public, alice, "POST", revoke, `{"reason":"superseded"}`); a.status != http.StatusOK {
		t.Errorf("revoking again: %d %s", a.status, a.body)
	}
	if name, _ := s.call(t, s.public, alice, "POST", revoke, `{"reason":"cessationOfOperation"}`).problem(t); name != "already-revoked" {
		t.Errorf("another reason: %s", name)
	}
	if a := s.call(t, s.public, alice, "GET", "/v1/certificates/"+c.ID, ""); a.status != http.StatusOK {
		t.Errorf("%d", a.status)
	} else if a.decode(t, &c); c.Status != "revoked" || c.Revocation == nil || c.Revocation.Reason != "superseded" {
		t.Errorf("after revocation %s", a.body)
	}
	// The certificate stays the same on a repeat, its status is the present one.
	again = s.call(t, s.public, alice, "POST", "/v1/certificates", body, "Idempotency-Key", "one")
	if again.decode(t, &c); c.Status != "revoked" {
		t.Errorf("the repeat says %s", c.Status)
	}
}

func TestHoldAndRelease(t *testing.T) {
	s := newSite(t, nil)
	c := s.issue(t, rita, "one")
	path := "/v1/certificates/" + c.ID
	if name, _ := s.call(t, s.public, rita, "POST", path+"/release", "").problem(t); name != "not-on-hold" {
		t.Errorf("release of a valid certificate: %s", name)
	}
	if a := s.call(t, s.public, rita, "POST", path+"/revoke", `{"reason":"certificateHold"}`); a.status != http.StatusOK || !strings.Contains(string(a.body), `"held"`) {
		t.Errorf("hold: %d %s", a.status, a.body)
	}
	if a := s.call(t, s.public, rita, "GET", path, ""); !strings.Contains(string(a.body), `"held"`) {
		t.Errorf("held: %s", a.body)
	}
	if a := s.call(t, s.public, rita, "POST", path+"/release", `{"comment":"found"}`); a.status != http.StatusOK || !strings.Contains(string(a.body), `"valid"`) {
		t.Errorf("release: %d %s", a.status, a.body)
	}
	if a := s.call(t, s.public, rita, "GET", path, ""); !strings.Contains(string(a.body), `"revocation":null`) {
		t.Errorf("released: %s", a.body)
	}
	c = s.issue(t, alice, "two")
	if name, field := s.call(t, s.public, alice, "POST", "/v1/certificates/"+c.ID+"/revoke", `{"reason":"certificateHold"}`).problem(t); name != "reason-not-permitted" || field != "reason" {
		t.Errorf("hold by a requester: %s %s", name, field)
	}
}

func TestOthersCertificatesDoNotExist(t *testing.T) {
	s := newSite(t, nil)
	c := s.issue(t, alice, "one")
	for _, p := range []identity.Principal{bob, rita} {
		for _, path := range []string{"/v1/certificates/" + c.ID, "/v1/certificates/" + c.Serial} {
			if name, _ := s.call(t, s.public, p, "GET", path, "").problem(t); name != "not-found" {
				t.Errorf("%s reads %s: %s", p, path, name)
			}
			a := s.call(t, s.public, p, "POST", path+"/revoke", `{"reason":"keyCompromise"}`)
			if name, _ := a.problem(t); name != "not-found" || a.status != http.StatusNotFound {
				t.Errorf("%s revokes %s: %d %s", p, path, a.status, name)
			}
		}
	}
	for p, want := range map[identity.Principal]int{alice: 1, bob: 0, rita: 0, carl: 5, olga: 5} {
		var page struct{ Certificates []certificate }
		s.call(t, s.public, p, "GET", "/v1/certificates", "").decode(t, &page)
		if len(page.Certificates) != want {
			t.Errorf("%s lists %d certificates, want %d", p, len(page.Certificates), want)
		}
	}
	var page struct{ Certificates []certificate }
	s.call(t, s.public, bob, "GET", "/v1/certificates?requester="+alice.String(), "").decode(t, &page)
	if len(page.Certificates) != 0 {
		t.Error("a filter widened what bob sees")
	}
	for _, p := range []identity.Principal{olga, carl} {
		if a := s.call(t, s.public, p, "GET", "/v1/certificates/"+c.ID, ""); a.status != http.StatusOK {
			t.Errorf("%s reads: %d", p, a.status)
		}
	}
}

func TestListPagesAndFilters(t *testing.T) {
	s := newSite(t, nil)
	var ids []string
	for i := range 5 {
		ids = append(ids, s.issue(t, alice, fmt.Sprint(i)).ID)
	}
	slices.Sort(ids)
	var got []string
	path := "/v1/certificates?limit=2"
	for pages := 0; path != ""; pages++ {
		if pages > 3 {
			t.Fatal("the list does not end")
		}
		var page struct {
			Certificates []certificate
			Next         *string
		}
		s.call(t, s.public, alice, "GET", path, "").decode(t, &page)
		for _, c := range page.Certificates {
			got = append(got, c.ID)
			if c.Certificate != "" {
				t.Error("a list shows certificates that were not released")
			}
		}
		path = ""
		if page.Next != nil {
			path = "/v1/certificates?limit=2&cursor=" + *page.Next
		}
	}
	if !slices.Equal(got, ids) {
		t.Errorf("pages hold %v, want %v", got, ids)
	}
	s.call(t, s.public, alice, "POST", "/v1/certificates/"+ids[0]+"/revoke", `{}`)
	for query, want := range map[string]int{"status=valid": 4, "status=revoked": 1, "status=held": 0, "status=expired": 0, "status=pending": 0, "issuer=demo-g1": 5, "issuer=root-g1": 0} {
		var page struct{ Certificates []certificate }
		s.call(t, s.public, alice, "GET", "/v1/certificates?"+query, "").decode(t, &page)
		if len(page.Certificates) != want {
			t.Errorf("%s: %d, want %d", query, len(page.Certificates), want)
		}
	}
}

func TestKeyReusedForAnotherRequestIsAMismatch(t *testing.T) {
	s := newSite(t, nil)
	s.issue(t, alice, "one")
	a := s.call(t, s.public, alice, "POST", "/v1/certificates", issueBody(t, catest.CSR(t, "www.example.org"), ""), "Idempotency-Key", "one")
	if name, field := a.problem(t); a.status != http.StatusUnprocessableEntity || name != "idempotency-mismatch" || field != "Idempotency-Key" {
		t.Errorf("%d %s", a.status, a.body)
	}
	// Another identity's key is another key.
	if bobs := s.issue(t, bob, "one"); bobs.Requester != bob.String() {
		t.Errorf("%+v", bobs)
	}
}

func TestUnknownPathsAndMethodsAreProblems(t *testing.T) {
	s := newSite(t, nil)
	for _, test := range []struct {
		method, path string
		status       int
		name         string
	}{
		{"GET", "/", 404, "not-found"}, {"GET", "/v2/certificates", 404, "not-found"}, {"GET", "/v1/certificates/", 404, "not-found"}, {"GET", "/v1//certificates", 404, "not-found"},
		{"GET", "/debug/pprof/", 404, "not-found"}, {"DELETE", "/v1/certificates", 405, "method-not-allowed"}, {"PUT", "/v1/certificates/demo-g1:01", 405, "method-not-allowed"},
		{"POST", "/healthz", 405, "method-not-allowed"}, {"TRACE", "/v1/cas", 405, "method-not-allowed"}, {"GET", "/v1/audit", 404, "not-found"},
	} {
		a := s.call(t, s.public, olga, test.method, test.path, "")
		if name, _ := a.problem(t); a.status != test.status || name != test.name {
			t.Errorf("%s %s: %d %s", test.method, test.path, a.status, name)
		}
		if a.status == 405 && a.header.Get("Allow") == "" {
			t.Errorf("%s %s: no Allow", test.method, test.path)
		}
	}
}

// faulty fails in the ways a handler must survive.
type faulty struct {
	api.Issuer
	fail func() error
}

func (f faulty) Issue(context.Context, ca.Request) (*ca.Issued, error) { return nil, f.fail() }

func TestFailuresBecomeProblems(t *testing.T) {
	var next func() error
	s := newSite(t, func(c *api.Config) { c.Issuer = faulty{c.Issuer, func() error { return next() }} })
	secret := errors.New("dial tcp 127.77.1.1:3306: password for trivet")
	for _, test := range []struct {
		fail   func() error
		status int
		name   string
		retry  string
	}{
		{func() error { panic("boom") }, 500, "internal-error", ""},
		{func() error { return secret }, 500, "internal-error", ""},
		{func() error { return &ca.Error{Name: "made-up", Err: secret} }, 500, "made-up", ""},
		{func() error { return &ca.Error{Name: ca.HSMUnavailable, RetryAfter: time.Second, Err: secret} }, 503, "hsm-unavailable", "1"},
		{func() error { return &ca.Error{Name: ca.DatabaseUnavailable, RetryAfter: 1500 * time.Millisecond} }, 503, "database-unavailable", "2"},
		{func() error { return &ca.Error{Name: ca.OutcomeUnknown} }, 503, "outcome-unknown", "1"},
		{func() error { return &ca.Error{Name: ca.Halted, RetryAfter: 30 * time.Second} }, 503, "halted", "30"},
		{func() error { return fmt.Errorf("wrapped: %w", &ca.Error{Name: ca.RequestAbandoned}) }, 409, "request-abandoned", ""},
	} {
		next = test.fail
		a := s.call(t, s.public, alice, "POST", "/v1/certificates", issueBody(t, []byte("x"), ""), "Idempotency-Key", "k")
		if name, _ := a.problem(t); a.status != test.status || name != test.name || a.header.Get("Retry-After") != test.retry {
			t.Errorf("%d %s Retry-After %q, want %d %s %q", a.status, name, a.header.Get("Retry-After"), test.status, test.name, test.retry)
		}
		if strings.Contains(string(a.body), "password") || strings.Contains(string(a.body), "boom") || strings.Contains(string(a.body), "goroutine") {
			t.Errorf("the answer tells too much: %s", a.body)
		}
	}
}

func TestHostileRequestIDsAreReplaced(t *testing.T) {
	s := newSite(t, nil)
	for _, id := range []string{strings.Repeat("x", 65), "a b", `"><script>`, "é"} {
		a := s.call(t, s.public, alice, "GET", "/v1/nothing", "", "X-Request-Id", id)
		if got := a.header.Get("X-Request-Id"); got == id || got == "" {
			t.Errorf("%q came back as %q", id, got)
		}
		a.problem(t)
	}
}

func TestHealthRoutes(t *testing.T) {
	s := newSite(t, nil)
	for _, path := range []string{"/livez", "/readyz", "/healthz", "/health/issue", "/health/admin", "/metrics"} {
		for _, p := range []identity.Principal{lb, alice, person(identity.RoleSRE, "sam")} {
			if a := s.call(t, s.public, p, "GET", path, ""); a.status != http.StatusOK {
				t.Errorf("%s by %s: %d %s", path, p, a.status, a.body)
			}
		}
		if a := s.call(t, s.public, identity.Principal{}, "GET", path, ""); a.status != http.StatusUnauthorized {
			t.Errorf("%s by nobody: %d", path, a.status)
		}
	}
	s.mu.Lock()
	s.report.State = health.Draining
	s.mu.Unlock()
	for _, path := range []string{"/readyz", "/health/issue", "/health/admin"} {
		if a := s.call(t, s.public, lb, "GET", path, ""); a.status != http.StatusServiceUnavailable {
			t.Errorf("%s while draining: %d", path, a.status)
		}
	}
}
