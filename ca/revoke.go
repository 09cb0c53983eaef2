package ca

import (
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/db"
	"trivet/identity"
	"trivet/journal"
)

// WrongSite is the name of the error of a node that a later site epoch has fenced off.
const WrongSite = "wrong-site"

const (
	maxComment = 1000        // octets; the column's width
	crlWithin  = time.Minute // a revocation is on the CRL by then
)

// RevokeRequest asks for the revocation of one certificate.
type RevokeRequest struct {
	Issuer         string // generation
	Serial         []byte
	Reason         Reason
	InvalidityDate time.Time // since when the key may have been misused; zero if not known
	Comment        string    // at most 1000 octets; kept with the event, published nowhere
	Actor          identity.Principal
}

// ReleaseRequest asks for the end of a hold.
type ReleaseRequest struct {
	Issuer  string
	Serial  []byte
	Comment string
	Actor   identity.Principal
}

// Revoked is what became of a RevokeRequest or ReleaseRequest: durable, read back and journalled.
type Revoked struct {
	Issuer string
	Serial []byte
	N      uint32 // number of the event in the certificate's chain
	Event  string
	Reason Reason
	Date   time.Time // the first revocation's, or an earlier one
	Reach  Reach     // which responders show it
	CRLBy  time.Time // when it stands on the CRL at the latest
}

// ID returns "{issuer}:{serial in lower-case hex}".
func (r *Revoked) ID() string { return r.Issuer + ":" + hex.EncodeToString(r.Serial) }

// Status is the certificate's status after the event.
func (r *Revoked) Status() string {
	switch r.Event {
	case db.EventHold:
		return db.StatusHeld
	case db.EventRelease:
		return db.StatusValid
	}
	return db.StatusRevoked
}

// RevokerConfig is what a Revoker needs. All but Rounds, Now, Log and Metrics are mandatory.
type RevokerConfig struct {
	Record   RevocationRecord      // *db.Store
	Lane     *db.Lane              // a lane of its own, so that issuing does not hold revocations up
	Journal  *journal.Journal      //
	Profiles *Profiles             // say whether hold is allowed
	Rounds   *Rounds               // as in Config
	Barrier  *Barrier              //
	Epoch    uint64                // site epoch read at start
	Now      func() time.Time      // default time.Now
	Log      *slog.Logger          // default slog.Default
	Metrics  prometheus.Registerer // nil: none

	// Fatal, if set, is called when the lane takes nothing more, ever: the process must end, and begin anew with another.
	Fatal func(error)
}

// RevocationRecord is what a Revoker reads from the database; *db.Store is it. Both read causally, and Read asks a node other than except
// if one is healthy.
type RevocationRecord interface {
	Certificate(ctx context.Context, issuer string, serial []byte) (*db.Certificate, error)
	Read(ctx context.Context, op, except string, body func(context.Context, *sql.Conn) error) (node string, err error)
	TBS(ctx context.Context, issuer string, serial []byte) ([]byte, error)
	blockRecord
}

// Revoker revokes certificates: durable in database and journal first, then effective at the responders (protocols §5). It is safe for
// concurrent use, also by several nodes on the same certificate.
type Revoker struct {
	cfg  RevokerConfig
	lane lane          // cfg.Lane; tests put faults in between
	log  journalWriter // cfg.Journal
	took *prometheus.HistogramVec
}

// NewRevoker returns a Revoker.
func NewRevoker(cfg RevokerConfig) (*Revoker, error) {
	if cfg.Record == nil || cfg.Lane == nil || cfg.Journal == nil || cfg.Profiles == nil || cfg.Barrier == nil {
		return nil, errors.New("ca: a mandatory field of RevokerConfig is missing")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	took := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "trivet_ca_revocation_seconds", Help: "Time to change a certificate's status, by outcome: effective, recorded, or the name of an error.",
		Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 6, 10},
	}, []string{"outcome"})
	if cfg.Metrics != nil {
		if err := cfg.Metrics.Register(took); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return &Revoker{cfg: cfg, lane: cfg.Rounds.lane(cfg.Lane), log: cfg.Journal, took: took}, nil
}

// Revoke revokes a certificate, or puts it on hold. It returns once the event is durable and every responder shows it or can no longer
// answer "good"; Reach says whether that came true before ctx ended. Asking for what is there already waits for the responders all the
// same: that an event exists does not mean that it was ever acknowledged. Every error is an *Error.
func (r *Revoker) Revoke(ctx context.Context, q RevokeRequest) (*Revoked, error) {
	if err := checkComment(q.Comment); err != nil {
		return nil, err
	}
	return r.act(ctx, act{issuer: q.Issuer, serial: q.Serial, actor: q.Actor, asked: "revoke " + q.Reason.String(), next: func(c *db.Certificate) (*db.Revocation, error) {
		if err := r.mayRevoke(c, q); err != nil {
			return nil, err
		}
		return nextRevocation(c.Revocation, q, r.cfg.Now())
	}})
}

