package ca_test

import (
	"bytes"
	"crypto/x509"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"trivet/ca"
)

// Whatever the database holds as a TBSCertificate, judging it ends, and the key that is looked up in the block-list is the one that would be certified.
func FuzzStoredTBS(f *testing.F) {
	a, _ := authority(f, 200*24*time.Hour)
	p := profile(f)
	for _, names := range [][]string{{"www.example.org"}, {"a.example.org", "xn--bcher-kva.example.org"}} {
		der, err := p.Draft(request(makeCSRFor(f, newKey(f), "", names)), a, time.Now())
		if err != nil {
			f.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(cert.RawTBSCertificate)
		f.Add(cert.Raw)
	}
	f.Fuzz(func(t *testing.T, tbs []byte) {
		_ = p.PermitStored(tbs, a)
		spki, err := ca.SPKIOf(tbs)
		if err != nil {
			return
		}
		if cert, err := x509.ParseCertificate(wrap(tbs)); err == nil && !bytes.Equal(cert.RawSubjectPublicKeyInfo, spki) {
			t.Fatalf("another key is looked up than would be certified: %x", tbs)
		}
	})
}

// wrap makes a certificate of a TBSCertificate, under a signature that is none.
func wrap(tbs []byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes([]byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02})
		b.AddASN1BitString([]byte{0x30, 0})
	})
	return b.BytesOrPanic()
}
