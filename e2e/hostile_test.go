package e2e_test

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// door is an address at which certificates are asked for.
type door struct{ name, address string }

// Requests made to do harm, at the balancer and at a CA node itself: each is refused with the right status, says what is wrong, is not recorded, and no process
// dies of it.
func TestHostileRequestsAreRefusedAtEveryDoor(t *testing.T) {
	s := up(t)
	st := s.status(t)
	pids := map[string]int{}
	for _, p := range st.Processes {
		pids[p.Name] = p.PID
	}
	intents := s.intents(t)
	doors := []door{{"balancer", strings.TrimPrefix(st.Endpoints.API[0], "https://")}, {"CA node", s.process(t, "ca1").Addresses["api"]}}
	requester := s.client(t, st.Credentials.Requester, 8)
	requester.Transport.(*http.Transport).TLSClientConfig.InsecureSkipVerify = true // a node is known by role, not by host name

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := csrOf(t, key, x509.CertificateRequest{DNSNames: []string{"hostile.example.org"}})
	body := func(csr string) string {
		b, err := json.Marshal(map[string]string{"profile": "tls-server", "csr": csr})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	batch := func(csr string) string {
		return `{"requests":[{"idempotency_key":"hostile",` + strings.TrimPrefix(body(csr), "{") + `]}`
	}
	san := func(names ...string) string { // octet for octet
		var general []asn1.RawValue
		for _, name := range names {
			general = append(general, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte(name)})
		}
		value, err := asn1.Marshal(general)
		if err != nil {
			t.Fatal(err)
		}
		return csrOf(t, key, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: value}}})
	}
	var thousands []string
	for i := range 10_000 {
		thousands = append(thousands, fmt.Sprintf("n%d.example.org", i))
	}
	huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 16383, 1), E: 65537}
	block, _ := pem.Decode([]byte(good))
	cut := pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes[:len(block.Bytes)/2]})
	tail := pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: append(slices.Clone(block.Bytes), 0x05, 0x00)})

	for _, c := range []struct {
		name, path, body string
		status           int
		types            string // any of these, separated by |
	}{
		{"PEM without an end", "", body(strings.SplitAfter(good, "\n")[0] + strings.SplitAfter(good, "\n")[1]), 400, "malformed-csr"},
		{"PEM of another type", "", body(strings.ReplaceAll(good, "CERTIFICATE REQUEST", "CERTIFICATE")), 400, "malformed-csr"},
		{"PEM of nothing", "", body("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"), 400, "malformed-csr"},
		{"half a CSR", "", body(string(cut)), 400, "malformed-csr"},
		{"CSR with a tail", "", body(string(tail)), 400, "malformed-csr"},
		{"nested a hundred thousand deep", "", body(string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: bytes.Repeat([]byte{0x30, 0x80}, 10_000)}))), 400, "malformed-csr"},
		{"10,000 names", "", body(san(thousands...)), 413, "too-large"},
		{"10,000 names in a batch", ":batch", batch(san(thousands...)), 413, "too-large"},
		{"101 names", "", body(san(thousands[:101]...)), 422, "name-not-permitted"},
		{"RSA 16384", "", body(csrFor(t, good, huge)), 422, "key-not-permitted|weak-key"},
		{"RSA with an even modulus", "", body(csrFor(t, good, &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537})), 422, "key-not-permitted|weak-key"},
		{"extended key usage of none", "", body(csrOf(t, key, x509.CertificateRequest{DNSNames: []string{"hostile.example.org"},
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: []byte{0x30, 0}}}})), 400, "malformed-csr"},
		{"CA certificate asked for", "", body(csrOf(t, key, x509.CertificateRequest{DNSNames: []string{"hostile.example.org"},
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Value: []byte{0x30, 3, 1, 1, 0xff}}}})), 422, "extension-not-permitted"},
		{"NUL", "", body(san("good.example.org\x00.evil.example")), 422, "name-not-permitted"},
		{"U-label", "", body(san("bücher.example.org")), 400, "malformed-csr"},
		{"homoglyph", "", body(san("ex\u0430mple.org")), 400, "malformed-csr"}, // Cyrillic а
		{"A-label of a mix of scripts", "", body(san("xn--exmple-4nf.org")), 422, "name-not-permitted"},
		{"A-label that is none", "", body(san("xn--a.example.org")), 422, "name-not-permitted"},
		{"full-width dot", "", body(san("www\uff0eexample.org")), 400, "malformed-csr"},
		{"address as a name", "", body(san("127.0.0.1")), 422, "name-not-permitted"},
		{"label of 64", "", body(san(strings.Repeat("a", 64) + ".example.org")), 422, "name-not-permitted"},
		{"empty name", "", body(san("")), 422, "name-not-permitted"},
		{"unknown field", "", strings.Replace(body(good), "{", `{"is_ca":true,`, 1), 400, "malformed-request"},
		{"field twice", "", strings.Replace(body(good), "{", `{"profile":"tls-client",`, 1), 400, "malformed-request"},
		{"field in capitals", "", strings.Replace(body(good), "profile", "PROFILE", 1), 400, "malformed-request"},
		{"two documents", "", body(good) + body(good), 400, "malformed-request"},
		{"not UTF-8", "", strings.Replace(body(good), "tls-server", "tls-\xffserver", 1), 400, "malformed-request"},
		{"nested", "", `{"profile":` + strings.Repeat("[", 30_000), 400, "malformed-request"},
		{"a list", "", "[" + body(good) + "]", 400, "malformed-request"},
		{"overlong", "", body(good) + strings.Repeat(" ", 64<<10), 413, "too-large"},
		{"batch of none", ":batch", `{"requests":[]}`, 400, "malformed-request"},
		{"batch of 129", ":batch", `{"requests":[` + strings.TrimSuffix(strings.Repeat(`{"idempotency_key":"k","profile":"tls-server","csr":"x"},`, 129), ",") + `]}`, 400, "malformed-request"},
		{"batch with one key twice", ":batch", `{"requests":[` + strings.Repeat(`{"idempotency_key":"k","profile":"tls-server","csr":"x"},`, 1) + `{"idempotency_key":"k","profile":"tls-server","csr":"x"}]}`, 400, "malformed-request"},
		{"overlong batch", ":batch", `{"requests":[` + strings.Repeat(" ", 512<<10) + `]}`, 413, "too-large"},
	} {
		for _, d := range doors {
			t.Run(c.name+" at the "+d.name, func(t *testing.T) {
				status, typ, raw := post(t, requester, "https://"+d.address+"/v1/certificates"+c.path, "hostile", c.body)
				typ, detail := strings.TrimPrefix(typ, "urn:trivet:problem:"), detailOf(raw)
				if c.path != "" && status == http.StatusMultiStatus { // one outcome for each
					var many struct {
						Results []struct {
							Status  int
							Problem struct{ Type, Detail string }
						}
					}
					if err := json.Unmarshal([]byte(raw), &many); err != nil || len(many.Results) != 1 {
						t.Fatalf("207 with %s: %v", raw, err)
					}
					status, typ, detail = many.Results[0].Status, strings.TrimPrefix(many.Results[0].Problem.Type, "urn:trivet:problem:"), many.Results[0].Problem.Detail
				}
				if status != c.status || !slices.Contains(strings.Split(c.types, "|"), typ) || detail == "" {
					t.Errorf("answered %d %s, want %d %s and why: %.300s", status, typ, c.status, c.types, raw)
				}
			})
		}
	}
	t.Run("requests that do not arrive", func(t *testing.T) { s.unfinished(t, doors, body(good)) })
	if now := s.intents(t); now != intents {
		t.Errorf("%d intents were recorded", now-intents)
	}
	for _, p := range s.status(t).Processes {
		if p.PID != pids[p.Name] {
			t.Errorf("%s died: pid %d became %d", p.Name, pids[p.Name], p.PID)
		}
	}
	s.fsck(t)
}

