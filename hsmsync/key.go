package hsmsync

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"trivet/hsm"
)

const (
	// maxBatch digests go to a member at once: enough to make the round trip cheap, few enough to lose little when the
	// member dies over them.
	maxBatch = 64
	// gatherFor is how long Sign waits for company while the key is busy.
	gatherFor = time.Millisecond
	// signTimeout bounds Sign, which has no context.
	signTimeout = 5 * time.Second
	// breath is taken between two rounds through all members.
	breath = 20 * time.Millisecond
)

// ErrNoMember says that no member can sign with a key now. It heals by itself once one can.
var ErrNoMember = errors.New("no HSM member can sign")

// Key is a live key of the group, safe for concurrent use. It is a crypto.Signer, and signs batches.
type Key struct {
	group  *Group
	record hsm.KeyRecord
	public *ecdsa.PublicKey

	mu     sync.Mutex // guards what follows: the gathering of concurrent Sign calls
	open   *gathering // takes more digests; nil when nobody waits
	signed int        // gatherings being signed now
}

// gathering is the digests of concurrent Sign calls, signed in one go.
type gathering struct {
	digests [][]byte
	done    chan struct{} // closed when sigs and err are set
	sigs    [][]byte
	err     error
}

// Record is the key as the manifest has it.
func (k *Key) Record() hsm.KeyRecord { return k.record }

// Public is the manifest's public key, an *ecdsa.PublicKey. Every signature is verified with it.
func (k *Key) Public() crypto.PublicKey { return k.public }

// Sign signs one SHA-256 digest and returns the ASN.1 signature; rand is not used. It takes up to 5 s. While other
// signatures with the key are under way it waits up to 1 ms for other callers, to be signed in one batch with them.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 {
		return nil, fmt.Errorf("key %s signs SHA-256 digests only", k.record.ID)
	}
	if err := checkDigest(digest); err != nil {
		return nil, err
	}
	k.mu.Lock()
	b := k.open
	if b == nil {
		b = &gathering{done: make(chan struct{})}
		k.open = b
		if k.signed > 0 {
			time.AfterFunc(gatherFor, func() {
				k.mu.Lock()
				defer k.mu.Unlock()
				if k.open == b {
					k.signOpen()
				}
			})
		}
	}
	i := len(b.digests)
	b.digests = append(b.digests, digest)
	if k.signed == 0 || len(b.digests) == maxBatch {
		k.signOpen()
	}
	k.mu.Unlock()
	<-b.done
	if b.err != nil {
		return nil, b.err
	}
	return b.sigs[i], nil
}

// signOpen closes the open gathering and has it signed. The caller holds k.mu.
func (k *Key) signOpen() {
	b := k.open
	k.open = nil
	k.signed++
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), signTimeout)
		defer cancel()
		b.sigs, b.err = k.SignBatch(ctx, b.digests)
		close(b.done)
		k.mu.Lock()
		defer k.mu.Unlock()
		k.signed--
		if k.open != nil {
			k.signOpen() // no need for those to wait longer: this was what they waited for
		}
	}()
}

// SignBatch signs SHA-256 digests, in order: all or an error. Digests go to the least busy members that hold a verified
// copy, 64 at a time; what a member does not sign in time or signs wrongly, another signs, as long as ctx lasts. Every
// signature returned was verified. The error is ErrNoMember when no member is left to ask.
func (k *Key) SignBatch(ctx context.Context, digests [][]byte) ([][]byte, error) {
	for _, d := range digests {
		if err := checkDigest(d); err != nil {
			return nil, err
		}
	}
	if len(digests) <= maxBatch {
		return k.signChunk(ctx, digests)
	}
	sigs := make([][]byte, len(digests))
	run, ctx := errgroup.WithContext(ctx)
	run.SetLimit(2 * len(k.group.members))
	for from := 0; from < len(digests); from += maxBatch {
		to := min(from+maxBatch, len(digests))
		run.Go(func() error {
			part, err := k.signChunk(ctx, digests[from:to])
			copy(sigs[from:to], part)
			return err
		})
	}
	if err := run.Wait(); err != nil {
		return nil, err
	}
	return sigs, nil
}

func checkDigest(d []byte) error {
	if len(d) != hsm.DigestSize {
		return fmt.Errorf("digest of %d octets: a SHA-256 digest has %d", len(d), hsm.DigestSize)
	}
	return nil
}

// signChunk goes through the members, best first, and through all of them again as long as one may recover.
func (k *Key) signChunk(ctx context.Context, digests [][]byte) ([][]byte, error) {
	if len(digests) == 0 {
		return nil, nil
	}
	g := k.group
	tried := map[*member]bool{}
	var last error
	again := false // some failure of this round may be gone in the next
	for {
		m := g.pick(k, tried, len(digests))
		switch {
		case m != nil:
		case len(tried) == 0:
			g.mu.Lock()
			err := g.noMember(k)
			g.mu.Unlock()
			if last != nil {
				err = fmt.Errorf("%w; last failure: %w", err, last)
			}
			return nil, err
		case !again:
			return nil, fmt.Errorf("signing with key %s: %w", k.record.ID, last)
		default: // everyone was asked once
			clear(tried)
			again = false
			if !sleep(ctx, breath, nil) {
				return nil, fmt.Errorf("signing with key %s: %w; last failure: %w", k.record.ID, ctx.Err(), last)
			}
			continue
		}
		tried[m] = true
		sigs, err := g.attempt(ctx, m, k, digests)
		if err == nil {
			return sigs, nil
		}
		last = fmt.Errorf("member %s: %w", m.Name, err)
		switch hsm.ClassOf(err) {
		case hsm.ClassRequest:
			return nil, fmt.Errorf("signing with key %s: %w", k.record.ID, last)
		case hsm.ClassDenied, hsm.ClassNotFound:
		default:
			again = true
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("signing with key %s: %w; last failure: %w", k.record.ID, ctx.Err(), last)
		}
	}
}

