package db_test

import (
	"bytes"
	"context"
	"database/sql"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"trivet/db"
	"trivet/db/dbtest"
	"trivet/ops/galera"
)

// logs is a slog output that can be searched.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) has(parts ...string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		all := true
		for _, p := range parts {
			all = all && strings.Contains(line, p)
		}
		if all {
			return true
		}
	}
	return false
}

// history writes certificates through s on one lane, n of them.
func history(t *testing.T, s *db.Store, lane *db.Lane, n int) {
	t.Helper()
	for range n {
		row := insert(t, s, intent("demo-g1", "ca1", "history", serials.Load()))[0]
		appendAll(t, lane, certificate(row, "ca1"))
	}
}

func nodeHealth(s *db.Store, i int) db.NodeHealth { return s.Nodes()[i] }

// A node comes back with the contents of some time ago and the position of today: Galera believes it. (A mere copy of an old directory under a
// touched-up grastate.dat is not enough: the storage engine's own position gives it away.) Phases:
// it is named and kept out of use, by a process that saw it go and by one that starts later; a full transfer brings it back.
func TestNodeFromAnOldDataDirectoryIsKeptOut(t *testing.T) {
	c := cluster.Need(t)
	c.Whole(t)
	cfg := c.New(t)
	log := &logs{}
	cfg.Log, cfg.Metrics = slog.New(slog.NewTextHandler(log, nil)), prometheus.NewRegistry()
	s := dbtest.Open(t, cfg)
	lane := openLane(t, s, "ca1", incarnation(1))
	history(t, s, lane, 5)

	const old = 2 // the node
	name := "`" + cfg.Name + "`."
	history(t, s, lane, 5)
	c.Apply(t, old) // or what it fetches at its return does not fit to what is taken away, and it leaves the group by itself
	c.Kill(old)
	c.Tamper(t, old, "DELETE FROM "+name+"feed WHERE seq > 5", "DELETE FROM "+name+"outcome WHERE seq > 5",
		"DELETE FROM "+name+"intent WHERE (issuer, serial) NOT IN (SELECT issuer, serial FROM "+name+"outcome)")
	c.Restart(t, old)
	if st, err := galera.Query(soon(t), c.Nodes[old]); err != nil || !st.Serving() {
		t.Fatalf("the node does not claim to be synced: %+v, %v", st, err)
	}

	kept := func(s *db.Store) func() bool {
		return func() bool { h := nodeHealth(s, old); return h.Diverged && !h.Healthy }
	}
	defer func() {
		if t.Failed() {
			t.Logf("%+v\n%s", s.Nodes(), log.b.String())
		}
	}()
	dbtest.Until(t, "the node is named", kept(s))
	h := nodeHealth(s, old)
	if !strings.Contains(h.Cause, "lacks 5 of the rows") || !strings.Contains(h.Cause, "move its data directory away") || h.State != "Synced" {
		t.Errorf("%+v", h)
	}
	if !log.has("level=ERROR", c.Nodes[old].SQL(), "lacks 5 of the rows") {
		t.Error("the log does not name it")
	}
	if n, err := testutil.GatherAndCount(cfg.Metrics.(*prometheus.Registry), "trivet_db_node_diverged"); err != nil || n != 1 {
		t.Errorf("metric: %d, %v", n, err)
	}
	// Not used for anything, whatever is preferred, also by a process that prefers it and meets it now.
	late := prefer(cfg, old)
	late.Log, late.Metrics = nil, nil
	second, err := db.Open(late)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- second.Run(ctx) }()
	defer func() { cancel(); <-done; second.Close() }()
	dbtest.Until(t, "the late one names it too", func() bool { h := second.Nodes()[0]; return h.Diverged && second.Nodes()[1].Healthy })
	history(t, s, lane, 5)
	for range 20 {
		for _, s := range []*db.Store{s, second} {
			node, err := s.Read(soon(t), "test", c.Nodes[0].SQL(), func(ctx context.Context, c *sql.Conn) error { return c.PingContext(ctx) })
			// The one that is to be avoided may be asked all the same, when the other one has just been slow.
			if err != nil || node == c.Nodes[old].SQL() {
				t.Fatalf("%s was asked, %v", node, err)
			}
		}
	}
	if !kept(s)() {
		t.Error("it is used again")
	}

	// As it is told: away with its data.
	c.Renew(t, old)
	dbtest.Until(t, "it is used again", func() bool { return nodeHealth(s, old).Healthy && second.Nodes()[0].Healthy })
	if nodeHealth(s, old).Diverged || !log.has("holds what the others do again") {
		t.Errorf("%+v", nodeHealth(s, old))
	}
	checkLanes(t, s)
}

// A row is altered, or taken away, on one node behind Galera's back, while it is in use.
func TestNodeThatDivergesInUseIsFound(t *testing.T) {
	c := cluster.Need(t)
	c.Whole(t)
	cfg := c.New(t)
	s := dbtest.Open(t, cfg)
	lane := openLane(t, s, "ca1", incarnation(1))
	history(t, s, lane, 3)
	table := "`" + cfg.Name + "`.feed"
	for name, change := range map[string][2]string{
		"altered": {"UPDATE " + table + " SET payload = 'x' WHERE seq = 2", ""},
		"missing": {"DELETE FROM " + table + " WHERE seq = 2", "lacks 1 of the rows"},
	} {
		t.Run(name, func(t *testing.T) {
			history(t, s, lane, 1)
			alone(t, "DROP TABLE IF EXISTS "+table+"_kept")
			defer func() {
				alone(t, "REPLACE INTO "+table+" SELECT * FROM "+table+"_kept")
				dbtest.Until(t, "it is used again", func() bool { return nodeHealth(s, 1).Healthy })
			}()
			alone(t, "CREATE TABLE "+table+"_kept AS SELECT * FROM "+table)
			alone(t, change[0])
			s.Accuse(c.Nodes[1].SQL(), lane.Name(), 1) // as a responder does that meets it
			dbtest.Until(t, "the node is named", func() bool { return nodeHealth(s, 1).Diverged })
			if h := nodeHealth(s, 1); !strings.Contains(h.Cause, "contents differ") || !strings.Contains(h.Cause, change[1]) {
				t.Errorf("%+v", h)
			}
			history(t, s, lane, 1) // goes on
		})
	}
	t.Run("an accusation without ground", func(t *testing.T) {
		s.Accuse(c.Nodes[2].SQL(), lane.Name(), 1)
		s.Accuse("nobody:1", lane.Name(), 1)
		history(t, s, lane, 2)
		if h := nodeHealth(s, 2); !h.Healthy {
			t.Errorf("%+v", h)
		}
	})
}

// alone runs a statement on the second node, as if it were no member of a cluster.
func alone(t *testing.T, query string) {
	t.Helper()
	admin, err := galera.Admin(cluster.Nodes[1])
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	conn, err := admin.Conn(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, q := range []string{"SET SESSION wsrep_on = OFF", "SET SESSION sql_log_bin = 0", query} {
		if _, err := conn.ExecContext(soon(t), q); err != nil {
			t.Fatalf("%s: %v", q, err)
		}
	}
}
