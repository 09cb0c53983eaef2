// Package dbtest runs a real Galera cluster for tests, on loopback addresses of the test's own.
package dbtest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"trivet/db"
	"trivet/ops/galera"
)

// Cluster is a running cluster. Its methods are safe for concurrent use, but one node is for one test at a time.
type Cluster struct {
	Nodes []galera.Node

	dir      string
	password string // file
	count    atomic.Int64

	mu     sync.Mutex
	procs  []*process
	launch chan func()

	stopGuards context.CancelFunc
	guards     sync.WaitGroup
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has been reaped
}

const admin = "dbtest"

// Main runs a package's tests with a cluster of n nodes at prefix.1, prefix.2, …, where prefix is three
// octets of 127/8, and returns the exit code. use receives the cluster before the tests run. Where
// MariaDB is not installed it receives nil, unless CI is true: then the tests fail. Fuzzing runs the program many times over and needs no database: it gets none.
func Main(m *testing.M, prefix string, n int, use func(*Cluster)) int {
	flag.Parse()
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if v := flag.Lookup(name).Value.String(); v != "" && v != "false" {
			return m.Run()
		}
	}
	if err := galera.Installed(); err != nil {
		if os.Getenv("CI") == "true" {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Fprintln(os.Stderr, "tests that need a database are skipped:", err)
		use(nil)
		return m.Run()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	c, err := Start(ctx, prefix, n)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	use(c)
	code := m.Run()
	c.Stop(code != 0)
	return code
}

// Start starts a cluster; stop it with Stop. The processes also die with this one.
func Start(ctx context.Context, prefix string, n int) (_ *Cluster, err error) {
	// Not under t.TempDir: user mysql must be able to reach it.
	dir, err := os.MkdirTemp("", "trivet-db")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, password: filepath.Join(dir, "password"), procs: make([]*process, n), launch: make(chan func())}
	// A process started with Pdeathsig dies with the thread that started it: keep one for that.
	go func() {
		runtime.LockOSThread()
		for f := range c.launch {
			f()
		}
	}()
	defer func() {
		if err != nil {
			c.Stop(true)
		}
	}()
	if err := os.WriteFile(c.password, []byte("test\n"), 0o600); err != nil {
		return nil, err
	}
	guard, stop := context.WithCancel(context.Background())
	c.stopGuards = stop
	var peers []string
	for i := range n {
		peers = append(peers, fmt.Sprintf("%s.%d", prefix, i+1))
	}
	for i, address := range peers {
		name := fmt.Sprintf("db%d", i+1)
		c.Nodes = append(c.Nodes, galera.Node{Name: name, Address: address, Dir: filepath.Join(dir, name), Peers: peers, Cluster: "dbtest-" + prefix})
	}
	if _, err := galera.Found(ctx, c.Nodes, func(ctx context.Context, n galera.Node) error { return galera.Secure(ctx, n) }); err != nil {
		return nil, err
	}
	for i := range c.Nodes {
		if err := c.start(ctx, i, i == 0); err != nil {
			return nil, err
		}
	}
	for i, n := range c.Nodes {
		again := func() {
			c.Kill(i)
			if err := c.start(guard, i, false); err != nil && guard.Err() == nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
		c.guards.Go(func() { galera.Guard(guard, n, slog.New(slog.NewTextHandler(os.Stderr, nil)), again) })
	}
	return c, nil
}

// Need skips the test when there is no cluster.
func (c *Cluster) Need(t testing.TB) *Cluster {
	t.Helper()
	if c == nil {
		t.Skip("needs MariaDB with Galera")
	}
	return c
}

// New returns the configuration of an empty, migrated database of the test's own, for an account that may do
// everything in it. Nodes are preferred in order; rotate the slice for another preference.
func (c *Cluster) New(t testing.TB) db.Config {
	t.Helper()
	cfg := c.Empty(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := db.Migrate(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// Empty is New without tables.
func (c *Cluster) Empty(t testing.TB) db.Config {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cfg := db.Config{Name: fmt.Sprintf("test%d", c.count.Add(1)), User: admin, PasswordFile: c.password, Role: "test"}
	if err := galera.CreateAccount(ctx, c.Nodes[0], cfg.Name, admin, "test"); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		cfg.Nodes = append(cfg.Nodes, n.SQL())
	}
	return cfg
}

// Open opens a store, runs its probes, waits until every node is healthy, and closes it with the test.
func Open(t testing.TB, cfg db.Config) *db.Store {
	t.Helper()
	s, err := db.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, s.Close()); err != nil {
			t.Error(err)
		}
	})
	Until(t, "every node is healthy", func() bool {
		for _, h := range s.Nodes() {
			if !h.Healthy {
				return false
			}
		}
		return true
	})
	return s
}

// Until waits for a condition and fails the test when it does not come true within half a minute. It looks ever less often: some conditions ask every node anew.
func Until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	pause := 2 * time.Millisecond
	for deadline := time.Now().Add(30 * time.Second); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(pause)
		pause = min(pause*5/4, 50*time.Millisecond)
	}
}

