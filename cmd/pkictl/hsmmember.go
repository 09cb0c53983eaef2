package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"trivet/cluster"
	"trivet/hsmsync"
)

// joined is what enroll and replace found out about the member's token.
type joined struct {
	Member      string `json:"member"`
	Address     string `json:"address"`
	TokenSerial string `json:"token_serial"`
	TokenLabel  string `json:"token_label"`
	Transport   string `json:"transport"` // fingerprint of the token's transport key
}

func (j joined) text(w io.Writer) {
	fmt.Fprintf(w, "token\t%s, serial %s\ntransport key\t%s\n", j.TokenLabel, j.TokenSerial, j.Transport)
}

func (a *app) hsmEnroll() *cobra.Command {
	var req hsmsync.EnrollRequest
	var f grantFlags
	var epoch string
	c := &cobra.Command{
		Use:   "enroll NAME [--address HOST:PORT]",
		Short: "Take a new HSM into the group, while everything goes on",
		Long: `Take a new HSM into the group, while everything goes on. Its agent must run and its token be initialised, and blank unless it was a member before.
It is given the group's domain key, wrapped for the transport key of exactly the token that was approved; then a copy of every key; it must prove
each by a signature; only then does it get work. The command may be repeated after any failure and goes on where it stopped; "pkictl hsm remove NAME"
gives it up.

--dry-run shows the token that answers under the address, with the fingerprint of its transport key. Compare it with what the one who set
up the HSM wrote down. In a demo the address is known.` + grantHelp + epochHelp + groupHelp,
		Example: `  pkictl hsm enroll hsmd-d --address 127.77.2.4:7443 --dry-run
  pkictl hsm enroll hsmd-d --address 127.77.2.4:7443 --request-out enroll.json
  pkictl approve enroll.json --as admin1 && pkictl approve enroll.json --as operator1
  pkictl hsm enroll hsmd-d --address 127.77.2.4:7443 --grant enroll.json`,
		Args: cobra.ExactArgs(1),
	}
	c.Flags().StringVar(&req.Address, "address", "", "host:port of its agent")
	c.Flags().StringVar(&req.Site, "site", "", "the site it stands in")
	c.Flags().BoolVar(&req.Standby, "standby", false, "it holds every key and signs only when no active member can")
	epochFlag(c, &epoch)
	f.add(c)
	dryRun := dryRunFlag(c)
	c.RunE = a.changing("enroll", &f, dryRun, func(ctx context.Context, s *groupSite, args []string) (change, error) {
		var err error
		req.Name = args[0]
		if req.Address, err = s.address(req.Name, req.Address); err != nil {
			return change{}, err
		}
		if s.demo != nil && req.Site == "" {
			req.Site = cluster.Site
		}
		return s.enrolment(ctx, req, false, asked{&f, epoch, *dryRun}, func(c *hsmsync.Coordinator) func(context.Context, hsmsync.EnrollRequest) error { return c.Enroll })
	})
	return c
}

func (a *app) hsmReplace() *cobra.Command {
	var req hsmsync.EnrollRequest
	var f grantFlags
	var epoch string
	c := &cobra.Command{
		Use:   "replace NAME",
		Short: "Take in the new HSM that stands in the place of a lost one",
		Long: `Take in the new HSM that stands in the place of a lost one: the old token is removed from the group for good, and the token that now answers
under the name is enrolled as by "pkictl hsm enroll". Its address, site and standby stay as they were, unless given anew.` + grantHelp + epochHelp + groupHelp,
		Example: `  pkictl hsm replace hsmd-b --dry-run
  pkictl hsm replace hsmd-b --request-out replace.json`,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.memberNames,
	}
	c.Flags().StringVar(&req.Address, "address", "", "host:port of its agent (default: as before)")
	c.Flags().StringVar(&req.Site, "site", "", "the site it stands in (default: as before)")
	c.Flags().BoolVar(&req.Bare, "bare", false, "no other member is left that could give it the keys: when all are replaced, \"pkictl hsm restore\" follows")
	epochFlag(c, &epoch)
	f.add(c)
	dryRun := dryRunFlag(c)
	c.RunE = a.changing("replace", &f, dryRun, func(ctx context.Context, s *groupSite, args []string) (change, error) {
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		old, err := s.member(st, args[0])
		if gone, ok := st.Departed(args[0]); ok { // interrupted between the removal and the entry of the new token
			old, err = gone, nil
		}
		if err != nil {
			return change{}, err
		}
		req.Name, req.Standby = old.Name, old.Standby
		if req.Address == "" {
			req.Address = old.Address
		}
		if req.Site == "" {
			req.Site = old.Site
		}
		ch, err := s.enrolment(ctx, req, true, asked{&f, epoch, *dryRun}, func(c *hsmsync.Coordinator) func(context.Context, hsmsync.EnrollRequest) error { return c.Replace })
		if err == nil {
			ch.steps = append([]string{fmt.Sprintf("remove %s with token %s from the group: what that token holds is trusted no more", old.Name, old.TokenSerial)}, ch.steps...)
		}
		return ch, err
	})
	return c
}

