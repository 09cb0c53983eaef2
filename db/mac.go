package db

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
)

// MACKeys authenticate intents between CA nodes: whoever can write to the database without such a key gets nothing signed. The first key
// writes, every key verifies. It is immutable.
//
// The file is text: one key of 32 octets a line, in hex; empty lines and those that begin with # are passed over. It belongs to one user alone
// (mode 0600). To rotate, add the new key as the second line on every node, then make it the first line on every node, and remove the old
// line once no intent is open that it wrote. Nodes read the file at start.
type MACKeys struct{ keys []macKey }

type macKey struct {
	id     [8]byte
	secret []byte
}

// Why an intent is not taken for one that a CA node wrote.
var (
	ErrNoMAC       = errors.New("the row has no MAC")
	ErrNoTBS       = errors.New("its TBSCertificate is not in the record")
	ErrForgedMAC   = errors.New("the row's MAC is not that of its contents")
	ErrForeignMAC  = errors.New("the row's MAC was made with a key that is not known here")
	errMACFile     = errors.New("want one key of 64 hex digits a line")
	errMACFileMode = errors.New("others than its owner may read it: want mode 0600")
)

const maxMACKeys = 16

// NewMACKey returns the text of a file with one fresh key.
func NewMACKey() []byte {
	var secret [32]byte
	_, _ = rand.Read(secret[:]) // never fails
	return fmt.Appendf(nil, "# Keys that CA nodes authenticate the record's intents with; the first one writes.\n%x\n", secret)
}

// LoadMACKeys reads the file.
func LoadMACKeys(file string) (*MACKeys, error) {
	st, err := os.Stat(file)
	if err == nil && st.Mode().Perm()&0o077 != 0 {
		err = errMACFileMode
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the MAC keys %s: %w", file, err)
	}
	k, err := ParseMACKeys(text)
	if err != nil {
		return nil, fmt.Errorf("reading the MAC keys %s: %w", file, err)
	}
	return k, nil
}

// ParseMACKeys reads a file's text. Its errors hold nothing of the text.
func ParseMACKeys(text []byte) (*MACKeys, error) {
	k := &MACKeys{}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		secret, err := hex.DecodeString(line)
		if err != nil || len(secret) != 32 {
			return nil, fmt.Errorf("line %d: %w", n, errMACFile)
		}
		key := macKey{id: macKeyID(secret), secret: secret}
		if _, twice := k.find(key.id[:]); twice {
			return nil, fmt.Errorf("line %d: the key is there already", n)
		}
		k.keys = append(k.keys, key)
	}
	switch {
	case lines.Err() != nil:
		return nil, errMACFile
	case len(k.keys) == 0:
		return nil, errors.New("there is no key in it")
	case len(k.keys) > maxMACKeys:
		return nil, fmt.Errorf("it holds %d keys: %d are the most", len(k.keys), maxMACKeys)
	}
	return k, nil
}

func macKeyID(secret []byte) [8]byte {
	sum := sha256.Sum256(append([]byte("trivet-mac-key-id-v1\x00"), secret...))
	return [8]byte(sum[:8])
}

func (k *MACKeys) find(id []byte) (macKey, bool) {
	for _, key := range k.keys {
		if bytes.Equal(key.id[:], id) {
			return key, true
		}
	}
	return macKey{}, false
}

// Seal sets the intent's MAC and MACKey. Every other field must be as it will be inserted; Ver 0 counts as 1.
func (k *MACKeys) Seal(i *Intent) {
	key := k.keys[0]
	i.MACKey, i.MAC = key.id[:], i.mac(key.secret)
}

// Verify returns nil if a CA node wrote the row as it is, else ErrNoMAC, ErrForgedMAC or, wrapped, ErrForeignMAC. A row that was
// read without its TBSCertificate must be given it first, as the certificate contains it; else it is ErrNoTBS.
func (k *MACKeys) Verify(i *Intent) error {
	if len(i.MAC) == 0 || len(i.MACKey) == 0 {
		return ErrNoMAC
	}
	if len(i.TBS) == 0 {
		return ErrNoTBS
	}
	key, ok := k.find(i.MACKey)
	if !ok {
		return fmt.Errorf("%w (id %x)", ErrForeignMAC, i.MACKey)
	}
	if !hmac.Equal(i.MAC, i.mac(key.secret)) {
		return ErrForgedMAC
	}
	return nil
}

// mac is HMAC-SHA-256 over everything that decides what is signed, and for whom: each field with its length. When the row was written does not.
func (i *Intent) mac(secret []byte) []byte {
	b := make([]byte, 0, 512+len(i.TBS))
	field := func(f []byte) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	number := func(n uint64) { b = binary.BigEndian.AppendUint64(b, n) }
	field([]byte("trivet-intent-mac-v1"))
	field([]byte(i.Issuer))
	field(i.Serial)
	field(i.Req)
	number(uint64(max(i.Ver, 1)))
	field(i.Body)
	field(i.TBS)
	field([]byte(i.Profile))
	number(uint64(i.ProfileVersion))
	field(i.ProfileHash)
	field([]byte(i.Requester))
	field([]byte(i.Reference))
	number(i.SiteEpoch)
	field([]byte(i.Node))
	h := hmac.New(sha256.New, secret)
	h.Write(b)
	return h.Sum(nil)
}
