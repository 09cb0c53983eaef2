// Package journal is a node's own record of what it is about to do and has done: append-only, fsynced, hash-chained, fail-closed. Its fsync is
// the audit record without which nothing is signed (I10), and its records outlive a database that went back (I4).
package journal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// ErrFailed is in the chain of every error of a journal that could not write or fsync once. It is final: the process must end, since after a
// failed fsync nobody knows what the disk holds. The next start reads it and begins a new incarnation.
var ErrFailed = errors.New("journal has failed")

// ErrFull is in the chain of the error of an Append for which the disk has no room. Nothing of that call was written, and the journal goes on: a later
// call may succeed. Intents are refused first; what finishes work that was begun may use the reserve.
var ErrFull = errors.New("journal has no room on its disk")

// ErrClosed is returned by Append after Close.
var ErrClosed = errors.New("journal is closed")

// ErrTooLarge is returned by Append for a payload over MaxPayload. Nothing of that call is written.
var ErrTooLarge = errors.New("journal record is too large")

// Record is what is appended.
type Record struct {
	Kind    Kind
	Payload []byte // JSON of one of this package's types; see New

	known *about // by New
}

// Config says where the journal is and whose.
type Config struct {
	Dir         string           // created if its parent exists
	Node        string           // a journal of another node is refused
	Now         func() time.Time // for the entries' times; default time.Now
	SegmentSize int64            // bytes after which a new file begins; default 64 MiB
	SegmentAge  time.Duration    // after which a new file begins; default 24 h
	Plain       bool             // sealed segments are not compressed
	Reserve     int64            // bytes of disk kept free for finishing what was begun; default 16 MiB, negative: none
	Archive     Archive          // where sealed segments are copied to
	// Drop says of a sealed segment that no record in it is needed any more: the segment is removed, and its index alone stays. With an archive that
	// happens only once it is there. Default: nothing is dropped.
	Drop func(ctx context.Context, s Seal) bool
	Log  *slog.Logger // default slog.Default()

	Metrics prometheus.Registerer // may be nil

	wrap func(file) file // injects faults in tests
	step func(string)    // called before each step of keeping sealed segments, in tests
}

