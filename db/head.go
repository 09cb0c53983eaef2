package db

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
)

// LaneMark tells one set of lanes from another.
type LaneMark struct {
	Count uint64
	Sum   uint64 // of checksums of their names
}

// FeedHead is what a follower of the feed asks for again and again.
type FeedHead struct {
	Member *Member // newest row of the follower's name, without policy and address; nil: there is none
	Round  RoundState
	Lanes  LaneMark // of every lane there ever was
	Rows   []FeedRow
}

// ReadFeedHead reads, in one round trip, the newest membership row of va, the state of the rounds, which lanes there are, and the rows that
// FeedSince returns, in this order: what any of it misses was committed after the call.
func ReadFeedHead(ctx context.Context, q Querier, va string, vector map[string]uint64, limit int) (FeedHead, error) {
	var head FeedHead
	texts := []string{"SELECT m.n, m.event, m.incarnation, " + roundColumns + `, l.lanes, l.sum
		FROM (SELECT COUNT(*) AS lanes, COALESCE(SUM(CRC32(lane)), 0) AS sum FROM lane) l LEFT JOIN va_member m ON m.va = ? ORDER BY m.n DESC LIMIT 1`}
	args := []any{va}
	for _, s := range feedStatements(vector, limit) {
		texts, args = append(texts, s.text), append(args, s.args...)
	}
	rows, err := q.QueryContext(ctx, strings.Join(texts, ";\n"), args...)
	if err != nil {
		return head, fmt.Errorf("reading the head of the feed: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var n sql.Null[uint32]
		var event sql.NullString
		m := Member{VA: va}
		if err := rows.Scan(&n, &event, &m.Incarnation, &head.Round.N, &head.Round.Ended, &head.Lanes.Count, &head.Lanes.Sum); err != nil {
			return head, fmt.Errorf("reading the head of the feed: %w", err)
		}
		if m.N, m.Event = n.V, event.String; n.Valid {
			head.Member = &m
		}
	}
	for range len(texts) - 1 {
		if !rows.NextResultSet() {
			return head, fmt.Errorf("reading the feed: %w", cmp.Or(rows.Err(), errors.New("the answers are not complete")))
		}
		for rows.Next() {
			row, err := scanFeed(rows)
			if err != nil {
				return head, fmt.Errorf("reading the feed: %w", err)
			}
			head.Rows = append(head.Rows, row)
		}
	}
	if err := rows.Err(); err != nil {
		return head, fmt.Errorf("reading the head of the feed: %w", err)
	}
	sortFeed(head.Rows)
	return head, nil
}
