package e2e_test

import (
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"trivet/cluster"
	"trivet/load/history"
)

// beginHistory begins the history of a scenario. It stays in build/history, to be looked at when something is violated.
func beginHistory(t *testing.T) *history.Log {
	t.Helper()
	path := filepath.Join("..", "build", "history", strings.ReplaceAll(t.Name(), "/", "_")+".jsonl")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	log, err := history.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := log.Close(); err != nil {
			t.Errorf("the history is not whole: %v", err)
		}
	})
	return log
}

// generation is the issuer of the scenarios' certificates, as ids have it.
func (s *site) generation(t *testing.T) string {
	t.Helper()
	ca := s.status(t).CAs[0]
	return fmt.Sprintf("%s-g%d", ca.ID, ca.Generation)
}

// resigned is how much more than journals call for HSMs may have signed: digests of a slow or lost member are given to another.
const resigned = 1.0

// check holds what the scenario's clients saw against record, journals and HSM agents.
func (s *site) check(t *testing.T) {
	t.Helper()
	if err := s.history.Flush(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(s.dir, "etc", "fsck.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var cfg struct {
		Journals map[string]string `yaml:"journals"`
	}
	if err := yaml.Unmarshal(raw, &cfg); err != nil {
		t.Fatal(err)
	}
	agents := map[string]string{}
	for _, p := range s.status(t).Processes {
		if p.Role == cluster.RoleHSMD {
			if dir := filepath.Join(p.Dir, "audit"); exists(dir) {
				agents[p.Name] = dir
			} else if dir := filepath.Join(p.Dir, "state", "audit"); exists(dir) {
				agents[p.Name] = dir
			} else {
				t.Fatalf("%s has no audit journal under %s", p.Name, p.Dir)
			}
		}
	}
	ca, _ := s.authority(t)
	report, err := history.Check(t.Context(), history.Config{
		Path: s.history.Path(), Issuers: map[string]*x509.Certificate{s.generation(t): ca},
		Record: history.Record{DB: s.database(t)}, Journals: history.Journals(cfg.Journals), Agents: history.Agents(agents), Resigned: resigned,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range report.Violations {
		t.Errorf("history: %s", v)
	}
	if report.More > 0 {
		t.Errorf("history: %d violations more", report.More)
	}
	if report.Checked["record_intents"] == 0 || report.Checked["journal_records"] == 0 {
		t.Errorf("the checker looked at nothing: %v", report.Checked)
	}
	t.Logf("history: %v, %d violations", report.Checked, len(report.Violations)+report.More)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