// Release ends a hold. It does not wait for the responders: one that is late still says "held".
func (r *Revoker) Release(ctx context.Context, q ReleaseRequest) (*Revoked, error) {
	if err := checkComment(q.Comment); err != nil {
		return nil, err
	}
	return r.act(ctx, act{issuer: q.Issuer, serial: q.Serial, actor: q.Actor, asked: "release", next: func(c *db.Certificate) (*db.Revocation, error) {
		if q.Actor.Role != identity.RoleRA && q.Actor.Role != identity.RoleCAOperator {
			return nil, refuse(Forbidden, "", "releasing from hold is for roles ra and ca-operator")
		}
		if c.Revocation == nil || c.Revocation.Event != db.EventHold {
			return nil, refuse(NotOnHold, "id", "the certificate is not on hold")
		}
		return &db.Revocation{
			N: c.Revocation.N + 1, Event: db.EventRelease, Reason: uint8(ReasonCertificateHold), Date: r.cfg.Now().UTC().Truncate(time.Second), Comment: q.Comment,
		}, nil
	}})
}

func checkComment(s string) error {
	if len(s) > maxComment || !utf8.ValidString(s) || strings.ContainsFunc(s, func(c rune) bool { return unicode.IsControl(c) && c != '\n' && c != '\t' }) {
		return refuse(MalformedRequest, "comment", "want at most %d octets of text without control characters", maxComment)
	}
	return nil
}

// mayRevoke tells whether the actor may give that reason for that certificate. Whether the actor may see it at all was asked before.
func (r *Revoker) mayRevoke(c *db.Certificate, q RevokeRequest) error {
	if q.InvalidityDate.After(r.cfg.Now().Add(time.Minute)) {
		return refuse(MalformedRequest, "invalidity_date", "it is in the future")
	}
	p, known := r.cfg.Profiles.Get(c.Intent.Profile)
	if pinned, same := r.pinned(c); same {
		p, known = pinned, true
	}
	if !known && isInfrastructure(c) {
		return refuse(Forbidden, "id", "certificates of CAs and OCSP responders are revoked by two persons, not through this interface")
	}
	return q.Reason.mayGive(q.Actor.Role, known && p.Revocation.Hold)
}

func (r *Revoker) pinned(c *db.Certificate) (*Profile, bool) {
	if len(c.Intent.ProfileHash) != 32 {
		return nil, false
	}
	return r.cfg.Profiles.Pinned(c.Intent.Profile, int(c.Intent.ProfileVersion), [32]byte(c.Intent.ProfileHash))
}

// isInfrastructure tells whether the certificate is a CA's or a responder's: made from a draft, under no profile of the node's own.
func isInfrastructure(c *db.Certificate) bool {
	switch c.Intent.Profile {
	case profileRootCA, profileSubCA, profileResponder:
		return true
	}
	if c.Outcome == nil || len(c.Outcome.DER) == 0 {
		return false
	}
	cert, err := x509.ParseCertificate(c.Outcome.DER)
	return err != nil || cert.IsCA
}

// nextRevocation returns the event that comes after latest (nil: none yet), or latest itself if it says already what is asked for.
func nextRevocation(latest *db.Revocation, q RevokeRequest, now time.Time) (*db.Revocation, error) {
	next := &db.Revocation{
		N: 1, Event: db.EventRevoke, Reason: uint8(q.Reason), Date: now.UTC().Truncate(time.Second), InvalidityDate: q.InvalidityDate, Comment: q.Comment,
	}
	if q.Reason == ReasonCertificateHold {
		next.Event = db.EventHold
	}
	if latest == nil {
		return next, nil
	}
	next.N = latest.N + 1
	switch {
	case latest.Event == db.EventRelease:
		return next, nil
	case Reason(latest.Reason) == q.Reason:
		return latest, nil
	case latest.Event == db.EventHold:
		next.Date = latest.Date // it has not been good since
		return next, nil
	case q.Reason == ReasonKeyCompromise:
		// The date may move back, never forward (BR 7.2.2).
		next.Event, next.Date = db.EventReasonChange, latest.Date
		if !q.InvalidityDate.IsZero() && q.InvalidityDate.Before(latest.Date) {
			next.Date = q.InvalidityDate.UTC().Truncate(time.Second)
		}
		return next, nil
	}
	return nil, refuse(AlreadyRevoked, "reason", "revoked for %s on %s; the reason can be changed to keyCompromise alone", Reason(latest.Reason), latest.Date.UTC().Format(time.RFC3339))
}