// pick chooses the least busy good member that has proved the key and was not tried, and charges it with n digests. A
// suspect is asked when no good one is left: late is better than never, and its signature is verified like any.
func (g *Group) pick(k *Key, tried map[*member]bool, n int) *member {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.keys[k.record.ID] != k {
		return nil // no longer live
	}
	g.turn++
	var best *member
	for i := range g.members {
		m := g.members[(g.turn+i)%len(g.members)]
		if tried[m] || m.quarantine != "" || !m.proved(k.record.ID) || (m.health != healthGood && m.health != healthSuspect) {
			continue
		}
		if best == nil || m.health < best.health || (m.health == best.health && m.inflight < best.inflight) {
			best = m
		}
	}
	if best != nil {
		best.inflight += n
	}
	return best
}

// attempt has m sign digests, within the attempt's own deadline, and verifies the result. It returns when the deadline
// has passed even if the agent does not; what that answers later is dropped.
func (g *Group) attempt(ctx context.Context, m *member, k *Key, digests [][]byte) ([][]byte, error) {
	type answer struct {
		sigs [][]byte
		err  error
	}
	limit := g.cfg.Attempt + time.Duration(len(digests)-1)*perDigest
	actx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	answers := make(chan answer, 1)
	go func() {
		sigs, err := m.agent.Sign(actx, k.record.ID, digests)
		g.mu.Lock()
		m.inflight -= len(digests)
		g.mu.Unlock()
		answers <- answer{sigs, err}
	}()
	var a answer
	select {
	case a = <-answers:
	case <-actx.Done():
		a.err = &hsm.Error{Class: hsm.ClassDevice, Op: "sign", Err: fmt.Errorf("no answer within %v: %w", limit, actx.Err())}
	}
	if a.err == nil {
		g.metrics.sign.WithLabelValues(m.Name).Observe(time.Since(began).Seconds())
		if bad := k.verify(digests, a.sigs); bad != "" {
			g.mu.Lock()
			g.quarantined(m, fmt.Sprintf("key %s (%s): %s", k.record.ID, k.record.Label, bad))
			g.mu.Unlock()
			g.metrics.failovers.WithLabelValues(m.Name, "bad-signature").Inc()
			return nil, &hsm.Error{Class: hsm.ClassDevice, Op: "sign", Err: errors.New(bad)}
		}
		return a.sigs, nil
	}
	if ctx.Err() != nil {
		return nil, a.err // the caller's end is no fault of the member's
	}
	if c := hsm.ClassOf(a.err); c != hsm.ClassRequest {
		g.metrics.failovers.WithLabelValues(m.Name, c.String()).Inc()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if hsm.ClassOf(a.err) == hsm.ClassNotFound {
		m.proofs[k.record.ID] = proof{try: time.Now(), err: a.err.Error()}
		m.demandProofs()
	}
	g.judge(m, a.err)
	return nil, a.err
}

// verify says what is wrong with the signatures, or nothing. Verifying costs more than an HSM's answer takes to arrive,
// so the cores share it.
func (k *Key) verify(digests, sigs [][]byte) string {
	if len(sigs) != len(digests) {
		return fmt.Sprintf("answered %d digests with %d signatures", len(digests), len(sigs))
	}
	var wrong atomic.Bool
	check := func(from, step int) {
		for i := from; i < len(digests) && !wrong.Load(); i += step {
			if !ecdsa.VerifyASN1(k.public, digests[i], sigs[i]) {
				wrong.Store(true)
			}
		}
	}
	var others sync.WaitGroup
	step := min(runtime.GOMAXPROCS(0), len(digests))
	for from := 1; from < step; from++ {
		others.Go(func() { check(from, step) })
	}
	check(0, step)
	others.Wait()
	if wrong.Load() {
		return "signature does not verify with the manifest's public key"
	}
	return ""
}

// noMember is ErrNoMember with every member's state. The caller holds mu.
func (g *Group) noMember(k *Key) error {
	if s := g.manifest[k.record.ID].State; s != StateLive {
		return fmt.Errorf("%w with key %s (%s): it is %s", ErrNoMember, k.record.ID, k.record.Label, s)
	}
	var states []string
	for _, m := range g.members {
		s := m.Name + " " + g.state(m)
		if cause := m.why(k.record.ID); cause != "" {
			s += " (" + cause + ")"
		}
		states = append(states, s)
	}
	return fmt.Errorf("%w with key %s (%s): %s", ErrNoMember, k.record.ID, k.record.Label, strings.Join(states, "; "))
}

// why says why the member does not sign with a key, if anything is known. The caller holds mu.
func (m *member) why(id hsm.KeyID) string {
	switch p := m.proofs[id]; {
	case m.quarantine != "":
		return m.quarantine
	case m.cause != "":
		return m.cause
	case p.err != "":
		return p.err
	case p.at.IsZero():
		return "key not proved yet"
	}
	return ""
}
