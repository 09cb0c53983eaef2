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
	app      *app
	cfg      siteConfig
	demo     *cluster.Cluster // nil with --config
	id       *identity.Identity
	store    *db.Store
	record   *hsmsync.Record
	log      *slog.Logger
	progress *progress

	group       string // which one is meant; set by choose and use
	coordinator *hsmsync.Coordinator
}

// groupFlags gives a command, and those below it, what openGroup reads.
func (a *app) groupFlags(c *cobra.Command) *cobra.Command {
	c.PersistentFlags().StringVar(&a.config, "config", "", "configuration of the site; without it the running demo is used")
	c.PersistentFlags().StringVar(&a.group, "group", "", "the HSM group that is meant, if there are several")
	_ = c.RegisterFlagCompletionFunc("group", a.groupNames)
	return c
}

const groupHelp = `

Without --config the running demo is used. The configuration holds cluster, node, identity (role sync) and database, as that of
"pkictl init" does. --group names the HSM group; where there is but one it need not be named.`

// openGroup opens the site and finds out which group is meant. The caller closes it.
func (a *app) openGroup(ctx context.Context) (*groupSite, error) {
	s, err := a.openSite()
	if err != nil {
		return nil, err
	}
	if err := s.choose(ctx); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// openSite connects to nothing yet. The caller closes it.
func (a *app) openSite() (*groupSite, error) {
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
	s.log = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelError}))
	if s.store, err = db.Open(s.cfg.database(s.id, s.log)); err != nil {
		return nil, err
	}
	s.record, s.progress = hsmsync.NewManifest(s.store), newProgress(a.err)
	return s, nil
}

func (s *groupSite) close() {
	s.progress.end()
	if s.coordinator != nil {
		s.coordinator.Close()
	}
	_ = s.store.Close()
}

// use makes a group, which may be yet to be created, the one that is meant.
func (s *groupSite) use(group string) (err error) {
	s.group = group
	s.coordinator, err = hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: group, Identity: s.id, Chain: s.record, Force: s.app.force, Log: s.log, Progress: s.progress.show,
	})
	return err
}

// groups lists the groups that the record has, those that were deleted at the end.
func (s *groupSite) groups(ctx context.Context) (there, deleted []string, err error) {
	bounded, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	all, err := s.record.Groups(bounded)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("which HSM groups there are could not be read within %s: `pkictl health` says how the database is", stateTimeout)
	}
	for _, g := range all {
		if g.Deleted {
			deleted = append(deleted, g.Name)
		} else {
			there = append(there, g.Name)
		}
	}
	return there, deleted, err
}

var errNoGroup = errors.New("there is no HSM group: `pkictl init` makes the first, `pkictl hsm group create` others")

// choose finds out which group is meant: the one that --group names, or the only one there is.
func (s *groupSite) choose(ctx context.Context) error {
	there, deleted, err := s.groups(ctx)
	name := s.app.group
	switch {
	case err != nil:
		return err
	case name != "" && slices.Contains(deleted, name):
		return fmt.Errorf("group %s was deleted: `pkictl hsm group list` shows what is left of it", name)
	case name != "" && !slices.Contains(there, name):
		return fmt.Errorf("there is no HSM group %q: there are %s", name, orNone(strings.Join(there, ", ")))
	case name != "":
		return s.use(name)
	case len(there) == 1:
		return s.use(there[0])
	case len(there) == 0:
		return errNoGroup
	}
	return usagef("there are several HSM groups: say which with --group: %s", strings.Join(there, ", "))
}

// groupNames completes the names of groups.
func (a *app) groupNames(c *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	s, err := a.openSite()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer s.close()
	there, _, err := s.groups(c.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return there, cobra.ShellCompDirectiveNoFileComp
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
		return nil, fmt.Errorf("the log of group %s could not be read within %s: `pkictl health` says how the database is", s.group, stateTimeout)
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
		return m, fmt.Errorf("group %s has no member %q: there are %s", s.group, name, strings.Join(names, ", "))
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
	return a.changingOf(func(ctx context.Context, _ []string) (*groupSite, error) { return a.openGroup(ctx) }, verb, f, dryRun, prepare)
}

// changingOf is changing of a group that is found in another way.
func (a *app) changingOf(open func(ctx context.Context, args []string) (*groupSite, error), verb string, f *grantFlags, dryRun *bool,
	prepare func(ctx context.Context, s *groupSite, args []string) (change, error)) func(*cobra.Command, []string) error {
	return do(a, func(ctx context.Context, args []string) (changed, error) {
		s, err := open(ctx, args)
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
		r := changed{Verb: verb, Group: s.group, Object: c.object, Steps: c.steps, DryRun: *dryRun}
		// What would be refused is refused here, whether or not it is a dry run, and before people are asked.
		rehearse := func(grant []byte) (hsmsync.Plan, error) {
			return s.coordinator.DryRun(ctx, func(dry *hsmsync.Coordinator) error { return c.act(ctx, dry, grant) })
		}
		var grant []byte
		if f != nil {
			plan, err := rehearse(nil)
			if err != nil {
				return changed{}, err
			}
			if c.approval == nil && len(plan.Wants) > 0 {
				c.approval = &plan.Wants[0]
			}
			if c.approval != nil && r.DryRun && (f.none() || f.requestOut != "") {
				a.sayf("two people must approve it")
				r.Plan = plan.Steps
				return r, nil
			}
		}
		if c.approval != nil {
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
			plan, err := rehearse(grant)
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
