package custody

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"trivet/hsm"
)

const (
	secretSize   = 32       // of the AES-256 key that is shared
	maxRecipient = 16 << 10 // octets, encoded
)

// Recipient is the key that backups of a group are wrapped to, in the place of a token's transport key. Nothing about it is secret: its private half is sealed, and
// only the custodians together can open it. One recipient may serve many backups.
type Recipient struct {
	SPKI []byte `json:"spki"` // DER
	// Sealed is the PKCS#8 private key under AES-256-GCM: nonce, ciphertext, tag.
	Sealed []byte `json:"sealed"`
	Set    Set    `json:"set"`
}

// Set describes the shares that open a recipient, so that each can be recognised without the others.
type Set struct {
	ID        string `json:"id"`
	Threshold int    `json:"threshold"`
	// Digests holds a hash of each share, in the order of their indices.
	Digests [][]byte `json:"digests"`
}

// NewRecipient makes a recipient key and the shares that open it, and forgets the private key.
func NewRecipient(shares, threshold int) (Recipient, []Share, error) {
	fail := func(err error) (Recipient, []Share, error) {
		return Recipient{}, nil, fmt.Errorf("making a backup recipient: %w", err)
	}
	secret := make([]byte, secretSize)
	defer clear(secret)
	_, _ = rand.Read(secret) // documented never to fail
	parts, err := Split(secret, shares, threshold)
	if err != nil {
		return fail(err)
	}
	key, err := rsa.GenerateKey(rand.Reader, hsm.TransportBits)
	if err != nil {
		return fail(err)
	}
	defer forget(key)
	r := Recipient{Set: Set{ID: parts[0].Set(), Threshold: threshold}}
	for _, s := range parts {
		d := s.digest()
		r.Set.Digests = append(r.Set.Digests, d[:])
	}
	if r.SPKI, err = x509.MarshalPKIXPublicKey(&key.PublicKey); err != nil {
		return fail(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fail(err)
	}
	defer clear(pkcs8)
	aead, err := sealing(secret)
	if err != nil {
		return fail(err)
	}
	r.Sealed = aead.Seal(nil, nil, pkcs8, r.bound())
	return r, parts, nil
}

func sealing(secret []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// bound is what the seal covers beside the key, each part preceded by its length.
func (r Recipient) bound() []byte {
	out := []byte("trivet-custody-recipient-v1")
	for _, part := range append([][]byte{r.SPKI, []byte(r.Set.ID), {byte(r.Set.Threshold)}}, r.Set.Digests...) {
		out = binary.BigEndian.AppendUint32(out, uint32(len(part)))
		out = append(out, part...)
	}
	return out
}

// Fingerprint is the hex SHA-256 of SPKI, by which a backup's grant names the recipient.
func (r Recipient) Fingerprint() string {
	sum := sha256.Sum256(r.SPKI)
	return hex.EncodeToString(sum[:])
}

// ParseRecipient reads a recipient's JSON strictly and checks it.
func ParseRecipient(text []byte) (Recipient, error) {
	r, err := decode[Recipient](text, maxRecipient)
	if err == nil {
		err = r.Check()
	}
	if err != nil {
		return Recipient{}, fmt.Errorf("reading a backup recipient: %w", err)
	}
	return r, nil
}

// Check refuses a recipient that nobody could open, or that no member would wrap to.
func (r Recipient) Check() error {
	if _, err := hsm.ParseTransport(r.SPKI); err != nil {
		return fmt.Errorf("recipient spki: %w", err)
	}
	if len(r.Sealed) < 512 || len(r.Sealed) > 4096 {
		return fmt.Errorf("recipient's sealed key of %d octets: must be 512 to 4096", len(r.Sealed))
	}
	id, err := unletter(r.Set.ID)
	if err != nil || len(id) != len(Share{}.set) || letters.EncodeToString(id) != r.Set.ID {
		return fmt.Errorf("share set %.20q: want 8 letters and digits, as shares have it", r.Set.ID)
	}
	if n := len(r.Set.Digests); r.Set.Threshold < MinThreshold || r.Set.Threshold > n || n > MaxShares {
		return fmt.Errorf("share set %s: %d of %d shares: want %d to all of at most %d", r.Set.ID, r.Set.Threshold, n, MinThreshold, MaxShares)
	}
	for i, d := range r.Set.Digests {
		if len(d) != sha256.Size {
			return fmt.Errorf("share set %s: digest %d of %d octets: must be %d", r.Set.ID, i+1, len(d), sha256.Size)
		}
	}
	return nil
}

// Join is Join for the shares of this set alone: every share that is not one of it is named, right away.
func (s Set) Join(shares []Share) ([]byte, error) {
	var wrong []error
	for i, share := range shares {
		switch d := share.digest(); {
		case share.Set() != s.ID:
			wrong = append(wrong, fmt.Errorf("share %d (index %d) is of set %s, not of %s: it opens something else", i+1, share.index, share.Set(), s.ID))
		case share.index < 1 || int(share.index) > len(s.Digests) || !bytes.Equal(d[:], s.Digests[share.index-1]):
			wrong = append(wrong, fmt.Errorf("share %d (index %d) of set %s is wrong: it is not the one that was handed out", i+1, share.index, s.ID))
		}
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, fmt.Errorf("joining shares: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return Join(shares)
}

// open gives the private key. The caller forgets it.
func (r Recipient) open(shares []Share) (*rsa.PrivateKey, error) {
	if err := r.Check(); err != nil {
		return nil, err
	}
	secret, err := r.Set.Join(shares)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	aead, err := sealing(secret)
	if err != nil {
		return nil, fmt.Errorf("opening the recipient's key: %w", err)
	}
	pkcs8, err := aead.Open(nil, nil, r.Sealed, r.bound())
	if err != nil {
		return nil, errors.New("opening the recipient's key: the shares are right and the sealed key is not: the recipient was altered")
	}
	defer clear(pkcs8)
	parsed, err := x509.ParsePKCS8PrivateKey(pkcs8)
	key, ok := parsed.(*rsa.PrivateKey)
	if err != nil || !ok {
		return nil, fmt.Errorf("opening the recipient's key: it is no RSA key (%v)", err)
	}
	public, err := hsm.ParseTransport(r.SPKI)
	if err != nil || !key.PublicKey.Equal(public) {
		forget(key)
		return nil, errors.New("opening the recipient's key: it does not match its public key")
	}
	return key, nil
}

// forget overwrites what of a private key can be reached.
func forget(key *rsa.PrivateKey) {
	clear(key.D.Bits())
	for _, p := range key.Primes {
		clear(p.Bits())
	}
	pre := &key.Precomputed
	if pre.Dp != nil && pre.Dq != nil && pre.Qinv != nil {
		clear(pre.Dp.Bits())
		clear(pre.Dq.Bits())
		clear(pre.Qinv.Bits())
	}
}

// decode reads one JSON value strictly: what it does not know, or what follows, is an error.
func decode[T any](text []byte, most int) (v T, err error) {
	if len(text) > most {
		return v, fmt.Errorf("%d octets: must be at most %d", len(text), most)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return v, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return v, errors.New("something follows it")
	}
	return v, nil
}
