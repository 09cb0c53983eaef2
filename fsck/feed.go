package fsck

import (
	"context"
	"database/sql"
	"fmt"

	"trivet/db"
)

// feed holds every lane to its promise, contiguous numbers and an unbroken hash chain, and the lanes to the facts: every fact is announced exactly where
// its row says, and nothing is announced that is not a fact.
func (c *check) feed(ctx context.Context) error {
	_, err := c.Store.Read(ctx, "fsck", "", func(ctx context.Context, conn *sql.Conn) error {
		c.report.Checked["lanes"], c.report.Checked["feed_rows"] = 0, 0
		if err := c.lanes(ctx, conn); err != nil {
			return err
		}
		return c.announced(ctx, conn)
	})
	return err
}

func (c *check) lanes(ctx context.Context, conn *sql.Conn) error {
	var lane string
	var last uint64
	var chain [32]byte
	broken := false
	for {
		rows, err := conn.QueryContext(ctx, `SELECT lane, seq, kind, issuer, serial, payload, chain FROM feed
			WHERE (lane, seq) > (?, ?) AND lane >= ? ORDER BY lane, seq LIMIT ?`, []byte(lane), last, []byte(lane), page)
		if err != nil {
			return err
		}
		n := 0
		for rows.Next() {
			var row db.FeedRow
			var sum []byte
			if err := rows.Scan(&row.Lane, &row.Seq, &row.Kind, &row.Issuer, &row.Serial, &row.Payload, &sum); err != nil {
				rows.Close()
				return err
			}
			n++
			if row.Lane != lane {
				lane, last, chain, broken = row.Lane, 0, [32]byte{}, false
				c.count("lanes", 1)
			}
			if !broken && row.Seq != last+1 {
				c.violate("I4", "lane "+lane, "row %d follows row %d: a hole", row.Seq, last)
				broken = true
			}
			if want := db.ChainHash(chain, row); !broken && string(want[:]) != string(sum) {
				c.violate("I4", "lane "+lane, "the hash chain breaks at row %d", row.Seq)
				broken = true
			}
			last = row.Seq
			copy(chain[:], sum)
		}
		if err := rows.Err(); err != nil {
			return err
		}
		c.count("feed_rows", n)
		if n < page {
			return nil
		}
	}
}

// announced counts facts without their feed row and feed rows without their fact, and names the first few.
func (c *check) announced(ctx context.Context, conn *sql.Conn) error {
	queries := []struct{ what, sql string }{
		{"outcome without its feed row", `SELECT CONCAT(o.issuer, ':', LOWER(HEX(o.serial))) FROM outcome o LEFT JOIN feed f ON f.lane = o.lane AND f.seq = o.seq
			WHERE f.lane IS NULL OR f.serial <> o.serial OR f.issuer <> o.issuer OR f.kind NOT IN (?, ?) LIMIT 10`},
		{"revocation without its feed row", `SELECT CONCAT(r.issuer, ':', LOWER(HEX(r.serial)), ' event ', r.n) FROM revocation r LEFT JOIN feed f ON f.lane = r.lane AND f.seq = r.seq
			WHERE f.lane IS NULL OR f.serial <> r.serial OR f.issuer <> r.issuer OR f.kind <> ? LIMIT 10`},
		{"feed row without its outcome", `SELECT CONCAT(f.issuer, ':', LOWER(HEX(f.serial))) FROM feed f LEFT JOIN outcome o ON o.issuer = f.issuer AND o.serial = f.serial
			AND o.lane = f.lane AND o.seq = f.seq WHERE f.kind IN (?, ?) AND o.issuer IS NULL LIMIT 10`},
		{"feed row without its revocation", `SELECT CONCAT(f.issuer, ':', LOWER(HEX(f.serial))) FROM feed f LEFT JOIN revocation r ON r.issuer = f.issuer AND r.serial = f.serial
			AND r.lane = f.lane AND r.seq = f.seq WHERE f.kind = ? AND r.issuer IS NULL LIMIT 10`},
	}
	args := [][]any{
		{db.FeedCert, db.FeedAbandoned},
		{db.FeedRevocation},
		{db.FeedCert, db.FeedAbandoned},
		{db.FeedRevocation},
	}
	for i, q := range queries {
		rows, err := conn.QueryContext(ctx, q.sql, args[i]...)
		if err != nil {
			return fmt.Errorf("looking for a %s: %w", q.what, err)
		}
		for rows.Next() {
			var object string
			if err := rows.Scan(&object); err != nil {
				rows.Close()
				return err
			}
			c.violate("I4", object, "%s", q.what)
		}
		if err := rows.Err(); err != nil {
			return err
		}
	}
	return nil
}
