package ocsp

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

const (
	// validity of an answer: nextUpdate - thisUpdate.
	validity = 7 * 24 * time.Hour
	// backdate of thisUpdate, for relying parties whose clocks are behind.
	backdate = time.Minute
	// afterlife is how long past its notAfter a certificate is still answered for.
	afterlife = 24 * time.Hour
	// workers that sign ahead. The key gathers their calls into batches.
	workers = 64
	// liveSigners may sign at a request's behest at one time; further requests are told to try later.
	liveSigners = 256
	// retryAfter a failed signature; the worker that met it rests for pause, so that an outage of the key is not a storm.
	retryAfter = time.Second
	pause      = 250 * time.Millisecond
	// minRefresh is the least time between two signatures of one answer, when an expiring certificate shortens them.
	minRefresh = time.Minute
)

var (
	errNoResponder = errors.New("no responder certificate and key")
	errOutdated    = errors.New("status changed while it was being signed")
	errBusy        = errors.New("too many signatures under way")
	errEnding      = errors.New("responder certificate or CA certificate has expired")
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

// presigner keeps every status signed: newly revoked first, then newly issued, then the oldest. It is safe for
// concurrent use.
type presigner struct {
	now     func() time.Time
	log     *slog.Logger
	metrics *metrics
	live    *semaphore.Weighted
	flights singleflight.Group

	complain rate.Sometimes

	mu      sync.Mutex
	wake    *sync.Cond
	revoked []job // mu
	issued  []job // mu
	later   dues  // mu: refreshes and retries
	closed  bool  // mu
}

func newPresigner(now func() time.Time, log *slog.Logger, m *metrics) *presigner {
	p := &presigner{now: now, log: log, metrics: m, live: semaphore.NewWeighted(liveSigners), complain: rate.Sometimes{Interval: 10 * time.Second}}
	p.wake = sync.NewCond(&p.mu)
	return p
}

// enqueue asks for the answer to a status that just changed.
func (p *presigner) enqueue(state State, j job) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch state {
	case Revoked:
		p.revoked = append(p.revoked, j)
	case Good:
		p.issued = append(p.issued, j)
	default:
		return
	}
	p.wake.Signal()
}

// changed asks for the answer to the status that a serial has now.
func (p *presigner) changed(is *issuer, s Serial) {
	if view, ok := is.table.Lookup(s); ok {
		p.enqueue(view.State, job{is, s, hashSHA1})
	}
}

// enqueueAll asks for every answer of an issuer that is missing: its responder became known.
func (p *presigner) enqueueAll(is *issuer) {
	revoked, good := is.table.unsigned()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range revoked {
		p.revoked = append(p.revoked, job{is, s, hashSHA1})
	}
	for _, s := range good {
		p.issued = append(p.issued, job{is, s, hashSHA1})
	}
	p.wake.Broadcast()
}

func (p *presigner) schedule(at int64, j job) {
	p.mu.Lock()
	defer p.mu.Unlock()
	heap.Push(&p.later, due{at, j})
}

// run signs ahead until ctx ends.
func (p *presigner) run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				j, ok := p.next()
				if !ok {
					return
				}
				if !p.work(j) {
					select {
					case <-time.After(pause):
					case <-ctx.Done():
					}
				}
			}
		})
	}
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.mu.Lock()
			if len(p.later) > 0 && p.later[0].at <= p.now().Unix() {
				p.wake.Broadcast()
			}
			p.mu.Unlock()
		case <-ctx.Done():
			p.mu.Lock()
			p.closed = true
			p.wake.Broadcast()
			p.mu.Unlock()
			wg.Wait()
			return nil
		}
	}
}

// next waits for the most urgent job; false when there is nothing more to do.
func (p *presigner) next() (job, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.closed:
			return job{}, false
		case len(p.revoked) > 0:
			return pop(&p.revoked), true
		case len(p.issued) > 0:
			return pop(&p.issued), true
		case len(p.later) > 0 && p.later[0].at <= p.now().Unix():
			return heap.Pop(&p.later).(due).job, true
		}
		p.wake.Wait()
	}
}

func pop(q *[]job) job {
	j := (*q)[0]
	if *q = (*q)[1:]; len(*q) == 0 {
		*q = nil // gives the memory back
	}
	return j
}

