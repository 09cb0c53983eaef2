package ocsp

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Bounds on what a request may hold. Everything beyond is malformed.
const (
	maxRequest   = 10 << 10 // octets, GET or POST
	maxCertIDs   = 16
	maxNonce     = 128 // RFC 9654 2.1
	maxExtension = 16  // extensions in one list
)

// hash is a CertID hash algorithm that this responder can answer. Clients match the algorithm too.
type hash uint8

const (
	hashSHA1 hash = iota
	hashSHA256
	hashes // how many there are

	hashOther hash = 0xff // well formed, but no issuer is known by it
)

var (
	oidSHA1   = asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}
	oidSHA256 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidNonce  = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 2}
)

// understood lists the request extensions that may be critical, because ignoring them is allowed or they are obeyed.
var understood = []asn1.ObjectIdentifier{
	oidNonce,
	{1, 3, 6, 1, 5, 5, 7, 48, 1, 4}, // acceptable responses: a basic response is always acceptable
	{1, 3, 6, 1, 5, 5, 7, 48, 1, 7}, // service locator
	{1, 3, 6, 1, 5, 5, 7, 48, 1, 8}, // preferred signature algorithms
}

// issuerID is the part of a CertID that names an issuer.
type issuerID struct {
	hash      hash
	name, key [32]byte // zero padded
}

// certID is one certificate asked about (RFC 6960 4.1.1).
type certID struct {
	issuer issuerID
	serial Serial
}

// request is an OCSP request that passed the strict check.
type request struct {
	certs []certID // 1 to maxCertIDs
	nonce bool     // present, 1 to 128 octets
}

var errMalformed = errors.New("malformed OCSP request")

func malformed(what string) error { return fmt.Errorf("%w: %s", errMalformed, what) }

// parseRequest reads a DER OCSPRequest (RFC 6960 4.1.1, RFC 9919 3.1, RFC 9654). It is strict where common parsers
// are not: trailing data, repeated or unknown critical extensions, nonces out of bounds, versions other than 1,
// serials that no certificate can have, and more certificates than maxCertIDs are errors. A requestorName and a
// signature are read over, as RFC 9919 requires and allows.
func parseRequest(der []byte) (request, error) {
	var req request
	if len(der) > maxRequest {
		return req, malformed("too large")
	}
	input := cryptobyte.String(der)
	var outer, tbs, list cryptobyte.String
	if !input.ReadASN1(&outer, casn1.SEQUENCE) || !input.Empty() {
		return req, malformed("not one SEQUENCE")
	}
	if !outer.ReadASN1(&tbs, casn1.SEQUENCE) {
		return req, malformed("no tbsRequest")
	}
	signature := casn1.Tag(0).ContextSpecific().Constructed()
	if !outer.SkipOptionalASN1(signature) || !outer.Empty() {
		return req, malformed("data after tbsRequest")
	}

	var version cryptobyte.String
	var has bool
	if !tbs.ReadOptionalASN1(&version, &has, casn1.Tag(0).ContextSpecific().Constructed()) {
		return req, malformed("version")
	}
	if has {
		var v int64
		if !version.ReadASN1Integer(&v) || !version.Empty() || v != 0 {
			return req, malformed("version is not 1")
		}
	}
	if !tbs.SkipOptionalASN1(casn1.Tag(1).ContextSpecific().Constructed()) {
		return req, malformed("requestorName")
	}
	if !tbs.ReadASN1(&list, casn1.SEQUENCE) {
		return req, malformed("no requestList")
	}
	var exts cryptobyte.String
	if !tbs.ReadOptionalASN1(&exts, &has, casn1.Tag(2).ContextSpecific().Constructed()) || !tbs.Empty() {
		return req, malformed("data after requestList")
	}
	if has {
		nonce, err := parseExtensions(exts)
		if err != nil {
			return req, err
		}
		req.nonce = nonce
	}

	for !list.Empty() {
		if len(req.certs) == maxCertIDs {
			return req, malformed("too many certificates")
		}
		var single cryptobyte.String
		if !list.ReadASN1(&single, casn1.SEQUENCE) {
			return req, malformed("requestList")
		}
		id, err := parseCertID(&single)
		if err != nil {
			return req, err
		}
		if !single.ReadOptionalASN1(&exts, &has, casn1.Tag(0).ContextSpecific().Constructed()) || !single.Empty() {
			return req, malformed("data after reqCert")
		}
		if has {
			if _, err := parseExtensions(exts); err != nil {
				return req, err
			}
		}
		req.certs = append(req.certs, id)
	}
	if len(req.certs) == 0 {
		return req, malformed("no certificate")
	}
	return req, nil
}

