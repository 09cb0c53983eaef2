// Package alerts holds the rules for Prometheus to the metrics and runbooks that there are.
package alerts

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

type file struct {
	Groups []struct {
		Name  string `yaml:"name"`
		Rules []struct {
			Alert       string            `yaml:"alert"`
			Expr        string            `yaml:"expr"`
			For         string            `yaml:"for"`
			Labels      map[string]string `yaml:"labels"`
			Annotations map[string]string `yaml:"annotations"`
		} `yaml:"rules"`
	} `yaml:"groups"`
}

const root = "../.."

var metric = regexp.MustCompile(`trivet_[a-z0-9_]+`)

func TestEveryAlertHasItsMetricsAndItsRunbook(t *testing.T) {
	code := source(t)
	files, err := filepath.Glob("*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no rules", err)
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var f file
		if err := yaml.UnmarshalWithOptions(text, &f, yaml.Strict()); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, g := range f.Groups {
			for _, r := range g.Rules {
				names := metric.FindAllString(r.Expr, -1)
				if len(names) == 0 {
					t.Errorf("%s: %s looks at no metric of ours", name, r.Alert)
				}
				for _, m := range names {
					if !exported(code, m) {
						t.Errorf("%s: %s: no code exports %s", name, r.Alert, m)
					}
				}
				if _, err := os.Stat(filepath.Join(root, r.Annotations["runbook"])); err != nil || r.Annotations["runbook"] == "" {
					t.Errorf("%s: %s: runbook %q: %v", name, r.Alert, r.Annotations["runbook"], err)
				}
				if s := r.Labels["severity"]; s != "page" && s != "ticket" || r.Annotations["summary"] == "" {
					t.Errorf("%s: %s: severity %q, summary %q", name, r.Alert, s, r.Annotations["summary"])
				}
			}
		}
	}
}

// exported tells whether the code names a metric, whole or as a prefix ("trivet_hsm_") and a name.
func exported(code, m string) bool {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		m = strings.TrimSuffix(m, suffix)
	}
	if strings.Contains(code, `"`+m+`"`) {
		return true
	}
	for i, c := range m {
		if c == '_' && strings.Contains(code, `"`+m[:i+1]+`"`) && strings.Contains(code, `"`+m[i+1:]+`"`) {
			return true
		}
	}
	return false
}

// source is all code that is not a test.
func source(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		all.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}
