package db_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
)

// clock goes like the real one, from where a test sets it.
type clock struct{ ahead atomic.Int64 }

func newClock(t time.Time) *clock {
	c := new(clock)
	c.set(t)
	return c
}

func (c *clock) set(t time.Time)       { c.ahead.Store(int64(time.Until(t))) }
func (c *clock) Now() time.Time        { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) pass(by time.Duration) { c.ahead.Add(int64(by)) }

// withTBS returns an intent with a TBSCertificate of its own.
func withTBS(words ...any) db.Intent {
	in := intent("demo-g1", "ca1", words...)
	_, _ = rand.Read(in.TBS)
	return in
}

// stored returns what the row of an intent and intent_tbs hold of its TBSCertificate.
func stored(t testing.TB, s *db.Store, i db.Intent) (inRow, apart []byte) {
	t.Helper()
	_, err := s.Read(soon(t), "test", "", func(ctx context.Context, c *sql.Conn) error {
		return c.QueryRowContext(ctx, `SELECT i.tbs, t.tbs FROM intent i LEFT JOIN intent_tbs t USING (issuer, serial) WHERE serial = ?`, i.Serial).Scan(&inRow, &apart)
	})
	if err != nil {
		t.Fatal(err)
	}
	return inRow, apart
}

func keep(t testing.TB, s *db.Store, node string) db.TBSState {
	t.Helper()
	state, err := s.KeepTBS(soon(t), db.TBSKeeping{Node: node, Keep: 14 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	return state
}

// openAll returns all open intents by serial.
func openAll(t testing.TB, cfg db.Config) map[string]db.Intent {
	t.Helper()
	open, err := dbtest.Open(t, cfg).OpenIntents(soon(t), 0, 100_000) // a new store has swept nothing yet
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]db.Intent{}
	for _, i := range open {
		out[string(i.Serial)] = i
	}
	return out
}

// A record that an earlier version filled, and still writes: this version works on it before the migration and after; it writes the new table
// only when no process of the earlier version may live, and reads every row wherever its TBSCertificate is.
func TestTBSCertificatesMoveWhileBothVersionsRun(t *testing.T) {
	cfg := cluster.Need(t).Empty(t)
	if err := db.MigrateTo(soon(t), cfg, 3); err != nil {
		t.Fatal(err)
	}
	now := newClock(time.Now())
	cfg.Now = now.Now
	s := dbtest.Open(t, cfg)
	lane := openLane(t, s, "ca1", incarnation(1))

	before := []db.Intent{withTBS("open, before"), withTBS("ended, before")}
	insert(t, s, before...)
	appendAll(t, lane, certificate(before[1], "ca1"))
	if state, err := s.KeepTBS(soon(t), db.TBSKeeping{Node: "ca1", Keep: 24 * time.Hour}); err != nil || state.Table {
		t.Fatalf("on the schema of before: %+v, %v", state, err)
	}

	if err := db.Migrate(soon(t), cfg); err != nil {
		t.Fatal(err)
	}
	// A process of the version before: it has a lane, and has not said that it knows the table.
	if _, err := s.Write(soon(t), "test", func(ctx context.Context, tx *sql.Tx) error {
		old := incarnation(2)
		if _, err := tx.ExecContext(ctx, "INSERT INTO writer VALUES (?, 'ca2', 'ca', NOW())", old[:]); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "INSERT INTO lane VALUES (?, ?)", db.LaneName("ca2", old, 0), old[:])
		return err
	}); err != nil {
		t.Fatal(err)
	}
	now.pass(time.Minute)
	state, err := s.TBSPartitions(soon(t))
	if err != nil || !state.Table || !slices.Equal(state.Old, []string{"ca2"}) || len(state.Partitions) != 9 {
		t.Fatalf("%+v, %v", state, err)
	}
	mixed := withTBS("while both run")
	insert(t, s, mixed)
	if inRow, apart := stored(t, s, mixed); !bytes.Equal(inRow, mixed.TBS) || apart != nil {
		t.Error("a process of the earlier version would take the row for a forged one")
	}

	// It was restarted with this version.
	if n, err := s.CloseLanes(soon(t), "ca2", incarnation(3), "test"); n != 1 || err != nil {
		t.Fatalf("%d lanes closed, %v", n, err)
	}
	openLane(t, dbtest.Open(t, cfg), "ca2", incarnation(3))
	now.pass(time.Minute)
	after := []db.Intent{withTBS("open, after"), withTBS("ended, after")}
	insert(t, s, after...)
	appendAll(t, lane, certificate(after[1], "ca1"))
	for _, i := range after {
		if inRow, apart := stored(t, s, i); len(inRow) != 0 || !bytes.Equal(apart, i.TBS) {
			t.Errorf("%d octets in the row, %d apart", len(inRow), len(apart))
		}
	}

	open := openAll(t, cfg)
	for _, i := range []db.Intent{before[0], mixed, after[0]} {
		if got := open[string(i.Serial)]; !bytes.Equal(got.TBS, i.TBS) {
			t.Errorf("%x: the sweeper would get another TBSCertificate: %d octets", i.Serial, len(got.TBS))
		}
		if got, err := s.TBS(soon(t), i.Issuer, i.Serial); err != nil || !bytes.Equal(got, i.TBS) {
			t.Errorf("%x: %d octets, %v", i.Serial, len(got), err)
		}
	}
	if len(open) != 3 {
		t.Errorf("%d open", len(open))
	}
	// A repeat of each request on another node gets the whole row.
	for _, i := range slices.Concat(before, after, []db.Intent{mixed}) {
		again := i
		again.Serial = withTBS().Serial
		if rows := insert(t, dbtest.Open(t, prefer(cfg, 1)), again); !bytes.Equal(rows[0].Serial, i.Serial) || !bytes.Equal(rows[0].TBS, i.TBS) {
			t.Errorf("a repeat of %x gets %x with %d octets", i.Serial, rows[0].Serial, len(rows[0].TBS))
		}
	}
	// One that begins on a record of this version writes apart at once.
	fresh := withTBS("another process")
	insert(t, dbtest.Open(t, cfg), fresh)
	if inRow, _ := stored(t, s, fresh); len(inRow) != 0 {
		t.Error("a new process does not know that the record has moved")
	}
}

