package e2e_test

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// A database node stands still under load, its connections open: those who wait for it go elsewhere, and it comes back by itself.
func TestKillDBFreeze(t *testing.T) {
	s := upForRow(t, "db_freeze")
	s.underLoad(t, fault{
		name: "db_freeze", form: "SIGSTOP", process: "db1", goal: goals["db_freeze"],
		strike: func() func() {
			s.run(t, "demo", "freeze", "db1")
			return func() { s.run(t, "demo", "thaw", "db1") }
		},
		over: func() error { return s.allInStep(t) },
	})
}

// The disk of a database node hangs under load, while the node itself goes on talking: nobody waits for it, and it catches up by itself.
func TestKillDBDisk(t *testing.T) {
	s := upForRow(t, "db_disk")
	if os.Geteuid() != 0 {
		t.Skip("mounts a file system: only root may")
	}
	hang, mend := s.onHangingDisk(t, "db1")
	eventually(t, 60*time.Second, func() error { return s.allInStep(t) })
	s.allWell(t)
	paused := s.flowControl(t)
	s.underLoad(t, fault{
		name: "db_disk", form: "hangs", process: "db1", goal: goals["db_disk"],
		strike: func() func() { hang(); return mend },
		over:   func() error { return s.allInStep(t) },
	})
	if now := s.flowControl(t); now != paused {
		t.Errorf("db1 stopped the others' commits %d times", now-paused)
	}
}

// flowControl is how often the first database node has asked the others to wait for it.
func (s *site) flowControl(t *testing.T) (times int) {
	t.Helper()
	var name string
	if err := s.database(t).QueryRowContext(t.Context(), "SHOW GLOBAL STATUS LIKE 'wsrep_flow_control_sent'").Scan(&name, &times); err != nil {
		t.Fatal(err)
	}
	return times
}

// allInStep says which database node is not a member, or not in step with the others.
func (s *site) allInStep(t *testing.T) error {
	t.Helper()
	out, stderr, err := s.try("galera", "status")
	if err != nil {
		return fmt.Errorf("galera status: %w\n%s%s", err, out, stderr)
	}
	return nil
}
