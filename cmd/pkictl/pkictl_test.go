package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trivet/identity"
	"trivet/problem"
)

// result is what one command line did.
type result struct {
	code     int
	out, err string
}

// pkictl runs one command line in this process, far from any demo.
func pkictl(t *testing.T, args ...string) result {
	t.Helper()
	t.Setenv("TRIVET_DEMO_DIR", filepath.Join(t.TempDir(), "no-demo"))
	var out, errw bytes.Buffer
	code := run(t.Context(), args, strings.NewReader(""), &out, &errw)
	return result{code, out.String(), errw.String()}
}

func TestWrongCommandLinesExitWithTwo(t *testing.T) {
	for _, args := range [][]string{
		{"nonsense"}, {"demo", "nonsense"}, {"cert", "nonsense"}, {"--nonsense"}, {"demo", "status", "--nonsense"}, {"demo", "kill"},
		{"cert", "show"}, {"cert", "show", "a", "b"}, {"demo", "status", "--output", "yaml"}, {"cert", "issue"},
		{"cert", "issue", "--dns", "a.example.org"}, {"cert", "issue", "--csr", "f", "--dns", "a.example.org"},
		{"cert", "revoke", "x", "--invalidity-date", "yesterday"}, {"ca", "list", "--config", "f", "--as", "ra"}, {"ca", "list", "--as", "mallory"}, {"init"},
		{"demo", "up", "--groups", "root,va"}, {"demo", "up", "--groups", "ca,other"}, {"hsm", "group", "nonsense"}, {"hsm", "group", "delete", "x"},
	} {
		if r := pkictl(t, args...); r.code != exitUsage || r.err == "" || r.out != "" {
			t.Errorf("pkictl %s: exit %d, want %d and a word on standard error alone; got %q and %q", strings.Join(args, " "), r.code, exitUsage, r.out, r.err)
		}
	}
}

func TestClientCommandWithoutAnInstallationSaysHowToGetOne(t *testing.T) {
	for _, args := range [][]string{{"ca", "list"}, {"cert", "show", "x"}, {"health"}, {"hsm", "status"}, {"demo", "kill", "ca1"}, {"demo", "logs"}} {
		r := pkictl(t, args...)
		if r.code != exitFailed || !strings.Contains(r.err, "pkictl demo up") {
			t.Errorf("pkictl %s: exit %d, %q", strings.Join(args, " "), r.code, r.err)
		}
	}
}

func TestEveryCommandIsThereOnce(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range (&app{}).command().Commands() {
		if seen[c.Name()] {
			t.Errorf("pkictl %s is there twice", c.Name())
		}
		seen[c.Name()] = true
	}
}

func TestDownAndStatusOfWhatIsNotThere(t *testing.T) {
	for _, verb := range []string{"down", "status"} {
		r := pkictl(t, "demo", verb, "--output", "json")
		var st struct{ State string }
		if err := json.Unmarshal([]byte(r.out), &st); r.code != exitOK || err != nil || st.State != "stopped" {
			t.Errorf("demo %s: exit %d, %q, %v", verb, r.code, r.out, err)
		}
	}
}

func TestManualHasAPageForEveryCommand(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man")
	if r := pkictl(t, "man", dir); r.code != exitOK {
		t.Fatalf("exit %d: %s", r.code, r.err)
	}
	for _, page := range []string{"pkictl.1", "pkictl-demo-up.1", "pkictl-cert-issue.1", "pkictl-init.1"} {
		if st, err := os.Stat(filepath.Join(dir, page)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", page, err)
		}
	}
}

