package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"trivet/ca"
)

// fataler is what helpers need of *testing.T, *testing.B and *rapid.T.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

func newKey(t fataler) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("making a key: %v", err)
	}
	return k
}

// makeCSR signs a CSR, in PEM.
func makeCSR(t fataler, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatalf("making a CSR: %v", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// makeCSRFor signs a CSR whose names are encoded as given, sound or not.
func makeCSRFor(t fataler, key crypto.Signer, commonName string, dns []string) []byte {
	t.Helper()
	template := &x509.CertificateRequest{Subject: pkix.Name{CommonName: commonName}}
	if dns != nil {
		template.ExtraExtensions = []pkix.Extension{sanExtension(t, 2, dns...)}
	}
	return makeCSR(t, key, template)
}

func sanExtension(t fataler, tag int, values ...string) pkix.Extension {
	t.Helper()
	var raw []asn1.RawValue
	for _, v := range values {
		raw = append(raw, asn1.RawValue{Class: 2, Tag: tag, Bytes: []byte(v)})
	}
	der, err := asn1.Marshal(raw)
	if err != nil {
		t.Fatalf("encoding names: %v", err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: der}
}

func extension(t fataler, oid asn1.ObjectIdentifier, value any) pkix.Extension {
	t.Helper()
	der, err := asn1.Marshal(value)
	if err != nil {
		t.Fatalf("encoding an extension: %v", err)
	}
	return pkix.Extension{Id: oid, Value: der}
}

func request(csr []byte) ca.Request {
	return ca.Request{Principal: "trivet://test/requester/alice", IdempotencyKey: "k", Profile: "tls-server", CSR: csr}
}

// profile returns the built-in profile, with replacements of its text.
func profile(t fataler, oldnew ...string) *ca.Profile {
	t.Helper()
	p, err := ca.ParseProfile([]byte(strings.NewReplacer(oldnew...).Replace(profileText)))
	if err != nil {
		t.Fatalf("%v", err)
	}
	return p
}

func TestRequestsThatAreRefused(t *testing.T) {
	k := newKey(t)
	p := profile(t)
	const name = "www.example.org"
	good := makeCSRFor(t, k, name, []string{name})
	block, _ := pem.Decode(good)
	csr := func(template x509.CertificateRequest) ca.Request {
		if template.DNSNames == nil && template.ExtraExtensions == nil {
			template.DNSNames = []string{name}
		}
		return request(makeCSR(t, k, &template))
	}
	with := func(ext pkix.Extension) ca.Request {
		return csr(x509.CertificateRequest{DNSNames: []string{name}, ExtraExtensions: []pkix.Extension{ext}})
	}
	keyed := func(key crypto.Signer) ca.Request {
		return request(makeCSR(t, key, &x509.CertificateRequest{DNSNames: []string{name}}))
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weakRSA, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	swapped := bytes.Replace(bytes.Clone(block.Bytes), []byte(name), []byte("wwx.example.org"), -1)
	many := make([]string, 101)
	for i := range many {
		many[i] = fmt.Sprintf("n%d.example.org", i)
	}
	mail, err := url.Parse("https://www.example.org/")
	if err != nil {
		t.Fatal(err)
	}
	altered := func(change func(*ca.Request)) ca.Request {
		r := request(good)
		change(&r)
		return r
	}

	for _, c := range []struct {
		name  string
		r     ca.Request
		want  string
		field string
	}{
		{"no CSR", request(nil), ca.MalformedCSR, "csr"},
		{"garbage", request([]byte("hello")), ca.MalformedCSR, "csr"},
		{"empty PEM", request([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n")), ca.MalformedCSR, "csr"},
		{"broken PEM", request(good[:len(good)-20]), ca.MalformedCSR, "csr"},
		{"another PEM block", request(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes})), ca.MalformedCSR, "csr"},
		{"two CSRs", request(append(bytes.Clone(good), good...)), ca.MalformedCSR, "csr"},
		{"PEM headers", request(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Headers: map[string]string{"a": "b"}, Bytes: block.Bytes})), ca.MalformedCSR, "csr"},
		{"truncated DER", request(block.Bytes[:len(block.Bytes)-1]), ca.MalformedCSR, "csr"},
		{"trailing octet", request(append(bytes.Clone(block.Bytes), 0)), ca.MalformedCSR, "csr"},
		{"33 KiB", request(make([]byte, 33<<10)), ca.TooLarge, "csr"},
		{"forged signature", request(forged), ca.BadCSRSignature, "csr"},
		{"name changed after signing", request(swapped), ca.BadCSRSignature, "csr"},

		{"Ed25519", keyed(ed), ca.KeyNotPermitted, "csr.public_key"},
		{"P-521", keyed(p521), ca.KeyNotPermitted, "csr.public_key"},
		{"P-224", keyed(p224), ca.KeyNotPermitted, "csr.public_key"},
		{"RSA 1024", keyed(weakRSA), ca.WeakKey, "csr.public_key"},

		{"no names", request(makeCSRFor(t, k, name, nil)), ca.NameNotPermitted, "csr.sans"},
		{"an empty list of names", request(makeCSRFor(t, k, "", []string{})), ca.NameNotPermitted, "csr.sans"},
		{"101 names", request(makeCSRFor(t, k, "", many)), ca.NameNotPermitted, "csr.sans"},
		{"common name is no SAN", request(makeCSRFor(t, k, "other.example.org", []string{name})), ca.NameNotPermitted, "csr.subject.common_name"},
		{"common name over 64", request(makeCSRFor(t, k, strings.Repeat("a", 60)+".example", []string{strings.Repeat("a", 60) + ".example"})), ca.NameNotPermitted, "csr.subject.common_name"},
		{"two common names", csr(x509.CertificateRequest{Subject: pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{
			{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: name}, {Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "x.example.org"}}}}), ca.NameNotPermitted, "csr.subject.common_name"},
		{"organisation", csr(x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"Evil"}}}), ca.NameNotPermitted, "csr.subject"},
		{"e-mail in the subject", csr(x509.CertificateRequest{Subject: pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{
			{Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, Value: "a@example.org"}}}}), ca.NameNotPermitted, "csr.subject"},
		{"NUL", request(makeCSRFor(t, k, "", []string{"www.example.org\x00.evil.test"})), ca.NameNotPermitted, "csr.sans"},
		{"wildcard", request(makeCSRFor(t, k, "", []string{"*.example.org"})), ca.NameNotPermitted, "csr.sans"},
		{"trailing dot", request(makeCSRFor(t, k, "", []string{"www.example.org."})), ca.NameNotPermitted, "csr.sans"},
		{"U-label", request(makeCSRFor(t, k, "", []string{"bücher.example"})), ca.MalformedCSR, "csr"},
		{"IP address", csr(x509.CertificateRequest{DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(192, 0, 2, 1)}}), ca.NameNotPermitted, "csr.sans"},
		{"IP address as a DNS name", request(makeCSRFor(t, k, "", []string{"192.0.2.1"})), ca.NameNotPermitted, "csr.sans"},
		{"e-mail address", csr(x509.CertificateRequest{DNSNames: []string{name}, EmailAddresses: []string{"a@example.org"}}), ca.NameNotPermitted, "csr.sans"},
		{"URI", csr(x509.CertificateRequest{DNSNames: []string{name}, URIs: []*url.URL{mail}}), ca.NameNotPermitted, "csr.sans"},
		{"other name", csr(x509.CertificateRequest{ExtraExtensions: []pkix.Extension{sanExtension(t, 0, "\x06\x03\x2a\x03\x04")}}), ca.NameNotPermitted, "csr.sans"},

		{"CA certificate", with(extension(t, asn1.ObjectIdentifier{2, 5, 29, 19}, struct{ IsCA bool }{true})), ca.ExtensionNotPermitted, "csr.extensions.2.5.29.19"},
		{"certificate signing", with(extension(t, asn1.ObjectIdentifier{2, 5, 29, 15}, asn1.BitString{Bytes: []byte{0x04}, BitLength: 6})), ca.ExtensionNotPermitted, "csr.extensions.2.5.29.15"},
		{"client authentication", with(extension(t, asn1.ObjectIdentifier{2, 5, 29, 37}, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 2}})), ca.ExtensionNotPermitted, "csr.extensions.2.5.29.37"},
		{"any extended key usage", with(extension(t, asn1.ObjectIdentifier{2, 5, 29, 37}, []asn1.ObjectIdentifier{{2, 5, 29, 37, 0}})), ca.ExtensionNotPermitted, "csr.extensions.2.5.29.37"},
		{"unknown extension", with(extension(t, asn1.ObjectIdentifier{1, 2, 3, 4}, 1)), ca.ExtensionNotPermitted, "csr.extensions.1.2.3.4"},
		{"name constraints", with(pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 30}, Value: []byte{0x30, 0}}), ca.ExtensionNotPermitted, "csr.extensions.2.5.29.30"},

		{"no extended key usage", with(extension(t, asn1.ObjectIdentifier{2, 5, 29, 37}, []asn1.ObjectIdentifier{})), ca.MalformedCSR, "csr.extensions.2.5.29.37"},
		{"unknown critical extension", with(pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}), ca.ExtensionNotPermitted, "csr.extensions.1.2.3.4"},
		{"an extension twice", csr(x509.CertificateRequest{ExtraExtensions: []pkix.Extension{sanExtension(t, 2, name), sanExtension(t, 2, "other.example.org")}}), ca.MalformedCSR, "csr"},
		{"two lists of extensions", request(attributesCSR(t, k, extensionRequest(t, sanExtension(t, 2, name)), extensionRequest(t, sanExtension(t, 2, "evil.test")))), ca.MalformedCSR, "csr"},
		{"two lists in one attribute", request(attributesCSR(t, k, extensionRequest(t, sanExtension(t, 2, name), sanExtension(t, 2, "evil.test")))), ca.MalformedCSR, "csr"},
		{"extensions under Microsoft's name", request(attributesCSR(t, k, extensionRequest(t, sanExtension(t, 2, name)), attribute{asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 14},
			asn1.RawValue{Class: 0, Tag: 17, IsCompound: true, Bytes: []byte{0x30, 0}}})), ca.ExtensionNotPermitted, "csr"},
		{"SHA-1", request(sha1CSR(t)), ca.BadCSRSignature, "csr"},
		{"RSA 16384", request(hugeRSA(t)), ca.WeakKey, "csr.public_key"},
		{"10,000 names", request(makeCSRFor(t, k, "", thousands(10000))), ca.TooLarge, "csr"},
		{"text before the PEM block", request(append([]byte("hello\n"), good...)), ca.MalformedCSR, "csr"},
		{"text after the PEM block", request(append(bytes.Clone(good), "hello"...)), ca.MalformedCSR, "csr"},
		{"a key after the CSR", request(append(bytes.Clone(good), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"...)), ca.MalformedCSR, "csr"},
		{"a name of two scripts", request(makeCSRFor(t, k, "", []string{"xn--pple-43d.example.org"})), ca.NameNotPermitted, "csr.sans"}, // Cyrillic а, Latin pple
		{"an overlong label", request(makeCSRFor(t, k, "", []string{strings.Repeat("a", 64) + ".example.org"})), ca.NameNotPermitted, "csr.sans"},
		{"an underscore", request(makeCSRFor(t, k, "", []string{"a_b.example.org"})), ca.NameNotPermitted, "csr.sans"},
		{"IPv6 as a DNS name", request(makeCSRFor(t, k, "", []string{"2001:db8::1"})), ca.NameNotPermitted, "csr.sans"},
		{"hexadecimal IPv4 as a DNS name", request(makeCSRFor(t, k, "", []string{"0x7f000001"})), ca.NameNotPermitted, "csr.sans"},
		{"NUL in the common name", request(makeCSRFor(t, k, name+"\x00.evil.test", []string{name})), ca.NameNotPermitted, "csr.subject.common_name"},

		{"names beside the CSR differ", altered(func(r *ca.Request) { r.SANs = []ca.SAN{{Type: "dns", Value: "other.example.org"}} }), ca.NameNotPermitted, "sans"},
		{"common name beside the CSR differs", altered(func(r *ca.Request) { r.Subject.CommonName = "other.example.org" }), ca.NameNotPermitted, "subject.common_name"},
		{"type of name beside the CSR", altered(func(r *ca.Request) { r.SANs = []ca.SAN{{Type: "ip", Value: "192.0.2.1"}} }), ca.NameNotPermitted, "sans[0].type"},
		{"no key", altered(func(r *ca.Request) { r.IdempotencyKey = "" }), ca.MalformedRequest, "Idempotency-Key"},
		{"long key", altered(func(r *ca.Request) { r.IdempotencyKey = strings.Repeat("k", 256) }), ca.MalformedRequest, "Idempotency-Key"},
		{"newline in the key", altered(func(r *ca.Request) { r.IdempotencyKey = "a\nb" }), ca.MalformedRequest, "Idempotency-Key"},
		{"long reference", altered(func(r *ca.Request) { r.Reference = strings.Repeat("r", 256) }), ca.MalformedRequest, "reference"},
		{"control character in the reference", altered(func(r *ca.Request) { r.Reference = "a\x1b[2J" }), ca.MalformedRequest, "reference"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := p.Permit(c.r)
			var e *ca.Error
			if !errors.As(err, &e) {
				t.Fatalf("got %v, want %s", err, c.want)
			}
			if e.Name != c.want || e.Field != c.field {
				t.Errorf("got %s in field %q (%v), want %s in field %q", e.Name, e.Field, err, c.want, c.field)
			}
			if e.Detail == "" || e.Retryable() {
				t.Errorf("a refusal has a detail and no Retry-After: %+v", e)
			}
		})
	}
}

