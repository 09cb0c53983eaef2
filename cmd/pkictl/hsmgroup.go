package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"trivet/hsm/agent"
	"trivet/hsmsync"
	"trivet/identity"
)

func (a *app) hsmVerify() *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Check every copy of every key: same keys everywhere, each proved by a signature",
		Long: `Check every copy of every key: every member is asked what it holds, which must be what the group's log says, octet by octet, and to sign a fresh
challenge with each live key. Nothing is repaired by this; that is done all the time, by the CA nodes that run the key-sync job. The exit code
is 1 if anything was found.` + groupHelp,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (hsmsync.Report, error) {
			s, err := a.openGroup(ctx)
			if err != nil {
				return hsmsync.Report{}, err
			}
			defer s.close()
			if _, err := s.state(ctx); err != nil { // does not wait for a database that is gone
				return hsmsync.Report{}, err
			}
			r, err := s.coordinator.Verify(ctx)
			s.progress.end()
			if err == nil && !r.OK {
				err = errQuiet
			}
			return r, err
		}, printReport),
	}
}

func (a *app) hsmRotate() *cobra.Command {
	c := &cobra.Command{
		Use:   "rotate",
		Short: "Give the group a new domain key, with which keys are cloned from then on",
		Long: `Give the group a new domain key, with which keys are cloned from then on: it is made on one member and brought to the others, and the old one is
dropped when all have it. Keys stay as they are and signing goes on. Every member that is not drained must answer. Do it when somebody who knew
a share of a backup leaves, and then make a new backup: what the old one holds can still be read with the old shares.` + groupHelp,
		Args: cobra.NoArgs,
	}
	c.RunE = a.changing("rotate", nil, dryRunFlag(c), func(ctx context.Context, s *groupSite, _ []string) (change, error) {
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		return change{
			object: s.group,
			steps: []string{
				"make a new domain key on one member and enter it into the log as the next one",
				fmt.Sprintf("bring it to the others of %s", plural(len(st.Members()), "member")),
				"make it the group's in the log and on every member",
				fmt.Sprintf("drop domain key %s on every member", st.Domain.Name),
			},
			act: func(ctx context.Context, c *hsmsync.Coordinator, _ []byte) error { return c.RotateDomain(ctx) },
			result: func(ctx context.Context) (any, error) {
				st, err := s.state(ctx)
				if err != nil {
					return nil, err
				}
				return domain{st.Domain.Name}, nil
			},
		}, nil
	})
	return c
}

// domain is a group's domain key by its name.
type domain struct {
	Domain string `json:"domain"`
}

func (d domain) text(w io.Writer) { fmt.Fprintf(w, "domain key\t%s\n", d.Domain) }

func (a *app) hsmPolicy() *cobra.Command {
	var set []string
	c := &cobra.Command{
		Use:   "policy [--set NAME=VALUE …]",
		Short: "Show how the group behaves, or change it",
		Long: `Show how the group behaves, or change it:

  driver           wrap: we clone keys, with the domain key; external: the vendor clones them, we verify
  non_extractable  true: keys never leave their tokens, wrapped or not; needs driver external
  creation         any: any member makes keys; master: only the member called master, existing keys are not affected while it is away
  master           name of that member
  min_copies       how many copies of a key must exist before it is used, 2 or more
  prefer           random; local: members of the asking node's site first; priority: in the order of sites
  sites            names, separated by commas
  destroy_after    how long a retired key waits before it may be destroyed, such as 24h

One person may change it, unless keys are protected less by it afterwards: min_copies or destroy_after lower, keys no longer
non_extractable, creation by any instead of the master.` + grantHelp + groupHelp,
		Example: `  pkictl hsm policy
  pkictl hsm policy --set prefer=priority --set sites=primary,dr --dry-run`,
		Args: cobra.NoArgs,
	}
	c.Flags().StringArrayVar(&set, "set", nil, "NAME=VALUE; may be given several times")
	dryRun := dryRunFlag(c)
	showing := do(a, func(ctx context.Context, _ []string) (policyView, error) {
		s, err := a.openGroup(ctx)
		if err != nil {
			return policyView{}, err
		}
		defer s.close()
		st, err := s.state(ctx)
		if err != nil {
			return policyView{}, err
		}
		return viewOf(st.Policy), nil
	}, func(w io.Writer, p policyView) { p.text(w) })
	var f grantFlags
	f.add(c)
	changing := a.changing("policy", &f, dryRun, func(ctx context.Context, s *groupSite, _ []string) (change, error) {
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		next, err := withPolicy(st.Policy, set)
		if err != nil {
			return change{}, err
		}
		was, will := viewOf(st.Policy).fields(), viewOf(next).fields()
		var steps []string
		for i := range was {
			if was[i] != will[i] {
				steps = append(steps, fmt.Sprintf("%s: %s instead of %s", will[i].name, orNone(will[i].value), orNone(was[i].value)))
			}
		}
		if steps == nil {
			steps = []string{"nothing: it is so already"}
		}
		return change{object: s.group, steps: steps, act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) error {
			return c.SetPolicy(ctx, next, grant)
		}, result: func(ctx context.Context) (any, error) {
			st, err := s.state(ctx)
			if err != nil {
				return nil, err
			}
			return viewOf(st.Policy), nil
		}}, nil
	})
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(set) == 0 {
			return showing(c, args)
		}
		return changing(c, args)
	}
	return c
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// policyView is a policy as people read and write it.
type policyView struct {
	Driver         string   `json:"driver"`
	NonExtractable bool     `json:"non_extractable"`
	Creation       string   `json:"creation"`
	Master         string   `json:"master"`
	MinCopies      int      `json:"min_copies"`
	Prefer         string   `json:"prefer"`
	Sites          []string `json:"sites"`
	DestroyAfter   string   `json:"destroy_after"`
}

