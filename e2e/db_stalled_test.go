package e2e_test

import (
	"fmt"
	"testing"
	"time"
)

// A database node stands still under load, its connections open: those who wait for it go elsewhere, and it comes back by itself.
func TestKillDBFreeze(t *testing.T) {
	s := up(t)
	s.underLoad(t, fault{
		name: "db_freeze", form: "SIGSTOP", process: "db1", goal: goals["db_freeze"],
		strike: func() func() {
			s.run(t, "demo", "freeze", "db1")
			return func() { s.run(t, "demo", "thaw", "db1") }
		},
		over: func() error { return s.allInStep(t) },
	})
}

// The disk of a database node hangs under load: whatever it is asked to make durable takes seconds, all else goes on. It is not used meanwhile, does not
// hold up the others, and is used again once its disk answers.
func TestKillDBDisk(t *testing.T) {
	s := up(t)
	pid := s.process(t, "db1").PID
	s.underLoad(t, fault{
		name: "db_disk", form: "hang", process: "db1", goal: goals["db_disk"],
		strike: func() func() {
			trace := tamper(t, pid, "-e", "trace=fsync,fdatasync", "-e", fmt.Sprintf("inject=fsync,fdatasync:delay_enter=%d", lasting/time.Microsecond))
			return func() { trace.end(t) }
		},
		over: func() error { return s.allInStep(t) },
	})
	if now := s.process(t, "db1").PID; now != pid {
		t.Errorf("db1 was restarted: pid %d became %d", pid, now)
	}
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
