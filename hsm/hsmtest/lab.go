package hsmtest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"trivet/identity"
)

// shared is what the labs of one test binary have in common: the built hsmd, compiled modules, and tokens already
// initialised, by kind and name. It is made when a lab first needs it, since a fuzzing worker is killed without ceremony.
// Whoever runs several test binaries may name a directory of his in HSMTEST_SHARED for all of them; he removes it.
var shared struct {
	sync.Mutex
	on  bool
	dir string
	err error
	one sync.Once
}

// sharedDir is empty where nothing is shared.
func sharedDir(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv("HSMTEST_SHARED"); dir != "" {
		return dir
	}
	if !shared.on {
		return ""
	}
	shared.one.Do(func() { shared.dir, shared.err = os.MkdirTemp("", "hsmtest") })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.dir
}

// building is held while something is compiled.
var building sync.Mutex

// once makes a file or directory unless it is there, and never shows it half made: other processes may want it, too.
func once(path string, create func(at string) error) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	at, err := os.MkdirTemp(filepath.Dir(path), "making")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(at) }()
	made := filepath.Join(at, filepath.Base(path))
	if err := create(made); err != nil {
		return err
	}
	if err := os.Rename(made, path); err != nil {
		if _, there := os.Stat(path); there != nil {
			return err
		}
	}
	return nil
}

// Main runs a package's tests with a shared hsmd and shared blank tokens, which saves seconds per test:
//
//	func TestMain(m *testing.M) { os.Exit(hsmtest.Main(m)) }
func Main(m *testing.M) int {
	shared.on = true
	defer func() {
		if shared.dir != "" {
			_ = os.RemoveAll(shared.dir)
		}
	}()
	return m.Run()
}

// Lab is one cluster's infrastructure CA and a built hsmd. Everything in it ends with the test.
type Lab struct {
	t         testing.TB
	module    string // SoftHSM
	binary    string
	authority *identity.Authority
	dir       string
	next      int
}

