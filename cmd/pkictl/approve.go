package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"trivet/identity"
)

// approved is what approve says afterwards.
type approved struct {
	File    string `json:"file"`
	Action  string `json:"action"`
	Object  string `json:"object"`
	Request string `json:"request"` // digest, hex
	// As is who approved it now, By everybody who has.
	As string   `json:"as"`
	By []string `json:"by"`
}

func (a *app) approveCommand() *cobra.Command {
	var files identity.Files
	var yes bool
	c := &cobra.Command{
		Use:   "approve FILE",
		Short: "Approve what somebody wants to do, as one of the people whom it needs",
		Long: `Approve what somebody wants to do, as one of the people whom it needs: FILE is what a command wrote with --request-out. What is to be done is
shown in full; if you agree, your signature over exactly that is added to the file. Compare what it says with what you were told, fingerprints
above all: an approval cannot be taken back, it only expires.

You are who --config says, or --cert, --key and --trust; in a demo, who --as says. Nobody approves what he proposed himself, and nobody twice.`,
		Example: `  pkictl hsm enroll hsmd-d --address hsmd-d.example.org:7443 --request-out enroll.json
  pkictl approve enroll.json --cert alice.pem --key alice.key --trust infra.pem`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("give one file, as --request-out wrote it; got %d", len(args))
			}
			return nil
		},
		RunE: do(a, func(ctx context.Context, args []string) (approved, error) {
			id, err := a.me(files)
			if err != nil {
				return approved{}, err
			}
			return a.approve(ctx, args[0], id, yes)
		}, func(w io.Writer, r approved) {
			fmt.Fprintf(w, "%s of %s is approved by %s\n", plain(r.Action), plain(r.Object), strings.Join(r.By, ", "))
		}),
	}
	f := c.Flags()
	f.StringVar(&files.Cert, "cert", "", "your certificate, PEM")
	f.StringVar(&files.Key, "key", "", "your private key, PEM")
	f.StringVar(&files.Trust, "trust", "", "the infrastructure CA, PEM")
	f.BoolVar(&yes, "yes", false, "approve without being asked")
	a.clientFlags(c)
	c.MarkFlagsRequiredTogether("cert", "key", "trust")
	c.MarkFlagsMutuallyExclusive("cert", "as")
	c.MarkFlagsMutuallyExclusive("cert", "config")
	return c
}

// me is the identity of the one who calls, by files, --config or --as.
func (a *app) me(files identity.Files) (*identity.Identity, error) {
	switch {
	case a.config != "":
		text, err := os.ReadFile(a.config)
		if err != nil {
			return nil, fmt.Errorf("reading the client configuration: %w", err)
		}
		var c clientConfig
		if err := yaml.UnmarshalWithOptions(text, &c, yaml.Strict()); err != nil {
			return nil, fmt.Errorf("reading the client configuration %s: %w", a.config, err)
		}
		files = identity.Files{Cert: c.Cert, Key: c.Key, Trust: c.Trust}
	case a.as != "":
		if !slices.Contains(demoPeople, a.as) {
			return nil, usagef("--as %s: there are %s", a.as, strings.Join(demoPeople, ", "))
		}
		demo, err := a.demo()
		if err != nil {
			return nil, err
		}
		files = demo.Layout().Files(a.as)
	case files.Cert == "":
		return nil, usagef("say who you are: --config, or --cert, --key and --trust; in a demo --as NAME, such as admin1")
	}
	id, err := identity.Load(files)
	if err != nil {
		return nil, fmt.Errorf("loading your identity: %w", err)
	}
	return id, nil
}

// approve shows a request, asks, and adds id's approval to its file.
func (a *app) approve(ctx context.Context, file string, id *identity.Identity, yes bool) (approved, error) {
	who := id.Principal()
	if !slices.Contains(approvers, who.Role) {
		return approved{}, fmt.Errorf("%s approves nothing: it takes somebody of role %s or %s", who, approvers[0], approvers[1])
	}
	g, by, err := readApproved(file, id)
	if err != nil {
		return approved{}, err
	}
	if !slices.Contains(by, who) {
		// What would be refused is not worth a question.
		mine, err := id.Approve(g.Request, time.Now())
		if err != nil {
			return approved{}, err
		}
		all := append(slices.Clone(g.Approvals), mine)
		if _, err := id.Approved(g.Request, all, len(all), time.Now(), approvers...); err != nil {
			return approved{}, fmt.Errorf("%s: %w", file, err)
		}
		a.present(g, id)
		if !yes {
			if err := a.confirm(ctx); err != nil {
				return approved{}, err
			}
		}
		if by, err = addApproval(file, g.Request, mine, id); err != nil {
			return approved{}, err
		}
	} else {
		a.sayf("you have approved this already")
	}
	r := approved{File: file, Action: g.Request.Action, Object: g.Request.Object, Request: hex.EncodeToString(g.Request.Digest()), As: who.String()}
	for _, p := range by {
		r.By = append(r.By, p.String())
	}
	return r, nil
}

