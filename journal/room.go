package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	reserveName = "reserve"
	chunk       = 1 << 20 // room is secured in pieces of this many bytes
)

// room secures space on the disk before a byte is written into it, so that a full disk is found out while nothing has happened yet. Some more is
// held back in a file of its own: new work is refused unless that reserve is whole, what was begun may eat it up.
type room struct {
	want    int64 // size of the reserve
	counted bool  // the file system sets nothing aside: free space is counted instead, which others may take meanwhile

	mu      sync.Mutex
	reserve *os.File
	have    int64 // bytes of the reserve that are there
	file    *os.File
	end     int64 // where the secured room of file ends
	short   error // why new work is refused, or nil
}

// openRoom finds or makes the reserve. A disk without room for it is no error yet.
func openRoom(dir string, want int64) (*room, error) {
	f, err := os.OpenFile(filepath.Join(dir, reserveName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the reserve: %w", err)
	}
	r := &room{want: max(want, 0), reserve: f}
	var s unix.Stat_t
	if err = unix.Fstat(int(f.Fd()), &s); err == nil {
		r.have = min(s.Size, s.Blocks*512, r.want)
		if err = f.Truncate(r.have); err == nil {
			err = r.fill()
		}
	}
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		r.counted, err = true, nil
	case errors.Is(err, ErrFull):
		r.short, err = err, nil
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("making the reserve: %w", err)
	}
	return r, nil
}

func (r *room) close() { r.reserve.Close() }

// secure makes sure that size bytes can be written into f at byte at. For fresh work the reserve must be whole as well; other work takes from it
// what the disk does not give. ErrFull says that there is no room; any other error is the disk's.
func (r *room) secure(f *os.File, at, size int64, fresh bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f != r.file {
		r.file, r.end = f, 0
	}
	if r.counted {
		if fresh {
			size += r.want
		}
		err := spare(f, size)
		if fresh {
			r.short = err
		}
		return err
	}
	if fresh {
		err := r.fill()
		if err == nil {
			err = r.extend(at, size)
		}
		if err == nil || errors.Is(err, ErrFull) {
			r.short = err
		}
		return err
	}
	for {
		err := r.extend(at, size)
		if !errors.Is(err, ErrFull) || r.have == 0 {
			return err
		}
		r.short = err
		r.have = max(0, r.have-max(size, chunk))
		if err := r.reserve.Truncate(r.have); err != nil {
			return fmt.Errorf("taking from the reserve: %w", err)
		}
	}
}

// extend moves the end of the secured room.
func (r *room) extend(at, size int64) error {
	if at+size <= r.end {
		return nil
	}
	more := max(at+size, r.end+chunk)
	err := allocate(r.file, unix.FALLOC_FL_KEEP_SIZE, at, more-at)
	if errors.Is(err, ErrFull) {
		more = at + size
		err = allocate(r.file, unix.FALLOC_FL_KEEP_SIZE, at, size)
	}
	if err == nil {
		r.end = more
	}
	return err
}

// fill makes the reserve whole.
func (r *room) fill() error {
	if r.have >= r.want || r.counted {
		return nil
	}
	if err := allocate(r.reserve, 0, 0, r.want); err != nil {
		return errors.Join(err, r.reserve.Truncate(r.have)) // it may have got part of it
	}
	r.have = r.want
	return nil
}

// release gives back what was secured behind the end of a file. That it fails costs up to a chunk.
func (r *room) release(f *os.File, size int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f == r.file && r.end > size {
		_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, size, r.end-size)
		r.file, r.end = nil, 0
	}
}

// lack returns why new work is refused, or nil. It looks whether there is room again.
func (r *room) lack() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.short == nil {
		return nil
	}
	err := r.fill()
	switch {
	case err == nil && r.counted:
		err = spare(r.reserve, r.want+chunk)
	case err == nil:
		err = spare(r.reserve, chunk)
	}
	r.short = err
	return err
}

// held returns the bytes of the reserve.
func (r *room) held() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.have
}

// allocate has the file system set space aside.
func allocate(f *os.File, mode uint32, at, size int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), mode, at, size)
		switch {
		case errors.Is(err, unix.EINTR):
		case noSpace(err):
			return fmt.Errorf("%w: %w", ErrFull, err)
		case err != nil:
			return fmt.Errorf("securing room on the disk: %w", err)
		default:
			return nil
		}
	}
}

// spare fails with ErrFull if the disk of f has not size bytes free.
func spare(f *os.File, size int64) error {
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &s); err != nil {
		return fmt.Errorf("asking for free space: %w", err)
	}
	if free := int64(s.Bavail) * s.Bsize; free < size {
		return fmt.Errorf("%w: %d bytes are free, %d are needed", ErrFull, free, size)
	}
	return nil
}

func noSpace(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
