package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"trivet/ops/galera"
)

// bootTimeout bounds a start of the whole cluster, a fresh one with its databases' first state transfer included.
const bootTimeout = 3 * time.Minute

// SuperviseConfig says what to supervise.
type SuperviseConfig struct {
	Layout   Layout
	Binaries string       // directory of ca, ocsp, lb, hsmd and pkictl
	Log      *slog.Logger // required
}

// supervisor runs the parts of one cluster: it starts them in order, restarts those that die by themselves and obeys the control socket.
type supervisor struct {
	binaries string
	log      *slog.Logger
	spawn    *spawner
	galera   *database
	probe    *prober
	story    *story
	began    time.Time

	changing sync.Mutex // one change of the parts at a time

	mu      sync.Mutex
	layout  Layout
	units   []*unit
	cancels map[string]context.CancelFunc
	closed  bool           // no part may join any more
	parts   sync.WaitGroup // their goroutines

	ending   chan struct{} // closed by end
	endOnce  sync.Once
	clean    bool          // end gives the parts time to end in good order
	finished chan struct{} // closed when every part is gone
}

// Supervise starts the cluster that was provisioned in cfg.Layout and keeps it running until ctx ends or it is told to go down over the
// control socket. When it returns no process of the cluster is left. It returns an error only when it could not begin.
func Supervise(ctx context.Context, cfg SuperviseConfig) error {
	s := &supervisor{
		layout: cfg.Layout, binaries: cfg.Binaries, log: cfg.Log, spawn: newSpawner(), story: newStory(), began: time.Now(),
		ending: make(chan struct{}), finished: make(chan struct{}), clean: true, cancels: map[string]context.CancelFunc{},
	}
	defer s.spawn.close()
	var err error
	if s.galera, err = newDatabase(cfg.Layout, cfg.Log); err != nil {
		return err
	}
	if s.probe, err = newProber(cfg.Layout); err != nil {
		return err
	}
	ln, err := listenControl(cfg.Layout)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 5 * time.Second}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(ln) })

	for _, p := range cfg.Layout.Parts() {
		if _, err := s.adopt(cfg.Layout, p); err != nil {
			return err
		}
	}
	working, stopWork := context.WithCancel(ctx)
	var booting sync.WaitGroup
	booting.Go(func() {
		e := event{Done: true}
		bootCtx, cancel := context.WithTimeout(working, bootTimeout)
		defer cancel()
		if err := s.boot(bootCtx); err != nil {
			e.Err = err.Error()
			s.log.Error("cluster did not start", "error", err)
		}
		s.story.tell(e)
		s.reunite(working)
	})

	select {
	case <-ctx.Done():
	case <-s.ending:
	}
	stopWork()
	booting.Wait()
	s.stop()
	s.parts.Wait()
	close(s.finished)
	shutdown, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = server.Shutdown(shutdown)
	_ = server.Close()
	serving.Wait()
	_ = os.Remove(cfg.Layout.socket())
	return nil
}

// end asks the supervisor to stop everything and waits until no part is left. Not clean means kill -9, for data that nobody wants again.
func (s *supervisor) end(clean bool) {
	s.endOnce.Do(func() {
		s.clean = clean
		close(s.ending)
	})
	<-s.finished
}

// stop ends the parts against the order in which they started, so that none fails for want of another.
func (s *supervisor) stop() {
	s.mu.Lock()
	s.closed = true
	units, cancels := slices.Clone(s.units), maps.Clone(s.cancels)
	s.mu.Unlock()
	if !s.clean {
		for _, u := range units {
			u.abandon()
			cancels[u.Name]()
		}
		return
	}
	for _, roles := range [][]string{{RoleLB}, {RoleCA, RoleOCSP}, {RoleHSMD}, {RoleDB}} {
		for _, u := range units {
			if slices.Contains(roles, u.Role) {
				cancels[u.Name]()
			}
		}
		for _, u := range units {
			if slices.Contains(roles, u.Role) {
				<-u.over
			}
		}
	}
}

// adopt puts a part under supervision, not started yet; l is the layout that has it.
func (s *supervisor) adopt(l Layout, p Part) (*unit, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.New("the cluster is going down")
	}
	u := &unit{Part: p, grace: 5 * time.Second, spawn: s.spawn, dir: l.Dir, log: s.log, changed: make(chan struct{}), command: s.command(p), over: make(chan struct{})}
	if p.Role == RoleDB {
		u.grace, u.ended = 30*time.Second, s.galera.ended
	}
	s.layout = l
	s.units = append(s.units, u)
	ctx, cancel := context.WithCancel(context.Background()) // the order of stop ends it, nothing else
	s.cancels[p.Name] = cancel
	s.parts.Go(func() { u.loop(ctx) })
	if p.Role == RoleDB { // a node that was frozen may give up on the group and stay alive
		end := func() {
			if err := u.kill(ctx, false); err != nil {
				s.log.Error("database node could not be ended", "part", p.Name, "err", err)
			}
		}
		s.parts.Go(func() { _ = galera.Guard(ctx, s.galera.node(p.Name), s.log, end) }) // ends with ctx, without an error
	}
	return u, nil
}

