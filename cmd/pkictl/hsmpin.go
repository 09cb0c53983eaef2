package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/hsm"
	"trivet/hsmsync"
)

func (a *app) hsmRotatePIN() *cobra.Command {
	var r hsmsync.PINRotation
	var all bool
	var f grantFlags
	c := &cobra.Command{
		Use:   "rotate-pin MEMBER...",
		Short: "Give members' tokens new PINs, one after the other, while signing goes on",
		Long: `Give members' tokens new PINs, one after the other, while signing goes on. Each agent draws a PIN that nobody sees, writes it into a file beside
its own, changes the token's, and starts anew: it logs in with the new PIN, or, where the token did not take it, with the old one, and says which. The next
member's turn comes when the one before has its new PIN and has proved every live key. No PIN leaves its agent.

With --prepared each agent takes the PIN from the file that somebody has put beside its PIN file, under the same name with ".new" behind (mode 0600).
A member with "activation: manual" has its PIN in no file: change it with the vendor's tool, and activate the member with the new one.

A member whose absence for some seconds would leave fewer than the policy wants copies is refused; --force does it all the same. After a
failure repeat the command under the same approval: what is done is not done again.` + grantHelp + groupHelp,
		Example: `  pkictl hsm rotate-pin --all --dry-run
  pkictl hsm rotate-pin --all --request-out pins.json
  pkictl approve pins.json --as admin1 && pkictl approve pins.json --as operator1
  pkictl hsm rotate-pin --all --grant pins.json`,
		ValidArgsFunction: a.memberNames,
		Args: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return usagef("name the members whose PINs are to be rotated, or give --all")
			}
			return nil
		},
	}
	c.Flags().BoolVar(&all, "all", false, "every member that has joined")
	c.Flags().BoolVar(&r.Prepared, "prepared", false, "take each PIN from the file PIN_FILE.new beside the agent's own")
	c.Flags().StringVar(&r.Why, "why", "", "for the log: why it is done")
	c.Flags().BoolVar(&a.force, "force", false, "even if too few members are left meanwhile; the approval says so")
	f.add(c)
	c.RunE = a.changing("rotate-pin", &f, dryRunFlag(c), func(ctx context.Context, s *groupSite, args []string) (change, error) {
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		r.Members = slices.Compact(slices.Sorted(slices.Values(args)))
		for _, m := range st.Members() {
			if all && m.State != hsmsync.MemberJoining {
				r.Members = append(r.Members, m.Name)
			}
		}
		var steps []string
		kind := "draw a PIN that nobody sees"
		if r.Prepared {
			kind = "take the prepared PIN"
		}
		for _, name := range r.Members {
			if _, err := s.member(st, name); err != nil {
				return change{}, err
			}
			steps = append(steps, fmt.Sprintf("%s: %s, give it to the token, start anew, log in with it, prove every live key", name, kind))
		}
		return change{
			object: strings.Join(r.Members, ", "), steps: steps,
			act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) error {
				r.Grant = grant
				return c.RotatePINs(ctx, r)
			},
		}, nil
	})
	return c
}

// printPIN says how a token's PIN stands, where there is something to say.
func printPIN(w io.Writer, member string, p hsm.PIN) {
	if !p.Rotated.IsZero() {
		fmt.Fprintf(w, "\nPIN of %s: rotated %s", member, p.Rotated.UTC().Format(time.RFC3339))
	}
	for _, note := range []string{p.Unfinished, p.Warning} {
		if note != "" {
			fmt.Fprintf(w, "\nPIN of %s: %s", member, note)
		}
	}
	if p.Undone != "" {
		fmt.Fprintf(w, "\nPIN of %s: the newest rotation was undone: %s", member, p.Undone)
	}
}
