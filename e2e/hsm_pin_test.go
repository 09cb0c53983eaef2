package e2e_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"trivet/cluster"
)

// The PINs of all HSMs are rotated under load, one after the other, as two people approved: nobody notices, nobody sees a PIN, and every
// agent comes back with it.
func TestPINsAreRotatedUnderLoad(t *testing.T) {
	s := up(t)
	members := []string{"hsmd-a", "hsmd-b", "hsmd-c"}
	pins := func() (all []string) {
		for _, n := range members {
			b, err := os.ReadFile(cluster.Layout{Dir: s.dir}.Secret(n + "-pin"))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, strings.TrimSpace(string(b)))
		}
		return all
	}
	before := pins()
	stop := s.loading(t, 10)

	request := t.TempDir() + "/pins.json"
	s.run(t, "hsm", "rotate-pin", "--all", "--dry-run")
	s.run(t, "hsm", "rotate-pin", "--all", "--request-out", request)
	s.run(t, "approve", request, "--as", "admin1", "--yes")
	if out, stderr, err := s.try("hsm", "rotate-pin", "--all", "--grant", request); err == nil || !strings.Contains(string(stderr), "2 people") {
		t.Errorf("rotated with one approval: %s%s", out, stderr)
	}
	for i, pin := range pins() {
		if pin != before[i] {
			t.Fatalf("the PIN of %s was changed by a dry run, a request or one approval", members[i])
		}
	}
	s.run(t, "approve", request, "--as", "operator1", "--yes")
	s.run(t, "hsm", "rotate-pin", "--all", "--grant", request)
	s.run(t, "hsm", "rotate-pin", "--all", "--grant", request) // what is done is not done again
	after := pins()
	for i, n := range members {
		if after[i] == before[i] {
			t.Errorf("%s has its old PIN", n)
		}
		eventually(t, 20*time.Second, func() error { return s.memberIs(n, "active") })
		if m, err := s.member(n); err != nil || m.PIN.Rotated.IsZero() {
			t.Errorf("%+v, %v", m.PIN, err)
		}
	}
	s.kill(t, "hsmd-b") // its supervisor starts it again
	eventually(t, 20*time.Second, func() error { return s.memberIs("hsmd-b", "active") })
	s.wellKept(t)
	stop()
	s.fsck(t)
}
