// Command hsmd is the agent of one HSM: the only process that loads the PKCS#11 module and the only one that knows the
// PIN. It serves the token over mTLS and ends itself whenever the module hangs or loses its session; its supervisor
// starts it again.
//
//	hsmd --config FILE [--check]
//	hsmd init-token --config FILE
//
// Exit codes: 0 stopped, 1 failed (start it again), 2 usage, 78 the PIN was refused (do not start it again).
package main

import (
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"trivet/ballast"
	"trivet/health"
	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/pkcs11"
	"trivet/identity"
	"trivet/journal"
)

// errUsage is a command line that makes no sense.
var errUsage = errors.New("usage: hsmd [init-token] --config FILE [--check]")

// errRestart is an end by the agent's own wish: the next process goes on with what this one began.
var errRestart = errors.New("to be started again")

func main() {
	ballast.Load()
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, log)
	switch {
	case err == nil:
		return
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	case errors.Is(err, errRestart):
		log.Info("ending, to be started again", "cause", err.Error())
		os.Exit(1)
	}
	log.Error("ending", "error", err.Error())
	if errors.Is(err, errPIN) {
		os.Exit(78)
	}
	os.Exit(1) // runs no C exit handler, so that a hung or broken module cannot keep the process
}

func run(ctx context.Context, args []string, stdout io.Writer, log *slog.Logger) error {
	initToken := len(args) > 0 && args[0] == "init-token"
	if initToken {
		args = args[1:]
	}
	flags := flag.NewFlagSet("hsmd", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	path := flags.String("config", "", "configuration file")
	check := flags.Bool("check", false, "check the configuration and stop")
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	if *path == "" || flags.NArg() > 0 {
		return errUsage
	}
	cfg, err := readConfig(*path)
	if err != nil {
		return err
	}
	switch {
	case *check:
		fmt.Fprintln(stdout, "ok")
		return nil
	case initToken:
		return makeToken(cfg, stdout, log)
	}
	return serve(ctx, cfg, log.With("node", cfg.Node))
}

// makeToken initialises a blank token and has it make its own keys, so that the first start is quick. It takes the audit
// record first, as serve does: that keeps it away from a token that a running agent holds.
func makeToken(cfg *Config, stdout io.Writer, log *slog.Logger) error {
	if cfg.SOPINFile == "" || cfg.PINFile == "" {
		return errors.New("checking configuration: init-token needs so_pin_file and pin_file")
	}
	record, err := journal.Open(journal.Config{Dir: filepath.Join(cfg.StateDir, "audit"), Node: cfg.Node, Log: log})
	if err != nil {
		return err
	}
	defer record.Close()
	if err := enter(record, agent.Act{Actor: "operator", Event: "init-token", Object: cfg.Token, Outcome: "begun"}); err != nil {
		return err
	}
	made, err := pkcs11.Init(pkcs11.InitConfig{
		Module: cfg.Module, TokenLabel: cfg.Token, PINFile: cfg.PINFile, SOPINFile: cfg.SOPINFile, Profile: cfg.Profile, Dir: cfg.TokenDir,
	})
	if err != nil {
		return err
	}
	if state, err := agent.OpenState(cfg.StateDir); err == nil && state.Rotation() != nil {
		return errors.New("a rotation of this token's PIN is unfinished: start the agent, which finishes or undoes it")
	}
	token, err := login(cfg, log)
	if err != nil {
		return err
	}
	info := token.Info()
	if err := token.Close(); err != nil {
		return err
	}
	what := "was there already and is unchanged"
	if made {
		what = "was initialised"
	}
	if err := enter(record, agent.Act{Actor: "operator", Event: "init-token", Object: cfg.Token, Outcome: "ok", Detail: what}); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "token %s (%s, serial %s) %s; it holds %d keys\n", cfg.Token, info.Model, info.TokenSerial, what, info.Keys)
	// Whoever approves its enrolment compares this with what they are shown.
	fmt.Fprintf(stdout, "transport key %s\n", info.Transport)
	return nil
}

