package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"runtime"
	"time"

	"trivet/load"
)

// together is how many certificates the steps are measured with that a batch shares: what 32 clients come to.
const together = 16

// issueLimit says how near issuing comes to what this machine could do in this very hour: it measures, each by itself, the processor time of the steps
// that the protocol demands, and compares the rate with what would be left if there were nothing but them.
func issueLimit(ctx context.Context, s *site) ([]Row, error) {
	idle, err := s.idle(ctx) // of each role, in cores
	if err != nil {
		return nil, err
	}
	rate, err := s.rate(ctx)
	if err != nil {
		return nil, err
	}
	var sum time.Duration
	for _, part := range []struct {
		what string
		cost func(context.Context) (time.Duration, error)
	}{
		{"two TLS hops, a request and an answer through the balancer", func(ctx context.Context) (time.Duration, error) { return s.costOfRequest(ctx, idle) }},
		{"CSR, policy, certificate and lint", costOfDraft},
		{"a signature of the token, verified", costOfSignature},
		{"three records in the journal, one of them at the second holder", costOfJournals},
		{"rows on three database nodes, read back; two responders that follow and sign", func(ctx context.Context) (time.Duration, error) { return s.costOfRows(ctx, idle) }},
	} {
		cost, err := part.cost(ctx)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", part.what, err)
		}
		fmt.Printf("  cpu %6.2f ms  %s\n", float64(cost)/float64(time.Millisecond), part.what)
		sum += cost
	}
	all := 0.0
	for _, cores := range idle {
		all += cores
	}
	limit := (float64(runtime.NumCPU()) - all) * float64(time.Second) / float64(sum)
	fmt.Printf("  cpu %6.2f ms  in all; %.2f of %d cores are what the cluster takes with nothing to do (health, polls, Galera)\n",
		float64(sum)/float64(time.Millisecond), all, runtime.NumCPU())
	fmt.Printf("  so at most %.0f certificates/s\n", limit)
	return []Row{{Name: "issue_limit", Value: rate, Unit: "cert/s", Reference: "each step that the protocol demands, alone", ReferenceValue: limit, Ratio: rate / limit}}, nil
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

// costOfRequest is a request that the CA node answers from memory, of all that take part in it.
func (s *site) costOfRequest(ctx context.Context, idle map[string]float64) (time.Duration, error) {
	issuer, err := s.issuer(ctx, 32)
	if err != nil {
		return 0, err
	}
	before, err := s.cpu(ctx)
	if err != nil {
		return 0, err
	}
	r := load.Run(ctx, load.Config{Clients: 32, Duration: seconds}, func(ctx context.Context, _ int) error {
		return get(ctx, issuer.Client, issuer.URL+"/v1/profiles", func(body io.Reader) error {
			_, err := io.Copy(io.Discard, body)
			return err
		})
	})
	if r.Failed > 0 {
		return 0, fmt.Errorf("asking for profiles: %v", r)
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
	return time.Duration(r.metric("ns/op")), err
}

func costOfSignature(ctx context.Context) (time.Duration, error) {
	r, err := goBench(ctx, "./hsm/pkcs11", "Sign/^softhsm$/^P-256$", "5000x")
	if err != nil {
		return 0, err
	}
	sign := time.Duration(float64(runtime.NumCPU()) * r.metric("ns/op")) // it signs on every core
	verify, err := costOfVerification()
	return sign + verify, err
}

func costOfVerification() (time.Duration, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	digest := sha256.Sum256([]byte("certificate"))
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return 0, err
	}
	const times = 2000
	began := time.Now()
	for range times {
		if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], signature) {
			return 0, fmt.Errorf("a signature does not verify")
		}
	}
	return time.Since(began) / times, nil
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
