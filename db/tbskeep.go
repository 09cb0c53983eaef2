package db

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// laterPartition holds what is beyond the days that have a partition of their own.
const laterPartition = "later"

// What a keeper meets when another one, or its own attempt whose answer was lost, was first.
const (
	errPartitionGone  = 1507 // or
	errPartitionGone2 = 1735
	errPartitionThere = 1517 // or
	errPartitionOrder = 1493
)

// TBSKeeping says how KeepTBS keeps the partitions of intent_tbs.
type TBSKeeping struct {
	Node  string        // who does it, for the record
	Keep  time.Duration // a partition stays for this long after its day has ended; at least a day
	Ahead int           // days to come that have a partition; 7 if 0
	Turn  time.Duration // nobody else begins for this long after one has begun; ten minutes if 0
}

// TBSPartition is the TBSCertificates of the intents of one day, and of earlier days whose partitions are gone.
type TBSPartition struct {
	Day   time.Time // zero: those after every other partition's
	Rows  int64     // estimated
	Bytes int64     // estimated
	Open  string    // the oldest intent found without an outcome, "issuer:serial": the partition is not dropped because of it
}

func (p *TBSPartition) name() string {
	if p.Day.IsZero() {
		return laterPartition
	}
	return "p" + p.Day.Format("20060102")
}

// TBSState is how intent_tbs is.
type TBSState struct {
	Table      bool           // it exists
	Old        []string       // nodes because of which it is not written yet: they may run a version that does not know it
	Partitions []TBSPartition // by day; the one without a day last
	Made       int            // partitions that this call made, in the same way
	Dropped    int            // partitions that this call dropped; one that another keeper dropped meanwhile counts too
}

// Ahead returns for how many days after today there is a partition.
func (s *TBSState) Ahead(now time.Time) int {
	today, n := day(now), 0
	for _, p := range s.Partitions {
		if p.Day.After(today) {
			n++
		}
	}
	return n
}

// day cuts a time to its day, in UTC.
func day(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }

// TBSPartitions returns how intent_tbs is; it changes nothing.
func (s *Store) TBSPartitions(ctx context.Context) (TBSState, error) {
	state, _, err := s.tbsState(ctx)
	return state, err
}

// tbsState also returns the time, by whichever clock is behind: this process' or a database node's. One that is ahead alone must not make
// a day look old.
func (s *Store) tbsState(ctx context.Context) (TBSState, time.Time, error) {
	place, err := s.tbsPlace(ctx)
	state := TBSState{Table: place.table, Old: place.old}
	now := s.cfg.Now()
	if err != nil || !place.table {
		return state, now, err
	}
	_, err = s.Read(ctx, "tbs partitions", "", func(ctx context.Context, c *sql.Conn) error {
		var theirs time.Time
		if err := c.QueryRowContext(ctx, "SELECT UTC_TIMESTAMP(6)").Scan(&theirs); err != nil {
			return err
		}
		if theirs.Before(now) {
			now = theirs
		}
		state.Partitions, err = tbsPartitions(ctx, c)
		return err
	})
	return state, now, err
}

func tbsPartitions(ctx context.Context, q Querier) ([]TBSPartition, error) {
	var out []TBSPartition
	err := query(ctx, q, func(r *sql.Rows) error {
		var p TBSPartition
		var bound string
		if err := r.Scan(&bound, &p.Rows, &p.Bytes); err != nil {
			return err
		}
		if bound != "MAXVALUE" {
			end, err := time.Parse(time.DateOnly, strings.Trim(bound, "'"))
			if err != nil {
				return fmt.Errorf("a partition of intent_tbs ends at %s: %w", bound, err)
			}
			p.Day = end.AddDate(0, 0, -1)
		}
		out = append(out, p)
		return nil
	}, `SELECT PARTITION_DESCRIPTION, TABLE_ROWS, DATA_LENGTH FROM information_schema.PARTITIONS
		WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = 'intent_tbs' ORDER BY PARTITION_ORDINAL_POSITION`)
	return out, err
}

// tbsWork is what one turn does, as recorded.
type tbsWork struct {
	Make []string `json:"make,omitempty"` // days
	Drop []string `json:"drop,omitempty"` // days whose partitions are dropped if every intent in them has an outcome
}

