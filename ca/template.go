package ca

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// values are all that a certificate says beyond what its profile and its issuer fix. Certificates are built from them alone (I8).
type values struct {
	serial    []byte
	names     names
	key       crypto.PublicKey
	kind      string // ec or rsa
	notBefore time.Time
	notAfter  time.Time
}

// template builds an end-entity certificate from permitted values.
func (p *Profile) template(a *Authority, baseURL string, v values) (*x509.Certificate, error) {
	subject, err := p.rawSubject(v.names.commonName)
	if err != nil {
		return nil, fmt.Errorf("encoding the subject: %w", err)
	}
	keyID, err := subjectKeyID(v.key)
	if err != nil {
		return nil, err
	}
	policies := make([]x509.OID, len(p.Extensions.Policies))
	for i, s := range p.Extensions.Policies {
		if policies[i], err = x509.ParseOID(s); err != nil {
			return nil, fmt.Errorf("profile %s: policy %q: %w", p.Name, s, err)
		}
	}
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(v.serial),
		RawSubject:   subject,
		NotBefore:    v.notBefore,
		NotAfter:     v.notAfter,
		DNSNames:     v.names.dns,
		SubjectKeyId: keyID,
		KeyUsage:     p.keyUsage(v.kind),
		ExtKeyUsage:  p.extKeyUsage(),
		Policies:     policies,
	}
	urls := a.URLs(baseURL)
	t.IssuingCertificateURL = []string{urls.Certificate}
	if p.Revocation.Mode != "crl" {
		t.OCSPServer = []string{urls.OCSP}
	}
	if p.Revocation.Mode != "ocsp" {
		t.CRLDistributionPoints = []string{urls.CRL}
	}
	return t, nil
}

// agree reads a draft back and compares it with what was permitted, field by field (I8): an encoder that says anything else than it was told is
// found out before anything is recorded. After signing verifyIssued compares every octet.
func (v *values) agree(der []byte, t *x509.Certificate, by parent) error {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("reading the draft back: %w", err)
	}
	key, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	for _, f := range []struct {
		name string
		same bool
	}{
		{"version", cert.Version == 3},
		{"serial", cert.SerialNumber.Cmp(new(big.Int).SetBytes(v.serial)) == 0},
		{"issuer", bytes.Equal(cert.RawIssuer, by.rawSubject)},
		{"validity", cert.NotBefore.Equal(v.notBefore) && cert.NotAfter.Equal(v.notAfter)},
		{"subject", bytes.Equal(cert.RawSubject, t.RawSubject) && cert.Subject.CommonName == v.names.commonName},
		{"key", ok && key.Equal(v.key)},
		{"DNS names", slices.Equal(cert.DNSNames, v.names.dns)},
		{"other names", len(cert.IPAddresses)+len(cert.EmailAddresses)+len(cert.URIs) == 0},
		{"key identifiers", bytes.Equal(cert.SubjectKeyId, t.SubjectKeyId) && bytes.Equal(cert.AuthorityKeyId, by.keyID)},
		{"basic constraints", !cert.IsCA},
		{"key usage", cert.KeyUsage == t.KeyUsage},
		{"extended key usage", slices.Equal(cert.ExtKeyUsage, t.ExtKeyUsage) && len(cert.UnknownExtKeyUsage) == 0},
		{"policies", slices.EqualFunc(cert.Policies, t.Policies, func(a, b x509.OID) bool { return a.Equal(b) })},
		{"addresses", slices.Equal(cert.OCSPServer, t.OCSPServer) && slices.Equal(cert.IssuingCertificateURL, t.IssuingCertificateURL) &&
			slices.Equal(cert.CRLDistributionPoints, t.CRLDistributionPoints)},
		{"critical extensions", len(cert.UnhandledCriticalExtensions) == 0},
	} {
		if !f.same {
			return fmt.Errorf("the draft's %s is not what was permitted", f.name)
		}
	}
	return nil
}

// validity returns notBefore and notAfter for a certificate made now. Both ends count, so that a lifetime of 90 days ends one second early
// (RFC 5280 §4.1.2.5). It never begins before its issuer does, and ending after it is refused.
func (p *Profile) validity(a *Authority, now time.Time, asked *time.Time) (notBefore, notAfter time.Time, err error) {
	now = now.UTC().Truncate(time.Second)
	notBefore = now.Add(-time.Duration(p.Validity.Backdate))
	if first := a.Certificate.NotBefore; notBefore.Before(first) {
		notBefore = first.UTC()
	}
	notAfter = notBefore.Add(time.Duration(p.Validity.Default) - time.Second)
	if asked != nil {
		notAfter = asked.UTC().Truncate(time.Second)
		if !notAfter.After(now) {
			return notBefore, notAfter, refuse(ValidityNotPermitted, "not_after", "%s is not in the future", notAfter.Format(time.RFC3339))
		}
	}
	return notBefore, notAfter, p.checkValidity(a, notBefore, notAfter)
}

