package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/cluster"
	"trivet/db"
	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

func (a *app) hsmGroup() *cobra.Command {
	return group("group", "Several HSM groups: list, create, delete",
		`Several HSM groups, one for each kind of key: a root key in HSMs that are locked away most of the time, responders' keys in small ones near the
responders. An HSM is in one group; its agent refuses the domain key of a second.`,
		a.groupList(), a.groupCreate(), a.groupDelete())
}

// groupInfo is one group as its log has it.
type groupInfo struct {
	Name     string            `json:"name"`
	Deleted  bool              `json:"deleted"`
	Since    time.Time         `json:"since"` // of the newest entry of its log
	Position uint64            `json:"position"`
	Members  map[string]string `json:"members"` // state by name
	Keys     map[string]int    `json:"keys"`    // number by state
	Policy   policyView        `json:"policy"`
	// Incomplete names the members with which it was to begin and which do not serve yet.
	Incomplete []string `json:"incomplete,omitempty"`
	Why        string   `json:"why,omitempty"`         // it was created, or deleted
	By         []string `json:"approved_by,omitempty"` // the same
}

func infoOf(name string, st *hsmsync.State) groupInfo {
	i := groupInfo{
		Name: name, Deleted: st.Deleted, Since: st.Last.Created, Position: st.Last.N, Members: map[string]string{}, Keys: map[string]int{}, Policy: viewOf(st.Policy),
		Incomplete: st.Unfinished(), Why: st.Created.Why, By: st.Created.By,
	}
	if st.Deleted {
		i.Why, i.By = st.Ended.Why, st.Ended.By
	}
	for _, m := range st.Members() {
		i.Members[m.Name] = string(m.State)
	}
	for _, k := range st.Keys() {
		i.Keys[string(k.State)]++
	}
	return i
}

func (i groupInfo) text(w io.Writer) {
	state := "in use"
	switch {
	case len(i.Incomplete) > 0:
		state = "incomplete"
	case i.Deleted:
		state = "deleted " + i.Since.UTC().Format(time.RFC3339)
	}
	var keys []string
	for _, s := range sorted(i.Keys) {
		keys = append(keys, strconv.Itoa(i.Keys[s])+" "+s)
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s, %d copies\t%s\n", i.Name, state, dash(strings.Join(sorted(i.Members), " ")), dash(strings.Join(keys, ", ")), i.Policy.Driver, i.Policy.MinCopies, i.Why)
}

const groupHeader = "GROUP\tSTATE\tMEMBERS\tKEYS\tPOLICY\tWHY\n"

func (a *app) groupList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the groups, those that were deleted too", Long: `List the groups, those that were deleted too: their names are not used again.` + groupHelp, Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) ([]groupInfo, error) {
			s, err := a.openSite()
			if err != nil {
				return nil, err
			}
			defer s.close()
			there, deleted, err := s.groups(ctx)
			if err != nil {
				return nil, err
			}
			all := []groupInfo{}
			for _, name := range append(there, deleted...) {
				if a.group != "" && name != a.group {
					continue
				}
				st, err := s.logOf(ctx, name)
				if err != nil {
					return nil, fmt.Errorf("reading the log of group %s: %w", name, err)
				}
				all = append(all, infoOf(name, st))
			}
			return all, nil
		}, func(w io.Writer, all []groupInfo) {
			fmt.Fprint(w, groupHeader)
			for _, g := range all {
				g.text(w)
			}
			for _, g := range all {
				if len(g.Incomplete) > 0 {
					fmt.Fprintf(w, "group %s is incomplete: %s to serve. Repeat \"pkictl hsm group create %s\" as it was begun, or with a new approval; or end it with \"pkictl hsm group delete %s\"\n",
						g.Name, strings.Join(g.Incomplete, " and ")+map[bool]string{true: " has yet", false: " have yet"}[len(g.Incomplete) == 1], g.Name, g.Name)
				}
			}
		}),
	}
}

// created is a group that was just created, with what was found out about its members' tokens.
type created struct {
	groupInfo
	Tokens []joined `json:"tokens"`
}

func (c created) text(w io.Writer) {
	fmt.Fprint(w, groupHeader)
	c.groupInfo.text(w)
}

