package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"trivet/ops/galera"
)

// What an operator of three hosts does: inspections as files, a plan or a refusal.
func TestGaleraChooseWorksOnFiles(t *testing.T) {
	dir := t.TempDir()
	peers := []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}
	var files []string
	for i, name := range []string{"db1", "db2", "db3"} {
		const history = "11111111-1111-1111-1111-111111111111"
		b, err := json.Marshal(galera.Inspection{Format: 1, Node: name, Address: peers[i], Cluster: "c", Peers: peers, State: &galera.State{UUID: history, Seqno: -1},
			Position: &galera.Position{UUID: history, Seqno: int64(10 + i)}})
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, name+".json")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	bad := filepath.Join(dir, "bad.json")
	if err := os.WriteFile(bad, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		says string // on either output
	}{
		{append([]string{"choose"}, files...), 0, "first  db3  10.0.0.3  founds the cluster"},
		{append([]string{"choose", "--output", "json"}, files...), 0, `"bootstrap": "db3"`},
		{[]string{"choose", files[0], files[1]}, 1, "--without 10.0.0.3 --i-accept-loss"},
		{[]string{"choose", files[0], files[1], "--without", "10.0.0.3"}, 1, "add --i-accept-loss"},
		{[]string{"choose", files[0], files[1], "--without", "10.0.0.3", "--i-accept-loss"}, 0, "GIVEN UP: whatever only 10.0.0.3 held"},
		{[]string{"choose"}, 2, "name the inspections"},
		{[]string{"choose", bad}, 1, "bad.json"},
		{[]string{"inspect"}, 2, "--config FILE is needed"},
		{[]string{"run", "--config", filepath.Join(dir, "none.cnf")}, 1, "none.cnf"},
		{[]string{"status", "--dir", dir}, 1, "no cluster"},
	} {
		var out, errs strings.Builder
		code := run(t.Context(), append([]string{"galera"}, c.args...), strings.NewReader(""), &out, &errs)
		if text := out.String() + errs.String(); code != c.code || !strings.Contains(text, c.says) {
			t.Errorf("%v: exit code %d, want %d and %q:\n%s", c.args, code, c.code, c.says, text)
		}
	}
}
