package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/hsmsync/custody"
)

// backedUp is what `hsm backup` made.
type backedUp struct {
	Bundle    string    `json:"bundle"` // file
	Digest    string    `json:"digest"`
	Created   time.Time `json:"created"`
	Keys      int       `json:"keys"`              // that are in it, the retired ones included
	Retired   int       `json:"retired"`           // how many of those are retired
	Missing   []missing `json:"missing,omitempty"` // keys of the group that are not in it
	Recipient string    `json:"recipient"`         // file
	Set       string    `json:"share_set"`
	Threshold int       `json:"threshold"`
	Shares    []string  `json:"shares,omitempty"` // files made now
}

// missing is a key of the group that a backup does not hold.
type missing struct {
	ID    hsm.KeyID `json:"id"`
	Label string    `json:"label"`
	Why   string    `json:"why"`
}

func missingOf(b custody.Bundle) (out []missing) {
	for _, k := range b.Keys {
		if held, why := b.Holds(k.ID); !held {
			out = append(out, missing{k.ID, k.Label, why})
		}
	}
	return out
}

func (b backedUp) text(w io.Writer) {
	fmt.Fprintf(w, "bundle\t%s, %s, %d of them retired\nSHA-256\t%s\nopened by\tany %d shares of set %s\nrecipient\t%s\n", b.Bundle, plural(b.Keys, "key"), b.Retired, b.Digest, b.Threshold, b.Set, b.Recipient)
	for _, k := range b.Missing {
		fmt.Fprintf(w, "NOT IN IT\t%s (%s): %s\n", k.ID, k.Label, k.Why)
	}
	for _, s := range b.Shares {
		fmt.Fprintf(w, "share\t%s\n", s)
	}
}

// backupFlags say to whom a backup is made, and where everything goes.
type backupFlags struct {
	out, recipient, shares string
	custodians, threshold  int
}

