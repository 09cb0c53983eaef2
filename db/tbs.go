package db

import (
	"context"
	"database/sql"
	"encoding/asn1"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"
)

// The TBSCertificate of an intent is needed until the intent has an outcome; after that the certificate contains it. So it has a table of its
// own, intent_tbs, in partitions by day that are dropped (see KeepTBS), written in the intent's own transaction. Before that table there
// was a column of the intent, which rows of then still use and which is '' in rows since.
//
// A process that does not know the table takes such a row for a forged one, and abandons it. Hence whoever knows the table says so, by
// incarnation, and it is written only while every incarnation that may live has said so.

// tbsPlaceEvery is how often a Store looks where to write TBSCertificates.
const tbsPlaceEvery = 30 * time.Second

var (
	intentTBSTable = &table{name: "intent_tbs", columns: []string{"issuer", "serial", "day", "tbs"}, key: 3}
	tbsReaderTable = &table{name: "intent_tbs_reader", columns: []string{"incarnation"}, key: 1}
)

// tbsRow is the intent's row in intent_tbs.
func (i *Intent) tbsRow() []any {
	return []any{i.Issuer, i.Serial, i.Created.UTC().Format(time.DateOnly), i.TBS}
}

// tbsPlace is where TBSCertificates are, as last looked.
type tbsPlace struct {
	table bool     // there is intent_tbs, and this account may read it: read both
	apart bool     // write it there; else into the intent's row
	old   []string // nodes because of which it is not: they have an incarnation that knows no other place than the row
}

// column returns the expression for the TBSCertificate of the intent i in a query, NULL where it is gone, and the join that it takes.
func (p tbsPlace) column() (expr, join string) {
	if !p.table {
		return "i.tbs", ""
	}
	return "IF(i.tbs = '', t.tbs, i.tbs)", " LEFT JOIN intent_tbs t ON t.issuer = i.issuer AND t.serial = i.serial AND t.day = DATE(i.created)"
}

// intents returns the columns of the intent i in a query, for Intent.dest, and the join that they take.
func (p tbsPlace) intents() (columns, join string) {
	expr, join := p.column()
	return strings.Replace(prefixed("i", intentColumns), "i.tbs", expr, 1), join
}

// tbsPlaces is what a Store knows of it.
type tbsPlaces struct {
	mu    sync.Mutex
	place tbsPlace
	asked time.Time         // zero: never
	own   map[[16]byte]bool // incarnations that opened lanes here: whether they have said that they know the table
}

// TBSColumn is for queries of intents outside of this package: the expression for the TBSCertificate of the intent i, NULL where it is
// gone because it has an outcome, and the join to add behind "intent i".
func (s *Store) TBSColumn(ctx context.Context) (expr, join string, err error) {
	p, err := s.tbsPlace(ctx)
	if err != nil {
		return "", "", err
	}
	expr, join = p.column()
	return expr, join, nil
}

// tbsPlace returns where TBSCertificates are. It fails only while that was never known.
func (s *Store) tbsPlace(ctx context.Context) (tbsPlace, error) {
	t := &s.tbs
	t.mu.Lock()
	defer t.mu.Unlock()
	now := s.cfg.Now()
	if !t.asked.IsZero() {
		if since := now.Sub(t.asked); since >= 0 && since < tbsPlaceEvery {
			return t.place, nil
		}
		// What was known will do for a while: whoever asks has something else to do.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Second)
		defer cancel()
	}
	place, err := s.readTBSPlace(ctx, t.place.table)
	if err != nil && t.asked.IsZero() {
		return place, err
	}
	t.asked = now
	if err == nil {
		t.place = place
	}
	return t.place, nil
}

