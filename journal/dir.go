package journal

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// Dir is a journal's directory, read without its writer, which may be at work meanwhile.
type Dir struct{ cat catalog }

// OpenDir looks at a journal's directory. Segments that are in the archive alone are read from the directory archive, if it is given. It takes no
// lock and changes nothing.
func OpenDir(path, archive string) (*Dir, error) {
	d := &Dir{cat: catalog{dir: path, archive: archive}}
	return d, d.cat.scan()
}

// Select is Journal.Select, up to the end there is.
func (d *Dir) Select(q Query, fn func(Entry) error) error { return d.cat.walk(&q, nil, fn) }

// Report is what Verify found.
type Report struct {
	Segments  int       `json:"segments"`          // that were read
	Elsewhere int       `json:"elsewhere"`         // that are in the archive alone and were not read
	Dropped   int       `json:"dropped,omitempty"` // that were removed because nobody needed them any more
	Records   uint64    `json:"records"`
	Bytes     int64     `json:"bytes"` // unpacked
	First     time.Time `json:"first,omitzero"`
	Last      time.Time `json:"last,omitzero"`
	Head      string    `json:"head"` // hash of the last record: it stands for all before it
	Damage    []Damage  `json:"damage,omitempty"`
}

// Damage is one segment that does not hold what it once held.
type Damage struct {
	File  string `json:"file"`
	Error string `json:"error"` // says at which byte
}

// Verify reads every segment, and goes on behind a damaged one where the next has a seal to go by. The records being written when it ends are no damage.
func (d *Dir) Verify() (Report, error) {
	var r Report
	var cur cursor
	for number := 1; number <= len(d.cat.all()); number++ {
		s := &d.cat.all()[number-1]
		if err := d.cat.know(s); err != nil {
			r.Damage = append(r.Damage, Damage{File: filepath.Join(d.cat.dir, fileName(s.number, indexSuffix)), Error: err.Error()})
		}
		if s.seal != nil && !s.here() && (d.cat.archive == "" || s.gone()) {
			if s.gone() {
				r.Dropped++
			} else {
				r.Elsewhere++
			}
			cur.jump(s.seal)
			continue
		}
		err := d.cat.read(s, &cur, nil, func(e Entry) error {
			if r.Records++; r.First.IsZero() || e.Time.Before(r.First) {
				r.First = e.Time
			}
			if e.Time.After(r.Last) {
				r.Last = e.Time
			}
			return nil
		})
		r.Segments++
		switch {
		case err == nil:
		case !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrArchived):
			return r, fmt.Errorf("reading journal: %w", err)
		default:
			r.Damage = append(r.Damage, Damage{File: filepath.Join(d.cat.dir, segmentName(s.number)), Error: err.Error()})
			if s.seal == nil {
				return r, nil // what follows cannot be told from something else
			}
			cur.jump(s.seal)
		}
	}
	r.Head = hex.EncodeToString(cur.hash[:])
	return r, nil
}
