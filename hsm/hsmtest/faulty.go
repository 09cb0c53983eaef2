package hsmtest

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

//go:embed testdata/faulty.c
var faultySource string

// Faults is a directory whose files ask a faulty module for faults; testdata/faulty.c says which there are.
type Faults struct {
	t   testing.TB
	dir string
}

// Set asks for a fault; value is the file's content.
func (f Faults) Set(name, value string) {
	f.t.Helper()
	Write(f.t, filepath.Join(f.dir, name), value)
}

// Clear takes a fault back.
func (f Faults) Clear(name string) { _ = os.Remove(filepath.Join(f.dir, name)) }

// Read is what the module has written to one of its logs.
func (f Faults) Read(name string) string {
	b, _ := os.ReadFile(filepath.Join(f.dir, name)) // absent is empty
	return string(b)
}

// FaultyModule compiles, into dir, a module that passes everything to real except for the faults asked for. It returns the
// module's path and the environment that a process using it needs.
func FaultyModule(t testing.TB, dir, real string) (module string, env []string, faults Faults) {
	t.Helper()
	cc, err := exec.LookPath("cc")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("a C compiler is missing: install gcc")
		}
		t.Skip("a C compiler is missing: install gcc")
	}
	faults = Faults{t, filepath.Join(dir, "faults")}
	if err := os.MkdirAll(faults.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(dir, "faulty.c")
	module = filepath.Join(dir, "faulty.so")
	Write(t, source, faultySource)
	if out, err := exec.Command(cc, "-shared", "-fPIC", "-O1", "-o", module, source, "-ldl").CombinedOutput(); err != nil {
		t.Fatalf("compiling the faulty module: %v\n%s", err, out)
	}
	return module, []string{"TRIVET_FAULTS=" + faults.dir, "TRIVET_REAL_MODULE=" + real}, faults
}
