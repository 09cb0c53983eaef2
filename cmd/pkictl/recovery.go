package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/ca"
	"trivet/db"
	"trivet/identity"
)

// recoveryReport is what the record says of the newest recovery rounds.
type recoveryReport struct {
	Open bool `json:"open"` // a round is under way: nothing is released
	// NotPutBack is what no journal knows, if a round shown found rows lost: operators compare, and do again what is missing.
	NotPutBack []string        `json:"not_put_back,omitempty"`
	Rounds     []recoveryRound `json:"rounds"`
}

type recoveryRound struct {
	Round  uint64          `json:"round"`
	Begun  time.Time       `json:"begun"`
	By     string          `json:"by"`
	Cause  string          `json:"cause"`
	Proved bool            `json:"proved"` // rows are known to be lost
	Ended  *time.Time      `json:"ended,omitempty"`
	Nodes  []recoveryPart  `json:"nodes"`
	Result json.RawMessage `json:"result,omitempty"`
}

type recoveryPart struct {
	Node        string          `json:"node"`
	State       string          `json:"state"` // absent, begun, done, covered
	Incarnation string          `json:"incarnation,omitempty"`
	By          string          `json:"by,omitempty"`
	At          time.Time       `json:"at,omitzero"`
	Detail      json.RawMessage `json:"detail,omitempty"`
}

// notPutBack is what a database that lost commits may lack for good: no journal knows the rows.
var notPutBack = []string{
	"CA generations: compare `pkictl ca list` with the CAs in use, and see the runbook docs/runbooks/database-lost-commits.md",
	"members, approvals and policies of HSM groups: compare `pkictl hsm status` and `pkictl hsm verify`; repeat `pkictl hsm enroll`, `replace` or `activate`",
	"VA nodes' registrations: see `pkictl health`; a VA node registers again when it starts",
	"blocks of keys by CA nodes of older versions: `pkictl fsck`, and the runbook docs/runbooks/database-lost-commits.md",
}

// nodeAbsent is the state of a node that has no row in the round that is under way.
const nodeAbsent = "absent"

func (a *app) recoveryCommand() *cobra.Command {
	return group("recovery", "See and settle recovery after a database that lost commits",
		`When the database has gone back in time, the CA nodes hold a recovery round: nothing is released until every node has put back what its
journal, and the copies it keeps for others, say was released. docs/runbooks/database-lost-commits.md says what to do when one does not end.`,
		a.recoveryStatus(), a.recoveryAcknowledge())
}

func (a *app) recoveryStatus() *cobra.Command {
	var config string
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the newest recovery rounds",
		Long: `Show the newest recovery rounds: what began them, which node has done its part, what was put back, and who is waited for. The exit code is 1
while a round is under way. ` + "`pkictl health`" + ` says what each node does meanwhile.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (recoveryReport, error) {
			store, done, err := a.recoveryStore(ctx, config, "fsck")
			if err != nil {
				return recoveryReport{}, err
			}
			defer done()
			r, err := readRecovery(ctx, store)
			if err == nil && r.Open {
				err = errQuiet
			}
			return r, err
		}, func(w io.Writer, r recoveryReport) {
			if len(r.Rounds) == 0 {
				fmt.Fprintln(w, "no recovery round was ever needed")
				return
			}
			for _, round := range r.Rounds {
				state := "under way: nothing is released"
				if round.Ended != nil {
					state = "ended " + round.Ended.Format(time.RFC3339) + " " + string(round.Result)
				}
				fmt.Fprintf(w, "round %d\t%s\nbegun\t%s by %s\ncause\t%s\nloss\t%s\n", round.Round, state, round.Begun.Format(time.RFC3339), round.By, round.Cause,
					map[bool]string{true: "proved", false: "suspected"}[round.Proved])
				for _, p := range round.Nodes {
					if p.State == nodeAbsent {
						fmt.Fprintf(w, "  %s\tabsent: it has not begun its part\n", p.Node)
						continue
					}
					fmt.Fprintf(w, "  %s\t%s at %s by %s\t%s\n", p.Node, p.State, p.At.Format(time.RFC3339), p.By, p.Detail)
				}
			}
			for _, what := range r.NotPutBack {
				fmt.Fprintf(w, "not put back: %s\n", what)
			}
		}),
	}
	c.Flags().StringVar(&config, "config", "", "configuration, as of pkictl fsck; without it the running demo's")
	return c
}

func (a *app) recoveryAcknowledge() *cobra.Command {
	var config, node string
	var unknown bool
	c := &cobra.Command{
		Use:   "acknowledge --node NAME",
		Short: "Let a recovery round end without a node",
		Long: `Let the recovery round that is under way end without a node, when its disk is gone and no other node holds its copies. Whatever that node released
and the database lost is then lost: certificates that their owners have and the record does not know, revocations that only the CRL shows.

The account must be allowed to write to the record: the one that ` + "`pkictl init`" + ` uses. In a demo it is found by itself.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (map[string]any, error) {
			if node == "" {
				return nil, usagef("--node is needed: the node that the round waits for, see `pkictl recovery status` and `pkictl health`")
			}
			store, done, err := a.recoveryStore(ctx, config, "init")
			if err != nil {
				return nil, err
			}
			defer done()
			n, err := ca.AcknowledgeAbsent(ctx, store, node, "operator", unknown)
			if errors.Is(err, ca.ErrUnknownNode) {
				err = fmt.Errorf("%w. If the database has lost all of %s, and the others wait for it (`pkictl health`), repeat with --unknown", err, node)
			}
			return map[string]any{"round": n, "node": node}, err
		}, func(w io.Writer, r map[string]any) {
			fmt.Fprintf(w, "recovery round %v goes on without %v\n", r["round"], r["node"])
		}),
	}
	c.Flags().StringVar(&config, "config", "", "configuration, as of pkictl init; without it the running demo's")
	c.Flags().StringVar(&node, "node", "", "the node to go on without")
	c.Flags().BoolVar(&unknown, "unknown", false, "even if the record does not know the node")
	return c
}

