// Command ocsp is a validation authority node: it answers OCSP and serves CRLs and issuer certificates from memory, and
// follows the record's change feed.
//
//	ocsp --config FILE [--check]
//
// SIGTERM drains and stops it, SIGHUP has it read its identity again. Exit codes: 0 stopped, 1 failed, 2 usage.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"trivet/ballast"
	"trivet/db"
	"trivet/hsmsync"
	"trivet/identity"
	"trivet/ocsp"
)

const (
	watchIdentity = 10 * time.Second
	// A relying party has this long to send its request, and as long to take the answer.
	headTimeout, ioTimeout, idleTimeout = 5 * time.Second, 10 * time.Second, 2 * time.Minute
	maxHeader                           = 16 << 10
	closeTimeout                        = 5 * time.Second
	keyTimeout                          = 2 * time.Second
)

var errUsage = errors.New("usage: ocsp --config FILE [--check]")

func main() {
	ballast.Load()
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Stdout, log)
	stop()
	switch {
	case err == nil:
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	default:
		log.Error("ending", "err", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer, log *slog.Logger) error {
	flags := flag.NewFlagSet("ocsp", flag.ContinueOnError)
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
	if *check {
		fmt.Fprintln(stdout, "ok")
		return nil
	}
	return serve(ctx, cfg, log.With("node", cfg.Node))
}

// serve runs the node until ctx ends or a part of it fails.
func serve(ctx context.Context, cfg *config, log *slog.Logger) error {
	id, err := identity.Load(cfg.Identity)
	if err != nil {
		return err
	}
	if want := (identity.Principal{Cluster: cfg.Cluster, Role: identity.RoleOCSP, Name: cfg.Node}); id.Principal() != want {
		return fmt.Errorf("checking identity: certificate is for %s, configuration says %s", id.Principal(), want)
	}
	var incarnation [16]byte
	if _, err := rand.Read(incarnation[:]); err != nil {
		return fmt.Errorf("choosing an incarnation: %w", err)
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	database := db.Config{
		Nodes: cfg.Database.Nodes, Name: cfg.Database.Name, User: cfg.Database.User, PasswordFile: cfg.Database.PasswordFile,
		MaxConns: 8, Role: string(identity.RoleOCSP), Log: log, Metrics: metrics,
	}
	if cfg.Database.TLS {
		database.TLS = id.ClientTLS(identity.RoleDB)
	}
	store, err := db.Open(database)
	if err != nil {
		return err
	}
	defer store.Close()
	// Which groups there are the responders' rows say.
	groups, err := hsmsync.NewGroups(hsmsync.Config{
		Site: cfg.Site, Identity: id, Manifest: hsmsync.NewManifest(store), Log: log, Metrics: metrics,
	})
	if err != nil {
		return err
	}
	va, err := ocsp.New(ocsp.Config{
		Node: cfg.Node, Incarnation: incarnation, Version: version(), Policy: cfg.Policy, Log: log, Metrics: metrics,
		Record: ocsp.NewRecord(store, db.Member{
			VA: cfg.Node, Policy: string(cfg.Policy), Address: cfg.Listen.Advertise, Incarnation: incarnation[:],
		}),
		Signer: func(ctx context.Context, group, key string) (ocsp.Signer, error) {
			ctx, cancel := context.WithTimeout(ctx, keyTimeout)
			defer cancel()
			return groups.Key(ctx, group, key)
		},
	})
	if err != nil {
		return err
	}

	// Both listeners are taken before the node registers: a second process of the same configuration ends here.
	public, err := net.Listen("tcp", cfg.Listen.Public)
	if err != nil {
		return fmt.Errorf("listening for relying parties: %w", err)
	}
	defer public.Close()
	internal, err := net.Listen("tcp", cfg.Listen.Internal)
	if err != nil {
		return fmt.Errorf("listening for the cluster: %w", err)
	}
	defer internal.Close()
	// Broken clients are the network's everyday; whose TLS another part refuses, and why, is not.
	publicServer, internalServer := newServer(va.Public(), log, slog.LevelDebug), newServer(va.Internal(metrics), log, slog.LevelInfo)
	internalServer.TLSConfig = id.ServerTLS()

	base, stopAll := context.WithCancel(context.WithoutCancel(ctx))
	defer stopAll()
	parts, base := errgroup.WithContext(base)
	follow, stopVA := context.WithCancel(base)
	defer stopVA()
	left := make(chan struct{})
	parts.Go(func() error { return store.Run(base) })
	parts.Go(func() error { return groups.Run(base) })
	parts.Go(func() error { return id.Watch(base, watchIdentity, log) })
	parts.Go(func() error { reloadOnHangup(base, id, log); return nil })
	parts.Go(func() error { defer close(left); return va.Run(follow) })
	parts.Go(func() error { return closed(publicServer.Serve(public)) })
	parts.Go(func() error { return closed(internalServer.ServeTLS(internal, "", "")) })
	parts.Go(func() error {
		select {
		case <-ctx.Done():
		case <-base.Done(): // a part has failed
		}
		// Stop order: tell balancers; let them turn away; finish what was begun; leave the members; then the rest.
		_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
		va.Drain()
		select {
		case <-time.After(cfg.Drain):
		case <-base.Done():
		}
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		err := errors.Join(publicServer.Shutdown(closing), internalServer.Shutdown(closing))
		stopVA()
		<-left
		stopAll()
		if err != nil {
			log.Warn("connections cut off while closing", "err", err)
		}
		return nil
	})
	log.Info("listening", "public", public.Addr().String(), "internal", internal.Addr().String(), "policy", cfg.Policy, "site", cfg.Site)
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
	return parts.Wait()
}

// newServer bounds what a slow or talkative client may cost. Broken connections are logged at level.
func newServer(h http.Handler, log *slog.Logger, level slog.Level) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: headTimeout, ReadTimeout: ioTimeout, WriteTimeout: ioTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(log.Handler(), level),
	}
}

// closed turns the end that Shutdown asks for into none.
func closed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func reloadOnHangup(ctx context.Context, id *identity.Identity, log *slog.Logger) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
		}
		if err := id.Reload(); err != nil {
			log.Error("identity not reloaded", "err", err)
			continue
		}
		log.Info("identity reloaded", "not_after", id.NotAfter())
	}
}

// version is the module version or revision that the program was built from.
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
