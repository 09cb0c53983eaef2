package ocsp

import (
	"container/heap"
	"context"
	"crypto/sha256"
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
	// workers that sign ahead, each a batch at a time. A batch costs its way to the HSM whatever its size, so what was newly issued gathers for a
	// moment; whoever asks meanwhile has it signed at once. What was revoked does not wait.
	workers   = 4
	maxBatch  = 64
	gatherFor = 50 * time.Millisecond
	// batchTimeout bounds the signing of one batch.
	batchTimeout = 5 * time.Second
	// backlog is how many newly issued certificates may wait. The others join what is not urgent: what a start finds unsigned, retries and
	// refreshes. That is one worker's at a time, who rests for as long as it worked, since the HSMs have certificates to sign meanwhile.
	backlog = 4 * maxBatch
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

// presigner keeps every status signed: newly revoked first, then newly issued, then what was due first. It is safe for concurrent use.
type presigner struct {
	now     func() time.Time
	log     *slog.Logger
	metrics *metrics
	live    *semaphore.Weighted
	flights singleflight.Group

	complain rate.Sometimes

	mu       sync.Mutex
	wake     *sync.Cond
	revoked  []job // mu
	issued   []job // mu: backlog at most
	gathered bool  // mu: the first of issued has waited for long enough
	later    dues  // mu: what is not urgent
	trailing bool  // mu: a worker has part of later, or rests from it
	closed   bool  // mu
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
		if len(p.issued) == backlog {
			heap.Push(&p.later, due{p.now().Unix(), j})
			return
		}
		if p.issued = append(p.issued, j); len(p.issued) == 1 {
			p.gathered = false
			time.AfterFunc(gatherFor, p.endGathering)
		}
		if len(p.issued) < maxBatch {
			return
		}
	default:
		return
	}
	p.wake.Signal()
}

func (p *presigner) endGathering() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gathered = true
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
	now := p.now().Unix()
	for _, s := range good {
		heap.Push(&p.later, due{now, job{is, s, hashSHA1}})
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
				batch, trailing := p.next()
				if batch == nil {
					return
				}
				began, rest := time.Now(), time.Duration(0)
				if !p.work(ctx, batch) {
					rest = pause
				} else if trailing {
					rest = min(time.Since(began), pause)
				}
				if rest > 0 {
					select {
					case <-time.After(rest):
					case <-ctx.Done():
					}
				}
				if trailing {
					p.rested()
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

// rested lets a worker take the next of what is not urgent.
func (p *presigner) rested() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trailing = false
	p.wake.Broadcast()
}

// next waits for the most urgent jobs, all of one issuer; nil when there is nothing more to do. trailing says that they are not urgent: the
// caller rests when it has done them, and says so.
func (p *presigner) next() (_ []job, trailing bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.closed:
			return nil, false
		case len(p.revoked) > 0:
			return take(&p.revoked), false
		case len(p.issued) >= maxBatch || p.gathered && len(p.issued) > 0:
			return take(&p.issued), false
		case !p.trailing && p.overdue():
			p.trailing = true
			batch := []job{heap.Pop(&p.later).(due).job}
			for len(batch) < maxBatch && p.overdue() && p.later[0].issuer == batch[0].issuer {
				batch = append(batch, heap.Pop(&p.later).(due).job)
			}
			return batch, true
		}
		p.wake.Wait()
	}
}

// overdue says whether something of later is due. The caller holds p.mu.
func (p *presigner) overdue() bool { return len(p.later) > 0 && p.later[0].at <= p.now().Unix() }

// take removes the first jobs of one issuer from a queue that has some.
func take(q *[]job) []job {
	n := 1
	for n < min(len(*q), maxBatch) && (*q)[n].issuer == (*q)[0].issuer {
		n++
	}
	batch := (*q)[:n:n]
	if *q = (*q)[n:]; len(*q) == 0 {
		*q = nil // gives the memory back
	}
	return batch
}