// filled returns a record whose first day with a partition was 20 days ago, with open and ended intents of that day and of today, and a store
// whose clock is today's.
func filled(t *testing.T) (s *db.Store, cfg db.Config, lane *db.Lane, oldOpen, oldEnded, newOpen db.Intent) {
	t.Helper()
	cfg = cluster.Need(t).Empty(t)
	now := newClock(time.Now().AddDate(0, 0, -20))
	cfg.Now = now.Now
	if err := db.Migrate(soon(t), cfg); err != nil {
		t.Fatal(err)
	}
	s = dbtest.Open(t, cfg)
	lane = openLane(t, s, "ca1", incarnation(1))
	oldOpen, oldEnded, newOpen = withTBS("old, open"), withTBS("old, ended"), withTBS("new, open")
	insert(t, s, oldOpen, oldEnded)
	appendAll(t, lane, certificate(oldEnded, "ca1"))
	for range 3 { // a week at a time, as far as partitions are made ahead
		now.pass(7 * 24 * time.Hour)
		if now.Now().After(time.Now()) {
			now.set(time.Now())
		}
		keep(t, s, "ca1")
	}
	insert(t, s, newOpen)
	return s, cfg, lane, oldOpen, oldEnded, newOpen
}

func days(s db.TBSState) (out []string) {
	for _, p := range s.Partitions {
		out = append(out, p.Day.Format(time.DateOnly))
	}
	return out
}

