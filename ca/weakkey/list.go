package weakkey

import (
	"bufio"
	"crypto"
	"crypto/sha1" // how the published lists name keys; nothing rests on its strength
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strings"
)

// List is a set of keys whose private half is known. The zero value and nil are empty. Once read it is safe for concurrent use.
//
// Files are text, one key a line, in hex of either case; empty lines and those that begin with # are passed over. A key is written as
//
//   - 20 digits: the last 80 bits of the SHA-1 of the line "Modulus=", the modulus in capital hex, and a newline. The files of Debian's
//     package openssl-blacklist (blacklist.RSA-2048 and so on) are of this form;
//   - 40 digits: the whole of that SHA-1, as `openssl rsa -noout -modulus -in key.pem | sha1sum` prints it;
//   - 64 digits: the SHA-256 of the DER SubjectPublicKeyInfo, of any kind of key, as
//     `openssl pkey -pubout -outform DER -in key.pem | sha256sum` prints it.
type List struct {
	short map[[10]byte]struct{}
	spki  map[[32]byte]struct{}
}

// LoadList reads files into one list.
func LoadList(files ...string) (*List, error) {
	l := &List{short: map[[10]byte]struct{}{}, spki: map[[32]byte]struct{}{}}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("reading a list of weak keys: %w", err)
		}
		err = errors.Join(l.read(f), f.Close())
		if err != nil {
			return nil, fmt.Errorf("reading the list of weak keys %s: %w", name, err)
		}
	}
	return l, nil
}

// ParseList reads one file's text.
func ParseList(r io.Reader) (*List, error) {
	l := &List{short: map[[10]byte]struct{}{}, spki: map[[32]byte]struct{}{}}
	if err := l.read(r); err != nil {
		return nil, fmt.Errorf("reading a list of weak keys: %w", err)
	}
	return l, nil
}

func (l *List) read(r io.Reader) error {
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		b, err := hex.DecodeString(text)
		switch {
		case err != nil:
			return fmt.Errorf("line %d is not hex", n)
		case len(b) == 10:
			l.short[[10]byte(b)] = struct{}{}
		case len(b) == sha1.Size:
			l.short[[10]byte(b[10:])] = struct{}{}
		case len(b) == sha256.Size:
			l.spki[[32]byte(b)] = struct{}{}
		default:
			return fmt.Errorf("line %d has %d digits: a key is written with 20, 40 or 64", n, len(text))
		}
	}
	return lines.Err()
}

// Len returns how many keys are in the list.
func (l *List) Len() int {
	if l == nil {
		return 0
	}
	return len(l.short) + len(l.spki)
}

// hasModulus costs one short hash, and nothing where the list names no modulus.
func (l *List) hasModulus(n *big.Int) bool {
	if l == nil || len(l.short) == 0 || n == nil || n.BitLen() > MaxRSA {
		return false
	}
	sum := sha1.Sum(fmt.Appendf(nil, "Modulus=%X\n", n))
	_, found := l.short[[10]byte(sum[10:])]
	return found
}

func (l *List) hasKey(pub crypto.PublicKey) bool {
	if l == nil || len(l.spki) == 0 {
		return false
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return false // no certificate can hold it either
	}
	_, found := l.spki[sha256.Sum256(der)]
	return found
}
