package cluster_test

import (
	"encoding/json"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"trivet/cluster"
)

func TestNetworkMustBeALoopbackBlock(t *testing.T) {
	for _, network := range []string{"10.0.0.0/16", "127.77.0.0/24", "127.77.0.1/16", "127.0.0.0/16", "127.0.0.0/8", "::1/128", "nonsense"} {
		if _, err := cluster.NewLayout(t.TempDir(), network); err == nil || !strings.Contains(err.Error(), "127.") {
			t.Errorf("network %s: error %v, want one that names a better block", network, err)
		}
	}
}

func TestTwoClustersShareNoAddressAndNoFile(t *testing.T) {
	a, err := cluster.NewLayout("/a", "127.95.0.0/16")
	if err != nil {
		t.Fatal(err)
	}
	b, err := cluster.NewLayout("/b", "127.96.0.0/16")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for _, l := range []cluster.Layout{a, b} {
		for _, p := range l.Parts() {
			for name, addr := range p.Addresses {
				if other, taken := seen[addr]; taken {
					t.Errorf("%s of %s and %s share %s", name, p.Name, other, addr)
				}
				seen[addr] = p.Name
				host, _, err := net.SplitHostPort(addr)
				if err != nil || !net.ParseIP(host).IsLoopback() {
					t.Errorf("%s of %s is not on loopback: %s", name, p.Name, addr)
				}
			}
			for _, file := range []string{p.Dir, p.Log} {
				if rel, err := filepath.Rel(l.Dir, file); err != nil || strings.HasPrefix(rel, "..") {
					t.Errorf("%s of %s is outside of %s", file, p.Name, l.Dir)
				}
			}
		}
	}
}

func TestDefaultDirectoryIsTheEnvironmentsOrTheUsers(t *testing.T) {
	t.Setenv("TRIVET_DEMO_DIR", "/somewhere/else")
	if got := cluster.DefaultDir(); got != "/somewhere/else" {
		t.Errorf("with TRIVET_DEMO_DIR set: %s", got)
	}
	t.Setenv("TRIVET_DEMO_DIR", "")
	if got := cluster.DefaultDir(); !strings.HasPrefix(got, "/var/tmp/trivet-demo") {
		t.Errorf("without TRIVET_DEMO_DIR: %s", got)
	}
}

func TestUnknownPartIsRefusedWithTheNamesOfAll(t *testing.T) {
	l, err := cluster.NewLayout("/a", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Part("ca9"); err == nil || !strings.Contains(err.Error(), "ca1") {
		t.Errorf("error %v, want one that lists the parts", err)
	}
}

// TestStatusHasTheNamesThatProgramsRelyOn pins the JSON of `pkictl demo status`: programs outside of this repository read it.
func TestStatusHasTheNamesThatProgramsRelyOn(t *testing.T) {
	l, err := cluster.NewLayout("/d", "127.95.0.0/16")
	if err != nil {
		t.Fatal(err)
	}
	st := cluster.Describe(l)
	st.CAs = append(st.CAs, cluster.CAStatus{})
	text, err := json.Marshal(st)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	names := func(v any) []string {
		var n []string
		for k := range v.(map[string]any) {
			n = append(n, k)
		}
		slices.Sort(n)
		return n
	}
	first := func(v any) any { return v.([]any)[0] }
	credentials := got["credentials"].(map[string]any)
	for _, c := range []struct {
		what string
		of   any
		want []string
	}{
		{"the whole", got, []string{"cas", "credentials", "database", "dir", "endpoints", "network", "processes", "state"}},
		{"endpoints", got["endpoints"], []string{"admin", "api", "public"}},
		{"credentials", credentials, []string{"admins", "auditor", "operators", "ra", "requester", "sre", "trust"}},
		{"an operator", first(credentials["operators"]), []string{"cert", "key"}},
		{"the auditor", credentials["auditor"], []string{"cert", "key"}},
		{"a CA", first(got["cas"]), []string{"certificate", "chain", "crl", "generation", "id", "ocsp"}},
		{"database", got["database"], []string{"name", "nodes", "password_file", "user"}},
		{"a process", first(got["processes"]), []string{"addresses", "dir", "log", "name", "pid", "role", "site", "state"}},
	} {
		if n := names(c.of); !slices.Equal(n, c.want) {
			t.Errorf("%s has %v, want %v", c.what, n, c.want)
		}
	}
	if st.State != cluster.Stopped {
		t.Errorf("state of what was never started: %s", st.State)
	}
	if n := len(st.Processes); n != 11 {
		t.Errorf("%d processes, want 11", n)
	}
	if n := len(st.Credentials.Operators) + len(st.Credentials.Admins); n != 4 {
		t.Errorf("%d operators and admins, want two of each", n)
	}
}
