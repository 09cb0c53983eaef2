package journal_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"trivet/journal"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("JOURNAL_TEST_WRITER"); dir != "" {
		writeForEver(dir)
	}
	if dir := os.Getenv("JOURNAL_TEST_FAIL"); dir != "" {
		failingNode(dir)
	}
	if step := os.Getenv("JOURNAL_TEST_DIE"); step != "" {
		dieAt(os.Getenv("JOURNAL_TEST_DIR"), os.Getenv("JOURNAL_TEST_ARCHIVE"), step)
	}
	os.Exit(m.Run())
}

func config(dir string) journal.Config {
	return journal.Config{Dir: dir, Node: "ca1", Log: slog.New(slog.DiscardHandler)}
}

func open(t *testing.T, cfg journal.Config) *journal.Journal {
	t.Helper()
	j, err := journal.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

func text(s string) journal.Record {
	return journal.Record{Kind: journal.KindAudit, Payload: []byte(s)}
}

// texts returns the payloads of all records that are not the journal's own.
func texts(t *testing.T, read func(func(journal.Entry) error) error) []string {
	t.Helper()
	var out []string
	if err := read(func(e journal.Entry) error {
		if e.Kind == journal.KindAudit {
			out = append(out, string(e.Payload))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func readDir(dir string) func(func(journal.Entry) error) error {
	return func(fn func(journal.Entry) error) error { return journal.ReadDir(dir, fn) }
}

func TestRecordsSurviveReopeningInOrder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	var want []string
	var incarnations [][16]byte
	for run := range 3 {
		cfg := config(dir)
		cfg.SegmentSize = 600 // several segments
		j := open(t, cfg)
		incarnations = append(incarnations, j.Incarnation())
		for n := range 10 {
			a, b := fmt.Sprintf("%d/%d a", run, n), fmt.Sprintf("%d/%d b", run, n)
			if err := j.Append(text(a), text(b)); err != nil {
				t.Fatal(err)
			}
			want = append(want, a, b)
		}
		if got := texts(t, j.Replay); strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Fatalf("replay of run %d: got %q, want %q", run, got, want)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		if err := j.Append(text("late")); !errors.Is(err, journal.ErrClosed) {
			t.Fatalf("append after close: %v", err)
		}
	}
	if got := texts(t, readDir(dir)); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Fatalf("got %q, want %q", got, want)
	}
	var starts [][16]byte
	var offset uint64
	if err := journal.ReadDir(dir, func(e journal.Entry) error {
		if e.Kind == journal.KindStart {
			starts, offset = append(starts, e.Incarnation), 0
		}
		if e.Offset != offset {
			t.Errorf("offset %d, want %d", e.Offset, offset)
		}
		offset++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(starts) != fmt.Sprint(incarnations) {
		t.Fatalf("incarnations %x, want %x", starts, incarnations)
	}
}

func TestPayloadsRoundTrip(t *testing.T) {
	in := journal.Done{Issuer: "demo-g1", Serial: "0a", Ver: 1, DER: []byte{1}, Lane: "l", Seq: 7, Kind: journal.DoneRevocation,
		Event: &journal.Revocation{N: 1, Event: "revoke", Reason: "superseded", Date: time.Unix(1, 0).UTC()}}
	r, err := journal.New(in)
	if err != nil || r.Kind != journal.KindDone {
		t.Fatal(r.Kind, err)
	}
	var out journal.Done
	if err := r.Decode(&out); err != nil || fmt.Sprintf("%+v %+v", in.Event, in.DER) != fmt.Sprintf("%+v %+v", out.Event, out.DER) {
		t.Fatal(out, err)
	}
	if _, err := journal.New("text"); err == nil {
		t.Fatal("a string became a payload")
	}
	if _, err := journal.New(journal.Revocation{}); err == nil {
		t.Fatal("an event alone became a payload")
	}
	if _, err := journal.New(journal.Done{Event: &journal.Revocation{Date: time.Date(10001, 1, 1, 0, 0, 0, 0, time.UTC)}}); err == nil {
		t.Fatal("a time JSON cannot hold was encoded")
	}
}

func TestConcurrentAppendsShareFsyncs(t *testing.T) {
	var syncs atomic.Int64
	hold := make(chan struct{})
	cfg := journal.WithFiles(config(filepath.Join(t.TempDir(), "j")), func(f journal.File) journal.File {
		return &faulty{File: f, sync: func() error {
			if syncs.Add(1) == 3 { // 1 header, 2 start, 3 the first append
				<-hold
			}
			return nil
		}}
	})
	j := open(t, cfg)
	first := make(chan error)
	go func() { first <- j.Append(text("first")) }()
	for syncs.Load() < 3 {
		time.Sleep(time.Millisecond)
	}
	var wg sync.WaitGroup
	for n := range 100 {
		wg.Go(func() {
			if err := j.Append(text(strconv.Itoa(n))); err != nil {
				t.Error(err)
			}
		})
	}
	for journal.Waiting(j) < 100 {
		time.Sleep(time.Millisecond)
	}
	close(hold)
	wg.Wait()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	if n := syncs.Load(); n != 4 {
		t.Fatalf("%d fsyncs, want 4: the 100 that waited share one", n)
	}
}

func TestASecondProcessIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	j := open(t, config(dir))
	if _, err := journal.Open(config(dir)); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Fatalf("got %v", err)
	}
	j.Close()
	open(t, config(dir))
}

func TestAnotherNodesJournalIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	open(t, config(dir)).Close()
	cfg := config(dir)
	cfg.Node = "ca2"
	if _, err := journal.Open(cfg); err == nil || !strings.Contains(err.Error(), `"ca1"`) {
		t.Fatalf("got %v", err)
	}
}

func TestAMistypedPathCreatesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "no", "such")
	if _, err := journal.Open(config(dir)); err == nil {
		t.Fatal("opened")
	}
	if _, err := os.Stat(filepath.Dir(dir)); !os.IsNotExist(err) {
		t.Fatal("parent was created")
	}
}

