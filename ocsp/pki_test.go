package ocsp_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	xocsp "golang.org/x/crypto/ocsp"
)

// authority is a CA with a delegated responder, keys in memory.
type authority struct {
	name      string
	key       *ecdsa.PrivateKey
	cert      *x509.Certificate
	responder *x509.Certificate
	signer    *faultySigner
}

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	key := newKey(t)
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name, Organization: []string{"Trivet test"}},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(5, 0, 0), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	a := &authority{name: name, key: key, cert: cert, signer: &faultySigner{Signer: newKey(t)}}
	a.responder = a.newResponder(t, a.signer.Public(), x509.ExtKeyUsageOCSPSigning)
	return a
}

func (a *authority) newResponder(t testing.TB, public crypto.PublicKey, usage x509.ExtKeyUsage) *x509.Certificate {
	t.Helper()
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: a.name + " OCSP"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(0, 0, 30),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		ExtraExtensions: []pkix.Extension{{Id: []int{1, 3, 6, 1, 5, 5, 7, 48, 1, 5}, Value: []byte{5, 0}}},
	}, a.cert, public, a.key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert
}

// crl signs a CRL with the given number.
func (a *authority) crl(t testing.TB, number int64, serials ...*big.Int) []byte {
	t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: s, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	must(t, err)
	return der
}

// request is the DER OCSP request about one serial, made by another implementation.
func (a *authority) request(t testing.TB, serial []byte, hash crypto.Hash) []byte {
	t.Helper()
	der, err := xocsp.CreateRequest(&x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial)}, a.cert, &xocsp.RequestOptions{Hash: hash})
	must(t, err)
	return der
}

// pem writes the CA certificate to a file.
func (a *authority) pem(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o600))
	return path
}

// faultySigner is a software key that can be told to fail, to corrupt, or to wait.
type faultySigner struct {
	crypto.Signer
	fail    atomic.Pointer[error]
	corrupt atomic.Bool
	gate    atomic.Pointer[chan struct{}] // while set, a signature is made but not handed out before the channel is closed
	held    atomic.Int32                  // signatures waiting at the gate
	batches atomic.Int32                  // under way
	begun   atomic.Int32                  // batches
	alone   atomic.Int32                  // batches that began when no other was under way
}

func (f *faultySigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := f.fail.Load(); err != nil {
		return nil, *err
	}
	sig, err := f.Signer.Sign(rand.Reader, digest, opts)
	if gate := f.gate.Load(); gate != nil {
		f.held.Add(1)
		<-*gate
	}
	if f.corrupt.Load() {
		sig[len(sig)-1] ^= 1
	}
	return sig, err
}

// SignBatch keeps the promise of ocsp.Signer: a corrupt signature is an error.
func (f *faultySigner) SignBatch(_ context.Context, digests [][]byte) ([][]byte, error) {
	f.begun.Add(1)
	if f.batches.Add(1) == 1 {
		f.alone.Add(1)
	}
	defer f.batches.Add(-1)
	sigs := make([][]byte, len(digests))
	for i, d := range digests {
		sig, err := f.Sign(nil, d, crypto.SHA256)
		if err != nil {
			return nil, err
		}
		if !ecdsa.VerifyASN1(f.Public().(*ecdsa.PublicKey), d, sig) {
			return nil, errors.New("signature does not verify")
		}
		sigs[i] = sig
	}
	return sigs, nil
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
