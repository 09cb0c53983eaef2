package hsm

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" // OAEP with SHA-1 is the one that every module offers; it needs no collision resistance
	"crypto/subtle"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
)

// TransportBits is the modulus length of a token's transport key, TransportExponent its public exponent.
const (
	TransportBits     = 3072
	TransportExponent = 65537
)

// ParseTransport reads the SPKI of a transport key and refuses any other key.
func ParseTransport(spki []byte) (*rsa.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(spki)
	pub, ok := key.(*rsa.PublicKey)
	if err != nil || !ok || pub.N.BitLen() != TransportBits || pub.E != TransportExponent {
		return nil, fmt.Errorf("the transport key is not an RSA-%d key with exponent %d", TransportBits, TransportExponent)
	}
	return pub, nil
}

// Seal closes a PKCS#8 private key so that only the token with that transport key can open it: a fresh AES-256 key under
// RSA-OAEP, followed by the key wrapped with it (RFC 5649). Token.Adopt opens it inside the token.
func Seal(transportSPKI, pkcs8 []byte) ([]byte, error) {
	pub, err := ParseTransport(transportSPKI)
	if err != nil {
		return nil, err
	}
	if _, err := x509.ParsePKCS8PrivateKey(pkcs8); err != nil {
		return nil, errors.New("the key to seal is no PKCS#8 private key") // the cause could quote the key
	}
	kek := make([]byte, 32)
	defer clear(kek)
	_, _ = rand.Read(kek) // documented never to fail
	wrapped, err := WrapKey(kek, pkcs8)
	if err != nil {
		return nil, err
	}
	if len(wrapped) > MaxBlob {
		return nil, fmt.Errorf("a key of %d octets is too long: at most %d can be sealed", len(pkcs8), MaxBlob-16)
	}
	head, err := SealSecret(pub, kek)
	if err != nil {
		return nil, err
	}
	return append(head, wrapped...), nil
}

// SealSecret closes a symmetric key for the token with that transport key, as tokens do it among themselves.
func SealSecret(to *rsa.PublicKey, secret []byte) ([]byte, error) {
	sealed, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, to, secret, nil)
	if err != nil {
		return nil, fmt.Errorf("sealing for the transport key: %w", err)
	}
	return sealed, nil
}

// icvPad is the first half of RFC 5649's alternative initial value; the plaintext's length is the second.
const icvPad = 0xA65959A6

var errWrapped = errors.New("the wrapped key was refused")

// WrapKey is AES key wrap with padding, RFC 5649.
func WrapKey(kek, plain []byte) ([]byte, error) {
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, fmt.Errorf("wrapping: %w", err)
	}
	if len(plain) == 0 || len(plain) > 1<<20 {
		return nil, fmt.Errorf("wrapping: %d octets cannot be wrapped", len(plain))
	}
	n := (len(plain) + 7) / 8
	out := make([]byte, 8*(n+1))
	binary.BigEndian.PutUint32(out, icvPad)
	binary.BigEndian.PutUint32(out[4:], uint32(len(plain)))
	copy(out[8:], plain)
	if n == 1 {
		block.Encrypt(out, out)
		return out, nil
	}
	var b [16]byte
	copy(b[:8], out)
	for j := range 6 {
		for i := 1; i <= n; i++ {
			copy(b[8:], out[8*i:])
			block.Encrypt(b[:], b[:])
			step(&b, uint64(n*j+i))
			copy(out[8*i:], b[8:])
		}
	}
	copy(out, b[:8])
	return out, nil
}

// UnwrapKey is the reverse of WrapKey. Every fault of wrapped gives the same error.
func UnwrapKey(kek, wrapped []byte) ([]byte, error) {
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, fmt.Errorf("unwrapping: %w", err)
	}
	if len(wrapped) < 16 || len(wrapped) > 1<<20 || len(wrapped)%8 != 0 {
		return nil, errWrapped
	}
	out := append([]byte(nil), wrapped...)
	n := len(out)/8 - 1
	if n == 1 {
		block.Decrypt(out, out)
	} else {
		unwrapBlocks(block, out, n)
	}
	size := int64(binary.BigEndian.Uint32(out[4:]))
	if binary.BigEndian.Uint32(out) != icvPad || size <= int64(8*(n-1)) || size > int64(8*n) ||
		subtle.ConstantTimeCompare(out[8+size:], make([]byte, int64(8*n)-size)) != 1 {
		clear(out)
		return nil, errWrapped
	}
	return out[8 : 8+size], nil
}

func unwrapBlocks(block cipher.Block, out []byte, n int) {
	var b [16]byte
	copy(b[:8], out)
	for j := 5; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			step(&b, uint64(n*j+i))
			copy(b[8:], out[8*i:])
			block.Decrypt(b[:], b[:])
			copy(out[8*i:], b[8:])
		}
	}
	copy(out, b[:8])
}

// step mixes the step's number into the first half of b.
func step(b *[16]byte, t uint64) {
	binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])^t)
}
