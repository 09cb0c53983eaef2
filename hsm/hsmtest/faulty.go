package hsmtest

import (
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

//go:embed testdata/faulty.c
var faultySource string

// Faults is a directory whose files ask a faulty module for faults; testdata/faulty.c says which there are.
type Faults struct {
	t   testing.TB
	dir string
}

// plainFaults are the names that are no function's.
var plainFaults = []string{"rate", "lost", "pin-locked", "hang", "slow", "error", "flip", "digests", "logins", "trace"}

// Set asks for a fault; value is the file's content. A function's calls are counted anew. The module knows at once.
func (f Faults) Set(name, value string) {
	f.t.Helper()
	if !slices.Contains(plainFaults, name) && !strings.Contains(faultySource, ", "+name+",") {
		f.t.Fatalf("there is no fault %q: want a function of PKCS#11, or one of %q", name, plainFaults)
	}
	if err := os.RemoveAll(filepath.Join(f.dir, name+".calls")); err != nil {
		f.t.Fatal(err)
	}
	// Half a rule is never read.
	Write(f.t, filepath.Join(f.dir, name+".new"), value)
	if err := os.Rename(filepath.Join(f.dir, name+".new"), filepath.Join(f.dir, name)); err != nil {
		f.t.Fatal(err)
	}
}

// Clear takes a fault back.
func (f Faults) Clear(name string) { _ = os.Remove(filepath.Join(f.dir, name)) }

// Read is what the module has written to one of its logs.
func (f Faults) Read(name string) string {
	b, _ := os.ReadFile(filepath.Join(f.dir, name)) // absent is empty
	return string(b)
}

// Rate lets the token make so many signatures in a second, evenly, so that members can be made equal.
func (f Faults) Rate(perSecond float64) {
	f.t.Helper()
	f.Set("rate", fmt.Sprint(perSecond))
}

// Calls is how many calls a function's rule has seen since it was set.
func (f Faults) Calls(function string) int { return len(f.Read(function + ".calls")) }

// WaitCalls waits until a function's rule has seen n calls: until something hangs, for example.
func (f Faults) WaitCalls(function string, n int) {
	f.t.Helper()
	for end := time.Now().Add(20 * time.Second); f.Calls(function) < n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			f.t.Fatalf("%s was called %d times, want %d", function, f.Calls(function), n)
		}
	}
}

// FaultyModule compiles, into dir, a module that passes everything to real except for the faults asked for. It returns the
// module's path and the environment that a process using it needs.
func FaultyModule(t testing.TB, dir, real string) (module string, env []string, faults Faults) {
	t.Helper()
	faults = Faults{t, filepath.Join(dir, "faults")}
	if err := os.MkdirAll(faults.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	module = compiled(t, dir, "faulty.so", faultySource, "-shared", "-fPIC")
	return module, FaultyEnv(faults.dir, real), faults
}

// CompileFaulty compiles the faulty module into dir, for programs that are no test. A file is a fault there as well.
func CompileFaulty(dir string) (module string, err error) {
	return compile(dir, "faulty.so", faultySource, "-shared", "-fPIC")
}

// FaultyEnv is what a process needs that loads the faulty module: where faults are asked for, and the real module.
func FaultyEnv(faults, real string) []string {
	return []string{"TRIVET_FAULTS=" + faults, "TRIVET_REAL_MODULE=" + real}
}

// compiled is a C program or library, compiled once for all tests if they share anything, else into dir.
func compiled(t testing.TB, dir, name, source string, flags ...string) string {
	t.Helper()
	out, err := compile(cmp.Or(sharedDir(t), dir), name, source, flags...)
	if errors.Is(err, exec.ErrNotFound) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func compile(dir, name, source string, flags ...string) (string, error) {
	cc, err := exec.LookPath("cc")
	if err != nil {
		return "", fmt.Errorf("a C compiler is missing: install gcc: %w", err)
	}
	building.Lock()
	defer building.Unlock()
	out := filepath.Join(dir, name)
	return out, once(out, func(at string) error {
		if err := os.WriteFile(at+".c", []byte(source), 0o600); err != nil {
			return fmt.Errorf("compiling %s: %w", name, err)
		}
		args := append(flags, "-O1", "-o", at, at+".c", "-ldl", "-lpthread")
		if text, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("compiling %s: %w\n%s", name, err, text)
		}
		return nil
	})
}