// recoveryStore opens the record with the account of a configuration; demo names that of a demo.
func (a *app) recoveryStore(ctx context.Context, config, demo string) (*db.Store, func(), error) {
	if config == "" {
		d, err := a.demo()
		if err != nil {
			return nil, nil, err
		}
		config = d.Layout().Config(demo)
	}
	var cfg siteConfig
	if demo == "init" {
		var c initConfig
		if err := readYAML(config, &c); err != nil {
			return nil, nil, err
		}
		cfg = c.Base
	} else {
		var c fsckConfig
		if err := readYAML(config, &c); err != nil {
			return nil, nil, err
		}
		cfg = c.Site
	}
	id, err := identity.Load(cfg.Identity)
	if err != nil {
		return nil, nil, err
	}
	store, err := db.Open(cfg.database(id, slog.New(slog.DiscardHandler)))
	if err != nil {
		return nil, nil, err
	}
	return store, func() { store.Close() }, nil
}

const shownRounds = 5

func readRecovery(ctx context.Context, store *db.Store) (recoveryReport, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out := recoveryReport{Rounds: []recoveryRound{}}
	state, err := store.RoundState(ctx)
	if err != nil {
		return out, err
	}
	out.Open = !state.Open()
	for n := state.N; n > 0 && len(out.Rounds) < shownRounds; n-- {
		report, err := store.Round(ctx, n)
		if err != nil {
			return out, err
		}
		if report == nil {
			continue // lost with the rest; a later round made up for it
		}
		r := recoveryRound{Round: n, Begun: report.Created, By: report.Node, Cause: report.Cause, Proved: report.Proved, Nodes: []recoveryPart{}}
		if report.End != nil {
			r.Ended, r.Result = &report.End.Created, report.End.Detail
		} else if n < state.N {
			r.Result = json.RawMessage(`{"overtaken": true}`)
			r.Ended = &report.Created
		}
		last := map[string]int{}
		for _, e := range report.Recons {
			p := recoveryPart{Node: e.Node, State: e.Event, Incarnation: hex.EncodeToString(e.Incarnation), By: e.Witness, At: e.Created}
			if len(e.Detail) > 0 && json.Valid(e.Detail) {
				p.Detail = e.Detail
			}
			if i, ok := last[e.Node]; ok {
				r.Nodes[i] = p
			} else {
				last[e.Node] = len(r.Nodes)
				r.Nodes = append(r.Nodes, p)
			}
		}
		if r.Ended == nil {
			known, err := ca.Nodes(ctx, store, report)
			if err != nil {
				return out, err
			}
			for _, node := range known {
				if _, ok := last[node]; !ok {
					r.Nodes = append(r.Nodes, recoveryPart{Node: node, State: nodeAbsent})
				}
			}
		}
		r.Cause = strings.ToValidUTF8(r.Cause, "?")
		if r.Proved {
			out.NotPutBack = notPutBack
		}
		out.Rounds = append(out.Rounds, r)
	}
	return out, nil
}
