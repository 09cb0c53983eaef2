// Package journal is a node's own record of what it is about to do and has done: append-only, fsynced, hash-chained, fail-closed. Its fsync is
// the audit record without which nothing is signed (I10), and its records outlive a database that went back (I4).
package journal

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrFailed is in the chain of every error of a journal that could not write or fsync once. It is final: the process must end, since after a
// failed fsync nobody knows what the disk holds. The next start reads it and begins a new incarnation.
var ErrFailed = errors.New("journal has failed")

// ErrClosed is returned by Append after Close.
var ErrClosed = errors.New("journal is closed")

// ErrTooLarge is returned by Append for a payload over MaxPayload. Nothing of that call is written.
var ErrTooLarge = errors.New("journal record is too large")

// Record is what is appended.
type Record struct {
	Kind    Kind
	Payload []byte // JSON of one of this package's types; see New
}

// Config says where the journal is and whose.
type Config struct {
	Dir         string           // created if its parent exists
	Node        string           // a journal of another node is refused
	Now         func() time.Time // for the entries' times; default time.Now
	SegmentSize int64            // bytes after which a new file begins; default 64 MiB
	Log         *slog.Logger     // default slog.Default()

	wrap func(file) file // injects faults in tests
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

	mu     sync.Mutex
	wake   *sync.Cond // queue or closing changed
	queue  []*appending
	closed bool
	err    error // first failure, final
	tip    tip

	failed    chan struct{} // closed with err set
	committed chan struct{} // closed when commit has returned

	// Owned by commit, and by Open before it starts.
	seg    file
	number uint64
	size   int64
	hash   chainHash
	next   uint64
	buf    []byte
}

// tip is the place up to which everything is durable.
type tip struct {
	number uint64
	size   int64
}

type appending struct {
	recs []Record
	done chan error
}

// maxBatch bounds the bytes of payload that share one fsync, so that a queue of large records cannot stretch it without end.
const maxBatch = 8 << 20

// Open takes the journal for this process and verifies all of it. A torn tail (an unfinished write at the very end) is cut; anything else that
// is wrong is ErrCorrupt, and the journal is left as it is. Then a new incarnation begins. A second process is refused.
func Open(cfg Config) (*Journal, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.SegmentSize <= 0 {
		cfg.SegmentSize = 64 << 20
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.wrap == nil {
		cfg.wrap = func(f file) file { return f }
	}
	if cfg.Dir == "" || cfg.Node == "" {
		return nil, errors.New("opening journal: directory and node must be given")
	}
	if err := makeDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("opening journal: %w", err)
	}
	lock, err := takeLock(filepath.Join(cfg.Dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("opening journal: %w", err)
	}
	j := &Journal{cfg: cfg, lock: lock, failed: make(chan struct{}), committed: make(chan struct{})}
	j.wake = sync.NewCond(&j.mu)
	if err := j.open(); err != nil {
		if j.seg != nil {
			j.seg.Close()
		}
		lock.Close()
		return nil, fmt.Errorf("opening journal %s: %w", cfg.Dir, err)
	}
	go j.commit()
	return j, nil
}

func (j *Journal) open() error {
	numbers, err := segments(j.cfg.Dir)
	if err != nil {
		return err
	}
	var c cursor
	var cut int64
	for i, number := range numbers {
		path := filepath.Join(j.cfg.Dir, segmentName(number))
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		end, torn, err := c.segment(number, data, 0, j.checkOwner)
		if err == nil && torn != "" && i < len(numbers)-1 {
			err = fmt.Errorf("%w: at byte %d: %s, with a segment after it", ErrCorrupt, end, torn)
		}
		if err != nil && !errors.Is(err, ErrCorrupt) {
			return err
		}
		if err != nil {
			return fmt.Errorf("%s: %w; the node must not start on it: restore the file, or replace the node and keep this directory as evidence", path, err)
		}
		if torn != "" {
			cut = int64(len(data) - end)
			j.cfg.Log.Warn("journal has a torn tail, cutting it", "file", path, "at", end, "bytes", cut, "why", torn)
		}
		if i == len(numbers)-1 {
			if err := j.resume(path, number, data[:end], &c, torn != ""); err != nil {
				return err
			}
		}
	}
	j.hash = c.hash
	if j.seg == nil {
		if err := j.newSegment(1); err != nil {
			return err
		}
	}
	if _, err := rand.Read(j.incarnation[:]); err != nil {
		return err
	}
	start, err := New(Start{Node: j.cfg.Node, Incarnation: hex.EncodeToString(j.incarnation[:]), Time: j.cfg.Now().UTC(), Cut: cut})
	if err != nil {
		return err
	}
	return j.write([]*appending{{recs: []Record{start}}})
}

// checkOwner refuses a journal that another node began.
func (j *Journal) checkOwner(e Entry) error {
	if e.Kind != KindStart {
		return nil
	}
	var s Start
	if err := e.Decode(&s); err != nil {
		return err
	}
	if s.Node != j.cfg.Node {
		return fmt.Errorf("journal is of node %q, this is %q: check the configuration", s.Node, j.cfg.Node)
	}
	return nil
}

// resume goes on in the last segment, whose good bytes are data. Its last batch is written again: if the process before ended because fsync
// had failed, the batch may be in the page cache alone, and only a new write brings it to the disk.
func (j *Journal) resume(path string, number uint64, data []byte, c *cursor, torn bool) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	j.seg, j.number, j.size = j.cfg.wrap(f), number, int64(len(data))
	if torn {
		if err := f.Truncate(j.size); err != nil {
			return fmt.Errorf("cutting the torn tail: %w", err)
		}
	}
	from := min(c.lastBatch, len(data))
	if len(data) == 0 { // not even the header was whole
		data, from = appendHeader(nil, number, c.hash), 0
		c.hash, j.size = chainHash(data[headerSize-hashSize:]), headerSize
	} else if len(data) == headerSize {
		from = 0
	}
	if _, err := j.seg.WriteAt(data[from:], int64(from)); err != nil {
		return fmt.Errorf("writing the last batch again: %w", err)
	}
	if err := j.seg.Sync(); err != nil {
		return fmt.Errorf("writing the last batch again: %w", err)
	}
	return syncDir(j.cfg.Dir)
}