func (a *app) groupCreate() *cobra.Command {
	var f grantFlags
	var members, standbys, set []string
	var site, why, epoch string
	c := &cobra.Command{
		Use:   "create NAME --member HSM[=HOST:PORT] …",
		Short: "Begin a new group of new HSMs, while everything goes on",
		Long: `Begin a new group of new HSMs, while everything goes on. Their agents must run and their tokens be initialised and blank. One of them makes the
group's domain key, the others are given it, wrapped for the transport key of exactly the tokens that were approved. The policy is set as by
"pkictl hsm policy"; what is not set has its default. The command may be repeated after any failure, and goes on where it stopped: with the same approval, or with a new one once
that has expired. A new one may be for other members, if it names those that were entered already and have not been removed since (pkictl hsm remove).
"pkictl hsm group list" calls such a group incomplete; "pkictl hsm group delete" ends it.

Name at least one HSM more than the policy wants copies of a key: while one is away no key can be made otherwise. In a demo the addresses of
its HSM agents are known; "pkictl demo add hsmd-d" adds one.

--dry-run shows the tokens that answer, with the fingerprints of their transport keys. Compare them with what the one who set up the HSMs
wrote down.` + grantHelp + epochHelp + groupHelp,
		Example: `  pkictl hsm group create signing --member hsmd-d --member hsmd-e --member hsmd-f --set min_copies=2 --why "code signing" --dry-run
  pkictl hsm group create signing --member hsmd-d --member hsmd-e --member hsmd-f --why "code signing" --request-out create.json`,
		Args: cobra.ExactArgs(1),
	}
	c.Flags().StringArrayVar(&members, "member", nil, "an HSM and the address of its agent; give two or more")
	c.Flags().StringArrayVar(&standbys, "standby", nil, "the same, for one that signs only when no other can")
	c.Flags().StringVar(&site, "site", "", "the site they stand in")
	c.Flags().StringArrayVar(&set, "set", nil, "NAME=VALUE of the policy, see \"pkictl hsm policy --help\"; may be given several times")
	c.Flags().StringVar(&why, "why", "", "for the log: what the group is for")
	epochFlag(c, &epoch)
	f.add(c)
	dryRun := dryRunFlag(c)
	open := func(_ context.Context, args []string) (*groupSite, error) {
		if err := hsmsync.CheckGroupName(args[0]); err != nil {
			return nil, usageError{err}
		}
		if a.group != "" && a.group != args[0] {
			return nil, usagef("--group %s: the new group's name is the argument", a.group)
		}
		s, err := a.openSite()
		if err != nil {
			return nil, err
		}
		if err := s.use(args[0]); err != nil {
			s.close()
			return nil, err
		}
		return s, nil
	}
	c.RunE = a.changingOf(open, "create", &f, dryRun, func(ctx context.Context, s *groupSite, args []string) (change, error) {
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		if st.Deleted {
			return change{}, fmt.Errorf("group %s was deleted, and its name is not used again: choose another", s.group)
		}
		founding := hsmsync.Founding{Why: why}
		if founding.Policy, err = withPolicy(hsmsync.NewState().Policy, set); err != nil {
			return change{}, err
		}
		if s.demo != nil && site == "" {
			site = cluster.Site
		}
		for i, m := range append(slices.Clone(members), standbys...) {
			name, address, _ := strings.Cut(m, "=")
			if address, err = s.address(name, address); err != nil {
				return change{}, err
			}
			founding.Members = append(founding.Members, hsmsync.Member{Name: name, Address: address, Site: site, Standby: i >= len(members)})
		}
		act, all, err := s.coordinator.CreateAct(ctx, founding)
		if err != nil {
			return change{}, err
		}
		if founding.Epoch, err = s.epochRecord(ctx, &f, epoch, *dryRun, 0); err != nil {
			return change{}, err
		}
		steps := []string{fmt.Sprintf("enter group %s, with the approvals, and its policy: %s", s.group, viewOf(founding.Policy))}
		tokens := []joined{}
		for _, m := range all {
			as := "active"
			if m.Standby {
				as = "standby"
			}
			steps = append(steps, fmt.Sprintf("enter %s at %s as %s, with token %s, serial %s, transport key %s", m.Name, m.Address, as, m.TokenLabel, m.TokenSerial, m.Transport))
			tokens = append(tokens, joined{m.Name, m.Address, m.TokenSerial, m.TokenLabel, m.Transport})
		}
		return change{
			object: s.group, approval: &act,
			steps: append(steps, "make a domain key on one of them, and give it to the others, wrapped for their transport keys", "have them learn which site writes"),
			act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) error {
				return c.CreateGroup(ctx, founding, grant)
			},
			result: func(ctx context.Context) (any, error) {
				st, err := s.state(ctx)
				if err != nil {
					return nil, err
				}
				return created{infoOf(s.group, st), tokens}, nil
			},
		}, nil
	})
	return c
}

