package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"trivet/db"
)

const (
	crlLifetime = 7 * 24 * time.Hour // nextUpdate − thisUpdate
	crlEvery    = 24 * time.Hour     // a CRL is replaced at this age even if nothing changed
	epochShift  = 48                 // a CRL number is site epoch · 2^48 + unix milliseconds, or higher
)

var oidInvalidityDate = asn1.ObjectIdentifier{2, 5, 29, 24}

// entry is one certificate on a CRL.
type entry struct {
	serial     []byte
	reason     Reason
	date       time.Time
	invalidity time.Time // zero: none
}

// crlNumber returns the number of a CRL signed now, above every one known. It fails if a later site epoch has signed already.
func crlNumber(epoch uint64, now time.Time, highest uint64) (uint64, error) {
	if highest>>epochShift > epoch {
		return 0, &Error{Name: WrongSite, RetryAfter: retrySoon, Detail: fmt.Sprintf("CRL number %d is of site epoch %d, this node's is %d", highest, highest>>epochShift, epoch)}
	}
	return max(epoch<<epochShift+uint64(now.UnixMilli()), highest+1), nil
}

// crlContent says what stands on the next CRL: every certificate whose newest event revokes it, and whatever the previous CRL says that the
// database has no event of. That it lost, and lost returns it, too. A certificate leaves when it expired more than crlEvery ago and the
// previous CRL was made after it expired: it has then been on a scheduled CRL past its end (RFC 5280 §3.3).
func crlContent(latest []db.Revoked, previous *x509.RevocationList, now time.Time) (content, lost []entry) {
	recorded := make(map[string]bool, len(latest))
	for _, e := range latest {
		serial := trimSerial(e.Serial)
		recorded[string(serial)] = true
		expired := !e.NotAfter.IsZero() && now.After(e.NotAfter.Add(crlEvery)) && previous != nil && previous.ThisUpdate.After(e.NotAfter)
		if !e.Revoked() || expired {
			continue
		}
		content = append(content, entry{serial: serial, reason: Reason(e.Reason), date: e.Date, invalidity: e.InvalidityDate})
	}
	if previous != nil {
		for _, e := range previous.RevokedCertificateEntries {
			if serial := e.SerialNumber.Bytes(); !recorded[string(serial)] {
				lost = append(lost, entry{serial: serial, reason: Reason(e.ReasonCode), date: e.RevocationTime, invalidity: invalidityOf(e)})
			}
		}
	}
	content = append(content, lost...)
	slices.SortFunc(content, func(a, b entry) int { return compareSerials(a.serial, b.serial) })
	return content, lost
}

// trimSerial drops leading zero octets, so that a serial has one spelling here and in big.Int.
func trimSerial(serial []byte) []byte { return bytes.TrimLeft(serial, "\x00") }

func compareSerials(a, b []byte) int {
	if len(a) != len(b) {
		return len(a) - len(b)
	}
	return bytes.Compare(a, b)
}

func invalidityOf(e x509.RevocationListEntry) (t time.Time) {
	for _, ext := range e.Extensions {
		if ext.Id.Equal(oidInvalidityDate) {
			if rest, err := asn1.UnmarshalWithParams(ext.Value, &t, "generalized"); err == nil && len(rest) == 0 {
				return t
			}
		}
	}
	return time.Time{}
}

// draftCRL returns the TBSCertList of a complete CRL.
func draftCRL(a *Authority, number uint64, thisUpdate time.Time, content []entry) (tbs []byte, err error) {
	s, _, err := schemeOf(a.Certificate.PublicKey)
	if err != nil {
		return nil, err
	}
	list := &x509.RevocationList{
		SignatureAlgorithm: s.algorithm,
		Number:             new(big.Int).SetUint64(number),
		ThisUpdate:         thisUpdate,
		NextUpdate:         thisUpdate.Add(crlLifetime),
	}
	for _, e := range content {
		line := x509.RevocationListEntry{SerialNumber: new(big.Int).SetBytes(e.serial), RevocationTime: e.date.UTC(), ReasonCode: int(e.reason)}
		if !e.invalidity.IsZero() {
			value, err := asn1.MarshalWithParams(e.invalidity.UTC().Truncate(time.Second), "generalized")
			if err != nil {
				return nil, fmt.Errorf("encoding an invalidity date: %w", err)
			}
			line.ExtraExtensions = []pkix.Extension{{Id: oidInvalidityDate, Value: value}}
		}
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, line)
	}
	tbs, err = tbsFor(a.Certificate.PublicKey, func(k crypto.Signer) ([]byte, error) {
		return x509.CreateRevocationList(rand.Reader, list, a.Certificate, k)
	})
	if err != nil {
		return nil, fmt.Errorf("building the CRL: %w", err)
	}
	return tbs, nil
}

// verifyCRL checks a whole CRL before anyone sees it (I7): it contains exactly that TBSCertList and its signature is the authority's.
func verifyCRL(der, tbs []byte, a *Authority) (*x509.RevocationList, error) {
	s, key, err := schemeOf(a.Certificate.PublicKey)
	if err != nil {
		return nil, err
	}
	list, err := x509.ParseRevocationList(der)
	switch {
	case err != nil:
		return nil, fmt.Errorf("parsing the CRL: %w", err)
	case !bytes.Equal(list.RawTBSRevocationList, tbs):
		return nil, errors.New("the CRL does not contain what was journalled")
	case !bytes.Equal(list.RawIssuer, a.Certificate.RawSubject):
		return nil, errors.New("the CRL names another issuer")
	case list.SignatureAlgorithm != s.algorithm:
		return nil, fmt.Errorf("the CRL is signed with %s instead of %s", list.SignatureAlgorithm, s.algorithm)
	case !ecdsa.VerifyASN1(key, s.digest(tbs), list.Signature):
		return nil, errors.New("the CRL's signature is not the issuer's")
	}
	return list, nil
}