// Kill ends a node as power loss would.
func (c *Cluster) Kill(i int) {
	c.mu.Lock()
	p := c.procs[i]
	c.mu.Unlock()
	if p != nil {
		p.cmd.Process.Kill()
		<-p.done
	}
}

// End stops a node in good order: the others go on without it, even a single one.
func (c *Cluster) End(i int) {
	c.signal(i, syscall.SIGTERM)
	c.mu.Lock()
	p := c.procs[i]
	c.mu.Unlock()
	if p != nil {
		<-p.done
	}
}

// Freeze stops a node from running; Thaw lets it go on.
func (c *Cluster) Freeze(i int) { c.signal(i, syscall.SIGSTOP) }

// Thaw lets a frozen node go on.
func (c *Cluster) Thaw(i int) { c.signal(i, syscall.SIGCONT) }

func (c *Cluster) signal(i int, sig os.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.procs[i]; p != nil {
		p.cmd.Process.Signal(sig)
	}
}

// Restart starts a node that was killed and waits until it is synced.
func (c *Cluster) Restart(t testing.TB, i int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := c.start(ctx, i, false); err != nil {
		t.Fatal(err)
	}
}

// Tamper runs statements on a node that is down, by itself and outside of replication: its position stays what it was, its contents do
// not. It leaves the node down.
func (c *Cluster) Tamper(t testing.TB, i int, queries ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := c.start(ctx, i, false, "--wsrep-on=OFF", "--wsrep-provider=none", "--wsrep-cluster-address=", "--skip-log-bin", "--wsrep-mode=", "--skip-networking"); err != nil {
		t.Fatal(err)
	}
	for _, q := range queries {
		c.Exec(t, i, q)
	}
	c.End(i)
}

// Renew takes a node's data away, as operators are told to, and waits until it has fetched everything anew.
func (c *Cluster) Renew(t testing.TB, i int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c.End(i)
	if err := errors.Join(os.RemoveAll(c.Nodes[i].Data()), galera.Prepare(ctx, c.Nodes[i]), c.start(ctx, i, false)); err != nil {
		t.Fatal(err)
	}
}

// Whole waits until every node serves and sees all the others: a thawed node takes a while to
// notice that it was cast out, and joins again.
func (c *Cluster) Whole(t testing.TB) {
	t.Helper()
	Until(t, "the cluster is whole", func() bool {
		for _, n := range c.Nodes {
			if s, err := galera.Query(t.Context(), n); err != nil || !s.Serving() || s.Size != len(c.Nodes) {
				return false
			}
		}
		return true
	})
}

// Exec runs a statement on one node as its administrator.
func (c *Cluster) Exec(t testing.TB, i int, query string) {
	t.Helper()
	admin, err := galera.Admin(c.Nodes[i])
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	if _, err := admin.Exec(query); err != nil {
		t.Fatal(err)
	}
}

// Apply waits until a node has applied all that the others have committed before the call.
func (c *Cluster) Apply(t testing.TB, i int) {
	t.Helper()
	c.Exec(t, i, "SET STATEMENT wsrep_sync_wait = 1 FOR SELECT COUNT(*) FROM mysql.db")
}

// Log returns the path of a node's log.
func (c *Cluster) Log(i int) string { return filepath.Join(c.dir, c.Nodes[i].Name+".log") }

func (c *Cluster) start(ctx context.Context, i int, bootstrap bool, more ...string) error {
	n := c.Nodes[i]
	cmd, err := galera.Command(ctx, n, bootstrap)
	if err != nil {
		return err
	}
	cmd.Args = append(cmd.Args, more...) // the last one of an option counts
	log, err := os.OpenFile(c.Log(i), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	c.launch <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return fmt.Errorf("starting %s: %w", n.Name, err)
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	c.mu.Lock()
	c.procs[i] = p
	c.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		cmd.Wait()
		close(p.done)
		cancel()
	}()
	wait := galera.WaitSynced
	if len(more) > 0 {
		wait = answers
	}
	if err := wait(ctx, n); err != nil {
		return fmt.Errorf("starting %s: %w (see %s)", n.Name, err, c.Log(i))
	}
	return nil
}

// answers returns when the node runs statements.
func answers(ctx context.Context, n galera.Node) error {
	admin, err := galera.Admin(n)
	if err != nil {
		return err
	}
	defer admin.Close()
	for err = admin.PingContext(ctx); err != nil && ctx.Err() == nil; err = admin.PingContext(ctx) {
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// Stop ends every node and removes their data. With show the last lines of each log go to standard error.
func (c *Cluster) Stop(show bool) {
	if c.stopGuards != nil {
		c.stopGuards()
		c.guards.Wait()
	}
	for i := range c.procs {
		c.Thaw(i)
		c.Kill(i)
	}
	close(c.launch)
	if show {
		for i := range c.Nodes {
			b, _ := os.ReadFile(c.Log(i))
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			fmt.Fprintf(os.Stderr, "--- %s\n%s\n", c.Nodes[i].Name, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	}
	os.RemoveAll(c.dir)
}
