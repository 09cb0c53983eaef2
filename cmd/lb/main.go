// Command lb balances what each node can do now. See package lb.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/goccy/go-yaml"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"trivet/ballast"
	"trivet/identity"
	"trivet/lb"
)

// config is the configuration file.
type config struct {
	Cluster    string         `yaml:"cluster"`     // this cluster's name; the identity must be of it
	Node       string         `yaml:"node"`        // this balancer's name; the identity must say the same
	Identity   identity.Files `yaml:"identity"`    // of role lb; taken up anew when the files change
	Listeners  lb.Listeners   `yaml:"listeners"`   // addresses; a change needs a restart
	Nodes      []lb.Node      `yaml:"nodes"`       // a change is taken up at SIGHUP
	DrainDelay time.Duration  `yaml:"drain_delay"` // between telling what stands before (readyz 503) and closing the listeners; default 0s
}

// grace is what requests get to finish at the end: the longest takes 12 s.
const grace = 15 * time.Second

func main() {
	ballast.Load()
	if err := run(context.Background(), os.Args[1:], os.Stderr); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			os.Exit(2)
		}
		fmt.Fprintln(os.Stderr, "lb:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("lb", flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("config", "", "configuration `FILE`, YAML")
	check := flags.Bool("check", false, "validate the configuration, connect to nothing, and end")
	if err := flags.Parse(args); err != nil {
		return flag.ErrHelp
	}
	if *path == "" || flags.NArg() > 0 {
		flags.Usage()
		return flag.ErrHelp
	}
	// Before anything that takes time, so that no signal ends the process unasked.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)

	cfg, err := readConfig(*path)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil)).With("node", cfg.Node)
	id, err := identity.Load(cfg.Identity)
	if err != nil {
		return err
	}
	if want := (identity.Principal{Cluster: cfg.Cluster, Role: identity.RoleLB, Name: cfg.Node}); id.Principal() != want {
		return fmt.Errorf("certificate %s is of %s, the configuration is of %s", cfg.Identity.Cert, id.Principal(), want)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	b, err := lb.New(lb.Config{Node: cfg.Node, Version: version(), Identity: id, Nodes: cfg.Nodes, Log: log, Metrics: registry})
	if err != nil {
		return err
	}
	if *check {
		return nil
	}

	// Probing begins before listening and ends after it, so that no request ever meets a balancer that knows nothing.
	background, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	go id.Watch(background, 10*time.Second, log)
	probed, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- b.Run(background, func() { close(probed) }) }()
	select {
	case <-probed:
	case <-ctx.Done():
		return nil
	}
	serving, closeListeners := context.WithCancel(background)
	go func() {
		defer closeListeners()
		for {
			select {
			case <-reload:
				if err := again(*path, cfg, id, b); err != nil {
					log.Error("not reloaded", "err", err)
				} else {
					log.Info("reloaded")
				}
			case <-ctx.Done():
				b.Drain()
				_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
				log.Info("draining")
				time.Sleep(cfg.DrainDelay)
				return
			}
		}
	}()
	err = lb.Serve(serving, []lb.Endpoint{
		{Address: cfg.Listeners.API, Handler: b.API(), TLS: id.ServerTLSOptionalClient()},
		{Address: cfg.Listeners.Public, Handler: b.Public()},
		{Address: cfg.Listeners.Status, Handler: b.Status(registry), TLS: id.ServerTLS()},
	}, grace, log, func() {
		_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
		go feed(background, b)
		log.Info("serving", "api", cfg.Listeners.API, "public", cfg.Listeners.Public, "status", cfg.Listeners.Status)
	})
	end()
	return errors.Join(err, <-ended)
}

func readConfig(path string) (config, error) {
	f, err := os.Open(path)
	if err != nil {
		return config{}, fmt.Errorf("reading the configuration: %w", err)
	}
	defer f.Close()
	var c config
	if err := yaml.NewDecoder(f, yaml.Strict()).Decode(&c); err != nil {
		return config{}, fmt.Errorf("reading the configuration %s: %w", path, err)
	}
	for name, v := range map[string]string{"cluster": c.Cluster, "node": c.Node, "identity.cert": c.Identity.Cert, "identity.key": c.Identity.Key,
		"identity.trust": c.Identity.Trust, "listeners.api": c.Listeners.API, "listeners.public": c.Listeners.Public, "listeners.status": c.Listeners.Status} {
		if v == "" {
			return config{}, fmt.Errorf("reading the configuration %s: %s is missing", path, name)
		}
	}
	if c.DrainDelay < 0 || c.DrainDelay > time.Minute {
		return config{}, fmt.Errorf("reading the configuration %s: drain_delay %s: want 0s to 1m", path, c.DrainDelay)
	}
	return c, nil
}

// again takes up what may change while running: the identity's files' contents and the node list. Each is taken whole or not at all.
func again(path string, running config, id *identity.Identity, b *lb.Balancer) error {
	next, err := readConfig(path)
	if err != nil {
		return err
	}
	if next.Cluster != running.Cluster || next.Node != running.Node || next.Identity != running.Identity || next.Listeners != running.Listeners || next.DrainDelay != running.DrainDelay {
		return errors.New("reloading takes up the node list alone; a change of anything else needs a restart; nothing was changed")
	}
	return errors.Join(id.Reload(), b.SetNodes(next.Nodes))
}

// feed keeps systemd's watchdog quiet while the balancer can say how it is.
func feed(ctx context.Context, b *lb.Balancer) {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			b.Report()
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
		}
	}
}

// version is the module's version and revision as built.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return info.Main.Version
}
