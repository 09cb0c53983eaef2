package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"time"

	"trivet/load"
)

// together is how many certificates the steps are measured with that a batch shares: what 32 clients come to.
const together = 16

// issueLimit says how near issuing comes to what this machine could do in this very hour: it measures, each by itself, the processor time of the steps
// that the protocol demands, and compares the rate with what would be left if there were nothing but them. The rate is taken before and after, since
// a shared machine changes meanwhile. A second row says what there is to gain from keeping the processors busier: the rate of four times as many clients.
func issueLimit(ctx context.Context, s *site) ([]Row, error) {
	idle, err := s.idle(ctx) // of each role, in cores
	if err != nil {
		return nil, err
	}
	rate, many, err := s.rates(ctx)
	if err != nil {
		return nil, err
	}
	var sum time.Duration
	for _, part := range []struct {
		what string
		cost func(context.Context) (time.Duration, error)
	}{
		{"a request and its answer over two TLS hops, its JSON read", func(ctx context.Context) (time.Duration, error) { return s.costOfRequest(ctx, idle) }},
		{"CSR, policy, certificate and lint", costOfDraft},
		{"a signature of the token, through its agent, verified", costOfSignature},
		{"the certificate put together, parsed and compared", costOfCertificate},
		{"three records in the journal, one of them at the second holder", costOfJournals},
		{"rows on three database nodes, read back; two responders that follow and sign", func(ctx context.Context) (time.Duration, error) { return s.costOfRows(ctx, idle) }},
	} {
		cost, err := part.cost(ctx)
		if err == nil && cost <= 0 {
			err = errors.New("nothing was measured")
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", part.what, err)
		}
		fmt.Printf("  cpu %6.2f ms  %s\n", float64(cost)/float64(time.Millisecond), part.what)
		sum += cost
	}
	rateAfter, manyAfter, err := s.rates(ctx)
	if err != nil {
		return nil, err
	}
	rate, many = (rate+rateAfter)/2, (many+manyAfter)/2
	all := 0.0
	for _, cores := range idle {
		all += cores
	}
	limit := (float64(runtime.NumCPU()) - all) * float64(time.Second) / float64(sum)
	fmt.Printf("  cpu %6.2f ms  in all; %.2f of %d cores are what the cluster takes with nothing to do (health, polls, Galera)\n",
		float64(sum)/float64(time.Millisecond), all, runtime.NumCPU())
	fmt.Printf("  so at most %.0f certificates/s\n", limit)
	return []Row{
		{Name: "issue_limit", Value: rate, Unit: "cert/s", Reference: "each step that the protocol demands, alone", ReferenceValue: limit, Ratio: rate / limit},
		{Name: "issue_full", Value: rate, Unit: "cert/s", Reference: "128 clients", ReferenceValue: many, Ratio: rate / many},
	}, nil
}

// rates is what 32 clients get, and what 128 get.
func (s *site) rates(ctx context.Context) (rate, many float64, err error) {
	if rate, err = s.rate(ctx, 32); err != nil {
		return 0, 0, err
	}
	many, err = s.rate(ctx, 128)
	return rate, many, err
}

