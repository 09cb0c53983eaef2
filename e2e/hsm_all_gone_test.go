package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/load"
)

// Every HSM is away at once, frozen or dead: issuing says so and when to try again, status goes on, and with the first one back issuing goes
// on as well, without a restart of anything.
func TestWithoutAnyHSMStatusGoesOnAndIssuingResumesWithTheFirst(t *testing.T) {
	s := up(t)
	st := s.status(t)
	ca, _ := s.authority(t)
	issuer := s.issuer(t, &load.Recorder{})
	r, err := issuer.Request(1)
	if err != nil {
		t.Fatal(err)
	}
	a, err := issuer.Send(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(a.DER)
	if err != nil {
		t.Fatal(err)
	}
	status := &load.Responder{URL: st.CAs[0].OCSP, Client: load.NewClient(nil, 8), Issuer: ca, History: s.history, Generation: s.generation(t), Pick: func(int) *x509.Certificate { return cert }, Want: isGood}
	asking := make(chan load.Result, 1)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	eventually(t, 10*time.Second, func() error { return status.Op(t.Context(), 0) })
	go func() {
		asking <- load.Run(ctx, load.Config{Rate: 50, Duration: time.Minute, Timeout: 5 * time.Second}, status.Op)
	}()

	pids := map[string]int{}
	for _, p := range s.status(t).Processes {
		pids[p.Name] = p.PID
	}
	s.run(t, "demo", "freeze", "hsmd-a")
	t.Cleanup(func() { s.try("demo", "thaw", "hsmd-a") })
	s.run(t, "demo", "kill", "hsmd-b", "hsmd-c")
	t.Cleanup(func() { s.run(t, "demo", "start", "hsmd-b", "hsmd-c") })

	requester, body := s.client(t, st.Credentials.Requester, 4), issueBody(t, "gone.example.org")
	eventually(t, 15*time.Second, func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, st.Endpoints.API[0]+"/v1/certificates", strings.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Idempotency-Key", "all-gone")
		resp, err := requester.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		var p struct{ Type, Cause, Detail string }
		if err := json.NewDecoder(resp.Body).Decode(&p); err != nil {
			return err
		}
		wait, err := strconv.Atoi(resp.Header.Get("Retry-After"))
		if resp.StatusCode != 503 || !strings.Contains(p.Type+p.Cause+p.Detail, "hsm") || err != nil || wait < 1 {
			return fmt.Errorf("issuing without an HSM: %s, %+v, Retry-After %q", resp.Status, p, resp.Header.Get("Retry-After"))
		}
		return nil
	})

	s.run(t, "demo", "start", "hsmd-c")
	again, err := issuer.Request(2)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 15*time.Second, func() error { _, err := issuer.Send(t.Context(), again); return err })
	s.run(t, "demo", "thaw", "hsmd-a")
	s.run(t, "demo", "start", "hsmd-b")
	stop()
	if r := <-asking; r.Failed > 0 || r.Requests == 0 {
		t.Errorf("status meanwhile: %v", r)
	}
	for _, p := range s.status(t).Processes {
		if p.Role != "hsmd" && p.PID != pids[p.Name] {
			t.Errorf("%s was restarted", p.Name)
		}
	}
	s.fsck(t)
}

// issueBody is a request for a certificate with that name.
func issueBody(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{name}}, key)
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]string{"profile": "tls-server", "csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))})
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func isGood(_ int, _ *x509.Certificate, answer *ocsp.Response) error {
	if answer.Status != ocsp.Good {
		return fmt.Errorf("status is %s", load.StatusName(answer.Status))
	}
	return nil
}