// String is the policy on one line.
func (p policyView) String() string {
	var out []string
	for _, f := range p.fields() {
		if f.value != "" && f.value != "false" {
			out = append(out, f.name+" "+f.value)
		}
	}
	return strings.Join(out, ", ")
}

// address is where the agent of an HSM listens: as given, or in a demo as it is laid out.
func (s *groupSite) address(name, given string) (string, error) {
	if given != "" {
		return given, nil
	}
	if s.demo == nil {
		return "", usagef("the address of %s is missing: name host:port of its agent", name)
	}
	p, err := s.demo.Layout().Part(name)
	if err != nil || p.Role != cluster.RoleHSMD {
		return "", usagef("%s is no HSM agent of the demo: add it with `pkictl demo add %s`, or name its address", name, name)
	}
	return p.Addresses["agent"], nil
}

func (a *app) groupDelete() *cobra.Command {
	var f grantFlags
	c := &cobra.Command{
		Use:   "delete NAME --why TEXT",
		Short: "End a group for good, once none of its keys is used any more",
		Long: `End a group for good, once none of its keys is used any more: no key of it is live, and no CA and no responder refers to it. Nothing can be
added to it afterwards, nothing signs with it, nobody watches its members, and its name is not used again.

Nothing is destroyed by this: the tokens keep the keys that were retired. Destroy those first that are to go, with "pkictl key destroy"; an HSM that is
to join another group must be initialised.` + grantHelp + groupHelp,
		Example: `  pkictl hsm group delete signing --why "moved to another vendor" --request-out delete.json`,
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(c *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.groupNames(c, args, prefix)
		},
	}
	why := c.Flags().String("why", "", "for the log: why it is done")
	_ = c.MarkFlagRequired("why")
	f.add(c)
	open := func(ctx context.Context, args []string) (*groupSite, error) {
		if a.group != "" && a.group != args[0] {
			return nil, usagef("--group %s: the group's name is the argument", a.group)
		}
		a.group = args[0]
		return a.openGroup(ctx)
	}
	c.RunE = a.changingOf(open, "delete", &f, dryRunFlag(c), func(ctx context.Context, s *groupSite, _ []string) (change, error) {
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		users, err := references(ctx, s.store, s.group)
		if err != nil {
			return change{}, err
		}
		for _, k := range st.In(hsmsync.StateLive, hsmsync.StatePending) {
			users = append(users, fmt.Sprintf("key %s (%s:%s) is %s", k.ID, k.Purpose, k.Label, k.State))
		}
		if len(users) > 0 {
			return change{}, fmt.Errorf("group %s is in use:\n  %s\nretire the CAs that refer to it, then its keys, and repeat this", s.group, strings.Join(users, "\n  "))
		}
		act, err := s.coordinator.DeleteAct(ctx, *why)
		if err != nil {
			return change{}, err
		}
		left := st.In(hsmsync.StateRetired, hsmsync.StateAbandoned)
		return change{
			object: s.group, approval: &act,
			steps: []string{
				fmt.Sprintf("enter the end of group %s into its log, with the approvals: nothing is added to it any more, and its name is not used again", s.group),
				fmt.Sprintf("leave %s alone: what their tokens hold stays, among it %s that signed or were meant to", plural(len(st.Members()), "member"), plural(len(left), "key")),
			},
			act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) error {
				return c.DeleteGroup(ctx, *why, grant)
			},
			result: func(ctx context.Context) (any, error) {
				st, err := s.state(ctx)
				if err != nil {
					return nil, err
				}
				return created{infoOf(s.group, st), []joined{}}, nil
			},
		}, nil
	})
	return c
}

