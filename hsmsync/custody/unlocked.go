package custody

import (
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha1" // as hsm.SealSecret
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"trivet/hsm"
)

const halfKey = 32 // octets of each half of a domain key: AES-256, HMAC-SHA256

// Unlocked is a bundle's domain key in the open. It is in this process's memory until Close, so: on a machine for that
// purpose, for as long as the restore takes. It is safe for concurrent use.
type Unlocked struct {
	mu       sync.Mutex
	kek, mac []byte // nil when closed
}

// Unlock joins the custodians' shares and opens the domain key. Every blob is then known to be as a member of the domain made
// it. A share that does not belong is named.
func Unlock(b Bundle, shares []Share) (*Unlocked, error) {
	u, err := unlock(b, shares)
	if err != nil {
		return nil, fmt.Errorf("unlocking the backup of group %s: %w", b.Group, err)
	}
	return u, nil
}

func unlock(b Bundle, shares []Share) (*Unlocked, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	key, err := b.Recipient.open(shares)
	if err != nil {
		return nil, err
	}
	defer forget(key)
	u := &Unlocked{}
	half := len(b.Wrapped) / 2
	for _, h := range []struct {
		to      *[]byte
		wrapped []byte
	}{{&u.kek, b.Wrapped[:half]}, {&u.mac, b.Wrapped[half:]}} {
		*h.to, err = rsa.DecryptOAEP(sha1.New(), nil, key, h.wrapped, nil)
		if err == nil && len(*h.to) != halfKey {
			err = fmt.Errorf("%d octets: must be %d", len(*h.to), halfKey)
		}
		if err != nil {
			u.Close()
			return nil, errors.New("the domain key does not open with the recipient's key: it was wrapped to another one, or damaged")
		}
	}
	for _, blob := range b.Blobs {
		h := hmac.New(sha256.New, u.mac)
		h.Write(blob.Authenticated())
		if !hmac.Equal(h.Sum(nil), blob.MAC) {
			u.Close()
			return nil, fmt.Errorf("the blob of key %s (%s) was not made with this domain key, or was altered: nothing is restored from this backup", blob.ID, blob.Label)
		}
	}
	return u, nil
}

// WrapFor wraps the domain key for the token with that transport key, as Token.ImportDomain takes it. Whether the key really
// is a token's is for the caller to know: whoever holds its private half learns every key of the group.
func (u *Unlocked) WrapFor(transportSPKI []byte) (wrapped []byte, err error) {
	to, err := hsm.ParseTransport(transportSPKI)
	if err != nil {
		return nil, fmt.Errorf("wrapping the domain key: %w", err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.kek == nil {
		return nil, errors.New("wrapping the domain key: it was closed already")
	}
	for _, half := range [][]byte{u.kek, u.mac} {
		out, err := hsm.SealSecret(to, half)
		if err != nil {
			return nil, fmt.Errorf("wrapping the domain key: %w", err)
		}
		wrapped = append(wrapped, out...)
	}
	return wrapped, nil
}

// Close forgets the domain key.
func (u *Unlocked) Close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	clear(u.kek)
	clear(u.mac)
	u.kek, u.mac = nil, nil
}
