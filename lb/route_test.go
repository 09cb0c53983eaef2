package lb_test

import (
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/lb"
)

func TestPathsAreForwardedOctetForOctet(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ocsp1")
	for _, uri := range []string{
		"/ocsp", "/ocsp/", "/ocsp/demo", "/ocsp/demo/MEow//SDBG+MEQ/w=", "/ocsp//MEow", "/ocsp/MEow%2FSDBG%2BMEQ%3D", "/ocsp/a%2f..%2fb", "/ocsp/../ca/x", "/ocsp/./x",
		"/ocsp/%00", "/ocsp/a?b=c&d=%20", "/ocsp/a?", "/ocsp/a?x?y//z", "/ocsp/a;b", "/ocsp/%zz", "/ocsp/" + strings.Repeat("A", 4000), "/crl/demo-g1.crl", "/ca/demo-g1.crt", "/ocsp/a|b\"<>^`{}",
	} {
		resp := raw(t, c.public, "GET "+uri+" HTTP/1.1\r\nHost: pki.example\r\nConnection: close\r\n\r\n")
		if strings.Contains(uri, "%zz") { // net/http refuses what is no URI at all
			if resp == nil || resp.StatusCode != 400 {
				t.Errorf("%s: %v", uri, resp)
			}
			continue
		}
		if resp == nil || resp.StatusCode != 200 {
			t.Errorf("%.60s: %v", uri, resp)
			continue
		}
		got := c.nodes["ocsp1"].requests()
		last := got[len(got)-1]
		if last.uri != uri || last.host != "pki.example" {
			t.Errorf("sent %q, the node got %q for host %q", uri, last.uri, last.host)
		}
	}
	if resp := raw(t, c.public, "GET http://pki.example/ocsp//x%2F HTTP/1.1\r\nHost: pki.example\r\n\r\n"); resp == nil || resp.StatusCode != 200 {
		t.Fatal("absolute form", resp)
	}
	got := c.nodes["ocsp1"].requests()
	if last := got[len(got)-1]; last.uri != "/ocsp//x%2F" {
		t.Errorf("absolute form: %q", last.uri)
	}
}

func TestNothingElseIsRouted(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ocsp1")
	api, public := c.client(c.requester), &http.Client{}
	for _, r := range []struct{ method, path string }{
		{"GET", "/"}, {"GET", "/v1"}, {"GET", "/v1/"}, {"GET", "/v1x"}, {"GET", "/healthz"}, {"GET", "/metrics"}, {"GET", "/ocsp"}, {"GET", "/crl/x"}, {"GET", "/ca/x"},
		{"POST", "/v1/cas"}, {"POST", "/v1/certificates/"}, {"POST", "/v1/certificates//revoke"}, {"POST", "/v1/certificates/x/revoke/"}, {"POST", "/v1/certificates/x/destroy"},
		{"POST", "/v1/cas/demo/crl"}, {"POST", "/V1/certificates"}, {"POST", "/v1//certificates"}, {"POST", "/v1/certificates%2f"}, {"POST", "/v1/certificates:"}, {"POST", "/v1/certificates:batch/x"}, {"POST", "/v1/certificates%3abatch"}, {"PUT", "/v1/certificates"}, {"DELETE", "/v1/certificates/x"},
		{"OPTIONS", "/v1/certificates"}, {"TRACE", "/v1/certificates"}, {"GET", "//v1/certificates"},
	} {
		status, h, body := c.do(api, r.method, c.apiURL(r.path), "")
		if status != 404 || h.Get("Content-Type") != "application/problem+json" || readProblem(t, body).Type != "urn:trivet:problem:not-found" || readProblem(t, body).RequestID == "" {
			t.Errorf("api %s %s: %d %s", r.method, r.path, status, body)
		}
	}
	for _, r := range []struct{ method, path string }{
		{"GET", "/v1/certificates"}, {"POST", "/v1/certificates"}, {"GET", "/ocspx"}, {"GET", "/internal/applied"}, {"GET", "/healthz"}, {"GET", "/crl"}, {"POST", "/crl/x"}, {"PUT", "/ocsp"}, {"GET", "//ocsp"},
	} {
		if status, _, body := c.do(public, r.method, c.publicURL(r.path), ""); status != 404 {
			t.Errorf("public %s %s: %d %s", r.method, r.path, status, body)
		}
	}
	if resp := raw(t, c.public, "CONNECT ocsp1:443 HTTP/1.1\r\nHost: ocsp1:443\r\n\r\n"); resp == nil || resp.StatusCode != 404 {
		t.Error("CONNECT:", resp)
	}
	for name, n := range c.nodes {
		if got := n.requests(); len(got) > 0 {
			t.Errorf("%s got %v", name, got)
		}
	}
}

