// Package lint_test holds the import rules of the house against the code.
package lint_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

type rules struct {
	Module string `yaml:"module"`
	Rules  []struct {
		Packages []string `yaml:"packages"`
		Forbid   []string `yaml:"forbid"`
		Reason   string   `yaml:"reason"`
	} `yaml:"rules"`
	Only []struct {
		Package string   `yaml:"package"`
		By      []string `yaml:"by"`
		Tests   []string `yaml:"tests"` // packages whose tests may, too
		Reason  string   `yaml:"reason"`
	} `yaml:"only"`
}

type pkg struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

// TestImportsPointDown fails with the rule's own reason for every import that breaks one.
func TestImportsPointDown(t *testing.T) {
	raw, err := os.ReadFile("imports.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var r rules
	if err := yaml.UnmarshalWithOptions(raw, &r, yaml.Strict()); err != nil {
		t.Fatalf("reading imports.yaml: %v", err)
	}
	packages := list(t)
	if len(packages) < 10 {
		t.Fatalf("go list found only %d packages", len(packages))
	}
	for _, rule := range r.Rules {
		bound := 0
		for _, p := range packages {
			if !matchAny(r.Module, rule.Packages, p.ImportPath) {
				continue
			}
			bound++
			for _, imported := range p.Imports {
				if imported != p.ImportPath && matchAny(r.Module, rule.Forbid, imported) && !matchAny(r.Module, rule.Packages, imported) {
					t.Errorf("%s imports %s: %s", p.ImportPath, imported, rule.Reason)
				}
			}
		}
		if bound == 0 {
			t.Errorf("rule binds no package: %v", rule.Packages)
		}
	}
	for _, rule := range r.Only {
		for _, p := range packages {
			imports := p.Imports
			if !matchAny(r.Module, rule.Tests, p.ImportPath) {
				imports = slices.Concat(imports, p.TestImports, p.XTestImports)
			}
			if slices.Contains(imports, full(r.Module, rule.Package)) && !matchAny(r.Module, rule.By, p.ImportPath) {
				t.Errorf("%s imports %s: %s", p.ImportPath, rule.Package, rule.Reason)
			}
		}
	}
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var packages []pkg
	for dec := json.NewDecoder(out); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("go list: %v", err)
	}
	return packages
}

func matchAny(module string, patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(module, p, path) })
}

// match reports whether path is the package that pattern names, or lies below it where pattern ends with /... .
func match(module, pattern, path string) bool {
	if pattern == "..." {
		return strings.HasPrefix(path, module+"/")
	}
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		root := full(module, below)
		return path == root || strings.HasPrefix(path, root+"/")
	}
	return path == full(module, pattern)
}

// full returns the import path of a package of ours; a path with a dot in its first element is somebody else's already.
func full(module, path string) string {
	if first, _, _ := strings.Cut(path, "/"); strings.Contains(first, ".") {
		return path
	}
	return module + "/" + path
}
