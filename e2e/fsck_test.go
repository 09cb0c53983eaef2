package e2e_test

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"trivet/cluster"
	record "trivet/db"
	"trivet/fsck"
	"trivet/journal"
	"trivet/load"
	"trivet/ops/galera"
)

// fsck finds what it is there to find: each kind of damage is planted in a copy of the record, or of a journal, and named under its invariant.
func TestFsckFindsPlantedDamage(t *testing.T) {
	s := up(t)
	issuer := s.issuer(t, &load.Recorder{})
	var ids []string
	for i := range 3 {
		r, err := issuer.Request(i)
		if err != nil {
			t.Fatal(err)
		}
		a, err := issuer.Send(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, a.ID)
	}
	s.run(t, "cert", "revoke", ids[0], "--reason", "superseded")
	s.fsck(t)

	_, serial, _ := strings.Cut(ids[1], ":")
	_, revoked, _ := strings.Cut(ids[0], ":")
	for _, c := range []struct {
		name      string
		invariant string
		sql       string // on the copy of the record; %s is the name of the copy
	}{
		{"a released certificate is lost", "I1", "DELETE FROM %s.outcome WHERE serial = x'" + serial + "'"},
		{"a certificate is exchanged", "I2", "UPDATE %s.outcome SET der = CONCAT(LEFT(der, LENGTH(der) - 1), 'x') WHERE serial = x'" + serial + "'"},
		{"an intent is changed", "I8", "UPDATE %s.intent_tbs SET tbs = CONCAT(tbs, 'x') WHERE serial = x'" + serial + "'"},
		{"an intent is changed that keeps its TBSCertificate nowhere else", "I8", "UPDATE %s.intent SET reference = 'x' WHERE serial = x'" + serial + "'"},
		{"an intent is open, and nobody can finish it", "I1", "INSERT INTO %s.intent (issuer, serial, req, ver, body, tbs, profile, profile_version, profile_hash, requester, reference, site_epoch, node, mac, created) SELECT issuer, x'0102030406', x'" + strings.Repeat("cd", 32) + "', ver, body, '', profile, profile_version, profile_hash, requester, reference, site_epoch, node, mac, NOW(6) FROM %s.intent WHERE serial = x'" + serial + "'"},
		{"a revocation is lost", "I4", "DELETE FROM %s.revocation WHERE serial = x'" + revoked + "'"},
		{"the feed has a hole", "I4", "DELETE FROM %s.feed WHERE serial = x'" + serial + "' OR serial = x'" + revoked + "'"},
		{"the feed is rewritten", "I4", "UPDATE %s.feed SET payload = '{}' WHERE serial = x'" + serial + "'"},
		{"a CRL number falls", "I5", "UPDATE %s.crl SET number = 1 WHERE n = (SELECT n FROM (SELECT MAX(n) n FROM %s.crl WHERE issuer = 'demo-g1') x) AND issuer = 'demo-g1'"},
		{"a responder says good about a revoked certificate", "I4", "INSERT INTO %s.revocation (issuer, serial, n, event, reason, date, actor, site_epoch, lane, seq, created) SELECT issuer, serial, 1, 'revoke', 1, NOW(), '', 1, lane, seq, NOW() FROM %s.outcome WHERE serial = x'" + serial + "'"},
		{"an intent stays open", "I1", "INSERT INTO %s.intent (issuer, serial, req, ver, body, tbs, profile, profile_version, profile_hash, requester, reference, site_epoch, node, mac, created) SELECT issuer, x'0102030405', x'" + strings.Repeat("ab", 32) + "', ver, body, tbs, profile, profile_version, profile_hash, requester, reference, site_epoch, node, mac, '2020-01-01' FROM %s.intent WHERE serial = x'" + serial + "'"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			name, db := s.copyOfRecord(t)
			if _, err := db.ExecContext(t.Context(), strings.ReplaceAll(c.sql, "%s", name)); err != nil {
				t.Fatalf("planting the damage: %v", err)
			}
			s.finds(t, c.invariant, s.fsckConfig(t, func(cfg map[string]any) { cfg["database"].(map[string]any)["name"] = name }))
		})
	}
	t.Run("a signature has no intent", func(t *testing.T) {
		dir := t.TempDir()
		j, err := journal.Open(journal.Config{Dir: dir, Node: "forger"})
		if err != nil {
			t.Fatal(err)
		}
		r, err := journal.New(journal.Sign{Issuer: "demo-g1", Serial: serial, Digest: make([]byte, 32)})
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Append(r); err != nil {
			t.Fatal(err)
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		s.finds(t, "I1", s.fsckConfig(t, func(cfg map[string]any) { cfg["journals"].(map[string]any)["forger"] = dir }))
	})
}