func TestRequestGoesWhereItsCapabilityIs(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ca2", "ca3")
	c.nodes["ca1"].lose("issue:demo", "hsm is gone")
	c.nodes["ca2"].lose("revoke", "no responder")
	c.nodes["ca3"].lose("issue:demo", "hsm is gone")
	c.nodes["ca3"].lose("issue:other", "")
	c.nodes["ca3"].lose("read", "lagging")
	until(t, "the reports are taken in", func() bool {
		return !c.state("ca1").Capabilities["issue:demo"].OK && !c.state("ca2").Capabilities["revoke"].OK && c.state("ca3").Capabilities["issue:other"].OK && !c.state("ca3").Capabilities["read"].OK
	})
	api := c.client(c.requester)
	for _, r := range []struct{ method, path, body, want string }{
		{"POST", "/v1/certificates", `{"ca":"demo"}`, "ca2"},
		{"POST", "/v1/certificates", `{"ca":"other"}`, "ca3"},
		{"POST", "/v1/certificates", `{}`, "ca2 ca3"},
		{"POST", "/v1/certificates", `{"ca":"nobody-knows"}`, "ca2 ca3"},
		{"POST", "/v1/certificates", `not json`, "ca2 ca3"},
		{"POST", "/v1/certificates/demo-g1:01/revoke", `{}`, "ca1 ca3"},
		{"POST", "/v1/certificates/demo-g1:01/release", `{}`, "ca1 ca3"},
		{"GET", "/v1/certificates/demo-g1:01", "", "ca1 ca2"},
		{"GET", "/v1/cas", "", "ca1 ca2"},
	} {
		for range 8 {
			status, _, body := c.do(api, r.method, c.apiURL(r.path), r.body)
			if status != 200 || !strings.Contains(r.want, body) {
				t.Errorf("%s %s %s: %d by %s, want %s", r.method, r.path, r.body, status, body, r.want)
			}
		}
	}
}

func TestLoadIsSpread(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ocsp1", "ocsp2")
	for range 60 {
		c.do(http.DefaultClient, "GET", c.publicURL("/ocsp/x"), "")
	}
	for name, n := range c.nodes {
		if got := len(n.requests()); got < 10 {
			t.Errorf("%s got %d of 60", name, got)
		}
	}
}

func TestConnectionsToNodesAreKept(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1")
	c.nodes["ca1"].answer(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/empty":
			w.WriteHeader(204)
		case "/v1/chunked":
			io.WriteString(w, strings.Repeat("x", 1000))
			w.(http.Flusher).Flush()
			io.WriteString(w, "y")
		default:
			io.WriteString(w, strings.Repeat("x", 3000))
		}
	})
	api := c.client(c.requester)
	for n := range 60 {
		path := []string{"/v1/plain", "/v1/empty", "/v1/chunked"}[n%3]
		if status, _, _ := c.do(api, []string{"GET", "HEAD"}[n/3%2], c.apiURL(path), ""); status/100 != 2 {
			t.Fatal(status)
		}
		c.do(api, "POST", c.apiURL("/v1/certificates"), `{}`)
	}
	if n := c.nodes["ca1"].conns.Load(); n > 6 { // one for probes, one for requests; a few if one was still on its way back to the pool
		t.Errorf("%d connections for 120 requests one after another", n)
	}
}

