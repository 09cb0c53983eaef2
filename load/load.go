// Package load makes a steady load and says how it was met: requests, failures, and latencies that leave out nothing.
// It is for end-to-end tests and benchmarks; issue.go and ocsp.go are the operations of the two kinds of client, which
// verify every answer.
package load

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxErrors distinct error texts are kept; further ones are counted together.
const maxErrors = 16

// OtherErrors is the key in Result.Errors that counts the failures whose texts came after the first 16 distinct ones.
const OtherErrors = "(other errors)"

// Op is one request, the i-th from 0. It must end with its context and be safe for concurrent use. An error is a
// failed request.
type Op func(ctx context.Context, i int) error

// Config says how to load.
type Config struct {
	// Rate is the number of requests started per second whatever becomes of those before (open loop). Latency counts
	// from when a request was due to start, so that a stall shows in every request it held up.
	Rate float64
	// Clients, with Rate zero, is the number of clients that each start a request when the one before has ended
	// (closed loop).
	Clients int
	// Duration is how long requests are started; Run then waits for those under way. The end of Run's context ends the
	// starting early.
	Duration time.Duration
	// Timeout bounds one request from its actual start. Zero means 10 s.
	Timeout time.Duration
	// MaxInFlight bounds the requests under way in the open loop; those due beyond it wait, and their latency runs.
	// Zero means 512.
	MaxInFlight int
	// Seed other than zero draws the open loop's starts at random (Poisson); zero spaces them evenly.
	Seed uint64
}

// Result is how the load was met.
type Result struct {
	Requests int
	Failed   int
	// Errors counts failures by text: the first 16 distinct ones, the rest under OtherErrors.
	Errors map[string]int
	// Latencies of all requests, failed ones included. WorstAt is when, after the beginning, the worst was due.
	P50, P90, P99, Worst, WorstAt time.Duration
	// PerSecond counts the requests that did not fail, over the time from the beginning to the last answer.
	PerSecond float64
	Elapsed   time.Duration
}

// String is the result in one line.
func (r Result) String() string {
	s := fmt.Sprintf("%d requests, %d failed, %.0f/s, p50 %v p90 %v p99 %v worst %v (at %v)", r.Requests, r.Failed, r.PerSecond,
		r.P50.Round(10*time.Microsecond), r.P90.Round(10*time.Microsecond), r.P99.Round(10*time.Microsecond),
		r.Worst.Round(10*time.Microsecond), r.WorstAt.Round(time.Millisecond))
	texts := make([]string, 0, len(r.Errors))
	for e, n := range r.Errors {
		texts = append(texts, fmt.Sprintf("\n  %d × %s", n, e))
	}
	slices.Sort(texts)
	return s + strings.Join(texts, "")
}

// Run loads until cfg.Duration has passed or ctx ends, and returns when every request has ended. Requests under way
// when ctx ends are given their time: they are not failures of what is tested.
func Run(ctx context.Context, cfg Config, op Op) Result {
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.MaxInFlight <= 0 {
		cfg.MaxInFlight = 512
	}
	t := &tally{began: time.Now(), errors: map[string]int{}}
	one := func(i int, due time.Time) {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.Timeout)
		defer cancel()
		err := guarded(rctx, op, i)
		t.add(due, time.Now(), err)
	}
	if cfg.Rate > 0 {
		open(ctx, cfg, one)
	} else {
		closed(ctx, cfg, one)
	}
	return t.result()
}

// open starts requests when they are due. A request is started by whichever worker is free; one more worker is made
// when none is and the bound allows.
func open(ctx context.Context, cfg Config, one func(i int, due time.Time)) {
	random := rand.New(rand.NewPCG(cfg.Seed, cfg.Seed))
	gap := float64(time.Second) / cfg.Rate
	type job struct {
		i   int
		due time.Time
	}
	jobs := make(chan job)
	var workers sync.WaitGroup
	began, at := time.Now(), 0.0
	end := began.Add(cfg.Duration)
	running := 0
	for i := 0; ; i++ {
		due := began.Add(time.Duration(at))
		if cfg.Seed == 0 {
			at = float64(i+1) * gap
		} else {
			at += random.ExpFloat64() * gap
		}
		if !due.Before(end) {
			break
		}
		if wait := time.Until(due); wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
			}
		}
		// Requests due before the end are made even when they could not start in time: leaving them out would
		// flatter whatever held them up.
		if ctx.Err() != nil {
			break
		}
		j := job{i, due}
		select {
		case jobs <- j:
			continue
		default:
		}
		if running < cfg.MaxInFlight {
			running++
			workers.Go(func() {
				one(j.i, j.due)
				for j := range jobs {
					one(j.i, j.due)
				}
			})
			continue
		}
		jobs <- j
	}
	close(jobs)
	workers.Wait()
}

// closed has every client make one request after the other.
func closed(ctx context.Context, cfg Config, one func(i int, due time.Time)) {
	ctx, cancel := context.WithTimeout(ctx, cfg.Duration)
	defer cancel()
	var mu sync.Mutex
	next := 0
	var workers sync.WaitGroup
	for range max(cfg.Clients, 1) {
		workers.Go(func() {
			for ctx.Err() == nil {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				one(i, time.Now())
			}
		})
	}
	workers.Wait()
}

// guarded makes a panic in an Op a failed request: the load and what it measured go on.
func guarded(ctx context.Context, op Op, i int) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return op(ctx, i)
}

// tally gathers what became of requests.
type tally struct {
	began time.Time

	mu        sync.Mutex // guards all below
	latencies []time.Duration
	failed    int
	errors    map[string]int
	worst     time.Duration
	worstAt   time.Duration
	last      time.Time
}

func (t *tally) add(due, ended time.Time, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := ended.Sub(due)
	t.latencies = append(t.latencies, d)
	if d >= t.worst {
		t.worst, t.worstAt = d, due.Sub(t.began)
	}
	if ended.After(t.last) {
		t.last = ended
	}
	if err == nil {
		return
	}
	t.failed++
	text := err.Error()
	if _, known := t.errors[text]; !known && len(t.errors) >= maxErrors {
		text = OtherErrors
	}
	t.errors[text]++
}

func (t *tally) result() Result {
	t.mu.Lock()
	defer t.mu.Unlock()
	slices.Sort(t.latencies)
	r := Result{
		Requests: len(t.latencies), Failed: t.failed, Errors: t.errors,
		P50: quantile(t.latencies, 50), P90: quantile(t.latencies, 90), P99: quantile(t.latencies, 99),
		Worst: t.worst, WorstAt: t.worstAt,
	}
	if r.Requests > 0 {
		r.Elapsed = t.last.Sub(t.began)
		r.PerSecond = float64(r.Requests-r.Failed) / r.Elapsed.Seconds()
	}
	return r
}

// quantile is the least value that at least percent of all do not exceed.
func quantile(sorted []time.Duration, percent int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[(len(sorted)*percent+99)/100-1]
}
