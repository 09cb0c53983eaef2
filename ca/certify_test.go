package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"syscall"
	"testing"
	"time"
)

// BenchmarkCertify is what a certificate costs after it was signed.
func BenchmarkCertify(b *testing.B) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a"}, DNSNames: []string{"a.example.org", "b.example.org"},
		NotBefore: now, NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		b.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		b.Fatal(err)
	}
	j := &job{issuer: issuer{key: &key.PublicKey}}
	j.intent.TBS = cert.RawTBSCertificate
	digest := schemeP256.digest(cert.RawTBSCertificate)
	began, verified := processor(b), 0
	for ; verified < 2000; verified++ {
		if !ecdsa.VerifyASN1(&key.PublicKey, digest, cert.Signature) {
			b.Fatal("the signature does not verify")
		}
	}
	verify := processor(b) - began
	b.ResetTimer()
	began = processor(b)
	for range b.N {
		if err := j.certify(cert.Signature); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(processor(b)-began)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(verify)/float64(verified), "verify-ns/op") // the part of it that is the signature's verification
}

// processor is the time that this process has had of the processors.
func processor(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Processor is for the benchmarks outside of the package.
var Processor = processor
