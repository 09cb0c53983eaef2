package e2e_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/cluster"
	"trivet/load"
	"trivet/ops/galera"
)

var databaseNodes = []string{"db1", "db2", "db3"}

// Every database node dies within 0.3 s under load. Until the supervisor has the database back, issuing says 503, why, and when to try again,
// and OCSP says nothing false; then every request is answered, with one certificate, and nothing that was acknowledged is missing.
func TestAllDatabasesKilledAtOnceLoseNothing(t *testing.T) {
	s := up(t)
	recorder := &load.Recorder{}
	issuer := s.issuer(t, recorder)
	ca, _ := s.authority(t)
	known := make([]*x509.Certificate, 4) // the first one revoked
	for i := range known {
		r, err := issuer.Request(1_000_000 + i)
		if err != nil {
			t.Fatal(err)
		}
		a, err := issuer.Send(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if known[i], err = x509.ParseCertificate(a.DER); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			s.run(t, "cert", "revoke", a.ID, "--reason", "superseded")
		}
	}
	before := recorder.Len()

	// A client that repeats what was answered 503, as it is told to, and gives up at nothing else.
	var mu sync.Mutex
	refused := 0
	patient := func(ctx context.Context, i int) error {
		r, err := issuer.Request(i)
		if err != nil {
			return err
		}
		for {
			_, err := issuer.Send(ctx, r)
			var status *load.StatusError
			if !errors.As(err, &status) {
				return err
			}
			if status.Status != http.StatusServiceUnavailable || status.RetryAfter == "" || status.Type == "" {
				return fmt.Errorf("answered %w (%s), Retry-After %q", err, status.Detail, status.RetryAfter)
			}
			mu.Lock()
			refused++
			mu.Unlock()
			select {
			case <-time.After(500 * time.Millisecond):
			case <-ctx.Done():
				return err
			}
		}
	}
	later, unserved := 0, 0
	status := &load.Responder{URL: s.status(t).CAs[0].OCSP, Client: load.NewClient(nil, 64), Issuer: ca, Pick: func(i int) *x509.Certificate { return known[i%len(known)] },
		Want: func(_ int, cert *x509.Certificate, answer *ocsp.Response) error {
			if want := map[bool]int{true: ocsp.Revoked, false: ocsp.Good}[cert == known[0]]; answer.Status != want {
				return fmt.Errorf("status is %s instead of %s", load.StatusName(answer.Status), load.StatusName(want))
			}
			return nil
		}}
	ask := func(ctx context.Context, i int) error {
		err := status.Op(ctx, i)
		var no ocsp.ResponseError
		var status *load.StatusError
		mu.Lock()
		defer mu.Unlock()
		switch {
		case errors.As(err, &no) && no.Status == ocsp.TryLater && i%len(known) != 0:
			later++
			return nil
		case errors.As(err, &status) && status.Status == http.StatusServiceUnavailable && status.Type != "" && status.RetryAfter != "":
			unserved++ // the balancer's word for the same
			return nil
		}
		return err
	}
	var issued, asked load.Result
	var loads sync.WaitGroup
	loads.Go(func() {
		issued = load.Run(context.Background(), load.Config{Rate: issueRate, Duration: 12 * time.Second, Timeout: time.Minute}, patient)
	})
	loads.Go(func() {
		asked = load.Run(context.Background(), load.Config{Rate: ocspRate, Duration: 12 * time.Second, Timeout: 15 * time.Second}, ask)
	})
	eventually(t, 30*time.Second, func() error {
		if recorder.Len() < before+int(issueRate) {
			return errors.New("the load has not got going")
		}
		return nil
	})
	pids := map[string]int{}
	for _, p := range s.status(t).Processes {
		pids[p.Name] = p.PID
	}
	struck := time.Now()
	for _, name := range databaseNodes {
		if err := syscall.Kill(pids[name], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(struck); took > 300*time.Millisecond {
		t.Fatalf("killing took %s", took)
	}
	eventually(t, 30*time.Second, func() error {
		for _, name := range databaseNodes {
			if p := s.process(t, name); p.State != cluster.Running || p.PID == pids[name] {
				return fmt.Errorf("%s is %s", name, p.State)
			}
		}
		return nil
	})
	s.allWell(t)
	recovered := time.Since(struck)
	loads.Wait()
	t.Logf("all well %s after the kill; %d answers 503; of status %d tryLater, %d 503", recovered.Round(100*time.Millisecond), refused, later, unserved)
	t.Logf("issuing: %v", issued)
	t.Logf("OCSP: %v", asked)
	if issued.Failed > 0 || asked.Failed > 0 {
		t.Errorf("%d requests and %d status requests failed otherwise than by 503 with a cause or tryLater", issued.Failed, asked.Failed)
	}
	if got := recorder.Len() - before; got != issued.Requests {
		t.Errorf("%d certificates for %d requests", got, issued.Requests)
	}
	if d := recorder.Duplicates(); len(d) > 0 {
		t.Errorf("duplicates: %v", d)
	}
	if n := s.namesTwice(t, recorder); n > 0 {
		t.Errorf("%d names have two certificates", n)
	}
	if state := s.galera(t); state[0].State.UUID != state[1].State.UUID || state[0].State.UUID != state[2].State.UUID {
		t.Errorf("histories differ: %+v", state)
	}
	s.fsck(t)
}

// galera is what each database node is and knows.
func (s *site) galera(t *testing.T) []galera.Inspection {
	t.Helper()
	out, stderr, _ := s.try("galera", "status", "--output", "json") // exit code 1 when a node is down
	var found []galera.Inspection
	if err := json.Unmarshal(out, &found); err != nil || len(found) != 3 {
		t.Fatalf("galera status: %v\n%s%s", err, out, stderr)
	}
	return found
}

// issueOne has a certificate issued and returns its id.
func (s *site) issueOne(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	return strings.TrimSpace(string(s.run(t, "cert", "issue", "--dns", name, "--key-out", filepath.Join(dir, "key"), "--out", filepath.Join(dir, "pem"))))
}

// A database node had left, the others died too, and then its disk was lost: it held nothing that they do not, so nobody is asked; it
// fetches everything.
func TestDiskOfADatabaseThatHadLeftIsNoLoss(t *testing.T) {
	s := up(t)
	history := s.galera(t)[0].State.UUID
	s.run(t, "demo", "kill", "db3")
	t.Cleanup(func() { s.try(append([]string{"demo", "start"}, databaseNodes...)...) })
	id := s.issueOne(t, "left.example.org")
	eventually(t, 10*time.Second, func() error { // the new view is written down a moment later
		for _, in := range s.galera(t)[:2] {
			if in.View == nil || len(in.View.Members) != 2 {
				return fmt.Errorf("%s: %+v", in.Node, in.View)
			}
		}
		return nil
	})
	s.run(t, "demo", "kill", "db1", "db2")
	if err := os.RemoveAll(filepath.Join(s.process(t, "db3").Dir, "data")); err != nil {
		t.Fatal(err)
	}
	s.run(t, "demo", "start", "db1", "db2", "db3")
	s.allWell(t)
	s.run(t, "cert", "show", id)
	for _, in := range s.galera(t) {
		if in.State.UUID != history {
			t.Errorf("%s has history %s; it was %s", in.Node, in.State.UUID, history)
		}
	}
	s.fsck(t)
}

// The disk of a database node is lost that was among the last: nothing starts, clients are told, and so are operators, until the disk is back or
// somebody takes the loss upon himself.
func TestDiskOfADatabaseThatMayHoldMoreIsAskedFor(t *testing.T) {
	s := up(t)
	history := s.galera(t)[0].State.UUID
	id := s.issueOne(t, "asked.example.org")
	outage := func() (lost, kept string) {
		s.run(t, append([]string{"demo", "kill"}, databaseNodes...)...)
		best := slices.MaxFunc(s.galera(t), func(a, b galera.Inspection) int { return int(a.Position.Seqno - b.Position.Seqno) })
		kept = best.Data + ".kept"
		if err := os.Rename(best.Data, kept); err != nil {
			t.Fatal(err)
		}
		for _, name := range databaseNodes {
			if _, stderr, err := s.try("demo", "start", name); err == nil || !strings.Contains(string(stderr), "--without "+best.Node+" --i-accept-loss") {
				t.Errorf("starting %s: %v, %s", name, err, stderr)
			}
		}
		_, stderr, err := s.try("galera", "recover")
		if err == nil || !strings.Contains(string(stderr), best.Node+": its position is unknown") {
			t.Errorf("recover without a word: %v, %s", err, stderr)
		}
		return best.Node, kept
	}
	_, kept := outage()
	st := s.status(t)
	requester, body := s.client(t, st.Credentials.Requester, 4), issueBody(t, "nowhere.example.org")
	eventually(t, 20*time.Second, func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, st.Endpoints.API[0]+"/v1/certificates", strings.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Idempotency-Key", "no-database")
		resp, err := requester.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		var p struct{ Type, Cause string }
		if err := json.NewDecoder(resp.Body).Decode(&p); err != nil {
			return err
		}
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !strings.Contains(p.Cause, "database") {
			return fmt.Errorf("issuing without a database: %s, %+v", resp.Status, p)
		}
		return nil
	})
	// The disk turns up: nobody needs to do anything else.
	data := strings.TrimSuffix(kept, ".kept")
	if err := errors.Join(os.RemoveAll(data), os.Rename(kept, data)); err != nil {
		t.Fatal(err)
	}
	s.allWell(t)
	if now := s.galera(t)[0].State.UUID; now != history {
		t.Errorf("history %s was %s", now, history)
	}

	lost, kept := outage()
	s.run(t, "galera", "recover", "--without", lost, "--i-accept-loss", "--dry-run")
	if out := s.run(t, "galera", "recover", "--without", lost, "--i-accept-loss"); !bytes.Contains(out, []byte("GIVEN UP: whatever only "+lost+" held")) {
		t.Errorf("recover says\n%s", out)
	}
	s.allWell(t)
	for _, in := range s.galera(t) {
		if in.State.UUID == history {
			t.Errorf("%s still has the history of the node that was given up", in.Node)
		}
	}
	s.run(t, "cert", "show", id) // nothing was under way, so that nothing was really lost
	if err := os.RemoveAll(kept); err != nil {
		t.Fatal(err)
	}
	s.fsck(t)
}