func (a *app) hsmBackup() *cobra.Command {
	var b backupFlags
	var f grantFlags
	c := &cobra.Command{
		Use:   "backup --out BUNDLE (--custodians N --threshold M --shares DIR | --recipient FILE)",
		Short: "Write every key of the group into a file that only custodians together can open",
		Long: `Write every key of the group, live and retired, into a file that only custodians together can open. What it lacks it names, with the reason. The keys are wrapped by the group's domain key, inside of an
HSM; the domain key is wrapped for a recipient's key; and that key's private half can be put together only from --threshold of the --custodians
shares. Nothing in the file is secret by itself, but keep it as what it is. Signing goes on.

The shares are written as one file for each custodian, readable by you alone: hand each over, on paper or a card, and remove the files. With
the same custodians later backups need no new shares: name the recipient's file with --recipient. It is written beside the bundle, with
.recipient added to the name; nothing in it is secret.

A backup that nobody has opened is no backup: "pkictl hsm restore --check" does so without touching any HSM.` + grantHelp + groupHelp,
		Example: `  pkictl hsm backup --custodians 5 --threshold 3 --shares /media/ceremony --out ca.backup --request-out backup.json
  pkictl approve backup.json --as admin1 && pkictl approve backup.json --as operator1
  pkictl hsm backup --recipient ca.backup.recipient --out ca.backup --grant backup.json`,
		Args: cobra.NoArgs,
	}
	c.Flags().StringVar(&b.out, "out", "", "the backup's file")
	c.Flags().IntVar(&b.custodians, "custodians", 0, "how many shares to make, 2 to 16")
	c.Flags().IntVar(&b.threshold, "threshold", 0, "how many of them are needed to open the backup, 2 or more")
	c.Flags().StringVar(&b.shares, "shares", "", "directory for the shares' files")
	c.Flags().StringVar(&b.recipient, "recipient", "", "file of a recipient made before, whose custodians have their shares")
	_ = c.MarkFlagRequired("out")
	c.MarkFlagsRequiredTogether("custodians", "threshold", "shares")
	c.MarkFlagsOneRequired("recipient", "custodians")
	c.MarkFlagsMutuallyExclusive("recipient", "custodians")
	f.add(c)
	dryRun := dryRunFlag(c)
	c.RunE = a.changing("backup", &f, dryRun, func(ctx context.Context, s *groupSite, _ []string) (change, error) {
		st, err := s.state(ctx)
		if err != nil {
			return change{}, err
		}
		if b.out == "" {
			return change{}, usagef("--out is empty: name the backup's file")
		}
		if b.recipient == "" { // also in a dry run
			if b.shares == "" {
				return change{}, usagef("--shares is empty: name the directory of the shares")
			}
			if _, err := custody.Split(make([]byte, 32), b.custodians, b.threshold); err != nil {
				return change{}, usageError{err}
			}
		}
		switch {
		case *dryRun:
		case f.none():
			return change{}, errUnapproved
		case b.recipient == "" && len(f.files) > 0:
			return change{}, usagef("--grant is for a recipient that was approved: name its file with --recipient instead of making another one")
		}
		if err := absent(b.out); err != nil {
			return change{}, err
		}
		made := backedUp{Bundle: b.out, Recipient: b.recipient}
		var steps []string
		var to custody.Recipient
		switch {
		case b.recipient != "":
			if to, err = readRecipient(b.recipient); err != nil {
				return change{}, err
			}
			steps = []string{fmt.Sprintf("for the recipient in %s (%s): any %d of %d shares of set %s open it", b.recipient, to.Fingerprint(), to.Set.Threshold, len(to.Set.Digests), to.Set.ID)}
		default:
			made.Recipient = b.out + ".recipient"
			steps = []string{fmt.Sprintf("make a recipient, %s, and %d share files in %s; any %d of them open it", made.Recipient, b.custodians, b.shares, b.threshold)}
			if *dryRun {
				to, _, err = custody.NewRecipient(b.custodians, b.threshold) // for the plan alone
				break
			}
			if to, made.Shares, err = newRecipient(made.Recipient, b); err != nil {
				return change{}, err
			}
			s.app.sayf("made %s (%s) and %s, which belong together: name it with --recipient from now on, instead of --custodians", made.Recipient, to.Fingerprint(), plural(len(made.Shares), "share"))
		}
		if err != nil {
			return change{}, usageError{err}
		}
		made.Set, made.Threshold = to.Set.ID, to.Set.Threshold
		approval := s.coordinator.BackupAct(to.SPKI)
		var bundle custody.Bundle
		return change{
			object: s.group,
			steps: append(steps,
				fmt.Sprintf("have a member wrap domain key %s for the recipient", st.Domain.Name),
				fmt.Sprintf("have %s and %s wrapped with the domain key", plural(len(st.In(hsmsync.StateLive)), "live key"), plural(len(st.In(hsmsync.StateRetired)), "retired key")),
				"write it all to "+b.out),
			approval: &approval,
			act: func(ctx context.Context, c *hsmsync.Coordinator, grant []byte) (err error) {
				bundle, err = c.Backup(ctx, to, grant)
				return err
			},
			result: func(context.Context) (any, error) {
				text, err := bundle.Encode()
				if err != nil {
					return nil, err
				}
				made.Digest, made.Created, made.Keys, made.Missing = bundle.Digest, bundle.Created, len(bundle.Blobs), missingOf(bundle)
				for _, k := range bundle.Blobs {
					if bundle.IsRetired(k.ID) {
						made.Retired++
					}
				}
				return made, writeNew(b.out, text)
			},
		}, nil
	})
	return c
}

