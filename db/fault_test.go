package db_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
	"trivet/ops/galera"
)

// Each fault of COMMIT in both forms: not done, and done but reported failed.
func TestLostAnswerOfCommit(t *testing.T) {
	c := cluster.Need(t)
	for name, fault := range map[string]fault{"not done": cutBefore, "cut within the command": cutCommand, "done but reported failed": cutAfter,
		"cut within the answer": cutWithin} {
		t.Run(name, func(t *testing.T) {
			cfg := c.New(t)
			p := newProxy(t, cfg.Nodes[0])
			cfg.Nodes[0] = p.addr
			s := dbtest.Open(t, cfg)
			lane := openLane(t, s, "ca1", incarnation(1))

			p.next(fault)
			in := []db.Intent{intent("demo-g1", "ca1", "a"), intent("demo-g1", "ca1", "b")}
			rows := insert(t, s, in...)
			for i := range in {
				if !bytes.Equal(rows[i].Serial, in[i].Serial) {
					t.Errorf("intent %d is not its own", i)
				}
			}
			p.next(fault)
			res := appendAll(t, lane, certificate(rows[0], "ca1"), certificate(rows[1], "ca1"))
			if res[0].Seq != 1 || res[1].Seq != 2 {
				t.Errorf("got %+v", res)
			}
			p.next(fault)
			group := db.GroupEvent{Group: "ca", N: 1, Event: "domain", Subject: "k", Payload: []byte("{}"), Actor: "me"}
			if err := s.AppendGroupLog(soon(t), group); err != nil {
				t.Errorf("a row of our own is not a duplicate: %v", err)
			}
			if p.hits() != 3 {
				t.Errorf("the proxy interfered %d times, want 3", p.hits())
			}
			appendAll(t, lane, db.Fact{Revocation: &db.Revocation{Issuer: "demo-g1", Serial: rows[0].Serial, N: 1, Event: db.EventRevoke,
				Reason: 4, Date: time.Now(), Actor: "me", SiteEpoch: 1}})
			if rows := checkLanes(t, s); len(rows) != 3 {
				t.Errorf("%d feed rows, want 3", len(rows))
			}
		})
	}
}

// A statement before COMMIT is cut, and the connection with it, on a node that is the only one: nothing happened, and the transaction is run again.
func TestLostStatement(t *testing.T) {
	c := cluster.Need(t)
	for name, fault := range map[string]fault{"not done": cutBefore, "cut within the command": cutCommand, "done but reported failed": cutAfter,
		"cut within the answer": cutWithin} {
		for _, on := range []string{"START TRANSACTION", "INSERT"} {
			t.Run(on+", "+name, func(t *testing.T) {
				cfg := c.New(t)
				p := newProxy(t, cfg.Nodes[0])
				cfg.Nodes, p.on = []string{p.addr}, on
				s := dbtest.Open(t, cfg)
				lane := openLane(t, s, "ca1", incarnation(1))
				in := intent("demo-g1", "ca1", "a")
				p.next(fault)
				rows := insert(t, s, in)
				if !bytes.Equal(rows[0].Serial, in.Serial) {
					t.Error("the intent is not its own")
				}
				p.next(fault)
				if res := appendAll(t, lane, certificate(rows[0], "ca1")); res[0].Seq != 1 {
					t.Errorf("got %+v", res)
				}
				if p.hits() != 2 {
					t.Errorf("the proxy interfered %d times, want 2", p.hits())
				}
				if rows := checkLanes(t, s); len(rows) != 1 {
					t.Errorf("%d feed rows, want 1", len(rows))
				}
			})
		}
	}
}

// The caller gives up while the fate of its COMMIT is unknown: the lane keeps the batch, and settles it before the next.
func TestUnsettledBatchIsSettledFirst(t *testing.T) {
	c := cluster.Need(t)
	for name, fault := range map[string]fault{"not done": cutBefore, "done but reported failed": cutAfter, "done late": hold} {
		t.Run(name, func(t *testing.T) {
			cfg := c.New(t)
			p := newProxy(t, cfg.Nodes[0])
			cfg.Nodes = []string{p.addr} // no other way
			s := dbtest.Open(t, cfg)
			lane := openLane(t, s, "ca1", incarnation(1))
			rows := insert(t, s, intent("demo-g1", "ca1", "a"), intent("demo-g1", "ca1", "b"))

			ctx, cancel := context.WithCancel(context.Background())
			p.then = func() { p.refuse(true); cancel() }
			p.next(fault)
			res, err := lane.Append(ctx, []db.Fact{certificate(rows[0], "ca1")})
			if db.ClassOf(err) != db.Ambiguous || res[0].Seq != 0 {
				t.Fatalf("got %+v, %v; want ambiguous", res, err)
			}
			short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			if _, err := lane.Append(short, []db.Fact{certificate(rows[1], "ca1")}); db.ClassOf(err) != db.NotReady {
				t.Fatalf("got %v; want not-ready: nothing may be sent before the batch is settled", err)
			}
			p.refuse(false)
			p.release()
			settled, err := lane.Settle(soon(t))
			if err != nil {
				t.Fatal(err)
			}
			if len(settled) != 1 || settled[0].Seq != 1 {
				t.Errorf("settled %+v", settled)
			}
			if res := appendAll(t, lane, certificate(rows[1], "ca1")); res[0].Seq != 2 {
				t.Errorf("got %+v", res)
			}
			if rows := checkLanes(t, s); len(rows) != 2 {
				t.Errorf("%d feed rows, want 2", len(rows))
			}
		})
	}
}

