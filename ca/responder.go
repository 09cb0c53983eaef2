package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"trivet/db"
)

// Names under which certificates built from drafts are recorded. They are no profiles that a request can name.
const (
	profileRootCA    = "root-ca"
	profileSubCA     = "sub-ca"
	profileResponder = "ocsp-responder"
	draftVersion     = 1
)

const (
	responderLifetime = 30 * 24 * time.Hour
	responderRenewal  = 15 * 24 * time.Hour // left of a responder certificate when the next one is issued
	responderEvery    = time.Minute         // how often that is looked at
	draftBackdate     = 5 * time.Minute
	maxDraftAttempts  = 8
)

var (
	oidOCSPNoCheck = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 5}
	derNull        = []byte{5, 0}
)

// responderTemplate is a delegated responder's certificate (pki-profile §7, RFC 6960 §4.2.2.2): OCSPSigning alone, not itself to be checked,
// without addresses and names. It ends with its issuer at the latest.
func responderTemplate(a *Authority, n uint32, pub crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	keyID, err := subjectKeyID(pub)
	if err != nil {
		return nil, err
	}
	notBefore := now.UTC().Truncate(time.Second).Add(-draftBackdate)
	if first := a.Certificate.NotBefore; notBefore.Before(first) {
		notBefore = first.UTC()
	}
	notAfter := notBefore.Add(responderLifetime - time.Second)
	if last := a.Certificate.NotAfter.UTC(); notAfter.After(last) {
		notAfter = last
	}
	return &x509.Certificate{
		Subject:      pkix.Name{CommonName: fmt.Sprintf("%s OCSP responder %d", a.Issuer, n)},
		NotBefore:    notBefore,
		NotAfter:     notAfter,
		SubjectKeyId: keyID,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning},
		// RFC 6960 §4.2.2.2.1: the value is NULL, the extension not critical.
		ExtraExtensions: []pkix.Extension{{Id: oidOCSPNoCheck, Value: derNull}},
	}, nil
}

// draftKeys are the request key and body hash of a certificate built from a draft, equal on every node, so that whoever asks gets the one
// certificate there is.
func draftKeys(what string, attempt int, pub crypto.PublicKey) (req, body [32]byte, err error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return req, body, fmt.Errorf("encoding the public key: %w", err)
	}
	// No principal begins like this, so that no requester can take the key.
	return requestKey("draft", what+" "+strconv.Itoa(attempt)), sha256.Sum256(append([]byte("trivet-draft-v1 "+what+"\x00"), spki...)), nil
}

// obtain issues a draft under keys that follow from what it is for. One that was begun long ago and then abandoned by a sweeper is asked
// for again under the next keys.
func (e *Engine) obtain(ctx context.Context, what string, d Draft) (*Issued, error) {
	for attempt := 1; ; attempt++ {
		var err error
		if d.Req, d.Body, err = draftKeys(what, attempt, d.PublicKey); err != nil {
			return nil, err
		}
		d.ProfileVersion, d.ProfileHash = draftVersion, sha256.Sum256([]byte(d.Profile))
		issued, err := e.IssueDraft(ctx, d)
		if err != nil && NameOf(err) == RequestAbandoned && attempt < maxDraftAttempts {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("issuing %s: %w", what, err)
		}
		return issued, nil
	}
}

// RespondersConfig is what Responders needs.
type RespondersConfig struct {
	Engine    *Engine
	Lane      *db.Lane // of the same incarnation
	Requester string   // principal URI recorded with each certificate: this node's
}

// Responders keeps every generation's OCSP responder certificate young: 30 days, renewed when 15 are left, with the same key, so that stored
// answers stay valid. It is safe for concurrent use, also by several nodes: they get one certificate.
type Responders struct {
	cfg  RespondersConfig
	e    *Engine
	lane lane
}

