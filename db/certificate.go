package db

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"
)

// States of a certificate.
const (
	StatusValid     = "valid"
	StatusRevoked   = "revoked"
	StatusHeld      = "held"
	StatusExpired   = "expired"
	StatusPending   = "pending"   // an intent without outcome
	StatusAbandoned = "abandoned" // never issued; its serial reads revoked
)

// Certificate is everything the record holds about a serial. Intent.TBS is not filled in.
type Certificate struct {
	Intent     Intent
	Outcome    *Outcome    // the highest version; nil: pending
	Revocation *Revocation // the latest event; nil: none
	Round      RoundState  // as of the same reading
}

// Status returns the certificate's state at a time. Revoked outranks expired.
func (c *Certificate) Status(at time.Time) string {
	switch {
	case c.Outcome == nil:
		return StatusPending
	case c.Outcome.Kind == OutcomeAbandoned:
		return StatusAbandoned
	case c.Revocation != nil && c.Revocation.Event == EventHold:
		return StatusHeld
	case c.Revocation.Revoked():
		return StatusRevoked
	case at.After(c.Outcome.NotAfter):
		return StatusExpired
	}
	return StatusValid
}

// certificateQuery joins a serial's intent with its highest outcome and latest revocation event.
var certificateQuery = "SELECT " + issuedColumns + ", " + prefixed("r", revocationColumns) + ", " + roundColumns + ` FROM intent i
	LEFT JOIN outcome o ON o.issuer = i.issuer AND o.serial = i.serial
		AND o.ver = (SELECT MAX(x.ver) FROM outcome x WHERE x.issuer = i.issuer AND x.serial = i.serial)
	LEFT JOIN revocation r ON r.issuer = i.issuer AND r.serial = i.serial
		AND r.n = (SELECT MAX(y.n) FROM revocation y WHERE y.issuer = i.issuer AND y.serial = i.serial)
	WHERE `

func (s *Store) certificates(ctx context.Context, op, except, where string, args ...any) ([]Certificate, string, error) {
	var out []Certificate
	node, err := s.Read(ctx, op, except, func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var rev nullRevocation
			var round RoundState
			row, err := scanIssued(r, append(rev.dest(), &round.N, &round.Ended)...)
			if err != nil {
				return err
			}
			out = append(out, Certificate{Intent: *row.Intent, Outcome: row.Outcome, Revocation: rev.revocation(), Round: round})
			return nil
		}, certificateQuery+where, args...)
	})
	return out, node, err
}

// Certificate returns what is known of a serial, causally read; nil when there is no such intent.
func (s *Store) Certificate(ctx context.Context, issuer string, serial []byte) (*Certificate, error) {
	c, _, err := s.CertificateElsewhere(ctx, "", issuer, serial)
	return c, err
}

// CertificateElsewhere is Certificate on a node other than except (see Read); it returns the node.
func (s *Store) CertificateElsewhere(ctx context.Context, except, issuer string, serial []byte) (*Certificate, string, error) {
	found, node, err := s.certificates(ctx, "certificate", except, "i.issuer = ? AND i.serial = ?", issuer, serial)
	if err != nil || len(found) == 0 {
		return nil, node, err
	}
	return &found[0], node, nil
}

// CertificatesBySerial returns what every issuer knows of a serial; more than one element means that the bare serial is ambiguous.
func (s *Store) CertificatesBySerial(ctx context.Context, serial []byte) ([]Certificate, error) {
	// The issuers make the primary key usable.
	found, _, err := s.certificates(ctx, "certificates by serial", "", "i.issuer IN (SELECT issuer FROM generation) AND i.serial = ?", serial)
	return found, err
}

// Filter selects certificates. Empty fields do not restrict.
type Filter struct {
	Requester string // principal URI
	Issuer    string
	Status    string // one of the Status constants
	After     string // cursor: Next of the page before
	Limit     int    // 100 if 0, at most 1000
}

// Page is one page of a list; Next is the cursor of the following page, "" after the last.
type Page struct {
	Certificates []Certificate
	Next         string
}

// ErrCursor says that Filter.After is not a cursor of this list.
var ErrCursor = errors.New("malformed cursor")

// ListCertificates returns certificates by issuer and serial, causally read. Rows inserted between two pages may or may not appear.
func (s *Store) ListCertificates(ctx context.Context, f Filter) (Page, error) {
	limit := f.Limit
	if limit <= 0 {
		limit = 100
	}
	limit = min(limit, 1000)
	conds, args := []string{"TRUE"}, []any{}
	add := func(cond string, a ...any) { conds, args = append(conds, cond), append(args, a...) }
	if f.Requester != "" {
		add("i.requester = ?", f.Requester)
	}
	if f.Issuer != "" {
		add("i.issuer = ?", f.Issuer)
	}
	if f.After != "" {
		issuer, hexSerial, ok := strings.Cut(f.After, ":")
		var serial []byte
		if _, err := fmt.Sscanf(hexSerial, "%x", &serial); !ok || err != nil {
			return Page{}, ErrCursor
		}
		add("(i.issuer > ? OR (i.issuer = ? AND i.serial > ?))", issuer, issuer, serial)
	}
	now := seconds(s.cfg.Now())
	const notRevoked = "(r.event IS NULL OR r.event = 'release')"
	switch f.Status {
	case "":
	case StatusPending:
		add("o.kind IS NULL")
	case StatusAbandoned:
		add("o.kind = 'abandoned'")
	case StatusHeld:
		add("o.kind = 'cert' AND r.event = 'hold'")
	case StatusRevoked:
		add("o.kind = 'cert' AND r.event IN ('revoke', 'reason-change')")
	case StatusExpired:
		add("o.kind = 'cert' AND "+notRevoked+" AND o.not_after < ?", now)
	case StatusValid:
		add("o.kind = 'cert' AND "+notRevoked+" AND o.not_after >= ?", now)
	default:
		return Page{}, fmt.Errorf("listing certificates: unknown status %q", f.Status)
	}
	found, _, err := s.certificates(ctx, "list certificates", "", strings.Join(conds, " AND ")+" ORDER BY i.issuer, i.serial LIMIT ?", append(args, limit+1)...)
	if err != nil {
		return Page{}, err
	}
	p := Page{Certificates: found}
	if len(found) > limit {
		p.Certificates = found[:limit]
		last := found[limit-1].Intent
		p.Next = fmt.Sprintf("%s:%x", last.Issuer, last.Serial)
	}
	return p, nil
}
