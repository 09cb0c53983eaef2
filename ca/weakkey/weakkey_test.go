//lint:file-ignore SA1019 keys made of raw coordinates are just what is to be recognised

package weakkey

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func p256Key(t testing.TB) *ecdsa.PublicKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &key.PublicKey
}

func TestECKeysThatAreNoneAreRefused(t *testing.T) {
	good := p256Key(t)
	if err := Check(good, nil); err != nil {
		t.Fatal(err)
	}
	p := elliptic.P256().Params().P
	for _, c := range []struct {
		name string
		key  ecdsa.PublicKey
		want string
	}{
		{"no curve", ecdsa.PublicKey{X: good.X, Y: good.Y}, Curve},
		{"P-224", ecdsa.PublicKey{Curve: elliptic.P224(), X: good.X, Y: good.Y}, Curve},
		{"infinity", ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int), Y: new(big.Int)}, InvalidPoint},
		{"no point", ecdsa.PublicKey{Curve: elliptic.P256()}, InvalidPoint},
		{"off the curve", ecdsa.PublicKey{Curve: elliptic.P256(), X: good.X, Y: new(big.Int).Xor(good.Y, big.NewInt(1))}, InvalidPoint},
		{"a coordinate above the field", ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int).Add(good.X, p), Y: good.Y}, InvalidPoint},
		{"a negative coordinate", ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int).Neg(good.X), Y: good.Y}, InvalidPoint},
		{"a point of another curve", ecdsa.PublicKey{Curve: elliptic.P384(), X: good.X, Y: good.Y}, InvalidPoint},
	} {
		t.Run(c.name, func(t *testing.T) { wants(t, Check(&c.key, nil), c.want) })
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	wants(t, Check(ed.Public(), nil), Kind)
}

func TestListedKeysAreRefused(t *testing.T) {
	key, ec := sound(t, 2048), p256Key(t)
	modulus := sha1.Sum(fmt.Appendf(nil, "Modulus=%X\n", key.N))
	spki := func(pub any) string {
		der, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%x", sha256.Sum256(der))
	}
	for name, text := range map[string]string{
		"80 bits of SHA-1": fmt.Sprintf("# Debian\n\n%x\r\n", modulus[10:]),
		"SHA-1":            fmt.Sprintf("%X", modulus),
		"SHA-256":          "  " + spki(key) + "  \n",
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "list")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			list, err := LoadList(file)
			if err != nil || list.Len() != 1 {
				t.Fatalf("%d keys, %v", list.Len(), err)
			}
			wants(t, Check(key, list), Listed)
			if err := Check(sound(t, 2048), list); err != nil {
				t.Errorf("another key: %v", err)
			}
		})
	}
	list, err := ParseList(strings.NewReader(spki(ec)))
	if err != nil {
		t.Fatal(err)
	}
	wants(t, Check(ec, list), Listed)
	// The digest of the published lists, as openssl prints it: they must recognise the same keys.
	n, _ := new(big.Int).SetString("00c0ffee", 16)
	if got := fmt.Sprintf("%x", sha1.Sum(fmt.Appendf(nil, "Modulus=%X\n", n))); got != fmt.Sprintf("%x", sha1.Sum([]byte("Modulus=C0FFEE\n"))) {
		t.Error("the modulus is not written as openssl writes it")
	}
}

func TestListsThatCannotBeReadAreRefused(t *testing.T) {
	for _, text := range []string{"zz", "00", strings.Repeat("0", 22), "0123456789abcdef0123 # remark", strings.Repeat("0", 100000)} {
		if _, err := ParseList(strings.NewReader(text)); err == nil {
			t.Errorf("%.30q was read", text)
		}
	}
	if _, err := LoadList(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a missing list was read")
	}
}

// No modulus and exponent bring the checks to a halt or a panic.
func FuzzRSA(f *testing.F) {
	for _, n := range weakModuli(f) {
		f.Add(n.Bytes(), 65537)
	}
	f.Add([]byte{}, 3)
	f.Fuzz(func(t *testing.T, n []byte, e int) {
		_ = Check(&rsa.PublicKey{N: new(big.Int).SetBytes(n), E: e}, nil)
	})
}

// No point does either.
func FuzzEC(f *testing.F) {
	good := p256Key(f)
	f.Add(good.X.Bytes(), good.Y.Bytes())
	f.Fuzz(func(t *testing.T, x, y []byte) {
		key := &ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int).SetBytes(x), Y: new(big.Int).SetBytes(y)}
		if err := Check(key, nil); err == nil && !key.Curve.IsOnCurve(key.X, key.Y) {
			t.Fatal("a point off the curve was accepted")
		}
	})
}

// What is read can be asked, whatever it was.
func FuzzList(f *testing.F) {
	f.Add("# a\n0123456789abcdef0123\n")
	f.Fuzz(func(t *testing.T, text string) {
		if l, err := ParseList(strings.NewReader(text)); err == nil {
			l.hasModulus(big.NewInt(1))
		}
	})
}
