package main

import (
	"context"
	"fmt"
	"time"

	"trivet/load"
)

// issuing measures certificates per second through the balancer, durable on three database nodes, signed in the HSM group, linted: 1, 8 and 32 clients in a closed loop.
func issuing(ctx context.Context, s *site) ([]Row, error) {
	var rows []Row
	for _, c := range []struct {
		clients int
		goal    float64
	}{{1, 0}, {8, 0}, {32, 400}} {
		var p99 time.Duration
		rate, err := median(runs, func() (float64, error) {
			issuer, err := s.issuer(ctx, c.clients)
			if err != nil {
				return 0, err
			}
			op, err := issuer.Prepare(6_000)
			if err != nil {
				return 0, err
			}
			r := load.Run(ctx, load.Config{Clients: c.clients, Duration: seconds}, op)
			if r.Failed > 0 {
				return 0, fmt.Errorf("%d clients: %v", c.clients, r)
			}
			p99 = r.P99
			return r.PerSecond, nil
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
		rows = append(rows, row)
	}
	fmt.Println("* measured earlier on such a machine, not in this run")
	return rows, nil
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