// attribute is one of a CSR's.
type attribute struct {
	ID     asn1.ObjectIdentifier
	Values asn1.RawValue
}

// extensionRequest is the attribute that asks for extensions: one list of each.
func extensionRequest(t fataler, extensions ...pkix.Extension) attribute {
	t.Helper()
	var lists []byte
	for _, e := range extensions {
		der, err := asn1.Marshal([]pkix.Extension{e})
		if err != nil {
			t.Fatalf("encoding extensions: %v", err)
		}
		lists = append(lists, der...)
	}
	return attribute{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}, asn1.RawValue{Class: 0, Tag: 17, IsCompound: true, Bytes: lists}}
}

// attributesCSR signs a CSR with attributes as given, which Go's own encoder would not write.
func attributesCSR(t fataler, key *ecdsa.PrivateKey, attributes ...attribute) []byte {
	t.Helper()
	must := func(der []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatalf("encoding a CSR: %v", err)
		}
		return der
	}
	var all []byte
	for _, a := range attributes {
		all = append(all, must(asn1.Marshal(a))...)
	}
	spki := must(x509.MarshalPKIXPublicKey(key.Public()))
	tbs := must(asn1.Marshal(struct {
		Version    int
		Subject    asn1.RawValue
		Key        asn1.RawValue
		Attributes asn1.RawValue
	}{0, asn1.RawValue{FullBytes: []byte{0x30, 0}}, asn1.RawValue{FullBytes: spki}, asn1.RawValue{Class: 2, Tag: 0, IsCompound: true, Bytes: all}}))
	digest := sha256.Sum256(tbs)
	signature := must(ecdsa.SignASN1(rand.Reader, key, digest[:]))
	return must(asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}}))
}

