package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/hsm"
	"trivet/hsmsync"
)

// keyInfo is one key as the group's log has it.
type keyInfo struct {
	ID        hsm.KeyID     `json:"id"`
	Label     string        `json:"label"`
	Purpose   hsm.Purpose   `json:"purpose"`
	Algorithm hsm.Algorithm `json:"algorithm"`
	State     string        `json:"state"`
	Since     time.Time     `json:"since"`
	SPKI      string        `json:"spki_sha256,omitempty"`
	Public    string        `json:"public_key,omitempty"` // PEM
	Why       string        `json:"why,omitempty"`
	By        []string      `json:"approved_by,omitempty"`
}

func keyOf(k hsmsync.ManifestKey) keyInfo {
	i := keyInfo{
		ID: k.ID, Label: k.Label, Purpose: k.Purpose, Algorithm: k.Algorithm, State: string(k.State), Since: k.Since, Why: k.Note.Why, By: k.Note.By,
	}
	if len(k.SPKI) > 0 {
		i.SPKI = hsm.Fingerprint(k.SPKI)
		i.Public = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: k.SPKI}))
	}
	return i
}

func (i keyInfo) text(w io.Writer) {
	fmt.Fprintf(w, "id\t%s\nlabel\t%s\npurpose\t%s\nalgorithm\t%s\nstate\t%s since %s\n", i.ID, i.Label, i.Purpose, i.Algorithm, i.State, i.Since.UTC().Format(time.RFC3339))
	for _, line := range []struct{ name, value string }{{"SPKI SHA-256", i.SPKI}, {"why", i.Why}, {"approved by", strings.Join(i.By, ", ")}} {
		if line.value != "" {
			fmt.Fprintf(w, "%s\t%s\n", line.name, line.value)
		}
	}
}

// keyArgHelp says how a key is named on the command line.
const keyArgHelp = ` KEY is a key's id, the beginning of one, or purpose:label, such as ca:demo-g1.`

// findKey finds a key by what an operator calls it.
func (s *groupSite) findKey(ctx context.Context, name string) (hsmsync.ManifestKey, error) {
	st, err := s.state(ctx)
	if err != nil {
		return hsmsync.ManifestKey{}, err
	}
	purpose, label, byLabel := strings.Cut(name, ":")
	var found []hsmsync.ManifestKey
	for _, k := range st.Keys() {
		switch {
		case byLabel && k.Label == label && string(k.Purpose) == purpose && k.State != hsmsync.StateDestroyed && k.State != hsmsync.StateAbandoned:
			found = append(found, k)
		case !byLabel && name != "" && strings.HasPrefix(string(k.ID), name):
			found = append(found, k)
		}
	}
	switch len(found) {
	case 0:
		return hsmsync.ManifestKey{}, fmt.Errorf("group %s has no key %q: `pkictl key list` shows all", s.group, name)
	case 1:
		return found[0], nil
	}
	return hsmsync.ManifestKey{}, fmt.Errorf("%q may be %s or %s: name one by its id", name, found[0].ID, found[1].ID)
}

func (a *app) keyCommand() *cobra.Command {
	c := group("key", "Keys of an HSM group", `Keys of an HSM group: made on one member, cloned to every other, proved by each, and only then usable.`,
		a.keyCreate(), a.keyList(), a.keyShow(), a.keyRetire(), a.keyDestroy(), a.keyImport())
	return a.groupFlags(c)
}

func (a *app) keyList() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "list", Short: "List the group's keys", Long: `List the group's keys: pending, live and retired ones; --all shows abandoned and destroyed ones too.` + groupHelp, Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) ([]keyInfo, error) {
			s, err := a.openGroup(ctx)
			if err != nil {
				return nil, err
			}
			defer s.close()
			st, err := s.state(ctx)
			if err != nil {
				return nil, err
			}
			keys := []keyInfo{}
			for _, k := range st.Keys() {
				if all || k.State != hsmsync.StateAbandoned && k.State != hsmsync.StateDestroyed {
					keys = append(keys, keyOf(k))
				}
			}
			return keys, nil
		}, func(w io.Writer, keys []keyInfo) {
			fmt.Fprintln(w, "ID\tPURPOSE\tLABEL\tALGORITHM\tSTATE\tSINCE")
			for _, k := range keys {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", k.ID, k.Purpose, k.Label, k.Algorithm, k.State, k.Since.UTC().Format(time.RFC3339))
			}
		}),
	}
	c.Flags().BoolVar(&all, "all", false, "abandoned and destroyed keys as well")
	return c
}

