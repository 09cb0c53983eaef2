package ca

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	zx509 "github.com/zmap/zcrypto/x509"
	_ "github.com/zmap/zlint/v3" // registers the lints
	"github.com/zmap/zlint/v3/lint"
)

// rfcSources are the lints that hold for every certificate; brSources assume a publicly trusted CA and are added under lint.policy br.
var (
	rfcSources = lint.SourceList{lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC6960, lint.RFC8813, lint.Community}
	brSources  = lint.SourceList{lint.CABFBaselineRequirements}
)

// linter runs zlint over drafts. Filtering the registry costs more than linting, so that each selection is kept. Safe for concurrent use.
type linter struct {
	mu         sync.Mutex
	selections map[string]selection // by policy and skipped lints
}

type selection struct {
	lints  []*lint.CertificateLint
	config lint.Configuration
}

func newLinter() *linter { return &linter{selections: make(map[string]selection)} }

func (l *linter) selection(rules Lint) (selection, error) {
	key := rules.Policy + "\x00" + strings.Join(rules.Skip, "\x00")
	l.mu.Lock()
	defer l.mu.Unlock()
	if s, ok := l.selections[key]; ok {
		return s, nil
	}
	options := lint.FilterOptions{IncludeSources: slices.Clone(rfcSources), ExcludeNames: rules.Skip}
	if rules.Policy == "br" {
		options.IncludeSources = append(options.IncludeSources, brSources...)
	}
	r, err := lint.GlobalRegistry().Filter(options)
	if err != nil {
		return selection{}, fmt.Errorf("selecting lints: %w", err)
	}
	s := selection{lints: r.CertificateLints().Lints(), config: r.GetConfiguration()}
	l.selections[key] = s
	return s, nil
}

// grades are the least grades of a finding that refuses.
var grades = map[string]lint.LintStatus{"": lint.Error, "error": lint.Error, "warn": lint.Warn, "notice": lint.Notice}

// check lints a draft, a whole DER certificate that nobody signed, and refuses it on any finding of a grade that the rules do not let
// pass and that no waiver excuses now.
func (l *linter) check(der []byte, rules Lint, now time.Time) error {
	s, err := l.selection(rules)
	if err != nil {
		return err
	}
	cert, err := zx509.ParseCertificate(der)
	if err != nil {
		return refuse(LintFailed, "", "the certificate that would be issued cannot be read back: %v", err)
	}
	worst, ok := grades[rules.FailOn]
	if !ok {
		worst = lint.Notice
	}
	var findings []string
	for _, one := range s.lints {
		if r := one.Execute(cert, s.config); r.Status >= worst && !rules.waived(one.Name, now) {
			findings = append(findings, strings.TrimSuffix(one.Name+": "+r.Details, ": "))
		}
	}
	if findings == nil {
		return nil
	}
	slices.Sort(findings)
	return refuse(LintFailed, "", "the certificate that would be issued breaks %s", strings.Join(findings, "; "))
}

// waived tells whether a lint's findings are accepted now.
func (l *Lint) waived(name string, now time.Time) bool {
	return slices.ContainsFunc(l.Waivers, func(w Waiver) bool { return w.Lint == name && !w.Until.over(now) })
}

func knownLint(name string) bool { return lint.GlobalRegistry().ByName(name) != nil }
