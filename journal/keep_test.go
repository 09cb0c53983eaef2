package journal_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"trivet/journal"
)

// until waits for a condition.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// names lists the files in dir whose names end so.
func names(t testing.TB, dir, suffix string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range paths {
		paths[i] = filepath.Base(p)
	}
	return paths
}

// history is records of every kind, in which some intents stay open.
type history struct {
	open     []string
	released []string
	crl      uint64
}

func (h *history) records(t testing.TB, n int) []journal.Record {
	serial := fmt.Sprintf("%08x", n)
	recs := []journal.Record{record(t, journal.Intent{Issuer: "demo-g1", Serial: serial, TBS: []byte(serial), Profile: "tls-server", Requester: "alice"})}
	switch n % 10 {
	case 3:
		h.open = append(h.open, serial)
	case 4:
		recs = append(recs, record(t, journal.Void{Issuer: "demo-g1", Serial: serial, Why: "adopted"}))
	case 5:
		h.crl = uint64(1000 + n)
		recs = append(recs, record(t, journal.CRL{Issuer: "demo-g1", Number: h.crl}))
		h.open = append(h.open, serial)
	default:
		h.released = append(h.released, serial)
		recs = append(recs, record(t, journal.Done{Issuer: "demo-g1", Serial: serial, Ver: 1, Lane: "lane", Seq: uint64(n), Kind: journal.DoneCert, DER: []byte(serial)}))
	}
	return recs
}

func (h *history) check(t *testing.T, j *journal.Journal) {
	t.Helper()
	s, err := j.State()
	if err != nil {
		t.Fatal(err)
	}
	var open, released []string
	for _, i := range s.Open {
		if i.Intent.Profile != "tls-server" || string(i.Intent.TBS) != i.Intent.Serial || time.Since(i.Time) > time.Hour {
			t.Errorf("open intent %+v", i)
		}
		open = append(open, i.Intent.Serial)
	}
	for _, d := range s.Released {
		released = append(released, d.Serial)
	}
	if fmt.Sprint(open) != fmt.Sprint(h.open) {
		t.Errorf("open %v, want %v", open, h.open)
	}
	want := h.released[max(0, len(h.released)-journal.KeepReleased):]
	if fmt.Sprint(released) != fmt.Sprint(want) {
		t.Errorf("released %v, want %v", released, want)
	}
	if s.CRLs["demo-g1"] != h.crl {
		t.Errorf("CRL number %d, want %d", s.CRLs["demo-g1"], h.crl)
	}
}

func TestStateIsCarriedFromSealToSeal(t *testing.T) {
	cfg := config(filepath.Join(t.TempDir(), "j"))
	cfg.SegmentSize = 3000
	var h history
	for n := range 400 {
		if n%100 == 50 { // a new incarnation
			j := open(t, cfg)
			h.check(t, j)
			j.Close()
		}
		if n%25 == 0 {
			j := open(t, cfg)
			for i := n; i < n+25; i++ {
				if err := j.Append(h.records(t, i)...); err != nil {
					t.Fatal(err)
				}
			}
			h.check(t, j)
			j.Close()
		}
	}
	j := open(t, cfg)
	h.check(t, j)
	if err := j.Append(record(t, journal.Settled{Intents: len(h.open)})); err != nil {
		t.Fatal(err)
	}
	h.open = nil
	for i := 400; i < 420; i++ {
		if err := j.Append(h.records(t, i)...); err != nil {
			t.Fatal(err)
		}
	}
	h.check(t, j)
	j.Close()
	j = open(t, cfg)
	h.check(t, j)
	starts := 0
	if err := j.Select(journal.Query{Kinds: []journal.Kind{journal.KindStart}}, func(journal.Entry) error { starts++; return nil }); err != nil {
		t.Fatal(err)
	}
	if all, err := j.Incarnations(); err != nil || len(all) != starts || all[starts-1].ID != j.Incarnation() || all[0].Until.After(all[1].Until) {
		t.Errorf("%d starts, incarnations %x %v", starts, all, err)
	}
	if lanes, err := j.Lanes(); err != nil || lanes["lane"].Last != 419 {
		t.Errorf("lanes %+v %v", lanes, err)
	}
}

