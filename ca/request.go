package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Bounds of a request (DESIGN §8).
const (
	maxCSR            = 32 << 10 // octets, PEM or DER
	maxNames          = 100      // in the CSR, and beside it
	maxIdempotencyKey = 255      // octets
	maxReference      = 255      // octets
	maxPrincipal      = 255      // octets
)

var (
	oidCommonName   = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidCountry      = asn1.ObjectIdentifier{2, 5, 4, 6}
	oidOrganization = asn1.ObjectIdentifier{2, 5, 4, 10}

	oidSubjectKeyID     = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}

	oidRSA  = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidEC   = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidP256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}
	oidP384 = asn1.ObjectIdentifier{1, 3, 132, 0, 34}
)

// csr is a certification request, parsed. Nothing of it is permitted yet and its signature is not checked.
type csr struct {
	*x509.CertificateRequest
	asked asked
}

// parseCSR reads a PKCS #10 request, PEM or DER. It refuses what no profile can permit: names of a type other than DNS, kinds of key other
// than EC P-256, P-384 and RSA.
func parseCSR(in []byte) (*csr, error) {
	malformed := func(format string, args ...any) error { return refuse(MalformedCSR, "csr", format, args...) }
	if len(in) > maxCSR {
		return nil, refuse(TooLarge, "csr", "the CSR is %d octets long: %d are the most", len(in), maxCSR)
	}
	der := in
	if trimmed := bytes.TrimSpace(in); bytes.HasPrefix(trimmed, []byte("-----BEGIN ")) {
		block, rest := pem.Decode(trimmed)
		switch {
		case block == nil:
			return nil, malformed("the PEM block cannot be read")
		case block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST":
			return nil, malformed("a PEM block CERTIFICATE REQUEST is wanted")
		case len(block.Headers) > 0 || len(bytes.TrimSpace(rest)) > 0:
			return nil, malformed("there is more than one PEM block CERTIFICATE REQUEST")
		}
		der = block.Bytes
	}
	if len(der) == 0 {
		return nil, malformed("a CSR (PKCS #10, PEM) is wanted")
	}
	if err := checkKind(der); err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, malformed("the CSR cannot be read, or a name in it is not ASCII, such as bücher.example for xn--bcher-kva.example: %v", err)
	}
	if !slices.Contains(csrAlgorithms, parsed.SignatureAlgorithm) {
		return nil, refuse(BadCSRSignature, "csr", "the CSR is signed with %s: use SHA-256, SHA-384 or SHA-512", parsed.SignatureAlgorithm)
	}
	if err := checkAttributes(parsed.RawTBSCertificateRequest); err != nil {
		return nil, err
	}
	c := &csr{CertificateRequest: parsed}
	for _, ext := range parsed.Extensions {
		if ext.Id.Equal(oidSubjectAltName) {
			if c.asked.dns, err = parseSANs(ext.Value); err != nil {
				return nil, err
			}
		}
	}
	return c, nil
}

// csrAlgorithms are those with which a CSR may prove that its maker has the key.
var csrAlgorithms = []x509.SignatureAlgorithm{
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
	x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
}

var (
	oidExtensionRequest   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}
	oidMSExtensionRequest = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 14}
)

