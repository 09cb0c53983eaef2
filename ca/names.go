package ca

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"golang.org/x/net/idna"
)

// Types of SAN.
const SANTypeDNS = "dns"

// maxCommonName is ub-common-name of RFC 5280, in characters; a permitted common name is ASCII.
const maxCommonName = 64

// checkDNS says what is wrong with a DNS name as certificates carry it: lower-case letters, digits and hyphens, A-labels that decode and
// encode to themselves, no trailing dot, and "*" only as the whole left label of at least two more, if wildcards are allowed.
func checkDNS(name string, wildcard bool) error {
	rest := name
	if strings.Contains(name, "*") {
		if !wildcard {
			return errors.New("wildcards are not permitted")
		}
		after, ok := strings.CutPrefix(name, "*.")
		if !ok || strings.Contains(after, "*") {
			return errors.New(`"*" may only be the whole left label`)
		}
		if !strings.Contains(after, ".") {
			return errors.New(`"*" needs at least two labels to its right`)
		}
		rest = after
	}
	switch {
	case name == "":
		return errors.New("the name is empty")
	case len(name) > 253:
		return fmt.Errorf("%d octets long: 253 are the most", len(name))
	case strings.HasSuffix(rest, "."):
		return errors.New("leave out the trailing dot")
	}
	last := ""
	for label := range strings.SplitSeq(rest, ".") {
		if err := checkLabel(label); err != nil {
			return err
		}
		last = label
	}
	// Browsers and C libraries read a name whose last label is a number as an IPv4 address.
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") && strings.Trim(last[2:], "0123456789abcdef") == "" {
		return errors.New("the last label is a number: that is an IP address, not a name")
	}
	return nil
}

func checkLabel(label string) error {
	switch {
	case label == "":
		return errors.New("a label is empty")
	case len(label) > 63:
		return fmt.Errorf("label %.20q… is %d octets long: 63 are the most", label, len(label))
	case label[0] == '-' || label[len(label)-1] == '-':
		return fmt.Errorf("label %q begins or ends with a hyphen", label)
	}
	for i := range len(label) {
		switch c := label[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-':
		case c >= 'A' && c <= 'Z':
			return errors.New("write the name in lower case")
		case c >= 0x80:
			return errors.New("write internationalised labels as A-labels (xn--…)")
		default:
			return fmt.Errorf("%q is not permitted in a DNS name", c)
		}
	}
	if len(label) >= 4 && label[2:4] == "--" {
		if !strings.HasPrefix(label, "xn--") {
			return fmt.Errorf("label %q is reserved (hyphens in third and fourth place)", label)
		}
		if err := checkALabel(label); err != nil {
			return fmt.Errorf("label %q is not a valid A-label: %w", label, err)
		}
	}
	return nil
}

// scripts that are written together in one language (UTS 39, "highly restrictive"). Every other label has letters of one script.
var togetherScripts = [][]string{
	{"Latin", "Han", "Hiragana", "Katakana"},
	{"Latin", "Han", "Bopomofo"},
	{"Latin", "Han", "Hangul"},
}

// checkScripts refuses a name with a label whose letters are of scripts that no language mixes: it is made to be taken for another. The name
// has passed checkDNS. Letters of one foreign script that look like another's are not recognised.
func checkScripts(name string) error {
	for label := range strings.SplitSeq(name, ".") {
		if !strings.HasPrefix(label, "xn--") {
			continue
		}
		u, err := registration.ToUnicode(label)
		if err != nil {
			return fmt.Errorf("label %q is not a valid A-label: %w", label, err)
		}
		if found := scriptsOf(u); len(found) > 1 && !slices.ContainsFunc(togetherScripts, func(set []string) bool {
			return !slices.ContainsFunc(found, func(s string) bool { return !slices.Contains(set, s) })
		}) {
			return fmt.Errorf("label %q mixes letters of %s: it could be taken for another name", label, strings.Join(found, " and "))
		}
	}
	return nil
}

// scriptsOf names the scripts of a text's characters, sorted; what all scripts share counts as none.
func scriptsOf(text string) []string {
	var found []string
	for _, r := range text {
		if unicode.In(r, unicode.Common, unicode.Inherited) || slices.ContainsFunc(found, func(s string) bool { return unicode.Is(unicode.Scripts[s], r) }) {
			continue
		}
		for name, table := range unicode.Scripts {
			if unicode.Is(table, r) {
				found = append(found, name)
				break
			}
		}
	}
	slices.Sort(found)
	return found
}

