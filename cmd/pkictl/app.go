package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"trivet/problem"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // it was tried and did not work, or what was checked is not well
	exitUsage  = 2 // it was not tried: the command line is wrong
)

// app is one invocation. Data goes to out, everything else to err.
type app struct {
	in       io.Reader
	out, err io.Writer
	output   string // text or json
	dir      string // of a demo, for client commands
	config   string // client configuration
	as       string // demo identity
	group    string // HSM group that is meant; "": the only one
	force    bool   // do it although it leaves too little
	began    bool   // a command's own code runs: its errors are no longer about usage
}

// usageError is about the command line although found late.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// errQuiet fails the command without a word: its output has said it.
var errQuiet = errors.New("failed")

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	a := &app{in: in, out: out, err: errw}
	root := a.command()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errw)
	err := root.ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errQuiet):
		return exitFailed
	case !a.began, errors.As(err, &usage):
		a.complain(err, "see `pkictl help`, or a command with --help")
		return exitUsage
	}
	a.complain(err, "")
	return exitFailed
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "pkictl",
		Short: "Operate a Trivet PKI",
		Long: `pkictl operates a Trivet PKI: highly available certificate authorities, OCSP responders and HSM groups.

Try it on one machine, without any preparation but installed packages:

  pkictl demo up                  start a whole installation on loopback
  pkictl demo try                 issue, check and revoke a certificate there
  pkictl demo kill ca1            take something away, and try again
  pkictl demo down                leave nothing behind

Commands find a running demo by themselves: in $TRIVET_DEMO_DIR, --dir or the default directory. For any other installation say which
with --config. For cert, blocked-key, ca, health and approve that is a client configuration:

  api:    https://pki.example.org:8443      # issuing, through the balancer
  public: http://pki.example.org            # OCSP, CRLs, issuer certificates
  admin:  [https://ca1.example.org:9443]    # each CA node's administrative listener
  processes: [{name: lb1, role: lb, address: lb1.example.org:9443}]   # further ones to ask for health
  trust:  /etc/trivet/trust.pem             # the infrastructure CA
  cert:   /etc/trivet/me.pem                # who you are
  key:    /etc/trivet/me.key

Data goes to standard output, everything else to standard error. The exit code is 0 when all is well, 1 when something failed or is not
well, 2 when the command line is wrong.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "text" && a.output != "json" {
				return usagef("--output %q: text or json", a.output)
			}
			return nil
		},
	}
	flags := root.PersistentFlags()
	flags.StringVarP(&a.output, "output", "o", "text", "how to print data: text, or json for programs")
	flags.StringVar(&a.dir, "dir", "", "directory of the demo (default $TRIVET_DEMO_DIR, or below /var/tmp)")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(a.demoCommand(), a.initCommand(), a.caCommand(), a.certCommand(), a.blockedKeyCommand(), a.healthCommand(), a.fsckCommand(), a.recoveryCommand(),
		a.hsmCommand(), a.keyCommand(), a.approveCommand(), a.galeraCommand(), a.journalCommand(), a.manCommand())
	return root
}

// group is a command that only holds others.
func group(use, short, long string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("%q is no command of `%s`", args[0], c.CommandPath())
			}
			return c.Help()
		},
	}
	c.AddCommand(sub...)
	return c
}

// do makes a command's own code from fn. What fn returns is printed as JSON, or by text.
func do[T any](a *app, fn func(ctx context.Context, args []string) (T, error), text func(w io.Writer, v T)) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		a.began = true
		v, err := fn(c.Context(), args)
		if err != nil && !errors.Is(err, errQuiet) {
			return err
		}
		if perr := show(a, v, text); perr != nil {
			return fmt.Errorf("printing: %w", perr)
		}
		return err
	}
}

func show[T any](a *app, v T, text func(w io.Writer, v T)) error {
	if a.output == "json" {
		enc := json.NewEncoder(a.out)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	tab := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	text(tab, v)
	return tab.Flush()
}

// sayf reports progress.
func (a *app) sayf(format string, args ...any) { fmt.Fprintf(a.err, format+"\n", args...) }

// complain prints an error, a problem of the API with everything that helps, on standard error.
func (a *app) complain(err error, hint string) {
	var p *problem.Problem
	isProblem := errors.As(err, &p)
	if a.output == "json" {
		body := map[string]any{"error": err.Error()}
		if isProblem {
			body["problem"] = p
		}
		_ = json.NewEncoder(a.err).Encode(body)
		return
	}
	if !isProblem {
		fmt.Fprintln(a.err, "pkictl: "+err.Error())
	} else {
		fmt.Fprintf(a.err, "pkictl: %s (%d)\n", p.Title, p.Status)
		for _, line := range []struct{ name, value string }{
			{"detail", p.Detail}, {"field", p.Field}, {"cause", p.Cause}, {"request id", p.RequestID}, {"what to do", advice(p)},
		} {
			if line.value != "" {
				fmt.Fprintf(a.err, "  %-11s %s\n", line.name+":", line.value)
			}
		}
	}
	if hint != "" {
		fmt.Fprintln(a.err, hint)
	}
}

// advice is what the one who asked can do about a problem.
func advice(p *problem.Problem) string {
	switch name := p.Name(); {
	case p.Status == 401:
		return "present a client certificate of this cluster: --as NAME in a demo, cert and key in the client configuration"
	case p.Status == 403:
		return "ask as somebody whose role may do it: --as NAME in a demo, cert and key in the client configuration"
	case name == "idempotency-mismatch":
		return "use a new --idempotency-key for a new request; the old one keeps its first answer"
	case name == "ambiguous-serial":
		return "give the whole id, {ca}-g{n}:{serial}"
	case name == "bad-csr-signature", name == "malformed-csr":
		return "make the CSR again, or let pkictl make it with --dns NAME --key-out FILE"
	case name == "weak-key", name == "blocked-key", name == "key-not-permitted":
		return "make another key; the profile lists the permitted kinds"
	case name == "reason-not-permitted":
		return "name a --reason that your role may give: " + strings.Join(reasons, ", ")
	case strings.HasSuffix(name, "-not-permitted"):
		return "change the request to what the profile permits, or name another --profile"
	case p.Status == 404:
		return "check the id; certificates of other requesters are not shown"
	case p.Status == 503 && p.RetryAfter > 0:
		return fmt.Sprintf("try again after %d s with the same --idempotency-key; `pkictl health` says what is missing", p.RetryAfter)
	case p.Status >= 500:
		return "`pkictl health` says what is missing; the request id finds the entry in the node's log"
	}
	return ""
}
