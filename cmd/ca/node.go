package main

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"trivet/ca"
	"trivet/ca/api"
	"trivet/ca/weakkey"
	"trivet/db"
	"trivet/hsmsync"
	"trivet/identity"
	"trivet/journal"
)

const (
	identityEvery = 10 * time.Second       // how often the identity's files are looked at
	healthEvery   = 250 * time.Millisecond // how often the health report is made
	drainFor      = time.Second            // how long "draining" is reported before the listeners close: balancers poll every 250 ms
	shutdownWait  = 12 * time.Second       // for requests in flight; the longest lasts 10 s
	closeWait     = 3 * time.Second        // for the lanes' last rows
	startTimeout  = 10 * time.Second       // for one try of the database work at start

	issueLane, statusLane = 0, 1 // indexes: revocations do not queue behind certificates
)

// node is the process. Fields are set in the order of run.
type node struct {
	cfg *config
	log *slog.Logger

	id       *identity.Identity
	sync     *keySync // nil: not here
	profiles *ca.Profiles
	journal  *journal.Journal
	registry *prometheus.Registry
	store    *db.Store
	groups   *hsmsync.Groups
	epoch    uint64
	lane     *db.Lane // of certificates
	status   *db.Lane // of revocations, CRLs and responders
	engine   *ca.Engine
	barrier  *ca.Barrier
	revoker  *ca.Revoker
	crls     *ca.CRLs
	second   *second
	health   *healthLoop
}

func (n *node) loadIdentity() error {
	id, err := identity.Load(n.cfg.Identity)
	if err != nil {
		return fmt.Errorf("loading the identity: %w", err)
	}
	if want := (identity.Principal{Cluster: n.cfg.Cluster, Role: identity.RoleCA, Name: n.cfg.Node}); id.Principal() != want {
		return fmt.Errorf("loading the identity: it is %s, the configuration says %s", id.Principal(), want)
	}
	n.id = id
	n.sync, err = loadSync(n.cfg)
	return err
}

func (n *node) loadProfiles() (err error) {
	if n.cfg.Profiles == "" {
		n.profiles, err = ca.DefaultProfiles()
	} else {
		n.profiles, err = ca.LoadProfiles(n.cfg.Profiles)
	}
	return err
}

// run starts everything in order, serves until ctx ends or something fails for good, and stops everything in the opposite order.
func (n *node) run(ctx context.Context) (err error) {
	// Identity first: everything after it speaks mTLS.
	if err := errors.Join(n.loadIdentity(), n.loadProfiles()); err != nil {
		return err
	}
	// The journal before the database: its lock keeps a second process of this node out, its incarnation names the lanes, and whatever is
	// signed later is in it.
	n.registry = prometheus.NewRegistry()
	n.journal, err = journal.Open(n.journalConfig())
	if err != nil {
		return fmt.Errorf("opening the journal: %w", err)
	}
	defer func() { err = errors.Join(err, n.journal.Close()) }()
	incarnation := n.journal.Incarnation()
	n.log = n.log.With("incarnation", hex.EncodeToString(incarnation[:4]))

	n.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if n.store, err = db.Open(n.database()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.store.Close()) }()
	n.health = newHealthLoop(n)
	defer func() {
		if n.second != nil {
			err = errors.Join(err, n.second.held.Close())
		}
	}()
	if err := n.openSecond(); err != nil {
		return err
	}

	// Listeners come early, so that a node that waits for the database says so; until it is ready they answer nothing but that.
	servers, err := n.listen()
	if err != nil {
		return err
	}

	// work outlives ctx: what serves requests in flight must not end before them.
	work, stopWork := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stopWork(nil)
	tasks, work := errgroup.WithContext(work)
	tasks.Go(func() error { return n.store.Run(work) })
	tasks.Go(func() error { return n.id.Watch(work, identityEvery, n.log) })
	tasks.Go(func() error { return n.reloads(work) })
	tasks.Go(func() error { return n.health.run(work) })
	tasks.Go(func() error { return n.watchJournal(work) })
	for _, s := range servers {
		tasks.Go(s.serve)
	}

	starting, stopStarting := context.WithCancel(ctx)
	release := context.AfterFunc(work, stopStarting)
	if err := n.start(starting, work, tasks, servers); err != nil {
		stopStarting()
		release()
		stopWork(nil)
		for _, s := range servers {
			_ = s.http.Close()
		}
		failed := tasks.Wait()
		if ctx.Err() != nil && failed == nil {
			return nil // told to stop before it was ready
		}
		return errors.Join(failed, err)
	}

	select {
	case <-ctx.Done():
		n.log.Info("draining")
	case <-work.Done(): // something failed for good
	}
	stopStarting()
	release()
	n.drain(work, servers)
	stopWork(nil)
	err = tasks.Wait()
	n.closeLanes()
	return err
}

func (n *node) journalConfig() journal.Config {
	c := n.cfg.Journal
	return journal.Config{
		Dir: n.cfg.StateDir, Node: n.cfg.Node, SegmentSize: c.SegmentBytes, SegmentAge: c.SegmentAge, Reserve: c.ReserveBytes, Plain: c.Plain,
		Archive: journal.Archive{Dir: c.Archive.Dir, Command: c.Archive.Command, Timeout: c.Archive.Timeout, Keep: c.Archive.Keep},
		Log:     n.log, Metrics: n.registry,
	}
}

