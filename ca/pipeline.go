package ca

import (
	"context"
	"crypto"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"runtime/debug"
	"time"

	"trivet/ca/weakkey"
	"trivet/db"
)

// job is one certificate on its way through the pipeline. Its maker fills it in and a batch works on it; finish ends it, once.
type job struct {
	req, body [32]byte              // request key, and hash of what it asks for
	issuer    issuer                // who signs
	recheck   func(db.Intent) error // whether policy permits what a stored row of it would sign
	intent    db.Intent             // the row to insert; once adopted, the row found
	adopted   bool                  // intent was in the database already
	attempts  int                   // times that rows of it were not there when read back
	checked   [32]byte              // SHA-256 of the TBSCertificate that passed every check: no other is signed
	digest    []byte                // of the TBSCertificate; set by the batch under way
	der       []byte                // the certificate as signed by it: a proposal until the row says the same
	submitted time.Time             // when it was handed to the collector
	notAfter  time.Time             // of that certificate

	done   chan struct{} // closed by finish
	issued *Issued       // valid once done is closed
	err    error         // the same
}

// issuer is who signs a job.
type issuer struct {
	name  string
	keyID KeyName
	key   crypto.PublicKey
}

// serial is the job's serial as journals and certificate ids write it.
func (j *job) serial() string { return hex.EncodeToString(j.intent.Serial) }

// Issue checks a request against its profile and issues the certificate, or returns the one that an earlier request with the same
// Idempotency-Key got. The certificate is durable when it returns. A nil error is final; after an error with RetryAfter, a repeat with the
// same key gets whatever became of this one. Every other error is an *Error too.
func (e *Engine) Issue(ctx context.Context, r Request) (*Issued, error) {
	began := time.Now()
	issued, err := e.issue(ctx, &r)
	e.metrics.request(began, issued, err)
	return issued, err
}

func (e *Engine) issue(ctx context.Context, r *Request) (*Issued, error) {
	if err := e.admit(); err != nil {
		return nil, err
	}
	leave, err := e.enter(ctx, r.Principal)
	if err != nil {
		return nil, err
	}
	defer leave()
	at := time.Now()
	if err := r.check(); err != nil {
		return nil, err
	}
	p, ok := e.cfg.Profiles.Get(r.Profile)
	if !ok {
		return nil, refuse(MalformedRequest, "profile", "no profile %.64q is known", r.Profile)
	}
	c, err := parseCSR(r.CSR)
	if err != nil {
		return nil, err
	}
	now := e.cfg.Now()
	a, err := e.choose(p, r.CA, now)
	if err != nil {
		return nil, err
	}
	v, err := p.permitRequest(r, c, e.cfg.WeakKeys)
	if err != nil {
		return nil, err
	}
	if e.isOwnKey(c.RawSubjectPublicKeyInfo) {
		return nil, refuse(KeyNotPermitted, "csr.public_key", "the key is a CA's own: make one for this certificate")
	}
	at = e.metrics.stage("check", at)
	req, body := requestKey(r.Principal, r.IdempotencyKey), bodyHash(r, c.Raw)
	hash := p.Hash()
	j := &job{
		req: req, body: body,
		intent: db.Intent{
			Issuer: a.Issuer, Req: req[:], Ver: 1, Body: body[:],
			Profile: p.Name, ProfileVersion: uint32(p.Version), ProfileHash: hash[:],
			Requester: r.Principal, Reference: r.Reference,
			SiteEpoch: e.cfg.Epoch, Node: e.cfg.Node, Created: now.UTC(),
		},
		issuer:  issuer{a.Issuer, a.Key(), a.Certificate.PublicKey},
		recheck: e.recheck,
	}
	return e.run(ctx, j, func() error {
		if v.notBefore, v.notAfter, err = p.validity(a, now, r.NotAfter); err != nil {
			return err
		}
		if v.serial, err = newSerial(now, e.cfg.Rand); err != nil {
			return err
		}
		der, tbs, err := e.draft(p, a, v)
		if err != nil {
			return err
		}
		j.intent.Serial, j.intent.TBS, j.intent.Key = v.serial, tbs, keyHash(c.RawSubjectPublicKeyInfo)
		if err := e.linter.check(der, p.Lint, now); err != nil {
			return err
		}
		j.pass(tbs)
		e.metrics.stage("build", at)
		return nil
	})
}

// draft builds an end-entity certificate that nobody signed, and its TBSCertificate.
func (e *Engine) draft(p *Profile, a *Authority, v values) (der, tbs []byte, err error) {
	t, err := p.template(a, e.cfg.BaseURL, v)
	if err != nil {
		return nil, nil, err
	}
	der, tbs, err = draft(t, parentOf(a), v.key)
	if err != nil {
		return nil, nil, err
	}
	return der, tbs, v.agree(der, t, parentOf(a))
}

