package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	_ "embed"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/ca"
)

//go:embed profiles/tls-server.yaml
var profileText string

func TestProfilesAreDecodedStrictly(t *testing.T) {
	for name, c := range map[string]struct{ old, new, want string }{
		"unknown field":            {"hold: false", "hold: false, approvals: 2", "approvals"},
		"unknown type of name":     {"    dns: {", "    ip: {max: 5}\n    dns: {", "ip"},
		"no version":               {"version: 1", "version: 0", "version"},
		"unknown type":             {"type: end-entity", "type: sub-ca", "end-entity"},
		"unknown curve":            {"P-384", "P-521", "P-521"},
		"weak RSA":                 {"min: 2048", "min: 1024", "1024"},
		"default above max":        {"max: 100d", "max: 10d", "above"},
		"backdated too far":        {"backdate: 5m", "backdate: 3d", "backdate"},
		"not a lifetime":           {"default: 90d", "default: soon", "soon"},
		"negative lifetime":        {"default: 90d", "default: -90d", "-90d"},
		"too many names":           {"max: 100, under", "max: 101, under", "101"},
		"malformed domain":         {"under: []", "under: ['.example.org']", "under"},
		"CA key usage":             {"ec: [digitalSignature]", "ec: [keyCertSign]", "keyCertSign"},
		"no EC key usage":          {"key_usage: {ec: [digitalSignature], ", "key_usage: {", "key_usage.ec"},
		"unknown ext_key_usage":    {"[serverAuth]", "[ocspSigning]", "ocspSigning"},
		"unknown lint":             {"skip: []", "skip: [e_no_such]", "e_no_such"},
		"unknown grade":            {"skip: []", "skip: [], fail_on: fatal", "fail_on"},
		"unknown waived lint":      {"skip: []", "skip: [], waivers: [{lint: e_no_such, reason: x, until: 2999-01-01}]", "e_no_such"},
		"waiver without reason":    {"skip: []", "skip: [], waivers: [{lint: e_dnsname_not_valid_tld, until: 2999-01-01}]", "reason"},
		"waiver without end":       {"skip: []", "skip: [], waivers: [{lint: e_dnsname_not_valid_tld, reason: x}]", "until"},
		"waiver out of date":       {"skip: []", "skip: [], waivers: [{lint: e_dnsname_not_valid_tld, reason: x, until: 2026-01-31}]", "e_dnsname_not_valid_tld ended on 2026-01-31"},
		"waiver of a skipped lint": {"skip: []", "skip: [e_dnsname_not_valid_tld], waivers: [{lint: e_dnsname_not_valid_tld, reason: x, until: 2999-01-01}]", "already"},
		"waiver of no day":         {"skip: []", "skip: [], waivers: [{lint: e_dnsname_not_valid_tld, reason: x, until: soon}]", "soon"},
		"hold under br":            {"lint: {policy: private", "lint: {policy: br", ""},
		"unknown source":           {"source: csr", "source: dns", "source"},
		"second document":          {"lint:", "---\nlint:", "one document"},
		"duplicate field":          {"version: 1", "version: 1\nversion: 2", "version"},
		"mode none is unsupported": {"mode: crl+ocsp", "mode: none", "mode"},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(profileText, c.old, c.new, 1)
			if text == profileText {
				t.Fatalf("%q is not in the profile", c.old)
			}
			if name == "hold under br" {
				text = strings.Replace(text, "hold: false", "hold: true", 1)
			}
			_, err := ca.ParseProfile([]byte(text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

// The gate of a profile: which findings refuse, and which are excused until when.
func TestFindingsRefuseByGradeUnlessTheyAreWaived(t *testing.T) {
	const strict = "lint: {policy: br, skip: [e_sub_cert_certificate_policies_missing, e_sub_cert_cert_policy_empty, w_subject_common_name_included]"
	const waiver = ", waivers: [{lint: w_ext_subject_key_identifier_not_recommended_subscriber, reason: old clients, until: 2999-01-31}]"
	a, _ := authority(t, 200*24*time.Hour)
	der, err := profile(t).Draft(request(makeCSRFor(t, newKey(t), "", []string{"www.example.org"})), a, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	last := time.Date(2999, 1, 31, 23, 59, 59, 0, time.UTC)
	for name, c := range map[string]struct {
		lint string
		now  time.Time
		want string
	}{
		"a warning passes":                    {strict + "}", time.Now(), ""},
		"a warning counts":                    {strict + ", fail_on: warn}", time.Now(), "w_ext_subject_key_identifier"},
		"a notice and above":                  {strict + ", fail_on: notice}", time.Now(), "w_ext_subject_key_identifier"},
		"a waived warning passes":             {strict + ", fail_on: warn" + waiver + "}", time.Now(), ""},
		"on the waiver's last day":            {strict + ", fail_on: warn" + waiver + "}", last, ""},
		"after the waiver's last day":         {strict + ", fail_on: warn" + waiver + "}", last.Add(time.Second), "w_ext_subject_key_identifier"},
		"a waiver excuses no other":           {strict + ", fail_on: warn, waivers: [{lint: e_dnsname_not_valid_tld, reason: x, until: 2999-01-31}]}", time.Now(), "w_ext_subject_key_identifier"},
		"an error refuses whatever the grade": {"lint: {policy: br, skip: []}", time.Now(), "e_sub_cert_cert_policy_empty"},
	} {
		p := profile(t, "lint: {policy: private, skip: []}", c.lint)
		err := ca.CheckLint(der, p.Lint, c.now)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (ca.NameOf(err) != ca.LintFailed || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
}

// An encoder that says anything else than it was told is found out.
func TestADraftIsComparedWithWhatWasPermitted(t *testing.T) {
	a, _ := authority(t, 200*24*time.Hour)
	p, r := profile(t), request(makeCSRFor(t, newKey(t), "", []string{"www.example.org", "a.example.org"}))
	if err := p.Misencode(r, a, func(*x509.Certificate) {}); err != nil {
		t.Fatalf("a true draft: %v", err)
	}
	for what, change := range map[string]func(*x509.Certificate){
		"DNS names":          func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "evil.test") },
		"other names":        func(c *x509.Certificate) { c.EmailAddresses = []string{"a@example.org"} },
		"serial":             func(c *x509.Certificate) { c.SerialNumber = big.NewInt(1) },
		"validity":           func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Second) },
		"subject":            func(c *x509.Certificate) { c.RawSubject = nil; c.Subject.CommonName = "a.example.org" },
		"key usage":          func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"extended key usage": func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageOCSPSigning) },
		"basic constraints":  func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true },
		"addresses":          func(c *x509.Certificate) { c.OCSPServer = []string{"http://evil.test/"} },
		"key identifiers":    func(c *x509.Certificate) { c.SubjectKeyId = []byte{1} },
		"critical": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		},
	} {
		if err := p.Misencode(r, a, change); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestProfileHashFollowsMeaning(t *testing.T) {
	p := profile(t)
	if again := profile(t, "default: 90d", "default: 2160h"); again.Hash() != p.Hash() {
		t.Error("the same lifetime spelt differently has another hash")
	}
	if other := profile(t, "max: 100d", "max: 99d"); other.Hash() == p.Hash() {
		t.Error("another lifetime has the same hash")
	}
}

func TestAProfileVersionNeverChanges(t *testing.T) {
	if _, err := ca.NewProfiles(profile(t), profile(t, "max: 100d", "max: 99d")); err == nil {
		t.Error("two contents under one version were accepted")
	}
	two := profile(t, "version: 1", "version: 2", "max: 100d", "max: 99d")
	all, err := ca.NewProfiles(two, profile(t))
	if err != nil {
		t.Fatal(err)
	}
	if newest, _ := all.Get("tls-server"); newest.Version != 2 {
		t.Errorf("the newest version is %d, want 2", newest.Version)
	}
	if _, ok := all.Pinned("tls-server", 1, profile(t).Hash()); !ok {
		t.Error("version 1 is not found by its hash")
	}
	if _, ok := all.Pinned("tls-server", 1, two.Hash()); ok {
		t.Error("version 1 is found by another hash")
	}
}

// authority makes a sub-CA that has no database behind it.
func authority(t fataler, lifetime time.Duration) (*ca.Authority, *ecdsa.PrivateKey) {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{Organization: []string{"Test"}, CommonName: "Test Issuing CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId: []byte{1, 2, 3, 4},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatalf("%v", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return &ca.Authority{CA: "demo", Generation: 1, Issuer: "demo-g1", Parent: "root-g1", State: ca.StateActive, KeyID: "k",
		Certificate: cert, Chain: []*x509.Certificate{cert}}, key
}

func TestCertificatesContainWhatTheProfileSaysAndNothingElse(t *testing.T) {
	a, _ := authority(t, 1000*24*time.Hour)
	now := time.Date(2026, 11, 21, 12, 0, 0, 999, time.UTC)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.Certificate.NotBefore = now.Add(-time.Hour)
	for name, c := range map[string]struct {
		csr   []byte
		usage x509.KeyUsage
	}{
		"P-256": {makeCSRFor(t, newKey(t), "", []string{"b.example.org", "a.example.org"}), x509.KeyUsageDigitalSignature},
		"P-384": {makeCSRFor(t, p384, "", []string{"b.example.org", "a.example.org"}), x509.KeyUsageDigitalSignature},
		"RSA":   {makeCSRFor(t, rsaKey, "", []string{"b.example.org", "a.example.org"}), x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment},
	} {
		t.Run(name, func(t *testing.T) {
			der, err := profile(t).Draft(request(c.csr), a, now)
			if err != nil {
				t.Fatal(err)
			}
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			check := func(ok bool, what string, got any) {
				t.Helper()
				if !ok {
					t.Errorf("%s: %v", what, got)
				}
			}
			check(string(cert.RawIssuer) == string(a.Certificate.RawSubject), "issuer", cert.Issuer)
			check(cert.Subject.String() == "CN=b.example.org", "subject", cert.Subject)
			check(slices.Equal(cert.DNSNames, []string{"b.example.org", "a.example.org"}), "names", cert.DNSNames)
			check(cert.NotBefore.Equal(now.Truncate(time.Second).Add(-5*time.Minute)), "notBefore", cert.NotBefore)
			check(cert.NotAfter.Equal(cert.NotBefore.Add(90*24*time.Hour-time.Second)), "notAfter", cert.NotAfter)
			check(cert.KeyUsage == c.usage, "key usage", cert.KeyUsage)
			check(slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}), "extended key usage", cert.ExtKeyUsage)
			check(string(cert.AuthorityKeyId) == "\x01\x02\x03\x04", "authority key id", cert.AuthorityKeyId)
			check(len(cert.SubjectKeyId) == 20, "subject key id", cert.SubjectKeyId)
			check(!cert.BasicConstraintsValid && !cert.IsCA, "basic constraints", cert.IsCA)
			check(slices.Equal(cert.IssuingCertificateURL, []string{"http://pki.example.org/ca/demo-g1.crt"}), "AIA", cert.IssuingCertificateURL)
			check(slices.Equal(cert.OCSPServer, []string{"http://pki.example.org/ocsp/demo"}), "OCSP", cert.OCSPServer)
			check(slices.Equal(cert.CRLDistributionPoints, []string{"http://pki.example.org/crl/demo-g1.crl"}), "CDP", cert.CRLDistributionPoints)
			check(len(cert.Extensions) == 7, "number of extensions", len(cert.Extensions))
			check(cert.SerialNumber.BitLen() > 150 && len(cert.SerialNumber.Bytes()) == 20, "serial", cert.SerialNumber)
		})
	}
}

