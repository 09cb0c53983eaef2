package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Options say where and of what a cluster is made. The zero value is the demo's.
type Options struct {
	Dir      string // everything the cluster writes; empty means DefaultDir
	Network  string // loopback /16; empty means DefaultNetwork, or what the directory was made with
	Binaries string // directory of ca, ocsp, lb, hsmd and pkictl; empty means that of the running program
	// Groups lists the HSM groups: KeyGroup and, if keys are to be in HSMs of their own, RootGroup or VAGroup; empty means KeyGroup alone, or
	// what the directory was made with.
	Groups   []string
	Progress io.Writer // told what happens, a line at a time; nil means nobody
	// Attached runs the supervisor inside this process, so that the cluster ends with it. Otherwise it is a process of its own.
	Attached bool
}

// Cluster is a handle on a local cluster. All methods are safe for concurrent use.
type Cluster struct {
	layout   Layout
	control  *control
	attached chan error // result of an attached supervisor; nil when it is another process
	cancel   context.CancelFunc
}

// manifest is what a cluster's directory says about itself. Its presence is what makes a directory a cluster's.
type manifest struct {
	Format  int    `json:"format"`
	Network string `json:"network"`
	// Groups are HSM groups beside the one that every cluster has.
	Groups []string `json:"groups,omitempty"`
	Added  []Added  `json:"added,omitempty"`
}

// Up brings the cluster in o.Dir up and returns when every part is ready; ctx bounds that. It is safe to repeat: a running cluster is left as
// it is, a stopped one starts again with its data. When a part does not become ready the others stay, for the logs to be read, until Down: the
// handle is returned beside the error.
func Up(ctx context.Context, o Options) (*Cluster, error) {
	progress := func(string) {}
	if o.Progress != nil {
		progress = func(line string) { fmt.Fprintln(o.Progress, line) }
	}
	l, err := layoutFor(o.Dir, o.Network)
	if err == nil {
		l, err = l.withGroups(o.Groups)
	}
	if err != nil {
		return nil, err
	}
	if o.Binaries == "" {
		exe, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("finding the programs: %w", err)
		}
		o.Binaries = filepath.Dir(exe)
	}
	if o.Binaries, err = filepath.Abs(o.Binaries); err != nil {
		return nil, fmt.Errorf("finding the programs: %w", err)
	}
	c := &Cluster{layout: l, control: newControl(l)}
	if err := prepareDir(l); err != nil {
		return nil, err
	}
	unlock, err := lockDir(l)
	if err != nil {
		return nil, err
	}
	defer unlock()
	defer func() {
		if _, err := os.Stat(l.manifest()); errors.Is(err, os.ErrNotExist) { // nothing was made: leave nothing
			_ = os.Remove(l.lock())
			_ = os.Remove(l.Dir)
		}
	}()

	var st Status
	if err := c.control.call(ctx, "GET", "/status", nil, &st); err == nil {
		progress("the cluster in " + l.Dir + " is already running")
		if err := c.control.follow(ctx, func(string) {}); err != nil {
			return c, fmt.Errorf("it did not start well (`pkictl demo down` ends it): %w", err)
		}
		return c, nil
	}
	if err := checkTools(o.Binaries); err != nil {
		return nil, err
	}
	if err := killMarked(l.Dir); err != nil { // a supervisor that was killed may have left something
		return nil, err
	}
	if err := checkAddresses(l, 2*time.Second); err != nil {
		return nil, err
	}
	progress("preparing " + l.Dir + " on " + l.Network)
	if err := provision(l); err != nil {
		return nil, err
	}
	if err := c.supervise(ctx, o); err != nil {
		return nil, err
	}
	if err := c.control.follow(ctx, progress); err != nil {
		return c, fmt.Errorf("starting the cluster (`pkictl demo logs` shows more, `pkictl demo down` ends it): %w", err)
	}
	return c, nil
}

