package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"trivet/health"
	"trivet/identity"
)

func TestMain(m *testing.M) {
	if os.Getenv("LB_TEST_RUN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type setup struct {
	t         *testing.T
	authority *identity.Authority
	dir       string
	config    string
	listen    [3]string
	alice     *identity.Identity
}

func newSetup(t *testing.T) *setup {
	s := &setup{t: t, dir: t.TempDir()}
	var err error
	if s.authority, err = identity.CreateAuthority(filepath.Join(s.dir, "infra"), "test"); err != nil {
		t.Fatal(err)
	}
	s.alice = s.identity(identity.RoleRequester, "alice")
	s.identity(identity.RoleLB, "lb1")
	for i := range s.listen { // free ports, to be taken by the process
		l, err := net.Listen("tcp", "127.94.6.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.listen[i] = l.Addr().String()
		l.Close()
	}
	s.config = filepath.Join(s.dir, "lb1.yaml")
	return s
}

func (s *setup) identity(role identity.Role, name string) *identity.Identity {
	f, err := s.authority.IssueTo(filepath.Join(s.dir, name), identity.Principal{Cluster: "test", Role: role, Name: name}, nil, nil, time.Hour)
	if err != nil {
		s.t.Fatal(err)
	}
	id, err := identity.Load(f)
	if err != nil {
		s.t.Fatal(err)
	}
	return id
}

func (s *setup) write(extra string, nodes ...string) {
	text := fmt.Sprintf("cluster: test\nnode: lb1\nidentity: {cert: %[1]s/lb1/cert.pem, key: %[1]s/lb1/key.pem, trust: %[1]s/lb1/trust.pem}\nlisteners:\n  api: %s\n  public: %s\n  status: %s\nnodes:\n",
		s.dir, s.listen[0], s.listen[1], s.listen[2])
	for i, n := range nodes {
		text += fmt.Sprintf("  - {name: ca%d, role: ca, address: %s}\n", i+1, n)
	}
	if err := os.WriteFile(s.config, []byte(text+extra), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// node starts a CA node that answers with its name once hold lets it.
func (s *setup) node(name string, hold <-chan struct{}, entered chan<- struct{}) string {
	s.t.Helper()
	report := health.Handler(func() health.Report {
		return health.Report{Node: name, State: health.OK, Capabilities: map[string]health.Capability{"read": {OK: true}}}
	})
	mux := http.NewServeMux()
	mux.Handle("/", report)
	mux.HandleFunc("/v1/", func(w http.ResponseWriter, r *http.Request) {
		if hold != nil && r.URL.RawQuery == "hold" {
			entered <- struct{}{}
			<-hold
		}
		io.WriteString(w, name)
	})
	l, err := net.Listen("tcp", "127.94.7.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	go srv.Serve(tls.NewListener(l, s.identity(identity.RoleCA, name).ServerTLS()))
	s.t.Cleanup(func() { srv.Close() })
	return l.Addr().String()
}

// process is a running lb and its log.
type process struct {
	cmd  *exec.Cmd
	logs chan map[string]any
}

func (s *setup) start(args ...string) *process {
	s.t.Helper()
	p := &process{cmd: exec.Command(os.Args[0], args...), logs: make(chan map[string]any, 1000)}
	p.cmd.Env = append(os.Environ(), "LB_TEST_RUN=1")
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := p.cmd.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { p.cmd.Process.Kill() })
	go func() {
		defer close(p.logs)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			entry := map[string]any{"line": lines.Text()}
			json.Unmarshal(lines.Bytes(), &entry)
			p.logs <- entry
		}
	}()
	return p
}

// logged waits for a log entry with the message.
func (p *process) logged(t *testing.T, msg string) map[string]any {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		select {
		case e, ok := <-p.logs:
			if !ok {
				t.Fatalf("ended without %q", msg)
			}
			if e["msg"] == msg {
				return e
			}
		case <-limit:
			t.Fatalf("never logged %q", msg)
		}
	}
}

func (s *setup) get(path string) (int, string, error) {
	tr := &http.Transport{TLSClientConfig: s.alice.ClientTLS(identity.RoleLB), DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Get("https://" + s.listen[0] + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func TestServesReloadsAndDrains(t *testing.T) {
	s := newSetup(t)
	hold, entered := make(chan struct{}), make(chan struct{}, 1)
	one, two := s.node("ca1", hold, entered), s.node("ca2", nil, nil)
	s.write("", one)
	p := s.start("--config", s.config)
	p.logged(t, "serving")
	if status, body, err := s.get("/v1/cas"); status != 200 || body != "ca1" {
		t.Fatal(status, body, err)
	}

	s.write("", two, two)
	p.cmd.Process.Signal(syscall.SIGHUP)
	if e := p.logged(t, "not reloaded"); !strings.Contains(fmt.Sprint(e["err"]), "used twice") {
		t.Error(e)
	}
	s.write("unknown: 1\n", two)
	p.cmd.Process.Signal(syscall.SIGHUP)
	if e := p.logged(t, "not reloaded"); !strings.Contains(fmt.Sprint(e["err"]), "unknown") {
		t.Error(e)
	}
	if status, body, err := s.get("/v1/cas"); status != 200 || body != "ca1" {
		t.Fatal("the old list should be in use:", status, body, err)
	}
	s.write("", one, two)
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.logged(t, "reloaded")

	// A request under way is finished; a new one is refused.
	s.write("", one)
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.logged(t, "reloaded")
	answer := make(chan string)
	go func() {
		status, body, err := s.get("/v1/cas?hold")
		answer <- fmt.Sprint(status, " ", body, " ", err)
	}()
	<-entered
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.logged(t, "draining")
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if c, err := net.Dial("tcp", s.listen[0]); err != nil {
			break
		} else {
			c.Close()
		}
		if time.Now().After(end) {
			t.Fatal("still listening")
		}
	}
	close(hold)
	if got := <-answer; got != "200 ca1 <nil>" {
		t.Error("request under way:", got)
	}
	for range p.logs { // until the process closes its end
	}
	if err := p.cmd.Wait(); err != nil {
		t.Error("exit:", err)
	}
}

func TestBadConfigurationIsRefusedWithItsReason(t *testing.T) {
	s := newSetup(t)
	for name, c := range map[string]struct {
		write func()
		args  []string
		want  string
		code  int
	}{
		"valid":         {func() { s.write("", "127.94.7.1:1") }, nil, "", 0},
		"unknown field": {func() { s.write("colour: red\n", "127.94.7.1:1") }, nil, "colour", 1},
		"no nodes":      {func() { s.write("") }, nil, "no nodes", 1},
		"bad address":   {func() { s.write("", "127.94.7.1") }, nil, "want host:port", 1},
		"bad delay":     {func() { s.write("drain_delay: 2h\n", "127.94.7.1:1") }, nil, "drain_delay", 1},
		"other name": {func() {
			s.write("", "127.94.7.1:1")
			b, _ := os.ReadFile(s.config)
			os.WriteFile(s.config, bytes.Replace(b, []byte("node: lb1"), []byte("node: lb2"), 1), 0o600)
		}, nil, "the configuration is of trivet://test/lb/lb2", 1},
		"no file":  {func() {}, []string{"--check", "--config", "/nonexistent.yaml"}, "no such file", 1},
		"no flag":  {func() {}, []string{}, "Usage", 2},
		"bad flag": {func() {}, []string{"--colour"}, "colour", 2},
	} {
		t.Run(name, func(t *testing.T) {
			c.write()
			args := c.args
			if args == nil {
				args = []string{"--check", "--config", s.config}
			}
			cmd := exec.Command(os.Args[0], args...)
			cmd.Env = append(os.Environ(), "LB_TEST_RUN=1")
			out, _ := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() != c.code || !strings.Contains(string(out), c.want) {
				t.Errorf("exit %d, %s", cmd.ProcessState.ExitCode(), out)
			}
		})
	}
}