// readTBSPlace looks into the schema, unless the table is known to be there, says that this process knows it, and looks who does not. The
// caller holds s.tbs.mu.
func (s *Store) readTBSPlace(ctx context.Context, table bool) (tbsPlace, error) {
	p := tbsPlace{table: table}
	if !table {
		tables := 0
		err := s.ReadLocal(ctx, "tbs place", func(ctx context.Context, c *sql.Conn) error {
			// It shows what this account has rights to. The last table of the migration says that there are all.
			return c.QueryRowContext(ctx, `SELECT COUNT(*) FROM information_schema.TABLES
				WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME IN ('intent_tbs', 'intent_tbs_turn')`).Scan(&tables)
		})
		if err != nil || tables < 2 {
			return p, err
		}
		p.table = true
	}
	if err := s.declareTBS(ctx); err != nil {
		return p, err
	}
	err := s.ReadLocal(ctx, "tbs place", func(ctx context.Context, c *sql.Conn) error {
		p.old = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var node string
			err := r.Scan(&node)
			p.old = append(p.old, node)
			return err
		}, `SELECT DISTINCT w.node FROM writer w LEFT JOIN intent_tbs_reader k USING (incarnation) JOIN lane l USING (incarnation)
			WHERE k.incarnation IS NULL AND w.role <> 'ceremony' AND
			COALESCE((SELECT f.kind FROM feed f WHERE f.lane = l.lane ORDER BY f.seq DESC LIMIT 1), 0) <> ? ORDER BY w.node`, uint8(FeedClosed))
	})
	p.apart = len(p.old) == 0
	return p, err
}

// declareTBS says for the incarnations of this process that they know the table. The caller holds s.tbs.mu.
func (s *Store) declareTBS(ctx context.Context) error {
	var rows [][]any
	for inc, said := range s.tbs.own {
		if !said {
			rows = append(rows, []any{inc[:]})
		}
	}
	if len(rows) == 0 {
		return nil
	}
	_, err := s.Write(ctx, "tbs place", func(ctx context.Context, tx *sql.Tx) error {
		_, err := tbsReaderTable.insert(ctx, tx, "INSERT IGNORE", rows)
		return err
	})
	if err == nil {
		for inc := range s.tbs.own {
			s.tbs.own[inc] = true
		}
	}
	return err
}

// ownTBS notes an incarnation of this process: at the next look it says that it knows the table.
func (s *Store) ownTBS(incarnation [16]byte) {
	s.tbs.mu.Lock()
	defer s.tbs.mu.Unlock()
	if s.tbs.own == nil {
		s.tbs.own = map[[16]byte]bool{}
	}
	if !s.tbs.own[incarnation] {
		s.tbs.own[incarnation] = false
		s.tbs.asked = time.Time{}
	}
}

// insertTBS writes the TBSCertificates of intents that this transaction inserted, or, if repeated, an earlier attempt of it.
func insertTBS(ctx context.Context, tx *sql.Tx, intents []*Intent, repeated bool) error {
	if len(intents) == 0 {
		return nil
	}
	rows := make([][]any, len(intents))
	for i, r := range intents {
		rows[i] = r.tbsRow()
	}
	verb := "INSERT"
	if repeated {
		verb = "INSERT IGNORE"
	}
	_, err := intentTBSTable.insert(ctx, tx, verb, rows)
	return err
}

// TBS returns the TBSCertificate of an intent, causally read: the one inside its certificate, or else the stored one. nil: there is no such
// intent, or it was abandoned long ago.
func (s *Store) TBS(ctx context.Context, issuer string, serial []byte) ([]byte, error) {
	expr, join, err := s.TBSColumn(ctx)
	if err != nil {
		return nil, err
	}
	var tbs, der []byte
	_, err = s.Read(ctx, "tbs", "", func(ctx context.Context, c *sql.Conn) error {
		tbs, der = nil, nil
		err := c.QueryRowContext(ctx, "SELECT "+expr+", o.der FROM intent i"+join+` LEFT JOIN outcome o ON o.issuer = i.issuer AND o.serial = i.serial
			WHERE i.issuer = ? AND i.serial = ? ORDER BY o.ver DESC LIMIT 1`, issuer, serial).Scan(&tbs, &der)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		return err
	})
	if inside := TBSOf(der); inside != nil {
		tbs = inside
	}
	return notEmpty(tbs), err
}

// TBSOf returns the TBSCertificate inside a DER certificate, nil if there is none.
func TBSOf(der []byte) []byte {
	var outer, tbs asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &outer); err != nil || len(rest) > 0 || outer.Tag != asn1.TagSequence || !outer.IsCompound {
		return nil
	}
	if _, err := asn1.Unmarshal(outer.Bytes, &tbs); err != nil || tbs.Tag != asn1.TagSequence || !tbs.IsCompound {
		return nil
	}
	return slices.Clip(tbs.FullBytes)
}

// notEmpty makes nil of no octets: a column may hold ” where there is nothing.
func notEmpty(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return b
}
