package e2e_test

import "testing"

// A responder dies under load: every question is answered by the other.
func TestKillOCSP(t *testing.T) { killUnderLoad(t, "ocsp_kill", "ocsp1") }
