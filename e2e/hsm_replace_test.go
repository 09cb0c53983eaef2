package e2e_test

import (
	"strings"
	"testing"
	"time"
)

// A fourth HSM is taken in under load; another one dies, comes back empty as a new HSM would, is not trusted, and is replaced. Nobody notices.
func TestHSMIsEnrolledAndALostOneReplacedUnderLoad(t *testing.T) {
	s := up(t)
	stop := s.loading(t, 20)

	// Enrol: refused without approval, refused to one person, then live.
	address := s.add(t, "hsmd-d")
	request := t.TempDir() + "/enroll.json"
	s.run(t, "hsm", "enroll", "hsmd-d", "--address", address, "--request-out", request)
	s.run(t, "approve", request, "--as", "admin1", "--yes")
	if out, stderr, err := s.try("hsm", "enroll", "hsmd-d", "--address", address, "--grant", request); err == nil || !strings.Contains(string(stderr), "2 people") {
		t.Errorf("enrolled with one approval: %s%s", out, stderr)
	}
	if m, err := s.member("hsmd-d"); err == nil {
		t.Errorf("it is in the group already: %+v", m)
	}
	s.run(t, "approve", request, "--as", "operator1", "--yes")
	s.run(t, "hsm", "enroll", "hsmd-d", "--address", address, "--grant", request)
	eventually(t, 10*time.Second, func() error { return s.memberIs("hsmd-d", "active") })

	// Lose one; what stands in its place is another token.
	s.run(t, "demo", "kill", "hsmd-b")
	s.run(t, "demo", "wipe", "hsmd-b")
	eventually(t, 10*time.Second, func() error {
		if s.memberIs("hsmd-b", "active") == nil {
			t.Fatal("an empty token serves under the old name")
		}
		_, stderr, err := s.try("hsm", "verify")
		if err == nil {
			t.Fatalf("verify found nothing wrong: %s", stderr)
		}
		return nil
	})
	s.run(t, "hsm", "replace", "hsmd-b", "--approve-as", two)
	eventually(t, 10*time.Second, func() error { return s.memberIs("hsmd-b", "active") })
	s.wellKept(t)

	stop()
	s.fsck(t)
}
