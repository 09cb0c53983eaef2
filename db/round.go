package db

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
)

// RoundState says where the recovery rounds stand: while N has not ended nothing that was read may be released.
type RoundState struct {
	N     uint64 // newest round; 0: none yet
	Ended uint64 // newest round that has ended
}

// Open reports whether no round is under way.
func (r RoundState) Open() bool { return r.N == r.Ended }

// roundColumns are two constants of a statement, read in its own view: MAX of a primary key costs nothing.
const roundColumns = "(SELECT COALESCE(MAX(n), 0) FROM round), (SELECT COALESCE(MAX(n), 0) FROM round_end)"

// Round is a recovery round: a moment at which the database is suspected, or known, to have gone back.
type Round struct {
	N       uint64
	Node    string // the witness
	Cause   string
	Proved  bool // rows are known to be lost
	Created time.Time
}

// Events of a node in a round.
const (
	ReconBegun   = "begun"   // by an incarnation of the node
	ReconDone    = "done"    // by the same: the record holds everything the node has journalled
	ReconCovered = "covered" // by another: it holds the node's copies, or waiting for the node was given up
)

// Recon is an event of a node in a round; the one with the highest N is what holds.
type Recon struct {
	Round       uint64
	Node        string
	N           uint32 // from 1
	Event       string
	Incarnation []byte // 16 octets; empty when covered
	Witness     string // who wrote the row
	Detail      []byte // JSON
	Created     time.Time
}

// RoundEnd says that everything lost is back, as far as anybody knows.
type RoundEnd struct {
	N       uint64
	Node    string
	Detail  []byte // JSON
	Created time.Time
}

const (
	roundTableColumns = "n, node, cause, proved, created"
	reconColumns      = "round, node, n, event, incarnation, witness, detail, created"
	roundEndColumns   = "n, node, detail, created"
)

var (
	roundTable    = &table{name: "round", columns: strings.Split(roundTableColumns, ", "), key: 1}
	reconTable    = &table{name: "recon", columns: strings.Split(reconColumns, ", "), key: 3}
	roundEndTable = &table{name: "round_end", columns: strings.Split(roundEndColumns, ", "), key: 1}
)

// RoundState reads it causally.
func (s *Store) RoundState(ctx context.Context) (RoundState, error) {
	var r RoundState
	_, err := s.Read(ctx, "round state", "", func(ctx context.Context, c *sql.Conn) (err error) {
		r, err = ReadRoundState(ctx, c)
		return err
	})
	return r, err
}

// ReadRoundState reads it as q sees it.
func ReadRoundState(ctx context.Context, q Querier) (r RoundState, err error) {
	err = q.QueryRowContext(ctx, "SELECT "+roundColumns).Scan(&r.N, &r.Ended)
	return r, err
}

// BeginRound commits a round. Duplicate: that number is another witness's.
func (s *Store) BeginRound(ctx context.Context, r Round) error {
	if r.Created.IsZero() {
		r.Created = s.cfg.Now()
	}
	if len(r.Cause) > 255 {
		r.Cause = r.Cause[:255]
	}
	return s.insertOne(ctx, roundTable, []any{r.N, r.Node, r.Cause, r.Proved, micros(r.Created)})
}

// EndRound commits the end of a round. Duplicate: another node ended it.
func (s *Store) EndRound(ctx context.Context, r RoundEnd) error {
	if r.Created.IsZero() {
		r.Created = s.cfg.Now()
	}
	return s.insertOne(ctx, roundEndTable, []any{r.N, r.Node, notNull(r.Detail), micros(r.Created)})
}

// AppendRecon commits the next event of a node in a round. Duplicate: somebody took N; read again.
func (s *Store) AppendRecon(ctx context.Context, r Recon) error {
	if r.Created.IsZero() {
		r.Created = s.cfg.Now()
	}
	return s.insertOne(ctx, reconTable, []any{r.Round, r.Node, r.N, r.Event, notNull(r.Incarnation), r.Witness, notNull(r.Detail), micros(r.Created)})
}

