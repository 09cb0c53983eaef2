package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/ca"
	"trivet/db/dbtest"
)

func TestACertificateIsIssuedAndReplayed(t *testing.T) {
	p := newPKI(t)
	a, b := p.start(t, "ca1", nil), p.start(t, "ca2", nil)
	r := ask(t, "k1", "www.example.org", "example.org")
	r.Reference = "CHG-1"
	first := a.mustIssue(t, r)
	if first.Replayed || first.Issuer != "demo-g1" || len(first.Serial) != 20 || first.Profile != "tls-server" || first.Requester != alice || first.Reference != "CHG-1" || first.Seq == 0 {
		t.Errorf("issued: %+v", first)
	}
	cert, err := x509.ParseCertificate(first.DER)
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	root, _ := a.engine.Authorities().Issuer("root-g1")
	demo, _ := a.engine.Authorities().Issuer("demo-g1")
	roots.AddCert(root.Certificate)
	between.AddCert(demo.Certificate)
	if _, err := cert.Verify(x509.VerifyOptions{DNSName: "example.org", Roots: roots, Intermediates: between}); err != nil {
		t.Errorf("the certificate does not verify: %v", err)
	}
	for name, n := range map[string]*node{"the same node": a, "another node": b} {
		again := n.mustIssue(t, r)
		if !again.Replayed || string(again.DER) != string(first.DER) || again.ID() != first.ID() || again.Reference != "CHG-1" {
			t.Errorf("a repeat to %s: %+v", name, again)
		}
	}
	if got := p.keys.times(sha256Sum(cert.RawTBSCertificate)); got != 1 {
		t.Errorf("signed %d times", got)
	}
	p.check(t)
}

func TestAKeyUsedForAnotherRequestIsRefused(t *testing.T) {
	p := newPKI(t)
	a, b := p.start(t, "ca1", nil), p.start(t, "ca2", nil)
	r := ask(t, "k1")
	a.mustIssue(t, r)
	other := ask(t, "k1", "other.example.org")
	for _, n := range []*node{a, b} {
		if _, err := n.issue(t, other); ca.NameOf(err) != ca.IdempotencyMismatch {
			t.Errorf("got %v, want %s", err, ca.IdempotencyMismatch)
		}
	}
	bob := other
	bob.Principal = "trivet://test/requester/bob"
	if again := b.mustIssue(t, bob); again.Replayed {
		t.Error("another identity's key is another key")
	}
	p.check(t)
}

func TestWhatIsRefusedIsNotRecorded(t *testing.T) {
	p := newPKI(t)
	a := p.start(t, "ca1", nil)
	signed := p.keys.total()
	r := ask(t, "k1", "*.example.org")
	if _, err := a.issue(t, r); ca.NameOf(err) != ca.NameNotPermitted {
		t.Errorf("got %v", err)
	}
	for field, change := range map[string]func(*ca.Request){
		"profile": func(r *ca.Request) { r.Profile = "no-such" },
		"ca":      func(r *ca.Request) { r.CA = "root" },
	} {
		r := ask(t, "k1")
		change(&r)
		var e *ca.Error
		if _, err := a.issue(t, r); !errors.As(err, &e) || e.Field != field {
			t.Errorf("%s: got %v", field, err)
		}
	}
	own := ask(t, "k1")
	own.CSR = makeCSRFor(t, p.keys.byID["demo-key"], "", []string{"www.example.org"})
	if _, err := a.issue(t, own); ca.NameOf(err) != ca.KeyNotPermitted {
		t.Errorf("the CA's own key: got %v", err)
	}
	if p.keys.total() != signed {
		t.Error("something was signed")
	}
	// The key is free: nothing was recorded under it.
	if issued := a.mustIssue(t, ask(t, "k1")); issued.Replayed {
		t.Error("a refused request left a row behind")
	}
}

func TestConcurrentRepeatsOnOneNodeSignOnce(t *testing.T) {
	p := newPKI(t)
	a := p.start(t, "ca1", nil)
	r := ask(t, "k1")
	var wg sync.WaitGroup
	ders := make([]string, 16)
	before := p.keys.total()
	for i := range ders {
		wg.Go(func() {
			issued, err := a.issue(t, r)
			if err != nil {
				t.Error(err)
				return
			}
			ders[i] = string(issued.DER)
		})
	}
	wg.Wait()
	for _, der := range ders {
		if der != ders[0] {
			t.Error("two certificates for one request")
		}
	}
	if got := p.keys.total() - before; got != 1 {
		t.Errorf("%d signatures", got)
	}
}