// work signs one job, unless somebody did already, and sees to its refresh or retry. False means that the key failed.
func (p *presigner) work(j job) bool {
	view, ok := j.issuer.table.Lookup(j.serial)
	now := p.now()
	if !ok || view.State == TryLater || view.ended(now) {
		return true
	}
	if sig := view.signatures[j.hash]; sig != nil && now.Unix() < sig.refreshAt(j.serial) {
		return true // whoever made it has scheduled its refresh
	}
	err := p.sign(j)
	switch {
	case err == nil, errors.Is(err, errOutdated):
		return true // an outdated one: the change has enqueued its successor
	case errors.Is(err, errNoResponder):
		return true // enqueueAll follows once there is one
	}
	p.metrics.signFailures.Inc()
	p.complain.Do(func() {
		p.log.Warn("OCSP answers are not signed, trying again", "issuer", j.issuer.name, "serial", j.serial.String(), "err", err)
	})
	p.schedule(now.Add(retryAfter).Unix(), j)
	return false
}

// demand signs one answer for a request that waits for it, at most once at a time per answer, and returns when it is
// kept, when it failed, or when ctx ends. The caller looks the status up again in any case.
func (p *presigner) demand(ctx context.Context, j job) error {
	if !p.live.TryAcquire(1) {
		return errBusy
	}
	defer p.live.Release(1)
	var key [22]byte
	key[0], key[1] = byte(j.hash), j.serial.n
	copy(key[2:], j.serial.b[:])
	done := p.flights.DoChan(j.issuer.name+"\x00"+string(key[:]), func() (any, error) { return nil, p.sign(j) })
	select {
	case r := <-done:
		if r.Err != nil && !errors.Is(r.Err, errOutdated) && !errors.Is(r.Err, errNoResponder) {
			p.metrics.signFailures.Inc()
		}
		return r.Err
	case <-ctx.Done():
		return fmt.Errorf("waiting for a signature: %w", ctx.Err())
	}
}

// sign makes, verifies and keeps the answer for the serial's present status.
func (p *presigner) sign(j job) error {
	view, ok := j.issuer.table.Lookup(j.serial)
	if !ok || view.State == TryLater {
		return errNoStatus
	}
	known, r := j.issuer.known.Load(), j.issuer.responder.Load()
	if known == nil || r == nil {
		return errNoResponder
	}
	id, now := &known.ids[j.hash], p.now()
	this, next, err := window(known, r, now, view.RevokedAt)
	if err != nil {
		return err
	}
	tbs, err := encodeTBS(r, []single{{id, j.serial, view.Status}}, this, next)
	if err != nil {
		return err
	}
	value, err := r.sign(tbs)
	if err != nil {
		return err
	}
	sig := &Signature{value: value, thisUpdate: this, nextUpdate: next, by: r}
	if !j.issuer.table.publish(j.serial, j.hash, view.Epoch, sig) {
		return errOutdated
	}
	p.metrics.signed.Inc()
	p.schedule(max(sig.refreshAt(j.serial), now.Add(minRefresh).Unix()), j)
	return nil
}

// window returns thisUpdate and nextUpdate of an answer signed now that shows nothing later than revokedAt.
func window(known *known, r *responder, now time.Time, revokedAt int64) (this, next int64, err error) {
	this = max(now.Add(-backdate).Unix(), revokedAt)
	next = min(this+int64(validity/time.Second), r.cert.NotAfter.Unix(), known.cert.NotAfter.Unix())
	if next <= now.Unix() || next <= this {
		return 0, 0, errEnding
	}
	return this, next, nil
}

// seed spreads refreshes; it need not be the same on another node.
var seed = maphash.MakeSeed()

// refreshAt is half the validity, up to a tenth of it earlier by serial, so that what was signed in one night is not
// refreshed in one night.
func (s *Signature) refreshAt(serial Serial) int64 {
	half := (s.nextUpdate - s.thisUpdate) / 2
	sum := maphash.Bytes(seed, serial.b[:serial.n])
	spread := half / 10
	if spread <= 0 {
		return s.thisUpdate + half
	}
	return s.thisUpdate + half - int64(sum%uint64(spread))
}

// ended says whether the certificate's afterlife is over: the responder no longer answers for it.
func (v View) ended(now time.Time) bool {
	return v.NotAfter > 0 && now.Unix() > v.NotAfter+int64(afterlife/time.Second)
}

// encode puts the answer together that the signature was made for.
func (s *Signature) encode(id *issuerID, serial Serial, status Status) ([]byte, error) {
	tbs, err := encodeTBS(s.by, []single{{id, serial, status}}, s.thisUpdate, s.nextUpdate)
	if err != nil {
		return nil, err
	}
	return encodeResponse(s.by, tbs, s.value)
}