func TestValidityStaysWithinProfileAndIssuer(t *testing.T) {
	now := time.Now()
	at := func(d time.Duration) *time.Time { end := now.Add(d); return &end }
	day := 24 * time.Hour
	for name, c := range map[string]struct {
		issuer time.Duration
		asked  *time.Time
		ok     bool
	}{
		"default":                        {200 * day, nil, true},
		"shorter":                        {200 * day, at(time.Hour), true},
		"just below the longest":         {200 * day, at(100*day - 6*time.Minute), true},
		"the longest, without backdate":  {200 * day, at(100 * day), false},
		"past":                           {200 * day, at(-time.Second), false},
		"beyond the issuer":              {50 * day, at(60 * day), false},
		"default lies beyond the issuer": {50 * day, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := authority(t, c.issuer)
			r := request(makeCSRFor(t, newKey(t), "", []string{"a.example.org"}))
			r.NotAfter = c.asked
			_, err := profile(t).Draft(r, a, now)
			if c.ok && err != nil {
				t.Error(err)
			}
			if !c.ok && ca.NameOf(err) != ca.ValidityNotPermitted {
				t.Errorf("got %v, want %s", err, ca.ValidityNotPermitted)
			}
		})
	}
}

func TestACertificateNeverBeginsBeforeItsIssuer(t *testing.T) {
	a, _ := authority(t, 200*24*time.Hour)
	now := time.Now()
	a.Certificate.NotBefore = now.Add(-time.Minute).Truncate(time.Second)
	der, err := profile(t).Draft(request(makeCSRFor(t, newKey(t), "", []string{"a.example.org"})), a, now)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if !cert.NotBefore.Equal(a.Certificate.NotBefore) {
		t.Errorf("notBefore %s, issuer's %s", cert.NotBefore, a.Certificate.NotBefore)
	}
}