// permitRequest turns everything that CSR and request ask for into permitted values; serial and validity are still to be set.
func (p *Profile) permitRequest(r *Request, c *csr, known *weakkey.List) (values, error) {
	var v values
	kind, err := p.checkKey(c.PublicKey, known)
	if err != nil {
		return v, err
	}
	if err := p.checkSubject(c); err != nil {
		return v, err
	}
	if err := p.checkExtensions(c, kind); err != nil {
		return v, err
	}
	beside, err := r.asks()
	if err != nil {
		return v, err
	}
	chosen, field, err := p.chooseNames(c.asked, beside)
	if err != nil {
		return v, err
	}
	permitted, err := p.permit(chosen, field)
	if err != nil {
		return v, err
	}
	// Last, because it costs most.
	if err := c.CheckSignature(); err != nil {
		return v, refuse(BadCSRSignature, "csr", "the CSR's signature does not verify with its own key: %v", err)
	}
	return values{names: permitted, key: c.PublicKey, kind: kind}, nil
}

// choose finds the generation that issues. Without a CA named it is the profile's only one, or the only active subordinate CA there is.
func (e *Engine) choose(p *Profile, ca string, now time.Time) (*Authority, error) {
	snapshot := e.Authorities()
	if ca == "" {
		if len(p.CAs) == 1 {
			ca = p.CAs[0]
		} else {
			for _, a := range snapshot.all {
				if a.Parent == a.Issuer || !p.mayUse(a.CA) || a.Active(now) != nil || a.CA == ca {
					continue
				}
				if ca != "" {
					return nil, refuse(MalformedRequest, "ca", "several CAs may issue under profile %s: name one", p.Name)
				}
				ca = a.CA
			}
		}
		if ca == "" {
			return nil, unavailable(CANotActive, nil, "no CA that may issue under profile %s is active", p.Name)
		}
	}
	if !p.mayUse(ca) {
		return nil, refuse(MalformedRequest, "ca", "CA %.32q may not issue under profile %s", ca, p.Name)
	}
	if !snapshot.known(ca) {
		return nil, refuse(MalformedRequest, "ca", "no CA %.32q is known", ca)
	}
	a, err := snapshot.Issuing(ca, now)
	if err != nil {
		return nil, &Error{Name: CANotActive, Field: "ca", Detail: err.Error()}
	}
	if a.Parent == a.Issuer && len(p.CAs) == 0 {
		return nil, refuse(MalformedRequest, "ca", "CA %s is a root: it issues end-entity certificates only under profiles that name it", ca)
	}
	return a, nil
}

func (e *Engine) isOwnKey(spki []byte) bool {
	for _, a := range e.Authorities().all {
		if string(a.SPKI) == string(spki) {
			return true
		}
	}
	return false
}

// IssueDraft issues a certificate whose contents the caller has built, through the same pipeline and with the same promises as Issue.
func (e *Engine) IssueDraft(ctx context.Context, d Draft) (*Issued, error) {
	began := time.Now()
	issued, err := e.issueDraft(ctx, &d)
	e.metrics.request(began, issued, err)
	return issued, err
}

func (e *Engine) issueDraft(ctx context.Context, d *Draft) (*Issued, error) {
	if err := e.admit(); err != nil {
		return nil, err
	}
	if _, taken := e.cfg.Profiles.Get(d.Profile); taken || d.Profile == "" {
		return nil, fmt.Errorf("ca: drafts need a profile name of their own, not %q", d.Profile)
	}
	by, from, err := e.draftIssuer(d)
	if err != nil {
		return nil, err
	}
	now := e.cfg.Now()
	j := &job{
		req: d.Req, body: d.Body,
		intent: db.Intent{
			Issuer: d.Issuer, Req: d.Req[:], Ver: 1, Body: d.Body[:],
			Profile: d.Profile, ProfileVersion: uint32(d.ProfileVersion), ProfileHash: d.ProfileHash[:],
			Requester: d.Requester, Reference: d.Reference,
			SiteEpoch: e.cfg.Epoch, Node: e.cfg.Node, Created: now.UTC(),
		},
		issuer: from,
	}
	j.recheck = func(row db.Intent) error { return e.recheckDraft(d, by, row) }
	return e.run(ctx, j, func() error {
		serial, err := newSerial(now, e.cfg.Rand)
		if err != nil {
			return err
		}
		der, tbs, err := e.buildDraft(d, by, serial, d.Template.NotBefore, d.Template.NotAfter)
		if err != nil {
			return err
		}
		key, err := spkiOf(tbs)
		if err != nil {
			return err
		}
		j.intent.Serial, j.intent.TBS, j.intent.Key = serial, tbs, keyHash(key)
		if err := e.linter.check(der, Lint{Policy: "private"}, now); err != nil {
			return err
		}
		j.pass(tbs)
		return nil
	})
}

