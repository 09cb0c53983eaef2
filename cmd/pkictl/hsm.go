package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"trivet/db"
	"trivet/hsmsync"
	"trivet/identity"
)

func (a *app) hsmCommand() *cobra.Command {
	var config string
	var wait time.Duration
	status := &cobra.Command{
		Use:   "status",
		Short: "Show the HSM group: members, and which keys each has just proved to hold",
		Long: `Show the HSM group: members, and which keys each has just proved to hold. Every member is asked to sign a fresh challenge with every live
key; nothing else is done to it. The exit code is 1 unless every member is active.

Without --config the running demo is asked. The configuration holds cluster, node, identity (role sync), database and hsm, as that of
"pkictl init" does.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (hsmsync.Status, error) {
			if config == "" {
				demo, err := a.demo()
				if err != nil {
					return hsmsync.Status{}, err
				}
				config = demo.Layout().Config("sync")
			}
			var cfg siteConfig
			if err := readYAML(config, &cfg); err != nil {
				return hsmsync.Status{}, err
			}
			if err := cfg.check(); err != nil {
				return hsmsync.Status{}, fmt.Errorf("checking the configuration %s: %w", config, err)
			}
			return groupStatus(ctx, &cfg, wait)
		}, func(w io.Writer, st hsmsync.Status) {
			for _, g := range st.Groups {
				fmt.Fprintf(w, "group %s, epoch %d\n\nMEMBER\tSTATE\tKEYS\tTOKEN\tCAUSE\n", g.Name, g.Epoch)
				for _, m := range g.Members {
					var keys []string
					for _, k := range m.Keys {
						keys = append(keys, fmt.Sprintf("%s:%s %s", k.Purpose, k.Label, k.State))
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", m.Name, m.State, strings.Join(keys, ", "), m.TokenSerial, m.Cause)
				}
			}
		}),
	}
	status.Flags().StringVar(&config, "config", "", "configuration; without it the running demo is asked")
	status.Flags().DurationVar(&wait, "wait", 5*time.Second, "how long to wait for members that have not answered yet")
	return group("hsm", "Look at HSM groups", "Look at HSM groups.", status)
}

// groupStatus follows the group until every member has either proved its keys or failed, or for as long as wait.
func groupStatus(ctx context.Context, cfg *siteConfig, wait time.Duration) (hsmsync.Status, error) {
	log := slog.New(slog.DiscardHandler) // what is not well is in the status
	id, err := identity.Load(cfg.Identity)
	if err != nil {
		return hsmsync.Status{}, err
	}
	store, err := db.Open(cfg.database(id, log))
	if err != nil {
		return hsmsync.Status{}, err
	}
	defer store.Close()
	g, err := hsmsync.New(hsmsync.Config{Group: cfg.HSM.Group, Members: cfg.HSM.Members, Identity: id, Manifest: hsmsync.NewManifest(store), Log: log})
	if err != nil {
		return hsmsync.Status{}, err
	}
	ctx, stop := context.WithCancel(ctx)
	run, ctx := errgroup.WithContext(ctx)
	run.Go(func() error { return store.Run(ctx) })
	run.Go(func() error { return g.Run(ctx) })
	for end := time.Now().Add(wait); !settled(g.Status()) && time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(20 * time.Millisecond)
	}
	st := g.Status()
	stop()
	if err := run.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return hsmsync.Status{}, err
	}
	for _, g := range st.Groups {
		for _, m := range g.Members {
			if m.State != "active" {
				return st, errQuiet
			}
		}
	}
	return st, nil
}

// settled tells whether waiting would show nothing new.
func settled(st hsmsync.Status) bool {
	for _, g := range st.Groups {
		if g.Epoch == 0 {
			return false // the manifest has not been read
		}
		for _, m := range g.Members {
			if m.State == "joining" || m.State == "syncing" || m.State == "suspect" {
				return false
			}
		}
	}
	return true
}
