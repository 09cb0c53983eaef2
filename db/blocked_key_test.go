package db_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"fmt"
	"sync"
	"testing"

	"trivet/db"
	"trivet/db/dbtest"
)

// keyed returns an intent for the key of that name.
func keyed(key string, words ...any) db.Intent {
	i := intent("demo-g1", "ca1", words...)
	sum := sha256.Sum256([]byte(key))
	i.Key = sum[:]
	return i
}

func block(t testing.TB, s *db.Store, spki []byte, comment string) db.BlockedKey {
	t.Helper()
	b, _, err := s.BlockKey(soon(t), db.BlockedKey{SPKI: spki, Reason: "keyCompromise", Comment: comment, Actor: "trivet://test/ca-operator/o1"})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func uses(t testing.TB, s *db.Store, spki []byte) []db.KeyUse {
	t.Helper()
	all, err := s.KeyUses(soon(t), "", spki, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestABlockedKeyGetsNoIntent(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	s, other := dbtest.Open(t, cfg), dbtest.Open(t, prefer(cfg, 1))
	before := keyed("k", "before")
	insert(t, s, before)
	b := block(t, other, before.Key, "first")
	if b.N != 2 || b.Comment != "first" {
		t.Errorf("blocked: %+v", b)
	}
	if again := block(t, s, before.Key, "second"); again.N != b.N || again.Comment != "first" || !again.Created.Equal(b.Created) {
		t.Errorf("blocked twice: %+v, then %+v", b, again)
	}
	after, neighbour := keyed("k", "after"), keyed("another", "neighbour")
	for range 2 { // the second time it is known before the transaction
		rows := insert(t, s, keyed("fresh", "n1"), after, neighbour)
		if rows[0].Blocked || !rows[1].Blocked || rows[2].Blocked || !bytes.Equal(rows[2].Serial, neighbour.Serial) {
			t.Errorf("blocked: %v %v %v, want only the second", rows[0].Blocked, rows[1].Blocked, rows[2].Blocked)
		}
	}
	if cert, err := s.Certificate(soon(t), after.Issuer, after.Serial); err != nil || cert != nil {
		t.Errorf("a blocked key's intent is on record: %v, %v", cert, err)
	}
	// What was under way before keeps its row, and is named.
	for _, st := range []*db.Store{s, other} {
		if rows := insert(t, st, before); rows[0].Blocked || !bytes.Equal(rows[0].Serial, before.Serial) {
			t.Errorf("a repeat of an earlier request: %+v", rows[0])
		}
	}
	if named := uses(t, s, before.Key); len(named) != 1 || named[0].N != 1 || !bytes.Equal(named[0].Intent.Serial, before.Serial) {
		t.Errorf("named: %+v", named)
	}
	if got, err := s.Blocked(soon(t), "", before.Key, neighbour.Key); err != nil || len(got) != 1 || !bytes.Equal(got[0].SPKI, before.Key) {
		t.Errorf("blocked keys: %v, %v", got, err)
	}
	unused := sha256.Sum256([]byte("never used"))
	if b := block(t, s, unused[:], ""); b.N != 1 {
		t.Errorf("the block of an unused key has number %d", b.N)
	}
	page, err := s.BlockedKeys(soon(t), nil, 1)
	if err != nil || len(page) != 1 {
		t.Fatalf("%v, %v", page, err)
	}
	if next, err := s.BlockedKeys(soon(t), page[0].SPKI, 10); err != nil || len(next) != 1 || bytes.Equal(next[0].SPKI, page[0].SPKI) {
		t.Errorf("the second page: %v, %v", next, err)
	}
}

func TestUsesOfAKeyAreNumberedWithoutHoles(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	var wg sync.WaitGroup
	const rounds, batch = 8, 16
	var stores [3]*db.Store
	for i := range stores {
		stores[i] = dbtest.Open(t, prefer(cfg, i))
		wg.Go(func() {
			for round := range rounds {
				var in []db.Intent
				for k := range batch { // half of them share a key, within the batch too
					key := "shared"
					if k%2 == 1 {
						key = fmt.Sprint(i, round, k)
					}
					in = append(in, keyed(key, i, round, k))
				}
				for k, r := range insert(t, stores[i], in...) {
					if r.Blocked || !bytes.Equal(r.Serial, in[k].Serial) {
						t.Errorf("row %d: %+v", k, r)
					}
				}
			}
		})
	}
	wg.Wait()
	shared := sha256.Sum256([]byte("shared"))
	all := uses(t, stores[0], shared[:])
	if len(all) != 3*rounds*batch/2 {
		t.Errorf("%d uses, want %d", len(all), 3*rounds*batch/2)
	}
	for i, u := range all {
		if u.N != uint32(i+1) {
			t.Fatalf("use %d has number %d", i+1, u.N)
		}
	}
}

// A repeat of the same rows, as after an answer that was lost, adds nothing.
func TestARepeatUsesAKeyOnce(t *testing.T) {
	c := cluster.Need(t)
	s := dbtest.Open(t, c.New(t))
	in := []db.Intent{keyed("a", 1), keyed("a", 2), keyed("b", 3)}
	for range 3 {
		insert(t, s, in...)
	}
	// With a neighbour that is new.
	insert(t, s, append([]db.Intent{keyed("a", 4)}, in...)...)
	if a, b := uses(t, s, in[0].Key), uses(t, s, in[2].Key); len(a) != 3 || len(b) != 1 {
		t.Errorf("%d and %d uses, want 3 and 1", len(a), len(b))
	}
	// Somebody else's request under the same request key leaves no mark on its own key.
	loser := keyed("loser", 1)
	if rows := insert(t, s, loser); bytes.Equal(rows[0].Serial, loser.Serial) {
		t.Error("one request key, two rows")
	}
	if got := uses(t, s, loser.Key); len(got) != 0 {
		t.Errorf("the loser's key has %d uses", len(got))
	}
}

// Blocking and using one key at once, on different nodes, in full batches: either the intent is below the block and named, or it is refused.
func TestBlockAndUseOfOneKeyExcludeEachOther(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	rounds := 8
	if testing.Short() {
		rounds = 2
	}
	const batch = 16
	issuers := []*db.Store{dbtest.Open(t, cfg), dbtest.Open(t, prefer(cfg, 1))}
	blocker := dbtest.Open(t, prefer(cfg, 2))
	refused, named := 0, 0
	for round := range rounds {
		var in [2][]db.Intent
		var rows [2][]db.Intent
		blocks := make([]db.BlockedKey, batch)
		var wg sync.WaitGroup
		for i := range issuers {
			for k := range batch {
				in[i] = append(in[i], keyed(fmt.Sprint("k", round, k), i, round, k))
			}
			wg.Go(func() { rows[i] = insert(t, issuers[i], in[i]...) })
		}
		for k := range batch {
			wg.Go(func() { blocks[k] = block(t, blocker, in[0][k].Key, "") })
		}
		wg.Wait()
		for k := range batch {
			below := map[string]bool{}
			for _, u := range uses(t, blocker, in[0][k].Key) {
				if u.N > blocks[k].N {
					t.Errorf("key %d: use %d stands above the block %d", k, u.N, blocks[k].N)
				}
				below[string(u.Intent.Serial)] = true
			}
			for i := range issuers {
				if r := rows[i][k]; r.Blocked == below[string(r.Serial)] {
					t.Errorf("key %d: refused is %v, named in the block's answer is %v", k, r.Blocked, below[string(r.Serial)])
				} else if r.Blocked {
					refused++
				} else {
					named++
				}
			}
		}
	}
	t.Logf("%d refused, %d named", refused, named)
	_, err := blocker.Read(soon(t), "check", "", func(ctx context.Context, c *sql.Conn) error {
		var intents, uses int
		if err := c.QueryRowContext(ctx, "SELECT (SELECT COUNT(*) FROM intent), (SELECT COUNT(*) FROM key_use WHERE kind = 'issue')").Scan(&intents, &uses); err != nil {
			return err
		}
		if intents != named || uses != named {
			t.Errorf("%d intents and %d uses on record, want %d of each", intents, uses, named)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestTheCADatabaseAccountMayBlockAndNotUnblock(t *testing.T) {
	for _, role := range []string{"ca", "ceremony"} {
		if !db.MayAdd(role, "blocked_key") || !db.MayAdd(role, "key_use") {
			t.Errorf("%s may not block keys", role)
		}
	}
	for _, role := range []string{"ocsp", "sync", "fsck", "auditor"} {
		if db.MayAdd(role, "blocked_key") {
			t.Errorf("%s may block keys", role)
		}
	}
}