// draftIssuer finds who signs a draft: a known generation, or for a new root the draft itself.
func (e *Engine) draftIssuer(d *Draft) (parent, issuer, error) {
	if d.SelfKey != (KeyName{}) {
		subject := d.Template.RawSubject
		if len(subject) == 0 {
			var err error
			if subject, err = asn1.Marshal(d.Template.Subject.ToRDNSequence()); err != nil {
				return parent{}, issuer{}, fmt.Errorf("encoding the subject of %s: %w", d.Issuer, err)
			}
		}
		keyID, err := subjectKeyID(d.PublicKey)
		if err != nil {
			return parent{}, issuer{}, err
		}
		return parent{subject, keyID, d.PublicKey}, issuer{d.Issuer, d.SelfKey, d.PublicKey}, nil
	}
	a, ok := e.Authorities().Issuer(d.Issuer)
	if !ok || a.Certificate == nil {
		return parent{}, issuer{}, refuse(CANotActive, "issuer", "%s is not known here or has no certificate yet", d.Issuer)
	}
	if end := a.Certificate.NotAfter; d.Template.NotAfter.After(end) {
		return parent{}, issuer{}, refuse(ValidityNotPermitted, "not_after", "%s is after the end of %s at %s", d.Template.NotAfter.UTC().Format(time.RFC3339),
			a.Issuer, end.UTC().Format(time.RFC3339))
	}
	return parentOf(a), issuer{a.Issuer, a.Key(), a.Certificate.PublicKey}, nil
}

// buildDraft makes a caller's draft into a certificate that nobody signed.
func (e *Engine) buildDraft(d *Draft, by parent, serial []byte, notBefore, notAfter time.Time) (der, tbs []byte, err error) {
	t := *d.Template
	t.SerialNumber = new(big.Int).SetBytes(serial)
	t.NotBefore, t.NotAfter = notBefore, notAfter
	if len(t.SubjectKeyId) == 0 {
		if t.SubjectKeyId, err = subjectKeyID(d.PublicKey); err != nil {
			return nil, nil, err
		}
	}
	return draft(&t, by, d.PublicKey)
}

// admit refuses everything while the engine is halted or not running.
func (e *Engine) admit() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.halted != "" {
		return &Error{Name: Halted, Detail: "issuing is halted: " + e.halted, RetryAfter: retryLater}
	}
	if e.unready != nil {
		return unavailable(Halted, nil, "this node is %v", e.unready)
	}
	if err := e.clockError(); err != nil {
		return err
	}
	return e.cfg.Rounds.err()
}

// run takes a job through the pipeline, or joins the one that is under way under the same request key. build fills in serial and TBS; it
// runs in the caller's goroutine, because it is where the processor's time goes.
func (e *Engine) run(ctx context.Context, j *job, build func() error) (*Issued, error) {
	if first := e.join(j); first != j {
		if first.body != j.body {
			return nil, mismatch()
		}
		issued, err := e.wait(ctx, first)
		if err != nil && ctx.Err() != nil {
			return nil, unavailable(RequestInProgress, err, "an earlier request with this Idempotency-Key is still being worked on: repeat this one in a moment")
		}
		if err != nil {
			return nil, err
		}
		again := *issued
		again.Replayed = true
		return &again, nil
	}
	if err := e.guard(j, build); err != nil {
		e.finish(j, nil, asError(err))
	} else {
		e.submit(ctx, j)
	}
	return e.wait(ctx, j)
}

// guard runs build and makes an error of its panic: whatever a parser stumbles on, the request key must not stay taken.
func (e *Engine) guard(j *job, build func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("building a certificate: panic: %v", r)
			e.cfg.Log.Error("building a certificate panicked", "issuer", j.issuer.name, "profile", j.intent.Profile, "panic", r, "stack", string(debug.Stack()))
		}
	}()
	return build()
}

func mismatch() error {
	return refuse(IdempotencyMismatch, "Idempotency-Key", "this Idempotency-Key was used for another request: repeats must be identical, and new requests need a new key")
}