// A start reads the newest index, and the segments after it.
func TestAStartReadsOnlyTheNewestSegments(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	cfg := config(dir)
	cfg.SegmentSize = 20 << 10
	var h history
	j := open(t, cfg)
	for n := 0; n < 3000; n += 10 {
		var recs []journal.Record
		for i := n; i < n+10; i++ {
			recs = append(recs, h.records(t, i)...)
		}
		if err := j.Append(recs...); err != nil {
			t.Fatal(err)
		}
		if n%500 == 0 {
			if err := j.Append(record(t, journal.Settled{})); err != nil {
				t.Fatal(err)
			}
		}
	}
	segments := j.Status().Segments
	until(t, "every sealed segment has its index and is compressed", func() bool { return len(names(t, dir, ".zst")) == segments-1 })
	j.Close()
	if segments < 20 {
		t.Fatalf("only %d segments", segments)
	}
	// What a start must not read cannot be read.
	for _, name := range names(t, dir, ".zst") {
		path := filepath.Join(dir, name)
		info, _ := os.Stat(path)
		put(t, path, make([]byte, info.Size()))
	}
	before := readBytes(t)
	j = open(t, cfg)
	if read := readBytes(t) - before; read > 4*cfg.SegmentSize+int64(segments)*8<<10 {
		t.Errorf("the start read %d bytes of %d segments", read, segments)
	}
	h.check(t, j)
}

// readBytes returns how many bytes this process has read so far.
func readBytes(t *testing.T) (n int64) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Skip(err)
	}
	if _, err := fmt.Sscanf(string(text), "rchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestSealedSegmentsAreCompressedArchivedAndRemoved(t *testing.T) {
	for name, command := range map[string]bool{"directory": false, "command": true} {
		t.Run(name, func(t *testing.T) {
			dir, archive := filepath.Join(t.TempDir(), "j"), t.TempDir()
			clock := time.Now()
			cfg := config(dir)
			cfg.SegmentSize = 2000
			cfg.Now = func() time.Time { return clock }
			cfg.Archive = journal.Archive{Dir: archive, Keep: time.Hour}
			if command {
				cfg.Archive = journal.Archive{Command: []string{"/bin/sh", script(t), archive}, Keep: time.Hour}
			}
			j := open(t, cfg)
			var want []string
			for n := range 40 {
				s := fmt.Sprintf("%d %s", n, strings.Repeat("x", 100))
				if want = append(want, s); j.Append(text(s)) != nil {
					t.Fatal("append")
				}
			}
			sealed := j.Status().Segments - 1
			until(t, "everything sealed is archived", func() bool { return len(names(t, dir, ".archived")) == sealed && j.Status().Unarchived == 0 })
			if len(names(t, dir, ".journal")) != 1 || len(names(t, dir, ".zst")) != sealed || len(names(t, archive, ".zst")) != sealed || len(names(t, archive, ".index")) != sealed {
				t.Fatalf("here %v, there %v", names(t, dir, ""), names(t, archive, ""))
			}
			if got := texts(t, j.Replay); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("replay: %q", got)
			}
			j.Close()

			clock = clock.Add(2 * time.Hour) // it may go now
			j = open(t, cfg)
			until(t, "what is archived is removed here", func() bool { return len(names(t, dir, ".zst")) == 0 })
			if err := j.Append(text("last")); err != nil {
				t.Fatal(err)
			}
			want = append(want, "last")
			d, err := journal.OpenDir(dir, archive)
			if err != nil {
				t.Fatal(err)
			}
			if got := texts(t, func(fn func(journal.Entry) error) error { return d.Select(journal.Query{}, fn) }); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("here and in the archive: %q", got)
			}
			if err := j.Select(journal.Query{Since: clock.Add(-3 * time.Hour)}, func(journal.Entry) error { return nil }); !errors.Is(err, journal.ErrArchived) {
				t.Fatalf("records that are not here: %v", err)
			}
			if got := texts(t, func(fn func(journal.Entry) error) error { return j.Select(journal.Query{Since: clock}, fn) }); fmt.Sprint(got) != "[last]" {
				t.Fatalf("records that are here: %q", got)
			}
			j.Close()
			open(t, cfg).Close() // starts without them
		})
	}
}

// script is an archive command as the documentation has it.
func script(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store.sh")
	put(t, path, []byte(`set -e
case $2 in
put) cp "$3" "$1/.part" && sync "$1/.part" && mv "$1/.part" "$1/$(basename "$3")" && sync "$1" ;;
verify) echo "$4  $1/$3" | sha256sum --check --status ;;
esac
`))
	return path
}

