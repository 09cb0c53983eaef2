package ca

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"trivet/db"
	"trivet/journal"
)

// Kinds of outcome rows.
const (
	outcomeCert      = db.OutcomeCert
	outcomeAbandoned = db.OutcomeAbandoned
)

// maxAttempts is how often a job goes round again because rows of it were committed and yet not there when read back.
const maxAttempts = 3

// runBatch takes jobs through steps 1 to 8 of the protocol. Every job it is given is finished, handed to its own adoption, or queued
// again; what fails for one job leaves its neighbours alone, and only what fails for all (journal, database) fails all. The callers'
// deadlines do not count here: what was begun is carried on while the batch's own time lasts.
func (e *Engine) runBatch(jobs []*job) {
	ctx, cancel := context.WithTimeout(context.Background(), e.cfg.BatchTimeout)
	defer cancel()
	e.metrics.batch.Observe(float64(len(jobs)))
	at := time.Now()
	for _, j := range jobs {
		if !j.submitted.IsZero() {
			e.metrics.stage("queue", j.submitted)
		}
	}

	jobs, voids := e.intend(ctx, jobs)
	at = e.metrics.stage("intent", at)
	jobs = e.sign(ctx, jobs, voids)
	at = e.metrics.stage("sign", at)
	jobs, node := e.conclude(ctx, jobs)
	at = e.metrics.stage("outcome", at)
	e.release(ctx, jobs, node)
	e.metrics.stage("release", at)
}

// fail finishes every job with the same error.
func (e *Engine) fail(jobs []*job, err error) {
	for _, j := range jobs {
		e.finish(j, nil, err)
	}
}

func (e *Engine) journalFailed(err error) error {
	return JournalError(err, "this node cannot record what it does: repeat the request with the same Idempotency-Key")
}

// journal makes payloads durable in one fsync. Its error is what clients are told; the process ends on it, unless the disk is full.
func (e *Engine) journal(payloads ...any) error {
	records := make([]journal.Record, len(payloads))
	for i, p := range payloads {
		record, err := journal.New(p)
		if err != nil {
			return e.journalFailed(err)
		}
		records[i] = record
	}
	if err := e.log.Append(records...); err != nil {
		return e.journalFailed(err)
	}
	return nil
}

// intend is steps 1 and 2: the intents of fresh jobs go to the journal, then to the database. It returns the jobs whose rows the database
// holds now, and the journal records that void the others. A job whose request key is another row's goes to adopt that row.
func (e *Engine) intend(ctx context.Context, jobs []*job) (intended []*job, voids []any) {
	records := make([]any, len(jobs))
	fresh := make([]*job, 0, len(jobs))
	rows := make([]db.Intent, 0, len(jobs))
	for i, j := range jobs {
		row := j.intent
		if !j.adopted {
			row = e.seal(row)
		}
		intent := journalIntent(&row)
		intent.Takeover = j.adopted
		records[i] = *intent
		if j.adopted && j.attempts == 0 {
			intended = append(intended, j)
		} else {
			fresh = append(fresh, j)
			rows = append(rows, row)
		}
	}
	if err := e.journal(records...); err != nil {
		e.fail(jobs, err)
		return nil, nil
	}
	if len(fresh) == 0 {
		return intended, nil
	}
	found, node, err := e.record.InsertIntents(ctx, rows)
	if class := db.ClassOf(err); err != nil && (class == db.Fatal || class == db.None) && len(fresh) > 1 {
		// One row that the database will not take, such as one whose serial is taken, must not fail its neighbours.
		for _, j := range fresh {
			one, v := e.intend(ctx, []*job{j})
			intended, voids = append(intended, one...), append(voids, v...)
		}
		return intended, voids
	}
	if err != nil {
		if class := db.ClassOf(err); class == db.Fatal || class == db.None {
			e.cfg.Log.Error("an intent cannot be recorded", "issuer", fresh[0].intent.Issuer, "serial", fresh[0].serial(), "err", err)
		}
		e.fail(fresh, databaseError("recording what is about to be signed", err))
		return intended, nil
	}
	for i, j := range fresh {
		row := found[i]
		if row.Blocked {
			voids = append(voids, journal.Void{Issuer: j.intent.Issuer, Serial: j.serial(), Why: "the key is blocked"})
			e.finish(j, nil, keyBlocked())
			continue
		}
		if string(row.Serial) == string(j.intent.Serial) && row.Issuer == j.intent.Issuer {
			intended = append(intended, j)
			continue
		}
		voids = append(voids, journal.Void{Issuer: j.intent.Issuer, Serial: j.serial(), Why: "the request key has a row"})
		e.tasks.Go(func() { e.adopt(j, row, node) })
	}
	return intended, voids
}

