package lb_test

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/identity"
	"trivet/lb"
)

// spoofs are lines by which a client may try to be somebody else.
var spoofs = []string{
	"Client-Cert: :AAAA:", "client-cert: :AAAA:", "CLIENT-CERT: :AAAA:", "Client-Cert:\t:AAAA:", "Client-Cert-Chain: :AAAA:", "Client_Cert: :AAAA:", "Client_Cert_Chain: :AAAA:",
	"X-SSL-Client-Cert: x", "X-SSL-CERT: x", "X_SSL_Client_Cert: x", "SSL-Client-Cert: x", "SSL_CLIENT_CERT: x", "X-Client-Cert: x", "X-Forwarded-Client-Cert: Hash=x",
	"X_Forwarded_Client_Cert: x", "X-Forwarded-Tls-Client-Cert: x", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: admin", "X-Forwarded-Proto: https", "X-Real-IP: 127.0.0.1",
	"Forwarded: for=127.0.0.1;by=lb1", "Via: 1.1 lb1", "X-Original-URL: /admin", "X-Rewrite-URL: /admin", "X-HTTP-Method-Override: DELETE", "Proxy-Authorization: Basic eA==", "Proxy: http://x",
	"Connection: Client-Cert", "Connection: close, client-cert, X-Request-Id, Content-Type", "Connection: Client-Cert\r\nConnection: Client-Cert-Chain", "Te: trailers", "Trailer: Client-Cert",
	"Keep-Alive: 300", "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__", "Upgrade: websocket\r\nConnection: Upgrade", "Expect: 100-continue",
	"Connection: Idempotency-Key\r\nIdempotency-Key: k",
}

func TestNoSpellingOfAnIdentityHeaderGetsThrough(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ocsp1")
	want := ":" + base64.StdEncoding.EncodeToString(c.requester.Certificate().Certificate[0]) + ":"
	may := []string{"Accept", "User-Agent", "Content-Type", "Content-Length", "Idempotency-Key", "X-Request-Id", "Client-Cert"}
	check := func(what string, s seen, cert string) {
		t.Helper()
		for name := range s.header {
			if !slices.Contains(may, name) {
				t.Errorf("%s: the node got %s: %q", what, name, s.header[name])
			}
		}
		if got := s.header["Client-Cert"]; cert == "" && got != nil || cert != "" && (len(got) != 1 || got[0] != cert) {
			t.Errorf("%s: Client-Cert %.60q", what, got)
		}
		if len(s.header["X-Request-Id"]) != 1 || s.header.Get("X-Request-Id") == "" {
			t.Errorf("%s: no request id", what)
		}
	}
	for _, line := range spoofs {
		for _, method := range []string{"GET /v1/cas", "POST /v1/certificates"} {
			text := method + " HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n" + line + "\r\n"
			if strings.HasPrefix(method, "POST") {
				text += "Content-Length: 2\r\n\r\n{}"
			} else {
				text += "\r\n"
			}
			resp := rawTLS(t, c, c.requester, text)
			if resp == nil {
				t.Fatalf("%q: no answer", line)
			}
			if resp.StatusCode == 100 {
				continue // Expect: the real answer follows it
			}
			if resp.StatusCode != 200 {
				t.Errorf("%q: %d", line, resp.StatusCode)
				continue
			}
			got := c.nodes["ca1"].requests()
			check(line, got[len(got)-1], want)
		}
		if resp := raw(t, c.public, "GET /ocsp/x HTTP/1.1\r\nHost: x\r\n"+line+"\r\n\r\n"); resp == nil || resp.StatusCode != 200 {
			t.Errorf("public %q: %v", line, resp)
			continue
		}
		got := c.nodes["ocsp1"].requests()
		check("public "+line, got[len(got)-1], "")
	}
	// Folded, spaced and malformed field lines are no headers at all.
	for _, line := range []string{"Accept: x\r\n Client-Cert: :AAAA:", "Client-Cert : :AAAA:", " Client-Cert: :AAAA:", "Client\x00-Cert: x", "Client-Cert\r: x"} {
		resp := rawTLS(t, c, c.requester, "GET /v1/cas HTTP/1.1\r\nHost: x\r\n"+line+"\r\n\r\n")
		if resp == nil || resp.StatusCode == 400 {
			continue
		}
		got := c.nodes["ca1"].requests()
		if cert := got[len(got)-1].header["Client-Cert"]; len(cert) != 1 || cert[0] != want {
			t.Errorf("%q: Client-Cert %q", line, cert)
		}
	}
}

func TestClientWithoutACertificateIsConveyedAsNobody(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1")
	if status, _, _ := c.do(c.client(nil), "GET", c.apiURL("/v1/cas"), "", "Client-Cert", ":AAAA:"); status != 200 {
		t.Fatal(status)
	}
	if got := c.nodes["ca1"].requests()[0].header["Client-Cert"]; got != nil {
		t.Errorf("Client-Cert %q", got)
	}
}

// Two clients on kept connections, through the same connection to the node: nobody becomes the other.
func TestIdentitiesDoNotMix(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1")
	c.nodes["ca1"].answer(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header.Get("Client-Cert")) })
	done := make(chan bool)
	for _, name := range []string{"anna", "bert"} {
		id := c.identity(identity.RoleRequester, name)
		want := ":" + base64.StdEncoding.EncodeToString(id.Certificate().Certificate[0]) + ":"
		client := c.client(id)
		go func() {
			defer func() { done <- true }()
			for range 100 {
				if _, _, got, err := do(client, "GET", c.apiURL("/v1/cas"), ""); err != nil || got != want {
					t.Errorf("%s: %v, other identity: %v", name, err, got != want)
					return
				}
			}
		}()
	}
	<-done
	<-done
}

