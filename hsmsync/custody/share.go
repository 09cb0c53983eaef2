package custody

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Share is one person's part of a secret. Its text is for paper or a card and is as secret as the share; printing the value
// itself shows no more than which share it is.
type Share struct {
	set                  [5]byte
	commit               [20]byte
	index, threshold, of byte
	y                    []byte
}

const shareForm = "trivet-share-1"

// letters are Crockford's: none is easily taken for another one or for a digit.
var letters = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// Set names the set: shares of different sets do not belong together.
func (s Share) Set() string { return letters.EncodeToString(s.set[:]) }

// Index is the share's number in its set, from 1.
func (s Share) Index() int { return int(s.index) }

// Threshold is how many shares of the set are needed, of Count.
func (s Share) Threshold() int { return int(s.threshold) }

// Count is how many shares the set has.
func (s Share) Count() int { return int(s.of) }

// String says which share it is.
func (s Share) String() string {
	return fmt.Sprintf("share %d of set %s (%d of %d needed)", s.index, s.Set(), s.threshold, s.of)
}

// GoString is String, so that %#v shows no secret either.
func (s Share) GoString() string { return s.String() }

// Text is the share in one line: form:set:index:threshold:count:secret:checksum.
func (s Share) Text() string {
	body := letters.EncodeToString(append(s.commit[:], s.y...))
	var groups []string
	for len(body) > 7 {
		groups, body = append(groups, body[:7]), body[7:]
	}
	sum := s.digest()
	return strings.Join([]string{shareForm, s.Set(), strconv.Itoa(int(s.index)), strconv.Itoa(int(s.threshold)), strconv.Itoa(int(s.of)),
		strings.Join(append(groups, body), "-"), letters.EncodeToString(sum[:4])}, ":")
}

// digest is a hash of the whole share; its first octets are the checksum.
func (s Share) digest() [32]byte {
	h := sha256.New()
	h.Write([]byte(shareForm))
	h.Write(s.set[:])
	h.Write([]byte{s.index, s.threshold, s.of})
	h.Write(s.commit[:])
	h.Write(s.y)
	return [32]byte(h.Sum(nil))
}

// Wipe forgets the secret part, for whoever has handed it out.
func (s Share) Wipe() { clear(s.y) }

var errMistyped = errors.New("the checksum does not match: it is mistyped, look at every letter")

// ParseShare reads what Text wrote, also as people type it: case, blanks, hyphens within the secret, O for 0, I and L for 1
// do not matter. No error shows what it read.
func ParseShare(text string) (Share, error) {
	if len(text) > 1024 {
		return Share{}, fmt.Errorf("reading a share: %d octets: it is one line of at most 1024", len(text))
	}
	fields := strings.Split(strings.ToLower(text), ":")
	for i := range fields {
		fields[i] = strings.Join(strings.Fields(fields[i]), "")
	}
	if len(fields) != 7 || fields[0] != shareForm {
		return Share{}, fmt.Errorf("reading a share: it has %d fields: want 7, separated by colons, of which the first is %s", len(fields), shareForm)
	}
	var s Share
	set, err := unletter(fields[1])
	if err != nil || len(set) != len(s.set) {
		return Share{}, errors.New("reading a share: the set's id is mistyped: want 8 letters and digits")
	}
	copy(s.set[:], set)
	for i, to := range []*byte{&s.index, &s.threshold, &s.of} {
		n, err := strconv.ParseUint(fields[2+i], 10, 8)
		if err != nil || n > MaxShares {
			return Share{}, fmt.Errorf("reading a share of set %s: the number in field %d is mistyped: want 1 to %d", s.Set(), 3+i, MaxShares)
		}
		*to = byte(n)
	}
	fail := func(err error) (Share, error) {
		return Share{}, fmt.Errorf("reading share %d of set %s: %w", s.index, s.Set(), err)
	}
	if s.threshold < MinThreshold || s.threshold > s.of || s.index < 1 || s.index > s.of {
		return fail(fmt.Errorf("index %d, %d of %d needed: there is no such share", s.index, s.threshold, s.of))
	}
	body, err := unletter(strings.ReplaceAll(fields[5], "-", ""))
	if err != nil {
		return fail(fmt.Errorf("the secret is mistyped: %w", err))
	}
	if n := len(body) - len(s.commit); n < minSecret || n > maxSecret {
		return fail(fmt.Errorf("the secret has %d octets: some of it is missing, or too much", len(body)))
	}
	s.y = body[copy(s.commit[:], body):]
	sum := s.digest()
	check, err := unletter(fields[6])
	if err != nil || subtle.ConstantTimeCompare(check, sum[:4]) == 0 {
		return fail(errMistyped)
	}
	return s, nil
}

// ParseShares reads shares, one in each line. Empty lines and those that begin with # are left out; the error names the line.
func ParseShares(text string) ([]Share, error) {
	var out []Share
	line := 0
	for text := range strings.Lines(text) {
		line++
		text = strings.TrimSpace(text)
		if text == "" || text[0] == '#' {
			continue
		}
		s, err := ParseShare(text)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
		if len(out) == MaxShares {
			return nil, fmt.Errorf("line %d: no set has more than %d shares", line, MaxShares)
		}
		out = append(out, s)
	}
	return out, nil
}

// unletter decodes one spelling only: what encodes to the same letters again.
func unletter(s string) ([]byte, error) {
	s = strings.NewReplacer("o", "0", "i", "1", "l", "1").Replace(s)
	b, err := letters.DecodeString(s)
	if err != nil || letters.EncodeToString(b) != s {
		return nil, errors.New("it holds a sign that no share has, or too few or too many")
	}
	return b, nil
}
