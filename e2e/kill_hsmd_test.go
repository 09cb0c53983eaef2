package e2e_test

import "testing"

// An HSM agent dies under load: signing goes on with the other members, and the one that returns is proved before it is used.
func TestKillHSMD(t *testing.T) { killUnderLoad(t, "hsmd_kill", "hsmd-a") }
