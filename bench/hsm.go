package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// hsmGroups measures what a group of HSMs costs beside one HSM, and what it gains. The HSMs are agents on SoftHSM that the benchmarks of package hsmsync
// start for themselves; those whose speed matters are held to the same number of signatures a second.
func hsmGroups(ctx context.Context, _ *site) ([]Row, error) {
	overhead, err := goBench(ctx, "./hsmsync", "Overhead/digests=8/callers=8$", "2000x")
	if err != nil {
		return nil, err
	}
	direct, group := overhead.metric("direct/s"), overhead.metric("group/s")
	rows := []Row{{
		Name: "group_overhead", Value: group, Unit: "sign/s", Reference: "one member directly, each signature verified", ReferenceValue: direct,
		Ratio: group / direct, Goal: ">=0.85x", Met: group >= 0.85*direct,
	}}
	one, err := goBench(ctx, "./hsmsync", "Scaling/members=active_drained_drained/digests=64/callers=4$", "60x")
	if err != nil {
		return nil, err
	}
	three, err := goBench(ctx, "./hsmsync", "Scaling/members=active_active_active/digests=64/callers=4$", "180x")
	if err != nil {
		return nil, err
	}
	alone, all := one.metric("signatures/s"), three.metric("signatures/s")
	enroll, err := goBench(ctx, "./hsmsync", "Enroll/^100_keys$", "1x")
	if err != nil {
		return nil, err
	}
	raw, took := enroll.metric("raw-s"), enroll.metric("enroll-s")
	return append(rows, Row{
		Name: "group_scaling", Value: all, Unit: "sign/s", Reference: "one member of 200 a second, instead of three", ReferenceValue: alone,
		Ratio: all / alone, Goal: ">=2.9x", Met: all >= 2.9*alone,
	}, Row{
		Name: "enroll_100", Value: took, Unit: "s", Reference: "export and import of the same 100 keys, one by one", ReferenceValue: raw,
		Ratio: took / raw, Goal: "<=2x", Met: took <= 2*raw,
	}), nil
}

// hsmReconcile measures what keeping 1,000 keys alike on three members costs while nothing changes.
func hsmReconcile(ctx context.Context, _ *site) ([]Row, error) {
	r, err := goBenchCount(ctx, "./hsmsync", "ReconcileMany$", "1x", 1)
	if err != nil {
		return nil, err
	}
	share := r.metric("%core")
	return []Row{{
		Name: "reconcile_1000", Value: share, Unit: "% of a core", Reference: "1 % of a core, coordinator and three members together", ReferenceValue: 1,
		Ratio: share, Goal: "<=1x", Met: share <= 1,
	}}, nil
}

// results are the lines that `go test -bench` printed.
type results [][]string

// goBench runs a benchmark of a package several times.
func goBench(ctx context.Context, pkg, name, times string) (results, error) {
	return goBenchCount(ctx, pkg, name, times, runs)
}

// goBenchCount runs one that takes long only so often.
func goBenchCount(ctx context.Context, pkg, name, times string, count int) (results, error) {
	c := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", name, "-benchtime", times, "-count", strconv.Itoa(count), "-timeout", "30m", pkg)
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("running benchmark %s: %w\n%s", name, err, out)
	}
	var r results
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasPrefix(f[0], "Benchmark") {
			r = append(r, f[2:])
		}
	}
	if len(r) == 0 {
		return nil, fmt.Errorf("benchmark %s measured nothing:\n%s", name, out)
	}
	return r, nil
}

// metric is the median of what was reported in that unit.
func (r results) metric(unit string) float64 {
	var values []float64
	for _, line := range r {
		for i := 1; i < len(line); i += 2 {
			if line[i] == unit {
				if v, err := strconv.ParseFloat(line[i-1], 64); err == nil {
					values = append(values, v)
				}
			}
		}
	}
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	return values[len(values)/2]
}
