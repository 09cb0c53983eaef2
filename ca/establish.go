package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"regexp"
	"time"

	"trivet/db"
)

// EstablishSpec says what Establish brings into being. The keys exist already, proved on every member.
type EstablishSpec struct {
	Requester string // principal URI recorded with every certificate
	Root      GenerationSpec
	Issuing   GenerationSpec
}

// GenerationSpec describes one generation.
type GenerationSpec struct {
	CA         string // CA id: [a-z][a-z0-9-]{0,31}, not ending in -g<n>
	Generation int    // from 1
	Subject    pkix.Name
	Lifetime   time.Duration // both ends included; the issuing generation's must end within the root's
	KeyGroup   string
	KeyID      string // of the CA key, known to the engine's KeySource

	ResponderGroup string
	ResponderKeyID string
	ResponderSPKI  []byte // DER; the engine's KeySource need not be allowed to use the key
}

// Issuer is the generation's name.
func (g GenerationSpec) Issuer() string { return fmt.Sprintf("%s-g%d", g.CA, g.Generation) }

var caForm = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
var generationSuffix = regexp.MustCompile(`-g[0-9]+$`)

func (g GenerationSpec) check() error {
	switch {
	case !caForm.MatchString(g.CA) || generationSuffix.MatchString(g.CA):
		return fmt.Errorf("CA id %q: want [a-z][a-z0-9-]{0,31}, not ending in -g<n>", g.CA)
	case g.Generation < 1:
		return fmt.Errorf("generation %d of %s: want 1 or more", g.Generation, g.CA)
	case g.Subject.CommonName == "":
		return fmt.Errorf("%s has no common name", g.Issuer())
	case g.Lifetime < time.Hour:
		return fmt.Errorf("lifetime %s of %s: want an hour or more", g.Lifetime, g.Issuer())
	case g.KeyGroup == "" || g.KeyID == "" || g.ResponderGroup == "" || g.ResponderKeyID == "" || len(g.ResponderSPKI) == 0:
		return fmt.Errorf("%s: a key is not named", g.Issuer())
	}
	return nil
}

// EnsureSite records the first site epoch if there is none, and returns the one in force. It fails if another site is the writing one. It is
// called before an Engine is made, which needs the epoch.
func EnsureSite(ctx context.Context, store *db.Store, site string) (uint64, error) {
	for {
		now, err := store.SiteEpoch(ctx)
		switch {
		case err != nil:
			return 0, fmt.Errorf("reading the site epoch: %w", err)
		case now.N > 0 && now.Site != site:
			return 0, fmt.Errorf("site %s is the writing one (epoch %d), not %s: %w", now.Site, now.N, site, &Error{Name: WrongSite, RetryAfter: retryLater})
		case now.N > 0:
			return now.N, nil
		}
		err = store.InsertSiteEpoch(ctx, db.SiteEpoch{N: 1, Site: site})
		if err != nil && db.ClassOf(err) != db.Duplicate {
			return 0, fmt.Errorf("recording the first site epoch: %w", err)
		}
	}
}

// Establish creates a root generation and an issuing generation below it, each with its certificate, an empty CRL before any other, and an
// OCSP responder certificate. It may be repeated after any failure and goes on where it stopped; a generation that exists with another key
// is an error. It waits until the engine runs, and uses its lane.
func Establish(ctx context.Context, e *Engine, spec EstablishSpec) error {
	if err := errors.Join(spec.Root.check(), spec.Issuing.check()); err != nil {
		return fmt.Errorf("establishing CAs: %w", err)
	}
	if spec.Requester == "" || spec.Root.CA == spec.Issuing.CA {
		return errors.New("establishing CAs: want a requester, and two different CA ids")
	}
	if err := e.Started(ctx); err != nil {
		return fmt.Errorf("establishing CAs: %w", err)
	}
	crls, err := NewCRLs(CRLConfig{Engine: e, Lane: e.cfg.Lane})
	if err != nil {
		return err
	}
	responders, err := NewResponders(RespondersConfig{Engine: e, Lane: e.cfg.Lane, Requester: spec.Requester})
	if err != nil {
		return err
	}
	f := foundation{e: e, crls: crls, responders: responders, requester: spec.Requester}
	if err := f.raise(ctx, spec.Root, spec.Root); err != nil {
		return fmt.Errorf("establishing %s: %w", spec.Root.Issuer(), err)
	}
	if err := f.raise(ctx, spec.Issuing, spec.Root); err != nil {
		return fmt.Errorf("establishing %s: %w", spec.Issuing.Issuer(), err)
	}
	return nil
}

// Started waits until the engine admits requests: until Run has settled what an earlier incarnation left.
func (e *Engine) Started(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := e.admit()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the engine: %w", err)
		}
	}
}

// foundation is one run of Establish.
type foundation struct {
	e          *Engine
	crls       *CRLs
	responders *Responders
	requester  string
}

// raise brings one generation into being, step by step; each step looks first whether it was done.
func (f *foundation) raise(ctx context.Context, g, above GenerationSpec) error {
	key, err := f.e.cfg.Keys.Key(ctx, KeyName{g.KeyGroup, g.KeyID})
	if err != nil {
		return fmt.Errorf("finding key %s of group %s: %w", g.KeyID, g.KeyGroup, err)
	}
	pub := key.Public()
	row, err := f.generation(ctx, g, above, pub)
	if err != nil {
		return err
	}
	if row.Certificate() == nil {
		if err := f.certify(ctx, g, above, pub); err != nil {
			return err
		}
	}
	a, err := f.activate(ctx, g)
	if err != nil {
		return err
	}
	// An empty CRL precedes the first certificate.
	latest, _, err := f.e.cfg.Store.LatestCRL(ctx, nil, a.Issuer, 0)
	if err != nil {
		return fmt.Errorf("reading the newest CRL: %w", err)
	}
	if latest == nil {
		if _, err := f.crls.Issue(ctx, a.Issuer); err != nil {
			return fmt.Errorf("issuing the first CRL: %w", err)
		}
	}
	responderKey, err := x509.ParsePKIXPublicKey(g.ResponderSPKI)
	if err != nil {
		return fmt.Errorf("parsing the responder's public key: %w", err)
	}
	return f.responders.Ensure(ctx, a, g.ResponderGroup, g.ResponderKeyID, responderKey)
}

