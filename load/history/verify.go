package history

import (
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ocsp"
)

// verdict is what is remembered of bytes that were verified.
type verdict struct {
	from, until time.Time // when they are current
	notAfter    time.Time // of a certificate
	number      *big.Int  // of a CRL
	at          int64     // line that has the bytes
	status      string    // of an OCSP answer
	object      string
}

// verify checks the bytes of an answer the first time they are seen, and that they were current whenever they were given.
func (c *check) verify(b, e Event, object string, d digest, at int64) {
	v, known := c.bytes[d]
	if !known {
		if e.Bytes == nil {
			c.violate(Verifies, object, []uint64{e.Op}, "the history has not the bytes %s", d)
			return
		}
		var err error
		switch b.Kind {
		case Status:
			v, err = c.statusAnswer(e, object)
		case CRL:
			v, err = c.crlAnswer(e, object)
		default:
			v, err = c.certificate(e, object)
		}
		if err != nil {
			c.violate(Verifies, object, []uint64{e.Op}, "%v", err)
		}
		c.report.Checked["verified"]++
		v.at = at
		c.bytes[d] = v
	}
	if v.until.IsZero() {
		return
	}
	// Current at some moment while it was asked: a second of grace for clocks that write whole seconds.
	if b.Wall.After(v.until) || e.Wall.Add(time.Second).Before(v.from) {
		c.violate(Verifies, object, []uint64{e.Op}, "the answer is current from %s to %s", stamp(v.from), stamp(v.until))
	}
	if b.Kind == Status && (v.status != e.Answer || v.object != object) {
		c.violate(Verifies, object, []uint64{e.Op}, "the bytes say %s of %s, the client understood %s", v.status, v.object, e.Answer)
	}
}

func (c *check) issuer(object string) (*x509.Certificate, error) {
	id, _, _ := strings.Cut(object, ":")
	issuer := c.Issuers[id]
	if issuer == nil {
		return nil, fmt.Errorf("no certificate of issuer %q was given to the checker", id)
	}
	return issuer, nil
}

func (c *check) certificate(e Event, object string) (verdict, error) {
	issuer, err := c.issuer(object)
	if err != nil {
		return verdict{}, err
	}
	cert, err := x509.ParseCertificate(e.Bytes)
	if err != nil {
		return verdict{}, fmt.Errorf("the certificate does not parse: %w", err)
	}
	v := verdict{from: cert.NotBefore, until: cert.NotAfter, notAfter: cert.NotAfter}
	if _, serial, _ := strings.Cut(object, ":"); serial != hex.EncodeToString(cert.SerialNumber.Bytes()) {
		return v, fmt.Errorf("the certificate has serial %x", cert.SerialNumber.Bytes())
	}
	if err := cert.CheckSignatureFrom(issuer); err != nil {
		return v, fmt.Errorf("the certificate does not verify: %w", err)
	}
	return v, nil
}

func (c *check) statusAnswer(e Event, object string) (verdict, error) {
	issuer, err := c.issuer(object)
	if err != nil {
		return verdict{}, err
	}
	a, err := ocsp.ParseResponse(e.Bytes, issuer)
	if err != nil {
		return verdict{}, fmt.Errorf("the OCSP answer does not verify: %w", err)
	}
	id, _, _ := strings.Cut(object, ":")
	v := verdict{from: a.ThisUpdate, until: a.NextUpdate, object: id + ":" + hex.EncodeToString(a.SerialNumber.Bytes())}
	switch a.Status {
	case ocsp.Good:
		v.status = "good"
	case ocsp.Revoked:
		v.status = "revoked"
	default:
		v.status = "unknown"
	}
	if a.Certificate != nil && !a.Certificate.Equal(issuer) && !slices.Contains(a.Certificate.ExtKeyUsage, x509.ExtKeyUsageOCSPSigning) {
		return v, errors.New("the OCSP answer's signer may not sign OCSP answers")
	}
	return v, nil
}

func (c *check) crlAnswer(e Event, object string) (verdict, error) {
	issuer, err := c.issuer(object)
	if err != nil {
		return verdict{}, err
	}
	list, err := x509.ParseRevocationList(e.Bytes)
	if err != nil {
		return verdict{}, fmt.Errorf("the CRL does not parse: %w", err)
	}
	if err := list.CheckSignatureFrom(issuer); err != nil {
		return verdict{}, fmt.Errorf("the CRL does not verify: %w", err)
	}
	if list.Number == nil {
		return verdict{}, errors.New("the CRL has no number")
	}
	return verdict{from: list.ThisUpdate, until: list.NextUpdate, number: list.Number}, nil
}
