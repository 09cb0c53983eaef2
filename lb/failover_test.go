package lb_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"trivet/health"
	"trivet/identity"
	"trivet/lb"
	"trivet/problem"
)

// load sends requests at a fixed rate whatever the answers (open loop), until stop, and counts what failed.
type load struct {
	sent, failed atomic.Int64
	worst        atomic.Int64 // nanoseconds
	mu           sync.Mutex
	why          map[string]int
	wg           sync.WaitGroup
}

func (l *load) run(rate int, stop <-chan struct{}, send func(n int64) error) {
	l.why = map[string]int{}
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	for {
		select {
		case <-stop:
			l.wg.Wait()
			return
		case due := <-tick.C:
			n := l.sent.Add(1)
			l.wg.Go(func() {
				err := send(n)
				if took := int64(time.Since(due)); took > l.worst.Load() {
					l.worst.Store(took)
				}
				if err != nil {
					l.failed.Add(1)
					l.mu.Lock()
					l.why[err.Error()]++
					l.mu.Unlock()
				}
			})
		}
	}
}

func expect(status int, body string, err error) error {
	if err != nil {
		return err
	}
	if status != 200 && status != 201 {
		return fmt.Errorf("%d %s", status, body)
	}
	return nil
}

func TestANodesDeathUnderLoadIsHidden(t *testing.T) {
	for _, fault := range []string{"kill", "freeze"} {
		for _, kind := range []string{"issue", "bulk", "ocsp"} {
			t.Run(fault+" "+kind, func(t *testing.T) {
				c := newCluster(t, lb.Timing{}, "ca1", "ca2", "ocsp1", "ocsp2")
				api := c.client(c.requester)
				var done atomic.Int64
				for _, n := range c.nodes {
					n.answer(func(w http.ResponseWriter, r *http.Request) {
						time.Sleep(5 * time.Millisecond) // some requests are always under way
						done.Add(1)
						io.WriteString(w, "ok")
					})
				}
				send := func(n int64) error {
					status, _, body, err := do(api, "POST", c.apiURL("/v1/certificates"), fmt.Sprintf(`{"ca":"demo","n":%d}`, n))
					return expect(status, body, err)
				}
				victim := c.nodes["ca1"]
				if kind == "bulk" {
					send = func(n int64) error {
						status, _, body, err := do(api, "POST", c.apiURL("/v1/certificates:batch"), fmt.Sprintf(`{"requests":[],"n":%d}`, n))
						return expect(status, body, err)
					}
				}
				if kind == "ocsp" {
					victim = c.nodes["ocsp1"]
					send = func(n int64) error {
						status, _, body, err := do(http.DefaultClient, "POST", c.publicURL("/ocsp"), "request")
						return expect(status, body, err)
					}
				}
				var l load
				stop, ended := make(chan struct{}), make(chan struct{})
				go func() { defer close(ended); l.run(50, stop, send) }()
				until(t, "load runs", func() bool { return done.Load() > 50 })
				began := time.Now()
				if fault == "kill" {
					victim.kill()
				} else {
					victim.freeze()
				}
				until(t, "the victim is out", func() bool { return !c.state(victim.name).In })
				out := time.Since(began)
				at := done.Load()
				until(t, "load goes on", func() bool { return done.Load() > at+100 })
				victim.thaw()
				if fault == "freeze" {
					until(t, "the victim is back in", func() bool { return c.state(victim.name).In })
				}
				close(stop)
				<-ended
				if l.failed.Load() > 0 {
					t.Errorf("%d of %d requests failed: %v", l.failed.Load(), l.sent.Load(), l.why)
				}
				t.Logf("%d requests, worst %s, out after %s", l.sent.Load(), time.Duration(l.worst.Load()).Round(time.Millisecond), out.Round(time.Millisecond))
			})
		}
	}
}

