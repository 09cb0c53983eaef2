package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
	"trivet/hsm/hsmtest"
	"trivet/hsmsync"
	"trivet/identity"
)

// record is a real database; nil where MariaDB is not installed.
var record *dbtest.Cluster

func TestMain(m *testing.M) {
	os.Exit(dbtest.Main(m, "127.98.3", 1, func(c *dbtest.Cluster) { record = c }))
}

// groupLab is a group of two real HSM agents, with a configuration as an operator's.
type groupLab struct {
	*hsmtest.Lab
	t        *testing.T
	database db.Config
	dir      string // of identities
	config   string
}

func newGroupLab(t *testing.T) *groupLab {
	t.Helper()
	l := &groupLab{t: t, database: record.Need(t).New(t), Lab: hsmtest.NewLab(t)}
	var members []hsmsync.Member
	lines := ""
	for _, name := range []string{"hsmd-a", "hsmd-b"} {
		m := l.Start(name)
		l.dir = filepath.Dir(m.Dir)
		members = append(members, hsmsync.Member{Name: m.Name, Address: m.Addr})
		lines += fmt.Sprintf("    - {name: %s, address: %q}\n", m.Name, m.Addr)
	}
	id := l.Identity(identity.RoleSync, "sync1")
	c, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: "main", Identity: id, Chain: hsmsync.NewManifest(dbtest.Open(t, l.database)), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := c.Setup(ctx, members, hsmsync.Policy{}); err != nil {
		t.Fatal(err)
	}
	l.config = l.configFor(identity.RoleSync, "sync1", lines)
	return l
}

func (l *groupLab) configFor(role identity.Role, name, members string) string {
	l.t.Helper()
	l.Identity(role, name)
	nodes, err := json.Marshal(l.database.Nodes)
	if err != nil {
		l.t.Fatal(err)
	}
	file := filepath.Join(l.t.TempDir(), "site.yaml")
	hsmtest.Write(l.t, file, fmt.Sprintf(`cluster: lab
node: %s
identity: {cert: %[2]s/cert.pem, key: %[2]s/key.pem, trust: %[2]s/trust.pem}
database: {nodes: %[3]s, name: %[4]s, user: %[5]s, password_file: %[6]q}
hsm:
  group: main
  members:
%[7]s`, name, l.files(role, name), nodes, l.database.Name, l.database.User, l.database.PasswordFile, members))
	return file
}

func (l *groupLab) files(role identity.Role, name string) string {
	return filepath.Join(l.dir, string(role)+"-"+name)
}

// run runs one command on the group; it must end with that exit code.
func (l *groupLab) run(code int, args ...string) result {
	l.t.Helper()
	r := pkictl(l.t, append(args, "--config", l.config)...)
	if r.code != code {
		l.t.Fatalf("pkictl %s: exit %d, want %d\n%s%s", strings.Join(args, " "), r.code, code, r.err, r.out)
	}
	return r
}

// object runs one command with JSON output.
func (l *groupLab) object(code int, args ...string) map[string]any {
	l.t.Helper()
	r := l.run(code, append(args, "--output", "json")...)
	var v map[string]any
	if err := json.Unmarshal([]byte(r.out), &v); err != nil {
		l.t.Fatalf("pkictl %s: %v\n%s", strings.Join(args, " "), err, r.out)
	}
	return v
}

// approve has two people approve a request.
func (l *groupLab) approve(file string) {
	l.t.Helper()
	for _, who := range []struct {
		role identity.Role
		name string
	}{{identity.RoleAdmin, "alice"}, {identity.RoleCAOperator, "bob"}} {
		l.Identity(who.role, who.name)
		dir := l.files(who.role, who.name)
		r := pkictl(l.t, "approve", file, "--yes", "--cert", dir+"/cert.pem", "--key", dir+"/key.pem", "--trust", dir+"/trust.pem")
		if r.code != exitOK {
			l.t.Fatalf("approving as %s: %s", who.name, r.err)
		}
	}
}

// position is how far the group's log has come.
func (l *groupLab) position() float64 {
	l.t.Helper()
	return l.object(exitOK, "hsm", "verify")["position"].(float64)
}

func names(v any) []string { return sorted(v.(map[string]any)) }

func first(v any) map[string]any { return v.([]any)[0].(map[string]any) }

