// Command bench measures Trivet beside references in the same run, on a cluster of its own, and prints a table; build/bench.json has the same
// for programs. BENCH=name runs one row. Machines are noisy: figures are medians of several runs, and ratios say more than figures.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// runs is how often a row is measured; its figure is the median.
const runs = 3

// Row is one line of the table. Ratio is Value over ReferenceValue, or the other way round where less is better.
type Row struct {
	Name           string  `json:"name"`
	Value          float64 `json:"value"`
	Unit           string  `json:"unit"`
	Reference      string  `json:"reference"`
	ReferenceValue float64 `json:"reference_value"`
	Ratio          float64 `json:"ratio"`
	Goal           string  `json:"goal"`
	Met            bool    `json:"met"`
}

// bench measures one or more rows against a running cluster.
type bench struct {
	names []string
	run   func(ctx context.Context, s *site) ([]Row, error)
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	benches := []bench{
		{[]string{"issue_1", "issue_8", "issue_32", "issue_bulk"}, issuing},
		{[]string{"issue_limit", "issue_full"}, issueLimit},
		{[]string{"issue_nodes"}, issueNodes},
		{[]string{"row_cost"}, rowCost},
		{[]string{"ocsp_keepalive"}, ocspKeepalive},
		{[]string{"lb_http"}, lbHTTP},
		{[]string{"group_overhead", "group_scaling", "enroll_100"}, hsmGroups},
		{[]string{"reconcile_1000"}, hsmReconcile},
		{[]string{"ca_kill"}, caKill},
		{[]string{"demo_start"}, demoStart},
		{[]string{"issue_large", "issue_starved", "record_bytes"}, issueLarge}, // last: the responders are gone after it
	}
	only := os.Getenv("BENCH")
	if only != "" {
		benches = slices.DeleteFunc(benches, func(b bench) bool { return !slices.Contains(b.names, only) })
		if len(benches) == 0 {
			return fmt.Errorf("there is no row %q", only)
		}
	}
	fmt.Fprintln(os.Stderr, "bench: starting a cluster")
	s, err := up(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.down()) }()

	var rows []Row
	for _, b := range benches {
		fmt.Fprintf(os.Stderr, "bench: measuring %v\n", b.names)
		got, err := b.run(ctx, s)
		if err != nil {
			return fmt.Errorf("measuring %v: %w", b.names, err)
		}
		rows = append(rows, got...)
	}
	print(rows)
	return write(rows)
}

func print(rows []Row) {
	fmt.Printf("\n%-15s %10s %-7s  %-52s %10s %7s  %-10s %s\n", "row", "value", "unit", "reference", "value", "ratio", "goal", "met")
	for _, r := range rows {
		met := "yes"
		if !r.Met {
			met = "NO"
		}
		if r.Goal == "" {
			met = ""
		}
		fmt.Printf("%-15s %10.1f %-7s  %-52s %10.1f %7.2f  %-10s %s\n", r.Name, r.Value, r.Unit, r.Reference, r.ReferenceValue, r.Ratio, r.Goal, met)
	}
}

func write(rows []Row) error {
	out, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll("build", 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join("build", "bench.json"), append(out, '\n'), 0o644)
}

// median of several measurements of f.
func median(n int, f func() (float64, error)) (float64, error) {
	var values []float64
	for range n {
		v, err := f()
		if err != nil {
			return 0, err
		}
		values = append(values, v)
	}
	slices.Sort(values)
	return values[len(values)/2], nil
}

// seconds is how long one measurement takes.
const seconds = 5 * time.Second