// KeepTBS makes partitions of intent_tbs for the days to come, and drops those that ended longer than k.Keep ago and all of whose intents
// have an outcome. One with an open intent stays, however old it is, and the state names that intent. Any process may call it at any time:
// one of them gets a turn, and two that meet all the same do no harm. The account needs the rights of role ca, or may do everything.
//
// Nothing can come into a partition that is being looked at: its days are over, and an intent is written on the day it was created.
func (s *Store) KeepTBS(ctx context.Context, k TBSKeeping) (TBSState, error) {
	if k.Keep < 24*time.Hour {
		return TBSState{}, &Error{Class: Fatal, Op: "keep tbs", Err: fmt.Errorf("keeping partitions for %s: a day is the least", k.Keep)}
	}
	if k.Ahead == 0 {
		k.Ahead = 7
	}
	if k.Turn == 0 {
		k.Turn = 10 * time.Minute
	}
	before, now, err := s.tbsState(ctx)
	if err != nil || !before.Table {
		return before, err
	}
	toMake, toDrop := planTBS(before.Partitions, now, k)
	if len(toMake)+len(toDrop) == 0 {
		return before, nil
	}
	var work tbsWork
	for _, d := range toMake {
		work.Make = append(work.Make, d.Format(time.DateOnly))
	}
	for _, p := range toDrop {
		work.Drop = append(work.Drop, p.Day.Format(time.DateOnly))
	}
	mine, err := s.takeTBSTurn(ctx, k, work)
	if err != nil || !mine {
		return before, err
	}
	if len(toMake) > 0 {
		if err := s.ddl(ctx, "make partitions", func(ctx context.Context, db *sql.DB) error { return makeTBSPartitions(ctx, db, toMake) }); err != nil {
			return before, err
		}
	}
	open := map[time.Time]string{}
	for _, p := range toDrop {
		id, err := s.openInPartition(ctx, p)
		if err != nil {
			return before, err
		}
		if id != "" {
			open[p.Day] = id
			continue
		}
		if err := s.ddl(ctx, "drop partition", func(ctx context.Context, db *sql.DB) error { return dropTBSPartition(ctx, db, p) }); err != nil {
			return before, err
		}
	}
	after, _, err := s.tbsState(ctx)
	after.Made, after.Dropped = len(toMake), len(toDrop)-len(open)
	for i := range after.Partitions {
		after.Partitions[i].Open = open[after.Partitions[i].Day]
	}
	return after, err
}

// planTBS returns the days that partitions are to be made for, and the partitions that are old enough to be dropped.
func planTBS(have []TBSPartition, now time.Time, k TBSKeeping) (toMake []time.Time, toDrop []TBSPartition) {
	today := day(now)
	next := today
	for _, p := range have {
		if p.Day.IsZero() {
			continue
		}
		if after := p.Day.AddDate(0, 0, 1); after.After(next) {
			next = after
		}
		if !now.Before(p.Day.AddDate(0, 0, 1).Add(k.Keep)) {
			toDrop = append(toDrop, p)
		}
	}
	// The first of them also takes what days without a partition left in the last one.
	for ; !next.After(today.AddDate(0, 0, k.Ahead)); next = next.AddDate(0, 0, 1) {
		toMake = append(toMake, next)
	}
	return toMake, toDrop
}

// takeTBSTurn takes the next number of the chain, unless another node took its own less than k.Turn ago. It saves work; nothing rests on it.
func (s *Store) takeTBSTurn(ctx context.Context, k TBSKeeping, work tbsWork) (bool, error) {
	var n uint64
	var node string
	var created time.Time
	_, err := s.Read(ctx, "tbs turn", "", func(ctx context.Context, c *sql.Conn) error {
		n, node, created = 0, "", time.Time{}
		return query(ctx, c, func(r *sql.Rows) error { return r.Scan(&n, &node, &created) }, "SELECT n, node, created FROM intent_tbs_turn ORDER BY n DESC LIMIT 1")
	})
	now := s.cfg.Now()
	if err != nil || n > 0 && node != k.Node && now.Before(created.Add(k.Turn)) {
		return false, err
	}
	text, err := json.Marshal(work)
	if err != nil {
		return false, err
	}
	err = s.insertOne(ctx, tbsTurnTable, []any{n + 1, k.Node, text, micros(now)})
	if ClassOf(err) == Duplicate {
		return false, nil // another node was first
	}
	return err == nil, err
}

