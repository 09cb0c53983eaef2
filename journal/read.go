package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
)

// Entry is a record in its place.
type Entry struct {
	Incarnation [16]byte  // the start of the process that wrote it
	Offset      uint64    // number of the record in its incarnation; 0 is KindStart
	Time        time.Time // the writer's clock; orders nothing
	Record
}

// ErrCorrupt is in the chain of every error that says the journal does not hold what was once durable.
var ErrCorrupt = errors.New("journal is damaged")

const suffix = ".journal"

func segmentName(number uint64) string { return fmt.Sprintf("%010d%s", number, suffix) }

// segments lists the segment numbers in dir. They must run from 1 without a gap.
func segments(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading journal: %w", err)
	}
	var numbers []uint64
	for _, e := range entries {
		base, ok := strings.CutSuffix(e.Name(), suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(base, 10, 64)
		if err != nil || segmentName(n) != e.Name() {
			return nil, fmt.Errorf("reading journal: %s is not a segment's name: move it away", filepath.Join(dir, e.Name()))
		}
		numbers = append(numbers, n)
	}
	sort.Slice(numbers, func(i, j int) bool { return numbers[i] < numbers[j] })
	for i, n := range numbers {
		if n != uint64(i)+1 {
			return nil, fmt.Errorf("reading journal: %w: segment %s is missing: restore it", ErrCorrupt, filepath.Join(dir, segmentName(uint64(i)+1)))
		}
	}
	return numbers, nil
}

// cursor follows the chain from frame to frame and from segment to segment.
type cursor struct {
	hash        chainHash // of the last frame or header
	incarnation [16]byte
	next        uint64 // offset of the next record of incarnation
	started     bool   // some record was read
	lastBatch   int    // position of the last batch in the segment read last
}

// segment walks the frames in data, which is the segment number, from position from (0: the header too). It returns the position behind the
// last good frame. If that is not the end, torn says what is wrong there, and err is nil when it can only be a write that never was durable.
func (c *cursor) segment(number uint64, data []byte, from int, fn func(Entry) error) (end int, torn string, err error) {
	if from == 0 {
		h, err := parseHeader(data, number, c.hash)
		if err != nil {
			if len(data) <= headerSize && !errors.Is(err, errForeign) {
				return 0, err.Error(), nil // it is fsynced before the first frame is written
			}
			return 0, "", fmt.Errorf("%w: at byte 0: %w", ErrCorrupt, err)
		}
		c.hash, from, c.lastBatch = h, headerSize, headerSize
	}
	for pos := from; ; {
		if pos == len(data) {
			return pos, "", nil
		}
		f, size, err := parseFrame(data[pos:])
		if err != nil {
			if later, ok := laterBatch(data, pos); ok {
				return pos, "", fmt.Errorf("%w: at byte %d: %w, with a record at byte %d that was written later", ErrCorrupt, pos, err, later)
			}
			return pos, err.Error(), nil
		}
		if !f.chained(data[pos:pos+size], c.hash) {
			if later, ok := laterBatch(data, pos); ok {
				return pos, "", fmt.Errorf("%w: at byte %d: the hash chain breaks, with a record at byte %d that was written later", ErrCorrupt, pos, later)
			}
			return pos, "the hash chain breaks", nil
		}
		if err := c.follow(f.Entry); err != nil {
			return pos, "", fmt.Errorf("%w: at byte %d: %w", ErrCorrupt, pos, err)
		}
		if fn != nil {
			if err := fn(f.Entry); err != nil {
				return pos, "", err
			}
		}
		c.hash, c.lastBatch = f.hash, int(f.batch)
		pos += size
	}
}

// follow checks that e comes next: the following offset, or the start of a new incarnation.
func (c *cursor) follow(e Entry) error {
	switch {
	case e.Offset == 0 && e.Kind == KindStart && (!c.started || e.Incarnation != c.incarnation):
		c.incarnation, c.next, c.started = e.Incarnation, 1, true
		return nil
	case c.started && e.Incarnation == c.incarnation && e.Offset == c.next && e.Kind != KindStart:
		c.next++
		return nil
	}
	return fmt.Errorf("record %d of incarnation %x does not follow record %d of %x", e.Offset, e.Incarnation, int64(c.next)-1, c.incarnation)
}

// ReadDir calls fn with every record in dir, oldest first, verifying the whole chain. It changes nothing and takes no lock: a live writer's
// directory may be read, and a torn tail, or a tail still being written, ends the reading without an error. An error of fn ends it at once.
// An entry's payload may be kept.
func ReadDir(dir string, fn func(Entry) error) error {
	var c cursor
	for number := uint64(1); ; number++ {
		numbers, err := segments(dir)
		if err != nil {
			return err
		}
		if number > uint64(len(numbers)) {
			return nil
		}
		path := filepath.Join(dir, segmentName(number))
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("reading journal: %w", err)
		}
		end, torn, err := c.segment(number, data, 0, fn)
		if err != nil {
			return fmt.Errorf("reading journal %s: %w", path, err)
		}
		if numbers, err = segments(dir); err != nil {
			return err
		}
		if number == uint64(len(numbers)) {
			return nil
		}
		// There is a next segment, so this one is complete now. A live writer may have finished it after it was read above.
		if info, err := os.Stat(path); err == nil && torn == "" && info.Size() == int64(len(data)) {
			continue
		}
		if data, err = os.ReadFile(path); err != nil {
			return fmt.Errorf("reading journal: %w", err)
		}
		if end, torn, err = c.segment(number, data, end, fn); err == nil && torn != "" {
			err = fmt.Errorf("%w: at byte %d: %s, with a segment after it", ErrCorrupt, end, torn)
		}
		if err != nil {
			return fmt.Errorf("reading journal %s: %w", path, err)
		}
	}
}