func viewOf(p hsmsync.Policy) policyView {
	return policyView{p.Driver, p.NonExtractable, p.Creation, p.Master, p.MinCopies, p.Prefer, append([]string{}, p.Sites...), p.DestroyAfter.String()}
}

type policyField struct{ name, value string }

func (p policyView) fields() []policyField {
	return []policyField{
		{"driver", p.Driver}, {"non_extractable", strconv.FormatBool(p.NonExtractable)}, {"creation", p.Creation}, {"master", p.Master},
		{"min_copies", strconv.Itoa(p.MinCopies)}, {"prefer", p.Prefer}, {"sites", strings.Join(p.Sites, ",")}, {"destroy_after", p.DestroyAfter},
	}
}

func (p policyView) text(w io.Writer) {
	for _, f := range p.fields() {
		fmt.Fprintf(w, "%s\t%s\n", f.name, f.value)
	}
}

// withPolicy is p with the settings of the command line; a mistake in one is a mistake on the command line.
func withPolicy(p hsmsync.Policy, set []string) (hsmsync.Policy, error) {
	for _, s := range set {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return p, usagef("--set %s: want NAME=VALUE", s)
		}
		var err error
		switch name {
		case "driver":
			p.Driver = value
		case "non_extractable":
			p.NonExtractable, err = strconv.ParseBool(value)
		case "creation":
			p.Creation = value
		case "master":
			p.Master = value
		case "min_copies":
			if p.MinCopies, err = strconv.Atoi(value); err == nil && p.MinCopies == 0 {
				err = errors.New("want 2 or more")
			}
		case "prefer":
			p.Prefer = value
		case "sites":
			p.Sites = nil
			if value != "" {
				p.Sites = strings.Split(value, ",")
			}
		case "destroy_after":
			if p.DestroyAfter, err = time.ParseDuration(value); err == nil && p.DestroyAfter <= 0 {
				err = errors.New("want more than nothing")
			}
		default:
			var names []string
			for _, f := range (policyView{}).fields() {
				names = append(names, f.name)
			}
			return p, usagef("--set %s: there are %s", name, strings.Join(names, ", "))
		}
		if err != nil {
			return p, usagef("--set %s: %v", s, err)
		}
	}
	if err := p.Check(); err != nil {
		return p, usageError{err}
	}
	return p, nil
}

