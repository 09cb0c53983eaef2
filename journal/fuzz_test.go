package journal_test

import (
	"os"
	"path/filepath"
	"testing"

	"trivet/journal"
)

// files makes a journal with a compressed and a written segment and returns its first compressed segment and its second index, which carries an intent.
func files(f *testing.F) (packed, index []byte) {
	cfg := config(filepath.Join(f.TempDir(), "j"))
	cfg.SegmentSize = 600
	j, err := journal.Open(cfg)
	if err != nil {
		f.Fatal(err)
	}
	defer j.Close()
	var h history
	for n := 3; n < 20; n++ {
		if err := j.Append(h.records(f, n)...); err != nil {
			f.Fatal(err)
		}
	}
	until(f, "segments are compressed", func() bool { return len(names(f, cfg.Dir, ".zst")) > 1 })
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(cfg.Dir, name))
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	return read(names(f, cfg.Dir, ".zst")[0]), read(names(f, cfg.Dir, ".index")[1])
}

func FuzzIndex(f *testing.F) {
	_, index := files(f)
	if _, carried, err := journal.ParseIndex(index); err != nil || len(carried) == 0 {
		f.Fatalf("the seed carries %d, %v", len(carried), err)
	}
	f.Add(index)
	f.Add(index[:len(index)-1])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, _, err := journal.ParseIndex(b)
		if err == nil && (s.Segment != 2 || len(s.Runs) == 0) {
			t.Fatalf("taken for the second segment's: %+v", s)
		}
	})
}

func FuzzPacked(f *testing.F) {
	packed, _ := files(f)
	if err := journal.ParsePacked(packed); err != nil {
		f.Fatal(err)
	}
	f.Add(packed)
	f.Add(packed[:len(packed)/2])
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = journal.ParsePacked(b) // without a panic
	})
}