func TestOneKeyHammeredOnTwoNodesGivesOneCertificate(t *testing.T) {
	p := newPKI(t)
	nodes := []*node{p.start(t, "ca1", nil), p.start(t, "ca2", nil)}
	contested := make([]ca.Request, 4)
	for i := range contested {
		contested[i] = ask(t, fmt.Sprintf("contested-%d", i))
	}
	var mu sync.Mutex
	got := make(map[string]string)
	var wg sync.WaitGroup
	for i := range 48 {
		// Every third request is a neighbour with a key of its own.
		r, key := contested[i%len(contested)], fmt.Sprintf("contested-%d", i%len(contested))
		if i%3 == 0 {
			key = fmt.Sprintf("own-%d", i)
			r = ask(t, key)
		}
		wg.Go(func() {
			issued, err := nodes[i%2].issue(t, r)
			if err != nil {
				t.Errorf("%s: %v", key, err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if old, ok := got[key]; ok && old != string(issued.DER) {
				t.Errorf("%s: two certificates were released", key)
			}
			got[key] = string(issued.DER)
		})
	}
	wg.Wait()
	p.check(t)
}

// hold keeps an engine's only batch slot busy until release is called, so that what is asked meanwhile lands in one batch.
func hold(t *testing.T, p *pki, n *node) (release func()) {
	t.Helper()
	reached, free := make(chan struct{}), make(chan struct{})
	p.keys.set(func(context.Context, [][]byte) error {
		p.keys.set(nil, nil)
		close(reached)
		<-free
		return nil
	}, nil)
	go n.engine.Issue(context.Background(), ask(t, "holder"))
	<-reached
	return func() { close(free) }
}

func TestOneRequestsFailureLeavesItsBatchAlone(t *testing.T) {
	p := newPKI(t)
	a := p.start(t, "ca1", func(c *ca.Config) func(*ca.Engine) { c.InFlight = 1; return nil })
	earlier := ask(t, "replayed")
	first := a.mustIssue(t, earlier)
	a.mustIssue(t, ask(t, "mismatched"))

	release := hold(t, p, a)
	errs := make(map[string]error)
	var mu sync.Mutex
	var wg sync.WaitGroup
	try := func(key string, r ca.Request) {
		wg.Go(func() {
			issued, err := a.issue(t, r)
			mu.Lock()
			defer mu.Unlock()
			errs[key] = err
			if key == "replayed" && err == nil && string(issued.DER) != string(first.DER) {
				t.Error("the replay has other bytes")
			}
		})
	}
	try("replayed", earlier)
	try("mismatched", ask(t, "mismatched", "other.example.org"))
	for i := range 6 {
		key := fmt.Sprintf("good-%d", i)
		try(key, ask(t, key))
	}
	dbtest.Until(t, "all are queued", func() bool { return a.engine.InFlight() == 9 })
	// The first signature of the batch is spoilt.
	p.keys.set(nil, func(signatures [][]byte) { signatures[0][len(signatures[0])-1] ^= 1; p.keys.set(nil, nil) })
	release()
	wg.Wait()
	bad := 0
	for key, err := range errs {
		switch {
		case key == "mismatched" && ca.NameOf(err) == ca.IdempotencyMismatch:
		case strings.HasPrefix(key, "good-") && ca.NameOf(err) == ca.HSMUnavailable:
			bad++
		case err != nil:
			t.Errorf("%s: %v", key, err)
		}
	}
	if bad > 1 {
		t.Errorf("%d neighbours failed with the one whose signature was spoilt", bad-1)
	}
	p.check(t)
}

func TestHSMTroubleIsSaidAndARepeatFinishesTheSameSerial(t *testing.T) {
	p := newPKI(t)
	a := p.start(t, "ca1", func(c *ca.Config) func(*ca.Engine) { c.SignTimeout = 100 * time.Millisecond; return nil })
	free := make(chan struct{})
	for name, fault := range map[string]func(context.Context, [][]byte) error{
		"error":                 func(context.Context, [][]byte) error { return errors.New("CKR_DEVICE_ERROR") },
		"hang":                  func(ctx context.Context, _ [][]byte) error { <-ctx.Done(); return ctx.Err() },
		"hang past its context": func(context.Context, [][]byte) error { <-free; return nil },
	} {
		t.Run(name, func(t *testing.T) {
			p.keys.set(fault, nil)
			r := ask(t, "k-"+name)
			_, err := a.issue(t, r)
			var e *ca.Error
			if !errors.As(err, &e) || e.Name != ca.HSMUnavailable || !e.Retryable() {
				t.Fatalf("got %v, want %s with Retry-After", err, ca.HSMUnavailable)
			}
			p.keys.set(nil, nil)
			open, err := a.store.OpenIntents(t.Context(), 0, 10)
			if err != nil || len(open) != 1 {
				t.Fatalf("open intents: %d, %v", len(open), err)
			}
			if issued := a.mustIssue(t, r); string(issued.Serial) != string(open[0].Serial) {
				t.Error("the repeat has another serial")
			}
		})
	}
	close(free)
	p.check(t)
}

func TestTheDeadlineLeavesTheOutcomeOpen(t *testing.T) {
	p := newPKI(t)
	a := p.start(t, "ca1", nil)
	free := make(chan struct{})
	p.keys.set(func(context.Context, [][]byte) error { <-free; return nil }, nil)
	r := ask(t, "k1")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := a.engine.Issue(ctx, r)
	var e *ca.Error
	if !errors.As(err, &e) || e.Name != ca.OutcomeUnknown || !e.Retryable() {
		t.Fatalf("got %v, want %s with Retry-After", err, ca.OutcomeUnknown)
	}
	close(free)
	p.keys.set(nil, nil)
	a.mustIssue(t, r)
	p.check(t)
}

func TestASerialDrawnTwiceIsNotIssued(t *testing.T) {
	p := newPKI(t)
	at := time.Now()
	broken := func(c *ca.Config) func(*ca.Engine) {
		c.Rand, c.Now = zeros{}, func() time.Time { return at }
		return nil
	}
	a, b := p.start(t, "ca1", broken), p.start(t, "ca2", broken)
	a.mustIssue(t, ask(t, "k1"))
	var e *ca.Error
	if _, err := b.issue(t, ask(t, "k2")); !errors.As(err, &e) || !e.Retryable() {
		t.Fatalf("got %v, want an error that may pass", err)
	}
	p.check(t)
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestHealthNamesWhatIsMissing(t *testing.T) {
	p := newPKI(t)
	n := p.make(t, "ca1", t.TempDir()+"/ca1", nil)
	if err := n.engine.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := func(text string) {
		t.Helper()
		h := n.engine.Health(t.Context())
		err, ok := h["issue:demo"]
		if !ok || len(h) != 1 {
			t.Errorf("capabilities %v", h)
		}
		if text == "" && err != nil || text != "" && (err == nil || !strings.Contains(err.Error(), text)) {
			t.Errorf("issue:demo: got %v, want %q", err, text)
		}
	}
	want("starting")
	if _, err := n.issue(t, ask(t, "k1")); ca.NameOf(err) != ca.Halted {
		t.Errorf("before Run: %v", err)
	}
	n.run(t)
	want("")
	n.engine.Halt("incident 7")
	want("incident 7")
	if _, err := n.issue(t, ask(t, "k1")); ca.NameOf(err) != ca.Halted {
		t.Errorf("halted: %v", err)
	}
	n.engine.Resume()
	want("")
	p.keys.mu.Lock()
	key := p.keys.byID["demo-key"]
	delete(p.keys.byID, "demo-key")
	p.keys.mu.Unlock()
	want("no key")
	if _, err := n.issue(t, ask(t, "k1")); ca.NameOf(err) != ca.HSMUnavailable {
		t.Errorf("without a key: %v", err)
	}
	p.keys.mu.Lock()
	p.keys.byID["demo-key"] = key
	p.keys.mu.Unlock()
	if err := n.stop(t); err != nil {
		t.Error(err)
	}
	want("stopping")
	if _, err := n.issue(t, ask(t, "k1")); ca.NameOf(err) != ca.Halted {
		t.Errorf("after Run: %v", err)
	}
}

func BenchmarkIssue(b *testing.B) {
	p := newPKI(b)
	a := p.start(b, "ca1", nil)
	for _, clients := range []int{1, 8, 32, 64} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			requests := make([]ca.Request, b.N)
			for i := range requests {
				requests[i] = ask(b, fmt.Sprintf("bench-%d-%d-%d", clients, b.N, i))
			}
			next := make(chan ca.Request)
			var wg sync.WaitGroup
			b.ResetTimer()
			for range clients {
				wg.Go(func() {
					for r := range next {
						if _, err := a.engine.Issue(context.Background(), r); err != nil {
							b.Error(err)
						}
					}
				})
			}
			for _, r := range requests {
				next <- r
			}
			close(next)
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "certs/s")
		})
	}
}
