package e2e_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"trivet/load"
)

// A CA node runs a second time: beside itself in its own directory, from a snapshot of it on another machine, and from an older copy put in its place. Each time
// the one that must not run says what it is and what to do, and the other one goes on.
func TestAClonedCANodeDoesNotStart(t *testing.T) {
	s := up(t)
	ca1 := s.process(t, "ca1")
	clients := s.keepIssuing(t, false)
	issues(t, s.directly(t, "ca1", &load.Recorder{}), 1)
	snapshot := filepath.Join(t.TempDir(), "snapshot")
	if out, err := exec.Command("cp", "-a", ca1.Dir, snapshot).CombinedOutput(); err != nil {
		t.Fatalf("copying %s: %v\n%s", ca1.Dir, err, out)
	}
	clients.more(t)
	issues(t, s.directly(t, "ca1", &load.Recorder{}), 2)

	if said := s.second(t, ca1.Dir); !strings.Contains(said, "another process") || !strings.Contains(said, ca1.Dir) {
		t.Errorf("in the same directory:\n%s", said)
	}
	if said := s.second(t, snapshot); !strings.Contains(said, "this node's journal is older than the database") || !strings.Contains(said, "acknowledge_journal") {
		t.Errorf("from a snapshot:\n%s", said)
	}
	if now := s.process(t, "ca1").PID; now != ca1.PID {
		t.Errorf("ca1 itself ended: pid %d became %d", ca1.PID, now)
	}

	// The older copy in its place: the node stays away, and comes back with the right one.
	s.run(t, "demo", "kill", "ca1")
	right := ca1.Dir + ".right"
	since := len(logOf(t, ca1))
	if err := errors.Join(os.Rename(ca1.Dir, right), exec.Command("cp", "-a", snapshot, ca1.Dir).Run()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	starting := make(chan error, 1)
	go func() { // it waits until the node is ready
		starting <- exec.CommandContext(ctx, pkictl(), "demo", "start", "ca1", "--dir", s.dir).Run()
	}()
	s.logged(t, ca1, since, "this node's journal is older than the database", "put the right journal in its place")
	clients.more(t)
	s.run(t, "demo", "kill", "ca1")
	if err := errors.Join(os.RemoveAll(ca1.Dir), os.Rename(right, ca1.Dir)); err != nil {
		t.Fatal(err)
	}
	cancel()
	<-starting
	s.run(t, "demo", "start", "ca1")
	s.allWell(t)
	issues(t, s.directly(t, "ca1", &load.Recorder{}), 3)
	clients.end(t, s)
	s.fsck(t)
}

// second starts another process as ca1, elsewhere, in dir, and returns what it says when it ends, which it must, by itself.
func (s *site) second(t *testing.T, dir string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(s.dir, "etc", "ca1.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var cfg map[string]any
	if err := yaml.Unmarshal(raw, &cfg); err != nil {
		t.Fatal(err)
	}
	host := strings.TrimSuffix(network, "0.0/16") + "9.1"
	cfg["state_dir"] = dir
	cfg["listen"] = map[string]string{"api": host + ":8443", "admin": host + ":9443"}
	if raw, err = yaml.Marshal(cfg); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca1.yaml")
	write(t, path, raw)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	said, err := exec.CommandContext(ctx, filepath.Join(filepath.Dir(pkictl()), "ca"), "--config", path).CombinedOutput()
	if exit := new(exec.ExitError); !errors.As(err, &exit) || ctx.Err() != nil {
		t.Errorf("a second ca1 in %s: %v", dir, errors.Join(err, ctx.Err()))
	}
	return string(said)
}