// unfinished sends requests of which the end is missing, all at once: most are answered only when the server's patience ends.
func (s *site) unfinished(t *testing.T, doors []door, body string) {
	head := func(lines ...string) string {
		return "POST /v1/certificates HTTP/1.1\r\nHost: x\r\nIdempotency-Key: unfinished\r\nContent-Type: application/json\r\n" + strings.Join(lines, "\r\n") + "\r\n"
	}
	length := fmt.Sprintf("Content-Length: %d", len(body))
	var all sync.WaitGroup
	defer all.Wait()
	for _, d := range doors {
		for _, c := range []struct {
			name, text string
			end        bool // the client says that this is all
			status     int  // 0: cut off, or 4xx
		}{
			{"half a body", head(length, "") + body[:len(body)/2], true, 400},
			{"half a chunk", head("Transfer-Encoding: chunked", "") + "ff\r\n" + body[:20], true, 400},
			{"chunks that are none", head("Transfer-Encoding: chunked", "") + "zz\r\n", false, 400},
			{"two lengths", head(length, "Content-Length: 1", "") + body, false, 400},
			{"length and chunks", head(length, "Transfer-Encoding: chunked", "") + "0\r\n\r\n", false, 400},
			{"a body that stands still", head(length, "") + body[:10], false, 408},
			{"headers that stand still", head(length)[:60], false, 0},
			{"headers without an end", head("X: " + strings.Repeat("x", 64<<10)), false, 431},
			{"no HTTP at all", "\x16\x03\x01\x00\x00", false, 400},
		} {
			conn := s.dial(t, d.address)
			all.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
				_, err := io.WriteString(conn, c.text)
				if err == nil && c.end {
					err = conn.CloseWrite()
				}
				resp, rerr := http.ReadResponse(bufio.NewReader(conn), nil)
				if errors.Is(rerr, os.ErrDeadlineExceeded) {
					t.Errorf("%s at the %s: no answer and no end", c.name, d.name)
					return
				}
				if c.status == 0 && (rerr != nil || resp.StatusCode/100 == 4) {
					return
				}
				if rerr != nil || resp.StatusCode != c.status {
					t.Errorf("%s at the %s: answered %v, want %d (%v, %v)", c.name, d.name, resp, c.status, err, rerr)
				}
			})
		}
	}
}

// dial opens a connection with the requester's identity.
func (s *site) dial(t *testing.T, address string) *tls.Conn {
	t.Helper()
	client := s.client(t, s.status(t).Credentials.Requester, 1)
	cfg := client.Transport.(*http.Transport).TLSClientConfig.Clone()
	cfg.InsecureSkipVerify = true
	conn, err := tls.Dial("tcp", address, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func detailOf(raw string) string {
	var p struct{ Detail string }
	_ = json.Unmarshal([]byte(raw), &p) // none then
	return p.Detail
}

func csrOf(t *testing.T, key any, template x509.CertificateRequest) string {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// csrFor is a CSR with another public key, and a signature that is none.
func csrFor(t *testing.T, csr string, public any) string {
	t.Helper()
	block, _ := pem.Decode([]byte(csr))
	var outer struct {
		TBS struct {
			Version    int
			Subject    asn1.RawValue
			Key        asn1.RawValue
			Attributes []asn1.RawValue `asn1:"tag:0"`
		}
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(block.Bytes, &outer); err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	outer.TBS.Key = asn1.RawValue{FullBytes: spki}
	outer.Algorithm = pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, Parameters: asn1.NullRawValue}
	der, err := asn1.Marshal(outer)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: der}))
}