// sign is step 4: the digests go to the journal, then to each issuer's key. It returns the jobs that have a certificate whose signature verifies.
func (e *Engine) sign(ctx context.Context, jobs []*job, records []any) []*job {
	groups := make(map[KeyName][]*job, 1)
	for _, j := range jobs {
		s, _, err := schemeOf(j.issuer.key)
		if err != nil {
			e.finish(j, nil, asError(err))
			continue
		}
		if !j.passed(j.intent.TBS) {
			e.cfg.Log.Error("a certificate was about to be signed that is not the one that was checked", "issuer", j.intent.Issuer, "serial", j.serial())
			e.finish(j, nil, unavailable(OutcomeUnknown, errUnchecked, "the request could not be finished: repeat it with the same Idempotency-Key"))
			continue
		}
		j.digest = s.digest(j.intent.TBS)
		records = append(records, journal.Sign{Issuer: j.intent.Issuer, Serial: j.serial(), Digest: j.digest})
		groups[j.issuer.keyID] = append(groups[j.issuer.keyID], j)
	}
	if len(records) == 0 {
		return nil
	}
	if err := e.journal(records...); err != nil {
		for _, group := range groups {
			e.fail(group, err)
		}
		return nil
	}
	var (
		mu     sync.Mutex
		wg     sync.WaitGroup
		signed []*job
	)
	for keyID, group := range groups {
		wg.Go(func() {
			ok := e.signGroup(ctx, keyID, group)
			mu.Lock()
			defer mu.Unlock()
			signed = append(signed, ok...)
		})
	}
	wg.Wait()
	return signed
}

func (e *Engine) signGroup(ctx context.Context, keyID KeyName, jobs []*job) []*job {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.SignTimeout)
	defer cancel()
	digests := make([][]byte, len(jobs))
	for i, j := range jobs {
		digests[i] = j.digest
	}
	signatures, err := e.signBatch(ctx, keyID, digests)
	if err != nil {
		e.cfg.Log.Error("signing failed", "key", keyID, "certificates", len(jobs), "err", err)
		e.fail(jobs, unavailable(HSMUnavailable, err, "no HSM could sign: repeat the request with the same Idempotency-Key"))
		return nil
	}
	ok := jobs[:0]
	for i, j := range jobs {
		if err := j.certify(signatures[i]); err != nil {
			e.metrics.bad.Inc()
			e.cfg.Log.Error("a signature was thrown away", "key", keyID, "issuer", j.issuer.name, "serial", j.serial(), "err", err)
			e.finish(j, nil, unavailable(HSMUnavailable, err, "an HSM returned a wrong signature: repeat the request with the same Idempotency-Key"))
			continue
		}
		ok = append(ok, j)
	}
	return ok
}

// signBatch returns by the deadline even if the signer does not: a signature that comes later is dropped unseen.
func (e *Engine) signBatch(ctx context.Context, keyID KeyName, digests [][]byte) ([][]byte, error) {
	key, err := e.cfg.Keys.Key(ctx, keyID)
	if err != nil {
		return nil, fmt.Errorf("finding key %s: %w", keyID, err)
	}
	type answer struct {
		signatures [][]byte
		err        error
	}
	answers := make(chan answer, 1)
	go func() {
		signatures, err := key.SignBatch(ctx, digests)
		if err == nil && len(signatures) != len(digests) {
			err = fmt.Errorf("%d signatures for %d digests", len(signatures), len(digests))
		}
		answers <- answer{signatures, err}
	}()
	select {
	case a := <-answers:
		return a.signatures, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("signing with key %s: %w", keyID, ctx.Err())
	}
}

// certify assembles the certificate and checks it whole (I7, I8).
func (j *job) certify(signature []byte) error {
	s, _, err := schemeOf(j.issuer.key)
	if err != nil {
		return err
	}
	der, err := s.assemble(j.intent.TBS, signature)
	if err != nil {
		return fmt.Errorf("assembling the certificate: %w", err)
	}
	cert, err := verifyIssued(der, j.intent.TBS, j.issuer.key)
	if err != nil {
		return err
	}
	j.der, j.notAfter = der, cert.NotAfter.UTC()
	return nil
}

// conclude is step 5: outcome and feed rows in one transaction. It returns the jobs whose keys have an outcome now, ours or another's, and the
// database node that committed.
func (e *Engine) conclude(ctx context.Context, jobs []*job) ([]*job, string) {
	if len(jobs) == 0 {
		return nil, ""
	}
	now := e.cfg.Now().UTC()
	facts := make([]db.Fact, len(jobs))
	for i, j := range jobs {
		facts[i] = db.Fact{Outcome: &db.Outcome{
			Issuer: j.intent.Issuer, Serial: j.intent.Serial, Ver: 1, Kind: outcomeCert, DER: j.der, NotAfter: j.notAfter, Created: now,
		}}
	}
	appended, err := e.lane.Append(ctx, facts)
	if db.ClassOf(err) == db.Fatal {
		// The lane is closed or another process writes it: this incarnation can record nothing more.
		e.die(fmt.Errorf("ca: appending to the change feed: %w", err))
	}
	if err != nil {
		e.fail(jobs, databaseError("recording the certificate", err))
		return nil, ""
	}
	concluded := jobs[:0]
	var node string
	for i, j := range jobs {
		// A duplicate means that somebody else finished it: the row is released, whoever's it is. Anything else is that the intent is not
		// there although it was committed.
		if err := appended[i].Err; err != nil && db.ClassOf(err) != db.Duplicate {
			e.again(j, err)
			continue
		}
		concluded = append(concluded, j)
		node = cmp.Or(appended[i].Node, node)
	}
	return concluded, node
}

