package journal

import "bytes"

// File is what the journal does to a segment.
type File = file

// WithFiles returns cfg with every segment passed through wrap, to inject faults.
func WithFiles(cfg Config, wrap func(File) File) Config {
	cfg.wrap = wrap
	return cfg
}

const (
	HeaderSize = headerSize
	FrameHead  = frameHead
)

// ParseSegment reads data as the first segment.
func ParseSegment(data []byte, fn func(Entry) error) (end int, torn string, err error) {
	var c cursor
	return c.segment(1, data, 0, fn)
}

// SegmentName returns the file name of a segment.
func SegmentName(n uint64) string { return segmentName(n) }

// FrameSize returns the size of the frame at the start of b, or 0.
func FrameSize(b []byte) int {
	_, n, err := parseFrame(b)
	if err != nil {
		return 0
	}
	return n
}

// Waiting returns how many calls of Append wait for the next batch.
func Waiting(j *Journal) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.queue)
}

// WithSteps returns cfg with step called before and after each step of sealing and keeping segments.
func WithSteps(cfg Config, step func(string)) Config {
	cfg.step = step
	return cfg
}

// ParseIndex reads data as the index of the second segment.
func ParseIndex(data []byte) (s *Seal, carried []Carry, err error) {
	seal, err := parseSeal(bytes.NewReader(data), int64(len(data)), 2)
	if err != nil {
		return nil, nil, err
	}
	carried, err = parseCarried(data, seal)
	return &seal.Seal, carried, err
}

// ParsePacked unpacks data as a compressed segment and reads it as the first.
func ParsePacked(data []byte) error {
	plain, err := unpack(data, 1<<20)
	if err == nil {
		_, _, err = ParseSegment(plain, nil)
	}
	return err
}