func TestIssuingIsHedgedUnderOneKey(t *testing.T) {
	for _, given := range []string{"", "the client's own"} {
		c := newCluster(t, lb.Timing{}, "ca1", "ca2")
		release := make(chan struct{})
		var arrived atomic.Int64
		for _, n := range c.nodes {
			n.answer(func(w http.ResponseWriter, r *http.Request) {
				if arrived.Add(1) == 1 {
					<-release // the first one is slow
					return
				}
				io.WriteString(w, "second")
			})
		}
		var header []string
		if given != "" {
			header = []string{"Idempotency-Key", given}
		}
		status, h, body := c.do(c.client(c.requester), "POST", c.apiURL("/v1/certificates"), `{"csr":"x"}`, header...)
		close(release)
		if status != 200 || body != "second" {
			t.Fatalf("%d %s", status, body)
		}
		one, two := c.nodes["ca1"].requests(), c.nodes["ca2"].requests()
		if len(one) != 1 || len(two) != 1 || string(one[0].body) != string(two[0].body) {
			t.Fatalf("ca1 got %d, ca2 got %d", len(one), len(two))
		}
		key := one[0].header.Get("Idempotency-Key")
		if key != two[0].header.Get("Idempotency-Key") || given != "" && key != given || given == "" && (len(key) != len("lb-")+32 || !strings.HasPrefix(key, "lb-")) {
			t.Errorf("keys %q and %q, given %q", key, two[0].header.Get("Idempotency-Key"), given)
		}
		if given == "" && h.Get("Idempotency-Key") != key {
			t.Errorf("the client is not told the key: %q", h.Get("Idempotency-Key"))
		}
	}
}

func TestKeysAreMintedForIssuingAloneAndNeverTwice(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1")
	api := c.client(c.requester)
	for range 20 {
		c.do(api, "POST", c.apiURL("/v1/certificates"), "{}")
	}
	c.do(api, "POST", c.apiURL("/v1/certificates/x/revoke"), "{}")
	c.do(api, "GET", c.apiURL("/v1/cas"), "")
	if n := len(c.nodes["ca1"].executions); n != 20 {
		t.Errorf("%d keys, want 20", n)
	}
	if status, _, body := c.do(api, "POST", c.apiURL("/v1/certificates"), "{}", "Idempotency-Key", "a", "Idempotency-Key", "b"); status != 400 || readProblem(t, body).Field != "Idempotency-Key" {
		t.Errorf("two keys: %d %s", status, body)
	}
}

func TestAFailingNodeIsPassedOver(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ca2", "ocsp1", "ocsp2")
	api := c.client(c.requester)
	for name, f := range map[string]func(http.ResponseWriter, *http.Request){
		"503 with a problem": unavailable("database-unavailable"),
		"502":                func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(502) },
		"500":                func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"connection lost":    drop,
		"lost in mid-answer": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "half")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		},
	} {
		c.nodes["ca1"].answer(f)
		c.nodes["ocsp1"].answer(f)
		for range 10 {
			for _, r := range []struct{ method, url string }{
				{"POST", c.apiURL("/v1/certificates")}, {"POST", c.apiURL("/v1/certificates/x/revoke")}, {"GET", c.apiURL("/v1/cas")},
				{"GET", c.publicURL("/ocsp/x")}, {"POST", c.publicURL("/ocsp")}, {"GET", c.publicURL("/crl/x")}, {"GET", c.publicURL("/ca/x")},
			} {
				if status, _, body := c.do(api, r.method, r.url, "{}"); status != 200 || !strings.HasSuffix(body, "2") {
					t.Fatalf("%s: %s %s: %d %s", name, r.method, r.url, status, body)
				}
			}
		}
	}
}

func TestRequestInProgressElsewhereIsWaitedFor(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ca2")
	var n atomic.Int64
	for _, b := range c.nodes {
		b.answer(func(w http.ResponseWriter, r *http.Request) {
			if n.Add(1) <= 3 {
				problem.Write(w, problem.New(409, "request-in-progress", ""))
				return
			}
			w.WriteHeader(201)
		})
	}
	if status, _, body := c.do(c.client(c.requester), "POST", c.apiURL("/v1/certificates"), "{}"); status != 201 {
		t.Errorf("%d %s", status, body)
	}
	for _, b := range c.nodes { // any other conflict is the answer
		b.answer(func(w http.ResponseWriter, r *http.Request) {
			problem.Write(w, problem.New(409, "request-abandoned", ""))
		})
	}
	if status, _, _ := c.do(c.client(c.requester), "POST", c.apiURL("/v1/certificates"), "{}"); status != 409 {
		t.Errorf("%d", status)
	}
}

