package history

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Log writes a history to a file. Lines stand in the order of their Mono. A nil *Log records nothing, so that clients need not ask whether there is one.
// It is safe for concurrent use.
type Log struct {
	path  string
	began time.Time

	mu   sync.Mutex // guards all below
	f    *os.File
	w    *bufio.Writer
	enc  *json.Encoder
	ops  uint64
	seen map[digest]bool // bytes that the file has already
	err  error           // the first write that failed
}

// Create begins a history in a new file.
func Create(path string) (*Log, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, fmt.Errorf("beginning a history: %w", err)
	}
	w := bufio.NewWriterSize(f, 1<<16)
	return &Log{path: path, began: time.Now(), f: f, w: w, enc: json.NewEncoder(w), seen: map[digest]bool{}}, nil
}

// Path is the file's.
func (l *Log) Path() string { return l.path }

// Pending is an operation that was invoked and has not returned.
type Pending struct {
	l    *Log
	op   uint64
	kind Kind
}

// Begin records that an operation is about to be sent. Kind must be set.
func (l *Log) Begin(e Event) Pending {
	if l == nil {
		return Pending{}
	}
	e.Phase = Invoke
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ops++
	e.Op = l.ops
	l.write(e)
	return Pending{l, e.Op, e.Kind}
}

// End records how the operation returned. Outcome must be set; Digest is filled in from Bytes.
func (p Pending) End(e Event) {
	if p.l == nil {
		return
	}
	l := p.l
	e.Phase, e.Op, e.Kind = Return, p.op, p.kind
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.Bytes != nil {
		d := digest(sha256.Sum256(e.Bytes))
		e.Digest = hex.EncodeToString(d[:])
		if l.seen[d] {
			e.Bytes = nil
		}
		l.seen[d] = true
	}
	l.write(e)
}

func (l *Log) write(e Event) {
	now := time.Now() // under the lock: the order of lines is the order of times
	e.Wall, e.Mono = now.UTC(), now.Sub(l.began).Nanoseconds()
	if err := l.enc.Encode(e); err != nil && l.err == nil {
		l.err = fmt.Errorf("writing the history: %w", err)
	}
}

// Flush makes the file hold all that was recorded so far. It returns the first error of any writing.
func (l *Log) Flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.err, l.w.Flush())
}

// Close ends the history.
func (l *Log) Close() error {
	return errors.Join(l.Flush(), l.f.Close())
}

// maxLine is the longest line that is read: a CRL of some 100,000 entries in base64.
const maxLine = 64 << 20

// scan calls fn with every event of a history and the place of its line in the file. A last line that was cut off is left out: its process was killed.
func scan(path string, fn func(Event, int64) error) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("reading the history: %w", err)
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<16)
	for at := int64(0); ; {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the history: %w", err)
		}
		if len(line) > maxLine {
			return fmt.Errorf("reading the history: the line at byte %d has %d octets", at, len(line))
		}
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("reading the history: the line at byte %d: %w", at, err)
		}
		if err := fn(e, at); err != nil {
			return err
		}
		at += int64(len(line))
	}
}

// eventAt reads the one line at that place.
func eventAt(path string, at int64) (Event, error) {
	f, err := os.Open(path)
	if err != nil {
		return Event{}, err
	}
	defer f.Close()
	if _, err := f.Seek(at, io.SeekStart); err != nil {
		return Event{}, err
	}
	var e Event
	err = json.NewDecoder(f).Decode(&e)
	return e, err
}
