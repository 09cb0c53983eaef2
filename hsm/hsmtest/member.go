package hsmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
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

// Member is one hsmd process on a token of its own.
type Member struct {
	lab             *Lab
	Name, Addr, Dir string
	// Config is the path of hsmd's configuration, PIN and SOPIN those of the PIN files.
	Config, PIN, SOPIN string
	store              store
	pin                string // the token's, whatever the file says
	tokens             int    // how many it had before this one
	log                *logBuffer
	cmd                *exec.Cmd
	exited             chan struct{}
}

// Serve initialises the token, starts the process and waits until it signs.
func (m *Member) Serve() *Member {
	m.lab.t.Helper()
	m.initOnce()
	m.Start()
	m.WaitReady()
	return m
}

// initOnce initialises the token, or takes the copy of one that was initialised and has served, which is much quicker: it has its RSA key.
func (m *Member) initOnce() {
	m.lab.t.Helper()
	pin, err := os.ReadFile(m.PIN)
	if err != nil {
		m.lab.t.Fatal(err)
	}
	dir := sharedDir(m.lab.t)
	if dir == "" || string(pin) != pinOf(m.Name)+"\n" {
		m.mustInit()
		return
	}
	shared.Lock()
	defer shared.Unlock()
	blank := filepath.Join(dir, "blank", m.store.kind(), fmt.Sprintf("%s-%d", m.Name, m.tokens))
	err = once(blank, func(at string) error {
		m.lab.makeBlank(m.Name, store{module: m.store.module, nss: m.store.nss}, at)
		return nil
	})
	if err != nil {
		m.lab.t.Fatalf("keeping a blank token for others called %s: %v", m.Name, err)
	}
	m.store.replace(m.lab.t, blank)
}

// makeBlank has an agent serve a new token once, in a place of its own, and keeps the token for all that are called so.
func (l *Lab) makeBlank(name string, s store, to string) {
	l.t.Helper()
	m := l.memberIn(filepath.Join(l.dir, "blanks", fmt.Sprint(l.next)), name, s, nil)
	m.mustInit()
	m.Start()
	m.WaitReady()
	m.Signal(syscall.SIGTERM)
	if code := m.Exit(); code != 0 {
		l.t.Fatalf("the agent of a blank token ended with %d\n%s", code, m.Log())
	}
	if err := os.CopyFS(to, os.DirFS(m.store.dir)); err != nil {
		l.t.Fatalf("keeping a blank token for others called %s: %v", name, err)
	}
}

func (m *Member) mustInit() {
	m.lab.t.Helper()
	if out, err := m.InitToken(); err != nil {
		m.lab.t.Fatalf("initialising the token of %s: %v\n%s", m.Name, err, out)
	}
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
	cmd.Env = append(os.Environ(), m.store.env...)
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

// Restart kills the process, starts it again and waits until it signs.
func (m *Member) Restart() hsm.Info {
	m.lab.t.Helper()
	m.Kill()
	m.Start()
	return m.WaitReady()
}

func (m *Member) running() bool {
	if m.cmd == nil {
		return false
	}
	select {
	case <-m.exited:
		return false
	default:
		return true
	}
}

// Ended tells whether the process has ended, or was never started.
func (m *Member) Ended() bool { return !m.running() }

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

// Join gives m the domain key that source holds, as people approved for the group "lab".
func (m *Member) Join(source *Member) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	from, to := source.Client(identity.RoleSync), m.Client(identity.RoleSync)
	transport, err := to.TransportKey(ctx)
	if err != nil {
		return err
	}
	print, member, err := agent.TransportFingerprint(m.lab.Identity(identity.RoleSync, "sync1"), transport, time.Now())
	if err != nil {
		return err
	}
	wrapped, kek, err := from.ExportDomain(ctx, hsm.DomainRequest{
		Group: "lab", Recipient: transport, Grant: m.lab.Approved("hsm-enroll", "lab/"+member, map[string]string{"transport": print}),
	})
	if err != nil {
		return err
	}
	return to.ImportDomain(ctx, kek, wrapped)
}

// Contract is the member as the conformance suite takes it. The ceremony may manage keys and sign with CA keys, so the whole
// suite runs as that one role.
func (m *Member) Contract() Contract {
	return Contract{
		Token: m.Client(identity.RoleCeremony), Member: m.Name,
		Grant: func(t *testing.T, action, object string, detail map[string]string) []byte {
			t.Helper()
			return m.lab.Approved(action, object, detail)
		},
		SPKI: func(t *testing.T, transport []byte) []byte {
			t.Helper()
			var attested struct{ SPKI []byte }
			if err := json.Unmarshal(transport, &attested); err != nil {
				t.Fatalf("reading the transport key of %s: %v", m.Name, err)
			}
			return attested.SPKI
		},
	}
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
