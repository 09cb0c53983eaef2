package journal

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	// maxUnpacked bounds what a compressed segment whose seal is unknown may unpack to, in bytes.
	maxUnpacked = 2 << 30
	// window is how far back compressed data may refer, in bytes, and so what it can make its reader set aside.
	window = 8 << 20
)

// pack replaces a segment's plain file, whose bytes are data, by a compressed one that was read back from the disk and unpacks to the same bytes.
func (k *keeper) pack(s *segment, data []byte) error {
	path := filepath.Join(k.dir(), fileName(s.number, packedSuffix))
	if there, err := readPacked(path, int64(len(data))); err != nil || !bytes.Equal(there, data) {
		if err := replaceFile(path, func(f *os.File) error {
			if err := compress(f, data); err != nil {
				return err
			}
			k.step("compressed")
			there, err := readPacked(f.Name(), int64(len(data)))
			if err == nil && !bytes.Equal(there, data) {
				err = fmt.Errorf("%w: it does not unpack to what was packed", ErrCorrupt)
			}
			return err
		}); err != nil {
			return fmt.Errorf("compressing %s: %w", path, err)
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	k.step("packed")
	k.j.cat.update(s.number, func(s *segment) { s.packed, s.bytes = true, info.Size() })
	if err := removeFile(filepath.Join(k.dir(), segmentName(s.number))); err != nil {
		return err
	}
	k.step("unlinked")
	k.j.cat.update(s.number, func(s *segment) { s.plain = false })
	return nil
}

// compress writes data to f, durably, and has the kernel forget it: what is read next comes from the disk.
func compress(f *os.File, data []byte) error {
	w, err := zstd.NewWriter(f, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(true), zstd.WithWindowSize(window))
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, bytes.NewReader(data)); err != nil {
		return errors.Join(err, w.Close())
	}
	if err := w.Close(); err != nil {
		return err
	}
	return settle(f)
}

// settle makes what was written to f durable and drops it from the page cache.
func settle(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // without it the proof is weaker, not wrong
	return nil
}

// readPacked returns what a compressed segment unpacks to: size bytes, or fewer.
func readPacked(path string, size int64) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	data, err := unpack(b, size)
	if err != nil {
		return nil, fmt.Errorf("%w: %s cannot be unpacked: %w", ErrCorrupt, path, err)
	}
	return data, nil
}

// unpack takes memory for what comes, not for what damaged data claims will come.
func unpack(b []byte, size int64) ([]byte, error) {
	r, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(window))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, size+1))
	if err == nil && int64(len(data)) > size {
		err = fmt.Errorf("it unpacks to more than %d bytes", size)
	}
	return data, err
}

// verify reads a sealed segment's bytes as its seal says they are.
func (s *sealed) verify(data []byte) error {
	c := cursor{hash: chainHash(s.Prev)}
	if first := s.Runs[0]; first.First > 0 {
		id, err := hex.DecodeString(first.Incarnation)
		if err != nil || len(id) != len(c.incarnation) {
			return fmt.Errorf("%w: its seal names incarnation %q", ErrCorrupt, first.Incarnation)
		}
		c.incarnation, c.next, c.started = [16]byte(id), first.First, true
	}
	end, torn, err := c.segment(s.Segment, data, 0, nil)
	switch {
	case err != nil:
		return err
	case torn != "":
		return fmt.Errorf("%w: at byte %d: %s", ErrCorrupt, end, torn)
	case c.hash != s.hash:
		return fmt.Errorf("%w: it does not end as it was sealed", ErrCorrupt)
	}
	return nil
}

// removeFile removes a file durably. It is no error if it is gone.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}
