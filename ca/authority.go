package ca

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"trivet/db"
)

// State is the state of a CA generation.
type State string

// States of a generation.
const (
	StatePending   State = "pending"   // no certificate yet
	StateActive    State = "active"    // issues
	StateSuspended State = "suspended" // status only
	StateRetired   State = "retired"   // status only, until its last certificate expires
	StateRevoked   State = "revoked"
	StateExpired   State = "expired"
	StateExternal  State = "external" // its key is elsewhere
)

// Authority is one CA generation as the database knows it. It is immutable.
type Authority struct {
	CA         string // CA id, such as "demo"
	Generation int    // from 1
	Issuer     string // "{CA}-g{Generation}"
	Parent     string // issuer of its certificate; itself for a root
	State      State
	Group      string // key group
	KeyID      string // key within the group
	SPKI       []byte // DER SubjectPublicKeyInfo of the key

	Certificate *x509.Certificate   // newest certificate; nil while pending
	Chain       []*x509.Certificate // from Certificate to its root; empty while pending
}

// Key names the authority's key.
func (a *Authority) Key() KeyName { return KeyName{a.Group, a.KeyID} }

// Active tells whether the authority may issue end-entity certificates at the time given, and why not.
func (a *Authority) Active(at time.Time) error {
	switch {
	case a.State != StateActive:
		return fmt.Errorf("%s is %s", a.Issuer, a.State)
	case a.Certificate == nil:
		return fmt.Errorf("%s has no certificate", a.Issuer)
	case at.After(a.Certificate.NotAfter):
		return fmt.Errorf("%s expired at %s", a.Issuer, a.Certificate.NotAfter.UTC().Format(time.RFC3339))
	case at.Before(a.Certificate.NotBefore):
		return fmt.Errorf("%s is not valid before %s", a.Issuer, a.Certificate.NotBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

// URLs are the plain-HTTP addresses that certificates of an authority carry.
type URLs struct {
	Certificate string // DER certificate of the issuer (AIA caIssuers)
	CRL         string // complete CRL (CDP)
	OCSP        string // responder (AIA ocsp)
}

// URLs returns the authority's addresses under base, such as "http://pki.example.org".
func (a *Authority) URLs(base string) URLs {
	return URLs{
		Certificate: base + "/ca/" + a.Issuer + ".crt",
		CRL:         base + "/crl/" + a.Issuer + ".crl",
		OCSP:        base + "/ocsp/" + a.CA,
	}
}

// Authorities is an immutable snapshot of the generations that the database knows.
type Authorities struct {
	all      []*Authority // by CA and generation
	byIssuer map[string]*Authority
}

// All returns every generation, sorted by CA and generation. The slice is the caller's.
func (s *Authorities) All() []*Authority { return slices.Clone(s.all) }

// Issuer returns the generation of that name, such as "demo-g1".
func (s *Authorities) Issuer(issuer string) (*Authority, bool) {
	a, ok := s.byIssuer[issuer]
	return a, ok
}

// Issuing returns the newest generation of the CA that may issue at the time given. The error says which generations are there and why none may.
func (s *Authorities) Issuing(ca string, at time.Time) (*Authority, error) {
	var causes []string
	for _, a := range slices.Backward(s.all) {
		if a.CA != ca {
			continue
		}
		err := a.Active(at)
		if err == nil {
			return a, nil
		}
		causes = append(causes, err.Error())
	}
	if causes == nil {
		return nil, fmt.Errorf("no CA %q is known", ca)
	}
	// One line: this is told to clients.
	return nil, errors.New(strings.Join(causes, "; "))
}

func (s *Authorities) known(ca string) bool {
	return slices.ContainsFunc(s.all, func(a *Authority) bool { return a.CA == ca })
}

// newAuthorities builds a snapshot from database rows. A row whose certificate does not parse fails the whole: better an old snapshot than a wrong one.
func newAuthorities(rows []db.Generation) (*Authorities, error) {
	s := &Authorities{byIssuer: make(map[string]*Authority, len(rows))}
	for _, row := range rows {
		a := &Authority{
			CA: row.CA, Generation: int(row.Generation), Issuer: row.Issuer, Parent: row.Parent,
			State: State(row.State()), Group: row.KeyGroup, KeyID: row.KeyID, SPKI: row.SPKI,
		}
		if der := row.Certificate(); len(der) > 0 {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("parsing the certificate of %s: %w", row.Issuer, err)
			}
			a.Certificate = cert
		}
		s.all = append(s.all, a)
		s.byIssuer[a.Issuer] = a
	}
	slices.SortFunc(s.all, func(a, b *Authority) int {
		return cmp.Or(cmp.Compare(a.CA, b.CA), cmp.Compare(a.Generation, b.Generation))
	})
	for _, a := range s.all {
		for at := a; at != nil && at.Certificate != nil && len(a.Chain) <= len(s.all); at = s.byIssuer[at.Parent] {
			a.Chain = append(a.Chain, at.Certificate)
			if at.Parent == at.Issuer {
				break
			}
		}
	}
	return s, nil
}

// Authorities returns the newest snapshot. It is never nil; before the first refresh it is empty.
func (e *Engine) Authorities() *Authorities { return e.authorities.Load() }

// Refresh re-reads the authorities from the database. On failure the old snapshot stays.
func (e *Engine) Refresh(ctx context.Context) error {
	rows, err := e.record.Generations(ctx)
	if err != nil {
		return fmt.Errorf("reading CA generations: %w", err)
	}
	next, err := newAuthorities(rows)
	if err != nil {
		return err
	}
	e.authorities.Store(next)
	return nil
}
