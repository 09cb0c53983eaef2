package api_test

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"net/http"
	"strings"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/api"
	"trivet/identity"
)

// conveyed is what the balancer sends about a client.
func conveyed(id *identity.Identity) string {
	return ":" + base64.StdEncoding.EncodeToString(id.Certificate().Certificate[0]) + ":"
}

func TestConveyedIdentity(t *testing.T) {
	s := newSite(t, nil)
	foreign := must(identity.CreateAuthority(t.TempDir()+"/infra", "test"))
	outsider := must(identity.Load(must(foreign.IssueTo(t.TempDir(), alice, nil, nil, time.Hour))))
	brief, _, err := s.authority.Issue(alice, nil, nil, time.Second) // not loaded: on a busy machine it is over before that
	if err != nil {
		t.Fatal(err)
	}
	expired, _ := pem.Decode(brief)
	good := conveyed(s.identity(t, alice))
	for name, test := range map[string]struct {
		peer   identity.Principal
		header []string
		status int
		want   string
	}{
		"requester through the balancer": {lb, []string{"Client-Cert", good}, 200, ""},
		"requester directly":             {alice, nil, 200, ""},
		"nobody":                         {identity.Principal{}, nil, 401, "unauthenticated"},
		"nobody with a header":           {identity.Principal{}, []string{"Client-Cert", good}, 401, "unauthenticated"},
		"balancer for itself":            {lb, nil, 401, "unauthenticated"},
		"balancer for a balancer":        {lb, []string{"Client-Cert", conveyed(s.identity(t, lb))}, 403, "forbidden"},
		"balancer for a CA node":         {lb, []string{"Client-Cert", conveyed(s.id)}, 403, "forbidden"},
		"balancer for an outsider":       {lb, []string{"Client-Cert", conveyed(outsider)}, 401, "unauthenticated"},
		"two certificates":               {lb, []string{"Client-Cert", good, "Client-Cert", good}, 401, "unauthenticated"},
		"two in one":                     {lb, []string{"Client-Cert", good + ", " + good}, 401, "unauthenticated"},
		"no colons":                      {lb, []string{"Client-Cert", strings.Trim(good, ":")}, 401, "unauthenticated"},
		"PEM":                            {lb, []string{"Client-Cert", "-----BEGIN CERTIFICATE-----"}, 401, "unauthenticated"},
		"empty":                          {lb, []string{"Client-Cert", "::"}, 401, "unauthenticated"},
		"a tail":                         {lb, []string{"Client-Cert", ":" + base64.StdEncoding.EncodeToString(append(bytes.Clone(s.id.Certificate().Certificate[0]), 0)) + ":"}, 401, "unauthenticated"},
		"auditor brings alice's":         {carl, []string{"Client-Cert", good}, 403, "forbidden"},
		"wrong role":                     {person(identity.RoleOCSP, "ocsp1"), nil, 403, "forbidden"},
		"database":                       {person(identity.RoleDB, "db1"), nil, 403, "forbidden"},
	} {
		t.Run(name, func(t *testing.T) {
			a := s.call(t, s.public, test.peer, "GET", "/v1/cas", "", test.header...)
			if a.status != test.status {
				t.Errorf("%d %s", a.status, a.body)
			}
			if test.want != "" {
				if got, _ := a.problem(t); got != test.want {
					t.Errorf("%s", a.body)
				}
			}
		})
	}
	// The conveyed identity is whose objects are seen.
	c := s.issue(t, alice, "one")
	for p, status := range map[identity.Principal]int{alice: 200, bob: 404} {
		a := s.call(t, s.public, lb, "GET", "/v1/certificates/"+c.ID, "", "Client-Cert", conveyed(s.identity(t, p)))
		if a.status != status {
			t.Errorf("%s: %d", p, a.status)
		}
	}
	// Nothing is conveyed on the administrative listener, not even an operator.
	a := s.call(t, s.admin, lb, "GET", "/v1/cas", "", "Client-Cert", conveyed(s.identity(t, olga)))
	if got, _ := a.problem(t); a.status != http.StatusForbidden || got != "forbidden" {
		t.Errorf("%d %s", a.status, a.body)
	}
	waitExpired(t, must(x509.ParseCertificate(expired.Bytes)))
	if a := s.call(t, s.public, lb, "GET", "/v1/cas", "", "Client-Cert", ":"+base64.StdEncoding.EncodeToString(expired.Bytes)+":"); a.status != http.StatusUnauthorized {
		t.Errorf("an expired certificate: %d", a.status)
	}
}

// A node whose clock is off cannot tell whether a certificate is valid: it says that, so that another node is asked, and not that the client has none.
func TestANodeWhoseClockIsOffRefusesNobodysCertificate(t *testing.T) {
	var off time.Duration
	s := newSite(t, func(c *api.Config) {
		c.Now = func() time.Time { return time.Now().Add(off) }
		c.Clock = func() error {
			if off == 0 {
				return nil
			}
			return &ca.Error{Name: ca.Halted, Detail: "signing is stopped: this node's clock is wrong", RetryAfter: time.Second}
		}
	})
	foreign := must(identity.CreateAuthority(t.TempDir()+"/infra", "test"))
	outsider := conveyed(must(identity.Load(must(foreign.IssueTo(t.TempDir(), alice, nil, nil, time.Hour)))))
	good := conveyed(s.identity(t, alice))
	for _, c := range []struct {
		off    time.Duration
		cert   string
		status int
		want   string
	}{{0, good, 200, ""}, {0, outsider, 401, "unauthenticated"}, {-24 * time.Hour, good, 503, "halted"}, {24 * time.Hour, good, 503, "halted"}} {
		off = c.off
		a := s.call(t, s.public, lb, "GET", "/v1/cas", "", "Client-Cert", c.cert)
		if a.status != c.status {
			t.Errorf("%s off: %d %s", c.off, a.status, a.body)
		}
		if c.want != "" {
			if got, _ := a.problem(t); got != c.want {
				t.Errorf("%s off: %s", c.off, a.body)
			}
		}
	}
}

func waitExpired(t *testing.T, cert *x509.Certificate) {
	t.Helper()
	select {
	case <-time.After(time.Until(cert.NotAfter) + 10*time.Millisecond):
	case <-t.Context().Done():
	}
}