func (n *node) database() db.Config {
	c := n.cfg.Database
	cfg := db.Config{Nodes: c.Nodes, Name: c.Name, User: c.User, PasswordFile: c.PasswordFile, Role: string(identity.RoleCA), Log: n.log, Metrics: n.registry}
	if c.TLS {
		cfg.TLS = n.id.ClientTLS(identity.RoleDB)
	}
	return cfg
}

// start does what needs the database, and opens the doors.
func (n *node) start(ctx, work context.Context, tasks *errgroup.Group, servers []*server) error {
	if err := n.retry(ctx, "comparing the journal with the database", n.compareJournal); err != nil {
		return err
	}
	if err := n.retry(ctx, "claiming the lanes", n.claim); err != nil {
		return err
	}
	// The groups after the epoch: every signature is asked for in its name, and members refuse another's. Which groups there are the
	// generations' rows say.
	var err error
	n.groups, err = hsmsync.NewGroups(hsmsync.Config{
		Site: n.cfg.Site, Identity: n.id, Manifest: hsmsync.NewManifest(n.store), Epoch: n.epoch, Log: n.log, Metrics: n.registry,
	})
	if err != nil {
		return err
	}
	tasks.Go(func() error { return n.groups.Run(work) })
	if n.sync != nil {
		if err := n.sync.start(work, n, tasks); err != nil {
			return err
		}
	}
	weak, err := weakkey.LoadList(n.cfg.WeakKeys...)
	if err != nil {
		return err
	}
	metrics := promhttp.HandlerFor(n.registry, promhttp.HandlerOpts{})
	n.engine, err = ca.New(ca.Config{
		Node: n.cfg.Node, Store: n.store, Journal: n.journal, Lane: n.lane, Keys: keys{n.groups}, MACKeys: n.second.macs, Profiles: n.profiles, WeakKeys: weak, Clocks: n.store, Epoch: n.epoch,
		Rounds: n.second.rounds, BaseURL: n.cfg.BaseURL, KeepTBS: n.cfg.Database.KeepTBS, Log: n.log, Metrics: n.registry,
	})
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: n.id.ClientTLS(identity.RoleOCSP), MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute}
	n.barrier, err = ca.NewBarrier(ca.BarrierConfig{Node: n.cfg.Node, Members: n.store, Client: &http.Client{Transport: transport}, Log: n.log})
	if err != nil {
		return err
	}
	lost := make(chan error, 1)
	tasks.Go(func() error {
		select {
		case <-work.Done():
			return nil
		case err := <-lost:
			return err
		}
	})
	n.revoker, err = ca.NewRevoker(ca.RevokerConfig{
		Record: n.store, Lane: n.status, Journal: n.journal, Profiles: n.profiles, Barrier: n.barrier, Rounds: n.second.rounds, Epoch: n.epoch, Log: n.log, Metrics: n.registry,
		Fatal: func(err error) {
			select {
			case lost <- err:
			default: // it is ending already
			}
		},
	})
	if err != nil {
		return err
	}
	if n.crls, err = ca.NewCRLs(ca.CRLConfig{Engine: n.engine, Lane: n.status}); err != nil {
		return err
	}
	responders, err := ca.NewResponders(ca.RespondersConfig{Engine: n.engine, Lane: n.status, Requester: n.id.Principal().String()})
	if err != nil {
		return err
	}
	n.second.start(work, tasks) // when the lanes are known to it
	tasks.Go(func() error { return n.engine.Run(work) })
	tasks.Go(func() error { return n.barrier.Run(work) })
	tasks.Go(func() error { return n.crls.Run(work) })
	tasks.Go(func() error { return responders.Run(work) })

	blocker, err := ca.NewBlocker(ca.BlockerConfig{Record: n.store, Journal: n.journal, Revoker: n.revoker, Authorities: n.engine.Authorities, Rounds: n.second.rounds, Log: n.log})
	if err != nil {
		return err
	}
	for _, s := range servers {
		handler, err := api.New(api.Config{
			Identity: n.id, Issuer: n.engine, Revoker: n.revoker, CRLs: n.crls, Viewer: ca.NewViewer(n.engine), Blocker: blocker, Record: n.store,
			Rounds: n.second.rounds, Journal: n.journal, Profiles: n.profiles, BaseURL: n.cfg.BaseURL, Health: n.health.report, Metrics: metrics,
			Clock: n.engine.Clock, Log: n.log,
		}, s.on)
		if err != nil {
			return err
		}
		s.open(n.second.handler(s.on, handler))
	}
	n.health.begin()
	n.log.Info("ready", "api", n.cfg.Listen.API, "admin", n.cfg.Listen.Admin, "site_epoch", n.epoch)
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // there is nobody to tell unless systemd is
	return nil
}

