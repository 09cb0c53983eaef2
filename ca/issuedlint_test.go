package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	mathrand "math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"

	"trivet/ca"
	"trivet/ca/weakkey"
)

// Lints whose findings are expected, each with its reason: certificates of a private CA differ from public ones in these points alone.
var expectedFindings = map[string]string{
	"e_sub_cert_certificate_policies_missing":                 "only the Baseline Requirements want a policy; the built-in profile is for a private CA",
	"e_sub_cert_cert_policy_empty":                            "the same",
	"w_ext_subject_key_identifier_not_recommended_subscriber": "the Baseline Requirements advise against it since 2023; RFC 5280 section 4.2.1.2 recommends it, and old clients build chains by it",
	"w_subject_common_name_included":                          "common_name: first-dns of the built-in profile, for clients that read nothing else",
}

// Random requests that the profile permits, issued by the real engine: whatever comes out passes every lint there is, those of the Baseline
// Requirements included.
func TestIssuedCertificatesPassEveryLint(t *testing.T) {
	certificates := 1000
	if testing.Short() {
		certificates = 100
	}
	p := newPKI(t)
	n := p.start(t, "ca1", nil)
	demo, _ := n.engine.Authorities().Issuer("demo-g1")
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{ExcludeSources: lint.SourceList{lint.AppleRootStorePolicy, lint.MozillaRootStorePolicy}})
	if err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := mathrand.New(mathrand.NewPCG(seed, 1))
	var rsaKeys []crypto.Signer // costly to make, so they are shared; a key may have many certificates
	for _, bits := range []int{2048, 3072} {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		rsaKeys = append(rsaKeys, k)
	}
	var mu sync.Mutex
	findings := map[string]int{}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 32)
	for i := range certificates {
		r := randomRequest(t, random, rsaKeys, i)
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			issued, err := n.issue(t, r)
			if err != nil {
				t.Errorf("request %d: %v", i, err)
				return
			}
			cert, err := x509.ParseCertificate(issued.DER)
			if err == nil {
				err = cert.CheckSignatureFrom(demo.Certificate)
			}
			if err == nil {
				err = weakkey.Check(cert.PublicKey, nil)
			}
			if err != nil {
				t.Errorf("certificate %d: %v", i, err)
				return
			}
			parsed, err := zx509.ParseCertificate(issued.DER)
			if err != nil {
				t.Errorf("certificate %d: %v", i, err)
				return
			}
			results := zlint.LintCertificateEx(parsed, registry)
			mu.Lock()
			defer mu.Unlock()
			for name, result := range results.Results {
				if result.Status >= lint.Notice {
					findings[fmt.Sprintf("%s (%v)", name, result.Status)]++
				}
			}
		})
	}
	wg.Wait()
	unwaived := 0
	for finding, times := range findings {
		name, _, _ := strings.Cut(finding, " ")
		if reason := expectedFindings[name]; reason != "" {
			t.Logf("%s: %d times, expected: %s", finding, times, reason)
			continue
		}
		unwaived++
		t.Errorf("%s: %d times", finding, times)
	}
	t.Logf("%d certificates, %d lints each, %d unwaived findings", certificates, len(registry.CertificateLints().Lints()), unwaived)
	p.check(t)
}

// randomRequest asks for something that the built-in profile permits.
func randomRequest(t *testing.T, random *mathrand.Rand, rsaKeys []crypto.Signer, i int) ca.Request {
	t.Helper()
	labels := []string{"www", "a", "xn--bcher-kva", "xn--80ak6aa92e", "a-b-c", "1", strings.Repeat("x", 63), "mail"}
	domains := []string{"example.org", "example.com", "xn--bcher-kva.example.net", "sub.sub.sub.example.org", strings.Repeat("y", 60) + ".example.com"}
	var names []string
	for range 1 + random.IntN(8) {
		name := domains[random.IntN(len(domains))]
		for range random.IntN(3) {
			name = labels[random.IntN(len(labels))] + "." + name
		}
		names = append(names, name)
	}
	var key crypto.Signer
	switch random.IntN(5) {
	case 0:
		key = rsaKeys[random.IntN(len(rsaKeys))]
	case 1:
		k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		key = k
	default:
		key = newKey(t)
	}
	r := request(makeCSRFor(t, key, "", names))
	r.IdempotencyKey, r.CA, r.Principal = fmt.Sprint("random-", i), "demo", alice
	if random.IntN(3) == 0 {
		end := time.Now().Add(time.Duration(1+random.IntN(90*24)) * time.Hour)
		r.NotAfter = &end
	}
	return r
}
