package ca_test

import (
	"flag"
	"os"
	"testing"

	"trivet/db/dbtest"
)

// cluster is the package's database, nil where MariaDB is not installed.
var cluster *dbtest.Cluster

func TestMain(m *testing.M) {
	// Fuzzing runs this program many times over, and needs no database.
	flag.Parse()
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if v := flag.Lookup(name).Value.String(); v != "" && v != "false" {
			os.Exit(m.Run())
		}
	}
	os.Exit(dbtest.Main(m, "127.92.0", 3, func(c *dbtest.Cluster) { cluster = c }))
}