// asked is how a member's joining was asked for.
type asked struct {
	*grantFlags
	epoch  string // file of the site epoch's record
	dryRun bool
}

// enrolment plans that a token joins, by enroll or replace.
func (s *groupSite) enrolment(ctx context.Context, req hsmsync.EnrollRequest, replaced bool, how asked, do func(*hsmsync.Coordinator) func(context.Context, hsmsync.EnrollRequest) error) (change, error) {
	st, err := s.state(ctx)
	if err != nil {
		return change{}, err
	}
	info, transport, err := s.coordinator.Inspect(ctx, req.Name, req.Address)
	if err != nil {
		return change{}, err
	}
	j := joined{Member: req.Name, Address: req.Address, TokenSerial: info.TokenSerial, TokenLabel: info.TokenLabel, Transport: transport}
	if m, there := st.Member(req.Name); there && !replaced && m.State != hsmsync.MemberJoining && m.Address == req.Address && m.TokenSerial == j.TokenSerial && m.Transport == transport {
		return change{
			object: req.Name, steps: []string{fmt.Sprintf("nothing: it is a member with this token already, %s since %s", m.State, m.Since.UTC().Format(time.RFC3339))},
			act:    func(context.Context, *hsmsync.Coordinator, []byte) error { return nil },
			result: func(context.Context) (any, error) { return j, nil },
		}, nil
	}
	if req.Epoch, err = s.epochRecord(ctx, how.grantFlags, how.epoch, how.dryRun, info.Epoch); err != nil {
		return change{}, err
	}
	into := "active"
	if req.Standby {
		into = "standby"
	}
	clones := []string{
		fmt.Sprintf("give it domain key %s, wrapped for its transport key %s", st.Domain.Name, transport),
		fmt.Sprintf("clone %s to it and have each proved by a signature", plural(len(st.In(hsmsync.StateLive, hsmsync.StateRetired)), "key")),
		"make it " + into,
	}
	if req.Bare {
		clones = []string{fmt.Sprintf("leave it without keys, its transport key being %s: `pkictl hsm restore` brings them", transport)}
	}
	c := change{
		object: req.Name,
		steps: append([]string{
			fmt.Sprintf("enter %s at %s into the log of group %s as joining, with token %s, serial %s", req.Name, req.Address, s.group, info.TokenLabel, info.TokenSerial),
		}, clones...),
		act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) error {
			req.Grant = grant
			return do(c)(ctx, req)
		},
		result: func(context.Context) (any, error) { return j, nil },
	}
	if len(st.Keys()) > 0 { // a group without keys has nothing to protect yet
		act := s.coordinator.EnrollAct(req.Name, transport)
		c.approval = &act
	}
	return c, nil
}

// memberVerb is a changing verb about one member that needs no approval, unless it is forced.
type memberVerb struct {
	use, short, long string
	step             string // what it does, with the member's name
	force            string // what --force is for; "": there is none
	do               func(ctx context.Context, c *hsmsync.Coordinator, name, why string, grant []byte) error
}

