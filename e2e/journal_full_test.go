package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"trivet/load"
)

// The disk of a CA node's journal is full: the node refuses new certificates before it writes anything, and says so; clients of the balancer notice
// nothing. With room it goes on by itself, without a restart.
func TestAFullJournalDiskSendsRequestsElsewhere(t *testing.T) {
	s := up(t)
	if os.Geteuid() != 0 {
		t.Skip("mounts a small file system: only root may")
	}
	dir := s.onSmallDisk(t, "ca1", 48<<20)
	s.allWell(t)
	pid := s.process(t, "ca1").PID
	clients := s.keepIssuing(t, false)

	filler := filepath.Join(dir, "filler")
	fill(t, filler)
	ca1 := s.directly(t, "ca1", &load.Recorder{})
	refuses(t, ca1, "full", "journal-unavailable", "disk is full")
	clients.more(t)
	// What was begun before, and what must not wait, has the reserve.
	last := clients.recorder.All()[clients.recorder.Len()-1]
	if _, err := ca1.Show(t.Context(), last.ID); err != nil {
		t.Errorf("ca1 shows nothing while its disk is full: %v", err)
	}
	if _, err := ca1.Revoke(t.Context(), last.ID, "superseded"); err != nil {
		t.Errorf("ca1 revokes nothing while its disk is full: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	issues(t, ca1, 1)
	s.allWell(t)
	if now := s.process(t, "ca1").PID; now != pid {
		t.Errorf("ca1 was restarted: pid %d became %d", pid, now)
	}
	clients.end(t, s)
	s.fsck(t)
}

// onSmallDisk moves what the process must not lose to a file system of its own, with so much room beside it, and back at the end.
func (s *site) onSmallDisk(t *testing.T, name string, room int64) string {
	t.Helper()
	return s.onDisk(t, name, func(dir string, used int64) error {
		return unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=700", used+room))
	})
}

// fill writes until the disk is full.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, 1<<20)
	for _, size := range []int{len(block), 4096} {
		for err = nil; err == nil; {
			_, err = f.Write(block[:size])
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
}
