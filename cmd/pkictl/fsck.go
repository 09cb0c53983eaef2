package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/db"
	"trivet/fsck"
	"trivet/identity"
)

// fsckConfig is what `pkictl fsck` reads.
type fsckConfig struct {
	Site siteConfig `yaml:",inline"`
	// Journals maps a node's name to its journal directory, mounted or copied here. Nodes left out are not checked.
	Journals map[string]string `yaml:"journals"`
	// MACKeyFile holds the keys by which CA nodes recognise each other's rows; without it those rows are not authenticated.
	MACKeyFile string `yaml:"mac_key_file"`
	// Responders are asked about every certificate, each directly: name, and url of its public listener.
	Responders []fsck.Responder `yaml:"responders"`
}

func (a *app) fsckCommand() *cobra.Command {
	var config string
	var settle, crlDelay time.Duration
	var ask int
	c := &cobra.Command{
		Use:   "fsck",
		Short: "Hold every invariant against the live cluster",
		Long: `Hold every invariant against the live cluster: journals, record, change feed, CRLs and what every responder says must tell one story. It only
reads, and the cluster goes on meanwhile. The exit code is 1 if anything is violated or could not be checked.

Without --config the running demo is checked. The configuration holds cluster, node, identity (role fsck), database, journals
(node: directory), mac_key_file and responders (name, url).

Asking every responder about every certificate takes about a millisecond each. With --ask N they are asked about the newest N, about N others chosen at random, and
about all that are revoked; everything else is checked whole, and the report says how many were left out.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (fsck.Report, error) {
			if config == "" {
				demo, err := a.demo()
				if err != nil {
					return fsck.Report{}, err
				}
				config = demo.Layout().Config("fsck")
			}
			var cfg fsckConfig
			if err := readYAML(config, &cfg); err != nil {
				return fsck.Report{}, err
			}
			report, err := runFsck(ctx, &cfg, ask, settle, crlDelay)
			if err == nil && !report.OK {
				err = errQuiet
			}
			return report, err
		}, func(w io.Writer, r fsck.Report) {
			names := make([]string, 0, len(r.Checked))
			for name := range r.Checked {
				names = append(names, name)
			}
			sort.Strings(names)
			for _, name := range names {
				fmt.Fprintf(w, "%s\t%d\n", strings.ReplaceAll(name, "_", " "), r.Checked[name])
			}
			for _, what := range r.Unchecked {
				fmt.Fprintf(w, "\nnot checked: %s\n", what)
			}
			if r.OK {
				fmt.Fprintln(w, "\nno invariant is violated")
				return
			}
			fmt.Fprintf(w, "\n%d violations\nINVARIANT\tOBJECT\tDETAIL\n", len(r.Violations))
			for _, v := range r.Violations {
				fmt.Fprintf(w, "%s\t%s\t%s\n", v.Invariant, v.Object, v.Detail)
			}
		}),
	}
	c.Flags().StringVar(&config, "config", "", "configuration; without it the running demo is checked")
	c.Flags().IntVar(&ask, "ask", 0, "ask responders about the newest N certificates and N others only; 0: about all")
	c.Flags().DurationVar(&settle, "settle", 10*time.Second, "how long a responder may take to show what the record says")
	c.Flags().DurationVar(&crlDelay, "crl-delay", time.Minute, "how long a revocation may wait for its CRL")
	return c
}

func runFsck(ctx context.Context, cfg *fsckConfig, ask int, settle, crlDelay time.Duration) (fsck.Report, error) {
	var macs *db.MACKeys
	if cfg.MACKeyFile != "" {
		var err error
		if macs, err = db.LoadMACKeys(cfg.MACKeyFile); err != nil {
			return fsck.Report{}, err
		}
	}
	id, err := identity.Load(cfg.Site.Identity)
	if err != nil {
		return fsck.Report{}, err
	}
	store, err := db.Open(cfg.Site.database(id, slog.New(slog.DiscardHandler)))
	if err != nil {
		return fsck.Report{}, err
	}
	defer store.Close()
	probing, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = store.Run(probing) // ends with stop
	}()
	defer func() { stop(); <-ended }()
	return fsck.Run(ctx, fsck.Config{Store: store, Journals: cfg.Journals, MACKeys: macs, Responders: cfg.Responders, Ask: ask, Settle: settle, CRLDelay: crlDelay})
}