func TestRequestIDIsPassedOrMinted(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1")
	api := c.client(c.requester)
	for _, given := range []string{"abc-DEF_1.2", "", "has space", strings.Repeat("a", 65), "a\"b"} {
		_, h, _ := c.do(api, "GET", c.apiURL("/v1/cas"), "", "X-Request-Id", given)
		got := c.nodes["ca1"].requests()
		node := got[len(got)-1].header.Get("X-Request-Id")
		if h.Get("X-Request-Id") != node || node == "" || (node == given) != (given == "abc-DEF_1.2") {
			t.Errorf("given %q: client told %q, node told %q", given, h.Get("X-Request-Id"), node)
		}
	}
}

func TestMalformedFramingIsRefused(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ocsp1")
	for name, head := range map[string]string{
		"two lengths": "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", "list of lengths": "Content-Length: 3, 4\r\n\r\nabcd", "length and chunks of another kind": "Transfer-Encoding: gzip, chunked\r\nContent-Length: 3\r\n\r\nabc",
		"length of 2^64": "Content-Length: 18446744073709551616\r\n\r\nGET /ocsp/smuggled HTTP/1.1\r\nHost: x\r\n\r\n", "negative": "Content-Length: -1\r\n\r\n", "plus": "Content-Length: +3\r\n\r\nabc", "hex": "Content-Length: 0x3\r\n\r\nabc",
		"unknown coding": "Transfer-Encoding: xchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "two codings": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
		"two hosts": "Host: y\r\n\r\n", "no colon": "Junk\r\n\r\n", "bad chunk": "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
	} {
		resp := raw(t, c.public, "POST /ocsp HTTP/1.1\r\nHost: x\r\n"+head)
		if resp != nil && resp.StatusCode != 400 && resp.StatusCode != 501 {
			t.Errorf("%s: %d", name, resp.StatusCode)
		}
	}
	if got := c.nodes["ocsp1"].requests(); len(got) != 0 {
		t.Errorf("the node got %+v", got)
	}
	// Both lengths given: the chunks count (RFC 9112 §6.3), and the node is told one length, the true one.
	resp := raw(t, c.public, "POST /ocsp HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
	if resp == nil || resp.StatusCode != 200 {
		t.Fatalf("both lengths: %v", resp)
	}
	got := c.nodes["ocsp1"].requests()
	if len(got) != 1 || string(got[0].body) != "abc" || fmt.Sprint(got[0].header["Content-Length"]) != "[3]" || got[0].header["Transfer-Encoding"] != nil {
		t.Errorf("the node got %+v", got)
	}
}

func TestSizesAreBounded(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ocsp1")
	api := c.client(c.requester)
	for _, r := range []struct {
		name, url string
		client    *http.Client
		size      int
		want      int
	}{
		{"issue at the bound", c.apiURL("/v1/certificates"), api, 64 << 10, 200},
		{"issue beyond", c.apiURL("/v1/certificates"), api, 64<<10 + 1, 413},
		{"revoke beyond", c.apiURL("/v1/certificates/x/revoke"), api, 64<<10 + 1, 413},
		{"ocsp at the bound", c.publicURL("/ocsp"), http.DefaultClient, 10 << 10, 200},
		{"ocsp beyond", c.publicURL("/ocsp"), http.DefaultClient, 10<<10 + 1, 413},
	} {
		status, _, body := c.do(r.client, "POST", r.url, strings.Repeat("x", r.size))
		if status != r.want || status == 413 && readProblem(t, body).Type != "urn:trivet:problem:too-large" {
			t.Errorf("%s: %d %.100s", r.name, status, body)
		}
	}
	chunks := "POST /ocsp HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", 11<<10, strings.Repeat("x", 11<<10))
	if resp := raw(t, c.public, chunks); resp == nil || resp.StatusCode != 413 {
		t.Errorf("chunked: %v", resp)
	}
	for size, want := range map[int]int{7 << 10: 200, 9 << 10: 431} {
		if resp := raw(t, c.public, "GET /ocsp/x HTTP/1.1\r\nHost: x\r\nAccept: "+strings.Repeat("a", size)+"\r\n\r\n"); resp == nil || resp.StatusCode != want {
			t.Errorf("headers of %d: %v, want %d", size, resp, want)
		}
	}
	if got := len(c.nodes["ca1"].requests()) + len(c.nodes["ocsp1"].requests()); got != 3 {
		t.Errorf("%d requests reached the nodes, want 3", got)
	}
}

func TestSlowClientsAreCutOff(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ocsp1")
	s := lb.NewServer(c.lb.Public(), slog.New(slog.DiscardHandler))
	if s.ReadHeaderTimeout != 5*time.Second || s.ReadTimeout != 10*time.Second || s.WriteTimeout == 0 || s.IdleTimeout == 0 {
		t.Errorf("%+v", s)
	}
	s.ReadHeaderTimeout, s.ReadTimeout = 50*time.Millisecond, 100*time.Millisecond // not to wait for so long here
	l, err := net.Listen("tcp", "127.94.5.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	defer s.Close()
	// Neither ever ends its request; after the headers there is somebody to say so.
	if resp := raw(t, l.Addr().String(), "GET /ocsp/x HTTP/1.1\r\nHost: x\r\nA"); resp != nil && resp.StatusCode/100 != 4 {
		t.Errorf("headers: %d", resp.StatusCode)
	}
	if resp := raw(t, l.Addr().String(), "POST /ocsp HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc"); resp == nil || resp.StatusCode != http.StatusRequestTimeout {
		t.Errorf("body: %v, want 408", resp)
	}
	if got := c.nodes["ocsp1"].requests(); len(got) > 0 {
		t.Errorf("the node got %+v", got)
	}
}