func TestAPartitionIsDroppedWhenEveryIntentInItHasItsOutcome(t *testing.T) {
	s, cfg, lane, oldOpen, oldEnded, newOpen := filled(t)
	first := time.Now().UTC().AddDate(0, 0, -20).Format(time.DateOnly)

	// Days between that and the bound went; the one with the open intent stays, and says because of which.
	state := keep(t, s, "ca1")
	if got := days(state); got[0] != first || got[1] != time.Now().UTC().AddDate(0, 0, -14).Format(time.DateOnly) || state.Ahead(time.Now()) != 7 {
		t.Errorf("partitions of %v", got)
	}
	if want := fmt.Sprintf("demo-g1:%x", oldOpen.Serial); state.Partitions[0].Open != want || state.Dropped != 0 {
		t.Errorf("kept because of %q, want %q", state.Partitions[0].Open, want)
	}
	// Whoever takes it over gets it whole, by every way.
	if got := openAll(t, cfg); len(got) != 2 || !bytes.Equal(got[string(oldOpen.Serial)].TBS, oldOpen.TBS) || !bytes.Equal(got[string(newOpen.Serial)].TBS, newOpen.TBS) {
		t.Errorf("%d open", len(got))
	}
	again := oldOpen
	again.Serial = withTBS().Serial
	if rows := insert(t, s, again); !bytes.Equal(rows[0].TBS, oldOpen.TBS) {
		t.Errorf("a repeat gets %d octets", len(rows[0].TBS))
	}

	// It is abandoned: now its day goes.
	appendAll(t, lane, db.Fact{Outcome: &db.Outcome{Issuer: oldOpen.Issuer, Serial: oldOpen.Serial, Kind: db.OutcomeAbandoned}})
	if state = keep(t, s, "ca1"); state.Dropped != 1 || days(state)[0] == first {
		t.Errorf("partitions of %v", days(state))
	}
	for _, i := range []db.Intent{oldOpen, oldEnded} {
		if inRow, apart := stored(t, s, i); len(inRow)+len(apart) != 0 {
			t.Error("it is still stored")
		}
		again := i
		again.Serial = withTBS().Serial
		if rows := insert(t, s, again); !bytes.Equal(rows[0].Serial, i.Serial) || rows[0].TBS != nil {
			t.Errorf("a repeat gets %x with %v", rows[0].Serial, rows[0].TBS)
		}
	}
	if got := openAll(t, cfg); len(got) != 1 || !bytes.Equal(got[string(newOpen.Serial)].TBS, newOpen.TBS) {
		t.Errorf("%d open", len(got))
	}
	// An intent of a day whose partition is gone is kept with the oldest that is left, and found there.
	late := withTBS("late")
	late.Created = time.Now().AddDate(0, 0, -19)
	insert(t, s, late)
	if got := openAll(t, cfg); !bytes.Equal(got[string(late.Serial)].TBS, late.TBS) {
		t.Error("an intent of long ago is not found")
	}
	if state = keep(t, s, "ca1"); state.Made+state.Dropped != 0 {
		t.Errorf("there was something left to do: %+v", state)
	}
}

// Nobody kept the partitions for a month: issuing goes on in the last one, and what is in it is found after the next keeping.
func TestWithoutAKeeperNothingIsLost(t *testing.T) {
	cfg := cluster.Need(t).Empty(t)
	now := newClock(time.Now().AddDate(0, 0, -30))
	cfg.Now = now.Now
	if err := db.Migrate(soon(t), cfg); err != nil {
		t.Fatal(err)
	}
	s := dbtest.Open(t, cfg)
	openLane(t, s, "ca1", incarnation(1))
	var in []db.Intent
	for range 30 {
		now.pass(24 * time.Hour)
		in = append(in, withTBS(now.Now()))
		insert(t, s, in[len(in)-1])
	}
	state := keep(t, s, "ca1")
	if state.Ahead(now.Now()) != 7 {
		t.Errorf("partitions of %v", days(state))
	}
	open := openAll(t, cfg)
	for _, i := range in {
		if !bytes.Equal(open[string(i.Serial)].TBS, i.TBS) {
			t.Errorf("%x of %v is not found", i.Serial, i.Created)
		}
	}
}