// newRecipient makes a recipient's file and one file for each custodian.
func newRecipient(file string, b backupFlags) (custody.Recipient, []string, error) {
	fail := func(err error) (custody.Recipient, []string, error) { return custody.Recipient{}, nil, err }
	to, shares, err := custody.NewRecipient(b.custodians, b.threshold)
	if err != nil {
		return fail(usageError{err})
	}
	if err := os.MkdirAll(b.shares, 0o700); err != nil {
		return fail(fmt.Errorf("making the directory of the shares: %w", err))
	}
	var files []string
	for _, share := range shares {
		name := filepath.Join(b.shares, fmt.Sprintf("custodian-%d.share", share.Index()))
		if err := absent(name); err != nil { // before the first is written
			return fail(err)
		}
		files = append(files, name)
	}
	if err := absent(file); err != nil {
		return fail(err)
	}
	for i, share := range shares {
		text := fmt.Sprintf("# %s, for the backup %s. Whoever has %d of them and the backup has every key.\n%s\n", share, filepath.Base(b.out), share.Threshold(), share.Text())
		if err := writeNew(files[i], []byte(text)); err != nil {
			return fail(err)
		}
	}
	text, err := json.MarshalIndent(to, "", "  ")
	if err != nil {
		return fail(err)
	}
	if err := writeNew(file, append(text, '\n')); err != nil {
		for _, name := range files { // they open nothing
			err = errors.Join(err, os.Remove(name))
		}
		return fail(err)
	}
	return to, files, nil
}