// release ends the supervision of a part that has no process any more; l is the layout without it.
func (s *supervisor) release(l Layout, u *unit) {
	s.mu.Lock()
	cancel := s.cancels[u.Name]
	delete(s.cancels, u.Name)
	s.layout = l
	s.units = slices.DeleteFunc(slices.Clone(s.units), func(other *unit) bool { return other == u })
	s.mu.Unlock()
	cancel()
	<-u.over
}

// plan is the layout as it is now.
func (s *supervisor) plan() Layout {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.layout
}

// boot starts the parts in order and returns when all of them are ready. What need not wait for one another goes at once: the HSM agents and
// the first database node; then init on that node while the others join it, which they do without holding it up.
func (s *supervisor) boot(ctx context.Context) error {
	var joining []*unit
	first, fctx := errgroup.WithContext(ctx)
	for _, u := range s.of(RoleHSMD) {
		first.Go(func() error { return s.bringHSM(fctx, u) })
	}
	first.Go(func() (err error) {
		s.tell("preparing the database")
		order, err := s.galera.prepare(fctx)
		for said := false; err != nil; order, err = s.galera.prepare(fctx) {
			var no *galera.Refusal
			if !errors.As(err, &no) {
				return err
			}
			if !said { // `pkictl galera recover` may still decide it
				said = true
				s.tell(no.Error())
			}
			select {
			case <-time.After(time.Second):
			case <-fctx.Done():
				return err
			}
		}
		for _, name := range order {
			joining = append(joining, s.unit(name))
		}
		return s.bring(fctx, joining[0])
	})
	if err := first.Wait(); err != nil {
		return err
	}
	second, sctx := errgroup.WithContext(ctx)
	second.Go(func() error {
		for _, u := range joining[1:] {
			if err := s.bring(sctx, u); err != nil {
				return err
			}
		}
		return nil
	})
	second.Go(func() error {
		began := time.Now()
		err := s.once(sctx, Part{Name: "init", Log: s.plan().Log("init")}, "pkictl init", filepath.Join(s.binaries, "pkictl"), "init", "--config", s.plan().Config("init"))
		if err != nil {
			return err
		}
		s.tell(fmt.Sprintf("schema, accounts, keys and CAs are there (%.1f s)", time.Since(began).Seconds()))
		return nil
	})
	if err := second.Wait(); err != nil {
		return err
	}
	third, tctx := errgroup.WithContext(ctx)
	for _, role := range []string{RoleCA, RoleOCSP, RoleLB} {
		for _, u := range s.of(role) {
			third.Go(func() error { return s.bring(tctx, u) })
		}
	}
	if err := third.Wait(); err != nil {
		return err
	}
	// Ready each by itself they are; the balancer must have noticed.
	for _, u := range s.of(RoleLB) {
		if err := s.await(ctx, u, s.probe.serves); err != nil {
			return err
		}
	}
	return nil
}

// bring starts a part and waits until it says that it is ready.
func (s *supervisor) bring(ctx context.Context, u *unit) error {
	began := time.Now()
	if err := u.begin(ctx); err != nil {
		return fmt.Errorf("%w; its log is %s", err, u.Log)
	}
	if err := s.await(ctx, u, s.ready); err != nil {
		return err
	}
	s.tell(fmt.Sprintf("%s is ready (%.1f s)", u.Name, time.Since(began).Seconds()))
	return nil
}

// maxStarts is how often a part may start and die before a boot is given up.
const maxStarts = 5

