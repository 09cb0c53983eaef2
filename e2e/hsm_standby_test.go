package e2e_test

import (
	"fmt"
	"testing"
	"time"
)

// A standby holds every key and signs nothing, until no active member is left: then it signs at once, and stops when one returns.
func TestStandbySignsWhenNoActiveMemberIsLeft(t *testing.T) {
	s := up(t)
	s.run(t, "hsm", "standby", "hsmd-c")
	t.Cleanup(func() { s.run(t, "hsm", "promote", "hsmd-c") })
	eventually(t, 10*time.Second, func() error { return s.memberIs("hsmd-c", "standby") })
	t.Cleanup(func() { s.run(t, "demo", "start", "hsmd-a", "hsmd-b") })

	stop := s.loading(t, 20)
	s.run(t, "demo", "kill", "hsmd-a", "hsmd-b")
	for i := range 3 {
		s.run(t, "cert", "issue", "--dns", fmt.Sprintf("standby-%d.example.org", i), "--key-out", fmt.Sprintf("%s/key-%d", t.TempDir(), i))
	}
	if m, err := s.member("hsmd-c"); err != nil || m.State != "standby" || !m.Standby {
		t.Errorf("%+v, %v", m, err)
	}
	s.run(t, "demo", "start", "hsmd-a")
	eventually(t, 10*time.Second, func() error { return s.memberIs("hsmd-a", "active") })
	s.run(t, "demo", "start", "hsmd-b")
	stop()

	s.run(t, "hsm", "promote", "hsmd-c")
	eventually(t, 10*time.Second, func() error { return s.memberIs("hsmd-c", "active") })
	s.fsck(t)
}
