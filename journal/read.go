package journal

import (
	"errors"
	"fmt"
	"path/filepath"
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

// ErrArchived is in the chain of every error that says that records which are asked for are not in this directory any more.
var ErrArchived = errors.New("the segment is in the archive and not here any more")

// ErrNoPlace is returned by Select for a Query.From that the journal does not hold.
var ErrNoPlace = errors.New("the journal holds no such record")

// Place names one record for ever.
type Place struct {
	Incarnation [16]byte
	Offset      uint64
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

// jump goes behind a sealed segment without reading it.
func (c *cursor) jump(s *sealed) {
	c.hash, c.incarnation, c.next, c.started = s.hash, s.entry.Incarnation, s.entry.Offset+1, true
}

// ReadDir calls fn with every record in dir, oldest first, verifying the whole chain; segments that are in the archive alone are passed over. It changes nothing and takes no lock: a live writer's
// directory may be read, and a torn tail, or a tail still being written, ends the reading without an error. An error of fn ends it at once.
// An entry's payload may be kept.
func ReadDir(dir string, fn func(Entry) error) error {
	c := catalog{dir: dir}
	if err := c.scan(); err != nil {
		return err
	}
	return c.walk(nil, nil, fn)
}

// walk calls fn with the records that q selects, oldest first. Without q that is every record that is here. It ends at tip, or without one at the
// end, which a live writer may move meanwhile.
func (c *catalog) walk(q *Query, tip *tip, fn func(Entry) error) error {
	var cur cursor
	reached := q == nil || q.From == nil
	visit := fn
	if q != nil {
		visit = func(e Entry) error {
			if !reached {
				reached = Place{e.Incarnation, e.Offset} == *q.From
				return nil
			}
			if ok, err := q.wants(e); err != nil || !ok {
				return err
			}
			return fn(e)
		}
	}
	for number := uint64(1); ; number++ {
		segments := c.all()
		if number > uint64(len(segments)) || tip != nil && number > tip.number {
			break
		}
		s := &segments[number-1]
		if err := c.know(s); err != nil {
			return fmt.Errorf("reading journal: %w", err)
		}
		if s.seal != nil && (s.gone() || (q == nil || q.Here) && !s.here() && c.archive == "" || q != nil && (reached && !s.seal.mayHold(q) || !reached && !s.seal.holds(*q.From))) {
			cur.jump(s.seal)
			continue
		}
		err := c.read(s, &cur, tip, visit)
		if errors.Is(err, ErrArchived) && s.seal != nil {
			if now := c.all()[number-1]; now.dropped && !now.archived { // since it was looked at
				cur.jump(s.seal)
				continue
			}
		}
		if err != nil {
			return fmt.Errorf("reading journal %s: %w", filepath.Join(c.dir, segmentName(number)), err)
		}
	}
	if !reached {
		return ErrNoPlace
	}
	return nil
}

// read walks one segment.
func (c *catalog) read(s *segment, cur *cursor, tip *tip, fn func(Entry) error) error {
	data, err := c.load(s)
	if err != nil {
		return err
	}
	open := s.seal == nil && (tip == nil || s.number == tip.number) // its end is not known yet
	if open && tip != nil {
		if int64(len(data)) < tip.size {
			return fmt.Errorf("%w: shorter than what was written", ErrCorrupt)
		}
		data, open = data[:tip.size], false
	}
	end, torn, err := cur.segment(s.number, data, 0, fn)
	if err == nil && open {
		if err := c.scan(); err != nil {
			return err
		}
		if s.number == uint64(len(c.all())) {
			return nil
		}
		// There is a next segment, so this one is complete now. A live writer may have finished it after it was read above.
		if data, err = c.load(s); err == nil {
			end, torn, err = cur.segment(s.number, data, end, fn)
		}
	}
	switch {
	case err != nil:
		return err
	case torn != "":
		return fmt.Errorf("%w: at byte %d: %s, with a segment after it", ErrCorrupt, end, torn)
	case s.seal != nil && cur.hash != s.seal.hash:
		return fmt.Errorf("%w: it does not end as its index says", ErrCorrupt)
	}
	return nil
}