func TestAnswersPassAsTheyAre(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ocsp1")
	api := c.client(c.requester)
	for _, status := range []int{200, 201, 202, 301, 400, 401, 403, 404, 409, 413, 422, 429} {
		c.nodes["ca1"].answer(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "/v1/x")
			w.Header()["Multi"] = []string{"a", "b"}
			w.Header().Set("Connection", "X-Hop")
			w.Header().Set("X-Hop", "hop")
			w.Header().Set("Keep-Alive", "timeout=1")
			w.Header().Set("X-Request-Id", "the node's own")
			w.WriteHeader(status)
			io.WriteString(w, "body")
		})
		api.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		got, h, body := c.do(api, "POST", c.apiURL("/v1/certificates"), "{}", "X-Request-Id", "mine")
		if got != status || body != "body" || h.Get("Location") != "/v1/x" || fmt.Sprint(h["Multi"]) != "[a b]" || h.Get("X-Hop") != "" || h.Get("Keep-Alive") != "" || h.Get("X-Request-Id") != "mine" {
			t.Errorf("%d: %d %v %q", status, got, h, body)
		}
	}
	if n := len(c.nodes["ca1"].requests()); n != 12 {
		t.Errorf("%d requests reached the node, want 12", n)
	}
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB: not held
	c.nodes["ocsp1"].answer(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"e"`)
		if r.Header.Get("If-None-Match") == `"e"` {
			w.WriteHeader(304)
			return
		}
		if r.URL.RawQuery == "" {
			w.Header().Set("Content-Length", fmt.Sprint(len(big)))
		}
		io.WriteString(w, big)
	})
	for _, uri := range []string{"/crl/x.crl", "/crl/x.crl?chunked"} {
		if status, _, body := c.do(http.DefaultClient, "GET", c.publicURL(uri), ""); status != 200 || body != big {
			t.Errorf("%s: %d, %d octets", uri, status, len(body))
		}
	}
	if status, h, body := c.do(http.DefaultClient, "HEAD", c.publicURL("/crl/x.crl"), ""); status != 200 || body != "" || h.Get("Content-Length") != fmt.Sprint(len(big)) {
		t.Errorf("HEAD: %d %v", status, h)
	}
	if status, h, _ := c.do(http.DefaultClient, "GET", c.publicURL("/crl/x.crl"), "", "If-None-Match", `"e"`); status != 304 || h.Get("ETag") != `"e"` {
		t.Errorf("304: %d %v", status, h)
	}
}

// Requests to issue that come together go to one node; requests to read are spread.
func TestRequestsToIssueThatComeTogetherGoToOneNode(t *testing.T) {
	c := newCluster(t, lb.Timing{ReadHedge: time.Minute, WriteHedge: time.Minute, ReadTotal: 2 * time.Minute, WriteTotal: 2 * time.Minute}, "ca1", "ca2")
	const clients = 12
	together := func(method, path, body string) (most int) {
		before := map[string]int{}
		for name, n := range c.nodes {
			before[name] = len(n.requests())
		}
		here, open := make(chan struct{}, clients), make(chan struct{})
		for _, n := range c.nodes {
			n.answer(func(w http.ResponseWriter, _ *http.Request) {
				here <- struct{}{}
				<-open
				w.WriteHeader(http.StatusOK)
			})
		}
		client := c.client(c.requester)
		var wg sync.WaitGroup
		for range clients { // each begins when the last has reached a node
			wg.Go(func() {
				if status, _, _, err := do(client, method, c.apiURL(path), body, "Idempotency-Key", rand.Text()); err != nil || status != http.StatusOK {
					t.Errorf("%s %s: %d, %v", method, path, status, err)
				}
			})
			<-here
		}
		close(open)
		wg.Wait()
		for name, n := range c.nodes {
			most = max(most, len(n.requests())-before[name])
		}
		return most
	}
	if most := together(http.MethodPost, "/v1/certificates", "{}"); most != clients {
		t.Errorf("of %d requests to issue, at most %d went to one node", clients, most)
	}
	if most := together(http.MethodGet, "/v1/certificates/x", ""); most > clients*2/3 {
		t.Errorf("of %d requests to read, %d went to one node", clients, most)
	}
}
