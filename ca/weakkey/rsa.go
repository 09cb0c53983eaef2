package weakkey

import (
	"crypto/rsa"
	"math/big"
	"slices"
)

// Bounds of RSA keys.
const (
	MinRSA = 2048 // bits (BR 6.1.5)
	MaxRSA = 4096 // bits: verifying with greater ones costs more than an anonymous caller may make anybody pay

	// minExponent is 2^16+1, the least that BR 6.1.6 recommends. The greatest, 2^256-1, is out of reach: Go's keys hold exponents below 2^31.
	minExponent = 1<<16 + 1

	// fermatRounds is how many steps of Fermat's factorisation a modulus must withstand (BR 6.1.1.3). Every case seen in the wild took one.
	fermatRounds = 100

	// trialBelow bounds the small factors looked for: BR 6.1.6 asks for those below 752, and more cost nothing.
	trialBelow = 1 << 10
)

// checkRSA refuses moduli and exponents out of bounds, and moduli that known defects made factorable.
func checkRSA(key *rsa.PublicKey) error {
	if key.N == nil || key.N.Sign() <= 0 {
		return weak(Size, "the RSA key has no modulus")
	}
	switch bits := key.N.BitLen(); {
	case bits < MinRSA || bits > MaxRSA:
		return weak(Size, "the RSA key has %d bits: %d to %d are accepted", bits, MinRSA, MaxRSA)
	case bits%8 != 0:
		return weak(Size, "the RSA key has %d bits: the number must be a multiple of 8", bits)
	case key.E < minExponent:
		return weak(Exponent, "the RSA public exponent is %d, below %d: use 65537", key.E, minExponent)
	case key.E&1 == 0:
		return weak(Exponent, "the RSA public exponent %d is even: use 65537", key.E)
	case key.N.Bit(0) == 0 || hasSmallFactor(key.N):
		return weak(SmallFactor, "the RSA modulus has a prime factor below %d", trialBelow)
	case isROCA(key.N):
		return weak(ROCA, "the RSA key has the fingerprint of ROCA (CVE-2017-15361): make it with another device")
	case isFermatClose(key.N):
		return weak(ClosePrimes, "the RSA modulus is the product of two primes that are too close together")
	}
	return nil
}

// oddPrimes divides by what it has found: every program that imports this package waits for it at its start.
func oddPrimes(below int64) []int64 {
	var primes []int64
	for n := int64(3); n < below; n += 2 {
		if !slices.ContainsFunc(primes, func(p int64) bool { return n%p == 0 }) {
			primes = append(primes, n)
		}
	}
	return primes
}

// smallPrimes is the product of the odd primes below trialBelow.
var smallPrimes = func() *big.Int {
	product := big.NewInt(1)
	for _, p := range oddPrimes(trialBelow) {
		product.Mul(product, big.NewInt(p))
	}
	return product
}()

// hasSmallFactor needs one long division: what is left is as short as the product of the primes.
func hasSmallFactor(n *big.Int) bool {
	rest := new(big.Int).Mod(n, smallPrimes)
	return rest.Sign() == 0 || rest.GCD(nil, nil, rest, smallPrimes).Cmp(big.NewInt(1)) != 0
}

// isFermatClose tries to write n = a² - b² = (a-b)(a+b), with a from the square root of n upwards.
func isFermatClose(n *big.Int) bool {
	a := new(big.Int).Sqrt(n)
	square := new(big.Int).Mul(a, a)
	if square.Cmp(n) == 0 {
		return true
	}
	one := big.NewInt(1)
	a.Add(a, one)
	b2 := square.Sub(square.Mul(a, a), n)
	step := new(big.Int).Add(new(big.Int).Lsh(a, 1), one) // from a² to (a+1)²
	two := big.NewInt(2)
	for range fermatRounds {
		if isSquare(b2) {
			return true
		}
		b2.Add(b2, step)
		step.Add(step, two)
	}
	return false
}

// squareFilter is the product of the moduli below; it fits a word, so that most numbers are found to be no square by one division.
const squareFilter = 64 * 63 * 65 * 11 * 17

// squares tells, for each modulus of the filter, which residues are squares.
var squares = func() map[uint64][]bool {
	all := make(map[uint64][]bool)
	for _, m := range []uint64{64, 63, 65, 11, 17} {
		is := make([]bool, m)
		for x := range m {
			is[x*x%m] = true
		}
		all[m] = is
	}
	return all
}()

func isSquare(n *big.Int) bool {
	rest := new(big.Int).Mod(n, big.NewInt(squareFilter)).Uint64()
	for m, is := range squares {
		if !is[rest%m] {
			return false
		}
	}
	root := new(big.Int).Sqrt(n)
	return root.Mul(root, root).Cmp(n) == 0
}
