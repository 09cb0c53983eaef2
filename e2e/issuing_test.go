package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/cluster"
	"trivet/load"
	"trivet/ops/galera"
)

// issuing is clients that ask the balancer for certificates at a steady rate while something happens.
type issuing struct {
	*load.Issuer
	recorder *load.Recorder
	stop     context.CancelFunc
	result   chan load.Result

	mu      sync.Mutex
	refused map[string]int // answers 503 that a patient client met, by type
}

// keepIssuing begins the load and returns once it has got going. Patient clients repeat what is answered 503 with a cause and a time, as they are told.
func (s *site) keepIssuing(t *testing.T, patient bool) *issuing {
	t.Helper()
	recorder := &load.Recorder{}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(stop)
	l := &issuing{Issuer: s.issuer(t, recorder), recorder: recorder, stop: stop, result: make(chan load.Result, 1), refused: map[string]int{}}
	op := l.Op
	if patient {
		op = l.patiently
	}
	go func() {
		l.result <- load.Run(ctx, load.Config{Rate: issueRate, Duration: 5 * time.Minute, Timeout: time.Minute}, op)
	}()
	l.more(t)
	return l
}

// patiently sends a request until it is answered otherwise than by 503.
func (l *issuing) patiently(ctx context.Context, i int) error {
	r, err := l.Request(i)
	if err != nil {
		return err
	}
	for {
		_, err := l.Send(ctx, r)
		var status *load.StatusError
		if !errors.As(err, &status) {
			return err
		}
		if status.Status != http.StatusServiceUnavailable || status.RetryAfter == "" || status.Type == "" {
			return fmt.Errorf("answered %w (%s), Retry-After %q", err, status.Detail, status.RetryAfter)
		}
		l.mu.Lock()
		l.refused[strings.TrimPrefix(status.Type, "urn:trivet:problem:")]++
		l.mu.Unlock()
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// more waits for a second's worth of certificates from now on.
func (l *issuing) more(t *testing.T) {
	t.Helper()
	before := l.recorder.Len()
	eventually(t, 60*time.Second, func() error {
		if n := l.recorder.Len() - before; n < int(issueRate) {
			return fmt.Errorf("%d certificates more", n)
		}
		return nil
	})
}

// end ends the load and demands that every request got its certificate, one.
func (l *issuing) end(t *testing.T, s *site) load.Result {
	t.Helper()
	l.stop()
	r := <-l.result
	t.Logf("issuing: %v; answered 503: %v", r, l.refused)
	if r.Failed > 0 || l.recorder.Len() != r.Requests {
		t.Errorf("%d of %d requests failed, %d certificates", r.Failed, r.Requests, l.recorder.Len())
	}
	if d := l.recorder.Duplicates(); len(d) > 0 || s.namesTwice(t, l.recorder) > 0 {
		t.Errorf("duplicates: %v", d)
	}
	return r
}

// directly is the same clients at one CA node, past the balancer.
func (s *site) directly(t *testing.T, node string, recorder *load.Recorder) *load.Issuer {
	t.Helper()
	i := s.issuer(t, recorder)
	i.URL, i.Client = "https://"+s.process(t, node).Addresses["api"], s.straight(t, s.status(t))
	return i
}

// said is an answer to whoever asked for a certificate.
type said struct {
	Status     int
	RetryAfter string
	Type       string // without its prefix
	Text       string // the whole body
}

// ask asks for a certificate and returns whatever is answered.
func ask(t *testing.T, i *load.Issuer, key, body string) (said, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, i.URL+"/v1/certificates", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", key)
	resp, err := i.Client.Do(req)
	if err != nil {
		return said{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return said{}, err
	}
	var p struct{ Type string }
	_ = json.Unmarshal(text, &p) // an answer that is no problem+json has no type
	return said{resp.StatusCode, resp.Header.Get("Retry-After"), strings.TrimPrefix(p.Type, "urn:trivet:problem:"), string(text)}, nil
}

// refuses waits until a node answers 503 with that type, a time, and every one of words.
func refuses(t *testing.T, i *load.Issuer, key, typ string, words ...string) {
	t.Helper()
	body := issueBody(t, key+".example.org")
	eventually(t, 20*time.Second, func() error {
		got, err := ask(t, i, key, body)
		if err != nil {
			return err
		}
		if got.Status != http.StatusServiceUnavailable || got.Type != typ || got.RetryAfter == "" {
			return fmt.Errorf("answered %+v, want 503 %s with Retry-After", got, typ)
		}
		for _, w := range words {
			if !strings.Contains(got.Text, w) {
				return fmt.Errorf("%q is not said: %s", w, got.Text)
			}
		}
		return nil
	})
}

// issues waits until a request of its own is answered with a certificate.
func issues(t *testing.T, i *load.Issuer, number int) load.Acknowledged {
	t.Helper()
	r, err := i.Request(number)
	if err != nil {
		t.Fatal(err)
	}
	var a load.Acknowledged
	eventually(t, 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		a, err = i.Send(ctx, r)
		return err
	})
	return a
}

// persist repeats what a node says it may do later, such as when a busy machine makes requests wait for too long, and nothing else.
func persist(ctx context.Context, send func() error) error {
	for {
		err := send()
		if err == nil || !later(err) {
			return err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// later tells whether every request that an error is about may be repeated.
func later(err error) bool {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, one := range many.Unwrap() {
			if !later(one) {
				return false
			}
		}
		return true
	}
	var status *load.StatusError
	return errors.As(err, &status) && status.RetryAfter != ""
}

// logged waits until the process has written every one of words into its log since the log had that length.
func (s *site) logged(t *testing.T, p cluster.Process, since int, words ...string) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		text := logOf(t, p)[since:]
		for _, w := range words {
			if !bytes.Contains(text, []byte(w)) {
				return fmt.Errorf("the log of %s says nothing of %q", p.Name, w)
			}
		}
		return nil
	})
}

// node is a database node, for its administrator.
func (s *site) node(t *testing.T, name string) galera.Node {
	return galera.Node{Name: name, Dir: filepath.Clean(s.process(t, name).Dir)}
}
