// Package models_test checks the Promela models: each holds, and each removed rule gives a counterexample.
package models_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

var (
	all  = flag.Bool("all", false, "the slow models too")
	only = flag.String("model", "", "only this model")
)

// run is one exhaustive search.
type run struct {
	model string
	rule  string // removed; empty: none
	flags string
	slow  bool // minutes, or more than 2 GB: only with -all
}

func (r run) expected() string {
	if r.rule == "" {
		return "holds"
	}
	return "violated"
}

// runs are all of them. README.md says what each rule is and where the code keeps it.
var runs = []run{
	{model: "issue", flags: "-DNOCRASH -DASKS=1"},
	{model: "issue", flags: "-DNOSWEEP -DASKS=1", slow: true},
	{model: "issue", flags: "-DNOCRASH", slow: true},
	{model: "issue", flags: "-DNOSWEEP", slow: true},
	{model: "issue", rule: "MEMRELEASE"},
	{model: "issue", rule: "NOREQKEY"},
	{model: "issue", rule: "SIGNFIRST", slow: true},
	{model: "issue", rule: "NOADOPTJOURNAL", slow: true},
	{model: "issue", rule: "ABSEP"},
	{model: "issue", rule: "TELLFIRST", slow: true},
	{model: "issue", rule: "NODONE", slow: true},
	{model: "issue", rule: "NOBURY", flags: "-DNOSWEEP", slow: true},
	{model: "recovery", flags: "-DNORESOLVER"},
	{model: "recovery", slow: true},
	{model: "recovery", flags: "-DCOVER", slow: true},
	{model: "recovery", flags: "-DRESTART", slow: true},
	{model: "recovery", flags: "-DTWICE", slow: true},
	{model: "recovery", rule: "MEMRELEASE"},
	{model: "recovery", rule: "NOJSIG", slow: true},
	{model: "recovery", rule: "NOGATE", flags: "-DNORESOLVER"},
	{model: "recovery", rule: "NOGATE", slow: true},
	{model: "recovery", rule: "NOLOCK", flags: "-DNORESOLVER"},
	{model: "recovery", rule: "NOLOCK", slow: true},
	{model: "recovery", rule: "ROUNDLATER", slow: true},
	{model: "recovery", rule: "NOSIGN", slow: true},
	{model: "recovery", rule: "NOOVERRULE", slow: true},
	{model: "recovery", rule: "ABSEP", slow: true},
	{model: "recovery", rule: "NOCOPY", flags: "-DCOVER", slow: true},
	{model: "recovery", rule: "NOFENCECOPY", flags: "-DCOVER", slow: true},
	{model: "recovery", rule: "NOCLOSE", flags: "-DCOVER", slow: true},
	{model: "recovery", rule: "SIGNEARLY", slow: true},
	{model: "recovery", rule: "CLAIMFIRST", flags: "-DRESTART", slow: true},
	{model: "recovery", rule: "NEWCOMER", flags: "-DRESTART", slow: true}, // how the code stands
	{model: "recovery", rule: "BURYINROUND", flags: "-DRESTART", slow: true},
	{model: "recovery", rule: "OLDFACT", flags: "-DTWICE", slow: true},
	{model: "recovery", rule: "TELLBARE", slow: true},
	{model: "recovery", rule: "ANYNODE", slow: true},
	{model: "lane"},
	{model: "lane", rule: "TWOFLIGHT"},
	{model: "lane", rule: "MAXREAD"},
	{model: "lane", rule: "REUSE", slow: true},
	{model: "lane", rule: "CLOSEMARK", slow: true},
	{model: "lane", rule: "RELAYFACT", slow: true},
	{model: "barrier", flags: "-DMAXT=5"},
	{model: "barrier", slow: true},
	{model: "barrier", flags: "-DJOIN", slow: true},
	{model: "barrier", flags: "-DOUT -DONECA -DL=1 -DMAXT=5", slow: true},
	{model: "barrier", flags: "-DPROMISE", slow: true},
	{model: "barrier", flags: "-DPROMISE -DNEWCA", slow: true},
	{model: "barrier", flags: "-DTWIN -DONECA -DL=1 -DMAXT=4", slow: true},
	{model: "barrier", rule: "CACHEDCLOCK", slow: true},
	{model: "barrier", rule: "LEASEFROMREPLY"},
	{model: "barrier", rule: "CHECKFIRST", slow: true},
	{model: "barrier", rule: "TABLEFIRST", slow: true},
	{model: "barrier", rule: "DUP200"},
	{model: "barrier", rule: "JOINEARLY", flags: "-DJOIN", slow: true},
	{model: "barrier", rule: "OUTSKIP", flags: "-DOUT -DONECA -DL=1 -DMAXT=5", slow: true},
	{model: "barrier", rule: "OUTKEEP", flags: "-DOUT -DONECA -DL=1 -DMAXT=5", slow: true},
	{model: "barrier", rule: "ONEPROMISE", flags: "-DPROMISE"},
	{model: "barrier", rule: "NOKNOW", flags: "-DPROMISE -DNEWCA"},
	{model: "barrier", rule: "NOTWINWAIT", flags: "-DTWIN -DONECA -DL=1 -DMAXT=4", slow: true}, // how the code stands
}

