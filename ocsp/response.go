package ocsp

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Unsigned error bodies: OCSPResponse with a responseStatus and nothing else (RFC 6960 4.2.1).
var (
	bodyMalformed    = []byte{0x30, 0x03, 0x0a, 0x01, 1}
	bodyInternal     = []byte{0x30, 0x03, 0x0a, 0x01, 2}
	bodyTryLater     = []byte{0x30, 0x03, 0x0a, 0x01, 3}
	bodyUnauthorized = []byte{0x30, 0x03, 0x0a, 0x01, 6}
)

var (
	oidBasic       = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 1}
	oidECDSASHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidRSASHA256   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}
)

// Signature is the verified signature over the one response that its fields, the issuer and the status describe.
// The response is put together again when it is served, so that a table holds 100 octets per answer, not 900.
type Signature struct {
	value      []byte
	thisUpdate int64 // unix seconds; producedAt too
	nextUpdate int64
	by         *responder
}

// issuerHashes identify an issuer in CertIDs, for each hash algorithm.
type issuerHashes [hashes]issuerID

// hashIssuer computes what CertIDs call the issuer: hashes of its subject's DER and of its key's bits.
func hashIssuer(ca *x509.Certificate) (issuerHashes, error) {
	var ids issuerHashes
	key, err := keyBits(ca)
	if err != nil {
		return ids, err
	}
	ids[hashSHA1].hash, ids[hashSHA256].hash = hashSHA1, hashSHA256
	name1, key1 := sha1.Sum(ca.RawSubject), sha1.Sum(key)
	copy(ids[hashSHA1].name[:], name1[:])
	copy(ids[hashSHA1].key[:], key1[:])
	ids[hashSHA256].name, ids[hashSHA256].key = sha256.Sum256(ca.RawSubject), sha256.Sum256(key)
	return ids, nil
}

// keyBits returns the subjectPublicKey bits of the certificate.
func keyBits(c *x509.Certificate) ([]byte, error) {
	spki := cryptobyte.String(c.RawSubjectPublicKeyInfo)
	var seq, alg cryptobyte.String
	var bits asn1.BitString
	if !spki.ReadASN1(&seq, casn1.SEQUENCE) || !seq.ReadASN1(&alg, casn1.SEQUENCE) || !seq.ReadASN1BitString(&bits) {
		return nil, errors.New("reading subjectPublicKeyInfo: malformed")
	}
	return bits.RightAlign(), nil
}

// responder is a delegated responder certificate and its key.
type responder struct {
	cert      *x509.Certificate
	id        []byte // SHA-1 of the key bits: ResponderID byKey is always SHA-1
	algorithm asn1.ObjectIdentifier
	signer    Signer
}

// Signer is a responder's key wherever copies of it live. It is safe for concurrent use.
type Signer interface {
	crypto.Signer
	// SignBatch signs every SHA-256 digest, in order, or none, and returns by the context's deadline. Every signature it returns has been verified with
	// Public: whoever can ask another copy of the key for a better one is who checks.
	SignBatch(ctx context.Context, digests [][]byte) (signatures [][]byte, err error)
}

// newResponder pairs a certificate with its key and checks what RFC 6960 4.2.2.2 and the profile demand: issued by
// the CA key itself, OCSPSigning, and the key belonging to the certificate.
func newResponder(ca, cert *x509.Certificate, signer Signer) (*responder, error) {
	if err := cert.CheckSignatureFrom(ca); err != nil {
		return nil, fmt.Errorf("checking the responder certificate against the CA's key: %w", err)
	}
	delegated := false
	for _, usage := range cert.ExtKeyUsage {
		delegated = delegated || usage == x509.ExtKeyUsageOCSPSigning
	}
	if !delegated {
		return nil, errors.New("responder certificate lacks the extended key usage OCSPSigning")
	}
	r := &responder{cert: cert, signer: signer}
	switch key := cert.PublicKey.(type) {
	case *ecdsa.PublicKey:
		r.algorithm = oidECDSASHA256
		if !key.Equal(signer.Public()) {
			return nil, errors.New("responder key does not belong to the responder certificate")
		}
	case *rsa.PublicKey:
		r.algorithm = oidRSASHA256
		if !key.Equal(signer.Public()) {
			return nil, errors.New("responder key does not belong to the responder certificate")
		}
	default:
		return nil, fmt.Errorf("responder key of type %T is not supported: use P-256 or RSA", key)
	}
	bits, err := keyBits(cert)
	if err != nil {
		return nil, err
	}
	id := sha1.Sum(bits)
	r.id = id[:]
	return r, nil
}