func readRecipient(file string) (custody.Recipient, error) {
	text, err := readBounded(file, 1<<20)
	if err != nil {
		return custody.Recipient{}, fmt.Errorf("reading the recipient: %w", err)
	}
	r, err := custody.ParseRecipient(text)
	if err != nil {
		return r, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

// absent refuses to write over a file, before anything is done for it.
func absent(file string) error {
	switch _, err := os.Lstat(file); {
	case err == nil:
		return fmt.Errorf("%s is there already: name another file", file)
	case errors.Is(err, os.ErrNotExist):
		return nil
	default:
		return fmt.Errorf("looking for %s: %w", file, err)
	}
}

// writeNew writes a file that only its owner can read, and that was not there.
func writeNew(file string, data []byte) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	return nil
}

// restored is what a backup holds, or what `hsm restore` brought back.
type restored struct {
	Group   string    `json:"group"`
	Digest  string    `json:"digest"`
	Created time.Time `json:"created"`
	Keys    []keyInfo `json:"keys"`
}

func (r restored) text(w io.Writer) {
	fmt.Fprintf(w, "backup of\tgroup %s, %s, SHA-256 %s\n", r.Group, r.Created.Format(time.RFC3339), r.Digest)
	for _, k := range r.Keys {
		fmt.Fprintf(w, "key\t%s %s:%s %s\n", k.ID, k.Purpose, k.Label, k.State)
	}
}

func (a *app) hsmRestore() *cobra.Command {
	var file string
	var shareFiles []string
	var check bool
	c := &cobra.Command{
		Use:   "restore --bundle FILE --share FILE…",
		Short: "Bring the keys of a backup into a group whose members have lost them all",
		Long: `Bring the keys of a backup into a group whose members have lost them all: new, empty tokens, enrolled or set up. The shares open the backup in
this process' memory, on this machine: use one that does nothing else. Each key is brought into one member, cloned to the others and proved by
each before it is live. The group gets a domain key of its own; the one in the backup is not used again.

--share - reads a share from standard input, so that it touches no disk. --check opens the backup, checks every key in it, and asks no HSM and no
database: do that after each backup, and yearly.` + groupHelp,
		Example: `  pkictl hsm restore --bundle ca.backup --share custodian-1.share --share custodian-4.share --share custodian-5.share --check`,
		Args:    cobra.NoArgs,
	}
	c.Flags().StringVar(&file, "bundle", "", "the backup's file")
	c.Flags().StringArrayVar(&shareFiles, "share", nil, "file of a custodian's share; - is standard input; give as many as are needed")
	_ = c.MarkFlagRequired("bundle")
	_ = c.MarkFlagRequired("share")
	c.Flags().BoolVar(&check, "check", false, "open the backup and check it, and nothing else")
	dryRun := dryRunFlag(c)
	c.MarkFlagsMutuallyExclusive("check", "dry-run")
	checking := do(a, func(context.Context, []string) (restored, error) {
		bundle, open, err := a.unlock(file, shareFiles)
		if err != nil {
			return restored{}, err
		}
		open.Close()
		r := restored{Group: bundle.Group, Digest: bundle.Digest, Created: bundle.Created, Keys: []keyInfo{}}
		for _, k := range bundle.Keys {
			state := "in the backup"
			if bundle.IsRetired(k.ID) {
				state += ", retired"
			}
			if held, why := bundle.Holds(k.ID); !held {
				state = "NOT in the backup: " + why
			}
			r.Keys = append(r.Keys, keyInfo{ID: k.ID, Label: k.Label, Purpose: k.Purpose, Algorithm: k.Algorithm, State: state, SPKI: hsm.Fingerprint(k.SPKI)})
		}
		return r, nil
	}, func(w io.Writer, r restored) { r.text(w) })
	restoring := a.changing("restore", nil, dryRun, func(_ context.Context, s *groupSite, _ []string) (change, error) {
		bundle, open, err := a.unlock(file, shareFiles)
		if err != nil {
			return change{}, err
		}
		steps := []string{fmt.Sprintf("open the backup of group %s of %s (SHA-256 %s)", bundle.Group, bundle.Created.Format(time.RFC3339), bundle.Digest)}
		for _, k := range bundle.Keys {
			step := fmt.Sprintf("restore key %s (%s:%s, %s)", k.ID, k.Purpose, k.Label, k.Algorithm)
			if held, why := bundle.Holds(k.ID); !held {
				step = fmt.Sprintf("leave out key %s (%s:%s), which the backup does not hold: %s", k.ID, k.Purpose, k.Label, why)
			} else if bundle.IsRetired(k.ID) {
				step += " as retired"
			}
			steps = append(steps, step)
		}
		return change{object: s.group, steps: steps, act: func(ctx context.Context, c *hsmsync.Coordinator, _ []byte) error {
			defer open.Close()
			return c.Restore(ctx, bundle, open.WrapFor)
		}, result: func(ctx context.Context) (any, error) {
			r := restored{Group: bundle.Group, Digest: bundle.Digest, Created: bundle.Created, Keys: []keyInfo{}}
			for _, k := range bundle.Blobs {
				info, err := s.known(ctx, k.ID)
				if err != nil {
					return nil, err
				}
				r.Keys = append(r.Keys, info)
			}
			return r, nil
		}}, nil
	})
	c.RunE = func(c *cobra.Command, args []string) error {
		if check {
			return checking(c, args)
		}
		return restoring(c, args)
	}
	return c
}

// unlock opens a backup with its custodians' shares.
func (a *app) unlock(file string, shareFiles []string) (bundle custody.Bundle, open *custody.Unlocked, err error) {
	text, err := readBounded(file, custody.MaxBundle)
	if err != nil {
		return bundle, nil, fmt.Errorf("reading the backup: %w", err)
	}
	if bundle, err = custody.ParseBundle(text); err != nil {
		return bundle, nil, fmt.Errorf("%s: %w", file, err)
	}
	shares, err := a.readShares(shareFiles)
	if err != nil {
		return bundle, nil, err
	}
	open, err = custody.Unlock(bundle, shares)
	return bundle, open, err
}

func (a *app) readShares(files []string) (shares []custody.Share, err error) {
	for _, name := range files {
		text, err := a.readFile(name)
		if err != nil {
			return nil, fmt.Errorf("reading a share: %w", err)
		}
		some, err := custody.ParseShares(string(text))
		clear(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		shares = append(shares, some...)
	}
	return shares, nil
}