var tbsTurnTable = &table{name: "intent_tbs_turn", columns: []string{"n", "node", "work", "created"}, key: 1}

// makeTBSPartitions makes partitions for days in order, all of which are after those that have one. It takes them from the last partition, which
// is empty unless nobody did this for days: rows in it are copied.
func makeTBSPartitions(ctx context.Context, db *sql.DB, days []time.Time) error {
	var q strings.Builder
	q.WriteString("ALTER TABLE intent_tbs REORGANIZE PARTITION " + laterPartition + " INTO (")
	for _, d := range days {
		p := TBSPartition{Day: d}
		fmt.Fprintf(&q, "PARTITION %s VALUES LESS THAN ('%s'), ", p.name(), d.AddDate(0, 0, 1).Format(time.DateOnly))
	}
	q.WriteString("PARTITION " + laterPartition + " VALUES LESS THAN (MAXVALUE))")
	_, err := db.ExecContext(ctx, q.String())
	if n := number(err); n != errPartitionThere && n != errPartitionOrder {
		return err
	}
	// Somebody made some of them. Whoever looks next sees what is still missing.
	return nil
}

func dropTBSPartition(ctx context.Context, db *sql.DB, p TBSPartition) error {
	_, err := db.ExecContext(ctx, "ALTER TABLE intent_tbs DROP PARTITION IF EXISTS "+p.name())
	if n := number(err); n == errPartitionGone || n == errPartitionGone2 {
		return nil
	}
	return err
}

// tbsPage is how many rows of a partition are looked at in one statement: a statement holds the table's metadata, and DDL waits for it or kills it.
const tbsPage = 5000

// openInPartition returns an intent in the partition that has no outcome, "" if there is none. It is a causal reading; afterwards none can
// come into being.
func (s *Store) openInPartition(ctx context.Context, p TBSPartition) (string, error) {
	issuer, serial := []byte{}, []byte{}
	open := ""
	for {
		rows := 0
		at, as := issuer, serial
		_, err := s.Read(ctx, "tbs outcomes", "", func(ctx context.Context, c *sql.Conn) error {
			rows, open, issuer, serial = 0, "", at, as
			return query(ctx, c, func(r *sql.Rows) error {
				var ended bool
				if err := r.Scan(&issuer, &serial, &ended); err != nil {
					return err
				}
				rows++
				if !ended && open == "" {
					open = fmt.Sprintf("%s:%x", issuer, serial)
				}
				return nil
			}, `SELECT t.issuer, t.serial, EXISTS (SELECT 1 FROM outcome o WHERE o.issuer = t.issuer AND o.serial = t.serial)
				FROM intent_tbs PARTITION (`+p.name()+`) t WHERE (t.issuer > ? OR (t.issuer = ? AND t.serial > ?)) ORDER BY t.issuer, t.serial LIMIT ?`,
				at, at, as, tbsPage)
		})
		var e *Error
		if errors.As(err, &e) && number(e.Err) == errPartitionGone2 {
			return "", nil // dropped meanwhile, by one who looked
		}
		if err != nil || open != "" || rows < tbsPage {
			return open, err
		}
		issuer, serial = slices.Clone(issuer), slices.Clone(serial)
	}
}

// firstTBSPartitions makes the first partitions, so that a keeper never has to take them out of a filled one.
func firstTBSPartitions(ctx context.Context, db *sql.DB, cfg Config) error {
	have, err := tbsPartitions(ctx, db)
	if err != nil || len(have) != 1 {
		return err
	}
	now := time.Now
	if cfg.Now != nil {
		now = cfg.Now
	}
	days, _ := planTBS(have, now(), TBSKeeping{Keep: 24 * time.Hour, Ahead: 7})
	return makeTBSPartitions(ctx, db, days)
}
