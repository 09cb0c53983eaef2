package hsmtest_test

import (
	"os"
	"testing"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
)

func TestMain(m *testing.M) { os.Exit(hsmtest.Main(m)) }

// The longer RSA keys take seconds each; the suite tries them on the token itself.
var algorithms = []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048, hsm.Ed25519}

func TestAgentKeepsTheContract(t *testing.T) {
	c := hsmtest.NewLab(t).Start("hsmd-a").Contract()
	c.Algorithms = algorithms
	c.Run(t)
}

// The faulty module without a fault is the module it stands before.
func TestAgentOnTheFaultyModuleKeepsTheContract(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
	faults.Set("trace", "")
	c := m.Serve().Contract()
	c.Algorithms = algorithms
	c.Run(t)
	if faults.Read("trace") == "" {
		t.Error("the agent does not use the faulty module")
	}
}

func TestAgentOnNSSKeepsTheContract(t *testing.T) {
	c := hsmtest.NewLab(t).NSS("hsmd-a", nssPatience).Serve().Contract()
	c.Algorithms = []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048} // it has no Ed25519
	c.Run(t)
}

// NSS decrypts a key in its directory with 10,000 rounds for each attribute read.
const nssPatience = "call_timeout: 20s"