func (p *Profile) checkValidity(a *Authority, notBefore, notAfter time.Time) error {
	if last := notBefore.Add(time.Duration(p.Validity.Max) - time.Second); notAfter.After(last) {
		return refuse(ValidityNotPermitted, "not_after", "%s is too late: profile %s ends certificates made now at %s", notAfter.Format(time.RFC3339),
			p.Name, last.Format(time.RFC3339))
	}
	if last := a.Certificate.NotAfter.UTC(); notAfter.After(last) {
		return refuse(ValidityNotPermitted, "not_after", "%s is after the end of %s at %s: ask for an earlier not_after", notAfter.Format(time.RFC3339),
			a.Issuer, last.Format(time.RFC3339))
	}
	return nil
}

// serialLength is the length of every serial made here, in octets: the most that RFC 5280 allows.
const serialLength = 20

// newSerial makes a serial of 20 octets: 4 of time, in units of two seconds so that the lead bit stays clear until 2106, and 128 random bits.
// The time keeps inserts local; it orders nothing.
func newSerial(now time.Time, random io.Reader) ([]byte, error) {
	serial := make([]byte, serialLength)
	binary.BigEndian.PutUint32(serial, uint32(now.Unix()/2))
	if _, err := io.ReadFull(random, serial[4:]); err != nil {
		return nil, fmt.Errorf("reading randomness for a serial: %w", err)
	}
	if serial[0] == 0 || serial[0] >= 0x80 {
		return nil, errors.New("the clock is outside 1978 to 2106: serials cannot be made")
	}
	return serial, nil
}

// subjectKeyID is method 1 of RFC 7093 §2: the leftmost 160 bits of the SHA-256 of the subjectPublicKey bits.
func subjectKeyID(pub crypto.PublicKey) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encoding the public key: %w", err)
	}
	input := cryptobyte.String(spki)
	var inner cryptobyte.String
	var bits []byte
	if !input.ReadASN1(&inner, cbasn1.SEQUENCE) || !inner.SkipASN1(cbasn1.SEQUENCE) || !inner.ReadASN1BitStringAsBytes(&bits) {
		return nil, errors.New("encoding the public key: it cannot be read back")
	}
	sum := sha256.Sum256(bits)
	return sum[:20], nil
}

// scheme is how keys on a curve sign: the hash, and the signature algorithm as certificates name it.
type scheme struct {
	hash      crypto.Hash
	algorithm x509.SignatureAlgorithm
	der       []byte // AlgorithmIdentifier
}

var (
	schemeP256 = &scheme{crypto.SHA256, x509.ECDSAWithSHA256, []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02}}
	schemeP384 = &scheme{crypto.SHA384, x509.ECDSAWithSHA384, []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03}}
)

// schemeOf returns how an issuer's key signs.
func schemeOf(pub crypto.PublicKey) (*scheme, *ecdsa.PublicKey, error) {
	if key, ok := pub.(*ecdsa.PublicKey); ok {
		switch key.Curve {
		case elliptic.P256():
			return schemeP256, key, nil
		case elliptic.P384():
			return schemeP384, key, nil
		}
	}
	return nil, nil, fmt.Errorf("issuer key of type %T: only EC P-256 and P-384 sign certificates", pub)
}

func (s *scheme) digest(tbs []byte) []byte {
	h := s.hash.New()
	h.Write(tbs)
	return h.Sum(nil)
}

// assemble puts a certificate together from a TBSCertificate and a signature.
func (s *scheme) assemble(tbs, signature []byte) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(s.der)
		b.AddASN1BitString(signature)
	})
	return b.Bytes()
}

// parent is all of an issuer that a certificate contains.
type parent struct {
	rawSubject []byte
	keyID      []byte
	key        crypto.PublicKey
}

func parentOf(a *Authority) parent {
	return parent{rawSubject: a.Certificate.RawSubject, keyID: a.Certificate.SubjectKeyId, key: a.Certificate.PublicKey}
}

