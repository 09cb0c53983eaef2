package load_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/load"
)

func TestOpenLoopStartsAsManyRequestsAsTheRateSays(t *testing.T) {
	var n atomic.Int64
	r := load.Run(t.Context(), load.Config{Rate: 1000, Duration: 200 * time.Millisecond}, func(context.Context, int) error {
		n.Add(1)
		return nil
	})
	if r.Requests != 200 || n.Load() != 200 || r.Failed != 0 {
		t.Fatalf("1000/s for 200 ms: %v, %d calls; want 200", r, n.Load())
	}
}

func TestOpenLoopCountsLatencyFromWhenTheRequestWasDue(t *testing.T) {
	// One slot, and the first request holds it until 50 more were due: all those were held up, and must show it.
	const stall = 100 * time.Millisecond
	r := load.Run(t.Context(), load.Config{Rate: 500, Duration: 200 * time.Millisecond, MaxInFlight: 1}, func(_ context.Context, i int) error {
		if i == 0 {
			time.Sleep(stall)
		}
		return nil
	})
	if r.Requests != 100 {
		t.Fatalf("%v; want 100 requests although one stalled", r)
	}
	// Latencies fall from 100 ms by 2 ms each: half of all requests are late, the 90th percentile by 80 ms.
	if r.Worst < stall || r.P90 < stall/2 {
		t.Fatalf("%v; the stall of %v is not in the latencies of the requests it held up", r, stall)
	}
	if r.WorstAt > 20*time.Millisecond {
		t.Fatalf("%v; the worst request was the first", r)
	}
}

func TestPoissonStartsAreTheSameForTheSameSeed(t *testing.T) {
	count := func(seed uint64) int {
		return load.Run(t.Context(), load.Config{Rate: 5000, Duration: 50 * time.Millisecond, Seed: seed}, func(context.Context, int) error { return nil }).Requests
	}
	if a, b := count(7), count(7); a != b || a == 0 {
		t.Fatalf("seed 7 started %d requests, then %d", a, b)
	}
}

func TestClosedLoopKeepsAsManyRequestsUnderWayAsThereAreClients(t *testing.T) {
	const clients = 4
	var meet sync.WaitGroup
	meet.Add(clients)
	var now, most atomic.Int64
	r := load.Run(t.Context(), load.Config{Clients: clients, Duration: 50 * time.Millisecond}, func(_ context.Context, i int) error {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if i < clients {
			meet.Done()
			meet.Wait() // the first four can only end together
		}
		return nil
	})
	if most.Load() != clients || r.Requests < clients {
		t.Fatalf("%d requests at once, want %d: %v", most.Load(), clients, r)
	}
}

func TestErrorsAreCountedByTextWithinBounds(t *testing.T) {
	r := load.Run(t.Context(), load.Config{Rate: 10000, Duration: 10 * time.Millisecond, MaxInFlight: 1}, func(_ context.Context, i int) error {
		if i%2 == 0 {
			return errors.New("even")
		}
		return fmt.Errorf("error %d", i)
	})
	total := 0
	for _, n := range r.Errors {
		total += n
	}
	if r.Failed != r.Requests || total != r.Failed {
		t.Fatalf("%d of %d failed, %d texts counted", r.Failed, r.Requests, total)
	}
	if len(r.Errors) != 17 || r.Errors["even"] != (r.Requests+1)/2 || r.Errors[load.OtherErrors] == 0 {
		t.Fatalf("errors are %v", r.Errors)
	}
	if r.PerSecond != 0 {
		t.Fatalf("failed requests count as %v/s done", r.PerSecond)
	}
}

func TestAPanicIsAFailedRequest(t *testing.T) {
	r := load.Run(t.Context(), load.Config{Rate: 100, Duration: 20 * time.Millisecond}, func(context.Context, int) error { panic("boom") })
	if r.Requests != 2 || r.Failed != 2 {
		t.Fatalf("%v; want 2 failures", r)
	}
}

func TestTimeoutEndsARequest(t *testing.T) {
	r := load.Run(t.Context(), load.Config{Rate: 100, Duration: 10 * time.Millisecond, Timeout: 5 * time.Millisecond}, func(ctx context.Context, _ int) error {
		<-ctx.Done()
		return ctx.Err()
	})
	if r.Requests != 1 || r.Errors[context.DeadlineExceeded.Error()] != 1 {
		t.Fatalf("%v", r)
	}
}

func TestCancellingEndsTheStartingButNotTheRequestsUnderWay(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	r := load.Run(ctx, load.Config{Rate: 1000, Duration: time.Hour}, func(rctx context.Context, i int) error {
		if i == 5 {
			cancel()
		}
		return rctx.Err()
	})
	if r.Failed != 0 || r.Requests < 6 {
		t.Fatalf("%v; want at least the 6 requests under way when it was cancelled, none failed", r)
	}
}
