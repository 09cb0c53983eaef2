package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"
)

// On disk a segment is one header and then frames, all integers big-endian:
//
//	header  magic 8 | segment number 8 | hash of the last frame of the segment before, or zeros, 32 | SHA-256 of these 32
//	frame   marker 4 | body length 4 | batch 8 | crc32c 4 | body | SHA-256 of the 32 bytes before the frame and the frame up to here 32
//	body    kind 1 | incarnation 16 | offset 8 | unix nanoseconds 8 | payload
//
// The 32 bytes before a frame are always its predecessor's hash, so the hashes chain through every segment. batch is the position in the
// segment of the first frame written in the same fsync: nothing before it can be torn. The crc makes a frame recognisable without its
// predecessor, which is how a bad record in the middle is told from a torn tail.
const (
	magic      = "TRVTJNL1"
	headerSize = 8 + 8 + 32 + 32
	frameHead  = 4 + 4 + 8 + 4
	bodyHead   = 1 + 16 + 8 + 8
	hashSize   = sha256.Size
	// MaxPayload bounds a record's payload, in bytes.
	MaxPayload = 16 << 20
)

// Bytes that occur in no UTF-8 text, so never inside a JSON payload.
var marker = [4]byte{0xff, 'T', 0xfe, 'J'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errForeign is a whole header that does not belong here.
var errForeign = errors.New("the segment does not follow the one before it: one is missing, replaced or out of order")

type chainHash = [hashSize]byte

func appendHeader(b []byte, number uint64, prev chainHash) []byte {
	start := len(b)
	b = append(b, magic...)
	b = binary.BigEndian.AppendUint64(b, number)
	b = append(b, prev[:]...)
	sum := sha256.Sum256(b[start:])
	return append(b, sum[:]...)
}

// parseHeader returns the header's own hash, which the first frame chains to.
func parseHeader(b []byte, number uint64, prev chainHash) (chainHash, error) {
	if len(b) < headerSize {
		return chainHash{}, errors.New("incomplete header")
	}
	want := appendHeader(nil, number, prev)
	if !bytes.Equal(b[:headerSize], want) {
		if [hashSize]byte(b[headerSize-hashSize:headerSize]) == sha256.Sum256(b[:headerSize-hashSize]) {
			return chainHash{}, errForeign
		}
		return chainHash{}, errors.New("damaged header")
	}
	return chainHash(want[headerSize-hashSize:]), nil
}

// frame is a parsed frame.
type frame struct {
	Entry
	batch uint64
	hash  chainHash // as stored
}

func appendFrame(b []byte, e Entry, batch uint64, prev chainHash) ([]byte, chainHash) {
	start := len(b)
	b = append(b, marker[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(bodyHead+len(e.Payload)))
	b = binary.BigEndian.AppendUint64(b, batch)
	b = append(b, 0, 0, 0, 0)
	b = append(b, byte(e.Kind))
	b = append(b, e.Incarnation[:]...)
	b = binary.BigEndian.AppendUint64(b, e.Offset)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Time.UnixNano()))
	b = append(b, e.Payload...)
	binary.BigEndian.PutUint32(b[start+16:], frameCRC(b[start:]))
	h := sha256.New()
	h.Write(prev[:])
	h.Write(b[start:])
	var sum chainHash
	h.Sum(sum[:0])
	return append(b, sum[:]...), sum
}

// frameCRC covers the frame without marker, crc and hash.
func frameCRC(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[4:16], castagnoli), castagnoli, b[frameHead:])
}

// parseFrame reads the frame at the start of b and returns its size. It fails unless marker, length and crc are right; it does not look at the chain.
func parseFrame(b []byte) (frame, int, error) {
	if len(b) < frameHead {
		return frame{}, 0, errors.New("incomplete frame")
	}
	if [4]byte(b[:4]) != marker {
		return frame{}, 0, errors.New("no frame begins here")
	}
	n := binary.BigEndian.Uint32(b[4:])
	if n < bodyHead || n > bodyHead+MaxPayload {
		return frame{}, 0, fmt.Errorf("impossible length %d", n)
	}
	size := frameHead + int(n) + hashSize
	if size > len(b) {
		return frame{}, 0, errors.New("incomplete frame")
	}
	if binary.BigEndian.Uint32(b[16:]) != frameCRC(b[:size-hashSize]) {
		return frame{}, 0, errors.New("wrong checksum")
	}
	body := b[frameHead : size-hashSize]
	f := frame{batch: binary.BigEndian.Uint64(b[8:]), hash: chainHash(b[size-hashSize : size])}
	f.Kind = Kind(body[0])
	f.Incarnation = [16]byte(body[1:])
	f.Offset = binary.BigEndian.Uint64(body[17:])
	f.Time = time.Unix(0, int64(binary.BigEndian.Uint64(body[25:]))).UTC()
	f.Payload = body[bodyHead:len(body):len(body)]
	return f, size, nil
}

// chained tells whether f, whose bytes are b, follows a frame with hash prev.
func (f frame) chained(b []byte, prev chainHash) bool {
	h := sha256.New()
	h.Write(prev[:])
	h.Write(b[:len(b)-hashSize])
	var sum chainHash
	h.Sum(sum[:0])
	return sum == f.hash
}

// laterBatch looks from the bad bytes at b[at:] on for a frame of a batch that began after them. Such a frame was written after everything
// before its batch had been fsynced, so the bad bytes are no torn write.
func laterBatch(b []byte, at int) (int, bool) {
	for from := at; ; {
		n := bytes.Index(b[from:], marker[:])
		if n < 0 {
			return 0, false
		}
		pos := from + n
		if f, _, err := parseFrame(b[pos:]); err == nil && f.batch > uint64(at) {
			return pos, true
		}
		from = pos + 1
	}
}