// idle is how many cores each role keeps busy when nobody asks it for anything.
func (s *site) idle(ctx context.Context) (map[string]float64, error) {
	const window = 10 * time.Second
	before, err := s.cpu(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case <-time.After(window):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	after, err := s.cpu(ctx)
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for _, role := range []string{"lb", "ca", "db", "hsmd", "ocsp"} {
		out[role] = float64(after.since(before, role)) / float64(window)
	}
	return out, nil
}

// costOfRequest is a request for a certificate under a profile that there is not, of all that take part in it: the CA node reads it and refuses it.
func (s *site) costOfRequest(ctx context.Context, idle map[string]float64) (time.Duration, error) {
	issuer, err := s.issuer(ctx, 32)
	if err != nil {
		return 0, err
	}
	issuer.Profile = "none"
	request, err := issuer.Request(0)
	if err != nil {
		return 0, err
	}
	before, err := s.cpu(ctx)
	if err != nil {
		return 0, err
	}
	r := load.Run(ctx, load.Config{Clients: 32, Duration: seconds}, func(ctx context.Context, i int) error {
		request := request
		request.Key = fmt.Sprintf("%s-%d", request.Key, i)
		_, err := issuer.Send(ctx, request)
		var refused *load.StatusError
		if errors.As(err, &refused) && refused.Status == http.StatusBadRequest {
			return nil
		}
		return fmt.Errorf("a request under an unknown profile: %w", cmp.Or(err, errors.New("a certificate")))
	})
	if r.Failed > 0 {
		return 0, fmt.Errorf("asking under an unknown profile: %v", r)
	}
	after, err := s.cpu(ctx)
	if err != nil {
		return 0, err
	}
	took := after.since(before, "client", "lb", "ca") - time.Duration((idle["lb"]+idle["ca"])*float64(seconds))
	return took / time.Duration(r.Requests), nil
}

func costOfDraft(ctx context.Context) (time.Duration, error) {
	r, err := goBench(ctx, "./ca", "Draft$", "2000x")
	return time.Duration(r.metric("cpu-ns/op")), err
}

func costOfSignature(ctx context.Context) (time.Duration, error) {
	r, err := goBench(ctx, "./hsmsync", "Overhead/digests=16/callers=1$", "400x")
	return time.Duration(r.metric("direct-cpu-ns")), err
}

// costOfCertificate leaves out that the certificate's signature is verified, which the group has done.
func costOfCertificate(ctx context.Context) (time.Duration, error) {
	r, err := goBench(ctx, "./ca", "Certify$", "2000x")
	return time.Duration(r.metric("cpu-ns/op") - r.metric("verify-ns/op")), err
}

func costOfJournals(ctx context.Context) (time.Duration, error) {
	r, err := goBench(ctx, "./holder", "Batch$", "500x") // of 16
	return time.Duration(r.metric("cpu-ns/op")) / together, err
}

// costOfRows is what a certificate's rows cost the database nodes and their client, and all that the responders do about it: they are given rows as a CA
// node writes them, and no request.
func (s *site) costOfRows(ctx context.Context, idle map[string]float64) (time.Duration, error) {
	store, _, done, err := s.database(ctx, "trivet")
	if err != nil {
		return 0, err
	}
	defer done()
	var incarnation [16]byte
	_, _ = rand.Read(incarnation[:]) // documented never to fail
	lane, err := store.OpenLane(ctx, "bench", incarnation, 0)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	before, err := s.cpu(ctx)
	if err != nil {
		return 0, err
	}
	rate, err := throughput(ctx, func(ctx context.Context) (int, error) { return batch(ctx, store, lane, "demo-g1", together) })
	if err != nil {
		return 0, err
	}
	written := rate * time.Since(began).Seconds()
	after, err := s.settled(ctx, idle, "ocsp", "hsmd")
	if err != nil {
		return 0, err
	}
	roles := []string{"client", "db", "ocsp", "hsmd"}
	took := float64(after.since(before, roles...))
	for _, role := range roles {
		took -= idle[role] * float64(time.Since(began))
	}
	return time.Duration(took / written), nil
}

// settled waits until roles do no more than they do with nothing to do.
func (s *site) settled(ctx context.Context, idle map[string]float64, roles ...string) (cpuTable, error) {
	before, err := s.cpu(ctx)
	for range 60 {
		if err != nil {
			return nil, err
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		after, err := s.cpu(ctx)
		if err != nil {
			return nil, err
		}
		usual := 0.0
		for _, role := range roles {
			usual += idle[role]
		}
		if float64(after.since(before, roles...))/float64(time.Second) < 1.5*usual+.05 {
			return after, nil
		}
		before = after
	}
	return nil, fmt.Errorf("%v had not done with the rows after a minute", roles)
}