// generation inserts the generation's row or finds it there, with the same key.
func (f *foundation) generation(ctx context.Context, g, above GenerationSpec, pub crypto.PublicKey) (*db.Generation, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("encoding the public key: %w", err)
	}
	for range maxAttempts {
		row, err := f.find(ctx, g.Issuer())
		if err != nil {
			return nil, err
		}
		if row != nil {
			if row.KeyID != g.KeyID || row.KeyGroup != g.KeyGroup || row.Parent != above.Issuer() || !bytes.Equal(row.SPKI, spki) {
				return nil, fmt.Errorf("the generation exists with key %s of group %s below %s", row.KeyID, row.KeyGroup, row.Parent)
			}
			return row, nil
		}
		err = f.e.cfg.Store.InsertGeneration(ctx, db.Generation{
			Issuer: g.Issuer(), CA: g.CA, Generation: uint32(g.Generation), Parent: above.Issuer(), KeyGroup: g.KeyGroup, KeyID: g.KeyID, SPKI: spki,
		})
		if err != nil && db.ClassOf(err) != db.Duplicate {
			return nil, fmt.Errorf("recording the generation: %w", err)
		}
	}
	return nil, errors.New("the generation's row does not stay in the database")
}

func (f *foundation) find(ctx context.Context, issuer string) (*db.Generation, error) {
	rows, err := f.e.cfg.Store.Generations(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the generations: %w", err)
	}
	for i := range rows {
		if rows[i].Issuer == issuer {
			return &rows[i], nil
		}
	}
	return nil, nil
}

// certify issues the generation's certificate and records it in the generation's chain.
func (f *foundation) certify(ctx context.Context, g, above GenerationSpec, pub crypto.PublicKey) error {
	keyID, err := subjectKeyID(pub)
	if err != nil {
		return err
	}
	notBefore := f.e.cfg.Now().UTC().Truncate(time.Second).Add(-draftBackdate)
	template := &x509.Certificate{
		Subject:               g.Subject,
		SubjectKeyId:          keyID,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	d := Draft{Issuer: above.Issuer(), Template: template, PublicKey: pub, Requester: f.requester}
	if g.Issuer() == above.Issuer() {
		d.SelfKey, d.Profile = KeyName{g.KeyGroup, g.KeyID}, profileRootCA
		template.AuthorityKeyId = keyID // its own: optional in a root, and path builders find it quicker
	} else {
		parent, ok := f.e.Authorities().Issuer(above.Issuer())
		if !ok || parent.Certificate == nil {
			return fmt.Errorf("%s is not known to the engine", above.Issuer())
		}
		if notBefore.Before(parent.Certificate.NotBefore) {
			notBefore = parent.Certificate.NotBefore
		}
		urls := parent.URLs(f.e.cfg.BaseURL)
		template.MaxPathLenZero = true
		template.IssuingCertificateURL, template.CRLDistributionPoints, template.OCSPServer = []string{urls.Certificate}, []string{urls.CRL}, []string{urls.OCSP}
		d.Profile = profileSubCA
	}
	template.NotBefore, template.NotAfter = notBefore, notBefore.Add(g.Lifetime-time.Second)
	issued, err := f.e.obtain(ctx, "certificate of "+g.Issuer(), d)
	if err != nil {
		return err
	}
	return f.log(ctx, &db.GenerationEvent{
		Issuer: g.Issuer(), N: 1, Event: db.EventCertificate, CertIssuer: above.Issuer(), CertSerial: issued.Serial, DER: issued.DER,
	})
}

// activate makes the generation active and returns it as the engine now knows it. Only a generation that never had a state is touched.
func (f *foundation) activate(ctx context.Context, g GenerationSpec) (*Authority, error) {
	row, err := f.find(ctx, g.Issuer())
	if err != nil {
		return nil, err
	}
	if row == nil || row.Certificate() == nil {
		return nil, errors.New("the generation's certificate is not there when read back")
	}
	if row.State() == string(StatePending) {
		last := row.Log[len(row.Log)-1]
		err := f.log(ctx, &db.GenerationEvent{
			Issuer: g.Issuer(), N: last.N + 1, Event: db.EventState, State: string(StateActive), CertIssuer: last.CertIssuer, CertSerial: last.CertSerial,
		})
		if err != nil {
			return nil, err
		}
	}
	if err := f.e.Refresh(ctx); err != nil {
		return nil, err
	}
	a, ok := f.e.Authorities().Issuer(g.Issuer())
	if !ok || a.Certificate == nil || a.State != StateActive {
		return nil, fmt.Errorf("%s is not active", g.Issuer())
	}
	return a, nil
}

// log appends an event to a generation's chain. A duplicate is the same event, from an earlier or a concurrent run.
func (f *foundation) log(ctx context.Context, event *db.GenerationEvent) error {
	appended, err := f.e.lane.Append(ctx, []db.Fact{{Generation: event}})
	if err == nil {
		err = appended[0].Err
	}
	if err != nil && db.ClassOf(err) != db.Duplicate {
		return fmt.Errorf("recording the %s of %s: %w", event.Event, event.Issuer, err)
	}
	return nil
}