// checkAttributes refuses requests for extensions that the parser would pass over: a second list of them, or one under Microsoft's old name. Whoever
// asked would believe to have got them.
func checkAttributes(tbs []byte) error {
	malformed := refuse(MalformedCSR, "csr", "the CSR's attributes cannot be read")
	input := cryptobyte.String(tbs)
	var info, attributes cryptobyte.String
	var present bool
	if !input.ReadASN1(&info, cbasn1.SEQUENCE) || !info.SkipASN1(cbasn1.INTEGER) || !info.SkipASN1(cbasn1.SEQUENCE) || !info.SkipASN1(cbasn1.SEQUENCE) ||
		!info.ReadOptionalASN1(&attributes, &present, cbasn1.Tag(0).ContextSpecific().Constructed()) || !info.Empty() {
		return malformed
	}
	lists := 0
	for !attributes.Empty() {
		var attribute, values cryptobyte.String
		var oid asn1.ObjectIdentifier
		if !attributes.ReadASN1(&attribute, cbasn1.SEQUENCE) || !attribute.ReadASN1ObjectIdentifier(&oid) || !attribute.ReadASN1(&values, cbasn1.SET) || !attribute.Empty() {
			return malformed
		}
		switch {
		case oid.Equal(oidMSExtensionRequest):
			return refuse(ExtensionNotPermitted, "csr", "extensions are asked for under %s: use the attribute extensionRequest of PKCS #9", oid)
		case oid.Equal(oidExtensionRequest):
			var list cryptobyte.String
			if lists++; lists > 1 || !values.ReadASN1(&list, cbasn1.SEQUENCE) || !values.Empty() {
				return refuse(MalformedCSR, "csr", "the CSR has more than one list of extensions")
			}
		}
	}
	return nil
}

// checkKind walks to the public key's algorithm and refuses kinds of key that are never certified, before anything costly reads the key.
func checkKind(der []byte) error {
	input := cryptobyte.String(der)
	var outer, info, spki, algorithm cryptobyte.String
	var oid, curve asn1.ObjectIdentifier
	var version int
	if !input.ReadASN1(&outer, cbasn1.SEQUENCE) || !input.Empty() || !outer.ReadASN1(&info, cbasn1.SEQUENCE) ||
		!info.ReadASN1Integer(&version) || version != 0 || !info.SkipASN1(cbasn1.SEQUENCE) ||
		!info.ReadASN1(&spki, cbasn1.SEQUENCE) || !spki.ReadASN1(&algorithm, cbasn1.SEQUENCE) || !algorithm.ReadASN1ObjectIdentifier(&oid) {
		return refuse(MalformedCSR, "csr", "the CSR is not a PKCS #10 request in DER")
	}
	switch {
	case oid.Equal(oidRSA):
		return nil
	case oid.Equal(oidEC):
		if !algorithm.ReadASN1ObjectIdentifier(&curve) {
			return refuse(KeyNotPermitted, "csr.public_key", "the EC key does not name its curve: use P-256 or P-384")
		}
		if !curve.Equal(oidP256) && !curve.Equal(oidP384) {
			return refuse(KeyNotPermitted, "csr.public_key", "the EC key is on curve %s: use P-256 or P-384", curve)
		}
		return nil
	}
	return refuse(KeyNotPermitted, "csr.public_key", "the kind of key (algorithm %s) is not permitted: use EC P-256 or P-384, or RSA", oid)
}

var generalNames = [...]string{"otherName", "rfc822Name", "dNSName", "x400Address", "directoryName", "ediPartyName",
	"uniformResourceIdentifier", "iPAddress", "registeredID"}

// parseSANs reads GeneralNames and refuses every type but dNSName.
func parseSANs(der []byte) ([]string, error) {
	malformed := refuse(MalformedCSR, "csr.sans", "the subject alternative names cannot be read")
	input := cryptobyte.String(der)
	var list cryptobyte.String
	if !input.ReadASN1(&list, cbasn1.SEQUENCE) || !input.Empty() {
		return nil, malformed
	}
	var dns []string
	for !list.Empty() {
		var value cryptobyte.String
		var tag cbasn1.Tag
		if !list.ReadAnyASN1(&value, &tag) {
			return nil, malformed
		}
		kind := int(tag & 0x1f)
		if tag&0xc0 != 0x80 || kind >= len(generalNames) {
			return nil, malformed
		}
		if kind != 2 {
			return nil, refuse(NameNotPermitted, "csr.sans", "subject alternative names of type %s are not permitted", generalNames[kind])
		}
		if len(dns) == maxNames {
			return nil, refuse(NameNotPermitted, "csr.sans", "there are more than %d subject alternative names", maxNames)
		}
		dns = append(dns, string(value))
	}
	return dns, nil
}

