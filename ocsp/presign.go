package ocsp

import (
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
	// workers that sign ahead, each a batch at a time.
	workers = 4
	// batchTimeout bounds the signing of one batch.
	batchTimeout = 5 * time.Second
	// liveSigners may sign at a request's behest at one time; further requests are told to try later.
	liveSigners = 256
	// retryAfter a failed signature.
	retryAfter = time.Second
	// minRefresh is the least time between two signatures of one answer, when an expiring certificate shortens them.
	minRefresh = time.Minute
)

var (
	errNoResponder = errors.New("no responder certificate and key")
	errOutdated    = errors.New("status changed while it was being signed")
	errBusy        = errors.New("too many signatures under way")
	errEnding      = errors.New("responder certificate or CA certificate has expired")
)

// presigner keeps every status signed. It is safe for concurrent use.
type presigner struct {
	*queue
	log     *slog.Logger
	metrics *metrics
	live    *semaphore.Weighted
	flights singleflight.Group

	complain rate.Sometimes
}

func newPresigner(now func() time.Time, log *slog.Logger, m *metrics) *presigner {
	return &presigner{queue: newQueue(now), log: log, metrics: m, live: semaphore.NewWeighted(liveSigners), complain: rate.Sometimes{Interval: 10 * time.Second}}
}

// changed asks for the answer to the status that a serial has now.
func (p *presigner) changed(is *issuer, s Serial) {
	if view, ok := is.table.Lookup(s); ok {
		p.enqueue(view.State, job{is, s, hashSHA1})
	}
}

// signMissing asks for every answer of an issuer that is missing: its responder became known.
func (p *presigner) signMissing(is *issuer) {
	revoked, good := is.table.unsigned()
	p.enqueueAll(is, revoked, good)
}

// run signs ahead until ctx ends.
func (p *presigner) run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for b := p.next(); b != nil; b = p.next() {
				began := time.Now()
				p.done(b, p.work(ctx, b.jobs))
				if !b.trailing {
					continue
				}
				select {
				case <-time.After(min(time.Since(began), pause)):
				case <-ctx.Done():
				}
				p.rested()
			}
		})
	}
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.look()
		case <-ctx.Done():
			p.close()
			wg.Wait()
			return nil
		}
	}
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
			return true // signMissing follows once there is one
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
				p.again(err, d.job)
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

// again has a job done again because the key failed: what was revoked as soon as the issuer has rested, the rest in a second.
func (p *presigner) again(err error, j job) {
	if view, ok := j.issuer.table.Lookup(j.serial); ok && view.State == Revoked {
		p.complaint(err, j)
		p.enqueue(Revoked, j)
		return
	}
	p.retry(err, j)
}

// retry has a job done again in a second.
func (p *presigner) retry(err error, j job) {
	p.complaint(err, j)
	p.schedule(p.now().Add(retryAfter).Unix(), j)
}

func (p *presigner) complaint(err error, j job) {
	p.metrics.signFailures.Inc()
	p.complain.Do(func() {
		p.log.Warn("OCSP answers are not signed, trying again", "issuer", j.issuer.name, "serial", j.serial.String(), "err", err)
	})
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