// RoundReport is all that the record says of a round.
type RoundReport struct {
	Round
	Recons []Recon   // by node and number
	End    *RoundEnd // nil: under way
}

// Round returns the round with number n, causally read; nil if there is none.
func (s *Store) Round(ctx context.Context, n uint64) (*RoundReport, error) {
	var out *RoundReport
	_, err := s.Read(ctx, "round", "", func(ctx context.Context, c *sql.Conn) error {
		return Snapshot(ctx, c, func(tx *sql.Tx) error {
			r := &RoundReport{}
			out = nil
			err := tx.QueryRowContext(ctx, "SELECT "+roundTableColumns+" FROM round WHERE n = ?", n).Scan(&r.N, &r.Node, &r.Cause, &r.Proved, &r.Created)
			if errors.Is(err, sql.ErrNoRows) {
				return nil
			} else if err != nil {
				return err
			}
			err = query(ctx, tx, func(rows *sql.Rows) error {
				var e Recon
				err := rows.Scan(&e.Round, &e.Node, &e.N, &e.Event, &e.Incarnation, &e.Witness, &e.Detail, &e.Created)
				r.Recons = append(r.Recons, e)
				return err
			}, "SELECT "+reconColumns+" FROM recon WHERE round = ? ORDER BY node, n", n)
			if err != nil {
				return err
			}
			err = query(ctx, tx, func(rows *sql.Rows) error {
				r.End = &RoundEnd{}
				return rows.Scan(&r.End.N, &r.End.Node, &r.End.Detail, &r.End.Created)
			}, "SELECT "+roundEndColumns+" FROM round_end WHERE n = ?", n)
			if err == nil {
				out = r
			}
			return err
		})
	})
	return out, err
}

// LaneTip is where a lane ends in the record.
type LaneTip struct {
	Seq    uint64 // of its last row; 0: none
	Closed bool
}

// LaneTips returns where the lanes end, causally read. A lane that the record does not know ends at 0.
func (s *Store) LaneTips(ctx context.Context, lanes []string) (map[string]LaneTip, error) {
	var out map[string]LaneTip
	_, err := s.Read(ctx, "lane tips", "", func(ctx context.Context, c *sql.Conn) error {
		out = make(map[string]LaneTip, len(lanes))
		for _, lane := range lanes {
			var tip LaneTip
			var kind FeedKind
			err := c.QueryRowContext(ctx, "SELECT seq, kind FROM feed WHERE lane = ? ORDER BY seq DESC LIMIT 1", lane).Scan(&tip.Seq, &kind)
			if err != nil && !errors.Is(err, sql.ErrNoRows) {
				return err
			}
			tip.Closed = kind == FeedClosed
			out[lane] = tip
		}
		return nil
	})
	return out, err
}

// OpenLanes returns the lanes that have not been closed, causally read.
func (s *Store) OpenLanes(ctx context.Context) ([]LaneInfo, error) {
	var out []LaneInfo
	_, err := s.Read(ctx, "open lanes", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var l LaneInfo
			var inc []byte
			err := r.Scan(&l.Lane, &l.Node, &l.Role, &inc)
			copy(l.Incarnation[:], inc)
			out = append(out, l)
			return err
		}, `SELECT l.lane, w.node, w.role, l.incarnation FROM lane l JOIN writer w USING (incarnation) WHERE
			COALESCE((SELECT f.kind FROM feed f WHERE f.lane = l.lane ORDER BY f.seq DESC LIMIT 1), 0) <> ? ORDER BY l.lane`, uint8(FeedClosed))
	})
	return out, err
}

// CloseLane ends a lane, known or not, and reports whether it was this call that did. by is recorded.
func (s *Store) CloseLane(ctx context.Context, lane, by string) (bool, error) {
	return s.closeLane(ctx, lane, by)
}

