package journal_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"

	"trivet/journal"
)

// A damaged segment in the archive may claim any size, or unpack to it. (RFC 8878, 3.1.1: a frame's header.)
func TestUnpackingTakesMemoryForWhatComesOnly(t *testing.T) {
	header := func(descriptor byte, rest ...byte) []byte {
		return append(append(binary.LittleEndian.AppendUint32(nil, 0xFD2FB528), descriptor), rest...)
	}
	raw := []byte{3<<3 | 1, 0, 0, 'a', 'b', 'c'} // one last block of three bytes
	var bomb bytes.Buffer
	w, err := zstd.NewWriter(&bomb)
	if err == nil {
		_, err = io.CopyN(w, zeros{}, 1<<28)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, packed := range map[string][]byte{
		"claims 2 GB":           append(header(2<<6, 0x40, 0, 0x64, 0xff, 0x7f), raw...),
		"claims 2 GB in one":    append(header(2<<6|1<<5, 0, 0x64, 0xff, 0x7f), raw...),
		"claims a window of 1G": append(header(0, 20<<3), raw...),
		"256 MB of zeros":       bomb.Bytes(),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := journal.ParsePacked(packed)
		runtime.ReadMemStats(&after)
		if took := (after.TotalAlloc - before.TotalAlloc) >> 20; err == nil || took > 64 {
			t.Errorf("%s: %d MB taken, %v", name, took, err)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
