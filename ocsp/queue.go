package ocsp

import (
	"container/heap"
	"slices"
	"sync"
	"time"
)

const (
	// maxBatch is how many answers a worker signs at a time. A batch costs its way to the HSM whatever its size, so what was newly issued gathers for
	// a moment; whoever asks meanwhile has it signed at once. What was revoked does not wait.
	maxBatch  = 64
	gatherFor = 50 * time.Millisecond
	// backlog is how many newly issued certificates of an issuer may wait. The others join what is not urgent.
	backlog = 4 * maxBatch
	// An issuer whose key fails rests for pause before it is tried again, and for twice as long each further time, up to longPause: an outage of the
	// key is not a storm.
	pause     = 250 * time.Millisecond
	longPause = 2 * time.Second
)

// job is an answer to be signed ahead.
type job struct {
	issuer *issuer
	serial Serial
	hash   hash
}

// due is a job with the moment from which it is wanted.
type due struct {
	at int64 // unix seconds
	job
}

// dues is a heap, soonest first. Since validity is the same for all, that is oldest first.
type dues []due

func (d dues) Len() int           { return len(d) }
func (d dues) Less(i, j int) bool { return d[i].at < d[j].at }
func (d dues) Swap(i, j int)      { d[i], d[j] = d[j], d[i] }
func (d *dues) Push(x any)        { *d = append(*d, x.(due)) }
func (d *dues) Pop() any {
	old := *d
	x := old[len(old)-1]
	*d = old[:len(old)-1]
	return x
}

// queue says what is signed ahead next: what was revoked, then what was just issued, then what can wait, which is what a start finds unsigned, retries
// and refreshes. What can wait is one worker's at a time, who rests for as long as it worked, since the HSMs have certificates to sign meanwhile.
// Issuers take turns, and one whose key fails is tried by one worker at a time. Safe for concurrent use.
type queue struct {
	now func() time.Time

	mu       sync.Mutex
	wake     *sync.Cond
	lines    map[*issuer]*line // mu
	order    []*line           // mu: whose turn it is stands first
	trailing bool              // mu: a worker has part of what can wait, or rests from it
	closed   bool              // mu
}

// line is what is to be signed of one issuer. It is guarded by the queue's mu.
type line struct {
	revoked  []job
	issued   []job // backlog at most
	gathered bool  // the first of issued has waited for long enough
	later    dues  // what can wait

	busy    int           // batches under way
	resting time.Duration // how long it rests because its last batch failed; 0: it did not
	until   time.Time     // the end of that
}

// urgency of what is in a line.
type urgency int

const (
	revokedFirst urgency = iota
	justIssued
	canWait
	nothing
)

// batch is work for one worker, all of one issuer.
type batch struct {
	jobs     []job
	line     *line
	trailing bool // it could wait: the worker rests before it says rested
}

func newQueue(now func() time.Time) *queue {
	q := &queue{now: now, lines: map[*issuer]*line{}}
	q.wake = sync.NewCond(&q.mu)
	return q
}

// line returns an issuer's. The caller holds q.mu.
func (q *queue) line(is *issuer) *line {
	l := q.lines[is]
	if l == nil {
		l = &line{}
		q.lines[is], q.order = l, append(q.order, l)
	}
	return l
}

// enqueue asks for the answer to a status that just changed.
func (q *queue) enqueue(state State, j job) {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.line(j.issuer)
	switch {
	case state == Revoked:
		l.revoked = append(l.revoked, j)
	case state != Good:
		return
	case len(l.issued) == backlog:
		heap.Push(&l.later, due{q.now().Unix(), j})
	default:
		if l.issued = append(l.issued, j); len(l.issued) == 1 {
			l.gathered = false
			time.AfterFunc(gatherFor, func() { q.gathered(l) })
		}
	}
	q.signal()
}

func (q *queue) gathered(l *line) {
	q.mu.Lock()
	defer q.mu.Unlock()
	l.gathered = true
	q.signal()
}

// enqueueAll asks for answers that are missing.
func (q *queue) enqueueAll(is *issuer, revoked, good []Serial) {
	urgent, wait := make([]job, len(revoked)), make(dues, len(good))
	for i, s := range revoked {
		urgent[i] = job{is, s, hashSHA1}
	}
	now := q.now().Unix()
	for i, s := range good {
		wait[i] = due{now, job{is, s, hashSHA1}}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.line(is)
	l.revoked = append(l.revoked, urgent...)
	l.later = append(l.later, wait...)
	heap.Init(&l.later)
	q.signal()
}

// schedule asks for an answer from a moment on, in unix seconds.
func (q *queue) schedule(at int64, j job) {
	q.mu.Lock()
	defer q.mu.Unlock()
	heap.Push(&q.line(j.issuer).later, due{at, j})
}

// choose returns whose turn it is and with what. The caller holds q.mu.
func (q *queue) choose() (*line, urgency) {
	var chosen *line
	with := nothing
	for _, l := range q.order {
		if l.resting > 0 && (l.busy > 0 || time.Now().Before(l.until)) {
			continue
		}
		u := nothing
		switch {
		case len(l.revoked) > 0:
			u = revokedFirst
		case len(l.issued) >= maxBatch || l.gathered && len(l.issued) > 0:
			u = justIssued
		case (!q.trailing || l.resting > 0) && l.overdue(q.now):
			u = canWait
		}
		if u < with {
			chosen, with = l, u
		}
	}
	return chosen, with
}

// overdue says whether something that can wait is due. It looks at the clock only if something is there: every row of the feed comes by.
func (l *line) overdue(now func() time.Time) bool {
	return len(l.later) > 0 && l.later[0].at <= now().Unix()
}

// signal wakes a worker if there is something to do. Who takes a part wakes the next. The caller holds q.mu.
func (q *queue) signal() {
	if l, _ := q.choose(); l != nil {
		q.wake.Signal()
	}
}

// look is to be called now and then: jobs come due and rests end without anybody's doing.
func (q *queue) look() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.signal()
}

// next waits for a batch; nil when there is nothing more to do. Whoever gets one says done, and then, if it is trailing, rested.
func (q *queue) next() *batch {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed {
		l, u := q.choose()
		if l == nil {
			q.wake.Wait()
			continue
		}
		b := &batch{line: l}
		switch u {
		case revokedFirst:
			b.jobs = take(&l.revoked)
		case justIssued:
			b.jobs = take(&l.issued)
		case canWait:
			for len(b.jobs) < maxBatch && l.overdue(q.now) {
				b.jobs = append(b.jobs, heap.Pop(&l.later).(due).job)
			}
			if b.trailing = l.resting == 0; b.trailing {
				q.trailing = true
			}
		}
		l.busy++
		q.order = append(slices.DeleteFunc(q.order, func(o *line) bool { return o == l }), l)
		q.signal()
		return b
	}
	return nil
}

// take removes the first jobs from a queue.
func take(q *[]job) []job {
	n := min(len(*q), maxBatch)
	batch := (*q)[:n:n]
	if *q = (*q)[n:]; len(*q) == 0 {
		*q = nil // gives the memory back
	}
	return batch
}

// done says that a batch was worked on; false that the key failed.
func (q *queue) done(b *batch, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := b.line
	l.busy--
	switch now := time.Now(); {
	case ok:
		l.resting = 0
	case l.resting == 0 || !now.Before(l.until):
		l.resting = min(max(pause, 2*l.resting), longPause)
		l.until = now.Add(l.resting)
	}
	q.signal()
}

// rested lets a worker take the next of what can wait.
func (q *queue) rested() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.trailing = false
	q.signal()
}

// close has next return nil.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.wake.Broadcast()
}
