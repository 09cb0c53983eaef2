package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/db"
	"trivet/journal"
)

// doneCRL is the kind of the journal's done records of CRLs.
const doneCRL = "crl"

// CRL is a complete CRL that is published: in the database, and announced on the change feed.
type CRL struct {
	Issuer     string
	Number     uint64
	ThisUpdate time.Time
	NextUpdate time.Time
	Entries    int
	DER        []byte
}

// CRLConfig is what CRLs needs. Engine and Lane are mandatory.
type CRLConfig struct {
	Engine *Engine  // its store, journal, keys and authorities are used
	Lane   *db.Lane // a lane of the same incarnation; may be shared with a Revoker

	Poll      time.Duration // how often it is looked whether a CRL is due, spread by half; default 700ms
	Debounce  time.Duration // a CRL is replaced no sooner than this after it appeared; default 2s
	VoidAfter time.Duration // a CRL row without result is given up this long after it was first seen here; default 5s
}

// CRLs is the CRL job of one node. Every node runs it for every generation: two that act at once meet at the number of the next row, where
// one loses and reads again. It is safe for concurrent use.
type CRLs struct {
	cfg     CRLConfig
	e       *Engine
	lane    lane
	record  crlRecord
	metrics *prometheus.CounterVec

	mu    sync.Mutex // one CRL at a time on this node; guards what follows
	known map[string]*crlState
}

// crlState is what this node remembers of one generation's CRLs.
type crlState struct {
	highest uint64  // highest number in this node's journal
	newest  *db.CRL // newest signed CRL; its DER is not kept
	n       uint32  // end of the chain when newest was read
	since   time.Time
	open    uint32    // number in the chain of a row without result; 0 if there is none
	opened  time.Time // when that was first seen

	unsigned int       // CRLs in a row that no HSM signed
	rest     time.Time // no other is begun before; the zero time if the last one was signed
}

// crlRest is the longest pause after a CRL that no HSM signed. Each try uses up a number for ever: an outage of hours must not leave a row a second.
const crlRest = 30 * time.Second

// crlRecord is what the CRL job asks of the database; *db.Store is it.
type crlRecord interface {
	Read(ctx context.Context, op, except string, body func(context.Context, *sql.Conn) error) (node string, err error)
	NextCRL(ctx context.Context, q db.Querier, issuer string, shard uint32) (db.CRLTip, error)
	LatestCRL(ctx context.Context, q db.Querier, issuer string, shard uint32) (*db.CRL, *db.CRLResult, error)
	Revocations(ctx context.Context, q db.Querier, issuer string) ([]db.Revoked, uint64, error)
	RevocationCount(ctx context.Context, issuer string) (uint64, error)
	InsertCRL(ctx context.Context, c db.CRL) error
}

// NewCRLs returns the job. It reads the journal for the highest numbers this node has ever used.
func NewCRLs(cfg CRLConfig) (*CRLs, error) {
	if cfg.Engine == nil || cfg.Lane == nil {
		return nil, errors.New("ca: CRLConfig needs Engine and Lane")
	}
	setDefault(&cfg.Poll, 700*time.Millisecond)
	setDefault(&cfg.Debounce, 2*time.Second)
	setDefault(&cfg.VoidAfter, 5*time.Second)
	c := &CRLs{cfg: cfg, e: cfg.Engine, lane: cfg.Engine.cfg.Rounds.lane(cfg.Lane), record: cfg.Engine.cfg.Store, known: map[string]*crlState{}}
	c.metrics = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_ca_crls_total", Help: "CRLs by generation and outcome: signed, failed, lost-entries."},
		[]string{"issuer", "outcome"})
	if registry := c.e.cfg.Metrics; registry != nil {
		if err := registry.Register(c.metrics); err != nil {
			var there prometheus.AlreadyRegisteredError
			if !errors.As(err, &there) {
				return nil, fmt.Errorf("registering metrics: %w", err)
			}
			c.metrics = there.ExistingCollector.(*prometheus.CounterVec) // Establish was run again
		}
	}
	journalled, err := c.e.cfg.Journal.State()
	if err != nil {
		return nil, fmt.Errorf("reading CRL numbers from the journal: %w", err)
	}
	for issuer, number := range journalled.CRLs {
		c.state(issuer).highest = number
	}
	return c, nil
}

// state returns what is remembered of a generation. The caller holds mu, or is alone.
func (c *CRLs) state(issuer string) *crlState {
	s := c.known[issuer]
	if s == nil {
		s = &crlState{}
		c.known[issuer] = s
	}
	return s
}