// What must not be done twice goes to another node only if it certainly did not reach the first.
func TestReleaseReachesOneNodeAtMost(t *testing.T) {
	c := newCluster(t, lb.Timing{WriteTotal: time.Second}, "ca1", "ca2")
	api := c.client(c.requester)
	url := c.apiURL("/v1/certificates/demo-g1:01/release")
	total := func() int { return len(c.nodes["ca1"].requests()) + len(c.nodes["ca2"].requests()) }
	for _, b := range c.nodes {
		b.answer(drop)
	}
	for n := range 4 {
		status, h, body := c.do(api, "POST", url, "{}")
		if status != 503 || readProblem(t, body).Type != "urn:trivet:problem:outcome-unknown" || h.Get("Retry-After") == "" || total() != n+1 {
			t.Fatalf("lost: %d %s, %d requests reached nodes, want %d", status, body, total(), n+1)
		}
		until(t, "both are in", func() bool { return c.state("ca1").In && c.state("ca2").In })
	}
	stuck := make(chan struct{})
	for _, b := range c.nodes {
		b.answer(func(http.ResponseWriter, *http.Request) { <-stuck })
	}
	before := total()
	if status, _, body := c.do(api, "POST", url, "{}"); status != 503 || readProblem(t, body).Type != "urn:trivet:problem:outcome-unknown" || total() != before+1 {
		t.Fatalf("stuck: %d %s, %d reached nodes", status, body, total()-before)
	}
	close(stuck)
	// Refused before anything was done: another node may do it.
	c.nodes["ca1"].answer(unavailable("database-unavailable"))
	c.nodes["ca2"].answer(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "done") })
	for range 10 {
		if status, _, body := c.do(api, "POST", url, "{}"); status != 200 || body != "done" {
			t.Fatalf("refused by ca1: %d %s", status, body)
		}
	}
	c.nodes["ca1"].kill()
	for range 10 {
		if status, _, body := c.do(api, "POST", url, "{}"); status != 200 || body != "done" {
			t.Fatalf("ca1 is dead: %d %s", status, body)
		}
	}
}

func TestAStallOfAllNodesIsWaitedOut(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ca2")
	var refused atomic.Int64
	for _, b := range c.nodes {
		b.lose("issue:demo", "database: no primary") // once it is known
		b.answer(func(w http.ResponseWriter, r *http.Request) {
			refused.Add(1)
			unavailable("database-unavailable")(w, r)
		})
	}
	until(t, "it is known", func() bool { return !c.lb.Report().Can("issue:demo") })
	go func() {
		time.Sleep(700 * time.Millisecond) // the length of the stall is the fault that is injected
		for _, b := range c.nodes {
			b.answer(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(201) })
			b.lose("issue:demo", "")
		}
	}()
	status, _, body := c.do(c.client(c.requester), "POST", c.apiURL("/v1/certificates"), `{"ca":"demo"}`)
	if status != 201 {
		t.Errorf("%d %s", status, body)
	}
	if refused.Load() > 0 {
		t.Error("sent to a node that said it cannot issue")
	}
}

func TestIssuingFailsClosedWithTheCause(t *testing.T) {
	c := newCluster(t, lb.Timing{Hope: 100 * time.Millisecond}, "ca1", "ca2", "ca3")
	c.nodes["ca1"].lose("issue:demo", "database: no primary component")
	c.nodes["ca2"].lose("issue:demo", "hsm: no verified copy")
	c.nodes["ca3"].kill()
	until(t, "it is known", func() bool {
		return !c.lb.Report().Can("issue:demo") && !c.state("ca3").In && !c.state("ca1").Capabilities["issue:demo"].OK && !c.state("ca2").Capabilities["issue:demo"].OK
	})
	for _, body := range []string{`{"ca":"demo"}`, `{}`} {
		var status int
		var h http.Header
		var text string
		until(t, "hope ends", func() bool {
			status, h, text = c.do(c.client(c.requester), "POST", c.apiURL("/v1/certificates"), body)
			return status == 503
		})
		p := readProblem(t, text)
		if h.Get("Retry-After") != "2" || p.Type != "urn:trivet:problem:unavailable" || h.Get("Content-Type") != "application/problem+json" ||
			!strings.Contains(p.Cause, "ca1: issue:demo: database: no primary component") || !strings.Contains(p.Cause, "ca2: issue:demo: hsm: no verified copy") || !strings.Contains(p.Cause, "ca3: no health report: connection refused") {
			t.Errorf("%v %s", h, text)
		}
	}
	for name, n := range c.nodes {
		if len(n.requests()) > 0 {
			t.Errorf("%s got a request it said it cannot serve", name)
		}
	}
	if status, _, _ := c.do(c.client(c.requester), "GET", c.apiURL("/v1/cas"), ""); status != 200 {
		t.Errorf("reading: %d", status)
	}
}

