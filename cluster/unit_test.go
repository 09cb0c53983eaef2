package cluster

import (
	"context"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// This file is inside the package: a unit is not exported, and a whole cluster is too much to see one process die.

// newUnit runs a shell script under supervision until the test ends.
func newUnit(t *testing.T, script string) *unit {
	t.Helper()
	dir := t.TempDir()
	u := &unit{
		Part: Part{Name: "part", Log: filepath.Join(dir, "log")}, grace: 10 * time.Second, dir: dir, spawn: newSpawner(),
		log: slog.New(slog.DiscardHandler), changed: make(chan struct{}), over: make(chan struct{}),
		command: func(context.Context) (*exec.Cmd, error) { return exec.Command("/bin/sh", "-c", script), nil },
	}
	ctx, cancel := context.WithCancel(t.Context())
	go u.loop(ctx)
	t.Cleanup(func() {
		cancel()
		<-u.over
		u.spawn.close()
		if found, err := findMarked(dir); err != nil || len(found) > 0 {
			t.Errorf("processes are left: %v, %v", found, err)
		}
	})
	return u
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestPartThatDiesByItselfIsRestarted(t *testing.T) {
	u := newUnit(t, "exec sleep 1000")
	ctx := within(t)
	if err := u.begin(ctx); err != nil {
		t.Fatal(err)
	}
	first := u.status().PID
	if err := u.kill(ctx, false); err != nil {
		t.Fatal(err)
	}
	if st := u.state(); st != Failed && st != Running {
		t.Errorf("state right after its death is %s, want %s", st, Failed)
	}
	if err := u.await(ctx, func() bool { return u.pid != 0 && u.pid != first }); err != nil {
		t.Fatalf("it did not come back: %v", err)
	}
}

func TestKilledPartStaysAwayUntilStart(t *testing.T) {
	u := newUnit(t, "exec sleep 1000")
	ctx := within(t)
	if err := u.begin(ctx); err != nil {
		t.Fatal(err)
	}
	if err := u.kill(ctx, true); err != nil {
		t.Fatal(err)
	}
	if st := u.status(); st.State != Stopped || st.PID != 0 {
		t.Fatalf("after kill: %+v", st)
	}
	short, cancel := context.WithTimeout(ctx, 2*restartDelay)
	defer cancel()
	if u.await(short, func() bool { return u.pid != 0 }) == nil {
		t.Fatal("it was restarted although it was killed on request")
	}
	if err := u.begin(ctx); err != nil {
		t.Fatal(err)
	}
	if st := u.state(); st != Running {
		t.Fatalf("after start: %s", st)
	}
}

func TestFrozenPartIsShownByWhatTheKernelSays(t *testing.T) {
	u := newUnit(t, "exec sleep 1000")
	if err := u.begin(within(t)); err != nil {
		t.Fatal(err)
	}
	await := func(want string) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); u.state() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("state is %s, want %s", u.state(), want)
			}
		}
	}
	if err := syscall.Kill(u.status().PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	await(Frozen)
	if err := u.signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	await(Running)
}

func TestChildrenOfADeadPartDoNotOutliveIt(t *testing.T) {
	u := newUnit(t, "sleep 1000 & sleep 1000 & wait")
	ctx := within(t)
	if err := u.begin(ctx); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if found, err := findMarked(u.dir); err != nil {
			t.Fatal(err)
		} else if len(found) == 3 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the part and its two children were not found by their marker")
		}
	}
	if err := u.kill(ctx, true); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		left, err := findMarked(u.dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(left) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("children are left: %v", left)
		}
	}
}

func TestPartThatRefusesToBeRestartedIsLeftAlone(t *testing.T) {
	u := newUnit(t, "exit 78")
	ctx := within(t)
	// It may be gone again before begin looks, which then says so.
	if err := u.begin(ctx); err != nil && !strings.Contains(err.Error(), "exit status 78") {
		t.Fatal(err)
	}
	if err := u.await(ctx, func() bool { return u.refused }); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 2*restartDelay)
	defer cancel()
	if u.await(short, func() bool { return u.starts > 1 }) == nil {
		t.Fatal("it was started again")
	}
	if st := u.state(); st != Failed {
		t.Fatalf("state is %s, want %s", st, Failed)
	}
}

func TestProgramThatIsMissingIsNamed(t *testing.T) {
	u := newUnit(t, "")
	u.command = func(context.Context) (*exec.Cmd, error) { return exec.Command("/no/such/program"), nil }
	if err := u.begin(within(t)); err == nil {
		t.Fatal("no error")
	} else if want := "/no/such/program"; !strings.Contains(err.Error(), want) {
		t.Fatalf("error %q does not name %s", err, want)
	}
}