// checkSubject reads the subject's common name and refuses every other attribute that the profile does not itself put there.
func (p *Profile) checkSubject(c *csr) error {
	for _, attribute := range c.Subject.Names {
		value, ok := attribute.Value.(string)
		switch {
		case ok && attribute.Type.Equal(oidCommonName):
			if c.asked.commonName != "" {
				return refuse(NameNotPermitted, "csr.subject.common_name", "the subject has more than one common name")
			}
			c.asked.commonName = value
		case ok && attribute.Type.Equal(oidOrganization) && value == p.Names.Fixed.Organization:
		case ok && attribute.Type.Equal(oidCountry) && value == p.Names.Fixed.Country:
		default:
			return refuse(NameNotPermitted, "csr.subject", "subject attribute %s is not permitted by profile %s: leave it out of the CSR", attributeName(attribute.Type), p.Name)
		}
	}
	return nil
}

func attributeName(oid asn1.ObjectIdentifier) string {
	known := map[string]string{
		"2.5.4.3": "commonName", "2.5.4.5": "serialNumber", "2.5.4.6": "countryName", "2.5.4.7": "localityName", "2.5.4.8": "stateOrProvinceName",
		"2.5.4.9": "streetAddress", "2.5.4.10": "organizationName", "2.5.4.11": "organizationalUnitName", "2.5.4.17": "postalCode",
		"1.2.840.113549.1.9.1": "emailAddress", "0.9.2342.19200300.100.1.25": "domainComponent",
	}
	if name := known[oid.String()]; name != "" {
		return name
	}
	return oid.String()
}

// checkExtensions refuses every extension that asks for something the profile would not put into the certificate anyway. None is ever
// copied (I8). A subject key identifier, which some tools always send, is let pass: ours is computed.
func (p *Profile) checkExtensions(c *csr, kind string) error {
	for _, ext := range c.Extensions {
		no := func(format string, args ...any) error {
			return refuse(ExtensionNotPermitted, "csr.extensions."+ext.Id.String(), format, args...)
		}
		switch {
		case ext.Id.Equal(oidSubjectAltName), ext.Id.Equal(oidSubjectKeyID):
		case ext.Id.Equal(oidKeyUsage):
			usage, ok := parseKeyUsage(ext.Value)
			if !ok {
				return refuse(MalformedCSR, "csr.extensions."+ext.Id.String(), "the key usage cannot be read")
			}
			if usage&^p.keyUsage(kind) != 0 {
				return no("profile %s gives keys of this kind the usage %v and no more", p.Name, p.Extensions.KeyUsage[kind])
			}
		case ext.Id.Equal(oidExtKeyUsage):
			var oids []asn1.ObjectIdentifier
			if rest, err := asn1.Unmarshal(ext.Value, &oids); err != nil || len(rest) > 0 {
				return refuse(MalformedCSR, "csr.extensions."+ext.Id.String(), "the extended key usage cannot be read")
			}
			if len(oids) == 0 { // RFC 5280 §4.2.1.12: at least one
				return refuse(MalformedCSR, "csr.extensions."+ext.Id.String(), "the extended key usage names none")
			}
			for _, oid := range oids {
				if !slices.ContainsFunc(p.Extensions.ExtKeyUsage, func(u string) bool { return oid.Equal(extKeyUsageOIDs[u]) }) {
					return no("extended key usage %s is asked for; profile %s gives %v and no more", oid, p.Name, p.Extensions.ExtKeyUsage)
				}
			}
		case ext.Id.Equal(oidBasicConstraints):
			var constraints struct {
				IsCA       bool `asn1:"optional"`
				MaxPathLen int  `asn1:"optional,default:-1"`
			}
			if rest, err := asn1.Unmarshal(ext.Value, &constraints); err != nil || len(rest) > 0 {
				return refuse(MalformedCSR, "csr.extensions."+ext.Id.String(), "the basic constraints cannot be read")
			}
			if constraints.IsCA || constraints.MaxPathLen != -1 {
				return no("profile %s issues no CA certificates", p.Name)
			}
		default:
			return no("extension %s is not permitted by profile %s: leave it out of the CSR", ext.Id, p.Name)
		}
	}
	return nil
}

