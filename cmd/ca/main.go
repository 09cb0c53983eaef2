// Command ca is a CA node: it issues and revokes certificates and signs CRLs. It holds no key: an HSM group signs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"trivet/ballast"
)

func main() {
	ballast.Load()
	path := flag.String("config", "", "configuration `FILE` (YAML)")
	check := flag.Bool("check", false, "check the configuration and connect to nothing")
	flag.Parse()
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	if *path == "" || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "usage: ca --config FILE [--check]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, *path, *check, log); err != nil {
		log.Error("ca ended", "err", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, path string, check bool, log *slog.Logger) error {
	cfg, err := readConfig(path)
	if err != nil {
		return err
	}
	if err := cfg.checkFiles(); err != nil {
		return fmt.Errorf("checking the configuration %s: %w", path, err)
	}
	n := &node{cfg: cfg, log: log.With("node", cfg.Node)}
	if check {
		if err := errors.Join(n.loadIdentity(), n.loadProfiles()); err != nil {
			return err
		}
		fmt.Println("ok")
		return nil
	}
	return n.run(ctx)
}
