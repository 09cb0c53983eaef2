package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"trivet/cluster"
	"trivet/load"
)

// One fsync of a CA node's journal fails, the next would succeed: nobody knows what is on the disk, so the process ends, and another one reads what is.
// Clients notice nothing.
func TestAFailedFsyncEndsTheProcessAndLosesNothing(t *testing.T) {
	s := up(t)
	ca1 := s.process(t, "ca1")
	segments, err := filepath.Glob(filepath.Join(ca1.Dir, "*.journal"))
	if err != nil || len(segments) == 0 {
		t.Fatalf("no segment in %s: %v", ca1.Dir, err)
	}
	since := len(logOf(t, ca1))
	clients := s.keepIssuing(t, false)
	trace := tamper(t, ca1.PID, "-P", slices.Max(segments), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1")
	eventually(t, 20*time.Second, func() error {
		if p := s.process(t, "ca1"); p.State != cluster.Running || p.PID == ca1.PID {
			return fmt.Errorf("ca1 is %s with pid %d, and had %d\n%s", p.State, p.PID, ca1.PID, trace.said(t))
		}
		return nil
	})
	if got := trace.said(t); !bytes.Contains(got, []byte("EIO (Input/output error) (INJECTED)")) {
		t.Fatalf("no fsync failed:\n%s", got)
	}
	s.logged(t, ca1, since, "the journal has failed", "input/output error")
	s.allWell(t)
	issues(t, s.directly(t, "ca1", &load.Recorder{}), 1)
	clients.more(t)
	clients.end(t, s)
	s.fsck(t)
}

// tampering is strace between a process and its kernel.
type tampering struct {
	cmd *exec.Cmd
	out string
}

// tamper runs strace on the process with args until the test, or the process, ends; it returns when strace has it in hand.
func tamper(t *testing.T, pid int, args ...string) *tampering {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("strace is missing; run ops/install.sh test")
		}
		t.Skip("strace is missing; run ops/install.sh test")
	}
	x := &tampering{out: filepath.Join(t.TempDir(), "strace")}
	var stderr bytes.Buffer
	x.cmd = exec.Command(strace, append([]string{"-f", "-o", x.out, "-p", strconv.Itoa(pid)}, args...)...)
	x.cmd.Stderr = &stderr
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.end(t) })
	eventually(t, 10*time.Second, func() error {
		switch tracer, err := tracer(pid); {
		case tracer == x.cmd.Process.Pid:
			return nil
		case errors.Is(err, os.ErrNotExist):
			return nil // it has done its work
		case x.cmd.Process.Signal(syscall.Signal(0)) != nil:
			return fmt.Errorf("strace ended")
		}
		return errors.New("strace has not attached")
	})
	return x
}

// tracer is who traces a process; 0: nobody.
func tracer(pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte("TracerPid:")); ok {
			return strconv.Atoi(string(bytes.TrimSpace(rest)))
		}
	}
	return 0, nil
}

// said is what strace has seen.
func (x *tampering) said(t *testing.T) []byte {
	t.Helper()
	text, err := os.ReadFile(x.out)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return text
}

// end lets the process go.
func (x *tampering) end(t *testing.T) {
	t.Helper()
	if x.cmd.ProcessState != nil {
		return
	}
	_ = x.cmd.Process.Signal(syscall.SIGTERM) // it may have ended with the process
	_ = x.cmd.Wait()
}

func logOf(t *testing.T, p cluster.Process) []byte {
	t.Helper()
	text, err := os.ReadFile(p.Log)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