func TestDraftsThatBreakALintAreRefused(t *testing.T) {
	// Under the Baseline Requirements' lints, a certificate for a name without a public suffix must not pass.
	a, _ := authority(t, 200*24*time.Hour)
	p := profile(t, "policy: private", "policy: br")
	_, err := p.Draft(request(makeCSRFor(t, newKey(t), "", []string{"db1.corp"})), a, time.Now())
	if ca.NameOf(err) != ca.LintFailed || !strings.Contains(err.Error(), "e_") {
		t.Errorf("got %v, want %s with the lint's name", err, ca.LintFailed)
	}
}

func TestSerialsAreTimeLedAndRandom(t *testing.T) {
	now := time.Unix(1_795_000_000, 0)
	seen := make(map[string]bool)
	for range 1000 {
		s, err := ca.NewSerial(now, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if len(s) != 20 || s[0] == 0 || s[0] >= 0x80 || new(big.Int).SetBytes(s[:4]).Int64() != now.Unix()/2 || seen[string(s)] {
			t.Fatalf("serial %x", s)
		}
		seen[string(s)] = true
	}
	if _, err := ca.NewSerial(time.Unix(0, 0), rand.Reader); err == nil {
		t.Error("a clock at 1970 made a serial")
	}
	if _, err := ca.NewSerial(now, strings.NewReader("short")); err == nil {
		t.Error("short randomness made a serial")
	}
}

func BenchmarkDraft(b *testing.B) {
	a, _ := authority(b, 200*24*time.Hour)
	p := profile(b)
	r := request(makeCSRFor(b, newKey(b), "", []string{"a.example.org", "b.example.org"}))
	now := time.Now()
	b.ReportAllocs()
	b.ResetTimer()
	began := ca.Processor(b)
	for range b.N {
		if _, err := p.Draft(r, a, now); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(ca.Processor(b)-began)/float64(b.N), "cpu-ns/op")
}