// result is what the search said.
type result struct {
	states int
	errors int
	took   time.Duration
}

func (r result) String() string {
	if r.errors > 0 {
		return "violated"
	}
	return "holds"
}

func TestModelsHoldAndEveryRuleIsNeeded(t *testing.T) {
	for _, tool := range []string{"spin", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is missing; run ops/install.sh test", tool)
			}
			t.Skipf("%s is missing; run ops/install.sh test", tool)
		}
	}
	t.Logf("%-9s %-15s %12s %9s %9s  %s", "model", "rule removed", "states", "result", "expected", "options")
	for _, r := range runs {
		if r.slow && !*all || *only != "" && *only != r.model {
			continue
		}
		t.Run(strings.TrimSuffix(r.model+"-"+r.rule, "-")+strings.ReplaceAll(r.flags, " ", ""), func(t *testing.T) {
			got, err := r.search(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			rule := r.rule
			if rule == "" {
				rule = "none"
			}
			t.Logf("%-9s %-15s %12d %9s %9s  %s (%s)", r.model, rule, got.states, got, r.expected(), r.flags, got.took.Round(100*time.Millisecond))
			if got.String() != r.expected() {
				t.Errorf("%s %s %s: %s, expected: %s", r.model, r.rule, r.flags, got, r.expected())
			}
		})
	}
}

var (
	statesLine = regexp.MustCompile(`(?m)^\s*(\d+) states, stored`)
	errorsLine = regexp.MustCompile(`errors: (\d+)`)
)

// search generates the verifier, builds and runs it in build/model, where a counterexample's trail stays.
func (r run) search(ctx context.Context) (result, error) {
	began := time.Now()
	flags := strings.Fields(r.flags)
	if r.rule != "" {
		flags = append(flags, "-D"+r.rule)
	}
	source, err := filepath.Abs(r.model + ".pml")
	if err != nil {
		return result{}, err
	}
	dir := filepath.Join("..", "..", "build", "model", r.model+strings.Join(flags, ""))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return result{}, err
	}
	command := func(name string, args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil && !errors.As(err, new(*exec.ExitError)) || err != nil && name != "./pan" {
			return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out), nil
	}
	if _, err := command("spin", append(append([]string{"-a"}, flags...), source)...); err != nil {
		return result{}, err
	}
	memory, table, optimize := "2000", "-w20", "-O0" // compiling costs more than searching
	if r.slow {
		memory, table, optimize = "8000", "-w24", "-O2"
	}
	if _, err := command("gcc", "-w", optimize, "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM="+memory, "-o", "pan", "pan.c"); err != nil {
		return result{}, err
	}
	// -E: an end state that is no end is no error here; the rules are assertions.
	out, err := command("./pan", "-E", "-m1000000", table)
	if err != nil {
		return result{}, err
	}
	states, fails := statesLine.FindStringSubmatch(out), errorsLine.FindStringSubmatch(out)
	if states == nil || fails == nil || strings.Contains(out, "Search not completed") && fails[1] == "0" || strings.Contains(out, "max search depth too small") {
		return result{}, fmt.Errorf("the search was not completed:\n%s", out)
	}
	got := result{took: time.Since(began)}
	if got.states, err = strconv.Atoi(states[1]); err != nil {
		return result{}, err
	}
	if got.errors, err = strconv.Atoi(fails[1]); err != nil {
		return result{}, err
	}
	return got, nil
}