// Two nodes keep at once, without waiting for one another's turn, while intents are inserted and taken over: each partition is made and dropped once, and
// every intent keeps its TBSCertificate.
func TestTwoKeepersWhileIssuing(t *testing.T) {
	s, cfg, lane, oldOpen, _, _ := filled(t)
	appendAll(t, lane, db.Fact{Outcome: &db.Outcome{Issuer: oldOpen.Issuer, Serial: oldOpen.Serial, Kind: db.OutcomeAbandoned}})
	var keeping, issuing sync.WaitGroup
	done := make(chan struct{})
	var mu sync.Mutex
	var in []db.Intent
	for w := range 3 {
		store := dbtest.Open(t, prefer(cfg, w))
		issuing.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				batch := make([]db.Intent, 8)
				for i := range batch {
					batch[i] = withTBS(w, n, i)
				}
				rows, _, err := store.InsertIntents(soon(t), batch)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				in = append(in, rows...)
				mu.Unlock()
				if _, err := store.OpenIntents(soon(t), 0, 50); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var dropped atomic.Int64
	for w := range 2 {
		store := dbtest.Open(t, prefer(cfg, w))
		keeping.Go(func() {
			// From a bound of 14 days down to one, so that there is something to drop each time.
			for bound := 14; bound >= 1; bound-- {
				k := db.TBSKeeping{Node: fmt.Sprint("ca", w), Keep: time.Duration(bound) * 24 * time.Hour, Ahead: 22 - bound, Turn: time.Nanosecond}
				state, err := store.KeepTBS(soon(t), k)
				if err != nil {
					t.Error(err)
					return
				}
				dropped.Add(int64(state.Dropped))
			}
		})
	}
	keeping.Wait()
	close(done)
	issuing.Wait()
	state, err := s.TBSPartitions(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := days(state); got[0] != time.Now().UTC().AddDate(0, 0, -1).Format(time.DateOnly) || state.Ahead(time.Now()) != 21 || !slices.IsSorted(got[:len(got)-1]) {
		t.Errorf("partitions of %v", got)
	}
	open := openAll(t, cfg)
	for _, i := range in {
		if !bytes.Equal(open[string(i.Serial)].TBS, i.TBS) {
			t.Errorf("%x has lost its TBSCertificate", i.Serial)
		}
	}
	t.Logf("%d intents meanwhile, %d partitions dropped", len(in), dropped.Load())
}

// A turn is one node's for a while.
func TestOneNodeHasTheTurn(t *testing.T) {
	cfg := cluster.Need(t).New(t)
	now := newClock(time.Now())
	cfg.Now = now.Now
	a, b := dbtest.Open(t, cfg), dbtest.Open(t, cfg)
	now.pass(24 * time.Hour)
	k := db.TBSKeeping{Keep: 24 * time.Hour, Ahead: 8}
	k.Node = "ca1"
	if state, err := a.KeepTBS(soon(t), k); err != nil || state.Made != 2 && state.Made != 1 {
		t.Fatalf("%+v, %v", state, err)
	}
	k.Node, k.Ahead = "ca2", 9
	if state, err := b.KeepTBS(soon(t), k); err != nil || state.Made != 0 {
		t.Errorf("in another's turn: %+v, %v", state, err)
	}
	now.pass(11 * time.Minute)
	if state, err := b.KeepTBS(soon(t), k); err != nil || state.Made != 1 {
		t.Errorf("after another's turn: %+v, %v", state, err)
	}
	if _, err := a.KeepTBS(soon(t), db.TBSKeeping{Node: "ca1", Keep: time.Hour}); db.ClassOf(err) != db.Fatal {
		t.Errorf("partitions of today would be dropped: %v", err)
	}
}