func (a *app) hsmMemberVerbs() (all []*cobra.Command) {
	for _, v := range []memberVerb{{
		use: "drain", short: "Give a member no more work, as before maintenance",
		long: `Give a member no more work, as before maintenance. It finishes what it began, keeps its keys and stays in the group; "pkictl hsm recover" ends
it. Keys are still brought to it while it answers, so that it can come back at once; keys can be made without it.`,
		step: "enter %s as drained: within seconds nobody gives it work", force: "even if nobody is left who signs",
		do: func(ctx context.Context, c *hsmsync.Coordinator, name, why string, grant []byte) error {
			return c.Drain(ctx, name, why, grant)
		},
	}, {
		use: "recover", short: "Have a member tried again: drained, quarantined, or given up",
		long: `Have a member tried again: one that was drained, one that is quarantined because of a wrong signature, one whose recovery was given up. It gets
work again only when it has proved every key; keys that it lacks are brought to it. Find out first what was wrong with it: "pkictl hsm status"
shows the cause.`,
		step: "forget why %s gets no work; it must prove every key again first",
		do: func(ctx context.Context, c *hsmsync.Coordinator, name, why string, grant []byte) error {
			return c.Recover(ctx, name, why)
		},
	}, {
		use: "standby", short: "Make a member a standby: it holds every key and signs only when no active one can",
		long: `Make a member a standby: it holds every key, proves them, and signs only while no active member can.`,
		step: "enter %s as standby, as soon as it has proved every key",
		do: func(ctx context.Context, c *hsmsync.Coordinator, name, why string, grant []byte) error {
			return c.Standby(ctx, name, why)
		},
	}, {
		use: "promote", short: "Make a standby an active member",
		long: `Make a standby an active member. That is not needed when the active ones fail: standbys then sign by themselves, and stop when one returns.`,
		step: "enter %s as active, as soon as it has proved every key",
		do: func(ctx context.Context, c *hsmsync.Coordinator, name, why string, grant []byte) error {
			return c.Promote(ctx, name, why)
		},
	}, {
		use: "remove", short: "Take a member out of the group",
		long: `Take a member out of the group: it gets no work, nobody waits for it, and its name may join again with another token. What its token holds is not
erased by this: destroy the token, or initialise it, before it leaves the building. As many members stay as the policy wants copies of a key.`,
		step: "enter %s as removed; its token keeps what it holds until somebody erases it", force: "even if fewer are left than the policy wants copies of a key",
		do: func(ctx context.Context, c *hsmsync.Coordinator, name, why string, grant []byte) error {
			return c.Remove(ctx, name, why, grant)
		},
	}} {
		all = append(all, a.hsmMemberVerb(v))
	}
	return all
}

func (a *app) hsmMemberVerb(v memberVerb) *cobra.Command {
	c := &cobra.Command{Use: v.use + " NAME", Short: v.short, Long: v.long + groupHelp, Args: cobra.ExactArgs(1), ValidArgsFunction: a.memberNames}
	why := c.Flags().String("why", "", "for the log: why it is done")
	var f *grantFlags
	if v.force != "" {
		f = &grantFlags{}
		f.add(c)
		c.Flags().BoolVar(&a.force, "force", false, v.force+"; two people must approve that")
		c.Long = v.long + "\n\nWith --force what would be refused is done all the same." + grantHelp + groupHelp
	}
	c.RunE = a.changing(v.use, f, dryRunFlag(c), func(ctx context.Context, s *groupSite, args []string) (change, error) {
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		m, err := s.member(st, args[0])
		if err != nil {
			return change{}, err
		}
		return change{
			object: m.Name,
			steps:  []string{fmt.Sprintf(v.step, m.Name) + fmt.Sprintf(" (now %s)", m.State)},
			act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) error {
				return v.do(ctx, c, m.Name, *why, grant)
			},
		}, nil
	})
	return c
}

// memberNames completes the names of the group's members.
func (a *app) memberNames(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	s, err := a.openGroup(c.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer s.close()
	st, err := s.state(c.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, m := range st.Members() {
		names = append(names, m.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
