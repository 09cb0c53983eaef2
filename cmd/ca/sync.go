package main

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"trivet/db"
	"trivet/hsmsync"
	"trivet/identity"
)

// keySync keeps the keys of every HSM group in step: copies that are missing are made, keys that were destroyed are destroyed everywhere, and
// what nobody asked for is reported. It acts under an identity of its own, which can use no key.
type keySync struct {
	cfg *config
	id  *identity.Identity
}

// loadSync returns nil where the configuration has none.
func loadSync(cfg *config) (*keySync, error) {
	if cfg.Sync == nil {
		return nil, nil
	}
	id, err := identity.Load(cfg.Sync.Identity)
	if err != nil {
		return nil, fmt.Errorf("loading the identity for key sync: %w", err)
	}
	if p := id.Principal(); p.Cluster != cfg.Cluster || p.Role != identity.RoleSync {
		return nil, fmt.Errorf("loading the identity for key sync: it is %s, want one of cluster %s and role %s", p, cfg.Cluster, identity.RoleSync)
	}
	return &keySync{cfg: cfg, id: id}, nil
}

// start runs the job among tasks until ctx ends. What fails in it is logged and tried again: the node serves without it.
func (k *keySync) start(ctx context.Context, n *node, tasks *errgroup.Group) error {
	c := n.cfg.Database
	log := n.log.With("job", "key-sync")
	cfg := db.Config{Nodes: c.Nodes, Name: c.Name, User: k.cfg.Sync.User, PasswordFile: k.cfg.Sync.PasswordFile, MaxConns: 2, Role: string(identity.RoleSync), Log: log}
	if c.TLS {
		cfg.TLS = k.id.ClientTLS(identity.RoleDB)
	}
	store, err := db.Open(cfg) // not run: it is asked every few seconds, and probes then
	if err != nil {
		return err
	}
	record := hsmsync.NewManifest(store)
	coordinators := hsmsync.CoordinatorConfig{Identity: k.id, Chain: record, Log: log, Metrics: n.registry}
	tasks.Go(func() error { return k.id.Watch(ctx, identityEvery, log) })
	tasks.Go(func() error {
		defer store.Close()
		return hsmsync.ReconcileAll(ctx, coordinators, record, k.cfg.Sync.Every)
	})
	return nil
}
