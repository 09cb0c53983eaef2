package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"embed"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Profile says what certificates of one kind contain and what may be asked for. It is immutable: a change is a new version.
type Profile struct {
	Name       string     `yaml:"profile" json:"profile"`       // [a-z][a-z0-9-]*, at most 64 octets
	Version    int        `yaml:"version" json:"version"`       // from 1
	Type       string     `yaml:"type" json:"type"`             // end-entity
	CAs        []string   `yaml:"cas" json:"cas"`               // CA ids that may use it; empty: any
	Keys       Keys       `yaml:"keys" json:"keys"`             //
	Validity   Validity   `yaml:"validity" json:"validity"`     //
	Names      Names      `yaml:"names" json:"names"`           //
	Extensions Extensions `yaml:"extensions" json:"extensions"` //
	Revocation Revocable  `yaml:"revocation" json:"revocation"` //
	Lint       Lint       `yaml:"lint" json:"lint"`             //

	hash [32]byte
}

// Keys lists the subject keys that a profile permits.
type Keys struct {
	EC  []string `yaml:"ec" json:"ec"`   // of P-256, P-384
	RSA *RSA     `yaml:"rsa" json:"rsa"` // nil: no RSA
}

// RSA bounds the modulus, in bits: at least 2048, at most 4096.
type RSA struct {
	Min int `yaml:"min" json:"min"`
	Max int `yaml:"max" json:"max"`
}

// Validity bounds the lifetime. Lifetimes count both ends (RFC 5280 §4.1.2.5).
type Validity struct {
	Default  Lifetime `yaml:"default" json:"default"`   // if the request names no end
	Max      Lifetime `yaml:"max" json:"max"`           //
	Backdate Lifetime `yaml:"backdate" json:"backdate"` // how far notBefore lies back; at most 48h
}

// Names says where names come from and which are permitted. A kind of name that is not listed is refused.
type Names struct {
	Source     string `yaml:"source" json:"source"`           // csr, request, or both; names given elsewhere must agree
	CommonName string `yaml:"common_name" json:"common_name"` // first-dns, omit, or request
	Fixed      Fixed  `yaml:"fixed" json:"fixed"`             // subject attributes that every certificate carries
	SANs       SANs   `yaml:"sans" json:"sans"`
}

// Fixed are constant subject attributes; an empty one is absent.
type Fixed struct {
	Organization string `yaml:"organization" json:"organization,omitempty"`
	Country      string `yaml:"country" json:"country,omitempty"` // two capital letters
}

// SANs lists the permitted types of subject alternative names.
type SANs struct {
	DNS *DNS `yaml:"dns" json:"dns"`
}

// DNS permits DNS names.
type DNS struct {
	Min      int      `yaml:"min" json:"min"`
	Max      int      `yaml:"max" json:"max"`           // at most 100
	Under    []string `yaml:"under" json:"under"`       // the domains themselves and names below them; empty: any domain
	Wildcard bool     `yaml:"wildcard" json:"wildcard"` // whether "*" may be the whole left label

	// MixedScripts permits internationalised labels whose letters are of several scripts, such as a Cyrillic а among Latin letters. Those that
	// are usual in one language, as in Japanese, are always permitted.
	MixedScripts bool `yaml:"mixed_scripts" json:"mixed_scripts,omitempty"`
}

// Extensions lists what certificates of the profile carry beside names and identifiers.
type Extensions struct {
	KeyUsage    map[string][]string `yaml:"key_usage" json:"key_usage"` // by key type: ec, rsa
	ExtKeyUsage []string            `yaml:"ext_key_usage" json:"ext_key_usage"`
	Policies    []string            `yaml:"policies" json:"policies"` // certificate policy OIDs
}

// Revocable says how certificates of the profile can be revoked and where status is found.
type Revocable struct {
	Mode string `yaml:"mode" json:"mode"` // crl+ocsp, crl, or ocsp: which addresses certificates carry
	Hold bool   `yaml:"hold" json:"hold"` // whether certificateHold is permitted
}

// Lint says how strictly drafts are checked before they are signed.
type Lint struct {
	Policy  string   `yaml:"policy" json:"policy"`             // private (RFC lints) or br (those of the Baseline Requirements too)
	FailOn  string   `yaml:"fail_on" json:"fail_on,omitempty"` // the least grade of a finding that refuses: error (if empty), warn or notice
	Skip    []string `yaml:"skip" json:"skip"`                 // names of lints that do not apply to these certificates, ever
	Waivers []Waiver `yaml:"waivers" json:"waivers,omitempty"` // findings that are accepted for a time
}