// finds runs fsck and wants a violation of the invariant and exit code 1, however few certificates responders are asked about.
func (s *site) finds(t *testing.T, invariant, config string) {
	t.Helper()
	out, stderr, err := s.try("fsck", "--output", "json", "--config", config, "--ask", "1", "--settle", "1s", "--crl-delay", "1s")
	var r fsck.Report
	if jerr := json.Unmarshal(out, &r); jerr != nil {
		t.Fatalf("fsck: %v\n%s%s", err, stderr, out)
	}
	if err == nil || r.OK {
		t.Errorf("fsck calls it well")
	}
	for _, v := range r.Violations {
		if v.Invariant == invariant {
			return
		}
	}
	t.Errorf("no violation of %s among %v", invariant, r.Violations)
}

// fsckConfig writes a changed copy of the demo's fsck configuration.
func (s *site) fsckConfig(t *testing.T, change func(map[string]any)) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(s.dir, "etc", "fsck.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var cfg map[string]any
	if err := yaml.Unmarshal(raw, &cfg); err != nil {
		t.Fatal(err)
	}
	change(cfg)
	if raw, err = yaml.Marshal(cfg); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "fsck.yaml")
	write(t, path, raw)
	return path
}

// copyOfRecord makes a database with the same rows, which the fsck account may read; it goes with the test.
func (s *site) copyOfRecord(t *testing.T) (string, *sql.DB) {
	t.Helper()
	var node galera.Node
	for _, p := range s.status(t).Processes {
		if p.Role == cluster.RoleDB && node.Name == "" {
			node = galera.Node{Name: p.Name, Dir: p.Dir}
		}
	}
	db, err := galera.Admin(node)
	if err != nil {
		t.Fatal(err)
	}
	var suffix [4]byte
	_, _ = rand.Read(suffix[:])
	name := fmt.Sprintf("copy%x", suffix)
	t.Cleanup(func() {
		for _, q := range []string{"DROP DATABASE IF EXISTS " + name, "DROP USER IF EXISTS " + name, "REVOKE SELECT ON " + name + ".* FROM fsck@'%'"} {
			if _, err := db.ExecContext(context.Background(), q); err != nil {
				t.Errorf("dropping the copy: %s: %v", q, err)
			}
		}
		_ = db.Close()
	})
	exec := func(q string) {
		t.Helper()
		if _, err := db.ExecContext(t.Context(), q); err != nil {
			t.Fatalf("copying the record: %s: %v", q, err)
		}
	}
	password := filepath.Join(t.TempDir(), "password")
	write(t, password, []byte(name))
	if err := galera.CreateAccount(t.Context(), node, name, name, name); err != nil {
		t.Fatal(err)
	}
	if err := record.Migrate(t.Context(), record.Config{Nodes: s.status(t).Database.Nodes, Name: name, User: name, PasswordFile: password}); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"writer", "lane", "intent", "outcome", "revocation", "feed", "generation", "generation_log", "responder", "crl", "crl_result", "va_member", "site_epoch", "intent_tbs"} {
		exec(fmt.Sprintf("INSERT INTO %s.%s SELECT * FROM trivet.%s", name, table, table))
	}
	exec("GRANT SELECT ON " + name + ".* TO fsck@'%'")
	return name, db
}
