package e2e_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Every token is lost at once. New, empty ones stand in their places, and three of five custodians bring the keys back from a backup: the
// same CA issues again under the same certificate, and nothing was restarted.
func TestKeysComeBackFromABackupWhenEveryTokenIsLost(t *testing.T) {
	s := up(t)
	dir := t.TempDir()
	bundle, shares, request := filepath.Join(dir, "ca.backup"), filepath.Join(dir, "shares"), filepath.Join(dir, "backup.json")
	share := func(numbers ...int) (args []string) {
		for _, n := range numbers {
			args = append(args, "--share", fmt.Sprintf("%s/custodian-%d.share", shares, n))
		}
		return args
	}

	// The ceremony, step by step: recipient, shares and request; approvals; the bundle.
	s.run(t, "hsm", "backup", "--custodians", "5", "--threshold", "3", "--shares", shares, "--out", bundle, "--request-out", request)
	s.run(t, "approve", request, "--as", "admin1", "--yes")
	s.run(t, "approve", request, "--as", "operator1", "--yes")
	s.run(t, "hsm", "backup", "--recipient", bundle+".recipient", "--out", bundle, "--grant", request)
	s.run(t, slices.Concat([]string{"hsm", "restore", "--check", "--bundle", bundle}, share(1, 3, 5))...)
	if _, stderr, err := s.try(slices.Concat([]string{"hsm", "restore", "--check", "--bundle", bundle}, share(1, 3))...); err == nil || !strings.Contains(string(stderr), "3 are needed") {
		t.Errorf("two shares opened it: %s", stderr)
	}

	before, pids := s.liveKeys(t), map[string]int{}
	for _, p := range s.status(t).Processes {
		pids[p.Name] = p.PID
	}
	members := []string{"hsmd-a", "hsmd-b", "hsmd-c"}
	s.run(t, append([]string{"demo", "wipe"}, members...)...)
	if _, stderr, err := s.try("cert", "issue", "--dns", "lost.example.org", "--key-out", dir+"/lost", "--wait", "0s"); err == nil || !strings.Contains(string(stderr), "(503)") {
		t.Errorf("without any key: %v\n%s", err, stderr)
	}
	for _, m := range members {
		s.run(t, "hsm", "replace", m, "--bare", "--approve-as", two)
	}
	s.run(t, slices.Concat([]string{"hsm", "restore", "--bundle", bundle}, share(5, 2, 4))...)

	for _, m := range members {
		eventually(t, 10*time.Second, func() error { return s.memberIs(m, "active") })
	}
	after := s.liveKeys(t)
	if !slices.Equal(before, after) {
		t.Errorf("keys were %v and are %v", before, after)
	}
	s.run(t, "demo", "try")
	for _, p := range s.status(t).Processes {
		if p.Role != "hsmd" && p.PID != pids[p.Name] {
			t.Errorf("%s was restarted", p.Name)
		}
	}
	s.wellKept(t)
	s.fsck(t)
}

// liveKeys lists the ids of the group's live keys.
func (s *site) liveKeys(t *testing.T) (ids []string) {
	t.Helper()
	g, err := s.group()
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range g.Keys {
		ids = append(ids, string(k.ID))
	}
	if len(ids) == 0 {
		t.Fatal("the group has no keys")
	}
	return ids
}