// sha1CSR is a genuine CSR but for its hash; Go verifies such signatures.
func sha1CSR(t fataler) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatalf("making a key: %v", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"www.example.org"}, SignatureAlgorithm: x509.SHA256WithRSA}, key)
	if err != nil {
		t.Fatalf("making a CSR: %v", err)
	}
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatalf("%v", err)
	}
	digest := sha1.Sum(parsed.RawTBSCertificateRequest)
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA1, digest[:])
	if err != nil {
		t.Fatalf("%v", err)
	}
	out, err := asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: parsed.RawTBSCertificateRequest},
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 5}, Parameters: asn1.NullRawValue}, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}})
	if err != nil {
		t.Fatalf("%v", err)
	}
	if again, err := x509.ParseCertificateRequest(out); err != nil || again.CheckSignature() != nil {
		t.Fatalf("the CSR is not genuine: %v", err)
	}
	return out
}

// hugeRSA is a CSR for an RSA key of 16384 bits, with a signature of that length that nobody should verify.
func hugeRSA(t fataler) []byte {
	t.Helper()
	n := new(big.Int).SetBit(big.NewInt(1), 16383, 1)
	spki, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: n, E: 65537})
	if err != nil {
		t.Fatalf("%v", err)
	}
	tbs, err := asn1.Marshal(struct {
		Version    int
		Subject    asn1.RawValue
		Key        asn1.RawValue
		Attributes asn1.RawValue
	}{0, asn1.RawValue{FullBytes: []byte{0x30, 0}}, asn1.RawValue{FullBytes: spki}, asn1.RawValue{FullBytes: []byte{0xa0, 0}}})
	if err != nil {
		t.Fatalf("%v", err)
	}
	der, err := asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, Parameters: asn1.NullRawValue},
		asn1.BitString{Bytes: make([]byte, 2048), BitLength: 8 * 2048}})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return der
}

