package e2e_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"trivet/cluster"
)

// Bad input of every kind, through the balancer as clients send it: each is refused with the right status and name, nothing is recorded, no process dies.
func TestBadInputIsRefusedAndLeavesNoTrace(t *testing.T) {
	s := up(t)
	st := s.status(t)
	pids := map[string]int{}
	for _, p := range st.Processes {
		pids[p.Name] = p.PID
	}
	intents := s.intents(t)

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr := func(signer any, names ...string) string {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: names}, signer)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	}
	good := csr(key, "bad-input.example.org")
	block, _ := pem.Decode([]byte(good))
	block.Bytes[len(block.Bytes)-3] ^= 1
	forged := string(pem.EncodeToMemory(block))
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	request := func(csr string) string {
		b, err := json.Marshal(map[string]string{"profile": "tls-server", "csr": csr})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	var many []string
	for i := range 101 {
		many = append(many, fmt.Sprintf("n%d.example.org", i))
	}
	requester := s.client(t, st.Credentials.Requester, 4)
	for _, c := range []struct {
		name   string
		client *http.Client
		body   string
		status int
		types  string // any of these, separated by |
	}{
		{"not JSON", requester, "{", 400, "malformed-request"},
		{"unknown field", requester, `{"profile":"tls-server","csr":"x","colour":"red"}`, 400, "malformed-request"},
		{"no CSR", requester, `{"profile":"tls-server"}`, 400, "malformed-request|malformed-csr"},
		{"CSR that is not one", requester, request("hello"), 400, "malformed-csr"},
		{"CSR with a wrong signature", requester, request(forged), 400, "bad-csr-signature"},
		{"RSA 1024", requester, request(csr(weak, "weak.example.org")), 422, "weak-key"},
		{"P-224", requester, request(csr(p224, "p224.example.org")), 422, "key-not-permitted"},
		{"no name", requester, request(csr(key)), 422, "name-not-permitted"},
		{"101 names", requester, request(csr(key, many...)), 422, "name-not-permitted"},
		{"wildcard", requester, request(csr(key, "*.example.org")), 422, "name-not-permitted"},
		{"NUL in a name", requester, request(csr(key, "good.example.org\x00.evil.example")), 422, "name-not-permitted|malformed-csr"},
		{"name with a trailing dot", requester, request(csr(key, "example.org.")), 422, "name-not-permitted|malformed-csr"},
		{"unknown profile", requester, `{"profile":"no-such","csr":` + quote(good) + `}`, 0, ""},
		{"oversized body", requester, request(good + strings.Repeat(" ", 70<<10)), 413, "too-large"},
		{"no client certificate", s.client(t, noPair(), 1), request(good), 401, "unauthenticated"},
		{"auditor", s.client(t, st.Credentials.Auditor, 1), request(good), 403, "forbidden"},
		{"admin", s.client(t, st.Credentials.Admins[0], 1), request(good), 403, "forbidden"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, typ, raw := post(t, c.client, st.Endpoints.API[0]+"/v1/certificates", "bad-"+c.name, c.body)
			if c.status == 0 { // refused as the API's own tests say; here it matters that it is the client's fault
				if status < 400 || status >= 500 {
					t.Errorf("status %d %s", status, raw)
				}
				return
			}
			if status != c.status {
				t.Errorf("status %d, want %d: %s", status, c.status, raw)
			}
			found := false
			for want := range strings.SplitSeq(c.types, "|") {
				found = found || typ == "urn:trivet:problem:"+want
			}
			if !found {
				t.Errorf("type %q, want one of %s", typ, c.types)
			}
		})
	}
	if now := s.intents(t); now != intents {
		t.Errorf("%d intents were recorded for requests that were refused", now-intents)
	}

	t.Run("same key, another body", func(t *testing.T) {
		url := st.Endpoints.API[0] + "/v1/certificates"
		if status, _, raw := post(t, requester, url, "bad-reuse", request(good)); status != 201 {
			t.Fatalf("status %d: %s", status, raw)
		}
		if status, typ, raw := post(t, requester, url, "bad-reuse", request(csr(key, "other.example.org"))); status != 422 || typ != "urn:trivet:problem:idempotency-mismatch" {
			t.Errorf("status %d %s, want 422 idempotency-mismatch: %s", status, typ, raw)
		}
	})
	if now := s.intents(t); now != intents+1 {
		t.Errorf("%d intents were recorded; one certificate was issued", now-intents)
	}

	t.Run("malformed OCSP requests", func(t *testing.T) {
		for _, body := range [][]byte{nil, []byte("hello"), {0x30, 0x03, 0x02, 0x01}, bytes.Repeat([]byte{0x30}, 5000), {0x30, 0x80, 0, 0}} {
			resp, err := http.Post(st.Endpoints.Public[0]+"/ocsp", "application/ocsp-request", bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			answer, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			// RFC 6960 4.2.1: an OCSPResponse with status malformedRequest(1) and nothing else.
			if err != nil || resp.StatusCode != 200 || !bytes.Equal(answer, []byte{0x30, 3, 0x0a, 1, 1}) {
				t.Errorf("to %d octets: %s, % x, %v", len(body), resp.Status, answer, err)
			}
		}
		if resp, err := http.Post(st.Endpoints.Public[0]+"/ocsp", "application/ocsp-request", bytes.NewReader(make([]byte, 20<<10))); err != nil || resp.StatusCode != 413 && resp.StatusCode != 200 {
			t.Errorf("to 20 KiB: %v %v", resp, err)
		}
	})
	t.Run("unknown serial", func(t *testing.T) {
		resp, err := requester.Get(st.Endpoints.API[0] + "/v1/certificates/demo-g1:00")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 404 {
			t.Errorf("%s, want 404", resp.Status)
		}
	})
	for _, p := range s.status(t).Processes {
		if p.PID != pids[p.Name] {
			t.Errorf("%s died: pid %d became %d", p.Name, pids[p.Name], p.PID)
		}
	}
	s.fsck(t)
}

func (s *site) intents(t *testing.T) (n int) {
	t.Helper()
	if err := s.database(t).QueryRowContext(t.Context(), `SELECT COUNT(*) FROM intent`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func post(t *testing.T, client *http.Client, url, key, body string) (status int, typ, raw string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", strings.ReplaceAll(key, " ", "-"))
	resp, err := client.Do(req)
	if err != nil {
		t.Fatalf("no answer at all: %v", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var p struct{ Type string }
	_ = json.Unmarshal(b, &p) // an answer that is no problem+json has no type, and is told so
	return resp.StatusCode, p.Type, string(b)
}

func quote(s string) string {
	b, _ := json.Marshal(s) // strings always marshal
	return string(b)
}

func noPair() cluster.KeyPair { return cluster.KeyPair{} }