// archived waits until every segment but the one being written is in the archive.
func archived(t *testing.T, j *journal.Journal, dir string) {
	t.Helper()
	until(t, "everything is archived", func() bool {
		s := j.Status()
		return s.Unarchived == 0 && len(names(t, dir, ".archived")) == s.Segments-1
	})
}

func TestNothingIsRemovedThatTheArchiveHasNot(t *testing.T) {
	dir, archive := filepath.Join(t.TempDir(), "j"), t.TempDir()
	clock := time.Now()
	cfg := config(dir)
	cfg.SegmentSize = 1000
	cfg.Now = func() time.Time { return clock }
	cfg.Archive = journal.Archive{Dir: archive, Keep: time.Hour}
	j := open(t, cfg)
	for range 20 {
		if err := j.Append(text(strings.Repeat("x", 100))); err != nil {
			t.Fatal(err)
		}
	}
	archived(t, j, dir)
	j.Close()
	clock = clock.Add(2 * time.Hour)
	victim := names(t, archive, ".zst")[0]
	data, _ := os.ReadFile(filepath.Join(archive, victim))
	put(t, filepath.Join(archive, victim), bytes.ReplaceAll(data, data[20:24], []byte("oops")))
	j = open(t, cfg)
	until(t, "the trouble is told", func() bool { return j.Status().Trouble != nil })
	if _, err := os.Stat(filepath.Join(dir, victim)); err != nil {
		t.Fatalf("removed here, damaged there: %v", err)
	}
	if err := j.Status().Trouble; !errors.Is(err, journal.ErrCorrupt) || !strings.Contains(err.Error(), victim) {
		t.Fatal(err)
	}
}

func TestAnArchiveThatFailsIsTriedAgain(t *testing.T) {
	dir, archive := filepath.Join(t.TempDir(), "j"), filepath.Join(t.TempDir(), "not-mounted")
	cfg := config(dir)
	cfg.SegmentSize = 1000
	cfg.Archive = journal.Archive{Dir: archive}
	j := open(t, cfg)
	for range 20 {
		if err := j.Append(text(strings.Repeat("x", 100))); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "the trouble is told", func() bool { return j.Status().Trouble != nil })
	if s := j.Status(); s.Unarchived == 0 || s.Waiting.IsZero() {
		t.Fatalf("%+v", s)
	}
	if err := os.Mkdir(archive, 0o700); err != nil {
		t.Fatal(err)
	}
	until(t, "everything is archived", func() bool { s := j.Status(); return s.Unarchived == 0 && s.Trouble == nil })
}

func TestADamagedSealedSegmentIsNotCompressedAway(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	cfg := config(dir)
	cfg.SegmentSize, cfg.Plain = 1000, true
	j := open(t, cfg)
	for range 20 {
		if err := j.Append(text(strings.Repeat("x", 100))); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "indexes are made", func() bool { return len(names(t, dir, ".index")) == j.Status().Segments-1 })
	j.Close()
	path := filepath.Join(dir, journal.SegmentName(2))
	data, _ := os.ReadFile(path)
	data[len(data)/2] ^= 1
	put(t, path, data)
	cfg.Plain = false
	j = open(t, cfg)
	until(t, "the others are compressed", func() bool { return len(names(t, dir, ".journal")) == 2 && j.Status().Trouble != nil })
	if err := j.Status().Trouble; !errors.Is(err, journal.ErrCorrupt) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "at byte") {
		t.Fatal(err)
	}
	if err := j.Replay(func(journal.Entry) error { return nil }); !errors.Is(err, journal.ErrCorrupt) || !strings.Contains(err.Error(), path) {
		t.Fatal(err)
	}
}

func TestASegmentEndsByAge(t *testing.T) {
	clock := time.Now()
	cfg := config(filepath.Join(t.TempDir(), "j"))
	cfg.SegmentAge = time.Hour
	cfg.Now = func() time.Time { return clock }
	j := open(t, cfg)
	add := func() int {
		t.Helper()
		if err := j.Append(text("x")); err != nil {
			t.Fatal(err)
		}
		return j.Status().Segments
	}
	if n := add(); n != 1 {
		t.Fatal(n)
	}
	clock = clock.Add(59 * time.Minute)
	if n := add(); n != 1 {
		t.Fatal(n)
	}
	clock = clock.Add(time.Minute)
	if n := add(); n != 2 {
		t.Fatal(n)
	}
}

