package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"trivet/cluster"
	"trivet/health"
	"trivet/load"
)

// issuing measures certificates per second through the balancer, durable on three database nodes, signed in the HSM group, linted: 1, 8 and 32 clients in a closed loop.
func issuing(ctx context.Context, s *site) ([]Row, error) {
	var rows []Row
	var stages stageTable
	var cpu cpuTable
	for _, c := range []struct {
		clients int
		goal    float64
	}{{1, 0}, {8, 0}, {32, 400}} {
		var p99 time.Duration
		var certificates int
		rate, err := median(runs, func() (float64, error) {
			var err error
			if stages, err = s.stages(ctx); err != nil {
				return 0, err
			}
			r, before, err := s.issue(ctx, c.clients)
			p99, certificates, cpu = r.P99, r.Requests, before
			return r.PerSecond, err
		})
		if err != nil {
			return nil, err
		}
		row := Row{
			Name: fmt.Sprintf("issue_%d", c.clients), Value: rate, Unit: "cert/s",
			Reference: "step-ca, software key, same Galera, 32 clients *", ReferenceValue: 242, Ratio: rate / 242,
		}
		if c.goal > 0 {
			row.Goal, row.Met = fmt.Sprintf(">=%.0f/s", c.goal), rate >= c.goal
		}
		fmt.Printf("issue_%d: p99 of the last run %v\n", c.clients, p99.Round(100*time.Microsecond))
		after, err := s.stages(ctx)
		if err != nil {
			return nil, err
		}
		after.printSince(stages)
		spent, err := s.cpu(ctx)
		if err != nil {
			return nil, err
		}
		spent.printSince(cpu, certificates)
		rows = append(rows, row)
	}
	bulk, err := s.bulk(ctx)
	if err != nil {
		return nil, err
	}
	single := rows[len(rows)-1].Value
	rows = append(rows, Row{Name: "issue_bulk", Value: bulk, Unit: "cert/s", Reference: "one by one, 32 clients", ReferenceValue: single, Ratio: bulk / single})
	fmt.Println("* measured earlier on such a machine, not in this run")
	return rows, nil
}

// issueNodes measures two CA nodes that issue beside one that does while the other keeps copies for it, and does nothing else: on a machine that they share, the
// second must at least not cost. The two take turns, since the machine may be slower a minute later.
func issueNodes(ctx context.Context, s *site) ([]Row, error) {
	const turns = 6
	var two, one, ratios []float64
	issue := func(rates *[]float64) error {
		r, _, err := s.issue(ctx, 32)
		*rates = append(*rates, r.PerSecond)
		return err
	}
	both := func() error { return issue(&two) }
	alone := func() error {
		putBack, err := s.unbalance(ctx, "ca2")
		if err != nil {
			return err
		}
		return errors.Join(issue(&one), putBack())
	}
	for turn := range turns {
		order := []func() error{both, alone}
		if turn%2 == 1 { // neither is always the later one
			slices.Reverse(order)
		}
		for _, measure := range order {
			if err := measure(); err != nil {
				return nil, err
			}
		}
		ratios = append(ratios, two[turn]/one[turn])
	}
	for _, values := range [][]float64{two, one, ratios} {
		slices.Sort(values)
	}
	ratio := (ratios[turns/2-1] + ratios[turns/2]) / 2
	return []Row{{
		Name: "issue_nodes", Value: two[turns/2], Unit: "cert/s", Reference: "one CA node issues, the other keeps its copies", ReferenceValue: one[turns/2],
		Ratio: ratio, Goal: ">=1x", Met: ratio >= 1,
	}}, nil
}

// caKill measures the worst request under an open-loop load while a CA node is killed.
func caKill(ctx context.Context, s *site) ([]Row, error) {
	issuer, err := s.issuer(ctx, 64)
	if err != nil {
		return nil, err
	}
	killed := make(chan error, 1)
	timer := time.AfterFunc(2*time.Second, func() { killed <- s.kill("ca1") })
	defer timer.Stop()
	r := load.Run(ctx, load.Config{Rate: 50, Duration: 6 * time.Second, Timeout: 15 * time.Second}, issuer.Op)
	if err := <-killed; err != nil {
		return nil, err
	}
	if err := s.well(ctx); err != nil {
		return nil, err
	}
	worst := float64(r.Worst.Milliseconds())
	return []Row{{
		Name: "ca_kill", Value: worst, Unit: "ms", Reference: fmt.Sprintf("tuned HAProxy, worst * (ours: %d of %d failed)", r.Failed, r.Requests),
		ReferenceValue: 264, Ratio: 264 / max(worst, 1), Goal: "0 failed", Met: r.Failed == 0,
	}}, nil
}

