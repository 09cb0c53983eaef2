package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"trivet/ca"
)

// forgeTBS parses a TBSCertificate, changes it, and encodes it again as a forger with the right tools would.
func forgeTBS(t *testing.T, tbs []byte, a *ca.Authority, change func(*x509.Certificate)) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes([]byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02})
		b.AddASN1BitString([]byte{0x30, 0})
	})
	cert, err := x509.ParseCertificate(b.BytesOrPanic())
	if err != nil {
		t.Fatal(err)
	}
	cert.ExtraExtensions, cert.Extensions = nil, nil
	change(cert)
	parent := &x509.Certificate{RawSubject: a.Certificate.RawSubject, SubjectKeyId: a.Certificate.SubjectKeyId}
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, cert.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return forged.RawTBSCertificate
}
