package weakkey

import "math/big"

// Infineon's RSALib made primes of the form k·M + (65537^a mod M), M being the product of the first primes: 39 of them for the shortest keys,
// more for longer ones (Nemec et al., CCS 2017). A modulus of two such primes is a power of 65537 modulo M, and so modulo the product of the
// first 39 primes whatever its length. A sound modulus is one with a probability of about 2^-154.

// rocaPrime is one prime factor of M: which power of 65537 each residue is.
type rocaPrime struct {
	p     int64
	order int64   // of 65537 modulo p
	log   []int64 // of each residue, -1 if it is no power
}

// rocaPrimes are the odd ones; modulo 2 every odd modulus is a power.
var rocaPrimes = func() []rocaPrime {
	var all []rocaPrime
	for _, p := range oddPrimes(168) {
		f := rocaPrime{p: p, log: make([]int64, p)}
		for i := range f.log {
			f.log[i] = -1
		}
		for x := int64(1); f.log[x] < 0; x = x * 65537 % p {
			f.log[x] = f.order
			f.order++
		}
		all = append(all, f)
	}
	return all
}()

// rocaModulus is their product.
var rocaModulus = func() *big.Int {
	m := big.NewInt(1)
	for _, f := range rocaPrimes {
		m.Mul(m, big.NewInt(f.p))
	}
	return m
}()

// isROCA tells whether there is an exponent c with n = 65537^c modulo rocaModulus. Modulo each prime c is read from a table; that all of them
// are one and the same c is tested too, which the well-known quick test leaves out: by the Chinese remainder theorem they are if every two
// agree modulo what their orders have in common.
func isROCA(n *big.Int) bool {
	rest := new(big.Int).Mod(n, rocaModulus)
	var residue, p big.Int
	logs := make([]int64, len(rocaPrimes))
	for i, f := range rocaPrimes {
		p.SetInt64(f.p)
		if logs[i] = f.log[residue.Mod(rest, &p).Int64()]; logs[i] < 0 {
			return false
		}
	}
	for i, f := range rocaPrimes {
		for j, g := range rocaPrimes[:i] {
			if common := gcd(f.order, g.order); logs[i]%common != logs[j]%common {
				return false
			}
		}
	}
	return true
}

func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
