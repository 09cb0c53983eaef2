package ca

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// admission bounds how many requests are worked on at once, and is fair between callers: while all places are taken, each caller's requests wait in
// a queue of its own and the callers take turns. So a caller with one request waits for one round, whatever another has sent. Requests beyond the
// bounds are refused before anything is done for them. It is safe for concurrent use.
type admission struct {
	places  int // requests worked on at once
	waiting int // most requests that wait, of all callers together
	each    int // most requests of one caller that wait

	mu     sync.Mutex
	taken  int
	queued int
	queues map[string]*callerQueue
	turns  []*callerQueue // callers with waiting requests; the first is next
}

// callerQueue is the waiting requests of one caller, first come first served.
type callerQueue struct {
	caller string
	tokens []chan struct{} // of each request, closed with the place taken when it is its turn
}

func newAdmission(places, waiting, each int) *admission {
	return &admission{places: places, waiting: waiting, each: each, queues: make(map[string]*callerQueue)}
}

var (
	errCallerBusy = errors.New("the caller has too many requests waiting")
	errNodeBusy   = errors.New("too many requests are waiting")
)

// enter takes a place, after waiting for it if need be; leave gives it back, once. The error is errCallerBusy, errNodeBusy, or the context's.
func (a *admission) enter(ctx context.Context, caller string) (leave func(), err error) {
	a.mu.Lock()
	if a.taken < a.places { // then nobody waits: whoever leaves hands its place on
		a.taken++
		a.mu.Unlock()
		return sync.OnceFunc(a.leave), nil
	}
	q := a.queues[caller]
	switch {
	case q != nil && len(q.tokens) >= a.each:
		err = errCallerBusy
	case a.queued >= a.waiting:
		err = errNodeBusy
	}
	if err != nil {
		a.mu.Unlock()
		return nil, err
	}
	if q == nil {
		q = &callerQueue{caller: caller}
		a.queues[caller] = q
		a.turns = append(a.turns, q)
	}
	t := make(chan struct{})
	q.tokens = append(q.tokens, t)
	a.queued++
	a.mu.Unlock()

	select {
	case <-t:
		return sync.OnceFunc(a.leave), nil
	case <-ctx.Done():
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-t: // just now
		a.pass()
	default:
		a.drop(q, t)
	}
	return nil, ctx.Err()
}

func (a *admission) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pass()
}

// pass hands a place that became free to whoever's turn it is. The caller holds a.mu.
func (a *admission) pass() {
	if len(a.turns) == 0 {
		a.taken--
		return
	}
	q := a.turns[0]
	a.turns = a.turns[1:]
	t := q.tokens[0]
	q.tokens = q.tokens[1:]
	if len(q.tokens) > 0 {
		a.turns = append(a.turns, q)
	} else {
		delete(a.queues, q.caller)
	}
	a.queued--
	close(t)
}

// drop takes a request that waits no longer out of its queue, so that it does not count against its caller. The caller holds a.mu.
func (a *admission) drop(q *callerQueue, t chan struct{}) {
	a.queued--
	q.tokens = slices.DeleteFunc(q.tokens, func(one chan struct{}) bool { return one == t })
	if len(q.tokens) == 0 {
		delete(a.queues, q.caller)
		a.turns = slices.DeleteFunc(a.turns, func(one *callerQueue) bool { return one == q })
	}
}

// depth is how many requests are worked on, and how many wait.
func (a *admission) depth() (working, waiting int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.taken, a.queued
}

// enter admits a request of a caller. Its error is an *Error, and nothing was begun.
func (e *Engine) enter(ctx context.Context, caller string) (leave func(), err error) {
	began := time.Now()
	leave, err = e.admission.enter(ctx, caller)
	e.metrics.stage("wait", began)
	switch {
	case err == nil:
		return leave, nil
	case errors.Is(err, errCallerBusy):
		return nil, &Error{Name: RateLimited, Detail: "too many of your requests are waiting here already: send fewer at a time", RetryAfter: retrySoon}
	case errors.Is(err, errNodeBusy):
		return nil, &Error{Name: Overloaded, Detail: "too many requests are waiting at this node: repeat the request", RetryAfter: retrySoon}
	}
	return nil, unavailable(Overloaded, err, "the request's turn did not come in time: repeat it")
}