// await asks the part until ready has no objection, ctx ends, or the part dies again and again.
func (s *supervisor) await(ctx context.Context, u *unit, ready func(context.Context, Part) error) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	u.mu.Lock()
	first := u.starts
	u.mu.Unlock()
	for {
		asking, cancel := context.WithTimeout(ctx, time.Second)
		err := ready(asking, u.Part)
		cancel()
		if err == nil {
			return nil
		}
		u.mu.Lock()
		starts, died := u.starts-first+1, u.died
		u.mu.Unlock()
		switch {
		case starts >= maxStarts && died != "":
			return fmt.Errorf("%s does not stay up (%s); the end of its log %s:\n%s", u.Name, died, u.Log, Tail(u.Log, 5))
		case ctx.Err() != nil && died != "":
			return fmt.Errorf("waiting for %s: %w; it ended (%s); the end of its log %s:\n%s", u.Name, ctx.Err(), died, u.Log, Tail(u.Log, 5))
		case ctx.Err() != nil:
			return fmt.Errorf("waiting for %s: %w; last answer: %w; its log is %s", u.Name, ctx.Err(), err, u.Log)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// ready is nil when the part can do its work now.
func (s *supervisor) ready(ctx context.Context, p Part) error {
	if p.Role == RoleDB {
		return s.galera.ready(ctx, p)
	}
	return s.probe.ready(ctx, p)
}

// once runs a command of the given part to its end; its output goes to the part's log.
func (s *supervisor) once(ctx context.Context, p Part, what string, argv ...string) error {
	out, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("opening the log of %s: %w", what, err)
	}
	defer out.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(s.environment(p), markerOf(p.Name, s.plan().Dir))
	if err := s.spawn.start(cmd); err != nil {
		return fmt.Errorf("starting %s: %w", what, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err = <-ended:
	case <-ctx.Done():
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
		return fmt.Errorf("waiting for %s of %s: %w; its log is %s", what, p.Name, ctx.Err(), p.Log)
	}
	if err != nil {
		return fmt.Errorf("%s of %s failed (%w); the end of its log %s:\n%s", what, p.Name, err, p.Log, Tail(p.Log, 5))
	}
	return nil
}

// command returns the maker of the part's command line.
func (s *supervisor) command(p Part) func(context.Context) (*exec.Cmd, error) {
	if p.Role == RoleDB {
		return func(ctx context.Context) (*exec.Cmd, error) { return s.galera.command(ctx, p) }
	}
	return func(context.Context) (*exec.Cmd, error) {
		cmd := exec.Command(filepath.Join(s.binaries, p.Role), "--config", s.plan().Config(p.Name))
		cmd.Env = s.environment(p)
		cmd.Dir = p.Dir
		return cmd, nil
	}
}

// environment is the supervisor's own, without what would mislead a child.
func (s *supervisor) environment(p Part) []string {
	env := slices.DeleteFunc(unmarked(os.Environ()), func(v string) bool {
		// What a compiler needs of GOGC would multiply the ballast that the programs carry.
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "SOFTHSM2_CONF=") || strings.HasPrefix(v, "GOGC=")
	})
	if p.Role == RoleHSMD {
		env = append(append(env, "SOFTHSM2_CONF="+softHSMConf(p)), s.plan().addition(p.Name).Env...)
	}
	return env
}

// act does what the control socket was asked for one part.
func (s *supervisor) act(ctx context.Context, name, verb string, sig syscall.Signal) error {
	u := s.unit(name)
	if u == nil {
		_, err := s.plan().Part(name)
		return err
	}
	if verb != "ready" {
		s.log.Info("told what to do", "part", name, "verb", verb, "signal", sig.String())
	}
	switch verb {
	case "kill":
		return u.kill(ctx, true)
	case "crash":
		return u.kill(ctx, false)
	case "freeze":
		return u.signal(syscall.SIGSTOP)
	case "thaw":
		return u.signal(syscall.SIGCONT)
	case "start":
		if u.state() == Frozen {
			return fmt.Errorf("%s is frozen: thaw it", name)
		}
		return u.begin(ctx)
	case "signal":
		return u.signal(sig)
	case "ready":
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		return s.ready(ctx, u.Part)
	}
	return fmt.Errorf("unknown verb %q", verb)
}

func (s *supervisor) status() Status {
	st := Describe(s.plan())
	for i, p := range st.Processes {
		if u := s.unit(p.Name); u != nil {
			st.Processes[i] = u.status()
		}
	}
	st.State = overall(st.Processes)
	return st
}

// unit returns the part of that name, or nil.
func (s *supervisor) unit(name string) *unit {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.units {
		if u.Name == name {
			return u
		}
	}
	return nil
}

func (s *supervisor) of(role string) []*unit {
	s.mu.Lock()
	defer s.mu.Unlock()
	var of []*unit
	for _, u := range s.units {
		if u.Role == role {
			of = append(of, u)
		}
	}
	return of
}

func (s *supervisor) tell(text string) {
	s.log.Info(text)
	s.story.tell(event{Text: fmt.Sprintf("%5.1f s  %s", time.Since(s.began).Seconds(), text)})
}

// errNotReady is wrapped by every answer of a part that is there and not ready.
var errNotReady = errors.New("not ready")