// compareJournal refuses a journal that is older than the database's memory of this node.
func (n *node) compareJournal(ctx context.Context) error {
	err := ca.CheckJournal(ctx, n.store, n.second.macs, n.journal, n.cfg.Node, n.cfg.AcknowledgeJournal)
	if errors.Is(err, ca.ErrJournalBehind) {
		return backoff.Permanent(err)
	}
	return err
}

// claim fixes the site epoch and opens this incarnation's lanes. Those of earlier ones end when Rounds has compared them with the journal.
func (n *node) claim(ctx context.Context) error {
	epoch, err := n.store.SiteEpoch(ctx)
	switch {
	case err != nil:
		return err
	case epoch.N == 0:
		return errors.New("the database holds no site epoch: run pkictl init")
	case epoch.Site != n.cfg.Site:
		return backoff.Permanent(fmt.Errorf("the writing site is %s (epoch %d), this node is configured for %s", epoch.Site, epoch.N, n.cfg.Site))
	}
	n.epoch = epoch.N
	incarnation := n.journal.Incarnation()
	if n.lane == nil {
		if n.lane, err = n.store.OpenLane(ctx, n.cfg.Node, incarnation, issueLane); err != nil {
			return err
		}
	}
	if n.status == nil {
		if n.status, err = n.store.OpenLane(ctx, n.cfg.Node, incarnation, statusLane); err != nil {
			return err
		}
	}
	n.log.Info("lanes claimed", "lane", n.lane.Name())
	return nil
}

// retry tries until it succeeds, ctx ends, or the error is permanent.
func (n *node) retry(ctx context.Context, doing string, fn func(context.Context) error) error {
	pace := backoff.NewExponentialBackOff()
	pace.InitialInterval, pace.MaxInterval = 100*time.Millisecond, 2*time.Second
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		ctx, cancel := context.WithTimeout(ctx, startTimeout)
		defer cancel()
		err := fn(ctx)
		if err != nil {
			n.log.Warn("starting", "doing", doing, "err", err)
			n.health.waiting(fmt.Errorf("%s: %w", doing, err))
			if db.ClassOf(err) == db.Fatal {
				err = backoff.Permanent(err)
			}
		}
		return struct{}{}, err
	}, backoff.WithBackOff(pace), backoff.WithMaxElapsedTime(0))
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}

// drain tells balancers first, and then finishes the requests in flight.
func (n *node) drain(work context.Context, servers []*server) {
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	n.health.drain()
	select {
	case <-time.After(drainFor):
	case <-work.Done(): // no time to be polite
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownWait)
	defer cancel()
	var stopping errgroup.Group
	for _, s := range servers {
		stopping.Go(func() error { return s.http.Shutdown(ctx) })
	}
	if err := stopping.Wait(); err != nil {
		n.log.Warn("requests were cut off", "err", err)
	}
}

// closeLanes ends this incarnation's lanes, so that responders need not follow them any more. Where that fails the next incarnation does it.
func (n *node) closeLanes() {
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	for _, lane := range n.second.rounds.Lanes() {
		if err := lane.Close(ctx); err != nil {
			n.log.Warn("lane left open", "lane", lane.Name(), "err", err)
		}
	}
}

// watchJournal ends the process when the journal fails: what cannot be recorded must not happen.
func (n *node) watchJournal(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-n.journal.Failed():
		return errors.New("the journal has failed: see the log")
	}
}

// reloads takes over changed identity files on SIGHUP.
func (n *node) reloads(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			if err := n.id.Reload(); err != nil {
				n.log.Warn("reload refused, the old identity stays", "err", err)
				continue
			}
			n.log.Info("identity reloaded", "not_after", n.id.NotAfter())
		}
	}
}

// server is one listener.
type server struct {
	on       api.Listener
	listener net.Listener
	http     *http.Server
	handler  *switchHandler
}

func (n *node) listen() ([]*server, error) {
	var servers []*server
	for _, l := range []struct {
		on      api.Listener
		address string
	}{{api.Public, n.cfg.Listen.API}, {api.Admin, n.cfg.Listen.Admin}} {
		listener, err := net.Listen("tcp", l.address)
		if err != nil {
			for _, s := range servers {
				_ = s.listener.Close()
			}
			return nil, fmt.Errorf("listening: %w", err)
		}
		handler := &switchHandler{}
		handler.set(n.health.handler())
		servers = append(servers, &server{on: l.on, listener: listener, handler: handler, http: &http.Server{
			Handler:           handler,
			ReadHeaderTimeout: 5 * time.Second,
			ReadTimeout:       15 * time.Second,
			WriteTimeout:      20 * time.Second, // above every handler's own limit
			IdleTimeout:       2 * time.Minute,
			MaxHeaderBytes:    16 << 10,
			ErrorLog:          slog.NewLogLogger(n.log.Handler(), slog.LevelInfo), // whose TLS was refused, and why
		}})
	}
	for _, s := range servers {
		s.listener = tls.NewListener(s.listener, n.id.ServerTLS())
	}
	return servers, nil
}

func (s *server) serve() error {
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving: %w", err)
	}
	return nil
}

func (s *server) open(h http.Handler) { s.handler.set(h) }
