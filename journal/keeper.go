package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const (
	keepEvery = time.Minute // how often it looks whether something is due
	keepRetry = time.Second // after a failure; doubled up to keepEvery
)

// keeper looks after sealed segments: it makes their index, compresses them, archives them, and removes what the archive holds long enough. It may
// end at any point: every step either is done whole or is done again. It never touches the segment that is written, and no failure of it is final.
type keeper struct {
	j      *Journal
	ctx    context.Context
	cancel context.CancelFunc
	kick   chan struct{}
	ended  chan struct{}

	mu      sync.Mutex
	trouble error // of the last round
}

func newKeeper(j *Journal) *keeper {
	k := &keeper{j: j, kick: make(chan struct{}, 1), ended: make(chan struct{})}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k
}

func (k *keeper) dir() string      { return k.j.cfg.Dir }
func (k *keeper) step(name string) { k.j.cfg.step(name) }

func (k *keeper) wake() {
	select {
	case k.kick <- struct{}{}:
	default: // it is about to look anyway
	}
}

func (k *keeper) stop() {
	k.cancel()
	<-k.ended
}

func (k *keeper) run() {
	defer close(k.ended)
	retry := keepRetry
	for k.ctx.Err() == nil {
		err := k.round()
		wait := keepEvery
		if err != nil && k.ctx.Err() == nil {
			k.j.cfg.Log.Warn("sealed journal segments are not kept as they should be: will try again", "dir", k.dir(), "in", retry, "err", err)
			wait, retry = retry, min(2*retry, keepEvery)
		} else {
			retry = keepRetry
		}
		k.mu.Lock()
		k.trouble = err
		k.mu.Unlock()
		if k.j.room.lack() != nil {
			wait = min(wait, keepRetry)
		}
		timer := time.NewTimer(wait)
		select {
		case <-k.ctx.Done():
		case <-k.kick:
		case <-timer.C:
			k.j.poke()
		}
		timer.Stop()
	}
}

// round does what is due. What fails for one segment leaves the others alone, unless it is the archive.
func (k *keeper) round() error {
	var errs []error
	archive := k.j.cfg.Archive.on()
	segments := k.j.cat.all()
	for _, s := range segments[:len(segments)-1] { // not the one that is written, nor one whose successor is not durable yet
		if k.ctx.Err() != nil || !k.due(&s) {
			continue
		}
		if err := k.know(&s); err != nil {
			errs = append(errs, err)
			continue
		}
		if s.seal == nil {
			continue
		}
		if err := k.prepare(&s); err != nil {
			errs = append(errs, err)
			continue
		}
		if archive {
			if err := k.store(&s); err != nil {
				errs = append(errs, err)
				archive = false
			}
		}
		if err := k.drop(&s); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// know learns a segment's seal, from the segment itself if it has no index: a process that ended at the wrong moment left none, and one that
// went on behind it did not look.
func (k *keeper) know(s *segment) error {
	if s.seal != nil || s.indexed {
		return k.j.cat.know(s)
	}
	data, err := k.j.cat.load(s)
	if err == nil {
		s.seal, err = endOf(s.number, data)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(k.dir(), segmentName(s.number)), err)
	}
	k.j.cat.update(s.number, func(g *segment) { g.seal, g.bare = s.seal, s.seal == nil })
	return nil
}

// due tells whether there may be something to do for a segment, without reading its seal.
func (k *keeper) due(s *segment) bool {
	a := &k.j.cfg.Archive
	return !s.bare && (k.j.cfg.Drop != nil && s.here() || !s.indexed || s.plain && !k.j.cfg.Plain || a.on() && (!s.archived || a.Keep > 0 && s.here()))
}

// prepare makes index and compressed file.
func (k *keeper) prepare(s *segment) error {
	pack := s.plain && !k.j.cfg.Plain
	if s.indexed && !pack {
		return nil
	}
	path := filepath.Join(k.dir(), segmentName(s.number))
	data, err := k.j.cat.load(s)
	if err == nil {
		if err = s.seal.verify(data); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	if err == nil && !s.indexed {
		if err = makeIndex(k.dir(), s.number, data); err == nil {
			k.j.cat.update(s.number, func(s *segment) { s.indexed = true })
		}
	}
	if err == nil && pack {
		k.step("pack")
		err = k.pack(s, data)
	}
	return err
}

// store archives a segment, and removes it when it may go.
func (k *keeper) store(s *segment) error {
	now := k.j.cfg.Now()
	for _, g := range k.j.cat.all()[s.number-1 : s.number] { // prepare may have changed it
		*s = g
	}
	suffix := packedSuffix
	if !s.packed {
		suffix = plainSuffix
	}
	path := filepath.Join(k.dir(), fileName(s.number, suffix))
	switch {
	case !s.archived:
		k.step("archive")
		if err := k.j.cfg.Archive.put(k.ctx, k.dir(), s.number, path, now); err != nil {
			return fmt.Errorf("archiving %s: %w", path, err)
		}
		k.step("archived")
		k.j.cat.update(s.number, func(s *segment) { s.archived = true })
	case k.j.cfg.Archive.Keep > 0 && s.here() && now.Sub(s.seal.Last) > k.j.cfg.Archive.Keep:
		if err := k.j.cfg.Archive.check(k.ctx, k.dir(), s.number); err != nil {
			return fmt.Errorf("%s stays here: it cannot be found in the archive as it was put there: %w", path, err)
		}
		k.step("drop")
		if err := errors.Join(removeFile(filepath.Join(k.dir(), segmentName(s.number))), removeFile(filepath.Join(k.dir(), fileName(s.number, packedSuffix)))); err != nil {
			return err
		}
		k.step("dropped")
		k.j.cat.update(s.number, func(s *segment) { s.plain, s.packed, s.bytes = false, false, 0 })
	}
	return nil
}

// drop removes a segment of which no record is needed any more.
func (k *keeper) drop(s *segment) error {
	*s = k.j.cat.all()[s.number-1] // what was done before may have changed it
	if k.j.cfg.Drop == nil || !s.here() || !s.indexed || k.j.cfg.Archive.on() && !s.archived || !s.dropped && !k.j.cfg.Drop(k.ctx, s.seal.Seal) {
		return nil
	}
	if !s.dropped {
		text := fmt.Appendf(nil, `{"time": %q}`+"\n", k.j.cfg.Now().UTC().Format(time.RFC3339))
		if err := replaceFile(filepath.Join(k.dir(), fileName(s.number, droppedSuffix)), func(f *os.File) error { _, err := f.Write(text); return err }); err != nil {
			return err
		}
		k.j.cat.update(s.number, func(s *segment) { s.dropped = true })
	}
	k.step("drop")
	if err := errors.Join(removeFile(filepath.Join(k.dir(), segmentName(s.number))), removeFile(filepath.Join(k.dir(), fileName(s.number, packedSuffix)))); err != nil {
		return err
	}
	k.step("dropped")
	k.j.cat.update(s.number, func(s *segment) { s.plain, s.packed, s.bytes = false, false, 0 })
	return nil
}

// poke has commit look whether the segment is old enough to end.
func (j *Journal) poke() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err == nil && !j.closed {
		j.queue = append(j.queue, &appending{done: make(chan error, 1)})
		j.wake.Signal()
	}
}
