package ca

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"math/big"
)

// Bounds of RSA keys, in bits (DESIGN §8).
const (
	minRSA = 2048
	maxRSA = 4096
)

// fermatRounds is how many steps of Fermat's factorisation a modulus must withstand: enough for every case seen in the wild, 100 times over.
const fermatRounds = 100

// checkKey says whether a subject key may be certified. A key of a kind that the profile does not permit is key-not-permitted; one that an
// attacker could break is weak-key. Keys of the Debian weak-PRNG list (2008) are not recognised: the list is too large to carry.
func (p *Profile) checkKey(pub any) (kind string, err error) {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		name := key.Curve.Params().Name
		for _, permitted := range p.Keys.EC {
			if name == permitted {
				return "ec", nil
			}
		}
		return "", refuse(KeyNotPermitted, "csr.public_key", "EC keys on %s are not permitted by profile %s: use one of %v", name, p.Name, p.Keys.EC)
	case *rsa.PublicKey:
		if p.Keys.RSA == nil {
			return "", refuse(KeyNotPermitted, "csr.public_key", "RSA keys are not permitted by profile %s", p.Name)
		}
		if err := checkRSA(key); err != nil {
			return "", err
		}
		if bits := key.N.BitLen(); bits < p.Keys.RSA.Min || bits > p.Keys.RSA.Max {
			return "", refuse(KeyNotPermitted, "csr.public_key", "an RSA key of %d bits is not permitted by profile %s: use %d to %d",
				bits, p.Name, p.Keys.RSA.Min, p.Keys.RSA.Max)
		}
		return "rsa", nil
	}
	return "", refuse(KeyNotPermitted, "csr.public_key", "the kind of key is not permitted: use EC P-256 or P-384, or RSA")
}

// checkRSA refuses moduli out of bounds and those that known defects made factorable.
func checkRSA(key *rsa.PublicKey) error {
	weak := func(format string, args ...any) error { return refuse(WeakKey, "csr.public_key", format, args...) }
	bits := key.N.BitLen()
	switch {
	case bits < minRSA || bits > maxRSA:
		return weak("the RSA key has %d bits: %d to %d are accepted", bits, minRSA, maxRSA)
	case bits%8 != 0:
		return weak("the RSA key has %d bits: the number must be a multiple of 8", bits)
	case key.E < 65537 || key.E&1 == 0:
		return weak("the RSA public exponent is %d: use 65537", key.E)
	case hasSmallFactor(key.N):
		return weak("the RSA modulus has a small prime factor")
	case isROCA(key.N):
		return weak("the RSA key has the fingerprint of ROCA (CVE-2017-15361): make it with another device")
	case isFermatClose(key.N):
		return weak("the RSA modulus is the product of two primes that are too close together")
	}
	return nil
}

// smallPrimes is the product of the odd primes below 752 (BR 6.1.6 asks for those).
var smallPrimes = func() *big.Int {
	product := big.NewInt(1)
	for _, p := range oddPrimes(752) {
		product.Mul(product, big.NewInt(p))
	}
	return product
}()

func oddPrimes(below int64) []int64 {
	var primes []int64
	for n := int64(3); n < below; n += 2 {
		if big.NewInt(n).ProbablyPrime(0) {
			primes = append(primes, n)
		}
	}
	return primes
}

func hasSmallFactor(n *big.Int) bool {
	if n.Bit(0) == 0 {
		return true
	}
	rest := new(big.Int).Mod(smallPrimes, n)
	return rest.Sign() == 0 || rest.GCD(nil, nil, rest, n).Cmp(big.NewInt(1)) != 0
}

// rocaResidues holds, for each small prime, the residues that are powers of 65537. Infineon's library built primes of the form
// k·M + (65537^a mod M), so that their product is such a power modulo every prime factor of M (Nemec et al., CCS 2017).
var rocaResidues = func() map[int64][]bool {
	all := make(map[int64][]bool)
	for _, p := range oddPrimes(168) {
		powers := make([]bool, p)
		for x := int64(1); !powers[x]; x = x * 65537 % p {
			powers[x] = true
		}
		all[p] = powers
	}
	return all
}()

func isROCA(n *big.Int) bool {
	var rest big.Int
	for p, powers := range rocaResidues {
		if !powers[rest.Mod(n, big.NewInt(p)).Int64()] {
			return false
		}
	}
	return true
}

func isFermatClose(n *big.Int) bool {
	a := new(big.Int).Sqrt(n)
	if new(big.Int).Mul(a, a).Cmp(n) == 0 {
		return true
	}
	one := big.NewInt(1)
	a.Add(a, one)
	var b2, b, square big.Int
	for range fermatRounds {
		b2.Sub(b2.Mul(a, a), n)
		b.Sqrt(&b2)
		if square.Mul(&b, &b).Cmp(&b2) == 0 {
			return true
		}
		a.Add(a, one)
	}
	return false
}
