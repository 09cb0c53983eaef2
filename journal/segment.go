package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Files of a segment. Its number is their name, in ten digits.
const (
	plainSuffix    = ".journal"     // as it was written
	packedSuffix   = ".journal.zst" // the same, compressed; once it is verified the plain file goes
	indexSuffix    = ".index"       // a copy of its last batch: carry records and seal. Stays for ever
	archivedSuffix = ".archived"    // it is in the archive: when, and its digest. Stays for ever
	droppedSuffix  = ".dropped"     // its records were not needed any more: when that was. Stays for ever
	tmpSuffix      = ".tmp"         // unfinished, of no worth
)

func fileName(number uint64, suffix string) string { return fmt.Sprintf("%010d%s", number, suffix) }

func segmentName(number uint64) string { return fileName(number, plainSuffix) }

// segment is what is known of one without reading it.
type segment struct {
	number   uint64
	plain    bool    // the plain file is there
	packed   bool    // the compressed file is there
	archived bool    // a copy is in the archive, verified
	dropped  bool    // its records were not needed any more
	indexed  bool    // its index is there
	bare     bool    // it is known to end without a seal
	bytes    int64   // of what is there, unless it is the one that is written
	seal     *sealed // nil: it is not sealed, or its index was not read yet; see catalog.know
}

// here tells whether the records can be read from this directory.
func (s *segment) here() bool { return s.plain || s.packed }

// gone tells whether its records can be read nowhere any more, as it should be.
func (s *segment) gone() bool { return !s.here() && s.dropped && !s.archived }

// catalog is the segments of one directory.
type catalog struct {
	dir     string
	archive string // where segments are that are not in dir, or empty

	mu       sync.Mutex
	segments []segment // from number 1 on, without a gap
}

// scan looks at the directory. Sealed segments whose index is not made yet count as not sealed.
func (c *catalog) scan() error {
	var found []segment
	var err error
	for range 3 { // a listing is no snapshot: a file may be renamed while it is made
		if found, err = c.look(); !errors.Is(err, ErrCorrupt) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("reading journal: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.segments = found
	return nil
}

func (c *catalog) look() ([]segment, error) {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return nil, err
	}
	found := map[uint64]*segment{}
	var last uint64
	for _, e := range entries {
		number, suffix, err := parseName(e.Name())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(c.dir, e.Name()), err)
		}
		if suffix == "" {
			continue
		}
		s := found[number]
		if s == nil {
			s = &segment{number: number}
			found[number] = s
		}
		last = max(last, number)
		switch suffix {
		case plainSuffix:
			s.plain = true
		case packedSuffix:
			s.packed = true
		case archivedSuffix:
			s.archived = true
		case droppedSuffix:
			s.dropped = true
		case indexSuffix:
			s.indexed = true
		}
		if info, err := e.Info(); err == nil && (suffix == plainSuffix || suffix == packedSuffix) {
			s.bytes += info.Size()
		}
	}
	return c.line(found, last)
}

// line puts the segments in order and checks that they are all there.
func (c *catalog) line(found map[uint64]*segment, last uint64) ([]segment, error) {
	segments := make([]segment, 0, last)
	for number := uint64(1); number <= last; number++ {
		s := found[number]
		path := filepath.Join(c.dir, segmentName(number))
		switch {
		case s == nil, !s.here() && !(s.indexed && (s.archived || s.dropped)):
			return nil, fmt.Errorf("%w: segment %s is missing: restore it", ErrCorrupt, path)
		case !s.indexed && !s.plain:
			return nil, fmt.Errorf("%w: the index of segment %s is missing: restore it", ErrCorrupt, path)
		}
		segments = append(segments, *s)
	}
	return segments, nil
}

// parseName returns no suffix for a file that is none of a segment's.
func parseName(name string) (number uint64, suffix string, err error) {
	for _, suffix := range []string{packedSuffix, plainSuffix, indexSuffix, archivedSuffix, droppedSuffix} {
		base, ok := strings.CutSuffix(name, suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(base, 10, 64)
		if err != nil || n == 0 || fileName(n, suffix) != name {
			return 0, "", errors.New("it is not a segment's name: move it away")
		}
		return n, suffix, nil
	}
	return 0, "", nil
}

// know reads the seal of a segment from its index, if it has one and that was not read yet.
func (c *catalog) know(s *segment) error {
	if s.seal != nil || !s.indexed {
		return nil
	}
	seal, err := readSeal(filepath.Join(c.dir, fileName(s.number, indexSuffix)), s.number)
	if err != nil {
		return err
	}
	s.seal = seal
	c.mu.Lock()
	defer c.mu.Unlock()
	c.segments[s.number-1].seal = seal
	for _, n := range []uint64{s.number, s.number + 1} { // what is known of its neighbours must fit
		if n < 2 || n > uint64(len(c.segments)) {
			continue
		}
		if before, after := c.segments[n-2].seal, c.segments[n-1].seal; before != nil && after != nil && chainHash(after.Prev) != before.hash {
			return fmt.Errorf("%w: %s: %w", ErrCorrupt, filepath.Join(c.dir, segmentName(n)), errForeign)
		}
	}
	return nil
}

// all returns a copy of what is known.
func (c *catalog) all() []segment {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.segments)
}

// update changes what is known of a segment, or makes it known.
func (c *catalog) update(number uint64, change func(*segment)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if number == uint64(len(c.segments))+1 {
		c.segments = append(c.segments, segment{number: number})
	}
	change(&c.segments[number-1])
}

// load returns the segment's records as they were written.
func (c *catalog) load(s *segment) ([]byte, error) {
	plain, packed := filepath.Join(c.dir, segmentName(s.number)), filepath.Join(c.dir, fileName(s.number, packedSuffix))
	size := int64(maxUnpacked)
	if s.seal != nil {
		size = s.seal.size
	}
	data, err := os.ReadFile(plain)
	if errors.Is(err, fs.ErrNotExist) { // compressed since, or already
		data, err = readPacked(packed, size)
	}
	if errors.Is(err, fs.ErrNotExist) && c.archive != "" {
		if data, err = readPacked(filepath.Join(c.archive, fileName(s.number, packedSuffix)), size); errors.Is(err, fs.ErrNotExist) {
			data, err = os.ReadFile(filepath.Join(c.archive, segmentName(s.number)))
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s", ErrArchived, plain)
	case err == nil && s.seal != nil && int64(len(data)) != s.seal.size:
		return nil, fmt.Errorf("%w: %s: it has %d bytes and was sealed with %d", ErrCorrupt, plain, len(data), s.seal.size)
	}
	return data, err
}

// inspect compares a sealed segment's plain file with its seal without reading it all.
func (c *catalog) inspect(s *segment) error {
	path := filepath.Join(c.dir, segmentName(s.number))
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != s.seal.size {
		return fmt.Errorf("%w: %s: it has %d bytes and was sealed with %d", ErrCorrupt, path, info.Size(), s.seal.size)
	}
	header := make([]byte, headerSize)
	if _, err := f.ReadAt(header, 0); err != nil {
		return err
	}
	if _, err := parseHeader(header, s.number, chainHash(s.seal.Prev)); err != nil {
		return fmt.Errorf("%w: %s: at byte 0: %w", ErrCorrupt, path, err)
	}
	return nil
}
