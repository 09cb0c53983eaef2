package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// restartDelay is how long a part that died by itself stays away, as under systemd with RestartSec=1s.
const restartDelay = time.Second

// exitNoRestart is the exit code with which a program says that starting it again would do harm (EX_CONFIG; RestartPreventExitStatus= in the units).
const exitNoRestart = 78

// unit is one part under supervision. Its loop goroutine starts and reaps the process; everybody else only says what is wanted.
type unit struct {
	Part
	command func(context.Context) (*exec.Cmd, error) // made afresh for every start
	ended   func(name string)                        // told when what command made is gone; may be nil
	grace   time.Duration                            // between SIGTERM and SIGKILL
	spawn   *spawner
	dir     string // of the cluster, for the marker
	log     *slog.Logger

	mu      sync.Mutex
	wanted  bool
	pid     int // 0 when no process is there
	starts  int
	refused bool          // it ended with exitNoRestart
	died    string        // how the last process ended by itself; "" after an end that was asked for
	changed chan struct{} // closed and replaced at every change
	over    chan struct{} // closed when loop has returned
}

// loop keeps the process as wanted until ctx ends, then ends it and returns.
func (u *unit) loop(ctx context.Context) {
	defer close(u.over)
	for u.await(ctx, func() bool { return u.wanted }) == nil {
		if err := u.once(ctx); err != nil {
			u.set(func() { u.died = err.Error() })
		}
		u.rest(ctx)
	}
}

// rest is the time between a process that ended by itself and the next one. After an end that was asked for there is none.
func (u *unit) rest(ctx context.Context) {
	u.mu.Lock()
	failed, how, refused := u.wanted && u.died != "", u.died, u.refused
	u.mu.Unlock()
	switch {
	case !failed:
		return
	case refused:
		u.log.Error("part says that it must not be restarted", "part", u.Name, "how", how)
	default:
		u.log.Warn("part ended by itself; it is restarted", "part", u.Name, "how", how, "after", restartDelay.String())
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, restartDelay)
		defer cancel()
	}
	_ = u.await(ctx, func() bool { return !u.wanted || u.died == "" })
}

// once starts the process and returns when it, and its whole process group, is gone. The error is about starting; how the process ended is
// in u.died.
func (u *unit) once(ctx context.Context) error {
	cmd, err := u.command(ctx)
	if err != nil {
		return fmt.Errorf("preparing %s: %w", u.Name, err)
	}
	if u.ended != nil {
		defer u.ended(u.Name)
	}
	out, err := os.OpenFile(u.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("opening the log of %s: %w", u.Name, err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(unmarked(cmd.Env), markerOf(u.Name, u.dir))

	u.mu.Lock()
	if !u.wanted { // changed while the command was prepared
		u.mu.Unlock()
		return nil
	}
	if err := u.spawn.start(cmd); err != nil {
		u.mu.Unlock()
		return fmt.Errorf("starting %s: %w", u.Name, err)
	}
	pid := cmd.Process.Pid
	u.pid, u.died, u.refused = pid, "", false
	u.starts++
	u.notify()
	u.mu.Unlock()
	u.log.Info("part started", "part", u.Name, "pid", pid)

	gone := make(chan struct{})
	go func() {
		// Without reaping, so that the process group's number cannot belong to anybody else when its remains are killed.
		for errors.Is(unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
		}
		close(gone)
	}()
	select {
	case <-gone:
	case <-ctx.Done():
		u.terminate(pid, gone)
	}
	_ = syscall.Kill(-pid, syscall.SIGKILL)
	u.set(func() { // reaped under the lock: whoever reads pid there may signal it
		_ = cmd.Wait()
		if u.pid = 0; u.wanted {
			u.died = cmd.ProcessState.String()
			u.refused = cmd.ProcessState.ExitCode() == exitNoRestart
		}
	})
	return nil
}

// terminate ends the process politely, then not.
func (u *unit) terminate(pid int, gone <-chan struct{}) {
	_ = syscall.Kill(-pid, syscall.SIGCONT)
	_ = syscall.Kill(pid, syscall.SIGTERM)
	select {
	case <-gone:
	case <-time.After(u.grace):
		u.log.Warn("part did not end when asked; killing it", "part", u.Name, "after", u.grace.String())
		_ = syscall.Kill(pid, syscall.SIGKILL)
		<-gone
	}
}

// state is what the process really does, frozen by whomever.
func (u *unit) state() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.pid != 0:
		if st, _ := processState(u.pid); st == 'T' || st == 't' {
			return Frozen
		}
		return Running
	case u.wanted && u.died != "":
		return Failed
	}
	return Stopped
}

func (u *unit) status() Process {
	st := u.state()
	u.mu.Lock()
	defer u.mu.Unlock()
	return Process{Name: u.Name, Role: u.Role, Site: u.Site, PID: u.pid, State: st, Addresses: u.Addresses, Dir: u.Dir, Log: u.Log}
}

// begin asks for the process and returns when it has one.
func (u *unit) begin(ctx context.Context) error {
	u.set(func() { u.wanted, u.died = true, "" })
	if err := u.await(ctx, func() bool { return u.pid != 0 || u.died != "" }); err != nil {
		return fmt.Errorf("starting %s: %w", u.Name, err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pid == 0 {
		return fmt.Errorf("starting %s: %s", u.Name, u.died)
	}
	return nil
}

// kill ends the process at once. With stay it is not started again.
func (u *unit) kill(ctx context.Context, stay bool) error {
	u.mu.Lock()
	pid := u.pid
	if stay {
		u.wanted = false
		u.notify()
	}
	if pid == 0 {
		u.mu.Unlock()
		if stay {
			return nil
		}
		return fmt.Errorf("%s is not running", u.Name)
	}
	err := syscall.Kill(pid, syscall.SIGKILL)
	u.mu.Unlock()
	if err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("killing %s: %w", u.Name, err)
	}
	return u.await(ctx, func() bool { return u.pid != pid })
}

// abandon kills the process, which is not started again, without waiting for its end.
func (u *unit) abandon() {
	u.set(func() {
		u.wanted = false
		if u.pid != 0 {
			_ = syscall.Kill(-u.pid, syscall.SIGKILL)
		}
	})
}

// signal sends sig to the process; SIGSTOP and SIGCONT reach its children too.
func (u *unit) signal(sig syscall.Signal) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pid == 0 {
		return fmt.Errorf("%s is not running", u.Name)
	}
	target := u.pid
	if sig == syscall.SIGSTOP || sig == syscall.SIGCONT {
		target = -u.pid
	}
	if err := syscall.Kill(target, sig); err != nil {
		return fmt.Errorf("sending %v to %s: %w", sig, u.Name, err)
	}
	return nil
}

// set changes the unit under its lock and tells whoever waits.
func (u *unit) set(change func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	change()
	u.notify()
}

func (u *unit) notify() {
	close(u.changed)
	u.changed = make(chan struct{})
}

// await returns nil as soon as cond, asked under the lock, holds, or ctx's error.
func (u *unit) await(ctx context.Context, cond func() bool) error {
	for ctx.Err() == nil {
		u.mu.Lock()
		ok, changed := cond(), u.changed
		u.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}
