package e2e_test

import (
	"fmt"
	"testing"
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

// allInStep says which database node is not a member, or not in step with the others.
func (s *site) allInStep(t *testing.T) error {
	t.Helper()
	out, stderr, err := s.try("galera", "status")
	if err != nil {
		return fmt.Errorf("galera status: %w\n%s%s", err, out, stderr)
	}
	return nil
}
