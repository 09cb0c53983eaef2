package agent

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"trivet/hsm"
)

// watchdog lets at most cap(slots) calls into the module at once, at most limit requests wait or run, and gives the
// process up when a call overruns or says that session or device are gone: neither can be cured from within.
type watchdog struct {
	slots    chan struct{}
	limit    int64
	requests atomic.Int64
	metrics  *metrics

	once  sync.Once
	dead  chan struct{} // closed when the process has been given up
	fatal func(error)
}

// admit counts a request in; release counts it out. A full queue is ClassOverloaded.
func (w *watchdog) admit(op string) (release func(), err error) {
	if w.requests.Add(1) > w.limit {
		w.requests.Add(-1)
		return nil, hsm.Errorf(hsm.ClassOverloaded, op, "%d requests are waiting already", w.limit)
	}
	w.metrics.inFlight.Inc()
	return func() { w.requests.Add(-1); w.metrics.inFlight.Dec() }, nil
}

// giveUp ends the process: whoever waits is answered first, since fatal runs beside them.
func (w *watchdog) giveUp(cause error) {
	w.once.Do(func() {
		close(w.dead)
		go w.fatal(cause)
	})
}

// given tells why nothing is served any more, or nil.
func (w *watchdog) given(op string) error {
	select {
	case <-w.dead:
		return hsm.Errorf(hsm.ClassDevice, op, "the module failed or hangs; this agent is ending")
	default:
		return nil
	}
}

// call runs fn in the module, waiting for a slot first. The caller gets its answer when fn returns, ctx ends, or the
// process is given up, whichever is first; fn itself is watched to its end in any case.
func call[T any](ctx context.Context, w *watchdog, op string, limit time.Duration, fn func() (T, error)) (T, error) {
	var zero T
	select {
	case w.slots <- struct{}{}:
	case <-ctx.Done():
		return zero, &hsm.Error{Class: hsm.ClassOverloaded, Op: op, Err: fmt.Errorf("waiting for a slot: %w", ctx.Err())}
	case <-w.dead:
		return zero, w.given(op)
	}
	return watch(ctx, w, op, limit, func() { <-w.slots }, fn)
}

// watch is call without a slot; free runs when fn has returned.
func watch[T any](ctx context.Context, w *watchdog, op string, limit time.Duration, free func(), fn func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var zero T
	if err := w.given(op); err != nil {
		free()
		return zero, err
	}
	answer := make(chan result, 1)
	began := time.Now()
	timer := startClock(limit, func() {
		w.giveUp(fmt.Errorf("%s: the module did not return within %s, and a PKCS#11 call cannot be cancelled", op, limit))
	})
	go func() {
		value, err := fn()
		timer.stop()
		free()
		w.metrics.seconds.WithLabelValues(op).Observe(time.Since(began).Seconds())
		answer <- result{value, err} // before giving up, so that whoever brought the news is told its own cause
		if c := hsm.ClassOf(err); err != nil && c != hsm.ClassRequest && c != hsm.ClassNotFound && c != hsm.ClassDenied {
			w.giveUp(fmt.Errorf("the token is lost to this process: %w", err))
		}
	}()
	select {
	case r := <-answer:
		return r.value, r.err
	case <-ctx.Done():
		return zero, &hsm.Error{Class: hsm.ClassDevice, Op: op, Err: fmt.Errorf("waiting for the module: %w", ctx.Err())}
	case <-w.dead:
		select {
		case r := <-answer: // this call itself brought the news
			return r.value, r.err
		default:
			return zero, w.given(op)
		}
	}
}

// clock runs out after limit, in ticks, of time in which this process ran: a process that was frozen for a minute finds
// one tick gone, not its module hung.
type clock struct {
	mu      sync.Mutex // guards what follows
	timer   *time.Timer
	left    int
	step    time.Duration
	expired func()
}

const ticks = 8

func startClock(limit time.Duration, expired func()) *clock {
	c := &clock{left: ticks, step: limit / ticks, expired: expired}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer = time.AfterFunc(c.step, c.tick)
	return c
}

func (c *clock) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left == 0 { // stopped
		return
	}
	if c.left--; c.left == 0 {
		c.expired()
		return
	}
	c.timer.Reset(c.step)
}

func (c *clock) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left = 0
	c.timer.Stop()
}