// Waiver accepts the findings of one lint until a date. A profile whose waiver is out of date cannot be loaded, and the lint counts again from
// that date on where it is loaded already.
type Waiver struct {
	Lint   string `yaml:"lint" json:"lint"`
	Reason string `yaml:"reason" json:"reason"` // why it is accepted, for auditors
	Until  Date   `yaml:"until" json:"until"`   // the last day, in UTC
}

// Date is a day, written 2027-01-31.
type Date struct{ time.Time }

// UnmarshalYAML reads 2027-01-31.
func (d *Date) UnmarshalYAML(b []byte) (err error) {
	s := strings.Trim(strings.TrimSpace(string(b)), `"'`)
	if d.Time, err = time.Parse(time.DateOnly, s); err != nil {
		return fmt.Errorf("date %q: want a day such as 2027-01-31", s)
	}
	return nil
}

// MarshalText writes what UnmarshalYAML reads.
func (d Date) MarshalText() ([]byte, error) { return []byte(d.Format(time.DateOnly)), nil }

// over tells whether the day has passed.
func (d Date) over(now time.Time) bool { return !now.Before(d.AddDate(0, 0, 1)) }

// Lifetime is a duration that is written in whole days ("90d") or as Go does ("5m").
type Lifetime time.Duration

// UnmarshalYAML reads "90d" or "2160h".
func (l *Lifetime) UnmarshalYAML(b []byte) error {
	s := strings.Trim(strings.TrimSpace(string(b)), `"'`)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.Atoi(days)
		if err != nil || n < 0 || n > 36500 {
			return fmt.Errorf("lifetime %q: want whole days such as 90d", s)
		}
		*l = Lifetime(time.Duration(n) * 24 * time.Hour)
		return nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return fmt.Errorf("lifetime %q: want days such as 90d or a duration such as 5m", s)
	}
	*l = Lifetime(d)
	return nil
}

// MarshalText writes what UnmarshalYAML reads.
func (l Lifetime) MarshalText() ([]byte, error) {
	if d := time.Duration(l); d%(24*time.Hour) != 0 || d == 0 {
		return []byte(d.String()), nil
	}
	return fmt.Appendf(nil, "%dd", time.Duration(l)/(24*time.Hour)), nil
}

// Hash returns the SHA-256 of the profile's contents with defaults filled in. It is pinned in every intent.
func (p *Profile) Hash() [32]byte { return p.hash }

// Profiles are the profiles that a node may use. It is immutable.
type Profiles struct{ byName map[string][]*Profile } // ascending versions

// Get returns the newest version of a profile.
func (s *Profiles) Get(name string) (*Profile, bool) {
	versions := s.byName[name]
	if len(versions) == 0 {
		return nil, false
	}
	return versions[len(versions)-1], true
}

// Pinned returns the version whose contents have that hash: what an intent was made under.
func (s *Profiles) Pinned(name string, version int, hash [32]byte) (*Profile, bool) {
	for _, p := range s.byName[name] {
		if p.Version == version && p.hash == hash {
			return p, true
		}
	}
	return nil, false
}

// All returns the newest version of every profile, sorted by name.
func (s *Profiles) All() []*Profile {
	all := make([]*Profile, 0, len(s.byName))
	for name := range s.byName {
		p, _ := s.Get(name)
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b *Profile) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// NewProfiles collects profiles. Two of the same name and version must be the same.
func NewProfiles(profiles ...*Profile) (*Profiles, error) {
	s := &Profiles{byName: make(map[string][]*Profile)}
	for _, p := range profiles {
		if old := s.version(p.Name, p.Version); old != nil {
			if old.hash != p.hash {
				return nil, fmt.Errorf("profile %s version %d is there twice with different contents: a change needs a new version", p.Name, p.Version)
			}
			continue
		}
		s.byName[p.Name] = append(s.byName[p.Name], p)
	}
	for _, versions := range s.byName {
		slices.SortFunc(versions, func(a, b *Profile) int { return a.Version - b.Version })
	}
	if len(s.byName) == 0 {
		return nil, errors.New("there is no profile: at least one is needed to issue")
	}
	return s, nil
}

func (s *Profiles) version(name string, version int) *Profile {
	for _, p := range s.byName[name] {
		if p.Version == version {
			return p
		}
	}
	return nil
}

//go:embed profiles/*.yaml
var builtin embed.FS

// DefaultProfiles returns the profiles that come with the program.
func DefaultProfiles() (*Profiles, error) {
	sub, err := fs.Sub(builtin, "profiles")
	if err != nil {
		return nil, fmt.Errorf("opening the built-in profiles: %w", err)
	}
	return readProfiles(sub)
}

// LoadProfiles reads every *.yaml file of a directory, one profile each.
func LoadProfiles(dir string) (*Profiles, error) { return readProfiles(os.DirFS(dir)) }

func readProfiles(dir fs.FS) (*Profiles, error) {
	names, err := fs.Glob(dir, "*.yaml")
	if err != nil {
		return nil, fmt.Errorf("listing profiles: %w", err)
	}
	var all []*Profile
	for _, name := range names {
		b, err := fs.ReadFile(dir, name)
		if err != nil {
			return nil, fmt.Errorf("reading profile %s: %w", name, err)
		}
		p, err := ParseProfile(b)
		if err != nil {
			return nil, fmt.Errorf("reading profile %s: %w", name, err)
		}
		all = append(all, p)
	}
	return NewProfiles(all...)
}

// ParseProfile reads one profile that is to be used from now on. Unknown fields are refused, with line and column, as are values that could
// not be honoured, and waivers that are out of date.
func ParseProfile(text []byte) (*Profile, error) { return parseProfile(text, time.Now()) }

func parseProfile(text []byte, now time.Time) (*Profile, error) {
	p := new(Profile)
	dec := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict())
	if err := dec.Decode(p); err != nil {
		return nil, fmt.Errorf("decoding: %w", err)
	}
	if err := dec.Decode(new(Profile)); !errors.Is(err, io.EOF) {
		return nil, errors.New("decoding: more than one document: a file holds one profile")
	}
	setDefault(&p.Type, "end-entity")
	setDefault(&p.Validity.Max, p.Validity.Default)
	setDefault(&p.Names.Source, "csr")
	setDefault(&p.Names.CommonName, "first-dns")
	setDefault(&p.Revocation.Mode, "crl+ocsp")
	setDefault(&p.Lint.Policy, "private")
	if err := p.validate(now); err != nil {
		return nil, err
	}
	canonical, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("hashing the profile: %w", err)
	}
	p.hash = sha256.Sum256(canonical)
	return p, nil
}

