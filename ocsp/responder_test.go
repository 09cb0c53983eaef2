package ocsp_test

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	xocsp "golang.org/x/crypto/ocsp"

	"trivet/db"
	"trivet/ocsp"
)

var (
	goodSerial    = []byte{0x11, 0x22, 0x33, 0x44, 0x55}
	revokedSerial = []byte{0x7f, 0xff, 0xfe, 0xfd}
	absentSerial  = []byte{0x01, 0x02, 0x03}
)

// ask posts a request and returns the parsed answer, or the error body's status as x/crypto reads it.
func ask(t testing.TB, h http.Handler, path string, a *authority, serial []byte, hash crypto.Hash) (*xocsp.Response, error) {
	t.Helper()
	body := post(t, h, path, a.request(t, serial, hash))
	return xocsp.ParseResponseForCert(body, &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial)}, a.cert)
}

func post(t testing.TB, h http.Handler, path string, der []byte) []byte {
	t.Helper()
	r := httptest.NewRequest(http.MethodPost, path, bytes.NewReader(der))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != "application/ocsp-response" {
		t.Fatalf("POST %s: %d %v", path, w.Code, w.Header())
	}
	return w.Body.Bytes()
}

// says reduces an answer to one word.
func says(r *xocsp.Response, err error) string {
	var status xocsp.ResponseError
	switch {
	case errors.As(err, &status):
		return status.Status.String()
	case err != nil:
		return err.Error()
	case r.Status == xocsp.Good:
		return "good"
	case r.Status == xocsp.Revoked:
		return "revoked"
	}
	return fmt.Sprint(r.Status)
}

func expect(t testing.TB, n *node, a *authority, serial []byte, want string) {
	t.Helper()
	if got := says(ask(t, n.Public(), "/ocsp/"+a.name, a, serial, crypto.SHA1)); got != want {
		t.Fatalf("serial %x: answered %q, want %q", serial, got, want)
	}
}

// populated is a node with one good and one revoked certificate, all signed.
func populated(t testing.TB, options ...option) (*node, *authority) {
	t.Helper()
	a := newAuthority(t, "demo")
	m := newMemory("db1", "db2", "db3")
	m.generation(a, a.crl(t, 7))
	m.issue("demo-g1", goodSerial)
	m.issue("demo-g1", revokedSerial)
	m.revoke("demo-g1", revokedSerial, 4)
	n := start(t, m, []*authority{a}, options...)
	n.settle(t)
	return n, a
}

func TestAnswersStateWhatTheRecordSays(t *testing.T) {
	n, a := populated(t)
	for _, hash := range []crypto.Hash{crypto.SHA1, crypto.SHA256} {
		for _, path := range []string{"/ocsp", "/ocsp/", "/ocsp/demo", "/ocsp/demo/"} {
			if got := says(ask(t, n.Public(), path, a, goodSerial, hash)); got != "good" {
				t.Errorf("%v %s: issued certificate is %s", hash, path, got)
			}
		}
		r, err := ask(t, n.Public(), "/ocsp/demo", a, revokedSerial, hash)
		if says(r, err) != "revoked" || r.RevocationReason != xocsp.Superseded {
			t.Errorf("%v: revoked certificate: %v %v", hash, r, err)
		}
		if r.ThisUpdate.Before(r.RevokedAt) {
			t.Errorf("%v: thisUpdate %v lies before revocationTime %v", hash, r.ThisUpdate, r.RevokedAt)
		}
		if got := says(ask(t, n.Public(), "/ocsp/demo", a, absentSerial, hash)); got != "unauthorized" {
			t.Errorf("%v: certificate never issued is %s", hash, got)
		}
	}
	r, err := ask(t, n.Public(), "/ocsp", a, goodSerial, crypto.SHA1)
	must(t, err)
	if !r.ProducedAt.Equal(r.ThisUpdate) || r.NextUpdate.Sub(r.ThisUpdate) != 7*24*time.Hour || r.ResponderKeyHash == nil {
		t.Errorf("producedAt %v, thisUpdate %v, nextUpdate %v, byKey %x", r.ProducedAt, r.ThisUpdate, r.NextUpdate, r.ResponderKeyHash)
	}
}

