package hsmsync

import (
	"context"
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"trivet/hsm"
)

const (
	// maxGathering digests of concurrent Sign calls are signed in one go.
	maxGathering = 64
	// gatherFor is how long Sign waits for company while the members are busy with the key.
	gatherFor = time.Millisecond
	// signTimeout bounds Sign, which has no context.
	signTimeout = 5 * time.Second
	// maxOctets bounds the messages of one piece, well below what an agent takes.
	maxOctets = 16 << 10
)

// ErrNoMember says that no member can sign with a key now. It heals by itself once one can.
var ErrNoMember = errors.New("no HSM member can sign")

// Key is a live key of the group, safe for concurrent use. It is a crypto.Signer, and signs batches.
type Key struct {
	group   *Group
	record  hsm.KeyRecord
	public  crypto.PublicKey
	waiting []*piece // of work for which no member is free, guarded by Group.mu

	mu     sync.Mutex // guards what follows: the gathering of concurrent Sign calls
	open   *gathering // takes more digests; nil when nobody waits
	signed int        // gatherings and lone digests being signed now
	// leaving counts lone digests on their way to a member, which does not look busy with them yet.
	leaving int
}

// gathering is the digests of concurrent Sign calls, signed in one go.
type gathering struct {
	digests [][]byte
	done    chan struct{} // closed when sigs and err are set
	sigs    [][]byte
	err     error
}

func newKey(g *Group, record hsm.KeyRecord, public crypto.PublicKey) *Key {
	return &Key{group: g, record: record, public: public}
}

// Record is the key as the manifest has it.
func (k *Key) Record() hsm.KeyRecord { return k.record }

// Public is the manifest's public key. Every signature is verified with it.
func (k *Key) Public() crypto.PublicKey { return k.public }

// Sign signs one digest of the key's own hash (for Ed25519: a message, with hash 0) and returns a signature as hsm.Verify
// takes it; rand is not used. It takes up to 5 s. While the members are busy with the key it waits up to 1 ms for other
// callers, to be signed in one batch with them.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != k.record.Algorithm.Hash() {
		return nil, fmt.Errorf("key %s (%s) signs digests of %s only", k.record.ID, k.record.Algorithm, k.record.Algorithm.Hash())
	}
	if _, pss := opts.(*rsa.PSSOptions); pss {
		return nil, fmt.Errorf("key %s (%s) signs with PKCS #1 v1.5 only", k.record.ID, k.record.Algorithm)
	}
	if err := k.record.Algorithm.CheckDigest(digest); err != nil {
		return nil, err
	}
	k.mu.Lock()
	if k.open == nil && (k.signed == 0 || k.group.idle(k, k.leaving)) { // waiting for company would only cost
		k.signed++
		k.leaving++
		k.mu.Unlock()
		defer k.ended()
		return k.signAlone(digest)
	}
	b := k.open
	if b == nil {
		b = &gathering{done: make(chan struct{})}
		k.open = b
		time.AfterFunc(gatherFor, func() {
			k.mu.Lock()
			defer k.mu.Unlock()
			if k.open == b {
				k.signOpen()
			}
		})
	}
	i := len(b.digests)
	b.digests = append(b.digests, digest)
	if len(b.digests) == maxGathering {
		k.signOpen()
	}
	k.mu.Unlock()
	<-b.done
	if b.err != nil {
		return nil, b.err
	}
	return b.sigs[i], nil
}

func (k *Key) signAlone(digest []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), signTimeout)
	defer cancel()
	left := sync.OnceFunc(func() { k.mu.Lock(); defer k.mu.Unlock(); k.leaving-- })
	defer left()
	sigs, err := k.signBatch(ctx, [][]byte{digest}, left)
	if err != nil {
		return nil, err
	}
	return sigs[0], nil
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
		k.ended()
	}()
}

// ended counts out what was being signed, for which an open gathering may have waited.
func (k *Key) ended() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.signed--
	if k.open != nil {
		k.signOpen()
	}
}

// SignBatch signs digests of the key's own hash, in order: all or an error. They go in pieces to the least busy members
// that hold a verified copy; what a member does not sign in time or signs wrongly, another signs, as long as ctx lasts.
// Every signature returned was verified. The error is ErrNoMember when no member is left to ask, and of class overloaded
// when more digests wait for a member than Config.Queue allows.
func (k *Key) SignBatch(ctx context.Context, digests [][]byte) ([][]byte, error) {
	return k.signBatch(ctx, digests, func() {})
}

// signBatch is SignBatch; left is called when one digest has been handed to a member.
func (k *Key) signBatch(ctx context.Context, digests [][]byte, left func()) ([][]byte, error) {
	for _, d := range digests {
		if err := k.record.Algorithm.CheckDigest(d); err != nil {
			return nil, err
		}
	}
	if len(digests) == 0 {
		return nil, nil
	}
	g := k.group
	pieces, err := g.admit(k, len(digests))
	if err != nil {
		return nil, fmt.Errorf("signing with key %s: %w", k.record.ID, err)
	}
	starts := cut(digests, pieces)
	if len(starts) == 1 {
		a, err := g.hand(ctx, k, len(digests))
		left()
		if err != nil {
			return nil, fmt.Errorf("signing with key %s: %w", k.record.ID, err)
		}
		return k.sign(ctx, a, digests)
	}
	sigs := make([][]byte, len(digests))
	run, ctx := errgroup.WithContext(ctx)
	for i, from := range starts { // handed out in order here, so that they are shared out evenly
		to := len(digests)
		if i+1 < len(starts) {
			to = starts[i+1]
		}
		a, err := g.hand(ctx, k, to-from)
		if err != nil {
			g.dismiss(len(digests) - to)
			run.Go(func() error { return fmt.Errorf("signing with key %s: %w", k.record.ID, err) })
			break
		}
		run.Go(func() error {
			part, err := k.sign(ctx, a, digests[from:to])
			copy(sigs[from:to], part)
			return err
		})
	}
	if err := run.Wait(); err != nil {
		return nil, err
	}
	return sigs, nil
}

// cut says where pieces begin: that many, of equal size or one less towards the end, or more where one would be too long.
func cut(digests [][]byte, pieces int) (starts []int) {
	size, larger := len(digests)/pieces, len(digests)%pieces
	for p, from := 0, 0; p < pieces; p++ {
		to := from + size
		if p < larger {
			to++
		}
		for i, octets := from, 0; i < to; i++ {
			if octets += len(digests[i]); i == from || octets > maxOctets {
				starts, octets = append(starts, i), len(digests[i])
			}
		}
		from = to
	}
	return starts
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
			if hsm.Verify(k.public, digests[i], sigs[i]) != nil {
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