// draft returns a whole certificate that nobody signed, and its TBSCertificate, which is the one to be signed.
func draft(template *x509.Certificate, by parent, pub crypto.PublicKey) (der, tbs []byte, err error) {
	s, _, err := schemeOf(by.key)
	if err != nil {
		return nil, nil, err
	}
	t := *template
	t.SignatureAlgorithm = s.algorithm
	tbs, err = tbsFor(by.key, func(k crypto.Signer) ([]byte, error) {
		return x509.CreateCertificate(rand.Reader, &t, &x509.Certificate{RawSubject: by.rawSubject, SubjectKeyId: by.keyID}, pub, k)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("building the certificate: %w", err)
	}
	der, err = dress(tbs, by)
	return der, tbs, err
}

// dress completes a TBSCertificate to a certificate that nobody signed, so that it can be parsed and linted.
func dress(tbs []byte, by parent) ([]byte, error) {
	s, key, err := schemeOf(by.key)
	if err != nil {
		return nil, err
	}
	return s.assemble(tbs, noSignature(key.Params().BitSize/8))
}

// noSignature has the form and length of an ECDSA signature, and is that of no message under any key: its r and s are above the curve's order.
func noSignature(octets int) []byte {
	n := append([]byte{0}, bytes.Repeat([]byte{0xff}, octets)...)
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		for range 2 {
			b.AddASN1(cbasn1.INTEGER, func(b *cryptobyte.Builder) { b.AddBytes(n) })
		}
	})
	return b.BytesOrPanic()
}

// tbsFor returns what the library wants to have signed when build makes something under a key.
func tbsFor(public crypto.PublicKey, build func(crypto.Signer) ([]byte, error)) ([]byte, error) {
	k := draftKey{public: public}
	if _, err := build(&k); !errors.Is(err, errDrafted) {
		return nil, cmp.Or(err, errors.New("it was built without a signature"))
	}
	return k.tbs, nil
}

// draftKey stands in for an issuer's key where a library builds: it keeps what it is to sign, and refuses. To sign that with a key made for it, and to
// have the library check the signature, would be a fifteenth of a CA node's work.
type draftKey struct {
	public crypto.PublicKey
	tbs    []byte
}

var errDrafted = errors.New("drafted")

func (k *draftKey) Public() crypto.PublicKey { return k.public }

func (k *draftKey) SignMessage(_ io.Reader, message []byte, _ crypto.SignerOpts) ([]byte, error) {
	k.tbs = bytes.Clone(message)
	return nil, errDrafted
}

// Sign is not called for a key that has SignMessage.
func (k *draftKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("a digest is nothing to draft from")
}

// spkiOf returns the SubjectPublicKeyInfo inside a TBSCertificate. The slice shares tbs' memory.
func spkiOf(tbs []byte) ([]byte, error) {
	input := cryptobyte.String(tbs)
	var fields, spki cryptobyte.String
	if !input.ReadASN1(&fields, cbasn1.SEQUENCE) || !input.Empty() || !fields.SkipOptionalASN1(cbasn1.Tag(0).ContextSpecific().Constructed()) ||
		!fields.SkipASN1(cbasn1.INTEGER) || // serial
		!fields.SkipASN1(cbasn1.SEQUENCE) || !fields.SkipASN1(cbasn1.SEQUENCE) || // signature, issuer
		!fields.SkipASN1(cbasn1.SEQUENCE) || !fields.SkipASN1(cbasn1.SEQUENCE) || // validity, subject
		!fields.ReadASN1Element(&spki, cbasn1.SEQUENCE) {
		return nil, errors.New("reading a TBSCertificate: it is not DER")
	}
	return spki, nil
}

// keyHash is how keys are named in the record: the SHA-256 of the DER SubjectPublicKeyInfo.
func keyHash(spki []byte) []byte {
	sum := sha256.Sum256(spki)
	return sum[:]
}

// verifyIssued checks a whole certificate before it may be released (I7): it parses, contains exactly that TBSCertificate (unless nil), and
// its signature is its issuer's.
func verifyIssued(der, tbs []byte, issuer crypto.PublicKey) (*x509.Certificate, error) {
	s, key, err := schemeOf(issuer)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	switch {
	case err != nil:
		return nil, fmt.Errorf("parsing the certificate: %w", err)
	case tbs != nil && !bytes.Equal(cert.RawTBSCertificate, tbs):
		return nil, errors.New("the certificate does not contain what was checked")
	case cert.SignatureAlgorithm != s.algorithm:
		return nil, fmt.Errorf("the certificate is signed with %s instead of %s", cert.SignatureAlgorithm, s.algorithm)
	case !ecdsa.VerifyASN1(key, s.digest(cert.RawTBSCertificate), cert.Signature):
		return nil, errors.New("the signature is not the issuer's")
	}
	return cert, nil
}