// The steps of sealing and keeping a segment, in order.
var steps = []string{"seal", "sealed", "begun", "index", "indexed", "pack", "compressed", "packed", "unlinked", "archive", "archived", "drop", "dropped"}

// dieAt is the victim of the next test: it writes, and kills itself at a step the second time that it gets there.
func dieAt(dir, archive, step string) {
	cfg := config(dir)
	cfg.SegmentSize = 1000
	var minutes atomic.Int64
	start := time.Now()
	cfg.Now = func() time.Time { return start.Add(time.Duration(minutes.Add(1)) * time.Minute) }
	cfg.Archive = journal.Archive{Dir: archive, Keep: time.Millisecond}
	var seen atomic.Int64
	cfg = journal.WithSteps(cfg, func(s string) {
		if s == step && seen.Add(1) == 2 {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	j, err := journal.Open(cfg)
	for n := 0; err == nil; n++ {
		s := fmt.Sprintf("%x/%d", j.Incarnation(), n)
		var intent journal.Record
		if intent, err = journal.New(journal.Intent{Issuer: "i", Serial: s}); err == nil {
			err = j.Append(text(s+strings.Repeat(" ", 200)), intent)
		}
		if err == nil {
			os.Stdout.WriteString(s + "\n")
		}
		time.Sleep(time.Millisecond)
	}
	fmt.Println("error", err)
	os.Exit(1)
}

func TestKillingTheWriterAtEveryStepLosesNothing(t *testing.T) {
	for _, step := range steps {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir, archive := filepath.Join(t.TempDir(), "j"), t.TempDir()
			var acked []string
			for range 3 {
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), "JOURNAL_TEST_DIE="+step, "JOURNAL_TEST_DIR="+dir, "JOURNAL_TEST_ARCHIVE="+archive)
				cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
				out, err := cmd.Output()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || !exit.Sys().(syscall.WaitStatus).Signaled() {
					t.Fatalf("it did not die at its step: %v %s", err, out[max(0, len(out)-300):])
				}
				acked = append(acked, strings.Fields(string(out))...)
			}
			cfg := config(dir)
			cfg.SegmentSize = 1000
			cfg.Archive = journal.Archive{Dir: archive}
			j := open(t, cfg)
			defer func() {
				if t.Failed() {
					t.Logf("%+v %v", j.Status(), names(t, dir, "l"))
				}
			}()
			until(t, "everything is in its place", func() bool {
				s := j.Status()
				return s.Unarchived == 0 && s.Trouble == nil && len(names(t, dir, ".journal")) == 1
			})
			state, err := j.State()
			if err != nil {
				t.Fatal(err)
			}
			openNow := map[string]bool{}
			for _, i := range state.Open {
				openNow[i.Intent.Serial] = true
			}
			if len(names(t, dir, ".tmp"))+len(names(t, archive, ".tmp")) > 1 { // the archive may keep one, which is written again under its name
				t.Errorf("left over: %v %v", names(t, dir, ".tmp"), names(t, archive, ".tmp"))
			}
			j.Close()
			d, err := journal.OpenDir(dir, archive)
			if err != nil {
				t.Fatal(err)
			}
			there := map[string]int{}
			for _, s := range texts(t, func(fn func(journal.Entry) error) error { return d.Select(journal.Query{}, fn) }) {
				there[strings.TrimSpace(s)]++
			}
			for _, name := range acked {
				if there[name] != 1 || !openNow[name] {
					t.Errorf("acknowledged: %s; there %d times, open %v", name, there[name], openNow[name])
				}
			}
			if len(acked) < 6 {
				t.Errorf("only %d acknowledged", len(acked))
			}
		})
	}
}

func TestTheArchiveAloneIsAJournal(t *testing.T) {
	dir, archive := filepath.Join(t.TempDir(), "j"), t.TempDir()
	cfg := config(dir)
	cfg.SegmentSize = 1000
	cfg.Archive = journal.Archive{Dir: archive}
	j := open(t, cfg)
	for range 20 {
		if err := j.Append(text(strings.Repeat("x", 100))); err != nil {
			t.Fatal(err)
		}
	}
	archived(t, j, dir)
	if got := texts(t, readDir(archive)); len(got) == 0 || len(got) > 20 {
		t.Fatalf("%d records", len(got))
	}
}
