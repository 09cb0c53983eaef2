package hsmtest_test

import (
	"testing"

	"trivet/hsm/hsmtest"
	"trivet/identity"
)

func TestAgentKeepsTheContract(t *testing.T) {
	m := hsmtest.NewLab(t).Start("hsmd-a")
	// The ceremony may manage keys and sign with CA keys, so the whole suite runs as one role.
	hsmtest.Run(t, m.Client(identity.RoleCeremony))
}
