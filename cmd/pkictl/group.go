package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/cluster"
	"trivet/db"
	"trivet/hsmsync"
	"trivet/identity"
)

// groupSite is an HSM group as an operator's command works on it: under an identity of role sync, which may move keys and use none.
type groupSite struct {
	app         *app
	cfg         siteConfig
	demo        *cluster.Cluster // nil with --config
	id          *identity.Identity
	store       *db.Store
	progress    *progress
	coordinator *hsmsync.Coordinator
}

// groupFlags gives a command, and those below it, what openGroup reads.
func (a *app) groupFlags(c *cobra.Command) *cobra.Command {
	c.PersistentFlags().StringVar(&a.config, "config", "", "configuration of the site; without it the running demo is used")
	return c
}

const groupHelp = `

Without --config the running demo is used. The configuration holds cluster, node, identity (role sync), database and hsm, as that of
"pkictl init" does.`

// openGroup connects to nothing yet. The caller closes it.
func (a *app) openGroup() (*groupSite, error) {
	s := &groupSite{app: a}
	file := a.config
	if file == "" {
		var err error
		if s.demo, err = a.demo(); err != nil {
			return nil, err
		}
		file = s.demo.Layout().Config("sync")
	}
	if err := readYAML(file, &s.cfg); err != nil {
		return nil, err
	}
	err := s.cfg.check()
	if err == nil {
		s.id, err = identity.Load(s.cfg.Identity)
	}
	if err == nil && s.id.Principal().Role != identity.RoleSync {
		err = fmt.Errorf("identity is %s: want one of role %s", s.id.Principal(), identity.RoleSync)
	}
	if err != nil {
		return nil, fmt.Errorf("checking the configuration %s: %w", file, err)
	}
	log := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelError}))
	if s.store, err = db.Open(s.cfg.database(s.id, log)); err != nil {
		return nil, err
	}
	s.progress = newProgress(a.err)
	s.coordinator, err = hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: s.cfg.HSM.Group, Identity: s.id, Chain: hsmsync.NewManifest(s.store), Force: a.force, Log: log, Progress: s.progress.show,
	})
	if err != nil {
		return nil, errors.Join(err, s.store.Close())
	}
	return s, nil
}

func (s *groupSite) close() {
	s.progress.end()
	s.coordinator.Close()
	_ = s.store.Close()
}

// stateTimeout is how long a command waits for the group's log before it says that the database does not answer. A database
// node that dies costs some seconds, so it is not less.
const stateTimeout = 15 * time.Second

// state is the group as its log has it now.
func (s *groupSite) state(ctx context.Context) (*hsmsync.State, error) {
	bounded, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	st, err := s.coordinator.State(bounded)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("the log of group %s could not be read within %s: `pkictl health` says how the database is", s.cfg.HSM.Group, stateTimeout)
	}
	return st, err
}

// member is a member of the group; an unknown name is an error that lists those there are.
func (s *groupSite) member(st *hsmsync.State, name string) (hsmsync.GroupMember, error) {
	m, ok := st.Member(name)
	if !ok {
		var names []string
		for _, m := range st.Members() {
			names = append(names, m.Name)
		}
		return m, fmt.Errorf("group %s has no member %q: there are %s", s.cfg.HSM.Group, name, strings.Join(names, ", "))
	}
	return m, nil
}

// changed is what a changing verb prints.
type changed struct {
	Verb   string `json:"verb"`
	Group  string `json:"group"`
	Object string `json:"object"`
	// Steps are what the verb means, Plan what exactly a dry run found that it would do; there is none before the approval.
	Steps  []string       `json:"steps"`
	Plan   []hsmsync.Step `json:"plan,omitempty"`
	DryRun bool           `json:"dry_run"`
	// Request is the file in which approval is asked for; nothing is done yet then.
	Request string `json:"request,omitempty"`
	Done    bool   `json:"done"`
	Result  any    `json:"result,omitempty"`
}

// change is one changing verb. Whatever it needs to know it has found out when it is made, which changes nothing.
type change struct {
	object   string
	steps    []string
	approval *hsmsync.Act // what people must approve; nil: nothing
	act      func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) error
	result   func(ctx context.Context) (any, error) // after act; nil: nothing to tell
}

// changing makes the command's own code from prepare.
func (a *app) changing(verb string, f *grantFlags, dryRun *bool, prepare func(ctx context.Context, s *groupSite, args []string) (change, error)) func(*cobra.Command, []string) error {
	return do(a, func(ctx context.Context, args []string) (changed, error) {
		s, err := a.openGroup()
		if err != nil {
			return changed{}, err
		}
		defer s.close()
		if _, err := s.state(ctx); err != nil { // nothing is begun while the database is gone
			return changed{}, err
		}
		c, err := prepare(ctx, s, args)
		if err != nil {
			return changed{}, err
		}
		r := changed{Verb: verb, Group: s.cfg.HSM.Group, Object: c.object, Steps: c.steps, DryRun: *dryRun}
		var grant []byte
		if c.approval != nil {
			if r.DryRun && (f.none() || f.requestOut != "") {
				a.sayf("two people must approve it; with --grant or --approve-as a dry run shows each step, and is refused where the act would be")
				return r, nil
			}
			g, err := s.grant(f, *c.approval)
			if errors.Is(err, errRequested) {
				r.Request = f.requestOut
				a.sayf("nothing is done yet: two people approve it with `pkictl approve %s`, then repeat the command with --grant %s", r.Request, r.Request)
				return r, nil
			}
			if err != nil {
				return changed{}, err
			}
			if grant, err = json.Marshal(g); err != nil {
				return changed{}, err
			}
		}
		if r.DryRun {
			plan, err := s.coordinator.DryRun(ctx, func(dry *hsmsync.Coordinator) error { return c.act(ctx, dry, grant) })
			r.Plan = plan.Steps
			return r, err
		}
		if err := c.act(ctx, s.coordinator, grant); err != nil {
			return changed{}, err
		}
		s.progress.end()
		r.Done = true
		if c.result != nil {
			r.Result, err = c.result(ctx)
		}
		return r, err
	}, printChanged)
}

func printChanged(w io.Writer, r changed) {
	switch {
	case r.DryRun:
		fmt.Fprintf(w, "%s %s would:\n", r.Verb, r.Object)
	case r.Request != "":
		fmt.Fprintf(w, "request\t%s\n%s %s will:\n", r.Request, r.Verb, r.Object)
	default:
		fmt.Fprintf(w, "%s %s: done\n", r.Verb, r.Object)
		if t, ok := r.Result.(interface{ text(io.Writer) }); ok {
			t.text(w)
		}
		return
	}
	for i, step := range r.Steps {
		fmt.Fprintf(w, "%3d. %s\n", i+1, step)
	}
	if len(r.Plan) > 0 {
		fmt.Fprintln(w, "that is, as far as can be known now:")
	}
	for _, step := range r.Plan {
		fmt.Fprintf(w, "     %s\n", step)
	}
}

// dryRunFlag gives a changing verb its --dry-run.
func dryRunFlag(c *cobra.Command) *bool {
	return c.Flags().Bool("dry-run", false, "show what would be done, and do nothing")
}

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// plural is n and the noun.
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
