package e2e_test

import "testing"

// The database node that the nodes prefer dies under load: ambiguous commits are replayed on another, and the node rejoins.
func TestKillDB(t *testing.T) { killUnderLoad(t, "db_kill", "db1") }