// readApproved reads a request and who has approved it so far; an approval that does not count is an error.
func readApproved(file string, id *identity.Identity) (identity.Grant, []identity.Principal, error) {
	g, err := readGrants([]string{file})
	if err != nil || len(g.Approvals) == 0 {
		return g, nil, err
	}
	by, err := id.Approved(g.Request, g.Approvals, len(g.Approvals), time.Now(), approvers...)
	if err != nil {
		return g, nil, fmt.Errorf("%s: %w; if it cannot be explained, ask for a new request", file, err)
	}
	return g, by, nil
}

// present shows everything that an approval would cover. Whatever could pass for something else is quoted.
func (a *app) present(g identity.Grant, id *identity.Identity) {
	who := id.Principal()
	r := g.Request
	rows := [][2]string{{"action", r.Action}, {"object", r.Object}}
	for _, k := range sorted(r.Detail) {
		rows = append(rows, [2]string{"detail " + plain(k), r.Detail[k]})
	}
	signed := r.Proposer
	if err := id.Proposed(g, time.Now()); err != nil {
		signed += " (NOT PROVED, so HSM agents will refuse it: " + err.Error() + ")"
	}
	left := time.Until(r.Expires).Round(time.Minute)
	rows = append(rows, [2]string{"proposed by", signed}, [2]string{"proposed at", stamp(&r.Created)},
		[2]string{"expires", fmt.Sprintf("%s (in %d h %02d min)", stamp(&r.Expires), int(left.Hours()), int(left.Minutes())%60)},
		[2]string{"request", hex.EncodeToString(r.Digest())})
	width := 0
	for _, row := range rows {
		width = max(width, len(row[0]))
	}
	a.sayf("%s is asked to approve:\n", who)
	for _, row := range rows {
		a.sayf("  %-*s  %s", width, row[0], plain(row[1]))
	}
	a.sayf("")
}

// plain is a text as it is, or quoted in ASCII if any of it could be taken for something else, or would move the cursor.
func plain(s string) string {
	if q := strconv.QuoteToASCII(s); q != `"`+s+`"` || s == "" || s[0] == ' ' || s[len(s)-1] == ' ' || strings.Contains(s, "  ") {
		return q
	}
	return s
}

// confirm asks on the terminal.
func (a *app) confirm(ctx context.Context) error {
	f, ok := a.in.(*os.File)
	if !ok || !isatty.IsTerminal(f.Fd()) {
		return usagef("there is no terminal to ask on: read what is to be approved, then say --yes")
	}
	fmt.Fprint(a.err, "Do you approve this? Type yes: ")
	answer := make(chan string, 1)
	go func() { // ends with the process: a read from a terminal cannot be given up
		line, _ := bufio.NewReader(f).ReadString('\n') // an end without an answer is no
		answer <- strings.TrimSpace(line)
	}()
	select {
	case <-ctx.Done():
		a.sayf("")
		return errors.New("not approved: interrupted")
	case got := <-answer:
		if got != "yes" {
			return errors.New("not approved; the file is as it was")
		}
		return nil
	}
}

// addApproval adds an approval to the file as it is now, all of it or nothing; two people who approve at once are both in it.
func addApproval(file string, r identity.Request, mine identity.Approval, id *identity.Identity) ([]identity.Principal, error) {
	// The directory is locked, not the file, which is replaced.
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return nil, fmt.Errorf("adding the approval: %w", err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("adding the approval: locking the directory of %s: %w", file, err)
	}
	st, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("adding the approval: %w", err)
	}
	g, err := readGrants([]string{file})
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(g.Request.Digest(), r.Digest()) {
		return nil, fmt.Errorf("%s holds another request now than the one you were shown: nothing was approved", file)
	}
	if err := g.Merge(identity.Grant{Request: r, Approvals: []identity.Approval{mine}}); err != nil {
		return nil, err
	}
	by, err := id.Approved(g.Request, g.Approvals, len(g.Approvals), time.Now(), approvers...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	text, err := json.MarshalIndent(g, "", "  ")
	if err == nil && len(text) >= identity.MaxGrant {
		err = fmt.Errorf("it would have more than %d octets", identity.MaxGrant)
	}
	if err != nil {
		return nil, fmt.Errorf("adding the approval to %s: %w", file, err)
	}
	return by, writeFile(file, append(text, '\n'), st.Mode().Perm())
}