// references lists what refers to a group's keys: CAs that are not over yet, and responders of such.
func references(ctx context.Context, store *db.Store, group string) (users []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	generations, err := store.Generations(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading which CAs refer to group %s: %w", group, err)
	}
	responders, err := store.Responders(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading which responders refer to group %s: %w", group, err)
	}
	newest := map[string]db.Responder{}
	for _, r := range responders {
		newest[r.Issuer] = r // in the order of their numbers
	}
	for _, g := range generations {
		state := g.State()
		if slices.Contains([]string{"revoked", "expired", "external"}, state) {
			continue
		}
		if g.KeyGroup == group {
			users = append(users, fmt.Sprintf("CA %s (%s) signs with key %s of it", g.Issuer, state, g.KeyID))
		}
		if r, ok := newest[g.Issuer]; ok && r.KeyGroup == group {
			users = append(users, fmt.Sprintf("the responder of CA %s (%s) signs with key %s of it", g.Issuer, state, r.KeyID))
		}
	}
	return users, nil
}

const epochHelp = `

Once another site has been promoted, new HSMs must learn which site writes, from a record that two people approve as well: --request-out FILE
writes the request for it to FILE.epoch; --epoch-record FILE.epoch takes it, approved.`

func epochFlag(c *cobra.Command, file *string) {
	c.Flags().StringVar(file, "epoch-record", "", "file with the approved record of the writing site, when its epoch is above 1")
}

// Actions by which people tell an HSM which site writes; see the agent's own.
const (
	actPromote     = "site-promote"
	actRepairEpoch = "hsm-epoch-repair"
)

// epochRecord is what a new HSM is told about the writing site: nothing to tell is nil. The first epoch needs no approval. For a later one there
// must be an approved record, and where approval is asked for a request for it is written. At is the epoch that the HSM knows already, or 0.
func (s *groupSite) epochRecord(ctx context.Context, f *grantFlags, file string, dryRun bool, at uint64) (*hsm.EpochRecord, error) {
	bounded, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	now, err := s.store.SiteEpoch(bounded)
	if err != nil {
		return nil, fmt.Errorf("reading which site writes: %w", err)
	}
	r := &hsm.EpochRecord{Site: now.Site, Epoch: now.N}
	if file == "" && at == now.N {
		return nil, nil
	}
	if now.N <= 1 {
		if file != "" {
			return nil, usagef("--epoch-record: the site epoch is %d: no record is needed", now.N)
		}
		return r, nil
	}
	want := hsmsync.Act{Action: actRepairEpoch, Object: now.Site, Detail: map[string]string{"epoch": strconv.FormatUint(now.N, 10)}}
	var g identity.Grant
	switch {
	case file != "":
		if g, err = readGrants([]string{file}); err != nil {
			return nil, err
		}
		if g.Request.Action == actPromote {
			want.Action = actPromote
		}
		if err := matches(want, g.Request); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	case f.requestOut != "" && !dryRun:
		me, err := s.proposer(f)
		if err != nil {
			return nil, err
		}
		if g, err = me.Propose(want.Action, want.Object, want.Detail, time.Now(), identity.MaxRequestAge); err != nil {
			return nil, err
		}
		if err := writeRequest(f.requestOut+".epoch", g); err != nil {
			return nil, err
		}
		s.app.sayf("site %s writes, at epoch %d: two people approve %s.epoch as well, and --epoch-record names it later", now.Site, now.N, f.requestOut)
		return r, nil // for the rehearsal
	case len(f.as) > 0 && s.demo != nil:
		me, err := s.proposer(f)
		if err != nil {
			return nil, err
		}
		if g, err = me.Propose(want.Action, want.Object, want.Detail, time.Now(), time.Hour); err != nil {
			return nil, err
		}
		if g.Approvals, err = approveAs(s.demo, g.Request, f.as, time.Now()); err != nil {
			return nil, err
		}
	case len(f.files) > 0:
		return nil, usagef("site %s writes, at epoch %d: --epoch-record names the approved record of it; --request-out writes a request for it", now.Site, now.N)
	default:
		return r, nil // nothing is done without an approval anyway
	}
	if r.Grant, err = json.Marshal(g); err != nil {
		return nil, errors.New("encoding the record of the site epoch: " + err.Error())
	}
	return r, nil
}
