package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"
)

// TestADraftIsWhatTheLibrarySigns compares a draft with a certificate that the library makes under the issuer's own key, and tries the draft's
// signature.
func TestADraftIsWhatTheLibrarySigns(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now().Truncate(time.Second)
		ca := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Draft CA"}, NotBefore: now, NotAfter: now.AddDate(1, 0, 0), SubjectKeyId: []byte("draft"),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
		der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		if ca, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: now, NotAfter: now.AddDate(0, 0, 90), DNSNames: []string{"www.example.org"}, SubjectKeyId: []byte("leaf")}
		if der, err = x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key); err != nil {
			t.Fatal(err)
		}
		signed, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		whole, tbs, err := draft(leaf, parent{rawSubject: ca.RawSubject, keyID: ca.SubjectKeyId, key: key.Public()}, key.Public())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(tbs, signed.RawTBSCertificate) {
			t.Errorf("%s: the draft is\n%x\nand the library signs\n%x", curve.Params().Name, tbs, signed.RawTBSCertificate)
		}
		drafted, err := x509.ParseCertificate(whole)
		if err != nil {
			t.Fatal(err)
		}
		if drafted.SignatureAlgorithm != signed.SignatureAlgorithm || !bytes.Equal(drafted.RawTBSCertificate, tbs) {
			t.Errorf("%s: the draft is under %s and holds %x", curve.Params().Name, drafted.SignatureAlgorithm, drafted.RawTBSCertificate)
		}
		if err := drafted.CheckSignatureFrom(ca); err == nil {
			t.Errorf("%s: the draft verifies with its issuer's key", curve.Params().Name)
		}
	}
}
