package hsmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	_ "embed"
)

// Module is where the SoftHSM module is; it skips the test where it is not, or fails it when CI=true.
func Module(t testing.TB) string {
	t.Helper()
	for _, path := range []string{os.Getenv("SOFTHSM2_MODULE"), "/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm.so"} {
		if _, err := os.Stat(path); path != "" && err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("SoftHSM is missing: install softhsm2")
	}
	t.Skip("SoftHSM is missing: install softhsm2")
	return ""
}

// SoftHSM makes an empty token directory with its configuration below dir and returns the value for SOFTHSM2_CONF.
func SoftHSM(t testing.TB, dir string) string {
	t.Helper()
	tokens, conf := filepath.Join(dir, "tokens"), filepath.Join(dir, "softhsm2.conf")
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	Write(t, conf, "directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n")
	return conf
}

// Write writes a file of mode 0600.
func Write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// store is where a member's token lives: a directory of SoftHSM's or of NSS's.
type store struct {
	module string // the real one
	loaded string // what the agent loads instead; empty: the real one
	nss    bool
	dir    string
	env    []string
}

func (s *store) layOut(t testing.TB, below string) {
	t.Helper()
	s.dir = filepath.Join(below, "tokens")
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if !s.nss {
		s.env = append(s.env, "SOFTHSM2_CONF="+SoftHSM(t, below))
	}
}

// config is what the agent must be told beside the module's path.
func (s *store) config() []string {
	if s.nss {
		return []string{"profile: nss", "token_dir: " + s.dir, "test: true"}
	}
	return nil
}

// kind tells apart tokens that cannot take each other's place.
func (s *store) kind() string {
	if s.nss {
		return "nss"
	}
	return "softhsm"
}

// replace makes content the token's directory; empty is a blank token.
func (s *store) replace(t testing.TB, content string) {
	t.Helper()
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if content != "" {
		if err := os.CopyFS(s.dir, os.DirFS(content)); err != nil {
			t.Fatal(err)
		}
	}
}

// Snapshot is a copy of a token's directory.
type Snapshot string

// Snapshot copies the token as it is on disk. A running member stands still meanwhile; let it have nothing half done.
func (m *Member) Snapshot() Snapshot {
	m.lab.t.Helper()
	if m.running() {
		m.Freeze()
		defer m.Thaw()
	}
	dir, err := os.MkdirTemp(m.lab.dir, m.Name+"-snapshot")
	if err == nil {
		err = os.CopyFS(dir, os.DirFS(m.store.dir))
	}
	if err != nil {
		m.lab.t.Fatalf("copying the token of %s: %v", m.Name, err)
	}
	return Snapshot(dir)
}

// Restore kills the member and puts back a token as it was; what the agent itself remembers stays. The member is not started.
func (m *Member) Restore(s Snapshot) {
	m.lab.t.Helper()
	m.Kill()
	m.store.replace(m.lab.t, string(s))
}

// Wipe kills the member and makes its token a new one of the same label; what the agent itself remembers stays. The member
// is not started.
func (m *Member) Wipe() {
	m.lab.t.Helper()
	m.Kill()
	m.store.replace(m.lab.t, "")
	m.tokens++
	m.initOnce()
}

// Replace is another machine in the member's place, with a token of its own and nothing to remember. The member is not started.
func (m *Member) Replace() {
	m.lab.t.Helper()
	m.Kill()
	for _, name := range []string{"audit", "state.json", "pin-refused.json"} {
		if err := os.RemoveAll(filepath.Join(m.Dir, name)); err != nil {
			m.lab.t.Fatal(err)
		}
	}
	m.Wipe()
}

//go:embed testdata/setpin.c
var setpinSource string

// ChangePIN gives the token another user PIN behind the agent's back: the PIN file has the old one. The agent, if it runs,
// stays logged in until it ends.
func (m *Member) ChangePIN(pin string) {
	m.lab.t.Helper()
	program := compiled(m.lab.t, m.lab.dir, "setpin", setpinSource)
	args := []string{m.store.module, m.Name, m.pin, pin}
	if m.store.nss {
		args = append(args, fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='secmod.db' flags='' dbTokenDescription='%s'", m.store.dir, m.Name))
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), m.store.env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		m.lab.t.Fatalf("changing the PIN of %s: %v\n%s", m.Name, err, out)
	}
	m.pin = pin
}