// NewResponders returns the job.
func NewResponders(cfg RespondersConfig) (*Responders, error) {
	if cfg.Engine == nil || cfg.Lane == nil || cfg.Requester == "" {
		return nil, errors.New("ca: a field of RespondersConfig is missing")
	}
	return &Responders{cfg: cfg, e: cfg.Engine, lane: cfg.Engine.cfg.Rounds.lane(cfg.Lane)}, nil
}

// Run renews until ctx ends; then it returns nil. Failures are logged and tried again.
func (r *Responders) Run(ctx context.Context) error {
	pause := rand.N(10 * time.Second)
	for {
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		pause = responderEvery/2 + rand.N(responderEvery)
		if err := r.Renew(ctx); err != nil && ctx.Err() == nil {
			r.e.cfg.Log.Warn("responder certificates not renewed, will try again", "err", err)
		}
	}
}

// Renew issues the next responder certificate of every generation whose newest one has 15 days or less left. Generations without a
// responder are left alone: Establish gives them their first.
func (r *Responders) Renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.e.cfg.BatchTimeout)
	defer cancel()
	newest, err := r.newest(ctx)
	if err != nil {
		return err
	}
	var failed []error
	for issuer, old := range newest {
		a, ok := r.e.Authorities().Issuer(issuer)
		if !ok || !signsCRLs(a, r.e.cfg.Now()) {
			continue
		}
		cert, err := x509.ParseCertificate(old.DER)
		if err != nil {
			failed = append(failed, fmt.Errorf("parsing responder certificate %d of %s: %w", old.N, issuer, err))
			continue
		}
		if cert.NotAfter.Sub(r.e.cfg.Now()) > responderRenewal || !cert.NotAfter.Before(a.Certificate.NotAfter) {
			continue
		}
		next := db.Responder{Issuer: issuer, N: old.N + 1, KeyGroup: old.KeyGroup, KeyID: old.KeyID}
		if err := r.issue(ctx, a, next, cert.PublicKey); err != nil {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

func (r *Responders) newest(ctx context.Context) (map[string]db.Responder, error) {
	rows, err := r.e.cfg.Store.Responders(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the responders: %w", err)
	}
	newest := make(map[string]db.Responder)
	for _, row := range rows { // ordered by n
		newest[row.Issuer] = row
	}
	return newest, nil
}

// Ensure gives a generation its first responder certificate, for that key, unless it has one already.
func (r *Responders) Ensure(ctx context.Context, a *Authority, keyGroup, keyID string, pub crypto.PublicKey) error {
	newest, err := r.newest(ctx)
	if err != nil {
		return err
	}
	if _, ok := newest[a.Issuer]; ok {
		return nil
	}
	return r.issue(ctx, a, db.Responder{Issuer: a.Issuer, N: 1, KeyGroup: keyGroup, KeyID: keyID}, pub)
}

// issue issues one responder certificate and announces it on the change feed.
func (r *Responders) issue(ctx context.Context, a *Authority, row db.Responder, pub crypto.PublicKey) error {
	template, err := responderTemplate(a, row.N, pub, r.e.cfg.Now())
	if err != nil {
		return err
	}
	what := fmt.Sprintf("responder certificate %d of %s", row.N, a.Issuer)
	issued, err := r.e.obtain(ctx, what, Draft{
		Issuer: a.Issuer, Template: template, PublicKey: pub, Profile: profileResponder, Requester: r.cfg.Requester,
	})
	if err != nil {
		return err
	}
	row.CertSerial, row.DER = issued.Serial, issued.DER
	appended, err := r.lane.Append(ctx, []db.Fact{{Responder: &row}})
	if err == nil {
		err = appended[0].Err
	}
	if err != nil && db.ClassOf(err) != db.Duplicate { // a duplicate is the same certificate, recorded by another node
		return fmt.Errorf("recording %s: %w", what, err)
	}
	r.e.cfg.Log.Info("responder certificate issued", "issuer", a.Issuer, "n", row.N, "serial", hex.EncodeToString(issued.Serial), "not_after", template.NotAfter)
	return nil
}
