package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/journal"
)

// journalQuery is the flags that select records.
type journalQuery struct {
	archive      string
	kinds        []string
	serial, lane string
	after        uint64
	since, until string
	limit        int
}

func (a *app) journalCommand() *cobra.Command {
	return group("journal", "Verify and read journals", `Verify and read a node's journal: the directory that it writes to (state_dir of a ca, audit/ below that of an hsmd), a copy of it, or the archive's. The
node may be at work meanwhile; nothing is locked and nothing is changed.`,
		a.journalVerifyCommand(), a.journalCatCommand(), a.journalExportCommand())
}

func (a *app) journalVerifyCommand() *cobra.Command {
	var archive string
	c := &cobra.Command{
		Use:   "verify DIR",
		Short: "Check every record and the hash chain through all segments",
		Long: `Check every record and the hash chain through all segments, compressed and archived ones included. Segments that only the archive has are read from
--archive; without it their indexes are checked, and the segments counted as elsewhere.

The head stands for all records before it: who keeps it elsewhere can tell later that none was changed. The exit code is 1 if something is damaged.`,
		Args: cobra.ExactArgs(1),
		RunE: do(a, func(_ context.Context, args []string) (journal.Report, error) {
			d, err := journal.OpenDir(args[0], archive)
			if err != nil {
				return journal.Report{}, err
			}
			r, err := d.Verify()
			if err == nil && len(r.Damage) > 0 {
				err = errQuiet
			}
			return r, err
		}, func(w io.Writer, r journal.Report) {
			fmt.Fprintf(w, "segments\t%d\n", r.Segments)
			if r.Dropped > 0 {
				fmt.Fprintf(w, "dropped\t%d, of which no record was needed any more\n", r.Dropped)
			}
			if r.Elsewhere > 0 {
				fmt.Fprintf(w, "in the archive alone\t%d, not read: name it with --archive\n", r.Elsewhere)
			}
			fmt.Fprintf(w, "records\t%d\n", r.Records)
			if !r.First.IsZero() {
				fmt.Fprintf(w, "first\t%s\nlast\t%s\n", r.First.Format(time.RFC3339), r.Last.Format(time.RFC3339))
			}
			if len(r.Damage) == 0 {
				fmt.Fprintf(w, "head\t%s\n\nevery record is as it was written\n", r.Head)
				return
			}
			fmt.Fprint(w, "\nDAMAGED\tHOW\n")
			for _, d := range r.Damage {
				fmt.Fprintf(w, "%s\t%s\n", d.File, d.Error)
			}
		}),
	}
	c.Flags().StringVar(&archive, "archive", "", "directory of the segments that are not in DIR any more")
	return c
}

func (a *app) journalCatCommand() *cobra.Command {
	var q journalQuery
	c := &cobra.Command{
		Use:   "cat DIR",
		Short: "Print records, oldest first",
		Long: `Print records, oldest first: a line each, with --output json as JSON Lines. Filters are combined; of a large journal only the segments that may hold
what is asked for are read.`,
		Example: `  pkictl journal cat /var/lib/trivet/ca1 --kind crl,revocation --since 2026-11-01T00:00:00Z
  pkictl journal cat /var/lib/trivet/ca1 --serial 38c1…`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			print := printEntry
			if a.output == "json" {
				print = writeEntry
			}
			return a.readJournal(c.Context(), args[0], &q, a.out, print)
		},
	}
	q.flags(c)
	return c
}

func (a *app) journalExportCommand() *cobra.Command {
	var q journalQuery
	var to string
	c := &cobra.Command{
		Use:   "export DIR",
		Short: "Write records to a file as JSON Lines",
		Long: `Write records to a file as JSON Lines, oldest first: id ({incarnation}:{record number}), time, kind and payload, as GET /v1/audit shows them. The file
appears whole and durable, or not at all.`,
		Example: `  pkictl journal export /var/lib/trivet/ca1 --archive /mnt/journals/ca1 --until 2026-01-01T00:00:00Z --to ca1-2025.jsonl`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if to == "-" {
				return a.readJournal(c.Context(), args[0], &q, a.out, writeEntry)
			}
			return a.exportJournal(c.Context(), args[0], &q, to)
		},
	}
	q.flags(c)
	c.Flags().StringVar(&to, "to", "", "file; - is standard output")
	_ = c.MarkFlagRequired("to")
	return c
}

func (q *journalQuery) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&q.archive, "archive", "", "directory of the segments that are not in DIR any more")
	f.StringSliceVar(&q.kinds, "kind", nil, "of these kinds: start, intent, sign, done, void, round, crl, audit, settled, carry, seal; of done: cert, abandoned, revocation")
	f.StringVar(&q.serial, "serial", "", "about this serial number, in hex")
	f.StringVar(&q.lane, "lane", "", "done records of this lane of the change feed")
	f.Uint64Var(&q.after, "after", 0, "with --lane: those after this number")
	f.StringVar(&q.since, "since", "", "written at this time or later, such as 2026-01-31T12:00:00Z")
	f.StringVar(&q.until, "until", "", "written before this time")
	f.IntVar(&q.limit, "limit", 0, "at most so many")
}

