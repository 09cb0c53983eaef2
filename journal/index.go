package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// An index file is a copy of the batch that ends a segment, so that nobody has to read, or unpack, the segment for it:
//
//	magic 8 | where the seal's frame begins, counted from the first frame, 8 | hash of the record before the batch 32 | frames
//
// The frames hold their own hashes, and the next segment's header holds the seal's: an index can be no other than that of its segment.
const (
	indexMagic = "TRVTIDX1"
	indexHead  = 8 + 8 + hashSize
)

// sealed is a Seal in its place.
type sealed struct {
	Seal
	hash  chainHash // of the seal record
	size  int64     // of the segment
	entry Entry     // the seal record, without payload
}

// index makes the index file of the segment whose last batch is frames, after a record with hash prev.
func index(frames []byte, sealAt int, prev chainHash) []byte {
	b := append(make([]byte, 0, indexHead+len(frames)), indexMagic...)
	b = binary.BigEndian.AppendUint64(b, uint64(sealAt))
	b = append(b, prev[:]...)
	return append(b, frames...)
}

// readSeal reads the seal of an index file, and nothing else of it.
func readSeal(path string, number uint64) (*sealed, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	s, err := parseSeal(f, info.Size(), number)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// parseSeal reads the seal of an index of size bytes.
func parseSeal(f io.ReaderAt, size int64, number uint64) (*sealed, error) {
	damaged := func(err error) error {
		return fmt.Errorf("%w: the index cannot be read: %w; where the segment is still there, remove the index: it is made again", ErrCorrupt, err)
	}
	head := make([]byte, indexHead)
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil, damaged(err)
	}
	sealAt := int64(binary.BigEndian.Uint64(head[8:]))
	if string(head[:8]) != indexMagic || sealAt < 0 || sealAt >= size-indexHead {
		return nil, damaged(errors.New("it does not begin as one"))
	}
	frame := make([]byte, size-indexHead-sealAt+hashSize)
	if _, err := f.ReadAt(frame, indexHead+sealAt-hashSize); err != nil {
		return nil, damaged(err)
	}
	s, err := parseSealFrame(frame, number, sealAt)
	if err != nil {
		return nil, damaged(err)
	}
	return s, nil
}

// parseSealFrame reads the hash of the record before a seal and the seal, which begins sealAt bytes after its batch.
func parseSealFrame(b []byte, number uint64, sealAt int64) (*sealed, error) {
	prev, b := chainHash(b[:hashSize]), b[hashSize:]
	f, size, err := parseFrame(b)
	if err != nil {
		return nil, err
	}
	if size != len(b) || f.Kind != KindSeal || !f.chained(b, prev) {
		return nil, errors.New("it does not end with a seal")
	}
	s := &sealed{hash: f.hash, size: int64(f.batch) + sealAt + int64(size), entry: f.Entry}
	if err := f.Decode(&s.Seal); err != nil {
		return nil, err
	}
	if s.Segment != number || len(s.Prev) != hashSize || len(s.Runs) == 0 {
		return nil, fmt.Errorf("it is the seal of segment %d", s.Segment)
	}
	s.entry.Payload = nil
	return s, nil
}

// readCarried returns what an index file carries.
func readCarried(path string, s *sealed) ([]Carry, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	carried, err := parseCarried(b, s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, ErrCorrupt, err)
	}
	return carried, nil
}

func parseCarried(b []byte, s *sealed) ([]Carry, error) {
	if len(b) < indexHead {
		return nil, io.ErrUnexpectedEOF
	}
	prev, b := chainHash(b[16:indexHead]), b[indexHead:]
	var carried []Carry
	for len(b) > 0 {
		f, size, err := parseFrame(b)
		if err == nil && !f.chained(b[:size], prev) {
			err = errors.New("the hash chain breaks")
		}
		if err != nil {
			return nil, err
		}
		if f.Kind == KindCarry {
			var c Carry
			if err := f.Decode(&c); err != nil {
				return nil, err
			}
			carried = append(carried, c)
		}
		prev, b = f.hash, b[size:]
	}
	if prev != s.hash {
		return nil, errors.New("it does not end with its seal")
	}
	return carried, nil
}

// endOf returns the seal of a verified segment, or nil if it does not end with one.
func endOf(number uint64, data []byte) (*sealed, error) {
	batch, sealAt, _, err := lastBatch(data)
	if err != nil || sealAt < 0 {
		return nil, err
	}
	return parseSealFrame(data[sealAt-hashSize:], number, int64(sealAt-batch))
}

// makeIndex writes the index of a verified segment that ends with a seal.
func makeIndex(dir string, number uint64, data []byte) error {
	batch, sealAt, prev, err := lastBatch(data)
	if err != nil {
		return err
	}
	b := index(data[batch:], sealAt-batch, prev)
	return replaceFile(filepath.Join(dir, fileName(number, indexSuffix)), func(f *os.File) error {
		_, err := f.Write(b)
		return err
	})
}

// lastBatch finds the last batch of a segment that was verified, its last record, if that is a seal, and the hash before the batch. Else sealAt is -1.
func lastBatch(data []byte) (batch, sealAt int, prev chainHash, err error) {
	sealAt = -1
	for pos := headerSize; pos < len(data); {
		f, size, err := parseFrame(data[pos:])
		if err != nil {
			return 0, 0, prev, fmt.Errorf("%w: at byte %d: %w", ErrCorrupt, pos, err)
		}
		if batch, sealAt = int(f.batch), -1; f.Kind == KindSeal {
			sealAt = pos
		}
		pos += size
	}
	if batch < headerSize || batch > len(data) {
		return 0, -1, prev, nil
	}
	return batch, sealAt, chainHash(data[batch-hashSize : batch]), nil
}

// replaceFile makes a file durable under its name, or changes nothing that matters.
func replaceFile(path string, write func(*os.File) error) (err error) {
	tmp := path + tmpSuffix
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
	}()
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
