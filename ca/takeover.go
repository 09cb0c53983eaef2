package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"trivet/db"
	"trivet/journal"
)

// adoptPoll is how often another node's open intent is looked at while it is left to its owner.
const adoptPoll = 25 * time.Millisecond

// clockTolerance is how far the clock of the node that made a stored certificate may run ahead of this one's.
const clockTolerance = 5 * time.Second

// adopt carries on a job whose request key has a row in the database already. A row with an outcome is a replay, and is released like any
// other; one without is its owner's for a short while, and then finished here. node is the database node that showed the row.
func (e *Engine) adopt(j *job, row db.Intent, node string) {
	if !bytes.Equal(row.Body, j.body[:]) {
		e.finish(j, nil, mismatch())
		return
	}
	j.intent, j.adopted = row, true
	ctx, cancel := context.WithTimeout(context.Background(), e.cfg.BatchTimeout)
	defer cancel()

	// An intent of this node has no other owner: its earlier job has ended, since the request key is this job's now.
	wait := e.cfg.OwnerWait
	if row.Node == e.cfg.Node {
		wait = 0
	}
	for until := time.Now().Add(wait); ; {
		rows, err := e.readBack(ctx, []*job{j}, node)
		if err != nil {
			e.finish(j, nil, databaseError("reading the earlier request back", err))
			return
		}
		found := rows[0]
		if found.Intent == nil {
			e.metrics.lost.Inc()
			e.finish(j, nil, unavailable(OutcomeUnknown, errVanished, "the earlier request cannot be found: repeat the request with the same Idempotency-Key"))
			return
		}
		if found.Outcome != nil {
			if found.Intent.Issuer != j.issuer.name && !e.reissuer(j, found.Intent.Issuer) {
				return
			}
			e.release(ctx, []*job{j}, node)
			return
		}
		if time.Until(until) <= 0 {
			break
		}
		select {
		case <-time.After(adoptPoll):
		case <-e.stopped:
			e.finish(j, nil, unavailable(Halted, nil, "this node is %v", errStopped))
			return
		}
	}
	if row.Issuer != j.issuer.name && !e.reissuer(j, row.Issuer) {
		return
	}
	e.takeOver(ctx, j, "takeover")
}

// reissuer points a job at the generation that its row names, which may be an older one than a request made now would get.
func (e *Engine) reissuer(j *job, name string) bool {
	a, ok := e.Authorities().Issuer(name)
	if !ok || a.Certificate == nil {
		e.finish(j, nil, unavailable(CANotActive, nil, "the earlier request was for %s, which this node does not know yet", name))
		return false
	}
	j.issuer = issuer{a.Issuer, a.Key(), a.Certificate.PublicKey}
	return true
}

// takeOver is step 3: the row proves that a CA node wrote it, its key is not blocked, and the stored TBSCertificate passes policy and lint
// again, before anyone signs it; then it goes through the pipeline. What does not pass is abandoned.
func (e *Engine) takeOver(ctx context.Context, j *job, how string) {
	err := e.authentic(j.intent)
	if err == nil {
		err = e.unblocked(ctx, j)
	}
	if err == nil {
		err = j.recheck(j.intent)
	}
	if err == nil {
		j.pass(j.intent.TBS)
	}
	var refused *Error
	switch {
	case err == nil:
		e.metrics.finished.WithLabelValues(how).Inc()
		e.submit(ctx, j)
	case errors.As(err, &refused) && !refused.Retryable():
		e.finish(j, nil, e.abandon(ctx, j.intent, err.Error()))
	default:
		e.finish(j, nil, asError(err))
	}
}

// recheck runs policy and lint on a stored intent. The typed values in its TBSCertificate are read, permitted, and built anew: unless that
// gives the very same bytes, the row asks for something that no profile would have made, and whoever wrote it must not get it signed.
func (e *Engine) recheck(row db.Intent) error {
	a, ok := e.Authorities().Issuer(row.Issuer)
	if !ok {
		return unavailable(CANotActive, nil, "%s is not known here yet", row.Issuer)
	}
	if a.Certificate == nil || a.State == StatePending {
		return unavailable(CANotActive, nil, "%s is not known to be active here yet", row.Issuer)
	}
	now := e.cfg.Now()
	if err := a.Active(now); err != nil {
		return refuse(CANotActive, "", "%v", err)
	}
	p, ok := e.cfg.Profiles.Get(row.Profile)
	if len(row.ProfileHash) == 32 {
		if pinned, same := e.cfg.Profiles.Pinned(row.Profile, int(row.ProfileVersion), [32]byte(row.ProfileHash)); same {
			p, ok = pinned, true
		}
	}
	if !ok {
		return refuse(MalformedRequest, "profile", "profile %s is not known here", row.Profile)
	}
	if !p.mayUse(a.CA) {
		return refuse(MalformedRequest, "ca", "CA %s may not issue under profile %s", a.CA, p.Name)
	}
	der, err := dress(row.TBS, parentOf(a))
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return refuse(LintFailed, "", "the stored TBSCertificate cannot be read: %v", err)
	}
	kind, err := p.checkKey(cert.PublicKey, e.cfg.WeakKeys)
	if err != nil {
		return err
	}
	permitted, err := p.permit(asked{commonName: cert.Subject.CommonName, dns: cert.DNSNames}, "")
	if err != nil {
		return err
	}
	if e.isOwnKey(cert.RawSubjectPublicKeyInfo) {
		return refuse(KeyNotPermitted, "csr.public_key", "the key is a CA's own")
	}
	if err := p.checkValidity(a, cert.NotBefore, cert.NotAfter); err != nil {
		return err
	}
	if cert.NotBefore.Before(a.Certificate.NotBefore) || cert.NotBefore.After(now.Add(clockTolerance)) || !cert.NotAfter.After(now) {
		return refuse(ValidityNotPermitted, "", "the stored validity, %s to %s, does not include the present", cert.NotBefore, cert.NotAfter)
	}
	again, tbs, err := e.draft(p, a, values{serial: row.Serial, names: permitted, key: cert.PublicKey, kind: kind, notBefore: cert.NotBefore, notAfter: cert.NotAfter})
	if err != nil {
		return err
	}
	if len(row.Serial) != serialLength || !bytes.Equal(tbs, row.TBS) {
		return refuse(LintFailed, "", "the stored TBSCertificate is not what profile %s version %d makes of its own values", p.Name, p.Version)
	}
	return e.linter.check(again, p.Lint, now)
}

