package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// marker is the environment variable that every process of a cluster carries, and its children inherit: "name@dir". It is how `down` finds
// what is left when the supervisor was killed, helpers of a database's state transfer included, with no pid file to be stale.
const marker = "TRIVET_CLUSTER_PART"

func markerOf(name, dir string) string { return marker + "=" + name + "@" + dir }

// unmarked is env without the mark of whoever made it.
func unmarked(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(v string) bool { return strings.HasPrefix(v, marker+"=") })
}

// spawner starts processes from one thread that lives as long as it does: the kernel sends the parent-death signal when the *thread* that
// forked ends, and Go ends threads as it pleases.
type spawner struct{ jobs chan func() }

func newSpawner() *spawner {
	s := &spawner{jobs: make(chan func())}
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		for job := range s.jobs {
			job()
		}
	}()
	return s
}

// start starts cmd in its own process group, so that it dies with this process, and its children are reached by a signal to the group.
func (s *spawner) start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	done := make(chan error)
	s.jobs <- func() { done <- cmd.Start() }
	return <-done
}

// close ends the thread, and with it every process that is still there.
func (s *spawner) close() { close(s.jobs) }

// marked is a running process that belongs to a cluster.
type marked struct {
	PID  int
	Name string // of the part
}

// findMarked lists the processes whose environment says that they belong to the cluster in dir. A process whose environment this user may
// not read is none of ours.
func findMarked(dir string) ([]marked, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	prefix, suffix := []byte(marker+"="), []byte("@"+dir)
	var found []marked
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		environ, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err != nil {
			continue // gone, or somebody else's
		}
		for v := range bytes.SplitSeq(environ, []byte{0}) {
			if bytes.HasPrefix(v, prefix) && bytes.HasSuffix(v, suffix) {
				found = append(found, marked{PID: pid, Name: string(v[len(prefix) : len(v)-len(suffix)])})
			}
		}
	}
	return found, nil
}

// killMarked kills every process of the cluster in dir and waits until none is left. Names in spare are left alone.
func killMarked(dir string, spare ...string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		found, err := findMarked(dir)
		if err != nil {
			return err
		}
		var left []string
		for _, m := range found {
			if slices.Contains(spare, m.Name) {
				continue
			}
			if st, _ := processState(m.PID); st == 'Z' || st == 0 {
				continue
			}
			left = append(left, fmt.Sprintf("%s (pid %d)", m.Name, m.PID))
			if err := syscall.Kill(m.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("killing %s, pid %d: %w", m.Name, m.PID, err)
			}
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes do not end although killed: %s", strings.Join(left, ", "))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// processState is the kernel's letter for what a process does: R, S, D run; T is stopped; Z is dead; 0 means that there is none.
func processState(pid int) (byte, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			return 0, nil
		}
		return 0, fmt.Errorf("reading the state of process %d: %w", pid, err)
	}
	// The name stands in brackets and may hold anything, brackets too.
	if i := bytes.LastIndexByte(stat, ')'); i >= 0 && i+2 < len(stat) {
		return stat[i+2], nil
	}
	return 0, fmt.Errorf("reading the state of process %d: unexpected %q", pid, stat)
}

// Tail returns the last lines of a file, joined by newlines, without the last one's; "" when there is nothing to be read.
func Tail(file string, lines int) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 256 << 10
	if st, err := f.Stat(); err == nil && st.Size() > most {
		_, _ = f.Seek(-most, 2)
	}
	buf := make([]byte, most)
	n, _ := io.ReadFull(f, buf)
	all := strings.Split(strings.TrimRight(string(buf[:n]), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return strings.Join(all, "\n")
}
