package cluster_test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"trivet/cluster"
)

// workspace is a directory that user mysql can reach, which t.TempDir is not, gone after the test with everything that runs in it.
func workspace(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("TMPDIR"), "/var/tmp"), "trivet-cluster-test-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// binaries builds the programs. Without the tools of a cluster the test is skipped, except under CI.
func binaries(t *testing.T) string {
	t.Helper()
	for _, tool := range []string{"/usr/sbin/mariadbd", "/usr/lib/galera/libgalera_smm.so", "/usr/lib/softhsm/libsofthsm2.so", "/usr/bin/rsync"} {
		if _, err := os.Stat(tool); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%s is needed: %v", tool, err)
			}
			t.Skipf("%s is not installed", tool)
		}
	}
	bin := filepath.Join(t.TempDir(), "bin")
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/...")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the programs: %v\n%s", err, out)
	}
	return bin
}

type progress struct{ t *testing.T }

func (p progress) Write(b []byte) (int, error) {
	p.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func process(t *testing.T, c *cluster.Cluster, name string) cluster.Process {
	t.Helper()
	st, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range st.Processes {
		if p.Name == name {
			return p
		}
	}
	t.Fatalf("no process %s", name)
	return cluster.Process{}
}

// awaitProcess waits until the process is as ok wants it.
func awaitProcess(t *testing.T, c *cluster.Cluster, name string, ok func(cluster.Process) bool) cluster.Process {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		p := process(t, c, name)
		if ok(p) {
			return p
		}
		if time.Now().After(end) {
			t.Fatalf("%s stays as it is: %+v", name, p)
		}
	}
}

// nothingIsLeft checks that the cluster has no process, no listening address and, if gone, no file.
func nothingIsLeft(t *testing.T, l cluster.Layout, gone bool) {
	t.Helper()
	environ, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range environ {
		if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), "@"+l.Dir) {
			t.Errorf("process %s is left", file)
		}
	}
	for _, p := range l.Parts() {
		for _, addr := range p.Addresses {
			if c, err := net.Dial("tcp", addr); err == nil {
				_ = c.Close()
				t.Errorf("%s of %s still answers", addr, p.Name)
			}
		}
	}
	if _, err := os.Stat(l.Dir); gone && !os.IsNotExist(err) {
		t.Errorf("directory %s is left: %v", l.Dir, err)
	}
}