// A writer is cut off while its COMMIT is under way; another node closes its lane; then the COMMIT arrives.
func TestZombieLosesAgainstAClosedLane(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	p := newProxy(t, cfg.Nodes[0])
	mine := cfg
	mine.Nodes = []string{p.addr}
	zombie, other := dbtest.Open(t, mine), dbtest.Open(t, prefer(cfg, 1))
	lane := openLane(t, zombie, "ca1", incarnation(1))
	rows := insert(t, zombie, intent("demo-g1", "ca1", "a"), intent("demo-g1", "ca1", "b"))
	appendAll(t, lane, certificate(rows[0], "ca1"))

	ctx, cancel := context.WithCancel(context.Background())
	p.then = func() { p.refuse(true); cancel() }
	p.next(hold)
	if _, err := lane.Append(ctx, []db.Fact{certificate(rows[1], "ca1")}); db.ClassOf(err) != db.Ambiguous {
		t.Fatalf("got %v; want ambiguous", err)
	}
	if n, err := other.CloseLanes(soon(t), "ca1", incarnation(2), "ca2"); err != nil || n != 1 {
		t.Fatalf("closed %d lanes, %v", n, err)
	}
	p.refuse(false)
	p.release()
	if _, err := lane.Settle(soon(t)); !errors.Is(err, db.ErrLaneClosed) || db.ClassOf(err) != db.Fatal {
		t.Errorf("the zombie got %v", err)
	}
	if _, err := lane.Append(soon(t), []db.Fact{certificate(rows[1], "ca1")}); !errors.Is(err, db.ErrLaneClosed) {
		t.Errorf("the zombie got %v", err)
	}
	all := checkLanes(t, other)
	if len(all) != 2 || all[1].Kind != db.FeedClosed || all[1].Seq != 2 {
		t.Errorf("feed: %+v", all)
	}
	got, err := other.Certificate(soon(t), "demo-g1", rows[1].Serial)
	if err != nil || got.Outcome != nil {
		t.Errorf("the zombie's fact is in the record: %+v, %v", got, err)
	}
	if n, err := other.CloseLanes(soon(t), "ca1", incarnation(2), "ca2"); err != nil || n != 0 {
		t.Errorf("closing again closed %d lanes, %v", n, err)
	}
}

func TestLaneOfACopiedMachineIsRefused(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	one, two := dbtest.Open(t, cfg), dbtest.Open(t, prefer(cfg, 1))
	a, b := openLane(t, one, "ca1", incarnation(1)), openLane(t, two, "ca1", incarnation(1))
	rows := insert(t, one, intent("demo-g1", "ca1", "a"), intent("demo-g1", "ca1", "b"))
	appendAll(t, a, certificate(rows[0], "ca1"))
	if _, err := b.Append(soon(t), []db.Fact{certificate(rows[1], "ca1")}); !errors.Is(err, db.ErrLaneOwner) || db.ClassOf(err) != db.Fatal {
		t.Errorf("got %v", err)
	}
	if _, err := one.OpenLane(soon(t), "ca2", incarnation(1), 0); !errors.Is(err, db.ErrLaneOwner) {
		t.Errorf("got %v", err)
	}
}

func TestFactWithoutIntentIsLeftOut(t *testing.T) {
	c := cluster.Need(t)
	s := dbtest.Open(t, c.New(t))
	lane := openLane(t, s, "ca1", incarnation(1))
	rows := insert(t, s, intent("demo-g1", "ca1", "a"))
	res, err := lane.Append(soon(t), []db.Fact{certificate(intent("demo-g1", "ca1", "never"), "ca1"), certificate(rows[0], "ca1"), {}, certificate(rows[0], "ca1")})
	if err != nil {
		t.Fatal(err)
	}
	if db.ClassOf(res[0].Err) != db.Fatal || res[1].Err != nil || res[1].Seq != 1 || db.ClassOf(res[2].Err) != db.Fatal || db.ClassOf(res[3].Err) != db.Duplicate {
		t.Errorf("got %+v", res)
	}
	if err := lane.Close(soon(t)); err != nil {
		t.Fatal(err)
	}
	if err := lane.Close(soon(t)); err != nil {
		t.Errorf("closing again: %v", err)
	}
	checkLanes(t, s)
}