func TestOpenSSLAcceptsEveryKindOfAnswer(t *testing.T) {
	openssl := program(t, "openssl")
	n, a := populated(t)
	server := httptest.NewServer(n.Public())
	defer server.Close()
	judge(t, openssl, server.URL+"/ocsp/demo", a)
}

// judge lets openssl ask about the three serials, by SHA-1 and SHA-256 CertIDs, with and without nonce, and about two at once.
func judge(t *testing.T, openssl, address string, a *authority) {
	t.Helper()
	ca := a.pem(t)
	run := func(args ...string) string {
		out, err := exec.Command(openssl, append([]string{"ocsp", "-issuer", ca, "-CAfile", ca, "-url", address}, args...)...).CombinedOutput()
		if err != nil && !strings.Contains(string(out), "unauthorized") {
			t.Errorf("openssl %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	hexOf := func(s []byte) string { return "0x" + hex.EncodeToString(s) }
	for _, extra := range [][]string{nil, {"-no_nonce"}} {
		for _, hash := range []string{"-sha1", "-sha256"} {
			for serial, want := range map[string]string{hexOf(goodSerial): ": good", hexOf(revokedSerial): ": revoked", hexOf(absentSerial): "unauthorized"} {
				out := run(append([]string{hash, "-serial", serial}, extra...)...)
				if !strings.Contains(out, want) || want != "unauthorized" && !strings.Contains(out, "Response verify OK") {
					t.Errorf("%s %s %v: want %q, openssl says\n%s", hash, serial, extra, want, out)
				}
			}
		}
	}
	out := run("-serial", hexOf(goodSerial), "-serial", hexOf(revokedSerial))
	if !strings.Contains(out, hexOf(goodSerial)+": good") || !strings.Contains(out, hexOf(revokedSerial)+": revoked") || !strings.Contains(out, "verify OK") {
		t.Errorf("two certificates in one request: openssl says\n%s", out)
	}
}

// TestGetTakesPathsAsSent sends request lines that no client library would.
func TestGetTakesPathsAsSent(t *testing.T) {
	a := newAuthority(t, "demo")
	m := newMemory("db1")
	m.generation(a, nil)
	// Look for a serial whose request holds + and // in base64.
	var serial, der []byte
	var b64 string
	for i := 0; ; i++ {
		serial = append([]byte{0x01}, []byte{byte(i >> 8), byte(i), 0xff, 0xfb, 0xef, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfb}...)
		der = a.request(t, serial, crypto.SHA1)
		if b64 = base64.StdEncoding.EncodeToString(der); strings.Contains(b64, "+") && strings.Contains(b64, "//") {
			break
		}
		if i > 1<<16-2 {
			t.Fatal("no such serial")
		}
	}
	m.issue("demo-g1", serial)
	n := start(t, m, []*authority{a})
	n.settle(t)
	server := httptest.NewServer(n.Public())
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")

	forms := map[string]string{
		"raw":              "/ocsp/demo/" + b64,
		"any issuer":       "/ocsp/" + b64,
		"leading slash":    "/ocsp/demo//" + b64,
		"two before":       "/ocsp//demo/" + b64,
		"percent":          "/ocsp/demo/" + url.QueryEscape(b64),
		"lower percent":    "/ocsp/demo/" + strings.NewReplacer("+", "%2b", "/", "%2f", "=", "%3d").Replace(b64),
		"slashes only":     "/ocsp/demo/" + strings.ReplaceAll(b64, "/", "%2F"),
		"no padding":       "/ocsp/demo/" + strings.TrimRight(b64, "="),
		"query":            "/ocsp/demo/" + b64 + "?x=1",
		"absolute":         "http://" + host + "/ocsp/demo/" + b64,
		"everything coded": "/ocsp/demo/" + everyOctet(b64),
	}
	for name, target := range forms {
		for _, version := range []string{"HTTP/1.0", "HTTP/1.1"} {
			resp, body := raw(t, host, "GET "+target+" "+version+"\r\nHost: "+host+"\r\nConnection: close\r\n\r\n")
			got, err := xocsp.ParseResponse(body, a.cert)
			if resp.StatusCode != 200 || says(got, err) != "good" || got.SerialNumber.Cmp(new(big.Int).SetBytes(serial)) != 0 {
				t.Errorf("%s %s: %d %s", name, version, resp.StatusCode, says(got, err))
			}
		}
	}

	target := "/ocsp/demo/" + b64
	resp, body := raw(t, host, "GET "+target+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	sum := sha256.Sum256(body)
	etag := `"` + hex.EncodeToString(sum[:]) + `"`
	if resp.Header.Get("Etag") != etag {
		t.Errorf("ETag %s, want %s", resp.Header.Get("Etag"), etag)
	}
	parsed, err := xocsp.ParseResponse(body, a.cert)
	must(t, err)
	if openssl, err := exec.LookPath("openssl"); err == nil {
		file, ca := filepath.Join(t.TempDir(), "response.der"), a.pem(t)
		must(t, os.WriteFile(file, body, 0o600))
		out, err := exec.Command(openssl, "ocsp", "-respin", file, "-issuer", ca, "-CAfile", ca, "-serial", "0x"+hex.EncodeToString(serial)).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "Response verify OK") || !strings.Contains(string(out), ": good") {
			t.Errorf("openssl about the answer to a GET: %v\n%s", err, out)
		}
	}
	for header, want := range map[string]string{
		"Last-Modified": parsed.ThisUpdate.UTC().Format(http.TimeFormat), "Expires": parsed.NextUpdate.UTC().Format(http.TimeFormat),
		"Content-Length": fmt.Sprint(len(body)), "Content-Type": "application/ocsp-response",
	} {
		if got := resp.Header.Get(header); got != want {
			t.Errorf("%s: %q, want %q", header, got, want)
		}
	}
	var age int
	if _, err := fmt.Sscanf(resp.Header.Get("Cache-Control"), "max-age=%d,public,no-transform,must-revalidate", &age); err != nil || age < 300 || age > 900 {
		t.Errorf("Cache-Control: %q", resp.Header.Get("Cache-Control"))
	}
	if resp, body := raw(t, host, "GET "+target+" HTTP/1.1\r\nHost: x\r\nIf-None-Match: \"a\", W/"+etag+"\r\nConnection: close\r\n\r\n"); resp.StatusCode != 304 || len(body) != 0 {
		t.Errorf("If-None-Match: %d with %d octets", resp.StatusCode, len(body))
	}
	if resp, body := raw(t, host, "HEAD "+target+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); resp.StatusCode != 200 || len(body) != 0 || resp.ContentLength <= 0 {
		t.Errorf("HEAD: %d with %d octets", resp.StatusCode, len(body))
	}
	if resp, _ := raw(t, host, "PUT /ocsp HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"); resp.StatusCode != 405 {
		t.Errorf("PUT: %d", resp.StatusCode)
	}
}

func everyOctet(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		fmt.Fprintf(&b, "%%%02X", c)
	}
	return b.String()
}

// raw sends octets as they are and reads one response.
func raw(t testing.TB, host, request string) (*http.Response, []byte) {
	t.Helper()
	c, err := net.Dial("tcp", host)
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = io.WriteString(c, request)
	must(t, err)
	method, _, _ := strings.Cut(request, " ")
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp, body
}

func TestForeignAndMixedIssuersAreUnauthorized(t *testing.T) {
	a, b, foreign := newAuthority(t, "alpha"), newAuthority(t, "beta"), newAuthority(t, "gamma")
	m := newMemory("db1")
	m.generation(a, nil)
	m.generation(b, nil)
	m.issue("alpha-g1", goodSerial)
	m.issue("beta-g1", goodSerial)
	n := start(t, m, []*authority{a, b})
	n.settle(t)
	expect(t, n, a, goodSerial, "good")
	if got := says(ask(t, n.Public(), "/ocsp", foreign, goodSerial, crypto.SHA1)); got != "unauthorized" {
		t.Errorf("foreign issuer: %s", got)
	}
	if got := says(ask(t, n.Public(), "/ocsp/beta", a, goodSerial, crypto.SHA1)); got != "unauthorized" {
		t.Errorf("issuer of another CA's path: %s", got)
	}
	mixed := requestOf(certIDOf(a, goodSerial), certIDOf(b, goodSerial))
	if body := post(t, n.Public(), "/ocsp", mixed); !bytes.Equal(body, []byte{0x30, 3, 10, 1, 6}) {
		t.Errorf("mixed issuers: %x", body)
	}
	if body := post(t, n.Public(), "/ocsp", requestOf(certIDOf(a, goodSerial), certIDOf(a, absentSerial))); !bytes.Equal(body, []byte{0x30, 3, 10, 1, 6}) {
		t.Errorf("one of two never issued: %x", body)
	}
}

func TestBadInputIsMalformedAndKillsNothing(t *testing.T) {
	n, a := populated(t)
	server := httptest.NewServer(n.Public())
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	valid := a.request(t, goodSerial, crypto.SHA1)
	id := certIDOf(a, goodSerial)
	bodies := map[string][]byte{
		"empty": nil, "garbage": []byte("hello"), "truncated": valid[:len(valid)-1], "trailing": append(append([]byte(nil), valid...), 0),
		"too large": bytes.Repeat([]byte{0x30}, 11<<10), "html": []byte("<html>"), "indefinite length": {0x30, 0x80, 0, 0},
		"no certificate": requestOf(), "17 certificates": requestOf(repeat(id, 17)...),
		"nonce of 0 octets": withNonce(id, 0), "nonce of 129 octets": withNonce(id, 129),
		"zero serial": requestOf(certIDOf(a, []byte{0})), "negative serial": requestOf(certIDRaw(a, []byte{0x80})),
		"21 octets of serial": requestOf(certIDRaw(a, bytes.Repeat([]byte{0x11}, 21))),
		"version 5":           versioned(id, 4), "unknown critical extension": withCritical(id),
	}
	for name, body := range bodies {
		if got := post(t, n.Public(), "/ocsp/demo", body); !bytes.Equal(got, []byte{0x30, 3, 10, 1, 1}) {
			t.Errorf("%s: %x, want malformedRequest", name, got)
		}
	}
	for name, body := range map[string][]byte{
		"nonce of 1 octet": withNonce(id, 1), "nonce of 128 octets": withNonce(id, 128), "requestorName": requestorName(id),
		"version 1 spelt out": versioned(id, 0), "16 certificates": requestOf(repeat(id, 16)...),
	} {
		if got := post(t, n.Public(), "/ocsp/demo", body); len(got) < 100 {
			t.Errorf("%s: %x, want an answer", name, got)
		}
	}
	for _, line := range []string{
		"GET /ocsp/demo/%zz HTTP/1.1", "GET /ocsp/demo/!!!! HTTP/1.1", "GET /ocsp/ HTTP/1.1", "GET /ocsp/demo HTTP/1.1",
		"GET /ocsp/demo/" + strings.Repeat("A", 30<<10) + " HTTP/1.1", "GET /ocsp/%00%ff HTTP/1.1",
	} {
		resp, body := raw(t, host, line+"\r\nHost: x\r\nConnection: close\r\n\r\n")
		if resp.StatusCode == 200 && !bytes.Equal(body, []byte{0x30, 3, 10, 1, 1}) || resp.StatusCode/100 == 3 || resp.StatusCode >= 500 {
			t.Errorf("%.40s: %d %x", line, resp.StatusCode, body)
		}
		if resp.StatusCode == 200 && resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%.40s: an error may be cached: %v", line, resp.Header)
		}
	}
	for _, path := range []string{"/", "/crl/", "/crl/nobody-g1.crl", "/ca/nobody-g1.crt", "/crl/../ca/demo-g1.crt", "/ca//demo-g1.crt", "/healthz", "/internal/position"} {
		if resp, _ := raw(t, host, "GET "+path+" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); resp.StatusCode != 404 {
			t.Errorf("%s: %d, want 404", path, resp.StatusCode)
		}
	}
	expect(t, n, a, goodSerial, "good")
}

func TestCRLAndIssuerCertificateAreServed(t *testing.T) {
	n, a := populated(t)
	eventually(t, "CRL known", func() bool { return n.Report().Capabilities["crl:demo-g1"].OK })
	get := func(path string, header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		for i := 0; i+1 < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		n.Public().ServeHTTP(w, r)
		return w
	}
	w := get("/ca/demo-g1.crt")
	if w.Code != 200 || w.Header().Get("Content-Type") != "application/pkix-cert" || !bytes.Equal(w.Body.Bytes(), a.cert.Raw) {
		t.Errorf("issuer certificate: %d %v", w.Code, w.Header())
	}
	w = get("/crl/demo-g1.crl")
	list, err := x509.ParseRevocationList(w.Body.Bytes())
	must(t, err)
	if w.Header().Get("Content-Type") != "application/pkix-crl" || w.Header().Get("Last-Modified") != list.ThisUpdate.Format(http.TimeFormat) || list.Number.Int64() != 7 {
		t.Errorf("CRL: %v number %v", w.Header(), list.Number)
	}
	if w := get("/crl/demo-g1.crl", "If-None-Match", w.Header().Get("Etag")); w.Code != 304 {
		t.Errorf("If-None-Match: %d", w.Code)
	}

	publish := func(crl []byte) {
		n.record.generation(a, crl)
		n.record.add("ca1/0", db.FeedCRL, "demo-g1", nil, db.FeedPayload{})
		n.polled(t)
	}
	number := func() string { return n.Position().Issuers[0].CRLNumber }
	publish(a.crl(t, 6))
	eventually(t, "the lower number is complained of", func() bool {
		return strings.Contains(n.RefreshCause("demo-g1"), "number 6")
	})
	publish(newAuthority(t, "demo").crl(t, 9))
	eventually(t, "the false signature is complained of", func() bool {
		return strings.Contains(n.RefreshCause("demo-g1"), "signature")
	})
	if number() != "7" {
		t.Errorf("CRL number is %s after one with a lower number and one of another key", number())
	}
	publish(a.crl(t, 8, new(big.Int).SetBytes(revokedSerial)))
	eventually(t, "the newer CRL is served", func() bool { return number() == "8" })
}

func TestBenignRaceOfIssuanceIsHidden(t *testing.T) {
	n, a := populated(t)
	fresh := []byte{9, 9, 9, 9}
	n.record.issue("demo-g1", fresh) // acknowledged, but not polled by this node yet
	expect(t, n, a, fresh, "good")
}

func TestDrainShowsInHealthAndLeavingEndsGood(t *testing.T) {
	n, a := populated(t, policy(ocsp.Serve))
	if r := n.Report(); r.State != "ok" || !r.Capabilities["ocsp:demo-g1"].OK || !r.Capabilities["aia"].OK {
		t.Errorf("healthy node reports %+v", r)
	}
	n.Drain()
	if r := n.Report(); r.State != "draining" {
		t.Errorf("draining node reports %s", r.State)
	}
	expect(t, n, a, goodSerial, "good")
	n.stop()
	expect(t, n, a, goodSerial, "try later")
	expect(t, n, a, revokedSerial, "revoked")
	n.record.locked(func() {
		if tip := n.record.members[len(n.record.members)-1]; tip.Event != "out" {
			t.Errorf("newest membership row is %q after leaving", tip.Event)
		}
	})
}

func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, name)
	}
	return path
}