func (a *app) hsmActivate() *cobra.Command {
	var address, pinFile, as string
	var files identity.Files
	c := &cobra.Command{
		Use:   "activate NAME",
		Short: "Give a waiting HSM its PIN, so that it can be used",
		Long: `Give a waiting HSM its PIN, so that it can be used: one whose agent is configured with "activation: manual" and was started, or one that forgot its
PIN. The PIN is asked for on the terminal, or read from standard input or --pin-file; it is kept in the agent's memory alone. A PIN that the
token refuses is not tried again: HSMs lock, or erase themselves, after a few.

You act as yourself, admin or CA operator: --cert, --key and --trust, or --as in a demo.` + groupHelp,
		Example: `  pkictl hsm activate hsmd-a --as admin1
  pkictl hsm activate hsmd-a --config /etc/trivet/sync.yaml --cert me.pem --key me.key --trust trust.pem`,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.memberNames,
		RunE: do(a, func(ctx context.Context, args []string) (changed, error) {
			s, err := a.openSite()
			if err != nil {
				return changed{}, err
			}
			defer s.close()
			if files.Cert == "" {
				if s.demo == nil {
					return changed{}, usagef("--cert, --key and --trust are needed: the PIN is given by a person")
				}
				files = s.demo.Layout().Files(as)
			}
			me, err := identity.Load(files)
			if err != nil {
				return changed{}, fmt.Errorf("loading your identity: %w", err)
			}
			s.group = a.group
			if address == "" {
				var st *hsmsync.State
				if err = s.choose(ctx); err == nil {
					st, err = s.state(ctx)
				}
				if err != nil {
					return changed{}, fmt.Errorf("%w; with --address the log is not needed", err)
				}
				m, err := s.member(st, args[0])
				if err != nil {
					return changed{}, err
				}
				address = m.Address
			}
			client := agent.NewClient(args[0], address, me)
			defer client.Close()
			asking, cancel := context.WithTimeout(ctx, 5*time.Second)
			info, err := client.Health(asking)
			cancel()
			if err == nil && info.Locked == "" {
				a.sayf("%s waits for no PIN, its token is open already: nothing was tried", args[0])
				return changed{Verb: "activate", Group: s.group, Object: args[0], Steps: []string{}, Done: true}, nil
			}
			pin, err := a.readPIN(args[0], pinFile)
			if err != nil {
				return changed{}, err
			}
			ctx, cancel = context.WithTimeout(ctx, 30*time.Second)
			defer cancel()
			if err := client.Activate(ctx, pin); err != nil {
				return changed{}, err
			}
			return changed{Verb: "activate", Group: s.group, Object: args[0], Steps: []string{"give " + args[0] + " its PIN"}, Done: true}, nil
		}, printChanged),
	}
	c.Flags().StringVar(&address, "address", "", "host:port of its agent (default: as in the group's log)")
	c.Flags().StringVar(&pinFile, "pin-file", "", "file that holds the PIN; - is standard input")
	c.Flags().StringVar(&as, "as", "admin1", "who you are, in a demo")
	c.Flags().StringVar(&files.Cert, "cert", "", "your certificate, PEM")
	c.Flags().StringVar(&files.Key, "key", "", "its key, PEM")
	c.Flags().StringVar(&files.Trust, "trust", "", "the infrastructure CA, PEM")
	c.MarkFlagsRequiredTogether("cert", "key", "trust")
	c.MarkFlagsMutuallyExclusive("as", "cert")
	return c
}

// readPIN reads a PIN from a file, or from standard input: without showing it where that is a terminal.
func (a *app) readPIN(name, file string) (string, error) {
	var text []byte
	var err error
	in, ok := a.in.(*os.File)
	switch {
	case file != "" && file != "-":
		text, err = readBounded(file, 4<<10)
	case ok && isatty.IsTerminal(in.Fd()):
		fmt.Fprintf(a.err, "PIN of %s: ", name)
		text, err = readSilently(in)
		fmt.Fprintln(a.err)
	default:
		text, err = io.ReadAll(io.LimitReader(a.in, 4<<10))
	}
	if err != nil {
		return "", fmt.Errorf("reading the PIN: %w", err)
	}
	pin := string(bytes.TrimRight(text, "\r\n"))
	if pin == "" {
		return "", errors.New("reading the PIN: it is empty; nothing was tried")
	}
	return pin, nil
}

// readSilently reads a line from a terminal that shows nothing of it.
func readSilently(f *os.File) (line []byte, err error) {
	fd := int(f.Fd())
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	quiet := *old
	quiet.Lflag &^= unix.ECHO
	quiet.Lflag |= unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &quiet); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unix.IoctlSetTermios(fd, unix.TCSETS, old)) }()
	line, err = bufio.NewReader(f).ReadBytes('\n')
	if errors.Is(err, io.EOF) && len(line) > 0 {
		err = nil
	}
	return line, err
}