func (a *app) keyShow() *cobra.Command {
	return &cobra.Command{
		Use: "show KEY", Short: "Show one key, with its public half", Long: `Show one key, with its public half.` + keyArgHelp + groupHelp, Args: cobra.ExactArgs(1),
		RunE: do(a, func(ctx context.Context, args []string) (keyInfo, error) {
			s, err := a.openGroup(ctx)
			if err != nil {
				return keyInfo{}, err
			}
			defer s.close()
			k, err := s.findKey(ctx, args[0])
			return keyOf(k), err
		}, func(w io.Writer, k keyInfo) {
			k.text(w)
			fmt.Fprint(w, k.Public)
		}),
	}
}

// keySpec are the flags that say what a key is to be.
func keySpec(c *cobra.Command, spec *hsm.KeySpec) {
	c.Flags().StringVar((*string)(&spec.Purpose), "purpose", "", "what it is for: ca, crl, ocsp, audit, infra")
	c.Flags().StringVar((*string)(&spec.Algorithm), "algorithm", string(hsm.P256), "its kind: "+algorithms())
	_ = c.MarkFlagRequired("purpose")
	_ = c.RegisterFlagCompletionFunc("purpose", cobra.FixedCompletions([]string{"ca", "crl", "ocsp", "audit", "infra"}, cobra.ShellCompDirectiveNoFileComp))
}

func algorithms() string {
	var names []string
	for _, a := range hsm.Algorithms() {
		names = append(names, string(a))
	}
	return strings.Join(names, ", ")
}

// checkSpec refuses, as a mistake on the command line, what no token would take.
func checkSpec(spec hsm.KeySpec) error {
	if spec.Purpose == hsm.PurposeProbe {
		return usagef("purpose probe: such keys stay in one token; each agent makes its own")
	}
	spec.ID = hsm.NewKeyID()
	if err := spec.Check(); err != nil {
		return usageError{err}
	}
	return nil
}

func (a *app) keyCreate() *cobra.Command {
	var spec hsm.KeySpec
	c := &cobra.Command{
		Use:   "create LABEL --purpose PURPOSE",
		Short: "Make a key, and return when every member has proved that it holds it",
		Long: `Make a key, and return when every member has proved that it holds it: made on one member, cloned to the others, challenged on each, entered
as live, read back from another database node. Every active member must answer; if one is down, bring it back, or drain or remove it first.
Whatever fails, no half-made key is ever used, and repeating the command is safe: a live key of that label and purpose is returned as it is.` + groupHelp,
		Example: `  pkictl key create demo-g2 --purpose ca
  pkictl key create audit-2 --purpose audit --algorithm P-384`,
		Args: cobra.ExactArgs(1),
	}
	keySpec(c, &spec)
	c.RunE = a.changing("create", nil, dryRunFlag(c), func(ctx context.Context, s *groupSite, args []string) (change, error) {
		spec.Label = args[0]
		if err := checkSpec(spec); err != nil {
			return change{}, err
		}
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		steps := []string{
			fmt.Sprintf("enter a key %s (%s, %s) as pending into the log of group %s", spec.Label, spec.Purpose, spec.Algorithm, s.group),
			fmt.Sprintf("make it on one of %s, clone it to the others, have each prove it", plural(len(st.Members()), "member")),
			"enter it as live and read that back from another database node",
		}
		if k, found := st.Find(spec.Label, spec.Purpose); found && k.State == hsmsync.StateLive {
			steps = []string{fmt.Sprintf("nothing: it is there already, as %s (%s)", k.ID, k.Algorithm)}
		}
		var record hsm.KeyRecord
		return change{object: spec.Label, steps: steps, act: func(ctx context.Context, c *hsmsync.Coordinator, _ []byte) (err error) {
			record, err = c.CreateKey(ctx, spec)
			return err
		}, result: func(ctx context.Context) (any, error) { return s.known(ctx, record.ID) }}, nil
	})
	return c
}