func TestOversizedRecordIsRefusedAndDoesNoHarm(t *testing.T) {
	j := open(t, config(filepath.Join(t.TempDir(), "j")))
	err := j.Append(text("a"), journal.Record{Kind: journal.KindAudit, Payload: make([]byte, journal.MaxPayload+1)})
	if !errors.Is(err, journal.ErrTooLarge) {
		t.Fatal(err)
	}
	if err := j.Append(text("b")); err != nil {
		t.Fatal(err)
	}
	if got := texts(t, j.Replay); len(got) != 1 || got[0] != "b" {
		t.Fatal(got)
	}
}

// write makes a closed journal with the given records, one batch each, and returns its only segment.
func write(t *testing.T, dir string, records ...string) (path string, data []byte) {
	t.Helper()
	j := open(t, config(dir))
	for _, r := range records {
		if err := j.Append(text(r)); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, journal.SegmentName(1))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, data
}

func put(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// frames returns where each frame begins, and the end.
func frames(data []byte) []int {
	at := []int{journal.HeaderSize}
	for pos := journal.HeaderSize; pos < len(data); {
		pos += journal.FrameSize(data[pos:])
		at = append(at, pos)
	}
	return at
}

func TestTornTailIsCutAtEveryLength(t *testing.T) {
	base := t.TempDir()
	_, data := write(t, filepath.Join(base, "j"), "one", "two", "three")
	at := frames(data)
	last := at[len(at)-2]
	for n := 0; n < len(data); n++ {
		whole := 0 // how many of one, two, three are complete
		for i := 2; i < len(at); i++ {
			if at[i] <= n {
				whole = i - 1
			}
		}
		dir := filepath.Join(base, strconv.Itoa(n))
		os.Mkdir(dir, 0o700)
		put(t, filepath.Join(dir, journal.SegmentName(1)), data[:n])
		if got := len(texts(t, readDir(dir))); got != whole {
			t.Fatalf("%d bytes read without opening: %d records, want %d", n, got, whole)
		}
		if n%17 != 0 && n < last {
			continue // opening costs fsyncs
		}
		j, err := journal.Open(config(dir))
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if err := j.Append(text("after")); err != nil {
			t.Fatal(err)
		}
		got := texts(t, j.Replay)
		j.Close()
		if len(got) != whole+1 || got[whole] != "after" {
			t.Fatalf("%d bytes: %q, want %d records and the new one", n, got, whole)
		}
	}
}

func TestTornTailOfGarbageOrZeros(t *testing.T) {
	for name, tail := range map[string][]byte{"zeros": make([]byte, 5000), "garbage": bytes.Repeat([]byte{0xff, 'T', 0xfe, 'J'}, 300)} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "j")
			path, data := write(t, dir, "one")
			put(t, path, append(data, tail...))
			j := open(t, config(dir))
			if got := texts(t, j.Replay); len(got) != 1 {
				t.Fatal(got)
			}
		})
	}
}