// registration maps nothing: what it accepts is what a registry would register.
var registration = idna.New(idna.ValidateForRegistration(), idna.BidiRule(), idna.StrictDomainName(true))

func checkALabel(label string) error {
	u, err := registration.ToUnicode(label)
	if err != nil {
		return err
	}
	a, err := registration.ToASCII(u)
	if err != nil {
		return err
	}
	if u == label || a != label {
		return errors.New("it does not decode and encode to itself")
	}
	return nil
}

// names are the names that a certificate will carry, every one permitted.
type names struct {
	commonName string   // empty: none
	dns        []string // in the order asked for, without repeats
}

// asked is what a request asks for in one place, before anything is permitted.
type asked struct {
	commonName string
	dns        []string
}

// permit turns names asked for into names that the profile allows, or says which one it refuses. field prefixes the field to blame.
func (p *Profile) permit(a asked, field string) (names, error) {
	cnField, sanField := field+"subject.common_name", field+"sans"
	rule := p.Names.SANs.DNS
	dns := make([]string, 0, len(a.dns))
	seen := make(map[string]bool, len(a.dns))
	for _, name := range a.dns {
		if err := checkDNS(name, rule.Wildcard); err != nil {
			return names{}, refuse(NameNotPermitted, sanField, "%q: %v", name, err)
		}
		if !rule.MixedScripts {
			if err := checkScripts(name); err != nil {
				return names{}, refuse(NameNotPermitted, sanField, "%q: %v", name, err)
			}
		}
		if !under(name, rule.Under) {
			return names{}, refuse(NameNotPermitted, sanField, "%q is outside the domains that profile %s permits", name, p.Name)
		}
		if !seen[name] {
			seen[name] = true
			dns = append(dns, name)
		}
	}
	if len(dns) < rule.Min || len(dns) > rule.Max {
		return names{}, refuse(NameNotPermitted, sanField, "%d DNS names are asked for as subject alternative names; profile %s permits %d to %d",
			len(dns), p.Name, rule.Min, rule.Max)
	}
	if a.commonName != "" && !seen[a.commonName] {
		return names{}, refuse(NameNotPermitted, cnField, "common name %q is not among the subject alternative names", a.commonName)
	}
	if len(a.commonName) > maxCommonName {
		return names{}, refuse(NameNotPermitted, cnField, "the common name is %d characters long: %d are the most", len(a.commonName), maxCommonName)
	}
	out := names{dns: dns}
	switch p.Names.CommonName {
	case "request":
		out.commonName = a.commonName
	case "first-dns":
		// A name too long for the field is left out of it: the alternative names are what clients match.
		if i := slices.IndexFunc(dns, func(name string) bool { return len(name) <= maxCommonName }); i >= 0 {
			out.commonName = dns[i]
		}
	}
	return out, nil
}

// under tells whether the name is one of the domains or below one. A wildcard counts as the domain it stands in.
func under(name string, domains []string) bool {
	if len(domains) == 0 {
		return true
	}
	name = strings.TrimPrefix(name, "*.")
	return slices.ContainsFunc(domains, func(d string) bool {
		return name == d || strings.HasSuffix(name, "."+d)
	})
}

// chooseNames finds what is asked for in CSR and request, by the profile's source. Names given in the other place too must be the same set.
func (p *Profile) chooseNames(csr, request asked) (asked, string, error) {
	chosen, other, field, otherField := csr, request, "csr.", ""
	if p.Names.Source == "request" {
		chosen, other, field, otherField = request, csr, "", "csr."
	}
	if p.Names.Source == "both" && len(request.dns) == 0 {
		return asked{}, "", refuse(NameNotPermitted, "sans", "profile %s wants the names beside the CSR too", p.Name)
	}
	if len(other.dns) > 0 && !sameSet(chosen.dns, other.dns) {
		return asked{}, "", refuse(NameNotPermitted, otherField+"sans", "the names in the CSR and beside it differ: profile %s takes them from %q",
			p.Name, p.Names.Source)
	}
	if other.commonName != "" && chosen.commonName != "" && other.commonName != chosen.commonName {
		return asked{}, "", refuse(NameNotPermitted, otherField+"subject.common_name", "the common names in the CSR and beside it differ")
	}
	if chosen.commonName == "" {
		chosen.commonName = other.commonName
	}
	return chosen, field, nil
}

func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}