// supervise starts the supervisor and returns when it can be spoken to.
func (c *Cluster) supervise(ctx context.Context, o Options) error {
	logFile, err := os.OpenFile(c.layout.Log("supervisor"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("opening the supervisor's log: %w", err)
	}
	ended := make(chan error, 1)
	if o.Attached {
		var run context.Context
		run, c.cancel = context.WithCancel(context.Background())
		c.attached = make(chan error, 1)
		go func() {
			defer logFile.Close()
			err := Supervise(run, SuperviseConfig{Layout: c.layout, Binaries: o.Binaries, Log: slog.New(slog.NewJSONHandler(logFile, nil))})
			ended <- err
			c.attached <- err
		}()
	} else {
		defer logFile.Close()
		cmd := exec.Command(filepath.Join(o.Binaries, "pkictl"), "demo", "supervise", "--dir", c.layout.Dir, "--binaries", o.Binaries)
		cmd.Dir = "/"
		cmd.Stdout, cmd.Stderr = logFile, logFile
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		cmd.Env = append(os.Environ(), markerOf("supervisor", c.layout.Dir))
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("starting the supervisor: %w", err)
		}
		go func() { ended <- cmd.Wait() }()
	}
	for {
		err := c.control.call(ctx, "GET", "/status", nil, nil)
		if err == nil {
			return nil
		}
		select {
		case err := <-ended:
			return fmt.Errorf("the supervisor ended at once (%v); the end of its log %s:\n%s", err, c.layout.Log("supervisor"), Tail(c.layout.Log("supervisor"), 5))
		case <-ctx.Done():
			return fmt.Errorf("waiting for the supervisor: %w; last answer: %w", ctx.Err(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// absentError names a directory without a cluster. It is os.ErrNotExist.
type absentError string

func (e absentError) Error() string {
	return fmt.Sprintf("there is no cluster in %s: start one with `pkictl demo up`, or name its directory with --dir", string(e))
}

func (absentError) Is(target error) bool { return target == os.ErrNotExist }

// Open returns a handle on the cluster in dir (empty: DefaultDir), running or not. When there is none the error is os.ErrNotExist and says what to do.
func Open(dir string) (*Cluster, error) {
	l, err := NewLayout(dir, "")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(l.manifest()); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, absentError(l.Dir)
		}
		return nil, fmt.Errorf("looking for a cluster: %w", err)
	}
	if l, err = layoutFor(l.Dir, ""); err != nil {
		return nil, err
	}
	return &Cluster{layout: l, control: newControl(l)}, nil
}

// Layout says where the cluster's files and addresses are, those of parts added since the handle was made included.
func (c *Cluster) Layout() Layout {
	if l, err := layoutFor(c.layout.Dir, c.layout.Network); err == nil {
		return l
	}
	return c.layout
}

// Status tells how the cluster and each process are now. A cluster without a supervisor is stopped, and so is every part.
func (c *Cluster) Status() (Status, error) {
	var st Status
	err := c.control.call(context.Background(), "GET", "/status", nil, &st)
	if errors.Is(err, errNoSupervisor) {
		return Describe(c.Layout()), nil
	}
	return st, err
}

// Kill ends the part with SIGKILL; it stays away until Start.
func (c *Cluster) Kill(name string) error { return c.part(name, "kill", 0) }

// Crash ends the part with SIGKILL as if it had died by itself: it is back after a second.
func (c *Cluster) Crash(name string) error { return c.part(name, "crash", 0) }

// Freeze stops the part with SIGSTOP, until Thaw.
func (c *Cluster) Freeze(name string) error { return c.part(name, "freeze", 0) }

// Thaw lets a frozen part go on.
func (c *Cluster) Thaw(name string) error { return c.part(name, "thaw", 0) }

// Start starts a part that was killed and returns when its process exists, which says nothing of its readiness: see Ready. A running part is left alone.
func (c *Cluster) Start(name string) error { return c.part(name, "start", 0) }

// Signal sends sig to the part.
func (c *Cluster) Signal(name string, sig syscall.Signal) error { return c.part(name, "signal", sig) }

// Ready is nil when the part can do its work now: a database node is synced, any other process answers /readyz with 200.
func (c *Cluster) Ready(name string) error { return c.part(name, "ready", 0) }

// AwaitReady waits until the part is ready or ctx ends.
func (c *Cluster) AwaitReady(ctx context.Context, name string) error {
	for {
		err := c.Ready(name)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w; last answer: %w", name, ctx.Err(), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *Cluster) part(name, verb string, sig syscall.Signal) error {
	if _, err := c.Layout().Part(name); err != nil {
		return err
	}
	return c.control.call(context.Background(), "POST", "/parts/"+name+"/"+verb, url.Values{"signal": {strconv.Itoa(int(sig))}}, nil)
}

// Down ends every process and removes the directory: nothing is left. It works as well when the supervisor was killed.
func (c *Cluster) Down() error {
	if err := c.halt("kill"); err != nil {
		return err
	}
	return removeDir(c.layout)
}

// Stop ends every process in good order and keeps the data, with which Up starts again.
func (c *Cluster) Stop() error { return c.halt("clean") }

func (c *Cluster) halt(how string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	body, err := c.control.open(ctx, "POST", "/down", url.Values{"how": {how}})
	if err == nil {
		_ = body.Close()
	}
	if errors.Is(err, os.ErrPermission) {
		return err
	}
	if c.attached != nil {
		c.cancel()
		err := <-c.attached
		c.attached <- nil // for the next call
		if err != nil {
			return err
		}
	}
	// The supervisor answered, or cannot: what is left of it and of its parts goes.
	if err == nil {
		awaitGone(c.layout.Dir, "supervisor", 5*time.Second)
	}
	if err := killMarked(c.layout.Dir); err != nil {
		return err
	}
	_ = checkAddresses(c.Layout(), 5*time.Second) // what the kernel has not buried yet still holds its addresses; somebody else's are no matter
	return nil
}

// awaitGone waits until no process of that name is left, or for at most d.
func awaitGone(dir, name string, d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		found, err := findMarked(dir)
		if err != nil {
			return
		}
		left := false
		for _, m := range found {
			left = left || m.Name == name
		}
		if !left {
			return
		}
	}
}

// layoutFor is the layout of the cluster in dir if there is one, else of one to be made there.
func layoutFor(dir, network string) (Layout, error) {
	l, err := NewLayout(dir, network)
	if err != nil {
		return Layout{}, err
	}
	data, err := os.ReadFile(l.manifest())
	if errors.Is(err, os.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return Layout{}, fmt.Errorf("reading what the cluster was made with: %w", err)
	}
	var m manifest
	if err := json.Unmarshal(data, &m); err != nil || m.Format != 1 {
		return Layout{}, fmt.Errorf("%s is not of this version (%v): remove the cluster with the program that made it", l.manifest(), err)
	}
	if network != "" && network != m.Network {
		return Layout{}, fmt.Errorf("the cluster in %s was made on %s: choose another directory with --dir, or end it with `pkictl demo down`", l.Dir, m.Network)
	}
	if l, err = NewLayout(dir, m.Network); err != nil {
		return Layout{}, err
	}
	l.groups, l.added = m.Groups, m.Added
	return l, nil
}

// withGroups is the layout of a cluster with these HSM groups; of one that is there already they cannot change.
func (l Layout) withGroups(all []string) (Layout, error) {
	if len(all) == 0 {
		return l, nil
	}
	further, err := checkGroups(all)
	if err != nil {
		return l, err
	}
	if _, err := os.Stat(l.manifest()); err == nil && !slices.Equal(further, l.groups) {
		return l, fmt.Errorf("the cluster in %s was made with HSM groups %s: choose another directory with --dir, or end it with `pkictl demo down`; `pkictl hsm group create` makes another group",
			l.Dir, strings.Join(append([]string{KeyGroup}, l.groups...), ","))
	}
	l.groups = further
	return l, nil
}

// prepareDir makes the cluster's directory, or refuses one that holds anything else.
func prepareDir(l Layout) error {
	if err := os.MkdirAll(l.Dir, 0o755); err != nil {
		return fmt.Errorf("making the cluster's directory: %w", err)
	}
	if _, err := os.Stat(l.manifest()); err == nil {
		return nil
	}
	entries, err := os.ReadDir(l.Dir)
	if err != nil {
		return fmt.Errorf("looking into the cluster's directory: %w", err)
	}
	for _, e := range entries {
		if e.Name() != filepath.Base(l.lock()) {
			return fmt.Errorf("%s holds other files (%s, …): name an empty or new directory with --dir", l.Dir, e.Name())
		}
	}
	return nil
}

// lockDir keeps two `up` from working on one directory at once.
func lockDir(l Layout) (unlock func(), err error) {
	f, err := os.OpenFile(l.lock(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the cluster's directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another `pkictl demo up` is at work in %s: wait for it (%w)", l.Dir, err)
	}
	return func() { f.Close() }, nil
}

// removeDir removes a cluster's directory, and nothing that is not one.
func removeDir(l Layout) error {
	if _, err := os.Stat(l.manifest()); err != nil {
		return fmt.Errorf("%s is not a cluster's directory; it is left alone: %w", l.Dir, err)
	}
	if strings.Count(l.Dir, "/") < 2 {
		return fmt.Errorf("%s is too near the root to be removed; remove it yourself", l.Dir)
	}
	if err := os.RemoveAll(l.Dir); err != nil {
		return fmt.Errorf("removing the cluster's directory: %w", err)
	}
	return nil
}
