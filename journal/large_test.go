package journal_test

import (
	"encoding/hex"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trivet/journal"
)

var (
	large    = flag.Int("large", 0, "number of records for TestAYearsJournalStartsAtOnce, which is skipped without it; 10 M need 15 GB for a while")
	largeDir = flag.String("large-dir", "", "directory for them, made and kept; default a temporary one")
)

// writeYears writes n records as a CA node does, an intent, a signature and a done per certificate, without their fsyncs.
func writeYears(t testing.TB, cfg journal.Config, n int) {
	t.Helper()
	j, err := journal.Open(journal.WithFiles(cfg, func(f journal.File) journal.File { return unsynced{f} }))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	random := rand.NewChaCha8([32]byte{1})
	octets := func(n int) []byte {
		b := make([]byte, n)
		random.Read(b)
		return b
	}
	var recs []journal.Record
	for seq := uint64(1); n > 0; seq++ {
		serial, der := hex.EncodeToString(octets(20)), octets(800)
		recs = append(recs,
			record(t, journal.Intent{Issuer: "demo-g1", Serial: serial, Req: octets(32), Body: octets(32), TBS: der[:720], Requester: "spiffe://trivet/requester/shop", Profile: "tls-server"}),
			record(t, journal.Sign{Issuer: "demo-g1", Serial: serial, Digest: octets(32)}),
			record(t, journal.Done{Issuer: "demo-g1", Serial: serial, Ver: 1, DER: der, Lane: "ca1:" + cfg.Node + ":0", Seq: seq, Kind: journal.DoneCert}))
		if n -= 3; len(recs) >= 3*64 || n <= 0 {
			if err := j.Append(recs...); err != nil {
				t.Fatal(err)
			}
			recs = recs[:0]
		}
	}
	for deadline := time.Now().Add(time.Hour); len(names(t, cfg.Dir, ".index")) < j.Status().Segments-1 || len(names(t, cfg.Dir, ".journal")) > 1; time.Sleep(time.Second) {
		if err := j.Status().Trouble; err != nil || time.Now().After(deadline) {
			t.Fatal("sealed segments are not in their place", err)
		}
	}
}

type unsynced struct{ journal.File }

func (unsynced) Sync() error { return nil }

func TestAYearsJournalStartsAtOnce(t *testing.T) {
	if *large == 0 {
		t.Skip("no -large")
	}
	dir := *largeDir
	if dir == "" {
		dir = filepath.Join(t.TempDir(), "j")
	}
	cfg := config(dir)
	if _, err := os.Stat(dir); err != nil {
		began := time.Now()
		writeYears(t, cfg, *large)
		t.Logf("%d records written, compressed and indexed in %s", *large, time.Since(began).Round(time.Second))
	}
	j := open(t, cfg) // an index that a kill left out is made now, not in what is measured
	until(t, "every index is there", func() bool { return len(names(t, dir, ".index")) >= j.Status().Segments-1 })
	j.Close()
	files := map[string]int64{}
	var packed, indexes int64
	for _, name := range names(t, dir, "") {
		path := filepath.Join(dir, name)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		info, _ := f.Stat()
		files[filepath.Ext(name)]++
		switch filepath.Ext(name) {
		case ".zst", ".journal":
			packed += info.Size()
		case ".index":
			indexes += info.Size()
		}
		_ = f.Sync()
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil { // cold, as after a reboot
			t.Fatal(err)
		}
		f.Close()
	}
	t.Logf("%d segments: %.2f GB; indexes %.1f MB", files[".zst"]+files[".journal"], float64(packed)/1e9, float64(indexes)/1e6)

	timed := func(what string, fn func()) time.Duration {
		before, began, cpu := readBytes(t), time.Now(), cpuTime(t)
		fn()
		took := time.Since(began)
		t.Logf("%s: %s (%s of processors), %.1f MB read", what, took.Round(time.Millisecond), cpuTime(t)-cpu, float64(readBytes(t)-before)/1e6)
		return took
	}
	if took := timed("start", func() { j = open(t, cfg) }); took > 2*time.Second {
		t.Errorf("the start took %s", took)
	}
	lanes, err := j.Lanes()
	lane := lanes["ca1:ca1:0"]
	if err != nil || lane.Last == 0 {
		t.Fatal(lane, err)
	}
	timed("the last 1000 done records of a lane", func() {
		n := 0
		if err := j.Select(journal.Query{Lane: "ca1:ca1:0", After: lane.Last - 1000}, func(journal.Entry) error { n++; return nil }); err != nil || n != 1000 {
			t.Error(n, err)
		}
	})
	var middle *journal.Place
	timed("1000 done records of a lane in the middle", func() {
		n := 0
		err := j.Select(journal.Query{Lane: "ca1:ca1:0", After: lane.Last / 2}, func(e journal.Entry) error {
			if middle = (&journal.Place{Incarnation: e.Incarnation, Offset: e.Offset}); n == 999 {
				return errEnough
			}
			n++
			return nil
		})
		if !errors.Is(err, errEnough) {
			t.Error(n, err)
		}
	})
	timed("a page after a cursor in the middle", func() {
		n := 0
		if err := j.Select(journal.Query{From: middle}, func(journal.Entry) error {
			if n++; n == 100 {
				return errEnough
			}
			return nil
		}); !errors.Is(err, errEnough) {
			t.Error(n, err)
		}
	})
}

func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Round(time.Millisecond)
}

var errEnough = errors.New("enough")