func TestReadsFailOpen(t *testing.T) {
	c := newCluster(t, lb.Timing{Hope: 300 * time.Millisecond}, "ocsp1", "ocsp2")
	for _, n := range c.nodes {
		for _, cap := range []string{"ocsp:demo-g1", "crl:demo-g1", "aia"} {
			n.lose(cap, "lease ran out")
		}
	}
	until(t, "it is known", func() bool { return !c.lb.Report().Can("*") })
	for _, path := range []string{"/ocsp/x", "/crl/x", "/ca/x"} {
		if status, _, body := c.do(http.DefaultClient, "GET", c.publicURL(path), ""); status != 200 {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	c.nodes["ocsp1"].kill()
	c.nodes["ocsp2"].kill()
	status, h, body := c.do(http.DefaultClient, "GET", c.publicURL("/ocsp/x"), "")
	if status != 503 || h.Get("Retry-After") == "" || readProblem(t, body).Cause == "" {
		t.Errorf("all dead: %d %v %s", status, h, body)
	}
}

func TestTryLaterIsTakenElsewhereFirst(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ocsp1", "ocsp2")
	reply := func(b string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/ocsp-response")
			io.WriteString(w, b)
		}
	}
	tryLater, unauthorized := "\x30\x03\x0a\x01\x03", "\x30\x03\x0a\x01\x06"
	c.nodes["ocsp1"].answer(reply(tryLater))
	for _, want := range []string{"a real answer", unauthorized} {
		c.nodes["ocsp2"].answer(reply(want))
		for range 20 {
			if status, _, body := c.do(http.DefaultClient, "GET", c.publicURL("/ocsp/x"), ""); status != 200 || body != want {
				t.Fatalf("%d %q, want %q", status, body, want)
			}
		}
	}
	c.nodes["ocsp2"].answer(reply(tryLater))
	if status, _, body := c.do(http.DefaultClient, "GET", c.publicURL("/ocsp/x"), ""); status != 200 || body != tryLater {
		t.Errorf("both: %d %q", status, body)
	}
}

func TestOneSlowNodeDoesNotDoubleTheLoad(t *testing.T) {
	c := newCluster(t, lb.Timing{ReadHedge: time.Millisecond}, "ocsp1", "ocsp2")
	for _, n := range c.nodes { // slow, all of them: nobody's fault
		n.answer(func(w http.ResponseWriter, r *http.Request) { time.Sleep(30 * time.Millisecond) })
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for range 20 {
				do(http.DefaultClient, "GET", c.publicURL("/ocsp/x"), "")
			}
		})
	}
	wg.Wait()
	if n := len(c.nodes["ocsp1"].requests()) + len(c.nodes["ocsp2"].requests()); n > 700 { // 400 of clients, 80 by 20 %, some by 10/s and for slow ones
		t.Errorf("400 requests became %d", n)
	}
}

func TestMostNodesSilentIsNotTheirFault(t *testing.T) {
	c := newCluster(t, lb.Timing{Hope: time.Minute}, "ca1", "ca2")
	c.nodes["ca1"].freeze()
	until(t, "one is out", func() bool { return !c.state("ca1").In })
	c.nodes["ca2"].freeze()
	until(t, "both are silent, so both stay", func() bool { return c.state("ca1").In && c.state("ca2").In && c.state("ca2").Cause != "" })
	c.nodes["ca1"].thaw()
	c.nodes["ca2"].thaw()
	until(t, "they are well", func() bool { return c.state("ca1").Cause == "" && c.state("ca2").Cause == "" })
}

func TestDrainingNodeGetsNothingNew(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ca2")
	r := *c.nodes["ca1"].rep.Load()
	r.State = health.Draining
	c.nodes["ca1"].report(r)
	until(t, "it is known", func() bool { return c.state("ca1").State == health.Draining })
	for range 20 {
		if _, _, body := c.do(c.client(c.requester), "GET", c.apiURL("/v1/cas"), ""); body != "ca2" {
			t.Fatal(body)
		}
	}
}