// destroyed is what became of a key and of its copies.
type destroyed struct {
	keyInfo
	hsmsync.Destruction
}

func (d destroyed) text(w io.Writer) {
	d.keyInfo.text(w)
	fmt.Fprintf(w, "destroyed on\t%s\n", strings.Join(d.Done, ", "))
	for _, m := range sorted(d.Left) {
		fmt.Fprintf(w, "left on\t%s: %s\n", m, d.Left[m])
	}
}

// known is a key as the log has it after an act.
func (s *groupSite) known(ctx context.Context, id hsm.KeyID) (keyInfo, error) {
	st, err := s.state(ctx)
	if err != nil {
		return keyInfo{}, err
	}
	k, ok := st.Key(id)
	if !ok {
		return keyInfo{}, fmt.Errorf("the log of group %s does not mention key %s any more", s.group, id)
	}
	return keyOf(k), nil
}

func (a *app) keyRetire() *cobra.Command {
	c := &cobra.Command{
		Use:   "retire KEY --why TEXT",
		Short: "Have a key sign no more; its copies stay",
		Long: `Have a key sign no more; its copies stay until it is destroyed. It does not come back: a retired key cannot be made live again. Make sure that no
CA and no responder uses it any more; its last CRL must have been signed. A key that is pending is given up, which needs nobody's approval.` + keyArgHelp + grantHelp + groupHelp,
		Example: `  pkictl key retire ca:demo-g1 --why "replaced by demo-g2" --approve-as admin1,operator1`,
		Args:    cobra.ExactArgs(1),
	}
	var f grantFlags
	f.add(c)
	why := c.Flags().String("why", "", "for the log: why it is done")
	_ = c.MarkFlagRequired("why")
	c.RunE = a.changing("retire", &f, dryRunFlag(c), func(ctx context.Context, s *groupSite, args []string) (change, error) {
		k, err := s.findKey(ctx, args[0])
		if err != nil {
			return change{}, err
		}
		return change{
			object: string(k.ID),
			steps:  []string{fmt.Sprintf("enter key %s (%s:%s, now %s) as retired: within seconds nothing is signed with it", k.ID, k.Purpose, k.Label, k.State)},
			act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) error {
				return c.RetireKey(ctx, k.ID, *why, grant)
			},
			result: func(ctx context.Context) (any, error) { return s.known(ctx, k.ID) },
		}, nil
	})
	return c
}

func (a *app) keyDestroy() *cobra.Command {
	var f grantFlags
	c := &cobra.Command{
		Use:   "destroy KEY",
		Short: "Destroy a retired key on every member, for good",
		Long: `Destroy a retired key on every member, for good. Members that are away destroy it when they come back, before they get any work, and none takes
it in again, not from a backup either. The key must have been retired for as long as the group's policy says (destroy_after).` + keyArgHelp + grantHelp + groupHelp,
		Args: cobra.ExactArgs(1),
	}
	f.add(c)
	c.RunE = a.changing("destroy", &f, dryRunFlag(c), func(ctx context.Context, s *groupSite, args []string) (change, error) {
		k, err := s.findKey(ctx, args[0])
		if err != nil {
			return change{}, err
		}
		approval, err := s.coordinator.DestroyAct(ctx, k.ID)
		if err != nil {
			return change{}, err
		}
		var gone hsmsync.Destruction
		return change{
			object: string(k.ID),
			steps: []string{
				fmt.Sprintf("enter key %s (%s:%s, %s since %s) as destroyed, with the approvals", k.ID, k.Purpose, k.Label, k.State, k.Since.UTC().Format(time.RFC3339)),
				"destroy both halves on every member that answers; the others do so when they come back",
			},
			approval: &approval,
			act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) (err error) {
				gone, err = c.DestroyKey(ctx, k.ID, grant)
				return err
			},
			result: func(ctx context.Context) (any, error) {
				info, err := s.known(ctx, k.ID)
				return destroyed{info, gone}, err
			},
		}, nil
	})
	return c
}

