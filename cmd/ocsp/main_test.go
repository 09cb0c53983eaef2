package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trivet/health"
	"trivet/identity"
)

// site is a configuration file with identities, database and HSM of which are not there.
type site struct {
	path  string
	infra *identity.Authority
}

func newSite(t *testing.T) *site {
	t.Helper()
	infra, err := identity.CreateAuthority(t.TempDir(), "test")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{path: filepath.Join(t.TempDir(), "ocsp.yaml"), infra: infra}
	f := s.files(t, identity.RoleOCSP, "ocsp1")
	s.write(t, fmt.Sprintf(`cluster: test
node: ocsp1
identity: {cert: %q, key: %q, trust: %q}
listen: {public: "127.93.3.1:8080", internal: "127.93.3.1:8443"}
site: primary
drain: 10ms
database: {nodes: ["127.93.3.9:3306"], user: ocsp, password_file: %q}
`, f.Cert, f.Key, f.Trust, f.Key))
	return s
}

func (s *site) write(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(s.path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *site) files(t *testing.T, role identity.Role, name string) identity.Files {
	t.Helper()
	f, err := s.infra.IssueTo(t.TempDir(), identity.Principal{Cluster: "test", Role: role, Name: name}, nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func TestCheckValidatesAndRefusesUnknownKeys(t *testing.T) {
	s := newSite(t)
	var out bytes.Buffer
	if err := run(t.Context(), []string{"--config", s.path, "--check"}, &out, quiet()); err != nil || out.String() != "ok\n" {
		t.Fatalf("--check: %v %q", err, out.String())
	}
	valid, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	for change, want := range map[[2]string]string{
		{"site: primary", "site: primary\nsight: x"}:    "sight",
		{"site: primary", "site: primary\npolicy: lax"}: "policy",
		{"drain: 10ms", "drain: 1h"}:                    "drain",
		{"127.93.3.1:8443", "0.0.0.0:8443"}:             "advertise",
	} {
		s.write(t, strings.Replace(string(valid), change[0], change[1], 1))
		if err := run(t.Context(), []string{"--config", s.path, "--check"}, io.Discard, quiet()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: error %v does not name %q", change, err, want)
		}
	}
}

// TestStartsAndStopsWithNothingThere: database and HSM are missing; the node says so, refuses nonsense, and stops when told.
func TestStartsAndStopsWithNothingThere(t *testing.T) {
	s := newSite(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"--config", s.path}, io.Discard, quiet()) }()

	lb, err := identity.Load(s.files(t, identity.RoleLB, "lb1"))
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: lb.ClientTLS(identity.RoleOCSP)}, Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	var report health.Report
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		resp, err := client.Get("https://127.93.3.1:8443/healthz")
		if err == nil {
			err = json.NewDecoder(resp.Body).Decode(&report)
			resp.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if report.Node != "ocsp1" || report.State != health.Degraded || report.Ready() {
		t.Errorf("report: %+v", report)
	}
	resp, err := http.Post("http://127.93.3.1:8080/ocsp", "application/ocsp-request", strings.NewReader("nonsense"))
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || !bytes.Equal(body, []byte{0x30, 3, 10, 1, 1}) {
		t.Errorf("nonsense: %v %x", err, body)
	}
	stop()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("stopping: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("does not stop")
	}
}
