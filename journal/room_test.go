package journal_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"trivet/journal"
)

// smallDisk mounts a file system of its own.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("mounting a file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill leaves nothing free on a disk, and returns what makes room again.
func fill(t *testing.T, disk string) (release func()) {
	t.Helper()
	path := filepath.Join(disk, "filler")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; size /= 2 {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFullDiskRefusesNewWorkAndRecoversByItself(t *testing.T) {
	for name, segment := range map[string]int64{"within a segment": 64 << 20, "at the end of segments": 300 << 10} {
		t.Run(name, func(t *testing.T) {
			disk := smallDisk(t, "12m")
			cfg := config(filepath.Join(disk, "j"))
			cfg.SegmentSize, cfg.Reserve, cfg.Plain = segment, 3<<20, true
			j := open(t, cfg)
			var want []string
			// try appends records until one is refused.
			try := func(what string, limit int, make func(id string) journal.Record) (n int) {
				t.Helper()
				for ; n < limit; n++ {
					id := fmt.Sprintf("%s %d", what, n)
					err := j.Append(make(id))
					if errors.Is(err, journal.ErrFull) {
						return n
					}
					if err != nil {
						t.Fatal(err)
					}
					want = append(want, id)
				}
				return n
			}
			large := strings.Repeat("x", 20<<10)
			intent := func(id string) journal.Record {
				return record(t, journal.Intent{Issuer: "i", Serial: id, Profile: large})
			}
			done := func(id string) journal.Record {
				return record(t, journal.Done{Issuer: "i", Serial: id, Kind: journal.DoneCert, Lane: large})
			}
			try("before", 10, intent)
			if err := j.Status().Full; err != nil {
				t.Fatal(err)
			}
			release := fill(t, disk)
			try("squeezed", 1000, intent)
			s := j.Status()
			if !errors.Is(s.Full, journal.ErrFull) {
				t.Fatalf("%+v", s)
			}
			if n := try("refused", 3, intent); n != 0 {
				t.Fatalf("%d intents were let in", n)
			}
			if n := try("finished", 1000, done); n < 20 || n > 200 { // 3 MiB of reserve
				t.Fatalf("%d records of work that was begun", n)
			}
			if s := j.Status(); s.Reserve != 0 || !errors.Is(s.Full, journal.ErrFull) {
				t.Fatalf("%+v", s)
			}
			select {
			case <-j.Failed():
				t.Fatal("a full disk is no failure")
			default:
			}
			release()
			until(t, "there is room again", func() bool { return j.Status().Full == nil })
			if n := try("after", 10, intent); n != 10 {
				t.Fatalf("%d intents were let in", n)
			}
			if s := j.Status(); s.Reserve != cfg.Reserve {
				t.Fatalf("%+v", s)
			}
			check := func(j *journal.Journal) {
				t.Helper()
				var got []string
				if err := j.Select(journal.Query{Kinds: []journal.Kind{journal.KindIntent, journal.KindDone}}, func(e journal.Entry) error {
					var p struct{ Serial string }
					err := e.Decode(&p)
					got = append(got, p.Serial)
					return err
				}); err != nil {
					t.Fatal(err)
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Fatalf("there: %v\nacknowledged: %v", got, want)
				}
			}
			check(j)
			j.Close()
			j = open(t, cfg)
			check(j)
		})
	}
}

// A node that starts on a full disk refuses new work; it needs a little of the reserve to start at all.
func TestANodeStartsOnAFullDisk(t *testing.T) {
	disk := smallDisk(t, "12m")
	cfg := config(filepath.Join(disk, "j"))
	cfg.Reserve = 3 << 20
	open(t, cfg).Close()
	release := fill(t, disk)
	j := open(t, cfg)
	intent := record(t, journal.Intent{Issuer: "i", Serial: "1", Profile: strings.Repeat("x", 20<<10)})
	if err := j.Append(intent); !errors.Is(err, journal.ErrFull) {
		t.Fatal(err)
	}
	if err := j.Append(text("x")); err != nil {
		t.Fatal(err)
	}
	release()
	if err := j.Append(intent); err != nil {
		t.Fatal(err)
	}
}

// failingNode is a process that ends when its journal has failed, as a node does; its fsync fails once.
func failingNode(dir string) {
	var syncs atomic.Int64
	j, err := journal.Open(journal.WithFiles(config(dir), func(f journal.File) journal.File {
		return &faulty{File: f, sync: func() error {
			if syncs.Add(1) == 10 {
				return &os.PathError{Op: "sync", Path: dir, Err: syscall.EIO}
			}
			return nil
		}}
	}))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go func() {
		for n := 0; ; n++ { // a client that does not give up
			if j.Append(text(fmt.Sprint(n))) == nil {
				fmt.Println(n)
			}
		}
	}()
	<-j.Failed()
	for range 10 {
		if err := j.Append(text("after")); !errors.Is(err, journal.ErrFailed) || !errors.Is(err, syscall.EIO) {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(3)
}

func TestAFailedFsyncEndsTheProcessThoughTheNextWouldSucceed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "j")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "JOURNAL_TEST_FAIL="+dir)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Fatalf("%v: %s", err, out)
	}
	acked := strings.Fields(string(out))
	got := texts(t, open(t, config(dir)).Replay)
	if len(acked) == 0 || len(got) < len(acked) || len(got) > len(acked)+1 || fmt.Sprint(got[:len(acked)]) != fmt.Sprint(acked) {
		t.Fatalf("there %v, acknowledged %v", got, acked)
	}
}