// work signs jobs of one issuer, but for those that somebody signed already, and sees to their refresh or retry. False means that the key failed.
func (p *presigner) work(ctx context.Context, batch []job) bool {
	drafts := make([]draft, 0, len(batch))
	digests := make([][]byte, 0, len(batch))
	for _, j := range batch {
		now := p.now()
		view, ok := j.issuer.table.Lookup(j.serial)
		if !ok || view.State == TryLater || view.ended(now) {
			continue
		}
		if sig := view.signatures[j.hash]; sig != nil && now.Unix() < sig.refreshAt(j.serial) {
			continue // whoever made it has scheduled its refresh
		}
		d, err := newDraft(j, view, now)
		if errors.Is(err, errNoResponder) {
			return true // enqueueAll follows once there is one
		}
		if err != nil {
			p.retry(err, j)
			continue
		}
		drafts, digests = append(drafts, d), append(digests, d.digest[:])
	}
	for len(drafts) > 0 { // once, unless the responder changed between two drafts
		n := 1
		for n < len(drafts) && drafts[n].by == drafts[0].by {
			n++
		}
		if err := p.signAll(ctx, drafts[:n], digests[:n]); err != nil {
			for _, d := range drafts {
				p.retry(err, d.job)
			}
			return false
		}
		drafts, digests = drafts[n:], digests[n:]
	}
	return true
}

// signAll signs and keeps drafts of one responder. It trusts the signer's promise that every signature was verified.
func (p *presigner) signAll(ctx context.Context, drafts []draft, digests [][]byte) error {
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	values, err := drafts[0].by.signer.SignBatch(ctx, digests)
	if err != nil {
		return fmt.Errorf("signing %d OCSP responses: %w", len(drafts), err)
	}
	if len(values) != len(drafts) {
		return fmt.Errorf("signing %d OCSP responses: %d signatures", len(drafts), len(values))
	}
	for i := range drafts {
		_ = p.keep(drafts[i], values[i]) // an outdated one: the change has enqueued its successor
	}
	return nil
}

// retry has a job done again in a second, and says why at times.
func (p *presigner) retry(err error, j job) {
	p.metrics.signFailures.Inc()
	p.complain.Do(func() {
		p.log.Warn("OCSP answers are not signed, trying again", "issuer", j.issuer.name, "serial", j.serial.String(), "err", err)
	})
	p.schedule(p.now().Add(retryAfter).Unix(), j)
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
	d, err := newDraft(j, view, p.now())
	if err != nil {
		return err
	}
	value, err := d.by.sign(d.digest[:])
	if err != nil {
		return err
	}
	return p.keep(d, value)
}

// draft is an answer that is about to be signed.
type draft struct {
	job
	epoch      uint32 // of the status that it shows
	by         *responder
	this, next int64
	digest     [sha256.Size]byte
}

func newDraft(j job, view View, now time.Time) (draft, error) {
	known, r := j.issuer.known.Load(), j.issuer.responder.Load()
	if known == nil || r == nil {
		return draft{}, errNoResponder
	}
	this, next, err := window(known, r, now, view.RevokedAt)
	if err != nil {
		return draft{}, err
	}
	tbs, err := encodeTBS(r, []single{{&known.ids[j.hash], j.serial, view.Status}}, this, next)
	if err != nil {
		return draft{}, err
	}
	return draft{job: j, epoch: view.Epoch, by: r, this: this, next: next, digest: sha256.Sum256(tbs)}, nil
}

// keep publishes a signature, unless the status changed meanwhile, and schedules its refresh.
func (p *presigner) keep(d draft, value []byte) error {
	sig := &Signature{value: value, thisUpdate: d.this, nextUpdate: d.next, by: d.by}
	if !d.issuer.table.publish(d.serial, d.hash, d.epoch, sig) {
		return errOutdated
	}
	p.metrics.signed.Inc()
	p.schedule(max(sig.refreshAt(d.serial), p.now().Add(minRefresh).Unix()), d.job)
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