func thousands(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("n%d.example.org", i)
	}
	return names
}

func TestRequestsThatArePermitted(t *testing.T) {
	k := newKey(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ski := extension(t, asn1.ObjectIdentifier{2, 5, 29, 14}, []byte{1, 2, 3})
	usage := extension(t, asn1.ObjectIdentifier{2, 5, 29, 15}, asn1.BitString{Bytes: []byte{0x80}, BitLength: 1})
	eku := extension(t, asn1.ObjectIdentifier{2, 5, 29, 37}, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}})
	leaf := extension(t, asn1.ObjectIdentifier{2, 5, 29, 19}, struct{}{})
	long := strings.Repeat("a", 61) + ".example.org"
	for _, c := range []struct {
		name string
		r    ca.Request
		cn   string
		dns  string
	}{
		{"two names", request(makeCSRFor(t, k, "b.example.org", []string{"a.example.org", "b.example.org"})), "a.example.org", "a.example.org b.example.org"},
		{"repeated name", request(makeCSRFor(t, k, "", []string{"a.example.org", "a.example.org"})), "a.example.org", "a.example.org"},
		{"first name too long for a common name", request(makeCSRFor(t, k, "", []string{long, "a.example.org"})), "a.example.org", long + " a.example.org"},
		{"only a long name", request(makeCSRFor(t, k, "", []string{long})), "", long},
		{"one script, and two of one language", request(makeCSRFor(t, k, "", []string{"xn--80ak6aa92e.example.org", "xn--app-s08fl0d.example.org"})), "xn--80ak6aa92e.example.org", "xn--80ak6aa92e.example.org xn--app-s08fl0d.example.org"},
		{"P-384", request(makeCSRFor(t, p384, "", []string{"a.example.org"})), "a.example.org", "a.example.org"},
		{"RSA 2048", request(makeCSRFor(t, rsa2048, "", []string{"a.example.org"})), "a.example.org", "a.example.org"},
		{"DER", request(decode(makeCSRFor(t, k, "", []string{"a.example.org"}))), "a.example.org", "a.example.org"},
		{"extensions that the profile gives anyway", request(makeCSR(t, k, &x509.CertificateRequest{DNSNames: []string{"a.example.org"},
			ExtraExtensions: []pkix.Extension{ski, usage, eku, leaf}})), "a.example.org", "a.example.org"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cn, dns, err := profile(t).Permit(c.r)
			if err != nil || cn != c.cn || strings.Join(dns, " ") != c.dns {
				t.Fatalf("got %q, %q, %v; want %q, %q", cn, dns, err, c.cn, c.dns)
			}
		})
	}
}

