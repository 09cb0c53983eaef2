package fsck

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"trivet/db"
	"trivet/holder"
	"trivet/journal"
)

// held is where a CA node keeps copies of other nodes' records, below its journal.
const held = "held"

// copies reads what a node holds for others: each owner's records follow one another, and what they call released counts as released.
func (c *check) copies(ctx context.Context, node string) error {
	dir := filepath.Join(c.Journals[node], held)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	type stream struct{ owner, incarnation string }
	type end struct {
		n     uint64
		chain []byte
	}
	ends := map[stream]end{}
	// What is old and on record goes, segment by segment: a stream may begin in the middle then.
	dropped, err := filepath.Glob(filepath.Join(dir, "*.dropped"))
	if err != nil {
		return err
	}
	err = journal.ReadDir(dir, func(e journal.Entry) error {
		if err := ctx.Err(); err != nil || e.Kind != journal.KindHeld {
			return err
		}
		var h journal.Held
		if err := e.Decode(&h); err != nil {
			return err
		}
		c.count("held_records", 1)
		at := stream{h.Owner, h.Incarnation}
		before := ends[at]
		chain := holder.Chain(before.chain, h.Record)
		if before.n == 0 && len(dropped) > 0 {
			before.n, chain = h.N-1, h.Chain
		}
		if h.N != before.n+1 || !bytes.Equal(chain, h.Chain) {
			c.violate("I4", fmt.Sprintf("copies of %s at %s", h.Owner, node), "record %d does not follow record %d of incarnation %s", h.N, before.n, h.Incarnation)
		}
		ends[at] = end{h.N, h.Chain}
		var d journal.Done
		if err := json.Unmarshal(h.Record, &d); err != nil {
			return fmt.Errorf("decoding record %d of %s: %w", h.N, h.Owner, err)
		}
		k, err := doneKey(d)
		if err != nil {
			return err
		}
		c.done(h.Owner+", held by "+node, k, d)
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the copies held by %s: %w", node, err)
	}
	return nil
}

// blocks checks that every key that was blocked by a node's word still is.
func (c *check) blocks(ctx context.Context) error {
	_, err := c.Store.Read(ctx, "fsck", "", func(ctx context.Context, conn *sql.Conn) error {
		there := map[string]bool{}
		rows, err := conn.QueryContext(ctx, "SELECT spki FROM blocked_key")
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var spki []byte
			if err := rows.Scan(&spki); err != nil {
				return err
			}
			there[hex.EncodeToString(spki)] = true
		}
		c.report.Checked["blocked_keys"] = len(there)
		for spki, node := range c.ackedBlocks {
			if !there[spki] {
				c.violate("I4", "key "+spki, "%s has blocked it, and the record does not say so: block it again with `pkictl blocked-key add --spki %s`", node, spki)
			}
		}
		return rows.Err()
	})
	return err
}

// rounds checks that no recovery round is under way, and that no lane goes on beyond its end.
func (c *check) rounds(ctx context.Context) error {
	_, err := c.Store.Read(ctx, "fsck", "", func(ctx context.Context, conn *sql.Conn) error {
		state, err := db.ReadRoundState(ctx, conn)
		if err != nil {
			return err
		}
		c.report.Checked["recovery_rounds"] = int(state.N)
		if !state.Open() {
			c.violate("I4", fmt.Sprintf("recovery round %d", state.N), "it has not ended: what the database lost may not be back yet, see `pkictl recovery status`")
		}
		rows, err := conn.QueryContext(ctx, `SELECT e.lane, e.seq, MAX(f.seq) FROM feed e JOIN feed f ON f.lane = e.lane AND f.seq > e.seq WHERE e.kind = ? GROUP BY e.lane, e.seq LIMIT 10`,
			uint8(db.FeedClosed))
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var lane string
			var end, beyond uint64
			if err := rows.Scan(&lane, &end, &beyond); err != nil {
				return err
			}
			c.violate("I4", "lane "+lane, "it ended at row %d and goes on to row %d", end, beyond)
		}
		return rows.Err()
	})
	return err
}
