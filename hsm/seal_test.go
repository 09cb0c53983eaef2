package hsm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/hex"
	"testing"

	"pgregory.net/rapid"

	"trivet/hsm"
)

func TestKeyWrapGivesTheVectorsOfRFC5649(t *testing.T) {
	kek, _ := hex.DecodeString("5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8")
	for plain, wrapped := range map[string]string{
		"c37b7e6492584340bed12207808941155068f738": "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a",
		"466f7250617369": "afbeb0f07dfbf5419200f2ccb50bb24f",
	} {
		p, _ := hex.DecodeString(plain)
		w, err := hsm.WrapKey(kek, p)
		if err != nil || hex.EncodeToString(w) != wrapped {
			t.Errorf("wrapping %s: %x, %v", plain, w, err)
		}
		if back, err := hsm.UnwrapKey(kek, w); err != nil || !bytes.Equal(back, p) {
			t.Errorf("unwrapping %s: %x, %v", wrapped, back, err)
		}
	}
}

func TestKeyWrapRoundTripsAndRefusesEveryChange(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		kek := rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(r, "kek")
		plain := rapid.SliceOfN(rapid.Byte(), 1, 200).Draw(r, "plain")
		w, err := hsm.WrapKey(kek, plain)
		if err != nil {
			r.Fatal(err)
		}
		if back, err := hsm.UnwrapKey(kek, w); err != nil || !bytes.Equal(back, plain) {
			r.Fatalf("%x, %v", back, err)
		}
		bad := bytes.Clone(w)
		bad[rapid.IntRange(0, len(w)-1).Draw(r, "octet")] ^= byte(1 << rapid.IntRange(0, 7).Draw(r, "bit"))
		if _, err := hsm.UnwrapKey(kek, bad); err == nil {
			r.Fatal("a changed blob was unwrapped")
		}
		if _, err := hsm.UnwrapKey(kek, w[:rapid.IntRange(0, len(w)-1).Draw(r, "cut")]); err == nil {
			r.Fatal("a truncated blob was unwrapped")
		}
	})
	for _, bad := range []struct{ kek, plain []byte }{{make([]byte, 31), []byte{1}}, {make([]byte, 32), nil}} {
		if _, err := hsm.WrapKey(bad.kek, bad.plain); err == nil {
			t.Errorf("wrapped %d octets with a key of %d", len(bad.plain), len(bad.kek))
		}
	}
}

func TestSealIsForATransportKeyAndAPrivateKeyOnly(t *testing.T) {
	transport, spki := rsaKey(t, hsm.TransportBits)
	_, small := rsaKey(t, 2048)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := hsm.Seal(spki, pkcs8)
	if err != nil {
		t.Fatal(err)
	}
	kek, err := rsa.DecryptOAEP(sha1.New(), nil, transport, sealed[:hsm.TransportBits/8], nil)
	if err != nil {
		t.Fatal(err)
	}
	if back, err := hsm.UnwrapKey(kek, sealed[hsm.TransportBits/8:]); err != nil || !bytes.Equal(back, pkcs8) {
		t.Errorf("opened: %x, %v", back, err)
	}
	for name, bad := range map[string][2][]byte{"small transport key": {small, pkcs8}, "no transport key": {nil, pkcs8}, "no private key": {spki, []byte("key")}, "public key": {spki, spki}} {
		if _, err := hsm.Seal(bad[0], bad[1]); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func rsaKey(t *testing.T, bits int) (*rsa.PrivateKey, []byte) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, spki
}
