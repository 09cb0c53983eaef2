package journal

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Open takes the journal for this process and begins a new incarnation. It reads the newest index and what was written after that segment, and
// verifies it; of older segments it only looks whether they are there and fit. A torn tail (an unfinished write at the very end) is cut; anything
// else that is wrong is ErrCorrupt, and the journal is left as it is. A second process is refused.
func Open(cfg Config) (*Journal, error) {
	cfg.setDefaults()
	if cfg.Dir == "" || cfg.Node == "" {
		return nil, errors.New("opening journal: directory and node must be given")
	}
	if err := cfg.Archive.validate(); err != nil {
		return nil, fmt.Errorf("opening journal: %w", err)
	}
	if err := makeDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("opening journal: %w", err)
	}
	lock, err := takeLock(filepath.Join(cfg.Dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("opening journal: %w", err)
	}
	j := &Journal{
		cfg: cfg, lock: lock, failed: make(chan struct{}), committed: make(chan struct{}),
		cat: catalog{dir: cfg.Dir}, fold: newFold(), tally: newTally(),
	}
	j.wake = sync.NewCond(&j.mu)
	if err := j.open(); err != nil {
		if j.seg != nil {
			j.seg.Close()
		}
		if j.room != nil {
			j.room.close()
		}
		lock.Close()
		return nil, fmt.Errorf("opening journal %s: %w", cfg.Dir, err)
	}
	j.keeper = newKeeper(j)
	go j.commit()
	go j.keeper.run()
	if err := register(j); err != nil {
		return nil, errors.Join(err, j.Close())
	}
	return j, nil
}

func (j *Journal) open() error {
	if err := removeUnfinished(j.cfg.Dir); err != nil {
		return err
	}
	if err := j.cat.scan(); err != nil {
		return err
	}
	var err error
	if j.room, err = openRoom(j.cfg.Dir, j.cfg.Reserve); err != nil {
		return err
	}
	var c cursor
	tail, err := j.checkpoint(&c)
	if err != nil {
		return err
	}
	var cut int64
	for i := range tail {
		if cut, err = j.readTail(&tail[i], i == len(tail)-1, &c); err != nil {
			return err
		}
	}
	j.hash = c.hash
	if j.seg == nil || j.ended {
		if err := j.newSegment(j.number + 1); err != nil {
			return err
		}
		j.show()
	}
	if _, err := rand.Read(j.incarnation[:]); err != nil {
		return err
	}
	start, err := New(Start{Node: j.cfg.Node, Incarnation: hex.EncodeToString(j.incarnation[:]), Time: j.cfg.Now().UTC(), Cut: cut})
	if err != nil {
		return err
	}
	first := &appending{recs: []Record{start}}
	return errors.Join(j.write([]*appending{first}), first.err)
}

// checkpoint goes to the newest seal that has an index, takes over what it says, and returns the segments after it. Of those before it looks at
// names, sizes, headers and how their seals follow each other.
func (j *Journal) checkpoint(c *cursor) (tail []segment, err error) {
	segments := j.cat.all()
	newest := len(segments) - 1
	for newest >= 0 && !segments[newest].indexed {
		newest--
	}
	oldest := slices.IndexFunc(segments, func(s segment) bool { return s.here() }) // its age is shown
	for i := range segments[:newest+1] {
		s := &segments[i]
		if i != oldest && i < newest && !s.plain { // it was verified when it was compressed
			continue
		}
		err := j.cat.know(s)
		if err == nil && s.plain && s.seal != nil {
			err = j.cat.inspect(s)
		}
		if err != nil {
			return nil, refusal(err)
		}
	}
	if newest < 0 {
		return segments, nil
	}
	s := &segments[newest]
	if newest == len(segments)-1 { // an index is made when the next segment is durable
		return nil, refusal(fmt.Errorf("%w: segment %s is missing", ErrCorrupt, filepath.Join(j.cfg.Dir, segmentName(s.number+1))))
	}
	if s.seal.Node != j.cfg.Node {
		return nil, wrongOwner(s.seal.Node, j.cfg.Node)
	}
	carried, err := readCarried(filepath.Join(j.cfg.Dir, fileName(s.number, indexSuffix)), s.seal)
	if err == nil {
		err = j.fold.resume(&s.seal.Seal, carried)
	}
	if err == nil && s.seal.Streams == nil {
		err = j.count(s.number)
	}
	c.jump(s.seal)
	return segments[newest+1:], err
}

// readTail reads a segment that has no index yet. The last one is made ready to go on in it.
func (j *Journal) readTail(s *segment, last bool, c *cursor) (cut int64, err error) {
	path := filepath.Join(j.cfg.Dir, segmentName(s.number))
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	prev := c.hash
	j.tally = newTally()
	var seal *sealed
	ends := false
	end, torn, err := c.segment(s.number, data, 0, func(e Entry) error {
		if err := j.checkOwner(e); err != nil {
			return err
		}
		a, err := e.about()
		if err != nil {
			return err
		}
		j.fold.add(e, a)
		j.tally.add(e, a)
		ends = e.Kind == KindSeal
		return nil
	})
	if err == nil && torn != "" && !last {
		err = fmt.Errorf("%w: at byte %d: %s, with a segment after it", ErrCorrupt, end, torn)
	}
	if err != nil {
		return 0, refusal(fmt.Errorf("%s: %w", path, err))
	}
	if torn != "" {
		cut = int64(len(data) - end)
		j.cfg.Log.Warn("journal has a torn tail, cutting it", "file", path, "at", end, "bytes", cut, "why", torn)
	}
	if ends {
		if seal, err = endOf(s.number, data[:end]); err != nil {
			return 0, refusal(fmt.Errorf("%s: %w", path, err))
		}
		j.cat.update(s.number, func(s *segment) { s.seal = seal })
	}
	if last {
		j.prev, j.ended = prev, ends
		j.cat.update(s.number, func(s *segment) { s.bytes = 0 })
		return cut, j.resume(path, s.number, data[:end], c, torn != "")
	}
	return cut, nil
}

// refusal says what to do about damage.
func refusal(err error) error {
	if errors.Is(err, ErrCorrupt) {
		return fmt.Errorf("%w; the node must not start on it: restore the file, or replace the node and keep this directory as evidence", err)
	}
	return err
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
		return wrongOwner(s.Node, j.cfg.Node)
	}
	return nil
}

func wrongOwner(theirs, ours string) error {
	return fmt.Errorf("journal is of node %q, this is %q: check the configuration", theirs, ours)
}

// resume goes on in the last segment, whose good bytes are data. Its last batch is written again: if the process before ended because fsync
// had failed, the batch may be in the page cache alone, and only a new write brings it to the disk.
func (j *Journal) resume(path string, number uint64, data []byte, c *cursor, torn bool) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	j.raw, j.seg, j.number, j.size = f, j.cfg.wrap(f), number, int64(len(data))
	if torn {
		if err := f.Truncate(j.size); err != nil {
			return fmt.Errorf("cutting the torn tail: %w", err)
		}
	}
	from := min(c.lastBatch, len(data))
	if len(data) == 0 { // not even the header was whole
		data, from = appendHeader(nil, number, c.hash), 0
		c.hash, j.size = chainHash(data[headerSize-hashSize:]), headerSize
		if err := j.room.secure(f, 0, j.size, false); err != nil {
			return err
		}
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

// removeUnfinished removes what an earlier process did not finish.
func removeUnfinished(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tmpSuffix) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
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
