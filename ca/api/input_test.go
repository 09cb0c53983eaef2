package api_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"trivet/ca/catest"
	"trivet/db"
)

// signedBy makes a PEM CSR with any key.
func signedBy(t *testing.T, key any, template *x509.CertificateRequest) string {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return encode(der)
}

func encode(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// dsaCSR is a CSR with a DSA key, as far as its algorithm says: Go makes none.
func dsaCSR(t *testing.T) string {
	t.Helper()
	block, _ := pem.Decode(catest.CSR(t, "www.example.org"))
	ec := must(hex.DecodeString("06072a8648ce3d0201"))
	if bytes.Count(block.Bytes, ec) != 1 {
		t.Fatal("no EC key in the CSR")
	}
	return encode(bytes.Replace(block.Bytes, ec, must(hex.DecodeString("06072a8648ce380401")), 1))
}

func TestBadInput(t *testing.T) {
	s := newSite(t, nil)
	ec := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	www := &x509.CertificateRequest{DNSNames: []string{"www.example.org"}}
	good := string(catest.CSR(t, "www.example.org"))
	block, _ := pem.Decode([]byte(good))
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	many := &x509.CertificateRequest{}
	for i := range 101 {
		many.DNSNames = append(many.DNSNames, fmt.Sprintf("h%d.example.org", i))
	}
	csr := func(text string) string { return issueBody(t, []byte(text), "") }
	names := func(names ...string) string { return csr(signedBy(t, ec, &x509.CertificateRequest{DNSNames: names})) }
	san := func(c *x509.CertificateRequest) string { c.DNSNames = www.DNSNames; return csr(signedBy(t, ec, c)) }
	extension := pkix.Extension{Id: []int{1, 3, 6, 1, 5, 5, 7, 1, 24}, Value: []byte{0x30, 3, 2, 1, 5}} // must-staple

	for name, test := range map[string]struct {
		body   string
		header []string
		status int
		want   string
		field  string
	}{
		"broken CSR":            {body: csr("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"), status: 400, want: "malformed-csr", field: "csr"},
		"no CSR at all":         {body: csr("hello"), status: 400, want: "malformed-csr", field: "csr"},
		"certificate as CSR":    {body: csr(strings.ReplaceAll(good, "CERTIFICATE REQUEST", "CERTIFICATE")), status: 400, want: "malformed-csr", field: "csr"},
		"two CSRs":              {body: csr(good + good), status: 400, want: "malformed-csr", field: "csr"},
		"cut CSR":               {body: csr(encode(block.Bytes[:len(block.Bytes)/2])), status: 400, want: "malformed-csr", field: "csr"},
		"CSR with a tail":       {body: csr(encode(append(bytes.Clone(block.Bytes), 0))), status: 400, want: "malformed-csr", field: "csr"},
		"empty CSR":             {body: csr(""), status: 400, want: "malformed-request", field: "csr"},
		"wrong signature":       {body: csr(encode(forged)), status: 400, want: "bad-csr-signature", field: "csr"},
		"weak RSA key":          {body: csr(signedBy(t, must(rsa.GenerateKey(rand.Reader, 1024)), www)), status: 422, want: "weak-key", field: "csr.public_key"},
		"curve not permitted":   {body: csr(signedBy(t, must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)), www)), status: 422, want: "key-not-permitted", field: "csr.public_key"},
		"curve unknown here":    {body: csr(signedBy(t, must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)), www)), status: 422, want: "key-not-permitted", field: "csr.public_key"},
		"Ed25519":               {body: csr(signedBy(t, ed, www)), status: 422, want: "key-not-permitted", field: "csr.public_key"},
		"DSA":                   {body: csr(dsaCSR(t)), status: 422, want: "key-not-permitted", field: "csr.public_key"},
		"name outside":          {body: names("www.example.com"), status: 422, want: "name-not-permitted", field: "csr.sans"},
		"name like the domain":  {body: names("wwwexample.org"), status: 422, want: "name-not-permitted", field: "csr.sans"},
		"wildcard":              {body: names("*.example.org"), status: 422, want: "name-not-permitted", field: "csr.sans"},
		"no name":               {body: names(), status: 422, want: "name-not-permitted", field: "csr.sans"},
		"NUL in a name":         {body: names("www.example.com\x00.example.org"), status: 422, want: "name-not-permitted", field: "csr.sans"},
		"too many names":        {body: csr(signedBy(t, ec, many)), status: 422, want: "name-not-permitted", field: "csr.sans"},
		"IP address":            {body: san(&x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)}}), status: 422, want: "name-not-permitted", field: "csr.sans"},
		"email":                 {body: san(&x509.CertificateRequest{EmailAddresses: []string{"a@example.org"}}), status: 422, want: "name-not-permitted", field: "csr.sans"},
		"organization":          {body: san(&x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"Evil"}}}), status: 422, want: "name-not-permitted", field: "csr.subject"},
		"other common name":     {body: san(&x509.CertificateRequest{Subject: pkix.Name{CommonName: "mail.example.org"}}), status: 422, want: "name-not-permitted"},
		"extension":             {body: san(&x509.CertificateRequest{ExtraExtensions: []pkix.Extension{extension}}), status: 422, want: "extension-not-permitted"},
		"unknown profile":       {body: `{"profile":"nonesuch","csr":"x"}`, status: 400, want: "malformed-request", field: "profile"},
		"no profile":            {body: `{"csr":"x"}`, status: 400, want: "malformed-request", field: "profile"},
		"unknown CA":            {body: issueBody(t, []byte(good), `,"ca":"nonesuch"`), status: 400, want: "malformed-request", field: "ca"},
		"root as CA":            {body: issueBody(t, []byte(good), `,"ca":"root"`), status: 400, want: "malformed-request", field: "ca"},
		"too long-lived":        {body: issueBody(t, []byte(good), `,"not_after":"2199-01-01T00:00:00Z"`), status: 422, want: "validity-not-permitted", field: "not_after"},
		"ended already":         {body: issueBody(t, []byte(good), `,"not_after":"2001-01-01T00:00:00Z"`), status: 422, want: "validity-not-permitted", field: "not_after"},
		"date of year 0":        {body: issueBody(t, []byte(good), `,"not_after":"0000-01-01T00:00:00Z"`), status: 400, want: "malformed-request", field: "not_after"},
		"no date":               {body: issueBody(t, []byte(good), `,"not_after":"tomorrow"`), status: 400, want: "malformed-request"},
		"reference too long":    {body: issueBody(t, []byte(good), `,"reference":"`+strings.Repeat("x", 256)+`"`), status: 400, want: "malformed-request", field: "reference"},
		"reference with NUL":    {body: issueBody(t, []byte(good), `,"reference":"\u0000"`), status: 400, want: "malformed-request", field: "reference"},
		"unknown field":         {body: issueBody(t, []byte(good), `,"serial":"01"`), status: 400, want: "malformed-request", field: "serial"},
		"unknown inner field":   {body: issueBody(t, []byte(good), `,"subject":{"organization":"Evil"}`), status: 400, want: "malformed-request", field: "organization"},
		"field in another case": {body: issueBody(t, []byte(good), `,"CA":"demo"`), status: 400, want: "malformed-request", field: "CA"},
		"field twice":           {body: issueBody(t, []byte(good), `,"profile":"tls-server"`), status: 400, want: "malformed-request", field: "profile"},
		"field of another type": {body: `{"profile":7,"csr":"x"}`, status: 400, want: "malformed-request", field: "profile"},
		"not an object":         {body: `["profile"]`, status: 400, want: "malformed-request"},
		"null":                  {body: `null`, status: 400, want: "malformed-request", field: "profile"},
		"no JSON":               {body: `profile=tls-server`, status: 400, want: "malformed-request"},
		"half a JSON":           {body: `{"profile":"tls-`, status: 400, want: "malformed-request"},
		"two JSONs":             {body: `{"profile":"a"}{"profile":"b"}`, status: 400, want: "malformed-request"},
		"deep JSON":             {body: `{"sans":` + strings.Repeat("[", 30000) + `}`, status: 400, want: "malformed-request"},
		"not UTF-8":             {body: "{\"profile\":\"\xff\"}", status: 400, want: "malformed-request"},
		"oversized":             {body: issueBody(t, []byte(good), `,"reference":"`+strings.Repeat("x", 64<<10)+`"`), status: 413, want: "too-large"},
		"large CSR":             {body: csr(encode(make([]byte, 40<<10))), status: 413, want: "too-large", field: "csr"},
		"empty":                 {body: "", header: []string{"Content-Type", "application/json"}, status: 400, want: "malformed-request"},
		"no content type":       {body: csr(good), header: []string{"Content-Type", ""}, status: 415, want: "unsupported-media-type", field: "Content-Type"},
		"form":                  {body: csr(good), header: []string{"Content-Type", "application/x-www-form-urlencoded"}, status: 415, want: "unsupported-media-type", field: "Content-Type"},
		"UTF-16":                {body: csr(good), header: []string{"Content-Type", "application/json; charset=utf-16"}, status: 415, want: "unsupported-media-type", field: "Content-Type"},
		"gzip":                  {body: csr(good), header: []string{"Content-Encoding", "gzip"}, status: 415, want: "unsupported-media-type", field: "Content-Encoding"},
		"no idempotency key":    {body: csr(good), header: []string{"Idempotency-Key", ""}, status: 400, want: "malformed-request", field: "Idempotency-Key"},
		"two idempotency keys":  {body: csr(good), header: []string{"Idempotency-Key", "another"}, status: 400, want: "malformed-request", field: "Idempotency-Key"},
		"long idempotency key":  {body: csr(good), header: []string{"Idempotency-Key", "", "Idempotency-Key", strings.Repeat("k", 256)}, status: 400, want: "malformed-request", field: "Idempotency-Key"},
		"key not ASCII":         {body: csr(good), header: []string{"Idempotency-Key", "", "Idempotency-Key", "schlüssel"}, status: 400, want: "malformed-request", field: "Idempotency-Key"},
		"wants HTML":            {body: csr(good), header: []string{"Accept", "text/html"}, status: 406, want: "not-acceptable", field: "Accept"},
	} {
		t.Run(name, func(t *testing.T) {
			header := append([]string{"Idempotency-Key", name}, test.header...)
			a := s.call(t, s.public, alice, "POST", "/v1/certificates", test.body, header...)
			got, field := a.problem(t)
			if a.status != test.status || got != test.want || test.field != "" && field != test.field {
				t.Errorf("got %d %s, field %q: %s", a.status, got, field, a.body)
			}
			if strings.Contains(string(a.body), "goroutine") || strings.Contains(string(a.body), ".go:") {
				t.Errorf("the answer tells of the program: %s", a.body)
			}
		})
	}
	// The process lives, and nothing is on record but what was there before.
	page := must(s.node.Store.ListCertificates(t.Context(), db.Filter{Requester: alice.String()}))
	if len(page.Certificates) != 0 {
		t.Errorf("%d refused requests left a row", len(page.Certificates))
	}
	s.issue(t, alice, "after all that")
}