// api serves the given handler as a balancer would, and returns a client configuration for it.
func api(t *testing.T, handler http.HandlerFunc) (configFile string) {
	t.Helper()
	dir := t.TempDir()
	authority, err := identity.CreateAuthority(filepath.Join(dir, "infra"), "test")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(role identity.Role) identity.Files {
		f, err := authority.IssueTo(filepath.Join(dir, string(role)), identity.Principal{Cluster: "test", Role: role, Name: string(role)}, nil, nil, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	id, err := identity.Load(issue(identity.RoleLB))
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(handler)
	srv.TLS = id.ServerTLS()
	srv.StartTLS()
	t.Cleanup(srv.Close)
	me := issue(identity.RoleRequester)
	configFile = filepath.Join(dir, "client.yaml")
	text := "api: " + srv.URL + "\ntrust: " + me.Trust + "\ncert: " + me.Cert + "\nkey: " + me.Key + "\n"
	if err := os.WriteFile(configFile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return configFile
}

func TestProblemIsShownWithEverythingThatHelps(t *testing.T) {
	config := api(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Request-Id", "req-77")
		p := problem.New(http.StatusUnprocessableEntity, "name-not-permitted", "the profile permits no wildcard")
		p.Field = "sans[0]"
		problem.Write(w, p)
	})
	r := pkictl(t, "cert", "show", "demo-g1:01", "--config", config)
	if r.code != exitFailed || r.out != "" {
		t.Errorf("exit %d, output %q", r.code, r.out)
	}
	for _, want := range []string{"Name not permitted", "422", "the profile permits no wildcard", "sans[0]", "req-77", "--profile"} {
		if !strings.Contains(r.err, want) {
			t.Errorf("%q is missing from:\n%s", want, r.err)
		}
	}
	r = pkictl(t, "cert", "show", "demo-g1:01", "--config", config, "--output", "json")
	var got struct{ Problem problem.Problem }
	if err := json.Unmarshal([]byte(r.err), &got); err != nil || got.Problem.Name() != "name-not-permitted" || got.Problem.RequestID != "req-77" {
		t.Errorf("as JSON: %v: %s", err, r.err)
	}
}

func TestIssuingIsRepeatedWithTheSameKeyWhileNobodyCanServe(t *testing.T) {
	var keys, bodies []string
	config := api(t, func(w http.ResponseWriter, r *http.Request) {
		var body bytes.Buffer
		_, _ = body.ReadFrom(r.Body)
		keys, bodies = append(keys, r.Header.Get("Idempotency-Key")), append(bodies, body.String())
		if len(keys) < 3 {
			p := problem.New(http.StatusServiceUnavailable, "hsm-unavailable", "no member of the group can sign")
			p.RetryAfter = 1
			problem.Write(w, p)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(certificate{ID: "demo-g1:01", Certificate: "LEAF\n", Chain: []string{"ISSUER\n", "ROOT\n"}})
	})
	dir := t.TempDir()
	r := pkictl(t, "cert", "issue", "--dns", "a.example.org", "--key-out", filepath.Join(dir, "key.pem"), "--config", config)
	if r.code != exitOK || r.out != "LEAF\nISSUER\n" {
		t.Fatalf("exit %d, output %q: %s", r.code, r.out, r.err)
	}
	if len(keys) != 3 || keys[0] == "" || keys[0] != keys[1] || keys[1] != keys[2] || bodies[0] != bodies[2] {
		t.Errorf("requests were not the same: keys %v", keys)
	}
	if st, err := os.Stat(filepath.Join(dir, "key.pem")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the key's file: %v, %v", st, err)
	}
}

// --wait says for how long a request is repeated, not how long one may take: without any wait it is made once, and its answer is told.
func TestWithoutWaitingARequestIsMadeOnce(t *testing.T) {
	asked := 0
	config := api(t, func(w http.ResponseWriter, _ *http.Request) {
		asked++
		p := problem.New(http.StatusServiceUnavailable, "hsm-unavailable", "no member of the group can sign")
		p.RetryAfter = 1
		problem.Write(w, p)
	})
	r := pkictl(t, "cert", "issue", "--dns", "a.example.org", "--key-out", filepath.Join(t.TempDir(), "key.pem"), "--config", config, "--wait", "0s")
	if asked != 1 || r.code != exitFailed || !strings.Contains(r.err, "no member of the group can sign") {
		t.Errorf("asked %d times, exit %d: %s", asked, r.code, r.err)
	}
}

func TestKeyFileIsNeverReplaced(t *testing.T) {
	config := api(t, func(http.ResponseWriter, *http.Request) { t.Error("a certificate was asked for") })
	key := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(key, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := pkictl(t, "cert", "issue", "--dns", "a.example.org", "--key-out", key, "--config", config)
	if got, _ := os.ReadFile(key); r.code != exitFailed || string(got) != "precious" {
		t.Errorf("exit %d; the file holds %q", r.code, got)
	}
}

func TestKeyOfARefusedRequestIsRemovedAndOthersStay(t *testing.T) {
	for name, status := range map[string]int{"name-not-permitted": 422, "request-in-progress": 409, "outcome-unknown": 503} {
		config := api(t, func(w http.ResponseWriter, _ *http.Request) {
			p := problem.New(status, name, "no")
			p.RetryAfter = 30
			problem.Write(w, p)
		})
		key := filepath.Join(t.TempDir(), "key.pem")
		r := pkictl(t, "cert", "issue", "--dns", "a.example.org", "--key-out", key, "--wait", "1s", "--config", config)
		_, err := os.Stat(key)
		if gone := os.IsNotExist(err); r.code != exitFailed || gone != (status == 422) {
			t.Errorf("%s: exit %d, the key is gone: %v\n%s", name, r.code, gone, r.err)
		}
	}
}

// What was asked for and had no answer is asked for again by the same command: the same key, the same CSR, the same idempotency key.
func TestTheSameCommandGoesOnWhereItEnded(t *testing.T) {
	var keys, bodies []string
	serve := false
	config := api(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		keys, bodies = append(keys, r.Header.Get("Idempotency-Key")), append(bodies, string(body))
		if !serve {
			p := problem.New(http.StatusServiceUnavailable, "database-unavailable", "recovery round 3 is under way")
			p.RetryAfter = 30
			problem.Write(w, p)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(certificate{ID: "demo-g1:01", Certificate: "LEAF\n"})
	})
	key := filepath.Join(t.TempDir(), "key.pem")
	issue := func(more ...string) result {
		return pkictl(t, append([]string{"cert", "issue", "--dns", "a.example.org", "--key-out", key, "--wait", "1s", "--config", config}, more...)...)
	}
	if r := issue(); r.code != exitFailed || !strings.Contains(r.err, "goes on") {
		t.Fatalf("exit %d: %s", r.code, r.err)
	}
	private, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range [][]string{{"--dns", "b.example.org"}, {"--profile", "other"}, {"--idempotency-key", "mine"}} {
		if r := issue(other...); r.code != exitFailed || !strings.Contains(r.err, "another request") || len(keys) != 1 {
			t.Errorf("%v: exit %d, %d requests: %s", other, r.code, len(keys), r.err)
		}
	}
	serve = true
	if r := issue(); r.code != exitOK || !strings.Contains(r.err, "going on with the key "+key+" and idempotency key "+keys[0]) {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
	if len(keys) != 2 || keys[0] != keys[1] || bodies[0] != bodies[1] {
		t.Errorf("requests differ: %v", keys)
	}
	if now, _ := os.ReadFile(key); !bytes.Equal(now, private) {
		t.Error("the key was replaced")
	}
	// It is done: the key is nobody else's now.
	if r := issue(); r.code != exitFailed || !strings.Contains(r.err, "is there already") || len(keys) != 2 {
		t.Errorf("exit %d: %s", r.code, r.err)
	}
	if left, _ := filepath.Glob(key + "*"); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func TestClientConfigurationIsStrict(t *testing.T) {
	file := filepath.Join(t.TempDir(), "client.yaml")
	if err := os.WriteFile(file, []byte("api: https://x\nsecret: y\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := pkictl(t, "ca", "list", "--config", file); r.code != exitFailed || !strings.Contains(r.err, "secret") || !strings.Contains(r.err, "2:1") {
		t.Errorf("exit %d, want an error with the unknown key and its place: %s", r.code, r.err)
	}
}

func TestWaitIsBounded(t *testing.T) {
	config := api(t, func(w http.ResponseWriter, _ *http.Request) {
		p := problem.New(http.StatusServiceUnavailable, "database-unavailable", "no node can be written")
		p.RetryAfter = 30
		problem.Write(w, p)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out, errw bytes.Buffer
	code := run(ctx, []string{"cert", "revoke", "demo-g1:01", "--wait", "5s", "--config", config}, strings.NewReader(""), &out, &errw)
	if code != exitFailed || !strings.Contains(errw.String(), "try again after 30 s") {
		t.Errorf("exit %d: %s", code, errw.String())
	}
}
