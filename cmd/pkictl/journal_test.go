package main

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"trivet/journal"
)

// aJournal makes a journal of several segments and leaves it open, with its archive.
func aJournal(t *testing.T) (dir, archive string) {
	t.Helper()
	dir, archive = filepath.Join(t.TempDir(), "journal"), t.TempDir()
	j, err := journal.Open(journal.Config{
		Dir: dir, Node: "ca1", SegmentSize: 2000, Archive: journal.Archive{Dir: archive}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	for n := range 30 {
		var recs []journal.Record
		for _, p := range []any{
			journal.Intent{Issuer: "demo-g1", Serial: "0a" + strconv.Itoa(10+n), Requester: "alice"},
			journal.Done{Issuer: "demo-g1", Serial: "0a" + strconv.Itoa(10+n), Kind: journal.DoneCert, Lane: "l", Seq: uint64(n)},
			journal.CRL{Issuer: "demo-g1", Number: uint64(n)},
		} {
			r, err := journal.New(p)
			if err != nil {
				t.Fatal(err)
			}
			recs = append(recs, r)
		}
		if err := j.Append(recs...); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); j.Status().Unarchived > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(j.Status())
		}
	}
	return dir, archive
}

func TestJournalIsReadBesideItsNode(t *testing.T) {
	dir, archive := aJournal(t)
	for name, c := range map[string]struct {
		args []string
		code int
		want []string // in the output, in order
		not  string
	}{
		"all is well":          {[]string{"verify", dir}, exitOK, []string{"records", "head", "every record is as it was written"}, "DAMAGED"},
		"the archive alone":    {[]string{"verify", archive}, exitOK, []string{"every record is as it was written"}, "DAMAGED"},
		"a serial":             {[]string{"cat", dir, "--serial", "0A:12"}, exitOK, []string{"intent", "demo-g1:0a12 alice", "done", "demo-g1:0a12 cert, l 2"}, "0a13"},
		"the end of a lane":    {[]string{"cat", dir, "--lane", "l", "--after", "27"}, exitOK, []string{"l 28", "l 29"}, "l 27"},
		"a kind, the first":    {[]string{"cat", dir, "--kind", "crl", "--limit", "2"}, exitOK, []string{"number 0", "number 1"}, "number 2"},
		"a kind of done":       {[]string{"cat", dir, "--kind", "cert,crl", "--limit", "2"}, exitOK, []string{"done", "crl"}, "intent"},
		"nothing before then":  {[]string{"cat", dir, "--until", "2001-01-01T00:00:00Z"}, exitOK, nil, "Z"},
		"JSON Lines":           {[]string{"cat", dir, "--kind", "start", "-o", "json"}, exitOK, []string{`{"id":"`, `:0","time":"`, `"kind":"start","payload":{"node":"ca1"`}, "intent"},
		"a wrong kind":         {[]string{"cat", dir, "--kind", "nonsense"}, exitUsage, nil, "demo"},
		"a wrong time":         {[]string{"cat", dir, "--since", "yesterday"}, exitUsage, nil, "demo"},
		"a number of no lane":  {[]string{"cat", dir, "--after", "1"}, exitUsage, nil, "demo"},
		"no such directory":    {[]string{"verify", dir + "-not"}, exitFailed, nil, "well"},
		"where to is not said": {[]string{"export", dir}, exitUsage, nil, "demo"},
	} {
		t.Run(name, func(t *testing.T) {
			r := pkictl(t, append([]string{"journal"}, c.args...)...)
			rest := r.out
			for _, w := range c.want {
				_, after, ok := strings.Cut(rest, w)
				if !ok {
					t.Fatalf("no %q in %q of\n%s", w, rest, r.out)
				}
				rest = after
			}
			if r.code != c.code || c.not != "" && strings.Contains(r.out, c.not) {
				t.Fatalf("exit %d: %s%s", r.code, r.out, r.err)
			}
		})
	}
}

func TestJournalIsExportedWholeOrNotAtAll(t *testing.T) {
	dir, _ := aJournal(t)
	to := filepath.Join(t.TempDir(), "out.jsonl")
	if r := pkictl(t, "journal", "export", dir, "--to", to, "--kind", "intent"); r.code != exitOK {
		t.Fatal(r)
	}
	text, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	for n, line := range lines {
		var e struct {
			ID, Kind string
			Payload  journal.Intent
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Kind != "intent" || e.Payload.Serial != "0a"+strconv.Itoa(10+n) {
			t.Fatal(line, err)
		}
	}
	if len(lines) != 30 {
		t.Fatal(len(lines))
	}
	os.Remove(to)
	damage(t, dir)
	if r := pkictl(t, "journal", "export", dir, "--to", to); r.code != exitFailed {
		t.Fatal(r)
	}
	if left, _ := os.ReadDir(filepath.Dir(to)); len(left) > 0 {
		t.Fatal(left)
	}
}

// damage changes one octet in a compressed segment.
func damage(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "0000000002.journal.zst")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDamageIsNamedAndTheRestStillChecked(t *testing.T) {
	dir, _ := aJournal(t)
	damage(t, dir)
	r := pkictl(t, "journal", "verify", dir, "-o", "json")
	var report journal.Report
	if err := json.Unmarshal([]byte(r.out), &report); err != nil || r.code != exitFailed {
		t.Fatal(r.code, r.out, r.err)
	}
	if len(report.Damage) != 1 || !strings.Contains(report.Damage[0].File, "0000000002") || report.Records < 60 {
		t.Fatalf("%+v", report)
	}
}