func parseCertID(in *cryptobyte.String) (certID, error) {
	var id certID
	var seq, alg, name, key cryptobyte.String
	var oid asn1.ObjectIdentifier
	if !in.ReadASN1(&seq, casn1.SEQUENCE) ||
		!seq.ReadASN1(&alg, casn1.SEQUENCE) ||
		!seq.ReadASN1(&name, casn1.OCTET_STRING) ||
		!seq.ReadASN1(&key, casn1.OCTET_STRING) {
		return id, malformed("CertID")
	}
	if !alg.ReadASN1ObjectIdentifier(&oid) {
		return id, malformed("hashAlgorithm")
	}
	if !alg.Empty() {
		var null cryptobyte.String
		if !alg.ReadASN1(&null, casn1.NULL) || !null.Empty() || !alg.Empty() {
			return id, malformed("hashAlgorithm parameters")
		}
	}
	size := 0
	switch {
	case oid.Equal(oidSHA1):
		id.issuer.hash, size = hashSHA1, 20
	case oid.Equal(oidSHA256):
		id.issuer.hash, size = hashSHA256, 32
	default:
		id.issuer.hash = hashOther
	}
	if size > 0 {
		if len(name) != size || len(key) != size {
			return id, malformed("issuer hash of the wrong length")
		}
		copy(id.issuer.name[:], name)
		copy(id.issuer.key[:], key)
	}
	var octets []byte
	if !seq.ReadASN1Integer(&octets) || !seq.Empty() { // refuses negative and non-minimal ones
		return id, malformed("serialNumber")
	}
	serial, ok := MakeSerial(octets)
	if !ok || serial.n == 20 && serial.b[0] >= 0x80 { // such a one takes 21 octets
		return id, malformed("serialNumber is zero or longer than 20 octets")
	}
	id.serial = serial
	return id, nil
}

// parseExtensions checks one explicit Extensions and says whether it holds a nonce.
func parseExtensions(in cryptobyte.String) (nonce bool, err error) {
	var list cryptobyte.String
	if !in.ReadASN1(&list, casn1.SEQUENCE) || !in.Empty() || list.Empty() {
		return false, malformed("extensions")
	}
	var seen [][]byte
	for !list.Empty() {
		var ext, rawOID, value cryptobyte.String
		if !list.ReadASN1(&ext, casn1.SEQUENCE) || !ext.ReadASN1Element(&rawOID, casn1.OBJECT_IDENTIFIER) {
			return false, malformed("extension")
		}
		for _, s := range seen {
			if bytes.Equal(s, rawOID) {
				return false, malformed("repeated extension")
			}
		}
		if len(seen) == maxExtension {
			return false, malformed("too many extensions")
		}
		seen = append(seen, rawOID)
		var oid asn1.ObjectIdentifier
		if !rawOID.ReadASN1ObjectIdentifier(&oid) {
			return false, malformed("extension identifier")
		}
		critical := false
		if ext.PeekASN1Tag(casn1.BOOLEAN) && !ext.ReadASN1Boolean(&critical) {
			return false, malformed("extension criticality")
		}
		if !ext.ReadASN1(&value, casn1.OCTET_STRING) || !ext.Empty() {
			return false, malformed("extension value")
		}
		known := false
		for _, u := range understood {
			known = known || u.Equal(oid)
		}
		if critical && !known {
			return false, malformed("unknown critical extension")
		}
		if oid.Equal(oidNonce) {
			if n := nonceLength(value); n < 1 || n > maxNonce {
				return false, malformed("nonce shorter than 1 or longer than 128 octets")
			}
			nonce = true
		}
	}
	return nonce, nil
}

// nonceLength returns the nonce's length. Old clients put the octets straight into extnValue, without the inner
// OCTET STRING that RFC 8954 and 9654 ask for.
func nonceLength(value cryptobyte.String) int {
	inner, outer := cryptobyte.String(nil), value
	if outer.ReadASN1(&inner, casn1.OCTET_STRING) && outer.Empty() {
		return len(inner)
	}
	return len(value)
}
