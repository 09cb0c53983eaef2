package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// write makes batch durable: one write, one fsync. What the disk has no room for is refused before anything is written: that is in the err of
// each. Its own error is final.
func (j *Journal) write(batch []*appending) error {
	now := j.cfg.Now()
	if j.due(now) {
		if err := j.roll(now); err != nil && !errors.Is(err, ErrFull) {
			return err
		} else if j.ended {
			refuse(batch, err)
			return nil
		}
	}
	recs, err := j.admit(batch)
	if err != nil || len(recs) == 0 {
		return err
	}
	_, err = j.put(recs, now)
	return err
}

func refuse(batch []*appending, err error) {
	for _, a := range batch {
		a.err = err
	}
}

// admit secures room for batch and returns its records. Without enough it refuses the intents, and then the rest.
func (j *Journal) admit(batch []*appending) ([]Record, error) {
	for _, fresh := range []bool{true, false} {
		var recs []Record
		var size int64
		some := false
		for _, a := range batch {
			if a.err == nil {
				recs = append(recs, a.recs...)
				size += sizeOf(a.recs)
				some = some || isFresh(a.recs)
			}
		}
		if len(recs) == 0 {
			return nil, nil
		}
		err := j.room.secure(j.raw, j.size, size, fresh && some)
		if err == nil {
			return recs, nil
		}
		if !errors.Is(err, ErrFull) {
			return nil, err
		}
		for _, a := range batch {
			if !fresh || isFresh(a.recs) {
				a.err = err
			}
		}
	}
	return nil, nil
}

// isFresh tells whether recs begin new work, which has no claim to the reserve.
func isFresh(recs []Record) bool {
	for _, r := range recs {
		if r.Kind == KindIntent {
			return true
		}
	}
	return false
}

// sizeOf returns how many bytes the frames of recs have.
func sizeOf(recs []Record) (n int64) {
	for _, r := range recs {
		n += int64(frameHead + bodyHead + len(r.Payload) + hashSize)
	}
	return n
}

// put writes recs, for which there is room, as one batch, and returns its octets, which the next call may overwrite.
func (j *Journal) put(recs []Record, now time.Time) ([]byte, error) {
	buf, hash, next := j.buf[:0], j.hash, j.next
	entries := make([]Entry, len(recs))
	for i, r := range recs {
		entries[i] = Entry{Incarnation: j.incarnation, Offset: next, Time: now, Record: r}
		buf, hash = appendFrame(buf, entries[i], uint64(j.size), hash)
		next++
	}
	if _, err := j.seg.WriteAt(buf, j.size); err != nil {
		return nil, fmt.Errorf("writing: %w", err)
	}
	if err := j.seg.Sync(); err != nil {
		return nil, fmt.Errorf("fsync: %w", err)
	}
	j.size += int64(len(buf))
	j.hash, j.next = hash, next
	if cap(buf) <= 1<<20 { // keep the buffer, but not that of an exceptional batch
		j.buf = buf[:0]
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range entries {
		a, err := e.about()
		if err != nil {
			return nil, err // Append has looked at it
		}
		j.fold.add(e, a)
		j.tally.add(e, a)
	}
	j.tip = tip{number: j.number, size: j.size}
	return buf, nil
}

// due tells whether the segment is to end. It does not before this incarnation has written to it.
func (j *Journal) due(now time.Time) bool {
	if j.ended {
		return true
	}
	return j.next > 0 && j.tally.records > 0 && (j.size >= j.cfg.SegmentSize || now.Sub(j.tally.began) >= j.cfg.SegmentAge)
}

// roll seals the segment, begins the next, and writes the index: from then on a start need not read the segment. After ErrFull it may be called again.
func (j *Journal) roll(now time.Time) error {
	if !j.ended {
		recs, err := j.seal(now)
		if err != nil {
			return err
		}
		if err := j.room.secure(j.raw, j.size, sizeOf(recs), false); err != nil {
			return err
		}
		j.cfg.step("seal")
		prev := j.hash
		batch, err := j.put(recs, now)
		if err != nil {
			return err
		}
		j.index = index(batch, len(batch)-int(sizeOf(recs[len(recs)-1:])), prev)
		j.cfg.step("sealed")
		s := &sealed{hash: j.hash, size: j.size, entry: Entry{Incarnation: j.incarnation, Offset: j.next - 1}}
		if err := recs[len(recs)-1].Decode(&s.Seal); err != nil {
			return err
		}
		j.cat.update(j.number, func(g *segment) { g.seal, g.bytes = s, j.size })
		j.room.release(j.raw, j.size)
		j.ended = true
	}
	sealed := j.number
	if err := j.newSegment(sealed + 1); err != nil {
		return err
	}
	j.cfg.step("begun")
	j.cfg.step("index")
	if err := replaceFile(filepath.Join(j.cfg.Dir, fileName(sealed, indexSuffix)), func(f *os.File) error { _, err := f.Write(j.index); return err }); err == nil {
		j.cat.update(sealed, func(s *segment) { s.indexed = true })
	} // else the keeper makes it, or tells why not
	j.cfg.step("indexed")
	j.index = nil
	j.show()
	j.keeper.wake()
	return nil
}

// newSegment makes the next file and its header durable before any record is written to it.
func (j *Journal) newSegment(number uint64) error {
	path := filepath.Join(j.cfg.Dir, segmentName(number))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if noSpace(err) {
		return fmt.Errorf("%w: beginning a segment: %w", ErrFull, err)
	}
	if err != nil {
		return fmt.Errorf("beginning a segment: %w", err)
	}
	seg := j.cfg.wrap(f)
	if err := j.room.secure(f, 0, headerSize, false); err != nil {
		return errors.Join(err, seg.Close(), os.Remove(path))
	}
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
	j.prev = j.hash
	j.raw, j.seg, j.number, j.size, j.hash, j.ended = f, seg, number, headerSize, chainHash(header[headerSize-hashSize:]), false
	return nil
}

// show lets readers and the keeper know of a new segment. The keeper touches none but those before it.
func (j *Journal) show() {
	j.cat.update(j.number, func(s *segment) { s.plain = true })
	j.mu.Lock()
	defer j.mu.Unlock()
	j.tally, j.tip = newTally(), tip{number: j.number, size: headerSize}
}

// durable returns the place up to which everything is.
func (j *Journal) durable() tip {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.tip
}
