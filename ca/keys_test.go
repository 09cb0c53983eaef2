package ca_test

import (
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"os"
	"strings"
	"testing"

	"trivet/ca"
)

func TestWeakRSAKeysAreRefused(t *testing.T) {
	good, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.CheckRSA(&good.PublicKey); err != nil {
		t.Fatalf("a sound key: %v", err)
	}
	weak := weakModuli(t)
	bits := func(n int) *big.Int { return new(big.Int).SetBit(new(big.Int).Set(big.NewInt(1)), n-1, 1) }
	for _, c := range []struct {
		name string
		key  rsa.PublicKey
		want string
	}{
		{"1024 bits", rsa.PublicKey{N: bits(1024), E: 65537}, "1024 bits"},
		{"2047 bits", rsa.PublicKey{N: bits(2047), E: 65537}, "2047 bits"},
		{"8192 bits", rsa.PublicKey{N: bits(8192), E: 65537}, "8192 bits"},
		{"2052 bits", rsa.PublicKey{N: bits(2052), E: 65537}, "multiple of 8"},
		{"exponent 3", rsa.PublicKey{N: good.N, E: 3}, "exponent"},
		{"even exponent", rsa.PublicKey{N: good.N, E: 65538}, "exponent"},
		{"even modulus", rsa.PublicKey{N: new(big.Int).Sub(good.N, big.NewInt(1)), E: 65537}, "small prime"},
		{"factor 751", rsa.PublicKey{N: weak["factor-751"], E: 65537}, "small prime"},
		{"close primes", rsa.PublicKey{N: weak["close-primes"], E: 65537}, "close together"},
		{"a square", rsa.PublicKey{N: weak["square"], E: 65537}, "close together"},
		{"ROCA", rsa.PublicKey{N: weak["roca"], E: 65537}, "ROCA"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := ca.CheckRSA(&c.key)
			if ca.NameOf(err) != ca.WeakKey || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want weak-key with %q", err, c.want)
			}
		})
	}
}

// weakModuli reads testdata/weak-rsa.txt. Its ROCA modulus is a product of primes k·M + (65537^a mod M), M the product of the primes below 168.
func weakModuli(t *testing.T) map[string]*big.Int {
	t.Helper()
	text, err := os.ReadFile("testdata/weak-rsa.txt")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]*big.Int)
	for line := range strings.Lines(string(text)) {
		if name, digits, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			n, ok := new(big.Int).SetString(digits, 16)
			if !ok {
				t.Fatalf("%s: not hex", name)
			}
			all[name] = n
		}
	}
	return all
}