// The pages of one unfinished write may reach the disk in any order: its second half can be whole while its first is not.
func TestTornFirstHalfOfOneBatchIsCut(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	j := open(t, config(dir))
	if err := j.Append(text("kept")); err != nil {
		t.Fatal(err)
	}
	if err := j.Append(text("x"), text("y"), text("z")); err != nil {
		t.Fatal(err)
	}
	j.Close()
	path := filepath.Join(dir, journal.SegmentName(1))
	data, _ := os.ReadFile(path)
	at := frames(data)
	clear(data[at[2]:at[3]]) // x
	put(t, path, data)
	if got := texts(t, open(t, config(dir)).Replay); len(got) != 1 || got[0] != "kept" {
		t.Fatal(got)
	}
}

// Every byte of every record but those of the last batch: whatever is wrong with it, the journal refuses to start and is left as it is.
func TestDamageInTheMiddleIsRefusedAtEveryByte(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	path, data := write(t, dir, "one", "two", "three")
	at := frames(data)
	for pos := range at[len(at)-2] {
		bad := bytes.Clone(data)
		bad[pos] ^= 0x10
		put(t, path, bad)
		if err := journal.ReadDir(dir, func(journal.Entry) error { return nil }); !errors.Is(err, journal.ErrCorrupt) {
			t.Fatalf("byte %d changed: read: %v", pos, err)
		}
		if pos%23 != 0 {
			continue
		}
		if _, err := journal.Open(config(dir)); !errors.Is(err, journal.ErrCorrupt) || !strings.Contains(err.Error(), path) {
			t.Fatalf("byte %d changed: open: %v", pos, err)
		}
		if now, _ := os.ReadFile(path); !bytes.Equal(now, bad) {
			t.Fatal("the evidence was changed")
		}
	}
}