// sign signs a digest and verifies: a signature that does not verify against the responder's certificate is never returned.
func (r *responder) sign(digest []byte) ([]byte, error) {
	sig, err := r.signer.Sign(nil, digest, crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing an OCSP response: %w", err)
	}
	ok := false
	switch key := r.cert.PublicKey.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(key, digest, sig)
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(key, crypto.SHA256, digest, sig) == nil
	}
	if !ok {
		return nil, errBadSignature
	}
	return sig, nil
}

var errBadSignature = errors.New("responder key returned a signature that does not verify")

// single is one SingleResponse.
type single struct {
	issuer *issuerID
	serial Serial
	status Status // Good or Revoked
}

// errNoStatus guards the encoder: a response without a certificate status must never leave it (I3).
var errNoStatus = errors.New("encoding an OCSP response: no status to state")

// encodeTBS returns the DER ResponseData: byKey, producedAt = thisUpdate, times in whole seconds (RFC 9919 3.2).
func encodeTBS(r *responder, singles []single, thisUpdate, nextUpdate int64) ([]byte, error) {
	for i := range singles {
		if s := singles[i].status.State; s != Good && s != Revoked {
			return nil, errNoStatus
		}
	}
	this, next := time.Unix(thisUpdate, 0).UTC(), time.Unix(nextUpdate, 0).UTC()
	b := cryptobyte.NewBuilder(make([]byte, 0, 192*len(singles)+64))
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.Tag(2).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1OctetString(r.id)
		})
		b.AddASN1GeneralizedTime(this)
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for i := range singles {
				addSingle(b, &singles[i], this, next)
			}
		})
	})
	return b.Bytes()
}

func addSingle(b *cryptobyte.Builder, s *single, this, next time.Time) {
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			oid, size := oidSHA1, 20
			if s.issuer.hash == hashSHA256 {
				oid, size = oidSHA256, 32
			}
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(oid)
				b.AddASN1NULL() // as clients send it
			})
			b.AddASN1OctetString(s.issuer.name[:size])
			b.AddASN1OctetString(s.issuer.key[:size])
			b.AddASN1(casn1.INTEGER, func(b *cryptobyte.Builder) {
				if s.serial.b[0] >= 0x80 {
					b.AddUint8(0)
				}
				b.AddBytes(s.serial.b[:s.serial.n])
			})
		})
		switch s.status.State {
		case Good:
			b.AddASN1(casn1.Tag(0).ContextSpecific(), func(*cryptobyte.Builder) {})
		case Revoked:
			b.AddASN1(casn1.Tag(1).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
				b.AddASN1GeneralizedTime(time.Unix(s.status.RevokedAt, 0).UTC())
				if s.status.Reason != 0 {
					b.AddASN1(casn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
						b.AddASN1Enum(int64(s.status.Reason))
					})
				}
			})
		}
		b.AddASN1GeneralizedTime(this)
		b.AddASN1(casn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1GeneralizedTime(next)
		})
	})
}

// encodeResponse wraps signed ResponseData into an OCSPResponse that carries the responder's certificate.
func encodeResponse(r *responder, tbs, signature []byte) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(signature)+len(r.cert.Raw)+80))
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Enum(0) // successful
		b.AddASN1(casn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(oidBasic)
				b.AddASN1(casn1.OCTET_STRING, func(b *cryptobyte.Builder) {
					b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
						b.AddBytes(tbs)
						b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
							b.AddASN1ObjectIdentifier(r.algorithm)
							if r.algorithm.Equal(oidRSASHA256) {
								b.AddASN1NULL()
							}
						})
						b.AddASN1BitString(signature)
						b.AddASN1(casn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
							b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddBytes(r.cert.Raw) })
						})
					})
				})
			})
		})
	})
	return b.Bytes()
}