func decode(text []byte) []byte {
	block, _ := pem.Decode(text)
	return block.Bytes
}

func TestBodyHashCoversEveryParsedField(t *testing.T) {
	k := newKey(t)
	text := makeCSRFor(t, k, "", []string{"a.example.org", "b.example.org"})
	end := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	base := request(text)
	base.SANs = []ca.SAN{{Type: "dns", Value: "a.example.org"}, {Type: "dns", Value: "b.example.org"}}
	base.NotAfter = &end
	same := base
	same.CSR = decode(text)
	same.SANs = []ca.SAN{base.SANs[1], base.SANs[0]}
	elsewhere := end.In(time.FixedZone("", 3600))
	same.NotAfter = &elsewhere
	if ca.BodyHash(base) != ca.BodyHash(same) {
		t.Error("the same request, spelt differently, has another hash")
	}
	for name, change := range map[string]func(*ca.Request){
		"profile":     func(r *ca.Request) { r.Profile = "other" },
		"ca":          func(r *ca.Request) { r.CA = "demo" },
		"csr":         func(r *ca.Request) { r.CSR = makeCSRFor(t, k, "", []string{"a.example.org"}) },
		"common name": func(r *ca.Request) { r.Subject.CommonName = "a.example.org" },
		"sans":        func(r *ca.Request) { r.SANs = r.SANs[:1] },
		"not_after":   func(r *ca.Request) { r.NotAfter = nil },
		"reference":   func(r *ca.Request) { r.Reference = "x" },
	} {
		changed := base
		change(&changed)
		if ca.BodyHash(base) == ca.BodyHash(changed) {
			t.Errorf("a change of %s does not change the hash", name)
		}
	}
}

// No input kills the process, and every refusal has a name.
func FuzzCSR(f *testing.F) {
	k := newKey(f)
	f.Add(sha1CSR(f))
	f.Add(hugeRSA(f))
	f.Add(attributesCSR(f, k, extensionRequest(f, sanExtension(f, 2, "a.example.org")), extensionRequest(f, sanExtension(f, 2, "b.example.org"))))
	for _, names := range [][]string{{"a.example.org"}, {"*.example.org"}, {"a\x00b"}, {"xn--pple-43d.example.org"}, {}, nil} {
		text := makeCSRFor(f, k, "", names)
		f.Add(text)
		f.Add(decode(text))
	}
	p, err := ca.ParseProfile([]byte(profileText))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		_, dns, err := p.Permit(request(in))
		if err != nil {
			if ca.NameOf(err) == "" {
				t.Fatalf("an error without a name: %v", err)
			}
			return
		}
		for _, n := range dns {
			if err := ca.CheckDNS(n, false); err != nil {
				t.Fatalf("%q was permitted: %v", n, err)
			}
		}
	})
}