func TestRecordsRemovedSwappedOrRepeatedAreRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	path, data := write(t, dir, "one", "two", "three", "four")
	at := frames(data)
	part := func(i int) []byte { return data[at[i]:at[i+1]] }
	head, start := data[:at[0]], part(0)
	for name, parts := range map[string][][]byte{
		"removed":  {head, start, part(1), part(3), part(4)},
		"swapped":  {head, start, part(2), part(1), part(3), part(4)},
		"repeated": {head, start, part(1), part(1), part(2), part(3), part(4)},
	} {
		put(t, path, bytes.Join(parts, nil))
		if _, err := journal.Open(config(dir)); !errors.Is(err, journal.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSegmentsMissingShortenedOrSwappedAreRefused(t *testing.T) {
	base := t.TempDir()
	make := func(t *testing.T, dir string) {
		cfg := config(dir)
		cfg.SegmentSize, cfg.Plain = 400, true
		j := open(t, cfg)
		for n := range 12 {
			if err := j.Append(text(strconv.Itoa(n))); err != nil {
				t.Fatal(err)
			}
		}
		j.Close()
	}
	name := func(dir string, n uint64) string { return filepath.Join(dir, journal.SegmentName(n)) }
	for what, damage := range map[string]func(dir string) error{
		"first missing":  func(d string) error { return os.Remove(name(d, 1)) },
		"middle missing": func(d string) error { return os.Remove(name(d, 2)) },
		"middle cut":     func(d string) error { s, _ := os.Stat(name(d, 2)); return os.Truncate(name(d, 2), s.Size()-1) },
		"middle cut at a record": func(d string) error {
			b, _ := os.ReadFile(name(d, 2))
			at := frames(b)
			return os.Truncate(name(d, 2), int64(at[len(at)-2]))
		},
		"middle emptied": func(d string) error { return os.Truncate(name(d, 2), 0) },
		"renumbered":     func(d string) error { return errors.Join(os.Remove(name(d, 2)), os.Rename(name(d, 3), name(d, 2))) },
		"swapped": func(d string) error {
			return errors.Join(os.Rename(name(d, 2), d+"/x"), os.Rename(name(d, 1), name(d, 2)), os.Rename(d+"/x", name(d, 1)))
		},
	} {
		t.Run(what, func(t *testing.T) {
			dir := filepath.Join(base, strings.ReplaceAll(what, " ", "-"))
			make(t, dir)
			if _, err := os.Stat(name(dir, 4)); err != nil {
				t.Fatal("want at least 4 segments:", err)
			}
			if err := damage(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := journal.Open(config(dir)); !errors.Is(err, journal.ErrCorrupt) {
				t.Fatalf("open: %v", err)
			}
		})
	}
}

func TestTornNewSegmentIsBegunAgain(t *testing.T) {
	for _, size := range []int{0, 1, journal.HeaderSize - 1, journal.HeaderSize} {
		dir := filepath.Join(t.TempDir(), "j")
		write(t, dir, "one")
		put(t, filepath.Join(dir, journal.SegmentName(2)), make([]byte, size))
		j, err := journal.Open(config(dir))
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if err := j.Append(text("two")); err != nil {
			t.Fatal(err)
		}
		j.Close()
		if got := texts(t, readDir(dir)); strings.Join(got, " ") != "one two" {
			t.Fatalf("%d bytes: %q", size, got)
		}
	}
}

// faulty passes a segment on, failing as told.
type faulty struct {
	journal.File
	write func(b []byte) (keep int, err error)
	sync  func() error
}

func (f *faulty) WriteAt(b []byte, at int64) (int, error) {
	if f.write != nil {
		if keep, err := f.write(b); err != nil {
			n, _ := f.File.WriteAt(b[:keep], at)
			return n, err
		}
	}
	return f.File.WriteAt(b, at)
}

func (f *faulty) Sync() error {
	err := f.File.Sync()
	if f.sync != nil {
		if e := f.sync(); e != nil {
			return e
		}
	}
	return err
}

func TestFailureIsFinal(t *testing.T) {
	broken := errors.New("input/output error")
	for name, c := range map[string]struct {
		write func([]byte) (int, error)
		sync  func() error
		there bool // the record that was not acknowledged is there at the next start
	}{
		"nothing written":                        {write: func([]byte) (int, error) { return 0, broken }},
		"half written":                           {write: func(b []byte) (int, error) { return len(b) / 2, broken }},
		"written, but fsync said that it failed": {sync: func() error { return broken }, there: true},
	} {
		t.Run(name, func(t *testing.T) {
			var armed atomic.Bool
			var faults atomic.Int64
			dir := filepath.Join(t.TempDir(), "j")
			j := open(t, journal.WithFiles(config(dir), func(f journal.File) journal.File {
				return &faulty{File: f,
					write: func(b []byte) (int, error) {
						if c.write != nil && armed.Swap(false) { // once: the disk then works again
							faults.Add(1)
							return c.write(b)
						}
						return 0, nil
					},
					sync: func() error {
						if c.sync != nil && armed.Swap(false) {
							faults.Add(1)
							return c.sync()
						}
						return nil
					}}
			}))
			if err := j.Append(text("good")); err != nil {
				t.Fatal(err)
			}
			select {
			case <-j.Failed():
				t.Fatal("failed too early")
			default:
			}
			armed.Store(true)
			for n := range 3 {
				if err := j.Append(text("lost")); !errors.Is(err, journal.ErrFailed) || !errors.Is(err, broken) {
					t.Fatalf("append %d: %v", n, err)
				}
			}
			<-j.Failed()
			if faults.Load() != 1 {
				t.Fatal("the disk was used after the failure")
			}
			if err := j.Close(); !errors.Is(err, journal.ErrFailed) {
				t.Fatalf("close: %v", err)
			}
			got := texts(t, open(t, config(dir)).Replay)
			want := []string{"good"}
			if c.there {
				want = append(want, "lost")
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("got %q, want %q", got, want)
			}
		})
	}
}

func TestFailureReachesEveryoneWhoWaits(t *testing.T) {
	entered, hold := make(chan struct{}), make(chan struct{})
	var armed atomic.Bool
	j := open(t, journal.WithFiles(config(filepath.Join(t.TempDir(), "j")), func(f journal.File) journal.File {
		return &faulty{File: f, sync: func() error {
			if armed.Load() {
				close(entered)
				<-hold
				return errors.New("disk is gone")
			}
			return nil
		}}
	}))
	armed.Store(true)
	errs := make(chan error, 11)
	go func() { errs <- j.Append(text("first")) }()
	<-entered
	for range 10 {
		go func() { errs <- j.Append(text("waiting")) }()
	}
	for journal.Waiting(j) < 10 {
		time.Sleep(time.Millisecond)
	}
	close(hold)
	for range 11 {
		if err := <-errs; !errors.Is(err, journal.ErrFailed) {
			t.Fatal(err)
		}
	}
}

// A process that ended over a failed fsync may have left its last batch in the page cache alone; reading it back proves nothing.
func TestLastBatchIsWrittenAgainAtOpen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	_, data := write(t, dir, "one", "two")
	at := frames(data)
	var first []byte
	open(t, journal.WithFiles(config(dir), func(f journal.File) journal.File {
		return &faulty{File: f, write: func(b []byte) (int, error) {
			if first == nil {
				first = bytes.Clone(b)
			}
			return 0, nil
		}}
	}))
	if !bytes.Equal(first, data[at[len(at)-2]:]) {
		t.Fatalf("first write at open: %d bytes, want the last batch, %d bytes", len(first), len(data)-at[len(at)-2])
	}
}

func TestReplayAndReadDirWhileWriting(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	cfg := config(dir)
	cfg.SegmentSize = 4096
	j := open(t, cfg)
	done := make(chan struct{})
	var acked atomic.Int64
	go func() {
		defer close(done)
		for n := range 300 {
			if err := j.Append(text(strconv.Itoa(n)), text(strings.Repeat("x", 50))); err != nil {
				t.Error(err)
				return
			}
			acked.Store(int64(n + 1))
		}
	}()
	for working := true; working; {
		select {
		case <-done:
			working = false
		default:
		}
		for name, read := range map[string]func(func(journal.Entry) error) error{"replay": j.Replay, "read": readDir(dir)} {
			least := int(acked.Load())
			if got := texts(t, read); len(got) < 2*least || least > 0 && got[2*least-2] != strconv.Itoa(least-1) {
				t.Errorf("%s: %d records, want at least %d", name, len(got), 2*least)
			}
		}
	}
}

// writeForEver is the victim of the next test: it appends numbered records from several goroutines and says each number once it is durable.
func writeForEver(dir string) {
	cfg := config(dir)
	cfg.SegmentSize = 16 << 10
	j, err := journal.Open(cfg)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	run := fmt.Sprintf("%x", j.Incarnation())
	for g := range 4 {
		go func() {
			for n := 0; ; n++ {
				name := fmt.Sprintf("%s/%d/%d", run, g, n)
				if err := j.Append(text(name), text(strings.Repeat("x", rand.IntN(300)))); err != nil {
					fmt.Println("error", err)
					os.Exit(1)
				}
				os.Stdout.WriteString(name + "\n") // one write: whole lines
			}
		}()
	}
	select {}
}

func TestKillingTheWriterLosesNothingAcknowledged(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := filepath.Join(t.TempDir(), "j")
	acked := map[string]bool{}
	for range 25 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "JOURNAL_TEST_WRITER="+dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		limit := 1 + rng.IntN(60) // die after that many acknowledgements, somewhere within the writes that follow
		for n := 0; ; n++ {
			line, err := lines.ReadString('\n')
			if err == io.EOF {
				break
			}
			if strings.HasPrefix(line, "error") {
				t.Fatal(line)
			}
			acked[strings.TrimSpace(line)] = true
			if n == limit {
				cmd.Process.Kill()
			}
		}
		cmd.Wait()
	}
	j := open(t, config(dir))
	there := map[string]bool{}
	for _, s := range texts(t, j.Replay) {
		there[s] = true
	}
	for name := range acked {
		if !there[name] {
			t.Errorf("acknowledged, but not there: %s", name)
		}
	}
	t.Logf("%d acknowledged", len(acked))
}

func FuzzSegment(f *testing.F) {
	dir := f.TempDir()
	cfg := config(filepath.Join(dir, "j"))
	j, err := journal.Open(cfg)
	if err != nil {
		f.Fatal(err)
	}
	j.Append(text("one"), text("two"))
	j.Append(text("three"))
	j.Close()
	data, _ := os.ReadFile(filepath.Join(dir, "j", journal.SegmentName(1)))
	f.Add(data)
	f.Add(data[:len(data)-3])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var n int
		end, torn, err := journal.ParseSegment(b, func(e journal.Entry) error { n++; return nil })
		if end < 0 || end > len(b) {
			t.Fatalf("end %d of %d", end, len(b))
		}
		if err == nil && torn == "" && end != len(b) {
			t.Fatal("bytes left over without a word")
		}
		if err != nil && !errors.Is(err, journal.ErrCorrupt) {
			t.Fatal(err)
		}
		// What was good stays good, and is read the same, when the tail is cut.
		if end >= journal.HeaderSize {
			var again int
			if e, torn, err := journal.ParseSegment(b[:end], func(journal.Entry) error { again++; return nil }); e != end || torn != "" || err != nil || again != n {
				t.Fatalf("cut at %d: %d %q %v, %d records then %d", end, e, torn, err, n, again)
			}
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	j, err := journal.Open(config(filepath.Join(b.TempDir(), "j")))
	if err != nil {
		b.Fatal(err)
	}
	defer j.Close()
	r := text(strings.Repeat("x", 1500))
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := j.Append(r); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
