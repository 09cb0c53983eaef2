package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/cluster"
	"trivet/hsmsync"
	"trivet/identity"
)

// approvers may approve what is done to HSMs and keys.
var approvers = []identity.Role{identity.RoleAdmin, identity.RoleCAOperator}

// grantFlags are the ways in which an act gets its approvals.
type grantFlags struct {
	requestOut string
	files      []string
	as         []string
	me         identity.Files
	proposer   string
}

const grantHelp = `

Two people must approve it, each with a key of their own, admins or CA operators:

  1. --request-out FILE   writes down what is to be done, signed by you as the proposer (--cert, --key-file, --trust), and stops
  2. pkictl approve FILE  adds the approval of whoever calls it; the file goes from one to the other, or each approves a copy
  3. --grant FILE         does it; name several files if copies were approved

Who proposes it is none of the two. A request holds for 24 hours and for exactly what it says. In a demo --approve-as admin1,operator1 does
all three at once, and --propose-as says who you are.`

func (f *grantFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.requestOut, "request-out", "", "write the request for approval to this file, and stop")
	c.Flags().StringArrayVar(&f.files, "grant", nil, "file with the approved request; may be given several times")
	c.Flags().StringSliceVar(&f.as, "approve-as", nil, "in a demo: these people approve it now, such as admin1,operator1")
	c.Flags().StringVar(&f.me.Cert, "cert", "", "your certificate, PEM: you propose it, so that you do not approve it")
	c.Flags().StringVar(&f.me.Key, "key-file", "", "your private key, PEM")
	c.Flags().StringVar(&f.me.Trust, "trust", "", "the infrastructure CA, PEM")
	c.Flags().StringVar(&f.proposer, "propose-as", "", "in a demo: who you are (default: somebody who does not approve it)")
	c.MarkFlagsRequiredTogether("cert", "key-file", "trust")
	c.MarkFlagsMutuallyExclusive("cert", "propose-as")
	_ = c.RegisterFlagCompletionFunc("propose-as", cobra.FixedCompletions(demoPeople, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("approve-as", cobra.FixedCompletions([]string{"admin1,operator1", "admin1,admin2"}, cobra.ShellCompDirectiveNoFileComp))
	c.MarkFlagsMutuallyExclusive("request-out", "grant", "approve-as")
}

// none tells that no way was chosen.
func (f *grantFlags) none() bool { return f.requestOut == "" && len(f.files) == 0 && len(f.as) == 0 }

var errUnapproved = usagef("two people must approve this: --request-out FILE writes the request, `pkictl approve FILE` signs it, --grant FILE does it; in a demo --approve-as admin1,operator1 does all three")

// errRequested ends an act at step 1.
var errRequested = errors.New("approval is requested")

// grant returns the approvals of an act. Whether they are enough is for the coordinator to say, and then for the HSM agents.
func (s *groupSite) grant(f *grantFlags, a hsmsync.Act) (identity.Grant, error) {
	return f.grant(s.demo, a, errUnapproved, func(now time.Time, age time.Duration) (identity.Grant, error) {
		me, err := s.proposer(f)
		if err != nil {
			return identity.Grant{}, err
		}
		return me.Propose(a.Action, a.Object, a.Detail, now, age)
	})
}

// grant returns the approvals of an act in the way that was chosen, or unchosen if none was. demo is nil outside one; propose makes the request.
func (f *grantFlags) grant(demo *cluster.Cluster, a hsmsync.Act, unchosen error, propose func(now time.Time, age time.Duration) (identity.Grant, error)) (g identity.Grant, err error) {
	now := time.Now()
	switch {
	case f.requestOut != "":
		if g, err = propose(now, identity.MaxRequestAge); err != nil {
			return g, err
		}
		if err := writeRequest(f.requestOut, g); err != nil {
			return g, err
		}
		return g, errRequested
	case len(f.files) > 0:
		if g, err = readGrants(f.files); err != nil {
			return g, err
		}
		if err := matches(a, g.Request); err != nil {
			return g, fmt.Errorf("%s: %w", f.files[0], err)
		}
	case len(f.as) > 0:
		if demo == nil {
			return g, usagef("--approve-as works in a demo only: anywhere else people approve with keys of their own, see --request-out")
		}
		if g, err = propose(now, time.Hour); err != nil {
			return g, err
		}
		if g.Approvals, err = approveAs(demo, g.Request, f.as, now); err != nil {
			return g, err
		}
	default:
		return g, unchosen
	}
	return g, nil
}

// proposer is the person who runs this: not the identity of role sync, which several people may use.
func (s *groupSite) proposer(f *grantFlags) (*identity.Identity, error) {
	files := f.me
	switch {
	case files.Cert != "":
	case s.demo == nil:
		return nil, usagef("say who you are, who propose it: --cert, --key-file and --trust")
	default:
		name := f.proposer
		for _, other := range []string{"operator2", "admin2", "sre"} {
			if name == "" && !slices.Contains(f.as, other) {
				name = other
			}
		}
		if !slices.Contains(demoPeople, name) {
			return nil, usagef("--propose-as %s: there are %s", name, strings.Join(demoPeople, ", "))
		}
		files = s.demo.Layout().Files(name)
	}
	id, err := identity.Load(files)
	if err != nil {
		return nil, fmt.Errorf("loading the proposer's identity: %w", err)
	}
	return id, nil
}

// matches refuses a request for anything else. What was approved is what the request says, and this says what is about to be done.
func matches(a hsmsync.Act, r identity.Request) error {
	switch {
	case r.Action != a.Action || r.Object != a.Object:
		return fmt.Errorf("it is for %s of %s, and this is %s of %s", r.Action, r.Object, a.Action, a.Object)
	case !maps.Equal(r.Detail, a.Detail):
		return fmt.Errorf("%s of %s was approved with %s, but now it is %s: find out what has changed before you ask again", a.Action, a.Object, details(r.Detail), details(a.Detail))
	}
	return nil
}

func details(d map[string]string) string {
	var out []string
	for _, k := range sorted(d) {
		out = append(out, k+" "+d[k])
	}
	return strings.Join(out, ", ")
}

// writeRequest writes a new file; one that is there may hold approvals.
func writeRequest(file string, g identity.Grant) error {
	g.Approvals = []identity.Approval{}
	text, err := json.MarshalIndent(g, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the request: %w", err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("writing the request: %w", err)
	}
	_, err = f.Write(append(text, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("writing the request: %w", err)
	}
	return nil
}

// readGrants puts together what several people approved, each in a copy of one request.
func readGrants(files []string) (all identity.Grant, err error) {
	for i, file := range files {
		text, err := readBounded(file, identity.MaxGrant)
		if err != nil {
			return all, fmt.Errorf("reading the approvals: %w", err)
		}
		g, err := identity.ParseGrant(text)
		if err != nil {
			return all, fmt.Errorf("%s: %w", file, err)
		}
		if i == 0 {
			all = g
		} else if err := all.Merge(g); err != nil {
			return all, fmt.Errorf("%s and %s: %w", files[0], file, err)
		}
	}
	return all, nil
}

// approveAs has people of a demo approve a request.
func approveAs(demo *cluster.Cluster, r identity.Request, people []string, now time.Time) (approvals []identity.Approval, err error) {
	for _, name := range people {
		id, err := identity.Load(demo.Layout().Files(name))
		if errors.Is(err, os.ErrNotExist) {
			return nil, usagef("--approve-as %s: nobody of that name is in the demo: there are %s", name, strings.Join(demoPeople, ", "))
		}
		if err != nil {
			return nil, fmt.Errorf("approving as %s: %w", name, err)
		}
		a, err := id.Approve(r, now)
		if err != nil {
			return nil, fmt.Errorf("approving as %s: %w", name, err)
		}
		approvals = append(approvals, a)
	}
	return approvals, nil
}
