// Package custody keeps a backup of an HSM group in the hands of several people, of whom a given number must come together
// to use it. A backup's domain key is wrapped to a recipient key, whose private half is sealed under a secret that exists
// only in shares. It opens no connection and no token; whoever joins shares holds the domain key for that long.
package custody

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"slices"
	"strings"
)

// Bounds of a set of shares and its secret.
const (
	MinThreshold = 2
	MaxShares    = 16

	minSecret, maxSecret = 16, 64 // octets
)

// Split shares a secret among that many people, of whom any threshold together know it and fewer know nothing. The secret
// is a random key of 16 to 64 octets, since every share holds a hash of it.
func Split(secret []byte, shares, threshold int) ([]Share, error) {
	if threshold < MinThreshold || shares > MaxShares || threshold > shares {
		return nil, fmt.Errorf("splitting a secret: %d of %d shares: want %d to all of at most %d", threshold, shares, MinThreshold, MaxShares)
	}
	if len(secret) < minSecret || len(secret) > maxSecret {
		return nil, fmt.Errorf("splitting a secret: %d octets: want %d to %d", len(secret), minSecret, maxSecret)
	}
	one := Share{threshold: byte(threshold), of: byte(shares)}
	_, _ = rand.Read(one.set[:]) // documented never to fail
	// One polynomial for each octet of the secret, which is its value at 0; coefficients[0] are those of x, and so on.
	coefficients := make([][]byte, threshold-1)
	for i := range coefficients {
		coefficients[i] = make([]byte, len(secret))
		_, _ = rand.Read(coefficients[i])
		defer clear(coefficients[i])
	}
	out := make([]Share, shares)
	for i := range out {
		out[i] = one
		out[i].index = byte(i + 1)
		out[i].y = make([]byte, len(secret))
		for _, c := range slices.Backward(coefficients) {
			for k := range c {
				out[i].y[k] = mul(out[i].y[k]^c[k], out[i].index)
			}
		}
		subtle.XORBytes(out[i].y, out[i].y, secret)
	}
	commit := one.commitTo(secret, out)
	for i := range out {
		out[i].commit = commit
	}
	return out, nil
}

// Join gives the secret back and has checked that it is the one. The error names shares by their place in the argument,
// from 1, and by their index: one of another set, one given twice, one that is wrong. Which one is wrong cannot be told
// from the least number of shares; with one more it can.
func Join(shares []Share) ([]byte, error) {
	secret, err := join(shares)
	if err != nil {
		return nil, fmt.Errorf("joining shares: %w", err)
	}
	return secret, nil
}

func join(shares []Share) ([]byte, error) {
	if len(shares) == 0 {
		return nil, fmt.Errorf("there are none")
	}
	first := shares[0]
	for i, s := range shares {
		switch {
		case s.index == 0 || len(s.y) == 0:
			return nil, fmt.Errorf("share %d is empty", i+1)
		case s.set != first.set:
			return nil, fmt.Errorf("share %d is of set %s, share 1 of set %s: they do not belong together", i+1, s.Set(), first.Set())
		case s.commit != first.commit || s.threshold != first.threshold || s.of != first.of || len(s.y) != len(first.y):
			return nil, fmt.Errorf("share %d (index %d) and share 1 (index %d) contradict each other about set %s: one of them is forged", i+1, s.index, first.index, s.Set())
		}
		for k, other := range shares[:i] {
			if s.index == other.index && subtle.ConstantTimeCompare(s.y, other.y) == 1 {
				return nil, fmt.Errorf("share %d is share %d again (index %d)", i+1, k+1, s.index)
			}
			if s.index == other.index {
				return nil, fmt.Errorf("shares %d and %d both have index %d and differ: one of them is wrong", k+1, i+1, s.index)
			}
		}
	}
	m := int(first.threshold)
	if len(shares) < m {
		return nil, fmt.Errorf("%d of set %s: %d are needed", len(shares), first.Set(), m)
	}
	for chosen := range choices(len(shares), m) {
		basis := make([]Share, m)
		for i, c := range chosen {
			basis[i] = shares[c]
		}
		secret := valueAt(0, basis)
		if !first.is(secret, basis) {
			clear(secret)
			continue
		}
		var wrong []string
		for i, s := range shares {
			if subtle.ConstantTimeCompare(valueAt(s.index, basis), s.y) == 0 {
				wrong = append(wrong, fmt.Sprintf("share %d (index %d)", i+1, s.index))
			}
		}
		if len(wrong) > 0 {
			clear(secret)
			return nil, fmt.Errorf("wrong of set %s: %s; the others are right", first.Set(), strings.Join(wrong, ", "))
		}
		return secret, nil
	}
	return nil, fmt.Errorf("these do not give the secret of set %s: at least one of them is wrong; with one more that is right it can be named", first.Set())
}

// valueAt is the value at x of the polynomials through the shares' points, by Lagrange. The indices are no secret.
func valueAt(x byte, basis []Share) []byte {
	out := make([]byte, len(basis[0].y))
	for i, s := range basis {
		factor := byte(1)
		for k, other := range basis {
			if k != i {
				factor = mul(factor, mul(x^other.index, inverse(s.index^other.index)))
			}
		}
		for n := range out {
			out[n] ^= mul(s.y[n], factor)
		}
	}
	return out
}

// choices are all ways to choose m of n, at most 12,870.
func choices(n, m int) func(yield func([]int) bool) {
	return func(yield func([]int) bool) {
		c := make([]int, m)
		for i := range c {
			c[i] = i
		}
		for yield(c) {
			i := m - 1
			for i >= 0 && c[i] == n-m+i {
				i--
			}
			if i < 0 {
				return
			}
			c[i]++
			for k := i + 1; k < m; k++ {
				c[k] = c[k-1] + 1
			}
		}
	}
}

// commitTo is the hash by which the whole set is recognised: 4 octets of one over the secret, which tell soon that some
// shares are wrong, and 16 of one over all shares, which tell that none is. (Wrong shares may well give the right secret,
// and then the right ones would be called wrong.)
func (s Share) commitTo(secret []byte, all []Share) (out [20]byte) {
	h := sha256.New()
	h.Write([]byte("trivet-custody-set-v1"))
	h.Write(s.set[:])
	h.Write([]byte{s.threshold, s.of, byte(len(secret))})
	h.Write(secret)
	copy(out[:4], h.Sum(nil))
	for _, share := range all {
		h.Write(share.y)
	}
	copy(out[4:], h.Sum(nil))
	return out
}

// is tells whether these shares are right, of which there are as many as needed, and secret is what they give.
func (s Share) is(secret []byte, basis []Share) bool {
	if commit := s.commitTo(secret, nil); subtle.ConstantTimeCompare(commit[:4], s.commit[:4]) == 0 {
		return false
	}
	all := make([]Share, s.of)
	for i := range all {
		all[i].y = valueAt(byte(i+1), basis)
		defer all[i].Wipe()
	}
	commit := s.commitTo(secret, all)
	return subtle.ConstantTimeCompare(commit[:], s.commit[:]) == 1
}

// mul multiplies in GF(256) modulo x^8+x^4+x^3+x+1. It takes the same time whatever the factors, as tables would not.
func mul(a, b byte) byte {
	var p byte
	for range 8 {
		p ^= a & -(b & 1)
		a = a<<1 ^ 0x1b&-(a>>7)
		b >>= 1
	}
	return p
}

// inverse is a^254, which is 1/a, and 0 for 0.
func inverse(a byte) byte {
	p := byte(1)
	for range 7 { // 254 = 2+4+…+128
		a = mul(a, a)
		p = mul(p, a)
	}
	return p
}
