package e2e_test

import (
	"fmt"
	"testing"

	"trivet/cluster"
)

// An HSM agent dies under load: signing goes on with the other members, and the one that returns is proved before it is used.
func TestKillHSMD(t *testing.T) { killUnderLoad(t, "hsmd_kill", "hsmd-a") }

// An HSM agent stands still under load, its connections open: what it was asked is asked of another before anybody notices.
func TestKillHSMDFreeze(t *testing.T) {
	s := upForRow(t, "hsmd_freeze")
	s.underLoad(t, fault{
		name: "hsmd_freeze", form: "SIGSTOP", process: "hsmd-a", goal: goals["hsmd_freeze"],
		strike: func() func() {
			s.run(t, "demo", "freeze", "hsmd-a")
			return func() { s.run(t, "demo", "thaw", "hsmd-a") }
		},
		over: func() error { return s.memberIs("hsmd-a", "active") },
	})
}

// The module of an HSM hangs under load while its agent goes on: the agent notices and ends itself, others sign.
func TestKillHSMHang(t *testing.T) {
	s := upForRow(t, "hsm_hang")
	faults := s.addFaulty(t, "hsmd-d")
	pid := s.process(t, "hsmd-d").PID
	s.underLoad(t, fault{
		name: "hsm_hang", form: "hang", process: "hsmd-d", goal: goals["hsm_hang"],
		strike: func() func() {
			faults.Set("hang", "")
			return func() { faults.Clear("hang") }
		},
		over: func() error {
			if p := s.process(t, "hsmd-d"); p.State != cluster.Running || p.PID == pid {
				return fmt.Errorf("hsmd-d is %s with pid %d; it had %d", p.State, p.PID, pid)
			}
			return s.memberIs("hsmd-d", "active")
		},
	})
}