// NewLab builds hsmd and makes an infrastructure CA for a cluster called "lab".
func NewLab(t testing.TB) *Lab {
	t.Helper()
	l := &Lab{t: t, module: Module(t), dir: t.TempDir()}
	building.Lock()
	defer building.Unlock()
	l.binary = filepath.Join(cmp.Or(sharedDir(t), l.dir), "hsmd")
	err := once(l.binary, func(at string) error {
		out, err := exec.Command("go", "build", "-o", at, "trivet/cmd/hsmd").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("building hsmd: %v", err)
	}
	if l.authority, err = identity.CreateAuthority(filepath.Join(l.dir, "authority"), "lab"); err != nil {
		t.Fatal(err)
	}
	return l
}

// Identity is a fresh identity of that role and name.
func (l *Lab) Identity(role identity.Role, name string) *identity.Identity {
	l.t.Helper()
	id, err := identity.Load(l.files(role, name))
	if err != nil {
		l.t.Fatal(err)
	}
	return id
}

// Files is a fresh identity of that role and name, for another process.
func (l *Lab) Files(role identity.Role, name string) identity.Files {
	l.t.Helper()
	return l.files(role, name)
}

func (l *Lab) files(role identity.Role, name string) identity.Files {
	l.t.Helper()
	f, err := l.authority.IssueTo(filepath.Join(l.dir, string(role)+"-"+name), identity.Principal{Cluster: "lab", Role: role, Name: name}, nil, nil, time.Hour)
	if err != nil {
		l.t.Fatal(err)
	}
	return f
}

// Grant is what one person of the lab proposed and two others, an admin and a CA operator, approved.
func (l *Lab) Grant(action, object string, detail map[string]string) identity.Grant {
	l.t.Helper()
	now := time.Now()
	g, err := l.Identity(identity.RoleSRE, "sam").Propose(action, object, detail, now, time.Hour)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, p := range []*identity.Identity{l.Identity(identity.RoleAdmin, "alice"), l.Identity(identity.RoleCAOperator, "bob")} {
		a, err := p.Approve(g.Request, now)
		if err != nil {
			l.t.Fatal(err)
		}
		g.Approvals = append(g.Approvals, a)
	}
	return g
}

// Approved is Grant as agents take it.
func (l *Lab) Approved(action, object string, detail map[string]string) []byte {
	l.t.Helper()
	text, err := json.Marshal(l.Grant(action, object, detail))
	if err != nil {
		l.t.Fatal(err)
	}
	return text
}

// Member lays out a SoftHSM token and an agent for it; neither is initialised nor started. Extra lines are added to its
// configuration.
func (l *Lab) Member(name string, extra ...string) *Member {
	l.t.Helper()
	return l.member(name, store{module: l.module}, extra)
}

// NSS is Member on NSS's software token.
func (l *Lab) NSS(name string, extra ...string) *Member {
	l.t.Helper()
	return l.member(name, store{module: NSS(l.t), nss: true}, extra)
}

// Faulty is Member on a SoftHSM module with faults on demand.
func (l *Lab) Faulty(name string, extra ...string) (*Member, Faults) {
	l.t.Helper()
	return l.faulty(name, store{module: l.module}, extra)
}

// FaultyNSS is Faulty on NSS's software token.
func (l *Lab) FaultyNSS(name string, extra ...string) (*Member, Faults) {
	l.t.Helper()
	return l.faulty(name, store{module: NSS(l.t), nss: true}, extra)
}

func (l *Lab) faulty(name string, s store, extra []string) (*Member, Faults) {
	l.t.Helper()
	dir := filepath.Join(l.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
	var faults Faults
	s.loaded, s.env, faults = FaultyModule(l.t, dir, s.module)
	return l.member(name, s, extra), faults
}

func (l *Lab) member(name string, s store, extra []string) *Member {
	l.t.Helper()
	return l.memberIn(filepath.Join(l.dir, name), name, s, extra)
}

func pinOf(name string) string { return "pin-of-" + name }

func (l *Lab) memberIn(dir, name string, s store, extra []string) *Member {
	l.t.Helper()
	l.next++
	m := &Member{lab: l, Name: name, Dir: dir, Addr: l.freeAddr(), store: s, pin: pinOf(name), log: &logBuffer{}}
	m.store.layOut(l.t, m.Dir)
	m.PIN, m.SOPIN, m.Config = filepath.Join(m.Dir, "pin"), filepath.Join(m.Dir, "so-pin"), filepath.Join(m.Dir, "hsmd.yaml")
	Write(l.t, m.PIN, m.pin+"\n")
	Write(l.t, m.SOPIN, "so-pin-of-"+name+"\n")
	f := l.files(identity.RoleHSMD, name)
	config := fmt.Sprintf("cluster: lab\nnode: %s\nidentity: {cert: %s, key: %s, trust: %s}\nlisten: %s\nmodule: %s\ntoken: %s\npin_file: %s\nso_pin_file: %s\n",
		name, f.Cert, f.Key, f.Trust, m.Addr, cmp.Or(s.loaded, s.module), name, m.PIN, m.SOPIN)
	for _, line := range append(m.store.config(), extra...) {
		config += line + "\n"
	}
	Write(l.t, m.Config, config)
	l.t.Cleanup(m.Kill)
	l.t.Cleanup(func() {
		if l.t.Failed() {
			l.t.Logf("log of %s:\n%s", name, m.log.tail(4000))
		}
	})
	return m
}

// Start is Member, initialised and serving.
func (l *Lab) Start(name string, extra ...string) *Member {
	l.t.Helper()
	return l.Member(name, extra...).Serve()
}

// freeAddr is a loopback address of this process and member alone.
func (l *Lab) freeAddr() string {
	l.t.Helper()
	n := l.listen()
	defer n.Close()
	return n.Addr().String()
}

func (l *Lab) listen() net.Listener {
	l.t.Helper()
	for try := range 50 {
		if n, err := net.Listen("tcp", fmt.Sprintf("127.91.%d.%d:0", (os.Getpid()+try)%250+1, l.next)); err == nil {
			return n
		}
	}
	l.t.Fatal("no loopback address is free")
	return nil
}
