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

	// turn is whose turn it is to manage the token. The token would make them wait too, but with the clock running.
	turn     chan struct{}
	managing atomic.Int64

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
	return func() { w.requests.Add(-1) }, nil
}

// alone waits until no other management request runs. At most managers run or wait; more are ClassOverloaded.
func (w *watchdog) alone(ctx context.Context, op string) (release func(), err error) {
	defer func() {
		if err != nil {
			w.managing.Add(-1)
		}
	}()
	if w.managing.Add(1) > managers {
		return nil, hsm.Errorf(hsm.ClassOverloaded, op, "%d management requests are waiting already", managers)
	}
	select {
	case w.turn <- struct{}{}:
		return func() { <-w.turn; w.managing.Add(-1) }, nil
	case <-ctx.Done():
		return nil, &hsm.Error{Class: hsm.ClassOverloaded, Op: op, Err: fmt.Errorf("waiting for other management requests: %w", ctx.Err())}
	case <-w.dead:
		return nil, w.given(op)
	}
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
	return calls(ctx, w, op, limit, func(func()) (T, error) { return fn() })
}

// calls is call for a few calls, one after another: fn says when the next one begins. Each has limit for itself.
func calls[T any](ctx context.Context, w *watchdog, op string, limit time.Duration, fn func(next func()) (T, error)) (T, error) {
	free, err := w.slot(ctx, op)
	if err != nil {
		var zero T
		return zero, err
	}
	return watchCalls(ctx, w, op, limit, free, fn)
}

// slot waits for a place in the module.
func (w *watchdog) slot(ctx context.Context, op string) (free func(), err error) {
	select {
	case w.slots <- struct{}{}:
		return func() { <-w.slots }, nil
	case <-ctx.Done():
		return nil, &hsm.Error{Class: hsm.ClassOverloaded, Op: op, Err: fmt.Errorf("waiting for a slot: %w", ctx.Err())}
	case <-w.dead:
		return nil, w.given(op)
	}
}

// waiting is how many requests wait for the module.
func (w *watchdog) waiting() int64 { return max(0, w.requests.Load()-int64(len(w.slots))) }

// opActivate is the one operation whose refused PIN is a person's mistake and no reason to end.
const opActivate = "activate"

// mortal tells whether after such an error this process cannot use the token any more.
func mortal(op string, err error) bool {
	switch hsm.ClassOf(err) {
	case hsm.ClassRequest, hsm.ClassNotFound, hsm.ClassDenied:
		return false
	case hsm.ClassPIN:
		return op != opActivate
	}
	return err != nil
}

// watch is call without a slot; free runs when fn has returned.
func watch[T any](ctx context.Context, w *watchdog, op string, limit time.Duration, free func(), fn func() (T, error)) (T, error) {
	return watchCalls(ctx, w, op, limit, free, func(func()) (T, error) { return fn() })
}

// watchCalls is calls without a slot; free runs when fn has returned.
func watchCalls[T any](ctx context.Context, w *watchdog, op string, limit time.Duration, free func(), fn func(next func()) (T, error)) (T, error) {
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
		w.metrics.hung.Inc()
		w.giveUp(fmt.Errorf("%s: the module did not return within %s, and a PKCS#11 call cannot be cancelled", op, limit))
	})
	go func() {
		seconds := w.metrics.seconds.WithLabelValues(op)
		value, err := fn(func() {
			timer.restart()
			seconds.Observe(time.Since(began).Seconds())
			began = time.Now()
		})
		timer.stop()
		free()
		seconds.Observe(time.Since(began).Seconds())
		answer <- result{value, err} // before giving up, so that whoever brought the news is told its own cause
		if mortal(op, err) {
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

// restart gives the whole limit again, unless it ran out.
func (c *clock) restart() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left > 0 {
		c.left = ticks
		c.timer.Reset(c.step)
	}
}

func (c *clock) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left = 0
	c.timer.Stop()
}
