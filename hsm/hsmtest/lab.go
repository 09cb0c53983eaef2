package hsmtest

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/identity"
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

// shared is what the labs of one test binary have in common: the built hsmd, and tokens already initialised, by name. An
// empty dir means that nothing is shared.
var shared struct {
	sync.Mutex
	dir string
}

// Main runs a package's tests with a shared hsmd and shared blank tokens, which saves seconds per test:
//
//	func TestMain(m *testing.M) { os.Exit(hsmtest.Main(m)) }
func Main(m *testing.M) int {
	dir, err := os.MkdirTemp("", "hsmtest")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	shared.dir = dir
	return m.Run()
}

// Lab is one cluster's infrastructure CA and a built hsmd. Everything in it ends with the test.
type Lab struct {
	t         testing.TB
	module    string
	binary    string
	authority *identity.Authority
	dir       string
	next      int
}

// NewLab builds hsmd and makes an infrastructure CA for a cluster called "lab".
func NewLab(t testing.TB) *Lab {
	t.Helper()
	l := &Lab{t: t, module: Module(t), dir: t.TempDir()}
	shared.Lock()
	defer shared.Unlock()
	l.binary = filepath.Join(cmp.Or(shared.dir, l.dir), "hsmd")
	if _, err := os.Stat(l.binary); err != nil {
		if out, err := exec.Command("go", "build", "-o", l.binary, "trivet/cmd/hsmd").CombinedOutput(); err != nil {
			t.Fatalf("building hsmd: %v\n%s", err, out)
		}
	}
	var err error
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

func (l *Lab) files(role identity.Role, name string) identity.Files {
	l.t.Helper()
	f, err := l.authority.IssueTo(filepath.Join(l.dir, string(role)+"-"+name), identity.Principal{Cluster: "lab", Role: role, Name: name}, nil, nil, time.Hour)
	if err != nil {
		l.t.Fatal(err)
	}
	return f
}

// Member is one hsmd process on a SoftHSM token of its own.
type Member struct {
	lab             *Lab
	Name, Addr, Dir string
	// Config is the path of hsmd's configuration, PIN and SOPIN those of the PIN files.
	Config, PIN, SOPIN string
	env                []string
	log                *logBuffer
	cmd                *exec.Cmd
	exited             chan struct{}
}

// Member lays out a token and an agent for it; neither is initialised nor started. Extra lines are added to its configuration.
func (l *Lab) Member(name string, extra ...string) *Member {
	l.t.Helper()
	return l.member(name, l.module, nil, extra)
}

// Faulty is Member on a faulty module.
func (l *Lab) Faulty(name string, extra ...string) (*Member, Faults) {
	l.t.Helper()
	dir := filepath.Join(l.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
	module, env, faults := FaultyModule(l.t, dir, l.module)
	return l.member(name, module, env, extra), faults
}

func (l *Lab) member(name, module string, env, extra []string) *Member {
	l.t.Helper()
	l.next++
	m := &Member{lab: l, Name: name, Dir: filepath.Join(l.dir, name), Addr: l.freeAddr(), env: env, log: &logBuffer{}}
	SoftHSM(l.t, m.Dir)
	m.PIN, m.SOPIN, m.Config = filepath.Join(m.Dir, "pin"), filepath.Join(m.Dir, "so-pin"), filepath.Join(m.Dir, "hsmd.yaml")
	Write(l.t, m.PIN, "pin-of-"+name+"\n")
	Write(l.t, m.SOPIN, "so-pin-of-"+name+"\n")
	f := l.files(identity.RoleHSMD, name)
	config := fmt.Sprintf("cluster: lab\nnode: %s\nidentity: {cert: %s, key: %s, trust: %s}\nlisten: %s\nmodule: %s\ntoken: %s\npin_file: %s\nso_pin_file: %s\n",
		name, f.Cert, f.Key, f.Trust, m.Addr, module, name, m.PIN, m.SOPIN)
	for _, line := range extra {
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

// Serve initialises the token, starts the process and waits until it signs.
func (m *Member) Serve() *Member {
	m.lab.t.Helper()
	shared.Lock()
	defer shared.Unlock()
	tokens, blank := filepath.Join(m.Dir, "tokens"), filepath.Join(shared.dir, "blank", m.Name)
	if _, err := os.Stat(blank); err == nil && shared.dir != "" {
		if err := os.CopyFS(tokens, os.DirFS(blank)); err != nil {
			m.lab.t.Fatalf("copying a blank token for %s: %v", m.Name, err)
		}
	} else {
		if out, err := m.InitToken(); err != nil {
			m.lab.t.Fatalf("initialising the token of %s: %v\n%s", m.Name, err, out)
		}
		if shared.dir != "" {
			if err := os.CopyFS(blank, os.DirFS(tokens)); err != nil {
				m.lab.t.Fatalf("keeping a blank token for others called %s: %v", m.Name, err)
			}
		}
	}
	m.Start()
	m.WaitReady()
	return m
}

// freeAddr is a loopback address of this process and member alone.
func (l *Lab) freeAddr() string {
	l.t.Helper()
	for try := range 50 {
		n, err := net.Listen("tcp", fmt.Sprintf("127.91.%d.%d:0", (os.Getpid()+try)%250+1, l.next))
		if err == nil {
			defer n.Close()
			return n.Addr().String()
		}
	}
	l.t.Fatal("no loopback address is free")
	return ""
}

// InitToken runs hsmd init-token and returns what it printed.
func (m *Member) InitToken() (string, error) {
	cmd := m.Command("init-token", "--config", m.Config)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Command is hsmd with those arguments and this member's environment, not started.
func (m *Member) Command(args ...string) *exec.Cmd {
	cmd := exec.Command(m.lab.binary, args...)
	cmd.Env = append(append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(m.Dir, "softhsm2.conf")), m.env...)
	return cmd
}

// Start starts the process and returns at once.
func (m *Member) Start() {
	m.lab.t.Helper()
	m.cmd = m.Command("--config", m.Config)
	m.cmd.Stderr = m.log
	// The kernel ends the child with this process, however it ends.
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := start(m.cmd); err != nil {
		m.lab.t.Fatalf("starting %s: %v", m.Name, err)
	}
	exited := make(chan struct{})
	m.exited = exited
	go func(cmd *exec.Cmd) { _ = cmd.Wait(); close(exited) }(m.cmd)
}

// starts runs on one thread that never ends, since Pdeathsig is sent when the thread that started the child ends.
var starts = sync.OnceValue(func() chan func() {
	c := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range c {
			f()
		}
	}()
	return c
})

func start(cmd *exec.Cmd) error {
	done := make(chan error)
	starts() <- func() { done <- cmd.Start() }
	return <-done
}

// WaitReady waits until the member signs.
func (m *Member) WaitReady() hsm.Info {
	m.lab.t.Helper()
	c := m.Client(identity.RoleSync)
	defer c.Close()
	for deadline := time.Now().Add(20 * time.Second); ; {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		info, err := c.Health(ctx)
		cancel()
		if err == nil && info.Probe.OK {
			return info
		}
		select {
		case <-m.exited:
			m.lab.t.Fatalf("%s ended: %v\n%s", m.Name, m.cmd.ProcessState, m.log.tail(4000))
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			m.lab.t.Fatalf("%s is not ready: %+v, %v\n%s", m.Name, info, err, m.log.tail(4000))
		}
	}
}

// Client is a client of that role. It is closed with the test.
func (m *Member) Client(role identity.Role) *agent.Client {
	m.lab.t.Helper()
	c := agent.NewClient(m.Name, m.Addr, m.lab.Identity(role, string(role)+"1"))
	m.lab.t.Cleanup(c.Close)
	return c
}

// Signal sends a signal: SIGKILL, SIGSTOP, SIGCONT, SIGTERM.
func (m *Member) Signal(s syscall.Signal) {
	if m.cmd != nil && m.cmd.Process != nil {
		_ = m.cmd.Process.Signal(s)
	}
}

// Freeze stops the process as SIGSTOP does, and returns when every thread of it stands still.
func (m *Member) Freeze() {
	m.lab.t.Helper()
	m.Signal(syscall.SIGSTOP)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", m.cmd.Process.Pid))
		if err != nil || len(stats) == 0 || time.Now().After(deadline) {
			m.lab.t.Fatalf("%s does not stand still: %v", m.Name, err)
		}
		still := true
		for _, stat := range stats {
			b, err := os.ReadFile(stat)
			_, state, _ := strings.Cut(string(b), ") ")
			still = still && (err != nil || strings.HasPrefix(state, "T")) // a thread that is gone is still
		}
		if still {
			return
		}
	}
}

// Thaw lets a frozen process go on.
func (m *Member) Thaw() { m.Signal(syscall.SIGCONT) }

// Kill kills the process and waits for its end.
func (m *Member) Kill() {
	if m.cmd != nil {
		m.Signal(syscall.SIGKILL)
		<-m.exited
	}
}

// Exit waits for the process's own end and returns its exit code.
func (m *Member) Exit() int {
	m.lab.t.Helper()
	select {
	case <-m.exited:
		return m.cmd.ProcessState.ExitCode()
	case <-time.After(20 * time.Second):
		m.lab.t.Fatalf("%s goes on running", m.Name)
		return -1
	}
}

// Log is everything the process has written so far, all its starts together.
func (m *Member) Log() string { return m.log.tail(1 << 30) }

// Join gives m the domain key that source holds.
func (m *Member) Join(source *Member) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	from, to := source.Client(identity.RoleSync), m.Client(identity.RoleSync)
	transport, err := to.TransportKey(ctx)
	if err != nil {
		return err
	}
	wrapped, kek, err := from.ExportDomain(ctx, transport)
	if err != nil {
		return err
	}
	return to.ImportDomain(ctx, kek, wrapped)
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) tail(n int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.b.String()
	return s[max(0, len(s)-n):]
}
