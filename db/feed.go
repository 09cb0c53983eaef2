package db

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// FeedKind says which fact a feed row tells of. A reader that does not know a kind with FeedCritical set must stop;
// others it may pass over.
type FeedKind uint8

// The kinds of feed rows.
const (
	FeedCert       FeedKind = 1
	FeedAbandoned  FeedKind = 2
	FeedRevocation FeedKind = 3
	FeedCRL        FeedKind = 4
	FeedGeneration FeedKind = 5
	FeedResponder  FeedKind = 6
	FeedCritical   FeedKind = 0x80
	FeedClosed     FeedKind = FeedCritical | 7 // the lane's last row
)

// FeedRow is one row of a lane. Serial is empty where the fact has none.
type FeedRow struct {
	Lane    string
	Seq     uint64 // from 1, without holes
	Kind    FeedKind
	Issuer  string
	Serial  []byte
	Payload []byte // JSON of FeedPayload
	Chain   [32]byte
}

// FeedPayload is what a reader of the feed learns without reading the fact's own row. Which fields
// are set depends on the kind; times are unix seconds.
type FeedPayload struct {
	NotAfter int64  `json:"not_after,omitempty"` // cert
	Digest   []byte `json:"digest,omitempty"`    // SHA-256 of the fact's DER: cert, crl, generation, responder
	Ver      uint32 `json:"ver,omitempty"`       // cert, abandoned: of the outcome when above 1
	N        uint32 `json:"n,omitempty"`         // place in the chain: revocation, crl, generation, responder
	Event    string `json:"event,omitempty"`     // revocation, generation
	Reason   uint8  `json:"reason,omitempty"`    // revocation: RFC 5280 CRLReason
	Date     int64  `json:"date,omitempty"`      // revocation: revocationDate
	Invalid  int64  `json:"invalid,omitempty"`   // revocation: invalidityDate
	Shard    uint32 `json:"shard,omitempty"`     // crl
	Number   uint64 `json:"number,omitempty"`    // crl: CRLNumber
	Kind     string `json:"kind,omitempty"`      // crl: crl or void
	State    string `json:"state,omitempty"`     // generation
	By       string `json:"by,omitempty"`        // closed: the node that closed the lane
}

// Decode returns the row's payload. Fields that a later version added are passed over.
func (r FeedRow) Decode() (FeedPayload, error) {
	var p FeedPayload
	if err := json.Unmarshal(r.Payload, &p); err != nil {
		return p, fmt.Errorf("decoding feed row %s %d: %w", r.Lane, r.Seq, err)
	}
	return p, nil
}

// ChainHash returns the hash of a row that follows a row with hash prev in its lane (all zero before the first).
// It covers every column but the hash itself.
func ChainHash(prev [32]byte, row FeedRow) [32]byte {
	b := make([]byte, 0, 128+len(row.Payload))
	b = append(b, "trivet-feed-v1"...)
	b = append(b, prev[:]...)
	b = binary.BigEndian.AppendUint64(b, row.Seq)
	b = append(b, byte(row.Kind))
	for _, field := range [][]byte{[]byte(row.Lane), []byte(row.Issuer), row.Serial, row.Payload} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(field)))
		b = append(b, field...)
	}
	return sha256.Sum256(b)
}

// LaneInfo is a lane and its writer.
type LaneInfo struct {
	Lane        string
	Node        string
	Role        string
	Incarnation [16]byte
}

// Lanes returns every lane there ever was, closed ones included, as q sees them.
func Lanes(ctx context.Context, q Querier) ([]LaneInfo, error) {
	var out []LaneInfo
	err := query(ctx, q, func(r *sql.Rows) error {
		var l LaneInfo
		var inc []byte
		if err := r.Scan(&l.Lane, &l.Node, &l.Role, &inc); err != nil {
			return err
		}
		copy(l.Incarnation[:], inc)
		out = append(out, l)
		return nil
	}, "SELECT l.lane, w.node, w.role, l.incarnation FROM lane l JOIN writer w USING (incarnation) ORDER BY l.lane")
	if err != nil {
		return nil, fmt.Errorf("reading lanes: %w", err)
	}
	return out, nil
}

// FeedSince returns up to limit rows of each lane named in vector, from the one after vector[lane] on, ordered by lane
// and seq. A lane that vector does not name is not read: start it at 0, and leave closed
// ones out. The caller checks that seqs are contiguous and that hashes extend the last (see ChainHash).
func FeedSince(ctx context.Context, q Querier, vector map[string]uint64, limit int) ([]FeedRow, error) {
	var out []FeedRow
	for _, s := range feedStatements(vector, limit) {
		err := query(ctx, q, func(r *sql.Rows) error {
			row, err := scanFeed(r)
			out = append(out, row)
			return err
		}, s.text, s.args...)
		if err != nil {
			return nil, fmt.Errorf("reading the feed: %w", err)
		}
	}
	sortFeed(out)
	return out, nil
}

// statement is SQL with its arguments.
type statement struct {
	text string
	args []any
}

// feedStatements are the queries of FeedSince: one for many lanes, but for a hundred at most.
func feedStatements(vector map[string]uint64, limit int) []statement {
	var out []statement
	for part := range slices.Chunk(slices.Sorted(maps.Keys(vector)), 100) {
		var args []any
		for _, lane := range part {
			args = append(args, lane, vector[lane], limit)
		}
		one := "(SELECT " + feedColumns + " FROM feed WHERE lane = ? AND seq > ? ORDER BY seq LIMIT ?)"
		out = append(out, statement{strings.TrimSuffix(strings.Repeat(one+" UNION ALL ", len(part)), " UNION ALL "), args})
	}
	return out
}

// sortFeed orders rows by lane and seq: UNION ALL promises no order.
func sortFeed(rows []FeedRow) {
	slices.SortFunc(rows, func(a, b FeedRow) int {
		if c := strings.Compare(a.Lane, b.Lane); c != 0 {
			return c
		}
		return compareUint(a.Seq, b.Seq)
	})
}

const feedColumns = "lane, seq, kind, issuer, serial, payload, chain"

var feedTable = &table{name: "feed", columns: strings.Split(feedColumns, ", "), key: 2}

func (r FeedRow) row() []any {
	return []any{r.Lane, r.Seq, uint8(r.Kind), r.Issuer, notNull(r.Serial), r.Payload, r.Chain[:]}
}

// notNull keeps an absent serial from becoming NULL.
func notNull(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

func scanFeed(r *sql.Rows) (FeedRow, error) {
	var f FeedRow
	var chain []byte
	if err := r.Scan(&f.Lane, &f.Seq, &f.Kind, &f.Issuer, &f.Serial, &f.Payload, &chain); err != nil {
		return f, err
	}
	copy(f.Chain[:], chain)
	return f, nil
}

func compareUint(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
