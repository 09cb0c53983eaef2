package db

import (
	"context"
	"database/sql"
	"strings"
	"time"
)

// Events of a revocation chain.
const (
	EventRevoke       = "revoke"
	EventHold         = "hold"
	EventRelease      = "release"
	EventReasonChange = "reason-change"
)

// Revocation is one event of a serial; the event with the highest N is what holds. It is appended to a lane (see
// Fact); Duplicate there means that somebody took N: read again and decide anew.
type Revocation struct {
	Issuer         string
	Serial         []byte
	N              uint32 // from 1
	Event          string
	Reason         uint8     // RFC 5280 CRLReason
	Date           time.Time // revocationDate, to the second
	InvalidityDate time.Time // zero: none
	Comment        string
	Actor          string // principal URI
	SiteEpoch      uint64
	Lane           string // set by Append
	Seq            uint64 // set by Append
	Created        time.Time
}

// Revoked reports whether the event leaves the certificate revoked or on hold.
func (r *Revocation) Revoked() bool { return r != nil && r.Event != EventRelease }

const revocationColumns = "issuer, serial, n, event, reason, date, invalidity_date, comment, actor, site_epoch, lane, seq, created"

var revocationTable = &table{name: "revocation", columns: strings.Split(revocationColumns, ", "), key: 3}

func (r *Revocation) row(lane string, seq uint64) []any {
	return []any{r.Issuer, r.Serial, r.N, r.Event, r.Reason, seconds(r.Date), orNull(seconds(r.InvalidityDate)), r.Comment, r.Actor,
		r.SiteEpoch, lane, seq, micros(r.Created)}
}

// nullRevocation scans the outer side of a join.
type nullRevocation struct {
	issuer, event, comment, actor, lane sql.NullString
	serial                              []byte
	n                                   sql.Null[uint32]
	reason                              sql.Null[uint8]
	epoch, seq                          sql.Null[uint64]
	date, invalidity, created           sql.NullTime
}

func (r *nullRevocation) dest() []any {
	return []any{&r.issuer, &r.serial, &r.n, &r.event, &r.reason, &r.date, &r.invalidity, &r.comment, &r.actor, &r.epoch, &r.lane, &r.seq, &r.created}
}

func (r *nullRevocation) revocation() *Revocation {
	if !r.issuer.Valid {
		return nil
	}
	return &Revocation{Issuer: r.issuer.String, Serial: r.serial, N: r.n.V, Event: r.event.String, Reason: r.reason.V, Date: r.date.Time,
		InvalidityDate: r.invalidity.Time, Comment: r.comment.String, Actor: r.actor.String, SiteEpoch: r.epoch.V,
		Lane: r.lane.String, Seq: r.seq.V, Created: r.created.Time}
}

// Revoked is the latest event of a serial and when its certificate ends.
type Revoked struct {
	Revocation
	NotAfter time.Time // zero when there is no certificate: the serial was abandoned, or only a CRL named it
}

// Revocations returns the latest event of every serial of the issuer that has one, releases included, ordered by
// serial, and the number of events behind them, all from one causal view. q may be nil; else it is a
// connection or transaction of the caller's own Read, for a view shared with other queries.
func (s *Store) Revocations(ctx context.Context, q Querier, issuer string) (latest []Revoked, events uint64, err error) {
	if q == nil {
		_, err = s.Read(ctx, "revocations", "", func(ctx context.Context, c *sql.Conn) error {
			latest, events, err = s.Revocations(ctx, c, issuer)
			return err
		})
		return latest, events, err
	}
	err = query(ctx, q, func(r *sql.Rows) error {
		var n nullRevocation
		var notAfter sql.NullTime
		if err := r.Scan(append(n.dest(), &notAfter)...); err != nil {
			return err
		}
		events++
		row := Revoked{Revocation: *n.revocation(), NotAfter: notAfter.Time}
		// Ordered by n within a serial: the last one stands.
		if k := len(latest) - 1; k >= 0 && string(latest[k].Serial) == string(row.Serial) {
			latest[k] = row
		} else {
			latest = append(latest, row)
		}
		return nil
	}, "SELECT "+prefixed("r", revocationColumns)+`, (SELECT MAX(o.not_after) FROM outcome o WHERE o.issuer = r.issuer AND o.serial = r.serial)
		FROM revocation r WHERE r.issuer = ? ORDER BY r.serial, r.n`, issuer)
	return latest, events, err
}

// RevocationCount returns how many events the issuer has, causally read: it differs from a CRL's events exactly when there is
// something new to publish.
func (s *Store) RevocationCount(ctx context.Context, issuer string) (uint64, error) {
	var n uint64
	_, err := s.Read(ctx, "revocation count", "", func(ctx context.Context, c *sql.Conn) error {
		return c.QueryRowContext(ctx, "SELECT COUNT(*) FROM revocation WHERE issuer = ?", issuer).Scan(&n)
	})
	return n, err
}

// LatestRevocation returns the serial's event with the highest N, causally read, nil if there is none.
func (s *Store) LatestRevocation(ctx context.Context, issuer string, serial []byte) (*Revocation, error) {
	var out *Revocation
	_, err := s.Read(ctx, "latest revocation", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var n nullRevocation
			err := r.Scan(n.dest()...)
			out = n.revocation()
			return err
		}, "SELECT "+revocationColumns+" FROM revocation WHERE issuer = ? AND serial = ? ORDER BY n DESC LIMIT 1", issuer, serial)
	})
	return out, err
}
