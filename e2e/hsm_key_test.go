package e2e_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
)

// keyChange is what the key verbs print.
type keyChange struct {
	Done   bool
	Result struct {
		ID    hsm.KeyID
		State string
	}
}

func (s *site) key(t *testing.T, args ...string) keyChange {
	t.Helper()
	var c keyChange
	if err := json.Unmarshal(s.run(t, append([]string{"key", "--output", "json"}, args...)...), &c); err != nil || !c.Done {
		t.Fatalf("key %v: %+v, %v", args, c, err)
	}
	return c
}

// A key is not made while a member cannot have it; a member that was drained meanwhile gets it when it returns, without anybody's doing; a
// destroyed key goes from every member.
func TestKeyReachesEveryMemberOrIsNotMade(t *testing.T) {
	s := up(t)
	s.run(t, "demo", "kill", "hsmd-c")
	t.Cleanup(func() { s.run(t, "demo", "start", "hsmd-c") })
	out, stderr, err := s.try("key", "create", "scenario", "--purpose", "audit")
	if err == nil || !strings.Contains(string(stderr), "hsmd-c") {
		t.Fatalf("a key was made without hsmd-c, or the refusal does not name it: %s%s", out, stderr)
	}
	if list := string(s.run(t, "key", "list")); strings.Contains(list, "scenario") {
		t.Errorf("the refused key is in the list:\n%s", list)
	}

	// Without the member, once it is drained.
	s.run(t, "hsm", "drain", "hsmd-c", "--why", "away")
	first := s.key(t, "create", "scenario", "--purpose", "audit").Result
	if again := s.key(t, "create", "scenario", "--purpose", "audit").Result; again.ID != first.ID {
		t.Errorf("repeating it made another key: %s and %s", first.ID, again.ID)
	}

	// It returns: the CA nodes' job brings it what it lacks.
	s.run(t, "demo", "start", "hsmd-c")
	s.run(t, "hsm", "recover", "hsmd-c", "--why", "back")
	eventually(t, 40*time.Second, func() error { return s.memberIs("hsmd-c", "active") })
	if m, err := s.member("hsmd-c"); err != nil || !strings.Contains(fmt.Sprint(m.Keys), string(first.ID)) {
		t.Errorf("%+v, %v", m, err)
	}
	second := s.key(t, "create", "scenario-2", "--purpose", "audit").Result

	// The end of both.
	s.run(t, "hsm", "policy", "--set", "destroy_after=1ms", "--approve-as", two)
	t.Cleanup(func() { s.run(t, "hsm", "policy", "--set", "destroy_after=24h") })
	for _, id := range []hsm.KeyID{first.ID, second.ID} {
		if _, stderr, err := s.try("key", "destroy", string(id), "--approve-as", two); err == nil {
			t.Errorf("a live key was destroyed: %s", stderr)
		}
		s.key(t, "retire", string(id), "--why", "end of the scenario", "--approve-as", two)
		if got := s.key(t, "destroy", string(id), "--approve-as", two); got.Result.State != "destroyed" {
			t.Errorf("%s is %s", id, got.Result.State)
		}
	}
	s.wellKept(t)
	s.fsck(t)
}