// Phases: keys; the status that programs rely on; dry runs; a new member by request and approvals; backup and check; policy; trouble.
func TestOperatorsWorkOnAGroup(t *testing.T) {
	l := newGroupLab(t)
	dir := t.TempDir()

	t.Run("a key is made once, listed and shown", func(t *testing.T) {
		made := l.object(exitOK, "key", "create", "demo-g1", "--purpose", "ca")
		key := made["result"].(map[string]any)
		if made["done"] != true || key["state"] != "live" || key["algorithm"] != "P-256" {
			t.Errorf("%v", made)
		}
		again := l.object(exitOK, "key", "create", "demo-g1", "--purpose", "ca")["result"].(map[string]any)
		if again["id"] != key["id"] {
			t.Errorf("a second key was made: %v", again)
		}
		if r := l.run(exitOK, "key", "list"); !strings.Contains(r.out, key["id"].(string)) {
			t.Errorf("the list lacks it:\n%s", r.out)
		}
		for _, name := range []string{"ca:demo-g1", key["id"].(string), key["id"].(string)[:8]} {
			if r := l.run(exitOK, "key", "show", name); !strings.Contains(r.out, "BEGIN PUBLIC KEY") {
				t.Errorf("show %s:\n%s", name, r.out)
			}
		}
		for _, name := range []string{"ca:nonesuch", "ocsp:demo-g1", "ffff"} {
			if r := l.run(exitFailed, "key", "show", name); !strings.Contains(r.err, "key list") {
				t.Errorf("show %s: %s", name, r.err)
			}
		}
		for _, args := range [][]string{{"x y", "--purpose", "ca"}, {"x", "--purpose", "tea"}, {"x", "--purpose", "probe"}, {"x", "--purpose", "ca", "--algorithm", "DES"}, {"x"}} {
			l.run(exitUsage, append([]string{"key", "create"}, args...)...)
		}
	})

	t.Run("status has the names that programs rely on", func(t *testing.T) {
		status := l.object(exitOK, "hsm", "status")
		group := first(status["groups"])
		member := first(group["members"])
		key := first(member["keys"])
		for _, c := range []struct {
			what string
			of   any
			want []string
		}{
			{"the whole", status, []string{"groups"}},
			{"a group", group, []string{"epoch", "members", "name"}},
			{"a member", member, []string{"drift", "inflight", "keys", "lag_s", "name", "standby", "state"}},
			{"a key", key, []string{"id", "label", "proved_at", "purpose", "state"}},
		} {
			for _, name := range c.want {
				if !slices.Contains(names(c.of), name) {
					t.Errorf("%s has %v and lacks %s", c.what, names(c.of), name)
				}
			}
		}
		if group["name"] != "main" || member["name"] != "hsmd-a" || member["state"] != "active" || key["state"] != "verified" {
			t.Errorf("%v", status)
		}
		if r := l.run(exitOK, "hsm", "status"); !strings.Contains(r.out, "1 of 1") || strings.Contains(r.err, "\x1b") {
			t.Errorf("as text:\n%s%s", r.out, r.err)
		}
	})

	t.Run("a dry run is refused where the act would be, in the same words", func(t *testing.T) {
		for _, args := range [][]string{
			{"key", "destroy", "ca:demo-g1"}, {"hsm", "enroll", "hsmd-a", "--address", "127.0.0.1:1"}, {"hsm", "policy", "--set", "driver=external"},
		} {
			dry, real := l.run(exitFailed, append(args, "--dry-run")...), l.run(exitFailed, args...)
			if dry.err != real.err || dry.err == "" {
				t.Errorf("%v: the dry run says %q, the real one %q", args, dry.err, real.err)
			}
		}
	})

	t.Run("what protects keys less needs two people", func(t *testing.T) {
		for _, args := range [][]string{{"key", "retire", "ca:demo-g1", "--why", "x"}, {"hsm", "policy", "--set", "destroy_after=1h"}, {"hsm", "remove", "hsmd-b", "--force"}} {
			if r := l.run(exitUsage, args...); !strings.Contains(r.err, "two people must approve this") {
				t.Errorf("%v: %s", args, r.err)
			}
		}
		if r := l.run(exitUsage, "hsm", "policy", "--set", "destroy_after=1h", "--request-out", dir+"/policy.json"); !strings.Contains(r.err, "say who you are") {
			t.Errorf("a request by nobody: %s", r.err)
		}
	})

	t.Run("a dry run says what would be done and changes nothing", func(t *testing.T) {
		before := l.position()
		for _, args := range [][]string{
			{"key", "create", "other", "--purpose", "ocsp"}, {"key", "retire", "ca:demo-g1", "--why", "x"}, {"hsm", "drain", "hsmd-a"}, {"hsm", "recover", "hsmd-a"},
			{"hsm", "standby", "hsmd-a"}, {"hsm", "rotate"}, {"hsm", "policy", "--set", "prefer=local"}, {"hsm", "remove", "hsmd-b", "--force"},
			{"hsm", "backup", "--custodians", "3", "--threshold", "2", "--shares", dir + "/no", "--out", dir + "/no.backup"},
		} {
			r := l.object(exitOK, append(args, "--dry-run")...)
			if r["dry_run"] != true || r["done"] != false || len(r["steps"].([]any)) == 0 {
				t.Errorf("%v: %v", args, r)
			}
		}
		if r := l.run(exitFailed, "hsm", "remove", "hsmd-b", "--dry-run"); !strings.Contains(r.err, "2 copies") {
			t.Errorf("what would be refused is refused in a dry run: %s", r.err)
		}
		if after := l.position(); after != before {
			t.Errorf("the log went from %v to %v", before, after)
		}
		if _, err := os.Stat(dir + "/no.backup"); err == nil {
			t.Error("a file was written")
		}
	})

	t.Run("a member is enrolled when two people have approved it", func(t *testing.T) {
		m := l.Start("hsmd-c")
		enroll := []string{"hsm", "enroll", "hsmd-c", "--address", m.Addr}
		if r := l.run(exitUsage, enroll...); !strings.Contains(r.err, "--request-out") {
			t.Errorf("without approval: %s", r.err)
		}
		l.run(exitUsage, append(enroll, "--approve-as", "admin1,operator1")...) // in a demo only
		request := filepath.Join(dir, "enroll.json")
		asked := l.object(exitOK, append(enroll, l.proposing("--request-out", request)...)...)
		if asked["done"] != false || asked["request"] != request {
			t.Errorf("%v", asked)
		}
		l.run(exitFailed, append(enroll, l.proposing("--request-out", request)...)...) // it may hold approvals
		if r := l.run(exitFailed, append(enroll, "--grant", request)...); !strings.Contains(r.err, "2 people") {
			t.Errorf("with no approval in it: %s", r.err)
		}
		l.approve(request)
		if r := l.run(exitFailed, "hsm", "replace", "hsmd-a", "--grant", request); !strings.Contains(r.err, "main/hsmd-c") {
			t.Errorf("for another member: %s", r.err)
		}
		done := l.object(exitOK, append(enroll, "--grant", request)...)
		if token := done["result"].(map[string]any); done["done"] != true || token["token_label"] != "hsmd-c" {
			t.Errorf("%v", done)
		}
		l.object(exitOK, append(enroll, "--grant", request)...) // a repetition finds it done
		l.run(exitOK, "hsm", "status")
	})

	t.Run("a key from outside is taken in", func(t *testing.T) {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		file, request := filepath.Join(dir, "old.key"), filepath.Join(dir, "import.json")
		hsmtest.Write(t, file, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
		args := []string{"key", "import", "old-ca", "--purpose", "ca", "--key", file}
		l.object(exitOK, append(args, l.proposing("--request-out", request)...)...)
		l.approve(request)
		got := l.object(exitOK, append(args, "--grant", request)...)["result"].(map[string]any)
		if got["algorithm"] != "P-384" || got["state"] != "live" {
			t.Errorf("%v", got)
		}
		l.run(exitFailed, "key", "import", "old-ca", "--purpose", "ca", "--key", l.config, "--grant", request) // that is no key
		for _, other := range [][]string{{"old-ca", "--purpose", "audit"}, {"another", "--purpose", "ca"}} {
			args := append([]string{"key", "import", "--key", file, "--dry-run"}, other...)
			if r := l.run(exitFailed, args...); !strings.Contains(r.err, "ca:old-ca, live") {
				t.Errorf("the same key as %v: %s", other, r.err)
			}
		}
		if r := l.run(exitFailed, "key", "import", "x", "--purpose", "ca", "--key", "/dev/zero", "--dry-run"); !strings.Contains(r.err, "octets") {
			t.Errorf("a file without end: %s", r.err)
		}
		if r := l.run(exitFailed, append(args, "--grant", "/dev/zero")...); !strings.Contains(r.err, "octets") {
			t.Errorf("approvals without end: %s", r.err)
		}
	})

	t.Run("a backup is opened by its custodians and by nobody else", func(t *testing.T) {
		bundle, shares, request := filepath.Join(dir, "b"), filepath.Join(dir, "shares"), filepath.Join(dir, "backup.json")
		l.object(exitOK, l.proposing("hsm", "backup", "--custodians", "3", "--threshold", "2", "--shares", shares, "--out", bundle, "--request-out", request)...)
		l.approve(request)
		l.run(exitUsage, "hsm", "backup", "--custodians", "3", "--threshold", "2", "--shares", shares, "--out", bundle, "--grant", request)
		made := l.object(exitOK, "hsm", "backup", "--recipient", bundle+".recipient", "--out", bundle, "--grant", request)["result"].(map[string]any)
		if made["keys"] != 2.0 || made["threshold"] != 2.0 {
			t.Errorf("%v", made)
		}
		for _, bad := range [][]string{
			{"--custodians", "-1", "--threshold", "2", "--shares", shares, "--out", dir + "/no"},
			{"--custodians", "3", "--threshold", "4", "--shares", shares, "--out", dir + "/no"},
			{"--custodians", "3", "--threshold", "2", "--shares", "", "--out", dir + "/no"},
			{"--custodians", "3", "--threshold", "2", "--shares", shares, "--out", ""},
		} {
			l.run(exitUsage, append([]string{"hsm", "backup", "--dry-run"}, bad...)...)
		}
		orphans := filepath.Join(dir, "orphans")
		l.run(exitFailed, l.proposing("hsm", "backup", "--custodians", "3", "--threshold", "2", "--shares", orphans, "--out", dir+"/no/b", "--request-out", dir+"/no.json")...)
		if left, err := filepath.Glob(orphans + "/*"); err != nil || len(left) > 0 {
			t.Errorf("shares of a recipient that could not be written: %v, %v", left, err)
		}
		files, err := filepath.Glob(shares + "/*.share")
		if err != nil || len(files) != 3 {
			t.Fatalf("%v, %v", files, err)
		}
		for _, f := range append(files, bundle) {
			if st, err := os.Stat(f); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", f, st.Mode(), err)
			}
		}
		check := []string{"hsm", "restore", "--check", "--bundle", bundle, "--share", files[2]}
		if r := l.run(exitFailed, check...); !strings.Contains(r.err, "2 are needed") {
			t.Errorf("with one share: %s", r.err)
		}
		if got := l.object(exitOK, append(check, "--share", files[0])...); got["digest"] != made["digest"] || len(got["keys"].([]any)) != 2 {
			t.Errorf("%v", got)
		}
		l.run(exitFailed, "hsm", "backup", "--recipient", bundle+".recipient", "--out", bundle, "--grant", request) // it is there already
	})

	t.Run("a policy is changed field by field", func(t *testing.T) {
		for _, bad := range []string{"colour=red", "prefer", "prefer=mine", "min_copies=1", "min_copies=0", "destroy_after=0s", "destroy_after=soon", "prefer=priority"} {
			l.run(exitUsage, "hsm", "policy", "--set", bad)
		}
		l.run(exitOK, "hsm", "policy", "--set", "prefer=priority", "--set", "sites=here,there", "--set", "destroy_after=48h")
		if r := l.run(exitOK, "hsm", "policy"); !strings.Contains(r.out, "here,there") || !strings.Contains(r.out, "48h0m0s") {
			t.Errorf("%s", r.out)
		}
	})

	t.Run("an identity that could use keys is refused", func(t *testing.T) {
		config := l.configFor(identity.RoleCA, "ca1", "    - {name: hsmd-a, address: \"127.0.0.1:1\"}\n")
		if r := pkictl(t, "hsm", "verify", "--config", config); r.code != exitFailed || !strings.Contains(r.err, "role sync") {
			t.Errorf("exit %d: %s", r.code, r.err)
		}
	})

	t.Run("what is not well is said", func(t *testing.T) {
		m := l.Member("hsmd-x")
		if r := l.run(exitFailed, "hsm", "enroll", "hsmd-x", "--address", m.Addr, "--dry-run"); !strings.Contains(r.err, m.Addr) {
			t.Errorf("nobody listens there: %s", r.err)
		}
		for _, verb := range []string{"drain", "recover", "standby", "promote", "remove", "replace"} {
			if r := l.run(exitFailed, "hsm", verb, "hsmd-z"); !strings.Contains(r.err, "hsmd-a, hsmd-b, hsmd-c") {
				t.Errorf("%s of nobody: %s", verb, r.err)
			}
		}
		l.run(exitOK, "hsm", "drain", "hsmd-b", "--why", "a test")
		status := l.object(exitFailed, "hsm", "status")
		if b := first(status["groups"])["members"].([]any)[1].(map[string]any); b["state"] != "drained" {
			t.Errorf("%v", b)
		}
		l.run(exitOK, "hsm", "recover", "hsmd-b")
		l.run(exitOK, "hsm", "status")
	})
}

// proposing adds who proposes: somebody who approves nothing.
func (l *groupLab) proposing(args ...string) []string {
	f := l.Files(identity.RoleSRE, "sam")
	return append(slices.Clone(args), "--cert", f.Cert, "--key-file", f.Key, "--trust", f.Trust)
}
