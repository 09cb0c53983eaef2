package e2e_test

import "testing"

// A CA node dies under load: the balancer sends its requests elsewhere with the same key, and the other node finishes what it began.
func TestKillCA(t *testing.T) { killUnderLoad(t, "ca_kill", "ca1") }