func TestNodeOfAnotherRoleGetsNothing(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1")
	wrong := c.add("ocsp9")
	wrong.Role = identity.RoleCA // configured as ca, its certificate says ocsp
	nodes := []lb.Node{wrong}
	for _, s := range c.lb.State() {
		nodes = append(nodes, s.Node)
	}
	if err := c.lb.SetNodes(nodes); err != nil {
		t.Fatal(err)
	}
	if s := c.state("ocsp9"); s.In || !strings.Contains(s.Cause, "TLS") {
		t.Errorf("%+v", s)
	}
	for range 10 {
		if _, _, body := c.do(c.client(c.requester), "POST", c.apiURL("/v1/certificates"), "{}"); body != "ca1" {
			t.Fatal(body)
		}
	}
}

func TestNodeListIsReplacedWholeOrNotAtAll(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1")
	one := c.lb.State()[0].Node
	two := c.add("ca2")
	for name, bad := range map[string][]lb.Node{
		"empty": nil, "twice": {one, one}, "same address": {one, {Name: "x", Role: "ca", Address: one.Address}}, "role": {{Name: "x", Role: "db", Address: "127.94.3.1:1"}},
		"address": {{Name: "x", Role: "ca", Address: "127.94.3.1"}}, "name": {{Name: "X y", Role: "ca", Address: "127.94.3.1:1"}},
	} {
		if err := c.lb.SetNodes(bad); err == nil || !strings.Contains(err.Error(), "the old one stays in use") {
			t.Errorf("%s: %v", name, err)
		}
	}
	api := c.client(c.requester)
	stop := make(chan struct{})
	ended := make(chan struct{})
	var l load
	go func() {
		defer close(ended)
		l.run(50, stop, func(int64) error {
			status, _, body, err := do(api, "POST", c.apiURL("/v1/certificates"), "{}")
			return expect(status, body, err)
		})
	}()
	for range 10 { // under load
		for _, list := range [][]lb.Node{{one, two}, {one}} {
			if err := c.lb.SetNodes(list); err != nil {
				t.Fatal(err)
			}
			if s := c.lb.State(); len(s) != len(list) {
				t.Fatalf("%+v", s)
			}
			until(t, "all are in", func() bool { return c.state(list[0].Name).In && c.state(list[len(list)-1].Name).In })
		}
	}
	close(stop)
	<-ended
	if l.failed.Load() > 0 {
		t.Errorf("%d of %d failed: %v", l.failed.Load(), l.sent.Load(), l.why)
	}
}

func TestStatusListener(t *testing.T) {
	c := newCluster(t, lb.Timing{}, "ca1", "ocsp1")
	c.do(c.client(c.requester), "POST", c.apiURL("/v1/certificates"), "{}")
	client := c.client(c.requester)
	get := func(path string) (int, string) {
		status, _, body := c.do(client, "GET", "https://"+c.status+path, "")
		return status, body
	}
	if status, body := get("/healthz"); status != 200 || !strings.Contains(body, `"issue:demo":{"ok":true}`) || strings.Contains(body, "admin") {
		t.Errorf("healthz: %d %s", status, body)
	}
	if status, body := get("/lb/state"); status != 200 || !strings.Contains(body, `"name":"ca1","role":"ca"`) {
		t.Errorf("state: %d %s", status, body)
	}
	until(t, "it is counted", func() bool {
		_, body := get("/metrics")
		return strings.Contains(body, `trivet_lb_requests_total{class="issue",status="200"} 1`) && strings.Contains(body, `trivet_lb_node_up{node="ca1"} 1`) &&
			strings.Contains(body, `trivet_lb_node_capability{capability="aia",node="ocsp1"} 1`)
	})
	if n, err := testutil.GatherAndCount(c.registry); err != nil || n == 0 {
		t.Error(n, err)
	}
	c.lb.Drain()
	if status, _ := get("/readyz"); status != 503 {
		t.Errorf("draining readyz: %d", status)
	}
	if status, _, _ := c.do(client, "GET", c.apiURL("/v1/cas"), ""); status != 200 {
		t.Errorf("draining, still served: %d", status)
	}
	if _, _, _, err := do(c.client(nil), "GET", "https://"+c.status+"/metrics", ""); err == nil {
		t.Error("metrics without a certificate")
	}
}