var profileName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,63}$`)

func (p *Profile) validate(now time.Time) error {
	var bad []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			bad = append(bad, fmt.Errorf(format, args...))
		}
	}
	check(profileName.MatchString(p.Name), "profile %q: want a name such as tls-server", p.Name)
	check(p.Version >= 1, "version %d: want 1 or more", p.Version)
	check(p.Type == "end-entity", "type %q: want end-entity", p.Type)

	for _, curve := range p.Keys.EC {
		check(curve == "P-256" || curve == "P-384", "keys.ec %q: want P-256 or P-384", curve)
	}
	if rsa := p.Keys.RSA; rsa != nil {
		check(rsa.Min >= minRSA && rsa.Max <= maxRSA && rsa.Min <= rsa.Max, "keys.rsa %d to %d: want %d to %d", rsa.Min, rsa.Max, minRSA, maxRSA)
	}
	check(len(p.Keys.EC) > 0 || p.Keys.RSA != nil, "keys: permit at least one kind")

	v := p.Validity
	check(v.Default >= Lifetime(time.Minute), "validity.default %s: want a minute or more", time.Duration(v.Default))
	check(v.Default <= v.Max, "validity.default %s is above validity.max %s", time.Duration(v.Default), time.Duration(v.Max))
	check(v.Backdate <= Lifetime(48*time.Hour) && v.Backdate < v.Default, "validity.backdate %s: want less than the lifetime, and 48h at most", time.Duration(v.Backdate))

	check(slices.Contains([]string{"csr", "request", "both"}, p.Names.Source), "names.source %q: want csr, request or both", p.Names.Source)
	check(slices.Contains([]string{"first-dns", "omit", "request"}, p.Names.CommonName), "names.common_name %q: want first-dns, omit or request", p.Names.CommonName)
	check(len(p.Names.Fixed.Organization) <= 64, "names.fixed.organization: at most 64 octets")
	check(p.Names.Fixed.Country == "" || country.MatchString(p.Names.Fixed.Country), "names.fixed.country %q: want two capital letters", p.Names.Fixed.Country)
	if dns := p.Names.SANs.DNS; dns == nil {
		check(false, "names.sans.dns: permit at least one type of name")
	} else {
		check(dns.Min >= 1 && dns.Min <= dns.Max && dns.Max <= maxNames, "names.sans.dns %d to %d: want 1 to %d", dns.Min, dns.Max, maxNames)
		for _, domain := range dns.Under {
			err := checkDNS(domain, false)
			check(err == nil, "names.sans.dns.under %q: %v", domain, err)
		}
	}

	for kind, usages := range p.Extensions.KeyUsage {
		check(kind == "ec" || kind == "rsa", "extensions.key_usage.%s: want ec or rsa", kind)
		for _, u := range usages {
			check(keyUsages[u] != 0, "extensions.key_usage.%s %q: not an end-entity key usage", kind, u)
		}
	}
	check(len(p.Keys.EC) == 0 || len(p.Extensions.KeyUsage["ec"]) > 0, "extensions.key_usage.ec is missing")
	check(p.Keys.RSA == nil || len(p.Extensions.KeyUsage["rsa"]) > 0, "extensions.key_usage.rsa is missing")
	check(len(p.Extensions.ExtKeyUsage) > 0, "extensions.ext_key_usage is missing")
	for _, u := range p.Extensions.ExtKeyUsage {
		_, ok := extKeyUsages[u]
		check(ok, "extensions.ext_key_usage %q: want serverAuth, clientAuth, codeSigning or emailProtection", u)
	}
	for _, oid := range p.Extensions.Policies {
		_, err := x509.ParseOID(oid)
		check(err == nil, "extensions.policies %q: not an object identifier", oid)
	}
	check(slices.Contains([]string{"crl+ocsp", "crl", "ocsp"}, p.Revocation.Mode), "revocation.mode %q: want crl+ocsp, crl or ocsp", p.Revocation.Mode)
	check(p.Lint.Policy == "private" || p.Lint.Policy == "br", "lint.policy %q: want private or br", p.Lint.Policy)
	check(p.Lint.Policy != "br" || !p.Revocation.Hold, "revocation.hold: never under lint.policy br")
	check(slices.Contains([]string{"", "error", "warn", "notice"}, p.Lint.FailOn), "lint.fail_on %q: want error, warn or notice", p.Lint.FailOn)
	for _, name := range p.Lint.Skip {
		check(knownLint(name), "lint.skip %q: no such lint", name)
	}
	seen := map[string]bool{}
	for i, w := range p.Lint.Waivers {
		check(knownLint(w.Lint), "lint.waivers[%d].lint %q: no such lint", i, w.Lint)
		check(!seen[w.Lint] && !slices.Contains(p.Lint.Skip, w.Lint), "lint.waivers[%d].lint %q: it is waived or skipped already", i, w.Lint)
		check(strings.TrimSpace(w.Reason) != "" && len(w.Reason) <= 255, "lint.waivers[%d].reason: say why, in at most 255 octets", i)
		check(!w.Until.IsZero(), "lint.waivers[%d].until is missing", i)
		check(w.Until.IsZero() || !w.Until.over(now), "lint.waivers[%d]: the waiver of %s ended on %s: mend what it excuses, or decide anew in a new version of the profile",
			i, w.Lint, w.Until.Format(time.DateOnly))
		seen[w.Lint] = true
	}
	return errors.Join(bad...)
}

var country = regexp.MustCompile(`^[A-Z]{2}$`)

var keyUsages = map[string]x509.KeyUsage{
	"digitalSignature":  x509.KeyUsageDigitalSignature,
	"contentCommitment": x509.KeyUsageContentCommitment,
	"keyEncipherment":   x509.KeyUsageKeyEncipherment,
	"keyAgreement":      x509.KeyUsageKeyAgreement,
}

var extKeyUsages = map[string]x509.ExtKeyUsage{
	"serverAuth":      x509.ExtKeyUsageServerAuth,
	"clientAuth":      x509.ExtKeyUsageClientAuth,
	"codeSigning":     x509.ExtKeyUsageCodeSigning,
	"emailProtection": x509.ExtKeyUsageEmailProtection,
}

// keyUsage returns the usage bits for a key type, ec or rsa.
func (p *Profile) keyUsage(kind string) x509.KeyUsage {
	var bits x509.KeyUsage
	for _, u := range p.Extensions.KeyUsage[kind] {
		bits |= keyUsages[u]
	}
	return bits
}

func (p *Profile) extKeyUsage() []x509.ExtKeyUsage {
	usages := make([]x509.ExtKeyUsage, len(p.Extensions.ExtKeyUsage))
	for i, u := range p.Extensions.ExtKeyUsage {
		usages[i] = extKeyUsages[u]
	}
	return usages
}

// rawSubject builds the whole subject from the profile and a permitted common name, which may be empty. The country is a PrintableString,
// all else UTF8String (RFC 5280 §4.1.2.4).
func (p *Profile) rawSubject(commonName string) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		add := func(oid asn1.ObjectIdentifier, tag cbasn1.Tag, value string) {
			if value == "" {
				return
			}
			b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
				b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(oid)
					b.AddASN1(tag, func(b *cryptobyte.Builder) { b.AddBytes([]byte(value)) })
				})
			})
		}
		add(oidCountry, cbasn1.PrintableString, p.Names.Fixed.Country)
		add(oidOrganization, cbasn1.UTF8String, p.Names.Fixed.Organization)
		add(oidCommonName, cbasn1.UTF8String, commonName)
	})
	return b.Bytes()
}

// mayUse tells whether the CA may issue under the profile.
func (p *Profile) mayUse(ca string) bool { return len(p.CAs) == 0 || slices.Contains(p.CAs, ca) }