// newSegment makes the next file and its header durable before any record is written to it.
func (j *Journal) newSegment(number uint64) error {
	f, err := os.OpenFile(filepath.Join(j.cfg.Dir, segmentName(number)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("beginning a segment: %w", err)
	}
	seg := j.cfg.wrap(f)
	header := appendHeader(nil, number, j.hash)
	if _, err = seg.WriteAt(header, 0); err == nil {
		if err = seg.Sync(); err == nil {
			err = syncDir(j.cfg.Dir)
		}
	}
	if err != nil {
		seg.Close()
		return fmt.Errorf("beginning a segment: %w", err)
	}
	if j.seg != nil {
		j.seg.Close() // all of it is durable; an error here could not change that
	}
	j.seg, j.number, j.size, j.hash = seg, number, headerSize, chainHash(header[headerSize-hashSize:])
	return nil
}

// Incarnation identifies this opening of the journal, and thereby this start of the node.
func (j *Journal) Incarnation() [16]byte { return j.incarnation }

// Failed is closed on the first failure. The process must end then; see ErrFailed.
func (j *Journal) Failed() <-chan struct{} { return j.failed }

// Append writes recs, adjacent and in order, and returns when they are durable. Concurrent calls share one fsync. After an error of the disk this
// and every later call return ErrFailed; the records of this call may or may not be there at the next start.
func (j *Journal) Append(recs ...Record) error {
	for _, r := range recs {
		if len(r.Payload) > MaxPayload {
			return fmt.Errorf("appending to journal: %w: a %s record of %d bytes, at most %d", ErrTooLarge, r.Kind, len(r.Payload), MaxPayload)
		}
		if r.Kind == KindStart {
			return errors.New("appending to journal: start records are the journal's own")
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
			a.done <- nil
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

// write makes batch durable: one write, one fsync.
func (j *Journal) write(batch []*appending) error {
	if j.size >= j.cfg.SegmentSize {
		if err := j.newSegment(j.number + 1); err != nil {
			return err
		}
	}
	buf, hash, next := j.buf[:0], j.hash, j.next
	now := j.cfg.Now()
	for _, a := range batch {
		for _, r := range a.recs {
			buf, hash = appendFrame(buf, Entry{Incarnation: j.incarnation, Offset: next, Time: now, Record: r}, uint64(j.size), hash)
			next++
		}
	}
	if _, err := j.seg.WriteAt(buf, j.size); err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	if err := j.seg.Sync(); err != nil {
		return fmt.Errorf("fsync: %w", err)
	}
	j.size += int64(len(buf))
	j.hash, j.next = hash, next
	if cap(buf) <= 1<<20 { // keep the buffer, but not that of an exceptional batch
		j.buf = buf[:0]
	}
	j.mu.Lock()
	j.tip = tip{number: j.number, size: j.size}
	j.mu.Unlock()
	return nil
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

// Replay calls fn with every record durable when it is called, of all incarnations, oldest first. Appending may go on meanwhile. An error of fn
// ends it at once. An entry's payload may be kept.
func (j *Journal) Replay(fn func(Entry) error) error {
	j.mu.Lock()
	tip := j.tip
	j.mu.Unlock()
	var c cursor
	for number := uint64(1); number <= tip.number; number++ {
		path := filepath.Join(j.cfg.Dir, segmentName(number))
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("replaying journal: %w", err)
		}
		if number == tip.number {
			if int64(len(data)) < tip.size {
				return fmt.Errorf("replaying journal %s: %w: shorter than what was written", path, ErrCorrupt)
			}
			data = data[:tip.size]
		}
		end, torn, err := c.segment(number, data, 0, fn)
		if err == nil && torn != "" {
			err = fmt.Errorf("%w: at byte %d: %s", ErrCorrupt, end, torn)
		}
		if err != nil {
			return fmt.Errorf("replaying journal %s: %w", path, err)
		}
	}
	return nil
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
	j.mu.Lock()
	defer j.mu.Unlock()
	err := j.err
	if e := j.seg.Close(); err == nil && e != nil {
		err = e
	}
	j.lock.Close() // releases the flock
	if err != nil {
		return fmt.Errorf("closing journal: %w", err)
	}
	return nil
}

// makeDir creates dir durably, but not its parents: a mistyped path must not become an empty journal somewhere.
func makeDir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("fsync of directory: %w", err)
	}
	return nil
}

func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another process has it open (lock %s)", path)
		}
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return f, nil
}