// asError makes an *Error of anything else: what is not foreseen is reported as a failure that may pass.
func asError(err error) error {
	if NameOf(err) != "" {
		return err
	}
	return unavailable(OutcomeUnknown, err, "the request could not be finished: repeat it with the same Idempotency-Key")
}

// join registers a job under its request key and returns it, or the one already registered there.
func (e *Engine) join(j *job) *job {
	j.done = make(chan struct{})
	e.mu.Lock()
	defer e.mu.Unlock()
	if first, ok := e.inflight[j.req]; ok {
		return first
	}
	e.inflight[j.req] = j
	return j
}

// submit hands a job to the collector. If the caller's time is up before a batch has room, nothing was begun.
func (e *Engine) submit(ctx context.Context, j *job) {
	j.submitted = time.Now()
	select {
	case e.queue <- j:
	case <-ctx.Done():
		e.finish(j, nil, unavailable(OutcomeUnknown, ctx.Err(), "the node is too busy: repeat the request with the same Idempotency-Key"))
	case <-e.stopped:
		e.finish(j, nil, unavailable(Halted, nil, "this node is %v", errStopped))
	}
}

// wait returns the job's outcome, or at the caller's deadline an error that leaves it open: the job goes on.
func (e *Engine) wait(ctx context.Context, j *job) (*Issued, error) {
	select {
	case <-j.done:
		return j.issued, j.err
	case <-ctx.Done():
		return nil, unavailable(OutcomeUnknown, ctx.Err(), "the certificate was not finished in time: repeat the request with the same Idempotency-Key")
	}
}

// finish ends a job; exactly one of issued and err is set.
func (e *Engine) finish(j *job, issued *Issued, err error) {
	j.issued, j.err = issued, err
	e.mu.Lock()
	delete(e.inflight, j.req)
	e.mu.Unlock()
	close(j.done)
}

// collect gathers jobs into batches until ctx ends, and then waits for the batches under way. On an idle node a batch starts at once, since waiting buys
// nothing. While one is under way jobs gather: a batch costs its transactions and fsyncs whatever its size, so another starts beside it only when
// it is worth them (a quarter full) or when its first job has waited for Collect. When the last one has ended, whoever it answered comes back in a moment
// with the next request: those who waited wait for them up to Linger, and go together, instead of in two batches of half the size that take turns.
// Both waits grow with what a batch takes: where it takes long, company is worth more and comes later.
func (e *Engine) collect(ctx context.Context) {
	type end struct {
		size int
		took time.Duration
	}
	ended := make(chan end)
	running := 0
	var pace time.Duration // what a batch takes, of late
	defer func() {
		for ; running > 0; running-- {
			<-ended
		}
	}()
	var batch []*job
	start := func() {
		running++
		jobs := batch
		batch = nil
		go func() {
			size, began := len(jobs), time.Now()
			e.runBatch(jobs)
			ended <- end{size, time.Since(began)}
		}()
	}
	timer := time.NewTimer(e.cfg.Collect)
	defer timer.Stop()
	waited := false // batch has waited for as long as it should
	company := 0    // with this many a batch need not linger
	for {
		batch = e.queued(batch)
		full := waited || len(batch) >= (e.cfg.MaxBatch+3)/4
		if len(batch) > 0 && (running == 0 && len(batch) >= company || full && running < e.cfg.InFlight) {
			start()
			waited, company = false, 0
			continue
		}
		more := e.queue
		if len(batch) == e.cfg.MaxBatch {
			more = nil
		}
		select {
		case j := <-more:
			if batch = append(batch, j); len(batch) == 1 {
				timer.Reset(max(e.cfg.Collect, min(pace, longestCollect)))
			}
		case last := <-ended:
			pace += (last.took - pace) / 8
			if running--; running == 0 && len(batch) > 0 && !waited {
				company = len(batch) + last.size*7/8
				timer.Reset(max(e.cfg.Linger, min(pace/3, longestLinger)))
			}
		case <-timer.C:
			waited = len(batch) > 0
			company = 0
		case <-ctx.Done():
			if len(batch) > 0 {
				start()
			}
			return
		}
	}
}

// What waiting for company grows to on a node whose batches take long.
const (
	longestCollect = 150 * time.Millisecond
	longestLinger  = 30 * time.Millisecond
)

// queued adds what waits in the queue to a batch, up to its largest size.
func (e *Engine) queued(batch []*job) []*job {
	for len(batch) > 0 && len(batch) < e.cfg.MaxBatch {
		select {
		case j := <-e.queue:
			batch = append(batch, j)
		default:
			return batch
		}
	}
	return batch
}

// Why an engine admits nothing although it is not halted.
var (
	errStarting = errors.New("starting")
	errStopped  = errors.New("stopping")
)