// Run issues CRLs as they become due until ctx ends; then it returns nil. Failures are logged and tried again.
func (c *CRLs) Run(ctx context.Context) error {
	for {
		for _, a := range c.e.Authorities().All() {
			if !signsCRLs(a, c.e.cfg.Now()) || ctx.Err() != nil {
				continue
			}
			if err := c.step(ctx, a); err != nil && ctx.Err() == nil {
				c.metrics.WithLabelValues(a.Issuer, "failed").Inc()
				c.e.cfg.Log.Warn("CRL not issued, will try again", "issuer", a.Issuer, "err", err)
			}
		}
		timer := time.NewTimer(c.cfg.Poll/2 + rand.N(c.cfg.Poll))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// signsCRLs tells whether CRLs of the generation are this cluster's business: also after it stopped issuing, until its end.
func signsCRLs(a *Authority, now time.Time) bool {
	switch a.State {
	case StateActive, StateSuspended, StateRetired, StateRevoked:
		return a.Certificate != nil && !now.After(a.Certificate.NotAfter)
	}
	return false
}

func (c *CRLs) step(ctx context.Context, a *Authority) error {
	if c.e.cfg.Rounds.err() != nil {
		return nil // a CRL of what the database has now might lack what it lost
	}
	ctx, cancel := context.WithTimeout(ctx, c.e.cfg.BatchTimeout)
	defer cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.state(a.Issuer)
	if time.Now().Before(s.rest) {
		return nil
	}
	due, err := c.due(ctx, a)
	if err != nil || !due {
		return err
	}
	if _, err = c.issue(ctx, a); NameOf(err) == HSMUnavailable {
		s.unsigned++
		s.rest = time.Now().Add(min(c.cfg.Poll<<min(s.unsigned, 10), crlRest))
	} else {
		s.unsigned, s.rest = 0, time.Time{}
	}
	return err
}

// due tells whether a CRL is to be issued now: there is none, there are revocations that it does not cover, or it is old.
func (c *CRLs) due(ctx context.Context, a *Authority) (bool, error) {
	s := c.state(a.Issuer)
	tip, err := c.record.NextCRL(ctx, nil, a.Issuer, 0)
	if err != nil {
		return false, fmt.Errorf("reading the end of the CRL chain: %w", err)
	}
	if tip.Open != nil {
		return c.waited(s, tip), nil // issue gives it up first
	}
	if s.newest == nil || s.n != tip.N {
		if s.newest, _, err = c.record.LatestCRL(ctx, nil, a.Issuer, 0); err != nil {
			return false, fmt.Errorf("reading the newest CRL: %w", err)
		}
		s.n, s.since = tip.N, time.Now()
	}
	if s.newest == nil {
		return true, nil
	}
	if c.e.cfg.Now().Sub(s.newest.ThisUpdate) >= crlEvery {
		return true, nil
	}
	if time.Since(s.since) < c.cfg.Debounce {
		return false, nil
	}
	events, err := c.record.RevocationCount(ctx, a.Issuer)
	if err != nil {
		return false, fmt.Errorf("counting revocations: %w", err)
	}
	return events != s.newest.Events, nil
}

// waited tells whether the open row at the end of the chain has been there long enough to be given up. The row's own time does not count:
// another node's clock wrote it.
func (c *CRLs) waited(s *crlState, tip db.CRLTip) bool {
	if s.open != tip.N {
		s.open, s.opened = tip.N, time.Now()
	}
	return time.Since(s.opened) >= c.cfg.VoidAfter
}

// Issue signs and publishes a CRL of the generation now. Every error is an *Error.
func (c *CRLs) Issue(ctx context.Context, issuer string) (*CRL, error) {
	a, ok := c.e.Authorities().Issuer(issuer)
	if !ok || !signsCRLs(a, c.e.cfg.Now()) {
		return nil, refuse(CANotActive, "ca", "%s signs no CRLs", issuer)
	}
	if err := c.e.cfg.Rounds.err(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.issue(ctx, a)
}

// Why a CRL under way is begun anew.
var (
	errOvertaken = errors.New("another node took the next number")
	errOpen      = errors.New("another node is about to sign a CRL")
)

// issue goes round until a CRL of this node's is published. The caller holds mu.
func (c *CRLs) issue(ctx context.Context, a *Authority) (*CRL, error) {
	if err := c.e.clockError(); err != nil { // a CRL from the future is believed by nobody
		return nil, err
	}
	for {
		crl, err := c.once(ctx, a)
		switch {
		case err == nil:
			c.metrics.WithLabelValues(a.Issuer, "signed").Inc()
			c.e.cfg.Log.Info("CRL issued", "issuer", a.Issuer, "number", crl.Number, "entries", crl.Entries)
			return crl, nil
		case !errors.Is(err, errOvertaken) && !errors.Is(err, errOpen):
			return nil, asError(err)
		}
		timer := time.NewTimer(50*time.Millisecond + rand.N(100*time.Millisecond))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, unavailable(RequestInProgress, err, "another node is signing CRLs of %s: repeat the request", a.Issuer)
		case <-timer.C:
		}
	}
}

// once is one round of protocols §6.
func (c *CRLs) once(ctx context.Context, a *Authority) (*CRL, error) {
	s := c.state(a.Issuer)
	var tip db.CRLTip
	var old *db.CRLResult
	var latest []db.Revoked
	var events uint64
	// Tip, previous CRL and revocations from one moment: the CRL then covers exactly the events it says.
	_, err := c.record.Read(ctx, "crl contents", "", func(ctx context.Context, conn *sql.Conn) error {
		return db.Snapshot(ctx, conn, func(tx *sql.Tx) (err error) {
			if tip, err = c.record.NextCRL(ctx, tx, a.Issuer, 0); err != nil {
				return err
			}
			if _, old, err = c.record.LatestCRL(ctx, tx, a.Issuer, 0); err != nil {
				return err
			}
			latest, events, err = c.record.Revocations(ctx, tx, a.Issuer)
			return err
		})
	})
	if err != nil {
		return nil, databaseError("reading what the CRL says", err)
	}
	if tip.Open != nil {
		if !c.waited(s, tip) {
			return nil, errOpen
		}
		if err := c.void(ctx, a, tip.N, "no result for "+c.cfg.VoidAfter.String()); err != nil {
			return nil, err
		}
		return nil, errOvertaken // its result may have come at the last moment: read again
	}
	var previous *x509.RevocationList
	if old != nil {
		if previous, err = x509.ParseRevocationList(old.DER); err != nil {
			return nil, fmt.Errorf("parsing the previous CRL of %s: %w", a.Issuer, err)
		}
		if previous.Number != nil && previous.Number.IsUint64() {
			tip.Number = max(tip.Number, previous.Number.Uint64())
		}
	}

	now := c.e.cfg.Now().UTC()
	number, err := crlNumber(c.e.cfg.Epoch, now, max(tip.Number, s.highest))
	if err != nil {
		return nil, err
	}
	content, lost := crlContent(latest, previous, now)
	thisUpdate := now.Truncate(time.Second)
	tbs, err := draftCRL(a, number, thisUpdate, content)
	if err != nil {
		return nil, err
	}
	hash := sha256.Sum256(tbs)
	n := tip.N + 1
	if err := c.journal(journal.CRL{Issuer: a.Issuer, N: int(n), Number: number, TBSHash: hash[:]}); err != nil {
		return nil, err
	}
	s.highest = max(s.highest, number)
	err = c.record.InsertCRL(ctx, db.CRL{
		Issuer: a.Issuer, N: n, Number: number, ThisUpdate: thisUpdate, NextUpdate: thisUpdate.Add(crlLifetime), Events: events,
		TBSHash: hash[:], Node: c.e.cfg.Node, SiteEpoch: c.e.cfg.Epoch, Created: now,
	})
	switch {
	case db.ClassOf(err) == db.Duplicate:
		return nil, errOvertaken
	case err != nil:
		return nil, databaseError("recording what is about to be signed", err)
	}
	der, err := c.sign(ctx, a, tbs)
	if err != nil {
		c.e.cfg.Log.Error("signing a CRL failed", "issuer", a.Issuer, "number", number, "err", err)
		// The number is used up. Saying so spares the next issuer the wait.
		if verr := c.void(ctx, a, n, "not signed"); verr != nil {
			c.e.cfg.Log.Warn("CRL number not given up", "issuer", a.Issuer, "number", number, "err", verr)
		}
		return nil, err
	}
	if err := c.publish(ctx, a, n, number, tbs, der); err != nil {
		return nil, err
	}
	c.restore(ctx, a, number, lost)
	return &CRL{Issuer: a.Issuer, Number: number, ThisUpdate: thisUpdate, NextUpdate: thisUpdate.Add(crlLifetime), Entries: len(content), DER: der}, nil
}

func (c *CRLs) journal(payload any) error {
	record, err := journal.New(payload)
	if err == nil {
		err = c.e.log.Append(record)
	}
	if err != nil {
		return JournalError(err, "this node cannot record what it does")
	}
	return nil
}

// sign returns the whole CRL, verified.
func (c *CRLs) sign(ctx context.Context, a *Authority, tbs []byte) ([]byte, error) {
	s, _, err := schemeOf(a.Certificate.PublicKey)
	if err != nil {
		return nil, err
	}
	sctx, cancel := context.WithTimeout(ctx, c.e.cfg.SignTimeout)
	defer cancel()
	signatures, err := c.e.signBatch(sctx, a.Key(), [][]byte{s.digest(tbs)})
	if err != nil {
		return nil, unavailable(HSMUnavailable, err, "no HSM could sign: repeat the request")
	}
	der, err := s.assemble(tbs, signatures[0])
	if err != nil {
		return nil, fmt.Errorf("assembling the CRL: %w", err)
	}
	if _, err := verifyCRL(der, tbs, a); err != nil {
		c.e.metrics.bad.Inc()
		return nil, unavailable(HSMUnavailable, err, "an HSM returned a wrong signature: repeat the request")
	}
	return der, nil
}

// publish appends the result, reads it back on another database node and journals it. A result that somebody else gave the row (void, since
// this node took too long) means that the signature is dropped unseen.
func (c *CRLs) publish(ctx context.Context, a *Authority, n uint32, number uint64, tbs, der []byte) error {
	result := &db.CRLResult{Issuer: a.Issuer, N: n, Kind: db.CRLIssued, DER: der, Number: number}
	appended, err := c.lane.Append(ctx, []db.Fact{{CRL: result}})
	node := ""
	if err == nil {
		node, err = appended[0].Node, appended[0].Err
	}
	switch {
	case db.ClassOf(err) == db.Duplicate:
		return errOvertaken
	case err != nil:
		return databaseError("publishing the CRL", err)
	}
	var back *db.CRLResult
	at := c.e.cfg.Rounds.now()
	if _, err := c.record.Read(ctx, "read back crl", node, func(ctx context.Context, conn *sql.Conn) (err error) {
		if at.state, err = db.ReadRoundState(ctx, conn); err != nil {
			return err
		}
		_, back, err = c.record.LatestCRL(ctx, conn, a.Issuer, 0)
		return err
	}); err != nil {
		return databaseError("reading the CRL back", err)
	}
	if back == nil || back.N < n || back.N == n && !bytes.Equal(back.DER, der) {
		c.e.cfg.Log.Error("a CRL that was committed is not there when read back on another node", "issuer", a.Issuer, "number", number)
		return errOvertaken
	}
	// Without the DER: its digest is in the crl record, and the revocations that it shows are in records of their own.
	hash := sha256.Sum256(tbs)
	err = c.e.cfg.Rounds.done(ctx, c.e.log, at, &journal.Done{
		Issuer: a.Issuer, Ver: int(n), Lane: result.Lane, Seq: result.Seq, Kind: doneCRL, Created: result.Created,
		CRL: &journal.CRL{Issuer: a.Issuer, N: int(n), Number: number, TBSHash: hash[:]},
	})
	if err != nil && NameOf(err) == "" {
		err = unavailable(JournalUnavailable, err, "this node cannot record what it does")
	}
	return err
}

// void gives up the number of a CRL that will not be signed, unless its result has come in the meantime.
func (c *CRLs) void(ctx context.Context, a *Authority, n uint32, why string) error {
	if err := c.journal(journal.Audit{Actor: c.e.cfg.Node, Event: "crl-void", Object: fmt.Sprintf("%s CRL %d", a.Issuer, n), Outcome: "begun", Detail: why}); err != nil {
		return err
	}
	appended, err := c.lane.Append(ctx, []db.Fact{{CRL: &db.CRLResult{Issuer: a.Issuer, N: n, Kind: db.CRLVoid}}})
	if err == nil {
		err = appended[0].Err
	}
	if err != nil && db.ClassOf(err) != db.Duplicate {
		return databaseError("giving up a CRL number", err)
	}
	return nil
}

// restore puts back into the database the revocations that only the previous CRL still knew: refusing to sign would let the CRL expire, and
// leaving them out would undo what was acknowledged. What cannot be put back stays on the CRL, and is reported each time.
func (c *CRLs) restore(ctx context.Context, a *Authority, number uint64, lost []entry) {
	for _, e := range lost {
		c.metrics.WithLabelValues(a.Issuer, "lost-entries").Inc()
		c.e.cfg.Log.Error("the database has lost a revocation that the CRL shows; putting it back", "issuer", a.Issuer, "serial", hex.EncodeToString(e.serial))
		event := &db.Revocation{
			Issuer: a.Issuer, Serial: e.serial, N: 1, Event: db.EventRevoke, Reason: uint8(e.reason), Date: e.date.UTC(), InvalidityDate: e.invalidity,
			Comment: fmt.Sprintf("restored from the CRL before number %d", number), Actor: c.e.cfg.Node, SiteEpoch: c.e.cfg.Epoch,
		}
		if e.reason == ReasonCertificateHold {
			event.Event = db.EventHold
		}
		appended, err := c.lane.Append(ctx, []db.Fact{{Revocation: event}})
		if err == nil {
			err = appended[0].Err
		}
		if err != nil && db.ClassOf(err) != db.Duplicate {
			c.e.cfg.Log.Error("a lost revocation could not be put back; it stays on the CRL", "issuer", a.Issuer, "serial", hex.EncodeToString(e.serial), "err", err)
		}
	}
}