// act is one change of a certificate's status.
type act struct {
	issuer string
	serial []byte
	actor  identity.Principal
	asked  string // for the audit log
	next   func(*db.Certificate) (*db.Revocation, error)
}

func (a act) id() string { return a.issuer + ":" + hex.EncodeToString(a.serial) }

func (r *Revoker) audit(a act, event, outcome, detail string) error {
	record, err := journal.New(journal.Audit{Actor: a.actor.String(), Event: event, Object: a.id(), Outcome: outcome, Detail: detail})
	if err == nil {
		err = r.log.Append(record)
	}
	if err != nil {
		return JournalError(err, "this node cannot record what it does: repeat the request")
	}
	return nil
}

// act takes one change through all steps of protocols §5.
func (r *Revoker) act(ctx context.Context, a act) (*Revoked, error) {
	began := time.Now()
	done, err := r.change(ctx, a)
	outcome := "effective"
	switch {
	case err != nil:
		outcome = NameOf(err)
	case !done.Reach.Effective():
		outcome = "recorded"
	}
	r.took.WithLabelValues(outcome).Observe(time.Since(began).Seconds())
	return done, err
}

func (r *Revoker) change(ctx context.Context, a act) (*Revoked, error) {
	if err := r.cfg.Rounds.err(); err != nil {
		return nil, err
	}
	if err := r.audit(a, "revocation-requested", "begun", a.asked); err != nil {
		return nil, err
	}
	event, err := r.record(ctx, a)
	if err != nil {
		if e := new(Error); errors.As(err, &e) && !e.Retryable() {
			if err := r.audit(a, "revocation-refused", e.Name, e.Detail); err != nil {
				return nil, err
			}
		}
		return nil, err
	}
	if Reason(event.Reason) == ReasonKeyCompromise && event.Event != db.EventRelease {
		// Before anything is acknowledged, and with every repeat: a compromised key is not certified again (BR 6.1.1.3).
		if err := r.block(ctx, a, event); err != nil {
			return nil, err
		}
	}
	done := &Revoked{
		Issuer: event.Issuer, Serial: event.Serial, N: event.N, Event: event.Event, Reason: Reason(event.Reason), Date: event.Date,
		CRLBy: r.cfg.Now().UTC().Truncate(time.Second).Add(crlWithin),
	}
	if event.Event != db.EventRelease {
		done.Reach = r.cfg.Barrier.Wait(ctx, Position{event.Lane, event.Seq})
	}
	level := slog.LevelInfo
	if len(done.Reach.Lapsed) > 0 || !done.Reach.Effective() {
		level = slog.LevelWarn
		if err := r.audit(a, "barrier-lapsed", strings.Join(done.Reach.Lapsed, " "), "pending: "+strings.Join(done.Reach.Pending, " ")); err != nil {
			return nil, err
		}
	}
	r.cfg.Log.Log(ctx, level, "certificate status changed", "id", a.id(), "event", event.Event, "reason", done.Reason.String(), "n", event.N, "actor", a.actor.String(),
		"applied", done.Reach.Applied, "lapsed", done.Reach.Lapsed, "pending", done.Reach.Pending)
	return done, nil
}

// block blocks the key of a certificate that was revoked for keyCompromise.
func (r *Revoker) block(ctx context.Context, a act, event *db.Revocation) error {
	tbs, err := r.cfg.Record.TBS(ctx, a.issuer, a.serial)
	if err != nil {
		return unavailable(OutcomeUnknown, err, "the certificate is revoked, and its key could not be blocked: repeat the request")
	}
	spki, err := spkiOf(tbs)
	if err != nil {
		return unavailable(OutcomeUnknown, err, "the certificate is revoked, and its key cannot be read: the operators must block it")
	}
	stands, err := blockKey(ctx, r.cfg.Record, r.cfg.Log, db.BlockedKey{
		SPKI: keyHash(spki), Reason: BlockKeyCompromise, Comment: "revocation of " + a.id(), Actor: event.Actor, Created: r.cfg.Now().UTC(),
	})
	if err != nil {
		return unavailable(OutcomeUnknown, err, "the certificate is revoked, and its key could not be blocked: repeat the request")
	}
	return r.audit(a, "key-blocked", "recorded", fmt.Sprintf("spki %x, number %d, by %s", stands.SPKI, stands.N, stands.Actor))
}