var extKeyUsageOIDs = map[string]asn1.ObjectIdentifier{
	"serverAuth":      {1, 3, 6, 1, 5, 5, 7, 3, 1},
	"clientAuth":      {1, 3, 6, 1, 5, 5, 7, 3, 2},
	"codeSigning":     {1, 3, 6, 1, 5, 5, 7, 3, 3},
	"emailProtection": {1, 3, 6, 1, 5, 5, 7, 3, 4},
}

func parseKeyUsage(der []byte) (x509.KeyUsage, bool) {
	var bits asn1.BitString
	if rest, err := asn1.Unmarshal(der, &bits); err != nil || len(rest) > 0 || bits.BitLength > 9 {
		return 0, false
	}
	var usage x509.KeyUsage
	for i := range bits.BitLength {
		usage |= x509.KeyUsage(bits.At(i)) << i
	}
	return usage, true
}

// requestKey is the key of a request in the database: SHA-256(principal, 0, Idempotency-Key).
func requestKey(principal, idempotencyKey string) [32]byte {
	h := sha256.New()
	h.Write([]byte(principal))
	h.Write([]byte{0})
	h.Write([]byte(idempotencyKey))
	return [32]byte(h.Sum(nil))
}

// bodyHash covers the parsed request, so that a repeat that asks for anything else is noticed, and one that is merely spelt differently is not.
func bodyHash(r *Request, csrDER []byte) [32]byte {
	h := sha256.New()
	field := func(b []byte) {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b))))
		h.Write(b)
	}
	sans := make([]string, len(r.SANs))
	for i, san := range r.SANs {
		sans[i] = san.Type + "\x00" + san.Value
	}
	slices.Sort(sans)
	field([]byte("trivet-request-v1"))
	field([]byte(r.Profile))
	field([]byte(r.CA))
	field(csrDER)
	field([]byte(r.Subject.CommonName))
	for _, san := range slices.Compact(sans) {
		field([]byte(san))
	}
	field(nil)
	if r.NotAfter != nil {
		field([]byte(r.NotAfter.UTC().Format("20060102150405Z")))
	}
	field([]byte(r.Reference))
	return [32]byte(h.Sum(nil))
}

// check refuses a request whose plain fields are out of bounds.
func (r *Request) check() error {
	switch {
	case r.IdempotencyKey == "":
		return refuse(MalformedRequest, "Idempotency-Key", "the header Idempotency-Key is missing")
	case len(r.IdempotencyKey) > maxIdempotencyKey || strings.ContainsFunc(r.IdempotencyKey, func(c rune) bool { return c < 0x20 || c > 0x7e }):
		return refuse(MalformedRequest, "Idempotency-Key", "want 1 to %d printable ASCII characters", maxIdempotencyKey)
	case len(r.Principal) == 0 || len(r.Principal) > maxPrincipal:
		return refuse(Forbidden, "", "the request has no usable identity")
	case len(r.Reference) > maxReference || !utf8.ValidString(r.Reference) || strings.ContainsFunc(r.Reference, unicode.IsControl):
		return refuse(MalformedRequest, "reference", "want at most %d octets of text without control characters", maxReference)
	case len(r.SANs) > maxNames:
		return refuse(NameNotPermitted, "sans", "there are more than %d subject alternative names", maxNames)
	}
	return nil
}

// asks returns the names that the request asks for beside its CSR.
func (r *Request) asks() (asked, error) {
	a := asked{commonName: r.Subject.CommonName}
	for i, san := range r.SANs {
		if san.Type != SANTypeDNS {
			return asked{}, refuse(NameNotPermitted, fmt.Sprintf("sans[%d].type", i), "names of type %.32q are not permitted", san.Type)
		}
		a.dns = append(a.dns, san.Value)
	}
	return a, nil
}