// TestClusterComesUpHealsAndLeavesNothing is the life of a cluster: up, up again, a part dying, a part killed, frozen and back, the supervisor
// itself killed, up with all databases down, and down.
func TestClusterComesUpHealsAndLeavesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a whole cluster twice")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	o := cluster.Options{Dir: filepath.Join(workspace(t), "demo"), Network: "127.96.0.0/16", Binaries: binaries(t), Progress: progress{t}}
	began := time.Now()
	c, err := cluster.Up(ctx, o)
	t.Cleanup(func() {
		if c, err := cluster.Open(o.Dir); err == nil {
			_ = c.Down()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("up after %s", time.Since(began))
	st, err := c.Status()
	if err != nil || st.State != cluster.Running || len(st.CAs) != 1 {
		t.Fatalf("after up: %+v, %v", st, err)
	}
	for _, file := range []string{st.CAs[0].Certificate, st.CAs[0].Chain, st.Credentials.Trust, st.Credentials.Requester.Key, st.Database.PasswordFile} {
		if _, err := os.Stat(file); err != nil {
			t.Error(err)
		}
	}

	t.Run("up again leaves it as it is", func(t *testing.T) {
		before := process(t, c, "ca1").PID
		if _, err := cluster.Up(ctx, o); err != nil {
			t.Fatal(err)
		}
		if after := process(t, c, "ca1").PID; after != before {
			t.Errorf("ca1 had pid %d and has %d", before, after)
		}
		o := o
		o.Network = "127.97.0.0/16"
		if _, err := cluster.Up(ctx, o); err == nil || !strings.Contains(err.Error(), "127.96.0.0/16") {
			t.Errorf("up on another network: %v", err)
		}
	})

	t.Run("a certificate lives its life", func(t *testing.T) {
		out, err := exec.CommandContext(ctx, filepath.Join(o.Binaries, "pkictl"), "demo", "try", "--dir", o.Dir, "--output", "json").Output()
		var trial struct{ OK bool }
		if jerr := json.Unmarshal(out, &trial); err != nil || jerr != nil || !trial.OK {
			t.Errorf("demo try: %v, %v: %s", err, jerr, out)
		}
	})

	t.Run("every process says it is well", func(t *testing.T) {
		// A CA node is ready when it issues; what it has heard of its HSM group's other keys may come a moment later.
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			out, err := exec.CommandContext(ctx, filepath.Join(o.Binaries, "pkictl"), "health", "--dir", o.Dir).CombinedOutput()
			if err == nil {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%v\n%s", err, out)
			}
		}
	})

	t.Run("parts that die come back and are ready", func(t *testing.T) {
		for _, name := range []string{"hsmd-b", "ca1", "lb1"} {
			old := process(t, c, name).PID
			if err := c.Crash(name); err != nil {
				t.Fatal(err)
			}
			awaitProcess(t, c, name, func(p cluster.Process) bool { return p.State == cluster.Running && p.PID != old })
			if err := c.AwaitReady(ctx, name); err != nil {
				t.Error(err)
			}
		}
	})

	t.Run("databases that all stopped in good order find together again", func(t *testing.T) {
		old := map[string]int{}
		for _, name := range []string{"db1", "db2", "db3"} {
			old[name] = process(t, c, name).PID
			if err := c.Signal(name, syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		for name, pid := range old {
			awaitProcess(t, c, name, func(p cluster.Process) bool { return p.State == cluster.Running && p.PID != pid })
			if err := c.AwaitReady(ctx, name); err != nil {
				t.Error(err)
			}
		}
	})

	t.Run("a killed part stays away until start", func(t *testing.T) {
		if err := c.Kill("ca2"); err != nil {
			t.Fatal(err)
		}
		st, err := c.Status()
		if err != nil || st.State != cluster.Degraded {
			t.Errorf("with ca2 killed the cluster is %s, %v", st.State, err)
		}
		if err := c.Start("ca2"); err != nil {
			t.Fatal(err)
		}
		if err := c.AwaitReady(ctx, "ca2"); err != nil {
			t.Error(err)
		}
	})

	t.Run("a frozen part goes on after thaw", func(t *testing.T) {
		if err := c.Freeze("ocsp1"); err != nil {
			t.Fatal(err)
		}
		awaitProcess(t, c, "ocsp1", func(p cluster.Process) bool { return p.State == cluster.Frozen })
		if err := c.Start("ocsp1"); err == nil || !strings.Contains(err.Error(), "thaw") {
			t.Errorf("starting a frozen part: %v", err)
		}
		if err := c.Thaw("ocsp1"); err != nil {
			t.Fatal(err)
		}
		awaitProcess(t, c, "ocsp1", func(p cluster.Process) bool { return p.State == cluster.Running })
		if err := c.AwaitReady(ctx, "ocsp1"); err != nil {
			t.Error(err)
		}
	})

	t.Run("an HSM member is added to the running cluster", func(t *testing.T) {
		if _, err := c.Layout().Part("hsmd-d"); err == nil {
			t.Fatal("it is there already")
		}
		for range 2 { // the second time there is nothing to do
			if err := c.Add(cluster.Added{Name: "hsmd-d"}); err != nil {
				t.Fatal(err)
			}
		}
		if p := process(t, c, "hsmd-d"); p.State != cluster.Running || p.Role != cluster.RoleHSMD {
			t.Errorf("%+v", p)
		}
		if err := c.Kill("hsmd-d"); err != nil {
			t.Error(err)
		}
		if err := c.Start("hsmd-d"); err != nil {
			t.Error(err)
		}
		if err := c.AwaitReady(ctx, "hsmd-d"); err != nil {
			t.Error(err)
		}
		if err := c.Remove("hsmd-a"); err == nil || !strings.Contains(err.Error(), "stays") {
			t.Errorf("removing a founder: %v", err)
		}
		if err := c.Add(cluster.Added{Name: "ca3"}); err == nil {
			t.Error("anything can be added")
		}
	})

	t.Run("parts die with a killed supervisor", func(t *testing.T) {
		var pid int
		processes, _ := filepath.Glob("/proc/[0-9]*/environ")
		for _, file := range processes {
			if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), "supervisor@"+o.Dir+"\x00") && !strings.Contains(string(text), "ca1@"+o.Dir) {
				_, _ = fmt.Sscanf(file, "/proc/%d/environ", &pid)
			}
		}
		if pid == 0 {
			t.Fatal("the supervisor was not found")
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			st, err := c.Status()
			if err == nil && st.State == cluster.Stopped {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("state is %s, %v", st.State, err)
			}
		}
	})

	t.Run("up again after everything died at once, with the supervisor in this process", func(t *testing.T) {
		o := o
		o.Attached = true
		again, err := cluster.Up(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		c = again
		if st, err := c.Status(); err != nil || st.State != cluster.Running {
			t.Errorf("%s, %v", st.State, err)
		}
		out, err := exec.CommandContext(ctx, filepath.Join(o.Binaries, "pkictl"), "cert", "list", "--dir", o.Dir, "--output", "json").Output()
		if err != nil || !strings.Contains(string(out), "superseded") {
			t.Errorf("the record lost the revoked certificate: %v: %s", err, out)
		}
	})

	t.Run("the added member came back with the others, is wiped, and goes without a trace", func(t *testing.T) {
		p := process(t, c, "hsmd-d")
		if p.State != cluster.Running {
			t.Errorf("%+v", p)
		}
		token := func() string {
			entries, err := os.ReadDir(filepath.Join(p.Dir, "tokens"))
			if err != nil || len(entries) != 1 {
				t.Fatalf("its token: %v, %v", entries, err)
			}
			return entries[0].Name()
		}
		before := token()
		if err := c.Wipe("hsmd-d"); err != nil {
			t.Fatal(err)
		}
		if after := token(); after == before {
			t.Errorf("token %s is still there", before)
		}
		if err := c.AwaitReady(ctx, "hsmd-d"); err != nil {
			t.Error(err)
		}
		if err := c.Wipe("ca1"); err == nil {
			t.Error("a CA node has no token to wipe")
		}
		if err := c.Remove("hsmd-d"); err != nil {
			t.Fatal(err)
		}
		left, err := filepath.Glob(filepath.Join(o.Dir, "*", "*hsmd-d*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		if st, err := c.Status(); err != nil || st.State != cluster.Running {
			t.Errorf("%s, %v", st.State, err)
		}
		if err := c.Kill("hsmd-d"); err == nil {
			t.Error("it can still be killed")
		}
	})

	if err := c.Down(); err != nil {
		t.Fatal(err)
	}
	nothingIsLeft(t, c.Layout(), true)
}