// demoStart is the time from nothing to a cluster that has issued its first certificate; reference is the time the three database nodes alone are known to take.
func demoStart(_ context.Context, s *site) ([]Row, error) {
	took := s.started.Seconds()
	return []Row{{Name: "demo_start", Value: took, Unit: "s", Reference: "three Galera nodes alone, one after another *", ReferenceValue: 20, Ratio: 20 / took, Goal: "<=60 s", Met: took <= 60}}, nil
}

// issue has clients ask for one certificate after another for a while. The requests are made beforehand, and each must succeed. It returns the
// processor times at the start, too.
func (s *site) issue(ctx context.Context, clients int) (load.Result, cpuTable, error) {
	issuer, err := s.issuer(ctx, clients)
	if err != nil {
		return load.Result{}, nil, err
	}
	op, err := issuer.Prepare(6_000)
	if err != nil {
		return load.Result{}, nil, err
	}
	before, err := s.cpu(ctx)
	if err != nil {
		return load.Result{}, nil, err
	}
	r := load.Run(ctx, load.Config{Clients: clients, Duration: seconds}, op)
	if r.Failed > 0 {
		err = fmt.Errorf("%d clients: %v", clients, r)
	}
	return r, before, err
}

// rate is what so many clients get, per second.
func (s *site) rate(ctx context.Context, clients int) (float64, error) {
	return median(runs, func() (float64, error) {
		r, _, err := s.issue(ctx, clients)
		return r.PerSecond, err
	})
}

// bulk measures certificates per second asked for 32 at a time by two clients.
func (s *site) bulk(ctx context.Context) (float64, error) {
	const size = 32
	return median(runs, func() (float64, error) {
		issuer, err := s.issuer(ctx, 2)
		if err != nil {
			return 0, err
		}
		op, err := issuer.PrepareBulk(200, size)
		if err != nil {
			return 0, err
		}
		r := load.Run(ctx, load.Config{Clients: 2, Duration: seconds}, op)
		if r.Failed > 0 {
			return 0, fmt.Errorf("bulk: %v", r)
		}
		return r.PerSecond * size, nil
	})
}

// stageTable is the time in each stage of issuing, of all CA nodes together.
type stageTable map[string]health.Stage

func (s *site) stages(ctx context.Context) (stageTable, error) {
	st, err := s.status(ctx)
	if err != nil {
		return nil, err
	}
	cfg, err := tlsOf(st.Credentials.Trust, st.Credentials.SRE.Cert, st.Credentials.SRE.Key)
	if err != nil {
		return nil, err
	}
	client := load.NewClient(cfg, 1)
	defer client.CloseIdleConnections()
	all := make(stageTable)
	for _, p := range st.Processes {
		if p.Role != cluster.RoleCA {
			continue
		}
		var stages map[string]health.Stage
		if err := get(ctx, client, "https://"+p.Addresses["admin"]+"/metrics", func(body io.Reader) (err error) {
			stages, err = health.ReadStages(body, health.CAStages)
			return err
		}); err != nil {
			return nil, fmt.Errorf("metrics of %s: %w", p.Name, err)
		}
		for name, stage := range stages {
			all[name] = stage.Add(all[name])
		}
	}
	return all, nil
}

// printSince prints what was observed since an earlier table.
func (t stageTable) printSince(earlier stageTable) {
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	for _, name := range health.CAStageOrder {
		s := t[name].Since(earlier[name])
		fmt.Printf("  %-8s %7d times   mean %7.2f ms   p50 %7.2f ms   p99 %7.2f ms\n", name, s.Count, ms(s.Mean()), ms(s.Quantile(.5)), ms(s.Quantile(.99)))
	}
}