// serve runs the agent until ctx ends or the token is lost.
func serve(ctx context.Context, cfg *Config, log *slog.Logger) error {
	id, err := identity.Load(cfg.Identity)
	if err != nil {
		return err
	}
	if want := (identity.Principal{Cluster: cfg.Cluster, Role: identity.RoleHSMD, Name: cfg.Node}); id.Principal() != want {
		return fmt.Errorf("checking identity: certificate is for %s, configuration says %s", id.Principal(), want)
	}
	record, err := journal.Open(journal.Config{Dir: filepath.Join(cfg.StateDir, "audit"), Node: cfg.Node, Log: log})
	if err != nil {
		return err
	}
	defer record.Close()
	incarnation := record.Incarnation()

	// Listening comes before logging in: a second agent of the same token fails here, before it touches the token.
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	defer listener.Close()
	state, err := openState(cfg, record)
	if err != nil {
		return err
	}
	self := id.Principal().String()
	if r := state.Rotation(); r != nil && cfg.Activation == activationManual {
		return fmt.Errorf("a rotation of the PIN that began at %s is unfinished: start the agent once with `activation: auto`, so that it finishes or undoes it", r.Began.Format(time.RFC3339))
	}
	var token agent.Token // nil: the agent starts locked
	var pins agent.PINs   // nil: the PIN cannot be changed, because of noPINs
	noPINs := whyNoPINs(cfg)
	if cfg.Activation == activationAuto {
		opening := settler{cfg, state, func(a agent.Act) error { return enter(record, a) }, self, log}
		opened, err := loginWithin(ctx, max(time.Minute, 20*cfg.CallTimeout), opening.open)
		if err != nil {
			if ctx.Err() != nil { // told to stop, which is no failure
				return nil
			}
			if hsm.ClassOf(err) == hsm.ClassPIN {
				err = errors.Join(err, enter(record, agent.Act{Actor: self, Event: "login", Object: cfg.Token, Outcome: hsm.ClassPIN.String(), Detail: err.Error()}))
			}
			return err
		}
		token = opened
		if noPINs == "" {
			if pins, err = newPINFiles(cfg, opened); err != nil {
				return err
			}
		}
	}
	if cfg.Approvals < 2 {
		log.Warn("one person alone can destroy keys, enrol members, take backups and change the site epoch: approvals is 1")
	}

	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	lost, restart := make(chan error, 1), make(chan string, 1)
	agentConfig := agent.Config{
		Token: token, Label: cfg.Token, Identity: id, State: state, Approvals: cfg.Approvals, Member: cfg.Node,
		Incarnation: hex.EncodeToString(incarnation[:]), Version: version(),
		Capacity: cfg.Sessions, Queue: cfg.Queue, CallTimeout: cfg.CallTimeout, ProbeEvery: cfg.ProbeEvery,
		Audit: func(a agent.Act) error { return enter(record, a) },
		PINs:  pins, NoPINs: noPINs,
		Restart: func(why string) {
			select {
			case restart <- why:
			default: // it is about to
			}
		},
		Fatal: func(err error) { lost <- err }, Log: log, Metrics: metrics,
	}
	if token == nil {
		agentConfig.Activate = func(pin string) (agent.Token, error) { return newPINGuard(cfg, "an operator").open(cfg.open(log), pin) }
	}
	server, err := agent.NewServer(agentConfig)
	if err != nil {
		return err
	}
	if err := enter(record, agent.Act{Actor: self, Event: eventStart, Object: cfg.Token, Outcome: "ok",
		Detail: fmt.Sprintf("version=%s activation=%s approvals=%d", version(), cfg.Activation, cfg.Approvals)}); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("/", server.Handler())
	mux.Handle("GET /metrics", identity.Allow(promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}), identity.Roles()...))
	web := &http.Server{
		Handler: mux, TLSConfig: id.ServerTLS(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		// The longest answer is that to making an RSA key, or opening the token: 30 s or twenty calls, and the wait before.
		WriteTimeout: max(time.Minute, 30*cfg.CallTimeout), IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelInfo), // whose TLS was refused, and why
	}

	// inner ends after web: the probe and the audit counts go on while the last requests are answered.
	inner, endInner := context.WithCancel(context.WithoutCancel(ctx))
	defer endInner()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	group, outer := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Run(inner) })
	group.Go(func() error { return id.Watch(outer, 10*time.Second, log) })
	group.Go(func() error { return reloadOnHangup(outer, id, log) })
	group.Go(func() error { return feedSystemd(outer, server) })
	group.Go(func() error {
		if err := web.ServeTLS(listener, "", ""); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving: %w", err)
		}
		return nil
	})
	log.Info("serving", "listen", cfg.Listen, "token", cfg.Token, "incarnation", hex.EncodeToString(incarnation[:]), "version", version(), "activation", cfg.Activation)

	var cause error
	select {
	case <-outer.Done():
		server.Drain()
		cause = shutdown(web, 5*time.Second)
	case why := <-restart:
		server.Drain()
		cause = errors.Join(fmt.Errorf("%w: %s", errRestart, why), shutdown(web, 5*time.Second))
		stop()
	case cause = <-lost:
		// Whoever waits has its 503 in hand; give the answers a moment, then go. The token cannot be closed any more.
		return errors.Join(cause, shutdown(web, 250*time.Millisecond))
	}
	endInner()
	err = group.Wait()
	closed := make(chan error, 1)
	go func() { closed <- server.Close() }()
	select {
	case failed := <-closed:
		return errors.Join(cause, err, failed)
	case cause := <-lost: // Close waits for running calls, so a hung one must be waited for no longer
		return cause
	}
}