func (c *Config) setDefaults() {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.SegmentSize <= 0 {
		c.SegmentSize = 64 << 20
	}
	if c.SegmentAge <= 0 {
		c.SegmentAge = 24 * time.Hour
	}
	if c.Reserve == 0 {
		c.Reserve = 16 << 20
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.wrap == nil {
		c.wrap = func(f file) file { return f }
	}
	if c.step == nil {
		c.step = func(string) {}
	}
}

// file is what the journal does to a segment.
type file interface {
	io.WriterAt
	Sync() error
	Close() error
}

// Journal is an open journal. It is safe for concurrent use.
type Journal struct {
	cfg         Config
	lock        *os.File
	incarnation [16]byte
	cat         catalog
	room        *room
	keeper      *keeper

	mu     sync.Mutex
	wake   *sync.Cond // queue or closing changed
	queue  []*appending
	closed bool
	err    error // first failure, final
	tip    tip
	tally  *tally // of the segment that is written; changed by commit alone
	fold   *fold  // of everything; changed by commit alone

	failed    chan struct{} // closed with err set
	committed chan struct{} // closed when commit has returned

	// Owned by commit, and by Open before it starts.
	raw    *os.File // of seg
	seg    file
	number uint64
	size   int64
	ended  bool      // seg ends with a seal
	prev   chainHash // of the last record before seg
	hash   chainHash
	next   uint64
	buf    []byte
	index  []byte // of seg, once it ends with a seal
}

// tip is the place up to which everything is durable.
type tip struct {
	number uint64
	size   int64
}

type appending struct {
	recs []Record
	done chan error
	err  error // ErrFull, told by write
}

// maxBatch bounds the bytes of payload that share one fsync, so that a queue of large records cannot stretch it without end.
const maxBatch = 8 << 20

// Incarnation identifies this opening of the journal, and thereby this start of the node.
func (j *Journal) Incarnation() [16]byte { return j.incarnation }

// Failed is closed on the first failure. The process must end then; see ErrFailed.
func (j *Journal) Failed() <-chan struct{} { return j.failed }

// Append writes recs, adjacent and in order, and returns when they are durable. Concurrent calls share one fsync. After an error of the disk this
// and every later call return ErrFailed; the records of this call may or may not be there at the next start. ErrFull is not final.
func (j *Journal) Append(recs ...Record) error {
	for _, r := range recs {
		if len(r.Payload) > MaxPayload {
			return fmt.Errorf("appending to journal: %w: a %s record of %d bytes, at most %d", ErrTooLarge, r.Kind, len(r.Payload), MaxPayload)
		}
		if r.Kind == KindStart || r.Kind == KindSeal || r.Kind == KindCarry {
			return fmt.Errorf("appending to journal: %s records are the journal's own", r.Kind)
		}
		if _, err := r.about(); err != nil {
			return fmt.Errorf("appending to journal: %w", err)
		}
	}
	a := &appending{recs: recs, done: make(chan error, 1)}
	j.mu.Lock()
	switch {
	case j.err != nil:
		defer j.mu.Unlock()
		return fmt.Errorf("appending to journal: %w", j.err)
	case j.closed:
		defer j.mu.Unlock()
		return fmt.Errorf("appending to journal: %w", ErrClosed)
	case len(recs) == 0:
		defer j.mu.Unlock()
		return nil
	}
	j.queue = append(j.queue, a)
	j.wake.Signal()
	j.mu.Unlock()
	if err := <-a.done; err != nil {
		return fmt.Errorf("appending to journal: %w", err)
	}
	return nil
}

// commit writes batch after batch until the journal is closed and drained, or has failed.
func (j *Journal) commit() {
	defer close(j.committed)
	for {
		batch := j.take()
		if batch == nil {
			return
		}
		if err := j.write(batch); err != nil {
			j.fail(err, batch)
			return
		}
		for _, a := range batch {
			a.done <- a.err
		}
	}
}

// take waits for work and takes what is waiting, up to maxBatch. It returns nil when the journal is closed and nothing is left.
func (j *Journal) take() []*appending {
	j.mu.Lock()
	defer j.mu.Unlock()
	for len(j.queue) == 0 {
		if j.closed {
			return nil
		}
		j.wake.Wait()
	}
	n, size := 0, 0
	for n < len(j.queue) && (n == 0 || size < maxBatch) {
		for _, r := range j.queue[n].recs {
			size += len(r.Payload)
		}
		n++
	}
	batch := j.queue[:n:n]
	j.queue = j.queue[n:]
	return batch
}

func (j *Journal) fail(cause error, batch []*appending) {
	err := fmt.Errorf("%w: %w", ErrFailed, cause)
	j.mu.Lock()
	j.err = err
	batch = append(batch, j.queue...)
	j.queue = nil
	j.mu.Unlock()
	j.cfg.Log.Error("journal has failed, this process must end", "dir", j.cfg.Dir, "err", cause)
	close(j.failed)
	for _, a := range batch {
		a.done <- err
	}
}

// Close makes what was appended durable and gives the journal up. Appends that come later fail with ErrClosed.
func (j *Journal) Close() error {
	j.mu.Lock()
	if j.closed {
		j.mu.Unlock()
		<-j.committed
		return nil
	}
	j.closed = true
	j.wake.Signal()
	j.mu.Unlock()
	<-j.committed
	j.keeper.stop()
	j.mu.Lock()
	defer j.mu.Unlock()
	err := j.err
	if err == nil {
		j.room.release(j.raw, j.size)
	}
	if e := j.seg.Close(); err == nil && e != nil {
		err = e
	}
	j.room.close()
	j.lock.Close() // releases the flock
	if err != nil {
		return fmt.Errorf("closing journal: %w", err)
	}
	return nil
}