func (q *journalQuery) query() (journal.Query, error) {
	out := journal.Query{Serial: strings.ToLower(strings.ReplaceAll(q.serial, ":", "")), Lane: q.lane, After: q.after}
	if _, err := hex.DecodeString(out.Serial); err != nil {
		return out, usagef("--serial %q: want hex digits", q.serial)
	}
	if q.after > 0 && q.lane == "" {
		return out, usagef("--after is about a --lane")
	}
	for _, name := range q.kinds {
		switch k, ok := journal.ParseKind(name); {
		case ok:
			out.Kinds = append(out.Kinds, k)
		case name == journal.DoneCert, name == journal.DoneAbandoned, name == journal.DoneRevocation:
			out.Done, out.Kinds = append(out.Done, name), append(out.Kinds, journal.KindDone)
		default:
			return out, usagef("--kind %q: see --help", name)
		}
	}
	for _, t := range []struct {
		flag, text string
		to         *time.Time
	}{{"since", q.since, &out.Since}, {"until", q.until, &out.Until}} {
		if t.text == "" {
			continue
		}
		var err error
		if *t.to, err = time.Parse(time.RFC3339, t.text); err != nil {
			return out, usagef("--%s %q: want a time such as 2026-01-31T12:00:00Z", t.flag, t.text)
		}
	}
	return out, nil
}

var errLimit = errors.New("the limit is reached")

// readJournal prints what the flags select.
func (a *app) readJournal(ctx context.Context, dir string, q *journalQuery, w io.Writer, print func(io.Writer, journal.Entry) error) error {
	query, err := q.query()
	if err != nil {
		return err
	}
	a.began = true
	d, err := journal.OpenDir(dir, q.archive)
	if err != nil {
		return err
	}
	out := bufio.NewWriter(w)
	n := 0
	err = d.Select(query, func(e journal.Entry) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if n++; q.limit > 0 && n > q.limit {
			return errLimit
		}
		return print(out, e)
	})
	if errors.Is(err, errLimit) {
		err = nil
	}
	if errors.Is(err, journal.ErrArchived) {
		err = fmt.Errorf("%w: name the archive with --archive", err)
	}
	return errors.Join(err, out.Flush())
}

func (a *app) exportJournal(ctx context.Context, dir string, q *journalQuery, to string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(to), "."+filepath.Base(to)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	defer f.Close()
	if err := a.readJournal(ctx, dir, q, f, writeEntry); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(f.Name(), to)
}

// entryID is an entry's id as the API gives it.
func entryID(e journal.Entry) string { return fmt.Sprintf("%x:%d", e.Incarnation, e.Offset) }

func writeEntry(w io.Writer, e journal.Entry) error {
	payload := json.RawMessage(e.Payload)
	if !json.Valid(payload) {
		payload, _ = json.Marshal(map[string][]byte{"octets": e.Payload}) // a map of octets is always encoded
	}
	line, err := json.Marshal(struct {
		ID      string          `json:"id"`
		Time    time.Time       `json:"time"`
		Kind    string          `json:"kind"`
		Payload json.RawMessage `json:"payload"`
	}{entryID(e), e.Time.UTC(), e.Kind.String(), payload})
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// printEntry prints what people look for; JSON holds the rest.
func printEntry(w io.Writer, e journal.Entry) error {
	var p struct {
		Issuer, Serial, Kind, Lane, Requester, Why, Node string
		Number, Seq                                      uint64
		Actor, Event, Object, Outcome, Detail            any
		Intents                                          int
		Segment, Records                                 uint64
	}
	_ = json.Unmarshal(e.Payload, &p) // what cannot be read is not shown
	var what string
	switch e.Kind {
	case journal.KindAudit:
		what = fmt.Sprint(p.Event, " ", p.Object, " by ", p.Actor, ": ", p.Outcome)
	case journal.KindCRL:
		what = fmt.Sprintf("%s number %d", p.Issuer, p.Number)
	case journal.KindStart:
		what = p.Node
	case journal.KindSeal:
		what = fmt.Sprintf("segment %d, %d records", p.Segment, p.Records)
	case journal.KindSettled:
		what = fmt.Sprintf("%d intents", p.Intents)
	case journal.KindDone:
		what = fmt.Sprintf("%s:%s %s, %s %d", p.Issuer, p.Serial, p.Kind, p.Lane, p.Seq)
	default:
		if p.Serial != "" {
			what = strings.TrimSpace(fmt.Sprintf("%s:%s %s%s", p.Issuer, p.Serial, p.Requester, p.Why))
		}
	}
	_, err := fmt.Fprintf(w, "%s  %-7s  %s\n", e.Time.UTC().Format("2006-01-02T15:04:05.000Z"), e.Kind, what)
	return err
}