// recheckDraft is recheck for a certificate whose contents a caller built: the stored row must be that draft, under its own serial and an
// earlier validity of no greater length.
func (e *Engine) recheckDraft(d *Draft, by parent, row db.Intent) error {
	dressed, err := dress(row.TBS, by)
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(dressed)
	if err != nil {
		return refuse(LintFailed, "", "the stored TBSCertificate cannot be read: %v", err)
	}
	t := d.Template
	if cert.NotAfter.After(t.NotAfter) || cert.NotAfter.Sub(cert.NotBefore) > t.NotAfter.Sub(t.NotBefore) || !cert.NotAfter.After(e.cfg.Now()) {
		return refuse(ValidityNotPermitted, "", "the stored validity, %s to %s, is not what is asked for", cert.NotBefore, cert.NotAfter)
	}
	der, tbs, err := e.buildDraft(d, by, row.Serial, cert.NotBefore, cert.NotAfter)
	if err != nil {
		return err
	}
	if len(row.Serial) != serialLength || !bytes.Equal(tbs, row.TBS) {
		return refuse(LintFailed, "", "the stored TBSCertificate is not the one asked for")
	}
	return e.linter.check(der, Lint{Policy: "private"}, e.cfg.Now())
}

// abandon ends an intent that must not be signed: the outcome row takes the key that a certificate would need, so that a signature under
// way elsewhere is never released, and the serial reads as revoked. It returns what the requester is told.
func (e *Engine) abandon(ctx context.Context, row db.Intent, why string) error {
	serial := hex.EncodeToString(row.Serial)
	e.cfg.Log.Warn("abandoning an intent", "issuer", row.Issuer, "serial", serial, "why", why)
	err := e.journal(journal.Audit{Actor: e.cfg.Node, Event: "request-abandoned", Object: row.Issuer + ":" + serial, Outcome: "begun", Detail: why})
	if err != nil {
		return err
	}
	appended, err := e.lane.Append(ctx, []db.Fact{{Outcome: &db.Outcome{
		Issuer: row.Issuer, Serial: row.Serial, Ver: 1, Kind: outcomeAbandoned, Created: e.cfg.Now().UTC(),
	}}})
	if db.ClassOf(err) == db.Fatal {
		e.die(fmt.Errorf("ca: appending to the change feed: %w", err))
	}
	if err == nil && appended[0].Err != nil && db.ClassOf(appended[0].Err) != db.Duplicate {
		err = appended[0].Err
	}
	if err != nil {
		return databaseError("abandoning the request", err)
	}
	at := e.cfg.Rounds.now()
	// Another node than the one that committed: should that one die with it, nobody would know.
	found, _, err := e.record.CertificateElsewhere(ctx, appended[0].Node, row.Issuer, row.Serial)
	if err != nil {
		return databaseError("reading the abandoned request back", err)
	}
	if found == nil || found.Outcome == nil {
		return unavailable(OutcomeUnknown, fmt.Errorf("outcome of %s:%s is not there when read back", row.Issuer, serial), "the request could not be abandoned")
	}
	if found.Outcome.Kind != outcomeAbandoned {
		return unavailable(RequestInProgress, nil, "another node finished the request: repeat it with the same Idempotency-Key")
	}
	e.metrics.finished.WithLabelValues("abandoned").Inc()
	if err := e.cfg.Rounds.done(ctx, e.log, at.in(found.Round), doneOf(&found.Intent, found.Outcome, row.TBS)); err != nil {
		if NameOf(err) == "" {
			err = e.journalFailed(err)
		}
		return err
	}
	return abandoned(row.Serial)
}

// abandoned is what the requester of a certificate that was abandoned is told.
func abandoned(serial []byte) error {
	return refuse(RequestAbandoned, "Idempotency-Key", "this request was abandoned, because it is no longer permitted, and its serial %s counts as revoked: use a new key", hex.EncodeToString(serial))
}
