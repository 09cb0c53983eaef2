package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"trivet/hsm/hsmtest"
	"trivet/hsmsync"
	"trivet/load"
)

// two is who approves what two people must approve.
const two = "admin1,operator1"

// group is the HSM group as `pkictl hsm status` shows it; it may be in any state.
func (s *site) group(args ...string) (hsmsync.GroupStatus, error) {
	out, stderr, err := s.try(append([]string{"hsm", "status", "--output", "json"}, args...)...)
	var st hsmsync.Status
	if jerr := json.Unmarshal(out, &st); jerr != nil || len(st.Groups) != 1 {
		return hsmsync.GroupStatus{}, fmt.Errorf("hsm status: %w: %s%s", err, out, stderr)
	}
	return st.Groups[0], nil
}

func (s *site) member(name string, args ...string) (hsmsync.MemberStatus, error) {
	g, err := s.group(args...)
	if err != nil {
		return hsmsync.MemberStatus{}, err
	}
	for _, m := range g.Members {
		if m.Name == name {
			return m, nil
		}
	}
	return hsmsync.MemberStatus{}, fmt.Errorf("the group has no member %s: %+v", name, g.Members)
}

// memberIs is nil when the member is in that state and has proved every key.
func (s *site) memberIs(name, state string) error {
	m, err := s.member(name, "--wait", "2s")
	if err != nil {
		return err
	}
	if m.State != state {
		return fmt.Errorf("%s is %s (%s), not %s", name, m.State, m.Cause, state)
	}
	for _, k := range m.Keys {
		if k.State != "verified" {
			return fmt.Errorf("%s has not proved %s:%s: %s %s", name, k.Purpose, k.Label, k.State, k.Cause)
		}
	}
	return nil
}

// add puts a new HSM agent into the cluster and returns its address; the scenario's end takes it out of group and cluster.
func (s *site) add(t *testing.T, name string, args ...string) (address string) {
	t.Helper()
	t.Cleanup(func() {
		if _, err := s.member(name); err == nil {
			s.run(t, "hsm", "remove", name, "--why", "end of the scenario")
		}
		s.run(t, "demo", "remove", name)
	})
	s.run(t, append([]string{"demo", "add", name}, args...)...)
	return s.process(t, name).Addresses["agent"]
}

// enroll takes a new HSM into the group.
func (s *site) enroll(t *testing.T, name, address string, args ...string) {
	t.Helper()
	s.run(t, append([]string{"hsm", "enroll", name, "--address", address, "--approve-as", two}, args...)...)
}

// addFaulty is add and enroll with a module that can be made to fail.
func (s *site) addFaulty(t *testing.T, name string) hsmtest.Faults {
	t.Helper()
	dir := t.TempDir()
	module, env, faults := hsmtest.FaultyModule(t, dir, hsmtest.Module(t))
	args := []string{"--module", module}
	for _, v := range env {
		args = append(args, "--env", v)
	}
	s.enroll(t, name, s.add(t, name, args...))
	return faults
}

// loading issues at a steady rate until the returned function is called, which demands that no request failed.
func (s *site) loading(t *testing.T, rate float64) (stop func()) {
	t.Helper()
	recorder := &load.Recorder{}
	issuer := s.issuer(t, recorder)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel) // a scenario that ends early must not load the next one
	result := make(chan load.Result, 1)
	go func() {
		result <- load.Run(ctx, load.Config{Rate: rate, Duration: 5 * time.Minute, Timeout: 15 * time.Second}, issuer.Op)
	}()
	eventually(t, 30*time.Second, func() error {
		if recorder.Len() == 0 {
			return fmt.Errorf("the load has not got going")
		}
		return nil
	})
	return func() {
		t.Helper()
		cancel()
		r := <-result
		t.Logf("meanwhile: %v", r)
		if twice := recorder.Duplicates(); r.Failed > 0 || len(twice) > 0 {
			t.Errorf("%d of %d requests failed, duplicates: %v", r.Failed, r.Requests, twice)
		}
	}
}

// wellKept demands that every copy of every key is what the log says.
func (s *site) wellKept(t *testing.T, args ...string) {
	t.Helper()
	s.run(t, append([]string{"hsm", "verify"}, args...)...)
}