// login opens the token with the PIN of the PIN file.
func login(cfg *Config, log *slog.Logger) (*pkcs11.Token, error) {
	pin, err := pkcs11.ReadPIN(cfg.PINFile)
	if err != nil {
		return nil, err
	}
	return newPINGuard(cfg, cfg.PINFile).open(cfg.open(log), pin)
}

// loginWithin opens the token for a start: a module that hangs while it is opened ends the process, as one does later.
func loginWithin(ctx context.Context, limit time.Duration, open func() (*pkcs11.Token, error)) (*pkcs11.Token, error) {
	type result struct {
		token *pkcs11.Token
		err   error
	}
	done := make(chan result, 1)
	go func() {
		t, err := open()
		done <- result{t, err}
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.token, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("opening the token: told to stop: %w", ctx.Err())
	case <-timer.C:
		return nil, fmt.Errorf("opening the token: the module did not return within %s, and a PKCS#11 call cannot be cancelled", limit)
	}
}

// eventStart is in the audit record once the agent's state has been made.
const eventStart = "start"

// openState reads what the agent must not forget. Only an agent that never started makes it: where it was and is no more,
// starting without would forget which keys were destroyed.
func openState(cfg *Config, record *journal.Journal) (*agent.State, error) {
	state, err := agent.OpenState(cfg.StateDir)
	if !errors.Is(err, fs.ErrNotExist) {
		return state, err
	}
	started := false
	if err := record.Replay(func(e journal.Entry) error {
		var a journal.Audit
		if e.Kind != journal.KindAudit {
			return nil
		}
		if err := e.Decode(&a); err != nil {
			return fmt.Errorf("reading the audit record: %w", err)
		}
		started = started || a.Event == eventStart
		return nil
	}); err != nil {
		return nil, err
	}
	if started {
		return nil, fmt.Errorf("the audit record says that this agent has started before, but its state is gone: put back the newest copy of it in "+
			"state_dir, or have people look at what this token holds and set it up anew as another member: %w", err)
	}
	return agent.CreateState(cfg.StateDir)
}

func shutdown(web *http.Server, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if err := web.Shutdown(ctx); err != nil {
		_ = web.Close()
		return fmt.Errorf("answering the last requests: %w", err)
	}
	return nil
}

// enter makes one audit act durable.
func enter(j *journal.Journal, a agent.Act) error {
	r, err := journal.New(journal.Audit{Actor: a.Actor, Event: a.Event, Object: a.Object, Outcome: a.Outcome, Detail: a.Detail})
	if err != nil {
		return err
	}
	return j.Append(r)
}

func reloadOnHangup(ctx context.Context, id *identity.Identity, log *slog.Logger) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			if err := id.Reload(); err != nil {
				log.Warn("identity not reloaded", "error", err)
			} else {
				log.Info("identity reloaded")
			}
		}
	}
}

// feedSystemd says ready once the token has signed, or waits for a person to activate it, and then feeds the watchdog, if
// there is one, while that is so.
func feedSystemd(ctx context.Context, server *agent.Server) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("reading the watchdog interval: %w", err)
	}
	every := 100 * time.Millisecond
	ready := false
	for tick := time.NewTicker(every); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			_, err := daemon.SdNotify(false, daemon.SdNotifyStopping)
			return err
		case <-tick.C:
		}
		if server.Report().State != health.OK && server.Info().Locked == "" {
			continue
		}
		state := daemon.SdNotifyWatchdog
		if !ready {
			ready, state = true, daemon.SdNotifyReady
			if interval == 0 {
				interval = 2 * time.Hour // nobody listens
			}
			tick.Reset(interval / 2)
		}
		if _, err := daemon.SdNotify(false, state); err != nil {
			return fmt.Errorf("notifying systemd: %w", err)
		}
	}
}

func version() string {
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "unknown"
}