// LaneName is how the lane of an incarnation is called.
func LaneName(node string, incarnation [16]byte, index int) string {
	return fmt.Sprintf("%s/%s/%d", node, hex.EncodeToString(incarnation[:]), index)
}

// WriterNodes returns the names of all nodes that ever wrote in a role, causally read.
func (s *Store) WriterNodes(ctx context.Context, role string) ([]string, error) {
	var out []string
	_, err := s.Read(ctx, "writer nodes", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var name string
			err := r.Scan(&name)
			out = append(out, name)
			return err
		}, "SELECT DISTINCT node FROM writer WHERE role = ? ORDER BY node", role)
	})
	return out, err
}

// Writer is an incarnation that opened lanes.
type Writer struct {
	Incarnation [16]byte
	Node        string
	Role        string
	Started     time.Time
}

// Writers returns the incarnations of a node, oldest first, causally read.
func (s *Store) Writers(ctx context.Context, node string) ([]Writer, error) {
	var out []Writer
	_, err := s.Read(ctx, "writers", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var w Writer
			var inc []byte
			err := r.Scan(&inc, &w.Node, &w.Role, &w.Started)
			copy(w.Incarnation[:], inc)
			out = append(out, w)
			return err
		}, "SELECT incarnation, node, role, started FROM writer WHERE node = ? ORDER BY started", node)
	})
	return out, err
}

// IntentsAfter returns up to limit intents, newest first, that node made after a time for requests, causally read; with the TBSCertificate of each that
// was not abandoned long ago.
func (s *Store) IntentsAfter(ctx context.Context, node string, after time.Time, limit int) ([]Intent, error) {
	place, err := s.tbsPlace(ctx)
	if err != nil {
		return nil, err
	}
	columns, join := place.intents()
	var out []Intent
	_, err = s.Read(ctx, "intents after", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var i Intent
			var der []byte
			err := r.Scan(append(i.dest(), &der)...)
			if inside := TBSOf(der); inside != nil {
				i.TBS = inside
			}
			i.TBS = notEmpty(i.TBS)
			out = append(out, i)
			return err
		}, "SELECT "+columns+`, o.der FROM (
			SELECT issuer, serial FROM intent FORCE INDEX (created) WHERE created > ? AND node = ? AND req IS NOT NULL ORDER BY created DESC LIMIT ?
			) n JOIN intent i ON i.issuer = n.issuer AND i.serial = n.serial`+join+`
			LEFT JOIN outcome o ON o.issuer = i.issuer AND o.serial = i.serial AND o.ver = 1 ORDER BY i.created DESC`, micros(after), node, limit)
	})
	return out, err
}

// CertificateKey names a serial.
type CertificateKey struct {
	Issuer string
	Serial []byte
}

func whereSerials(alias string, keys []CertificateKey) (string, []any) {
	one := "(" + alias + ".issuer = ? AND " + alias + ".serial = ?)"
	var args []any
	for _, k := range keys {
		args = append(args, k.Issuer, k.Serial)
	}
	return strings.TrimSuffix(strings.Repeat(one+" OR ", len(keys)), " OR "), args
}

// CertificatesByKey returns what is known of the serials, causally read. Those without an intent are left out.
func (s *Store) CertificatesByKey(ctx context.Context, keys []CertificateKey) ([]Certificate, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	where, args := whereSerials("i", keys)
	found, _, err := s.certificates(ctx, "certificates by key", "", where, args...)
	return found, err
}

// RevocationsOf returns every event of the serials, causally read.
func (s *Store) RevocationsOf(ctx context.Context, keys []CertificateKey) ([]Revocation, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	where, args := whereSerials("r", keys)
	var out []Revocation
	_, err := s.Read(ctx, "revocations of", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var n nullRevocation
			if err := r.Scan(n.dest()...); err != nil {
				return err
			}
			out = append(out, *n.revocation())
			return nil
		}, "SELECT "+prefixed("r", revocationColumns)+" FROM revocation r WHERE "+where+" ORDER BY r.issuer, r.serial, r.n", args...)
	})
	return out, err
}