// record makes the event durable, or finds it there: committed, read back on another database node, journalled.
func (r *Revoker) record(ctx context.Context, a act) (*db.Revocation, error) {
	for range maxAttempts {
		found, err := r.cfg.Record.Certificate(ctx, a.issuer, a.serial)
		switch {
		case err != nil:
			return nil, databaseError("reading the certificate", err)
		case found == nil:
			return nil, refuse(NotFound, "id", "there is no such certificate")
		case found.Outcome != nil && found.Outcome.Kind == outcomeAbandoned:
			return nil, refuse(RequestAbandoned, "id", "the request was abandoned: no certificate has this serial, and it counts as revoked")
		}
		next, err := a.next(found)
		if err != nil {
			return nil, err
		}
		node := ""
		if next != found.Revocation {
			next.Issuer, next.Serial = a.issuer, a.serial
			next.Actor, next.SiteEpoch, next.Created = a.actor.String(), r.cfg.Epoch, r.cfg.Now().UTC()
			appended, err := r.lane.Append(ctx, []db.Fact{{Revocation: next}})
			if err == nil {
				node, err = appended[0].Node, appended[0].Err
			}
			if db.ClassOf(err) == db.Duplicate {
				continue // somebody else's event has the number: decide again, knowing it
			}
			if r.cfg.Fatal != nil && (errors.Is(err, db.ErrLaneClosed) || errors.Is(err, db.ErrLaneOwner)) {
				r.cfg.Fatal(fmt.Errorf("ca: recording a revocation: %w", err))
			}
			if err != nil {
				return nil, databaseError("recording the revocation", err)
			}
		}
		// What was committed counts only once another node shows it: a commit can be lost.
		at := r.cfg.Rounds.now()
		back, err := r.readBack(ctx, node, a, &at.state)
		switch {
		case err != nil && node != "": // it was committed just now: that it is not on record is more than anybody knows
			return nil, unavailable(OutcomeUnknown, err, "the change was committed and could not be read back: repeat the request, or look")
		case err != nil:
			return nil, databaseError("reading the revocation back", err)
		}
		if back == nil || back.N < next.N {
			r.cfg.Log.Error("a revocation that was committed is not there when read back on another node", "id", a.id(), "n", next.N)
			continue
		}
		if back.N > next.N {
			continue // it was overtaken: what the newest event says is what counts
		}
		if err := r.done(ctx, at, back); err != nil {
			return nil, err
		}
		return back, nil
	}
	return nil, &Error{Name: OutcomeUnknown, RetryAfter: retryLater, Detail: "the certificate's status keeps changing, or the database does not keep it: repeat the request"}
}

// readBack returns the serial's newest event as a database node other than except shows it; nil if it shows none.
func (r *Revoker) readBack(ctx context.Context, except string, a act, round *db.RoundState) (*db.Revocation, error) {
	var back *db.Revocation
	_, err := r.cfg.Record.Read(ctx, "read back revocation", except, func(ctx context.Context, c *sql.Conn) error {
		e := db.Revocation{Issuer: a.issuer, Serial: a.serial}
		var invalidity sql.NullTime
		back = nil
		// The round first: a row that was lost before a round must not pass for one that was read in it.
		var err error
		if *round, err = db.ReadRoundState(ctx, c); err != nil {
			return err
		}
		err = c.QueryRowContext(ctx, "SELECT n, event, reason, date, invalidity_date, comment, actor, site_epoch, lane, seq, created FROM revocation WHERE issuer = ? AND serial = ? ORDER BY n DESC LIMIT 1",
			a.issuer, a.serial).Scan(&e.N, &e.Event, &e.Reason, &e.Date, &invalidity, &e.Comment, &e.Actor, &e.SiteEpoch, &e.Lane, &e.Seq, &e.Created)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		e.InvalidityDate, back = invalidity.Time, &e
		return err
	})
	return back, err
}

func (r *Revoker) done(ctx context.Context, at reading, e *db.Revocation) error {
	event := &journal.Revocation{
		N: int(e.N), Event: e.Event, Reason: Reason(e.Reason).String(), Date: e.Date, Actor: e.Actor, Comment: e.Comment, SiteEpoch: e.SiteEpoch, Created: e.Created,
	}
	if !e.InvalidityDate.IsZero() {
		event.InvalidityDate = &e.InvalidityDate
	}
	err := r.cfg.Rounds.done(ctx, r.log, at, &journal.Done{
		Issuer: e.Issuer, Serial: hex.EncodeToString(e.Serial), Ver: 1, Lane: e.Lane, Seq: e.Seq, Kind: journal.DoneRevocation, Event: event, Created: e.Created,
	})
	if name := NameOf(err); name != "" && name != JournalUnavailable {
		return err
	}
	if err != nil {
		// Not journal-unavailable: that says that nothing was done.
		return unavailable(OutcomeUnknown, err, "the change is on record, but this node cannot journal it: repeat the request, or look")
	}
	return nil
}
