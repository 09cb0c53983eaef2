package main

import (
	"cmp"
	"context"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"trivet/ca"
	"trivet/db"
	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
	"trivet/journal"
)

// Lifetimes of what init makes. The issuing CA's ends within the root's.
const (
	rootLifetime    = 20 * 365 * 24 * time.Hour
	issuingLifetime = 10 * 365 * 24 * time.Hour
	settleTimeout   = time.Minute // for members to prove their keys, or a database to come back, before a step is given up
)

// initResult is what an installation has after init.
type initResult struct {
	Site  string    `json:"site"`
	Epoch uint64    `json:"epoch"`
	Group string    `json:"group"`
	Keys  []keyMade `json:"keys"`
	CAs   []caMade  `json:"cas"`
}

type keyMade struct {
	ID      hsm.KeyID   `json:"id"`
	Label   string      `json:"label"`
	Purpose hsm.Purpose `json:"purpose"`
	Group   string      `json:"group"`
}

type caMade struct {
	ID          string `json:"id"`
	State       string `json:"state"`
	Certificate string `json:"certificate,omitempty"` // file
	Chain       string `json:"chain,omitempty"`       // file
}

func (a *app) initCommand() *cobra.Command {
	var config string
	var check bool
	c := &cobra.Command{
		Use:   "init --config FILE",
		Short: "Make an installation ready to issue: schema, accounts, keys, CAs",
		Long: `Make an installation ready to issue, step by step: the database's schema and accounts; the HSM group's domain key; a key for each CA and
for each responder, cloned to every HSM of its group and proved there; the root and the issuing CAs with their certificates, first CRLs and
responder certificates.

Every key is in the group that "hsm" names in the configuration. Others are listed under "groups" and named by the key "group" of "root" and of
each of "issuing", and by "ocsp_group" for the keys of the responders:

  hsm:    {group: ca, members: [{name: hsmd-a, address: "hsmd-a.example.org:7443"}, …]}
  groups: [{name: root, members: […]}, {name: va, members: […]}]
  root:   {ca: example-root, subject: Example Root, group: root}
  ocsp_group: va

Every step looks first at what is there, so the command may be repeated after any failure, and on an installation that is complete. With
--check the configuration is validated and nothing is connected to.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (initResult, error) {
			if config == "" {
				return initResult{}, usagef("--config is needed")
			}
			cfg, err := readInitConfig(config)
			if err != nil || check {
				return initResult{Site: cfg.Site, Group: cfg.Base.HSM.Group, Keys: []keyMade{}, CAs: []caMade{}}, err
			}
			c := ceremony{app: a, cfg: cfg, log: slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelWarn}))}
			return c.run(ctx)
		}, func(w io.Writer, r initResult) {
			if check {
				fmt.Fprintln(w, "ok")
				return
			}
			fmt.Fprintf(w, "site %s, epoch %d, group %s\n\nKEY\tPURPOSE\tGROUP\tID\n", r.Site, r.Epoch, r.Group)
			for _, k := range r.Keys {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", k.Label, k.Purpose, k.Group, k.ID)
			}
			fmt.Fprintf(w, "\nCA\tSTATE\tCERTIFICATE\n")
			for _, c := range r.CAs {
				fmt.Fprintf(w, "%s\t%s\t%s\n", c.ID, c.State, c.Certificate)
			}
		}),
	}
	c.Flags().StringVar(&config, "config", "", "configuration file")
	c.Flags().BoolVar(&check, "check", false, "validate the configuration and stop")
	return c
}

// ceremony is one run of init.
type ceremony struct {
	app    *app
	cfg    *initConfig
	log    *slog.Logger
	id     *identity.Identity // role ceremony: signs with CA keys
	store  *db.Store
	result initResult
}

func (c *ceremony) run(ctx context.Context) (initResult, error) {
	var err error
	if c.id, err = identity.Load(c.cfg.Base.Identity); err != nil {
		return initResult{}, err
	}
	if want := (identity.Principal{Cluster: c.cfg.Base.Cluster, Role: identity.RoleCeremony, Name: c.cfg.Base.Node}); c.id.Principal() != want {
		return initResult{}, fmt.Errorf("checking identity: certificate is for %s, configuration says %s", c.id.Principal(), want)
	}
	database := c.cfg.Base.database(c.id, c.log)
	if err := c.step("MAC keys", c.macKeys); err != nil {
		return initResult{}, err
	}
	if err := c.step("schema", func() error { return db.Migrate(ctx, database) }); err != nil {
		return initResult{}, err
	}
	var users []db.UserSpec
	for _, u := range c.cfg.Accounts {
		users = append(users, db.UserSpec{Name: u.Name, PasswordFile: u.PasswordFile, Role: u.Role, RequireX509: u.RequireX509})
	}
	if err := c.step("accounts", func() error { return db.Grant(ctx, database, users) }); err != nil {
		return initResult{}, err
	}
	if c.store, err = db.Open(database); err != nil {
		return initResult{}, err
	}
	defer c.store.Close()

	ctx, stop := context.WithCancel(ctx)
	background, ctx := errgroup.WithContext(ctx)
	background.Go(func() error { return c.store.Run(ctx) })
	err = c.establish(ctx, background)
	stop()
	if failed := background.Wait(); failed != nil && !errors.Is(failed, context.Canceled) {
		err = errors.Join(err, failed)
	}
	return c.result, err
}

// macKeys makes the file by which CA nodes recognise each other's rows, unless it is there: another key would make strangers of them.
func (c *ceremony) macKeys() error {
	_, err := os.Stat(c.cfg.MACKeyFile)
	if errors.Is(err, os.ErrNotExist) {
		err = writeFile(c.cfg.MACKeyFile, db.NewMACKey(), 0o600)
	}
	if err == nil {
		_, err = db.LoadMACKeys(c.cfg.MACKeyFile)
	}
	return err
}

// establish makes keys and CAs.
func (c *ceremony) establish(ctx context.Context, background *errgroup.Group) error {
	c.result = initResult{Site: c.cfg.Site, Group: c.cfg.Base.HSM.Group}
	var err error
	if c.result.Epoch, err = ca.EnsureSite(ctx, c.store, c.cfg.Site); err != nil {
		return err
	}
	specs, err := c.keys(ctx)
	if err != nil {
		return err
	}
	return c.step("CAs", func() error { return c.authorities(ctx, background, specs) })
}

// keys sets the groups up and has them make for each CA its own key and its responder's. It acts with role sync, which can use none of them.
func (c *ceremony) keys(ctx context.Context) ([]ca.GenerationSpec, error) {
	id, err := identity.Load(c.cfg.Sync)
	if err != nil {
		return nil, err
	}
	groups := map[string]*hsmsync.Coordinator{}
	for _, g := range c.cfg.groups() {
		group, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{Group: g.Name, Identity: id, Chain: hsmsync.NewManifest(c.store), Log: c.log})
		if err != nil {
			return nil, err
		}
		defer group.Close()
		groups[g.Name] = group
		members := slices.Clone(g.Members)
		for i, m := range members {
			members[i].Site = cmp.Or(m.Site, c.cfg.Site)
		}
		if err := c.step("HSM group "+g.Name, func() error { return group.Setup(ctx, members, hsmsync.Policy{}) }); err != nil {
			return nil, err
		}
		// Only the first record comes from the ceremony; later ones are approved.
		if c.result.Epoch == 1 {
			first := hsm.EpochRecord{Site: c.cfg.Site, Epoch: c.result.Epoch}
			if err := c.step("site epoch of HSM group "+g.Name, func() error { return group.SetEpoch(ctx, first) }); err != nil {
				return nil, err
			}
		}
	}
	var specs []ca.GenerationSpec
	for i, a := range append([]authority{c.cfg.Root}, c.cfg.Issuing...) {
		spec := ca.GenerationSpec{
			CA: a.CA, Generation: 1, Subject: pkix.Name{CommonName: a.Subject}, Lifetime: issuingLifetime,
			KeyGroup: cmp.Or(a.Group, c.cfg.Base.HSM.Group), ResponderGroup: cmp.Or(c.cfg.OCSPGroup, c.cfg.Base.HSM.Group),
		}
		if i == 0 {
			spec.Lifetime = rootLifetime
		}
		for _, purpose := range []hsm.Purpose{hsm.PurposeCA, hsm.PurposeOCSP} {
			in := spec.KeyGroup
			if purpose == hsm.PurposeOCSP {
				in = spec.ResponderGroup
			}
			var record hsm.KeyRecord
			err := c.step(fmt.Sprintf("key %s for %s in group %s", spec.Issuer(), purpose, in), func() (err error) {
				record, err = groups[in].CreateKey(ctx, hsm.KeySpec{Label: spec.Issuer(), Purpose: purpose, Algorithm: hsm.P256})
				return err
			})
			if err != nil {
				return nil, err
			}
			c.result.Keys = append(c.result.Keys, keyMade{ID: record.ID, Label: record.Label, Purpose: record.Purpose, Group: in})
			if purpose == hsm.PurposeCA {
				spec.KeyID = string(record.ID)
			} else {
				spec.ResponderKeyID, spec.ResponderSPKI = string(record.ID), record.SPKI
			}
		}
		specs = append(specs, spec)
	}
	return specs, nil
}

// authorities brings the CAs into being, as a CA node of its own: with a journal, a lane of the change feed, and keys of role ceremony.
func (c *ceremony) authorities(ctx context.Context, background *errgroup.Group, specs []ca.GenerationSpec) (err error) {
	record, err := journal.Open(journal.Config{Dir: filepath.Join(c.cfg.StateDir, "journal"), Node: c.cfg.Base.Node, Log: c.log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, record.Close()) }()
	incarnation := record.Incarnation()
	if _, err := c.store.CloseLanes(ctx, c.cfg.Base.Node, incarnation, c.id.Principal().String()); err != nil {
		return fmt.Errorf("closing the lanes of earlier runs: %w", err)
	}
	lane, err := c.store.OpenLane(ctx, c.cfg.Base.Node, incarnation, 0)
	if err != nil {
		return fmt.Errorf("opening a lane of the change feed: %w", err)
	}
	groups, err := hsmsync.NewGroups(hsmsync.Config{
		Site: c.cfg.Site, Identity: c.id, Manifest: hsmsync.NewManifest(c.store), Epoch: c.result.Epoch, Log: c.log,
	})
	if err != nil {
		return err
	}
	for _, spec := range specs { // so that members begin to prove their keys at once
		if _, err := groups.Group(spec.KeyGroup); err != nil {
			return err
		}
	}
	profiles, err := ca.DefaultProfiles()
	if err != nil {
		return err
	}
	macs, err := db.LoadMACKeys(c.cfg.MACKeyFile)
	if err != nil {
		return err
	}
	engine, err := ca.New(ca.Config{
		Node: c.cfg.Base.Node, Store: c.store, Journal: record, Lane: lane, Keys: keySource{groups}, MACKeys: macs, Profiles: profiles,
		Epoch: c.result.Epoch, BaseURL: c.cfg.BaseURL, Log: c.log,
	})
	if err != nil {
		return err
	}
	background.Go(func() error { return groups.Run(ctx) })
	working, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- engine.Run(working) }()
	for _, issuing := range specs[1:] {
		spec := ca.EstablishSpec{Requester: c.id.Principal().String(), Root: specs[0], Issuing: issuing}
		if err = insistOn(ctx, func() error { return ca.Establish(ctx, engine, spec) }); err != nil {
			break
		}
	}
	if err == nil {
		err = c.publish(engine.Authorities())
	}
	stop()
	// The lane after the engine, so that nothing wants to write to it any more.
	return errors.Join(err, <-ended, lane.Close(ctx))
}

// insistOn repeats a step that may be repeated for as long as its error says that a repeat may help.
func insistOn(ctx context.Context, step func() error) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		err := step()
		var e *ca.Error
		if err == nil || !errors.As(err, &e) || !e.Retryable() {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// publish writes the CAs' certificates for those who will trust them.
func (c *ceremony) publish(all *ca.Authorities) error {
	for _, a := range all.All() {
		made := caMade{ID: a.Issuer, State: string(a.State)}
		if c.cfg.Publish != "" && len(a.Chain) > 0 {
			made.Certificate = filepath.Join(c.cfg.Publish, a.Issuer+".pem")
			made.Chain = filepath.Join(c.cfg.Publish, a.Issuer+"-chain.pem")
			var chain []byte
			for _, cert := range a.Chain {
				chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
			}
			first := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate.Raw})
			if err := errors.Join(writeFile(made.Certificate, first, 0o644), writeFile(made.Chain, chain, 0o644)); err != nil {
				return err
			}
		}
		c.result.CAs = append(c.result.CAs, made)
	}
	return nil
}

// step does one step and tells how long it took.
func (c *ceremony) step(what string, fn func() error) error {
	began := time.Now()
	if err := fn(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	c.app.sayf("%s: done (%.1f s)", what, time.Since(began).Seconds())
	return nil
}

// keySource hands the groups' keys to the engine.
type keySource struct{ groups *hsmsync.Groups }

// Key implements ca.KeySource.
func (k keySource) Key(ctx context.Context, name ca.KeyName) (ca.Signer, error) {
	key, err := k.groups.Key(ctx, name.Group, name.ID)
	if err != nil {
		return nil, err
	}
	return key, nil
}