func (a *app) keyImport() *cobra.Command {
	var f grantFlags
	var spec hsm.KeySpec
	var file string
	c := &cobra.Command{
		Use:   "import LABEL --purpose PURPOSE --key FILE",
		Short: "Take a key from outside into the group",
		Long: `Take a key from outside into the group: sealed here for the transport key of one member, unwrapped inside of it, cloned to the others and proved
by each. The file is PKCS#8 in PEM, not encrypted; "-" is standard input, so that the key need not touch a disk:

  openssl pkcs8 -topk8 -nodes -in old-ca.key | pkictl key import old-ca --purpose ca --key - --grant import.json

A key that was outside of an HSM may have copies elsewhere: destroy them.` + grantHelp + groupHelp,
		Args: cobra.ExactArgs(1),
	}
	c.Flags().StringVar((*string)(&spec.Purpose), "purpose", "", "what it is for: ca, crl, ocsp, audit, infra")
	c.Flags().StringVar(&file, "key", "", "PKCS#8 file, PEM; - is standard input")
	_ = c.MarkFlagRequired("purpose")
	_ = c.MarkFlagRequired("key")
	f.add(c)
	c.RunE = a.changing("import", &f, dryRunFlag(c), func(ctx context.Context, s *groupSite, args []string) (change, error) {
		pkcs8, spki, alg, err := a.readPrivate(file)
		if err != nil {
			return change{}, err
		}
		spec.Label, spec.Algorithm = args[0], alg
		if err := checkSpec(spec); err != nil {
			return change{}, err
		}
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		if err := st.MayImport(spec, spki); err != nil {
			return change{}, err
		}
		approval := s.coordinator.ImportAct(spec, spki)
		var record hsm.KeyRecord
		return change{
			object: spec.Label,
			steps: []string{
				fmt.Sprintf("enter a key %s (%s, %s) as pending into the log of group %s", spec.Label, spec.Purpose, spec.Algorithm, s.group),
				fmt.Sprintf("bring the private key with public half %s into one member, clone it to the others, have each prove it", hsm.Fingerprint(spki)),
				"enter it as live",
			},
			approval: &approval,
			act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) (err error) {
				record, err = c.ImportKey(ctx, spec.Label, spec.Purpose, spec.Algorithm, pkcs8, grant)
				return err
			},
			result: func(ctx context.Context) (any, error) {
				clear(pkcs8)
				return s.known(ctx, record.ID)
			},
		}, nil
	})
	return c
}

// readPrivate reads a private key and tells what it is.
func (a *app) readPrivate(file string) (pkcs8, spki []byte, alg hsm.Algorithm, err error) {
	text, err := a.readFile(file)
	if err != nil {
		return nil, nil, "", fmt.Errorf("reading the key: %w", err)
	}
	block, rest := pem.Decode(text)
	more := len(bytes.TrimSpace(rest)) > 0
	clear(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, nil, "", errors.New("reading the key: want PKCS#8 in PEM (BEGIN PRIVATE KEY), not encrypted: `openssl pkcs8 -topk8 -nodes` makes that")
	}
	if more {
		return nil, nil, "", errors.New("reading the key: something follows it: want one key and nothing else")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil, "", fmt.Errorf("reading the key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, nil, "", fmt.Errorf("reading the key: a %T signs nothing", key)
	}
	if spki, err = x509.MarshalPKIXPublicKey(signer.Public()); err != nil {
		return nil, nil, "", fmt.Errorf("reading the key: %w", err)
	}
	if alg, err = hsm.AlgorithmOf(signer.Public()); err != nil {
		return nil, nil, "", fmt.Errorf("reading the key: %w", err)
	}
	if k, ok := signer.(*rsa.PrivateKey); ok && k.E < 65537 {
		return nil, nil, "", fmt.Errorf("reading the key: its RSA exponent is %d: want 65537 or more (FIPS 186-5)", k.E)
	}
	return block.Bytes, spki, alg, nil
}
