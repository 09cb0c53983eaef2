package db_test

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
)

var cluster *dbtest.Cluster

func TestMain(m *testing.M) {
	os.Exit(dbtest.Main(m, "127.90.1", 3, func(c *dbtest.Cluster) { cluster = c }))
}

// soon is a deadline that only a hanging call meets.
func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// prefer returns cfg with node i first.
func prefer(cfg db.Config, i int) db.Config {
	cfg.Nodes = append(slices.Clone(cfg.Nodes[i:]), cfg.Nodes[:i]...)
	return cfg
}

var serials atomic.Uint64

// intent returns an intent whose request is named by words.
func intent(issuer, node string, words ...any) db.Intent {
	req := sha256.Sum256([]byte(fmt.Sprintln(words...)))
	body := sha256.Sum256([]byte("body"))
	serial := make([]byte, 20)
	serial[0] = 1
	binary.BigEndian.PutUint64(serial[12:], serials.Add(1))
	return db.Intent{Issuer: issuer, Serial: serial, Req: req[:], Body: body[:], TBS: make([]byte, 520), Profile: "tls-server",
		ProfileVersion: 1, ProfileHash: body[:], Requester: "trivet://test/requester/r1", SiteEpoch: 1, Node: node}
}

// certificate returns the fact that an intent was signed by node.
func certificate(i db.Intent, node string) db.Fact {
	der := make([]byte, 620)
	copy(der, node)
	copy(der[100:], i.Serial)
	return db.Fact{Outcome: &db.Outcome{Issuer: i.Issuer, Serial: i.Serial, Kind: db.OutcomeCert, DER: der, NotAfter: time.Now().Add(90 * 24 * time.Hour)}}
}

func incarnation(n byte) [16]byte { return [16]byte{n, 15: n} }

func openLane(t testing.TB, s *db.Store, node string, inc [16]byte) *db.Lane {
	t.Helper()
	l, err := s.OpenLane(soon(t), node, inc, 0)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func insert(t testing.TB, s *db.Store, in ...db.Intent) []db.Intent {
	t.Helper()
	rows, _, err := s.InsertIntents(soon(t), in)
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

func appendAll(t testing.TB, l *db.Lane, facts ...db.Fact) []db.Appended {
	t.Helper()
	res, err := l.Append(soon(t), facts)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range res {
		if r.Err != nil {
			t.Fatalf("fact %d: %v", i, r.Err)
		}
	}
	return res
}

// checkLanes requires every lane to be contiguous with a valid chain, every fact to have its feed row and the other
// way round, and returns the rows.
func checkLanes(t testing.TB, s *db.Store) []db.FeedRow {
	t.Helper()
	var all []db.FeedRow
	_, err := s.Read(soon(t), "check", "", func(ctx context.Context, c *sql.Conn) error {
		return db.Snapshot(ctx, c, func(tx *sql.Tx) error {
			lanes, err := db.Lanes(ctx, tx)
			if err != nil {
				return err
			}
			vector := map[string]uint64{}
			for _, l := range lanes {
				vector[l.Lane] = 0
			}
			all, err = db.FeedSince(ctx, tx, vector, 1_000_000)
			if err != nil {
				return err
			}
			var outcomes, matched int
			if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM outcome").Scan(&outcomes); err != nil {
				return err
			}
			if err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM outcome o JOIN feed f USING (lane, seq, issuer, serial) WHERE f.kind IN (1, 2)`).Scan(&matched); err != nil {
				return err
			}
			certs := 0
			for _, r := range all {
				if r.Kind == db.FeedCert || r.Kind == db.FeedAbandoned {
					certs++
				}
			}
			if outcomes != matched || outcomes != certs {
				t.Errorf("%d outcomes, %d feed rows of outcomes, %d pairs", outcomes, certs, matched)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	var lane string
	var seq uint64
	var chain [32]byte
	for _, r := range all {
		if r.Lane != lane {
			lane, seq, chain = r.Lane, 0, [32]byte{}
		}
		if r.Seq != seq+1 {
			t.Errorf("lane %s: %d follows %d", lane, r.Seq, seq)
		}
		if want := db.ChainHash(chain, r); r.Chain != want {
			t.Errorf("lane %s: hash of %d does not extend the one before", lane, r.Seq)
		}
		seq, chain = r.Seq, r.Chain
	}
	return all
}
