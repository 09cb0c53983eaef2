package ca_test

import (
	"os"
	"testing"

	"trivet/db/dbtest"
)

// cluster is the package's database, nil where MariaDB is not installed.
var cluster *dbtest.Cluster

func TestMain(m *testing.M) {
	os.Exit(dbtest.Main(m, "127.92.0", 3, func(c *dbtest.Cluster) { cluster = c }))
}
