package weakkey

import (
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	"os"
	"strings"
	"testing"
)

// sound returns a key that no check may refuse.
func sound(t testing.TB, bits int) *rsa.PublicKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return &key.PublicKey
}

// wants fails the test unless err is the defect.
func wants(t *testing.T, err error, defect string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Defect != defect || e.Detail == "" {
		t.Fatalf("got %v, want defect %s", err, defect)
	}
}

func TestWeakRSAKeysAreRefused(t *testing.T) {
	good := sound(t, 2048)
	for _, bits := range []int{2048, 3072} {
		if err := Check(sound(t, bits), nil); err != nil {
			t.Fatalf("a sound key of %d bits: %v", bits, err)
		}
	}
	weak := weakModuli(t)
	bits := func(n int) *big.Int { return new(big.Int).SetBit(new(big.Int).Set(big.NewInt(1)), n-1, 1) }
	for _, c := range []struct {
		name string
		key  rsa.PublicKey
		want string
	}{
		{"no modulus", rsa.PublicKey{E: 65537}, Size},
		{"a modulus of zero", rsa.PublicKey{N: new(big.Int), E: 65537}, Size},
		{"1024 bits", rsa.PublicKey{N: bits(1024), E: 65537}, Size},
		{"2047 bits", rsa.PublicKey{N: bits(2047), E: 65537}, Size},
		{"2052 bits", rsa.PublicKey{N: bits(2052), E: 65537}, Size},
		{"8192 bits", rsa.PublicKey{N: bits(8192), E: 65537}, Size},
		{"16384 bits", rsa.PublicKey{N: bits(16384), E: 65537}, Size},
		{"exponent 1", rsa.PublicKey{N: good.N, E: 1}, Exponent},
		{"exponent 3", rsa.PublicKey{N: good.N, E: 3}, Exponent},
		{"exponent 65535", rsa.PublicKey{N: good.N, E: 65535}, Exponent},
		{"even exponent", rsa.PublicKey{N: good.N, E: 65538}, Exponent},
		{"even modulus", rsa.PublicKey{N: new(big.Int).Sub(good.N, big.NewInt(1)), E: 65537}, SmallFactor},
		{"factor 751", rsa.PublicKey{N: weak["factor-751"], E: 65537}, SmallFactor},
		{"close primes", rsa.PublicKey{N: weak["close-primes"], E: 65537}, ClosePrimes},
		{"a square", rsa.PublicKey{N: weak["square"], E: 65537}, ClosePrimes},
		{"ROCA", rsa.PublicKey{N: weak["roca"], E: 65537}, ROCA},
	} {
		t.Run(c.name, func(t *testing.T) { wants(t, Check(&c.key, nil), c.want) })
	}
}

// weakModuli reads testdata/moduli.txt. Its ROCA modulus is a product of primes k·M + (65537^a mod M), M the product of the primes below 168.
func weakModuli(t testing.TB) map[string]*big.Int {
	t.Helper()
	text, err := os.ReadFile("testdata/moduli.txt")
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

func TestFermatFindsPrimesUpToItsLastRound(t *testing.T) {
	// n = a² - b², found in the round that reaches a: the first tried is one above the root of n.
	p, err := rand.Prime(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	// q is p + 2d with d² ≈ 2·rounds·p, so that a - sqrt(n) ≈ rounds.
	for _, c := range []struct {
		rounds int64
		found  bool
	}{{1, true}, {50, true}, {90, true}, {120, false}, {100000, false}} {
		d := new(big.Int).Sqrt(new(big.Int).Mul(p, big.NewInt(2*c.rounds)))
		q := new(big.Int).Add(p, d.Lsh(d, 1))
		if got := isFermatClose(new(big.Int).Mul(p, q)); got != c.found {
			t.Errorf("a factor about %d rounds away: found is %v", c.rounds, got)
		}
	}
}

func TestSquaresAreTold(t *testing.T) {
	for i := range int64(100000) {
		root := new(big.Int).Sqrt(big.NewInt(i))
		if want := root.Mul(root, root).Int64() == i; isSquare(big.NewInt(i)) != want {
			t.Fatalf("%d: a square is %v", i, !want)
		}
	}
}

// The quick test for ROCA, each prime by itself, takes this number for one of RSALib's: every residue is a power of 65537, but not the same power.
func TestROCAWantsOneExponentForAllPrimes(t *testing.T) {
	residues := func(exponent func(i int) int64) *big.Int {
		n := new(big.Int)
		for i, f := range rocaPrimes {
			p := big.NewInt(f.p)
			power := new(big.Int).Exp(big.NewInt(65537), big.NewInt(exponent(i)), p)
			other := new(big.Int).Div(rocaModulus, p)
			n.Add(n, power.Mul(power, other).Mul(power, new(big.Int).ModInverse(other, p)))
		}
		return n.Mod(n, rocaModulus)
	}
	if !isROCA(residues(func(int) int64 { return 1234567 })) {
		t.Error("a power of 65537 is not recognised")
	}
	if isROCA(residues(func(i int) int64 { return int64(i) })) {
		t.Error("powers of 65537 with different exponents are taken for one")
	}
}

func BenchmarkCheck(b *testing.B) {
	weak := weakModuli(b)
	list, err := ParseList(strings.NewReader(strings.Repeat("0", 20) + "\n" + strings.Repeat("0", 64)))
	if err != nil {
		b.Fatal(err)
	}
	for name, key := range map[string]*rsa.PublicKey{
		"sound 2048": sound(b, 2048), "sound 4096": sound(b, 4096), "8192 bits": {N: new(big.Int).Lsh(big.NewInt(1), 8191), E: 65537},
		"ROCA": {N: weak["roca"], E: 65537}, "close primes": {N: weak["close-primes"], E: 65537},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				_ = Check(key, list)
			}
		})
	}
	p256 := p256Key(b)
	b.Run("P-256", func(b *testing.B) {
		for b.Loop() {
			_ = Check(p256, list)
		}
	})
}
