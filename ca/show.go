package ca

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"sync"

	"trivet/db"
)

// maxShown is how many certificates a Viewer remembers to have journalled.
const maxShown = 1 << 16

// Viewer shows certificates that are on record. Showing one is releasing it: what it returns was read causally, verified, and is in this
// node's journal. It is safe for concurrent use.
type Viewer struct {
	e *Engine

	mu    sync.Mutex
	shown map[[32]byte]bool // SHA-256 of certificates journalled by this incarnation; forgetting one costs an fsync
}

// NewViewer returns a Viewer of the engine's record.
func NewViewer(e *Engine) *Viewer { return &Viewer{e: e, shown: map[[32]byte]bool{}} }

// Certificate returns what is on record of a serial, nil if there is no such intent. Every error is an *Error.
func (v *Viewer) Certificate(ctx context.Context, issuer string, serial []byte) (*db.Certificate, error) {
	at := v.e.cfg.Rounds.now()
	c, node, err := v.e.record.CertificateElsewhere(ctx, "", issuer, serial)
	if err == nil && (c == nil || c.Outcome == nil || c.Outcome.Kind != db.OutcomeCert) {
		// That there is none is a promise too.
		err = v.e.cfg.Rounds.Complete(ctx, func() (err error) {
			c, node, err = v.e.record.CertificateElsewhere(ctx, "", issuer, serial)
			return err
		})
	}
	if NameOf(err) != "" {
		return nil, err
	}
	if err != nil {
		return nil, databaseError("reading the certificate", err)
	}
	if c == nil || c.Outcome == nil || c.Outcome.Kind != db.OutcomeCert {
		return c, nil
	}
	// Shown before or not: its revocation may be lost.
	if err := v.e.cfg.Rounds.still(at.in(c.Round)); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(c.Outcome.DER)
	v.mu.Lock()
	known := v.shown[digest]
	v.mu.Unlock()
	if known {
		return c, nil
	}
	if c, err = v.release(ctx, c, node); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.shown) >= maxShown {
		clear(v.shown)
	}
	v.shown[digest] = true
	return c, nil
}

// release is a certificate's first showing here. Nobody knows which database node committed it, and it may be the one that answered: another one is asked, too.
func (v *Viewer) release(ctx context.Context, seen *db.Certificate, node string) (*db.Certificate, error) {
	id := seen.Intent.Issuer + ":" + hex.EncodeToString(seen.Intent.Serial)
	a, ok := v.e.Authorities().Issuer(seen.Intent.Issuer)
	if !ok || a.Certificate == nil {
		return nil, unavailable(CANotActive, nil, "%s is not known here yet: repeat the request", seen.Intent.Issuer)
	}
	at := v.e.cfg.Rounds.now()
	c, _, err := v.e.record.CertificateElsewhere(ctx, node, seen.Intent.Issuer, seen.Intent.Serial)
	if err != nil {
		return nil, databaseError("reading the certificate back", err)
	}
	if c == nil || c.Outcome == nil || string(c.Outcome.DER) != string(seen.Outcome.DER) {
		return nil, unavailable(DatabaseUnavailable, errVanished, "the database nodes do not agree about this certificate: repeat the request")
	}
	if _, err := verifyIssued(c.Outcome.DER, nil, a.Certificate.PublicKey); err != nil {
		v.e.cfg.Log.Error("the record holds a certificate that does not verify: it is not shown", "id", id, "err", err)
		return nil, unavailable(DatabaseUnavailable, err, "the certificate on record does not verify: the operators must look at it")
	}
	err = v.e.cfg.Rounds.done(ctx, v.e.log, at.in(c.Round), doneOf(&c.Intent, c.Outcome, nil))
	if err != nil && NameOf(err) == "" {
		err = v.e.journalFailed(err)
	}
	return c, err
}
