package db

import (
	"context"
	"database/sql"
	"strings"
	"time"
)

// Kinds of a CRL's result.
const (
	CRLIssued = "crl"
	CRLVoid   = "void" // its issuer crashed; the number is not used
)

// CRL is a CRL about to be signed. Its number rises along the chain of its scope (Issuer, Shard).
type CRL struct {
	Issuer     string
	Shard      uint32
	N          uint32 // from 1
	Number     uint64
	ThisUpdate time.Time // to the second
	NextUpdate time.Time // to the second
	Events     uint64    // revocation events of the issuer that it covers
	TBSHash    []byte    // SHA-256
	Node       string
	SiteEpoch  uint64
	Created    time.Time
}

// CRLResult is what became of it. It is appended to a lane (see Fact).
type CRLResult struct {
	Issuer  string
	Shard   uint32
	N       uint32
	Kind    string // CRLIssued or CRLVoid
	DER     []byte // nil when void
	Number  uint64 // of the CRL, for the feed; not a column
	Lane    string // set by Append
	Seq     uint64 // set by Append
	Created time.Time
}

const (
	crlColumns       = "issuer, shard, n, number, this_update, next_update, events, tbs_hash, node, site_epoch, created"
	crlResultColumns = "issuer, shard, n, kind, der, lane, seq, created"
)

var (
	crlTable       = &table{name: "crl", columns: strings.Split(crlColumns, ", "), key: 3}
	crlResultTable = &table{name: "crl_result", columns: strings.Split(crlResultColumns, ", "), key: 3}
)

func (c *CRLResult) row(lane string, seq uint64) []any {
	return []any{c.Issuer, c.Shard, c.N, c.Kind, c.DER, lane, seq, micros(c.Created)}
}

func (c *CRL) dest() []any {
	return []any{&c.Issuer, &c.Shard, &c.N, &c.Number, &c.ThisUpdate, &c.NextUpdate, &c.Events, &c.TBSHash, &c.Node, &c.SiteEpoch, &c.Created}
}

// InsertCRL commits the intent of a CRL. Duplicate: another issuer of the scope took n or the number first.
func (s *Store) InsertCRL(ctx context.Context, c CRL) error {
	if c.Created.IsZero() {
		c.Created = s.cfg.Now()
	}
	return s.insertOne(ctx, crlTable, []any{c.Issuer, c.Shard, c.N, c.Number, seconds(c.ThisUpdate), seconds(c.NextUpdate), c.Events,
		c.TBSHash, c.Node, c.SiteEpoch, micros(c.Created)})
}

// CRLTip is where a scope's chain ends.
type CRLTip struct {
	N      uint32 // highest; 0: none
	Number uint64 // highest in the chain: the next must be above it
	Open   *CRL   // the last one if it has no result: being signed, or its issuer crashed
}

// NextCRL returns the end of a scope's chain, causally read. q as for Revocations.
func (s *Store) NextCRL(ctx context.Context, q Querier, issuer string, shard uint32) (CRLTip, error) {
	var tip CRLTip
	if q == nil {
		_, err := s.Read(ctx, "next crl", "", func(ctx context.Context, c *sql.Conn) (err error) {
			tip, err = s.NextCRL(ctx, c, issuer, shard)
			return err
		})
		return tip, err
	}
	err := query(ctx, q, func(r *sql.Rows) error {
		var c CRL
		var kind sql.NullString
		if err := r.Scan(append(c.dest(), &kind)...); err != nil {
			return err
		}
		tip = CRLTip{N: c.N, Number: c.Number}
		if !kind.Valid {
			tip.Open = &c
		}
		return nil
	}, "SELECT "+prefixed("c", crlColumns)+`, x.kind FROM crl c LEFT JOIN crl_result x USING (issuer, shard, n)
		WHERE c.issuer = ? AND c.shard = ? ORDER BY c.n DESC LIMIT 1`, issuer, shard)
	if err != nil {
		return tip, err
	}
	// Numbers rise with n, but the guard of the next one must not depend on that.
	err = q.QueryRowContext(ctx, "SELECT COALESCE(MAX(number), 0) FROM crl WHERE issuer = ? AND shard = ?", issuer, shard).Scan(&tip.Number)
	return tip, err
}

// LatestCRL returns the scope's last signed CRL with its DER, causally read; nil, nil if there is none. q as for Revocations.
func (s *Store) LatestCRL(ctx context.Context, q Querier, issuer string, shard uint32) (*CRL, *CRLResult, error) {
	var crl *CRL
	var res *CRLResult
	if q == nil {
		_, err := s.Read(ctx, "latest crl", "", func(ctx context.Context, c *sql.Conn) (err error) {
			crl, res, err = s.LatestCRL(ctx, c, issuer, shard)
			return err
		})
		return crl, res, err
	}
	err := query(ctx, q, func(r *sql.Rows) error {
		crl, res = &CRL{}, &CRLResult{}
		err := r.Scan(append(crl.dest(), &res.Kind, &res.DER, &res.Lane, &res.Seq, &res.Created)...)
		res.Issuer, res.Shard, res.N, res.Number = crl.Issuer, crl.Shard, crl.N, crl.Number
		return err
	}, "SELECT "+prefixed("c", crlColumns)+`, x.kind, x.der, x.lane, x.seq, x.created FROM crl c JOIN crl_result x USING (issuer, shard, n)
		WHERE c.issuer = ? AND c.shard = ? AND x.kind = 'crl' ORDER BY c.n DESC LIMIT 1`, issuer, shard)
	return crl, res, err
}
