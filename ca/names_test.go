package ca_test

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	"trivet/ca"
)

func TestDNSNamesThatAreRefused(t *testing.T) {
	long := strings.Repeat("a", 63)
	for name, want := range map[string]string{
		"":                                  "empty",
		"example.org.":                      "trailing dot",
		".example.org":                      "label is empty",
		"www..example.org":                  "label is empty",
		"WWW.example.org":                   "lower case",
		"www.example.org\x00.evil":          "not permitted",
		"www example.org":                   "not permitted",
		"www_1.example.org":                 "not permitted",
		"-www.example.org":                  "hyphen",
		"www-.example.org":                  "hyphen",
		"bücher.example":                    "A-labels",
		"xn--bücher.example":                "A-labels",
		"ab--cd.example.org":                "reserved",
		"xn--a.example":                     "A-label",
		"xn--.example":                      "hyphen",
		"xn--www-.example":                  "hyphen",
		"192.0.2.1":                         "IP address",
		"www.example.1":                     "IP address",
		"www.0x7f":                          "IP address",
		long + "a.example.org":              "63",
		strings.Repeat(long+".", 4) + "org": "253",
		"*.example.org":                     "wildcards",
		"*":                                 "wildcards",
		"https://example.org":               "not permitted",
		"user@example.org":                  "not permitted",
		"www.example.org/":                  "not permitted",
	} {
		err := ca.CheckDNS(name, false)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want an error with %q", name, err, want)
		}
	}
}

func TestWildcardsStandInTheLeftLabelAlone(t *testing.T) {
	for name, ok := range map[string]bool{
		"*.example.org": true, "*.a.example.org": true,
		"*": false, "*.org": false, "**.example.org": false, "w*.example.org": false, "*w.example.org": false, "www.*.org": false,
		"*.*.example.org": false, "*example.org": false, "*.example.org.": false,
	} {
		if err := ca.CheckDNS(name, true); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestDNSNamesThatArePermitted(t *testing.T) {
	for _, name := range []string{"example.org", "localhost", "a.b.c.d.example", "xn--bcher-kva.example", "1.example.org", "www-1.example.org", "3com.com",
		strings.Repeat("a", 63) + ".example"} {
		if err := ca.CheckDNS(name, false); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// Whatever is asked for, what is permitted is a subset of it, lies under the permitted domains, and passes the check by itself.
func TestPermittedNamesAreAskedForAndUnderThePermittedDomains(t *testing.T) {
	p := profile(t, `under: []`, `under: [example.org, xn--bcher-kva.example]`)
	k := newKey(t)
	label := rapid.StringMatching(`[a-zA-Z0-9*\-_.]{0,6}`)
	domain := rapid.SampledFrom([]string{"example.org", "sub.example.org", "xn--bcher-kva.example", "example.com", "badexample.org", "example.org.evil.test", ""})
	rapid.Check(t, func(rt *rapid.T) {
		var sans []string
		for range rapid.IntRange(0, 5).Draw(rt, "names") {
			sans = append(sans, strings.TrimPrefix(label.Draw(rt, "label")+"."+domain.Draw(rt, "domain"), "."))
		}
		_, got, err := p.Permit(request(makeCSRFor(rt, k, "", sans)))
		if err != nil {
			if ca.NameOf(err) == "" {
				rt.Fatalf("%q: an error without a name: %v", sans, err)
			}
			return
		}
		asked := make(map[string]bool)
		for _, n := range sans {
			asked[n] = true
		}
		for _, n := range got {
			if !asked[n] {
				rt.Fatalf("%q was never asked for in %q", n, sans)
			}
			if n != "example.org" && n != "xn--bcher-kva.example" && !strings.HasSuffix(n, ".example.org") && !strings.HasSuffix(n, ".xn--bcher-kva.example") {
				rt.Fatalf("%q is not under a permitted domain", n)
			}
			if err := ca.CheckDNS(n, false); err != nil {
				rt.Fatalf("%q: %v", n, err)
			}
		}
	})
}