// release is steps 6 to 8: what another database node says about each request key is journalled and released. Only bytes of the outcome row leave here.
func (e *Engine) release(ctx context.Context, jobs []*job, except string) {
	if len(jobs) == 0 {
		return
	}
	at := e.cfg.Rounds.now()
	rows, err := e.readBack(ctx, jobs, except)
	if err != nil {
		e.fail(jobs, databaseError("reading the certificate back", err))
		return
	}
	ready := make([]*job, 0, len(jobs))
	answers := make([]func(), 0, len(jobs))
	records := make([]*journal.Done, 0, len(jobs))
	for i, j := range jobs {
		row := rows[i]
		if row.Intent == nil || row.Outcome == nil {
			e.again(j, errVanished)
			continue
		}
		// That a request was abandoned is told like a certificate: in no round, and on record.
		issued, err := e.judge(j, row)
		if err != nil && NameOf(err) != RequestAbandoned {
			e.finish(j, nil, err)
			continue
		}
		ready, answers = append(ready, j), append(answers, func() { e.finish(j, issued, err) })
		records = append(records, doneOf(row.Intent, row.Outcome, j.tbs(row.Intent)))
		at.state = row.Round // of one statement, so the same for all
	}
	if len(ready) == 0 {
		return
	}
	if err := e.cfg.Rounds.done(ctx, e.log, at, records...); err != nil {
		if NameOf(err) == "" {
			err = e.journalFailed(err)
		}
		e.fail(ready, err)
		return
	}
	for _, answer := range answers {
		answer()
	}
}

// tbs is the TBSCertificate of an intent of the job's request; nil if it is not known here: recovery gave the request another serial.
func (j *job) tbs(intent *db.Intent) []byte {
	if string(intent.Serial) == string(j.intent.Serial) {
		return j.intent.TBS
	}
	return nil
}

// readBack asks a database node other than except for intent and outcome of every job, by request key; either may be nil.
func (e *Engine) readBack(ctx context.Context, jobs []*job, except string) ([]db.Issued, error) {
	reqs := make([][]byte, len(jobs))
	for i, j := range jobs {
		reqs[i] = j.req[:]
	}
	rows, _, err := e.record.ReadBack(ctx, except, reqs)
	if err != nil {
		return nil, err
	}
	if len(rows) != len(jobs) {
		return nil, fmt.Errorf("%d rows for %d request keys", len(rows), len(jobs))
	}
	return rows, nil
}

// judge turns the row of a job into what may be released: a certificate, or the error that tells of an abandonment.
func (e *Engine) judge(j *job, row db.Issued) (*Issued, error) {
	if string(row.Intent.Body) != string(j.body[:]) {
		return nil, mismatch()
	}
	if row.Outcome.Kind == outcomeAbandoned {
		return nil, abandoned(row.Intent.Serial)
	}
	if string(row.Outcome.DER) != string(j.der) {
		// Made by another node.
		if _, err := verifyIssued(row.Outcome.DER, j.tbs(row.Intent), j.issuer.key); err != nil {
			e.cfg.Log.Error("the record holds a certificate that does not verify: it is not released", "issuer", row.Intent.Issuer,
				"serial", hex.EncodeToString(row.Intent.Serial), "err", err)
			return nil, unavailable(DatabaseUnavailable, err, "the certificate on record does not verify: the operators must look at it")
		}
	}
	return &Issued{
		Issuer: row.Intent.Issuer, Serial: row.Intent.Serial, DER: row.Outcome.DER, Replayed: j.adopted,
		Profile: row.Intent.Profile, ProfileVersion: int(row.Intent.ProfileVersion), Requester: row.Intent.Requester, Reference: row.Intent.Reference,
		Lane: row.Outcome.Lane, Seq: row.Outcome.Seq,
	}, nil
}

var errVanished = errors.New("the row is not there when read back")

// again sends a job back to step 2 because rows that were committed are not there: the database lost them.
func (e *Engine) again(j *job, err error) {
	e.metrics.lost.Inc()
	j.attempts++
	e.cfg.Log.Error("rows that were committed are not there", "issuer", j.intent.Issuer, "serial", j.serial(), "attempt", j.attempts, "err", err)
	if j.attempts >= maxAttempts {
		e.finish(j, nil, unavailable(OutcomeUnknown, err, "the database does not keep what it is given: repeat the request with the same Idempotency-Key"))
		return
	}
	e.tasks.Go(func() { e.submit(context.Background(), j) })
}