func TestBadIdentifiers(t *testing.T) {
	s := newSite(t, nil)
	serial := strings.Repeat("01", 20)
	for id, want := range map[string]string{
		"demo-g1:" + serial: "not-found", serial: "not-found", "nonesuch-g1:" + serial: "not-found", "demo-g1:01": "not-found",
		"demo-g1:" + strings.ToUpper("0a"+serial[2:]): "malformed-request", "demo:" + serial: "malformed-request", "demo-g1:": "malformed-request", ":" + serial: "malformed-request",
		"demo-g1:xyz": "malformed-request", "demo-g1:" + strings.Repeat("01", 21): "malformed-request", "demo-g1:123": "malformed-request",
		"demo-g1:" + serial + ":x": "malformed-request", "..%2f..%2fetc": "not-found", "demo-g1:01'%20OR%20'1'='1": "malformed-request",
	} {
		for _, method := range []string{"GET", "POST"} {
			path := "/v1/certificates/" + id
			body := ""
			if method == "POST" {
				path, body = path+"/revoke", "{}"
			}
			a := s.call(t, s.public, olga, method, path, body)
			if name, _ := a.problem(t); name != want || a.status/100 != 4 {
				t.Errorf("%s %s: %d %s, want %s", method, path, a.status, name, want)
			}
		}
	}
	for path, field := range map[string]string{
		"/v1/certificates?limit=0": "limit", "/v1/certificates?limit=1001": "limit", "/v1/certificates?limit=x": "limit", "/v1/certificates?status=abandoned": "status",
		"/v1/certificates?color=red": "color", "/v1/certificates?limit=1&limit=2": "limit", "/v1/certificates?cursor=%21": "cursor", "/v1/certificates?cursor=eHg": "cursor",
		"/v1/certificates?issuer=demo": "issuer", "/v1/certificates?%zz": "query",
	} {
		a := s.call(t, s.public, olga, "GET", path, "")
		if name, got := a.problem(t); a.status != http.StatusBadRequest || name != "malformed-request" || got != field {
			t.Errorf("%s: %d %s %s", path, a.status, name, got)
		}
	}
	c := s.issue(t, alice, "one")
	for body, field := range map[string]string{
		`{"reason":"removeFromCRL"}`: "reason", `{"reason":"nonsense"}`: "reason", `{"reason":"cACompromise"}`: "reason", `{"serial":"1"}`: "serial",
		`{"invalidity_date":"2199-01-01T00:00:00Z"}`: "invalidity_date", `{"invalidity_date":"1066-01-01T00:00:00Z"}`: "invalidity_date",
		`{"comment":"` + strings.Repeat("x", 1001) + `"}`: "comment", `{"comment":"\u0007"}`: "comment",
	} {
		a := s.call(t, s.public, alice, "POST", "/v1/certificates/"+c.ID+"/revoke", body)
		if _, got := a.problem(t); a.status/100 != 4 || got != field {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	if a := s.call(t, s.public, alice, "GET", "/v1/certificates/"+c.ID, ""); !strings.Contains(string(a.body), `"valid"`) {
		t.Errorf("a refused revocation left its mark: %s", a.body)
	}
}

// A client that stops in the middle of its body gets an answer or an end, and costs nothing else.
func TestBodyThatNeverEnds(t *testing.T) {
	s := newSite(t, nil)
	read, write := io.Pipe()
	r := request(t, s.public, "POST", "/v1/certificates", "", "Idempotency-Key", "k", "Content-Type", "application/json")
	r.Body = read
	go func() {
		for {
			if _, err := write.Write(bytes.Repeat([]byte(" "), 4<<10)); err != nil {
				return
			}
		}
	}()
	defer write.Close()
	a := s.send(t, s.public, alice, r)
	if name, _ := a.problem(t); name != "too-large" {
		t.Errorf("%d %s", a.status, a.body)
	}
}
