package db

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"
)

// table is what insertion needs to know of a table. Column and table names are constants of this package.
type table struct {
	name    string
	columns []string
	key     int // the first key columns are the primary key
}

// insert adds rows in one statement. verb is INSERT or INSERT IGNORE.
func (t *table) insert(ctx context.Context, tx *sql.Tx, verb string, rows [][]any) (int64, error) {
	one := "(" + strings.TrimSuffix(strings.Repeat("?,", len(t.columns)), ",") + ")"
	var q strings.Builder
	q.Grow(len(rows)*(len(one)+1) + 200)
	q.WriteString(verb + " INTO " + t.name + " (" + strings.Join(t.columns, ", ") + ") VALUES ")
	args := make([]any, 0, len(rows)*len(t.columns))
	for i, r := range rows {
		if i > 0 {
			q.WriteByte(',')
		}
		q.WriteString(one)
		args = append(args, r...)
	}
	res, err := tx.ExecContext(ctx, q.String(), args...)
	if err != nil {
		return 0, fmt.Errorf("inserting %d rows into %s: %w", len(rows), t.name, err)
	}
	return res.RowsAffected()
}

// insertAfter is insert into the feed, for rows that follow row seq of a lane: none goes in where that row is not to be seen. Rows are never
// removed, so what this transaction sees was committed before it, and stays before it. A lane thus cannot go on beyond rows that the
// database lost.
func insertAfter(ctx context.Context, tx *sql.Tx, rows [][]any, lane string, seq uint64) error {
	if seq == 0 {
		_, err := feedTable.insert(ctx, tx, "INSERT", rows)
		return err
	}
	one := "SELECT " + strings.TrimSuffix(strings.Repeat("?,", len(feedTable.columns)), ",")
	q := "INSERT INTO feed (" + feedColumns + ") " + one + " FROM feed WHERE lane = ? AND seq = ?" + strings.Repeat(" UNION ALL "+one, len(rows)-1)
	args := make([]any, 0, len(rows)*len(feedTable.columns)+2)
	for i, r := range rows {
		if args = append(args, r...); i == 0 {
			args = append(args, lane, seq)
		}
	}
	res, err := tx.ExecContext(ctx, q, args...)
	if err != nil {
		return fmt.Errorf("inserting %d rows into feed: %w", len(rows), err)
	}
	if n, err := res.RowsAffected(); err != nil || n != int64(len(rows)) {
		return errors.Join(fmt.Errorf("row %d of lane %s: %w", seq, lane, ErrBehind), err)
	}
	return nil
}

// whereKeys returns a condition that matches the given keys; an OR of equalities uses the index,
// an IN of tuples does not.
func (t *table) whereKeys(keys [][]any) (string, []any) {
	one := "(" + strings.Join(t.columns[:t.key], " = ? AND ") + " = ?)"
	var args []any
	for _, k := range keys {
		args = append(args, k...)
	}
	return strings.TrimSuffix(strings.Repeat(one+" OR ", len(keys)), " OR "), args
}

// sameKey compares key columns as the server returned them with values as they were sent.
func sameKey(got []sql.RawBytes, want []any) bool {
	for i, w := range want {
		switch w := w.(type) {
		case []byte:
			if !bytes.Equal(got[i], w) {
				return false
			}
		default:
			if string(got[i]) != fmt.Sprint(w) {
				return false
			}
		}
	}
	return true
}

// insertOne commits one row. When its key is taken by a row equal in every column, that row is ours, from an
// attempt whose answer was lost or from a repetition, and all is well; otherwise the error is Duplicate.
func (s *Store) insertOne(ctx context.Context, t *table, row []any) error {
	op := "insert " + t.name
	_, err := s.Write(ctx, op, func(ctx context.Context, tx *sql.Tx) error {
		_, err := t.insert(ctx, tx, "INSERT", [][]any{row})
		return err
	})
	if ClassOf(err) != Duplicate {
		return err
	}
	equal := 0
	q := "SELECT COUNT(*) FROM " + t.name + " WHERE " + strings.Join(t.columns, " <=> ? AND ") + " <=> ?"
	if _, rerr := s.Read(ctx, op, "", func(ctx context.Context, c *sql.Conn) error {
		return c.QueryRowContext(ctx, q, row...).Scan(&equal)
	}); rerr != nil {
		// Taken by whom is not known: perhaps by ourselves.
		return &Error{Class: Ambiguous, Op: op, Err: errors.Join(err, rerr)}
	}
	if equal == 1 {
		return nil
	}
	return err
}

// Columns hold seconds or microseconds in UTC, and rows are compared with what was sent: cut before sending.
func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }
func micros(t time.Time) time.Time  { return t.UTC().Truncate(time.Microsecond) }

// orNull makes the zero time NULL.
func orNull(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t
}

// query runs a query and scans each row.
func query(ctx context.Context, q Querier, scan func(*sql.Rows) error, text string, args ...any) error {
	rows, err := q.QueryContext(ctx, text, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// marks returns n comma-separated placeholders.
func marks(n int) string { return strings.TrimSuffix(strings.Repeat("?,", n), ",") }