// The answer of COMMIT is lost; meanwhile another writer's certificate takes one of the batch's keys. The replay leaves that
// fact out and numbers the rest anew, which is safe because the first COMMIT, whenever it arrives, holds the taken key and so fails whole.
func TestReplayMeetsARival(t *testing.T) {
	c := cluster.Need(t)
	for name, fault := range map[string]fault{"not done": cutBefore, "arrives late": hold} {
		t.Run(name, func(t *testing.T) {
			cfg := c.New(t)
			p := newProxy(t, cfg.Nodes[0])
			mine := cfg
			mine.Nodes = []string{p.addr, cfg.Nodes[1]}
			s, other := dbtest.Open(t, mine), dbtest.Open(t, prefer(cfg, 2))
			lane, rival := openLane(t, s, "ca1", incarnation(1)), openLane(t, other, "ca2", incarnation(2))
			rows := insert(t, s, intent("demo-g1", "ca1", "a"), intent("demo-g1", "ca1", "b"), intent("demo-g1", "ca1", "c"))

			p.then = func() { appendAll(t, rival, certificate(rows[1], "ca2")) }
			p.next(fault)
			res, err := lane.Append(soon(t), []db.Fact{certificate(rows[0], "ca1"), certificate(rows[1], "ca1"), certificate(rows[2], "ca1")})
			if err != nil {
				t.Fatal(err)
			}
			if res[0].Seq != 1 || db.ClassOf(res[1].Err) != db.Duplicate || res[2].Seq != 2 {
				t.Errorf("got %+v", res)
			}
			p.release()
			if p.hits() != 1 {
				t.Errorf("the proxy interfered %d times", p.hits())
			}
			got, err := other.Certificate(soon(t), "demo-g1", rows[1].Serial)
			if err != nil || !bytes.HasPrefix(got.Outcome.DER, []byte("ca2")) {
				t.Errorf("not the rival's certificate: %v", err)
			}
			if rows := checkLanes(t, s); len(rows) != 3 {
				t.Errorf("%d feed rows, want 3", len(rows))
			}
		})
	}
}

// selects counts the SELECTs that the cluster's nodes have answered, the probes' among them.
func selects(t *testing.T) (total int) {
	t.Helper()
	for _, n := range cluster.Nodes {
		admin, err := galera.Admin(n)
		if err != nil {
			t.Fatal(err)
		}
		defer admin.Close()
		var name string
		var count int
		if err := admin.QueryRowContext(soon(t), "SHOW GLOBAL STATUS LIKE 'Com_select'").Scan(&name, &count); err != nil {
			t.Fatal(err)
		}
		total += count
	}
	return total
}

// Every start of a node leaves lanes behind. One that was restarted again and again, by a full disk for instance, must still start in time.
func TestClosingLanesIsNotSlowedByThoseThatEndedLongAgo(t *testing.T) {
	const restarts, lanes = 4000, 2
	s := dbtest.Open(t, cluster.Need(t).New(t))
	for from := 0; from < restarts; from += 500 {
		_, err := s.Write(soon(t), "test", func(ctx context.Context, tx *sql.Tx) error {
			var writers, names, ends []string
			for i := from; i < from+500; i++ {
				inc := fmt.Sprintf("%032x", i+1000)
				writers = append(writers, fmt.Sprintf("(X'%s', 'ca1', 'ca', NOW(6))", inc))
				for index := range lanes {
					names = append(names, fmt.Sprintf("('ca1/%s/%d', X'%s')", inc, index, inc))
					ends = append(ends, fmt.Sprintf("('ca1/%s/%d', 1, %d, '', '', '{}', '%032d')", inc, index, db.FeedClosed, i))
				}
			}
			for _, q := range []string{
				"INSERT INTO writer (incarnation, node, role, started) VALUES " + strings.Join(writers, ","),
				"INSERT INTO lane (lane, incarnation) VALUES " + strings.Join(names, ","),
				"INSERT INTO feed (lane, seq, kind, issuer, serial, payload, chain) VALUES " + strings.Join(ends, ","),
			} {
				if _, err := tx.ExecContext(ctx, q); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	lane := openLane(t, s, "ca1", incarnation(1))
	row := insert(t, s, intent("demo-g1", "ca1", "a"))[0]
	appendAll(t, lane, certificate(row, "ca1"))
	openLane(t, s, "ca1", incarnation(2)) // empty
	openLane(t, s, "ca2", incarnation(3)) // another node's
	before := selects(t)
	n, err := s.CloseLanes(soon(t), "ca1", incarnation(9), "ca1")
	if err != nil || n != 2 {
		t.Errorf("closed %d lanes, %v; want the 2 that were open", n, err)
	}
	if asked := selects(t) - before; asked > restarts*lanes/10 {
		t.Errorf("closing 2 lanes among %d took %d queries", restarts*lanes, asked)
	}
	if n, err := s.CloseLanes(soon(t), "ca1", incarnation(9), "ca1"); err != nil || n != 0 {
		t.Errorf("closing again closed %d lanes, %v", n, err)
	}
}
