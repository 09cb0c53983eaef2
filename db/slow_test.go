package db_test

import (
	"context"
	"database/sql"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"trivet/db"
	"trivet/db/dbtest"
)

// The node that is preferred answers a hundred times slower than the others, but it answers, and its probes do in time. It gets no new work, others
// do it, and it comes back when it is as fast as they are; not before, and not twice.
func TestSlowNodeGetsNoNewWork(t *testing.T) {
	c := cluster.Need(t)
	c.Whole(t)
	cfg := c.New(t)
	log, registry := &logs{}, prometheus.NewRegistry()
	cfg.Log, cfg.Metrics = slog.New(slog.NewTextHandler(log, nil)), registry
	p := newProxy(t, cfg.Nodes[0])
	slow := p.addr
	cfg.Nodes[0] = slow
	s := dbtest.Open(t, cfg)
	lane := openLane(t, s, "ca1", incarnation(1))
	history(t, s, lane, 3)

	p.delay("SELECT 1", 900*time.Millisecond)
	p.delay("COMMIT", 900*time.Millisecond)
	dbtest.Until(t, "the node is shed", func() bool { return nodeHealth(s, 0).Slow != "" })
	h := nodeHealth(s, 0)
	if !h.Healthy || !strings.Contains(h.Slow, "on a peer") || !log.has("level=WARN", slow, "gets no new work") {
		t.Errorf("%+v", h)
	}
	for range 20 {
		row := insert(t, s, intent("demo-g1", "ca1", "slow", serials.Load()))[0]
		if res := appendAll(t, lane, certificate(row, "ca1")); res[0].Node == slow {
			t.Fatal("the slow node was written")
		}
		node, err := s.Read(soon(t), "test", "", func(ctx context.Context, c *sql.Conn) error { return c.PingContext(ctx) })
		if err != nil || node == slow {
			t.Fatalf("%s was read, %v", node, err)
		}
	}
	p.delay("SELECT 1", 0)
	p.delay("COMMIT", 0)
	dbtest.Until(t, "it is taken back", func() bool { return nodeHealth(s, 0).Slow == "" })
	history(t, s, lane, 1)
	want := `# HELP trivet_db_shed_total Times that a node got no new work any more because it was far slower than its peers.
# TYPE trivet_db_shed_total counter
trivet_db_shed_total{node="` + slow + `"} 1
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want), "trivet_db_shed_total"); err != nil {
		t.Error(err)
	}
	checkLanes(t, s)
}

// What a node whose disk hangs looks like: probes are answered, which touch no disk, and nothing else is. A commit under way there is moved.
func TestCommitOnAHungNodeIsMoved(t *testing.T) {
	c := cluster.Need(t)
	for name, f := range map[string]fault{"not done": hold, "done but not answered": swallow} {
		t.Run(name, func(t *testing.T) {
			c.Whole(t)
			cfg := c.New(t)
			p := newProxy(t, cfg.Nodes[0])
			log := &logs{}
			cfg.Nodes[0], cfg.Log = p.addr, slog.New(slog.NewTextHandler(log, nil))
			s := dbtest.Open(t, cfg)
			lane := openLane(t, s, "ca1", incarnation(1))
			row := insert(t, s, intent("demo-g1", "ca1", "hung", serials.Load()))[0]
			p.hang("SELECT 1", true)
			p.keep()
			p.next(f)
			res := appendAll(t, lane, certificate(row, "ca1"))
			if res[0].Seq != 1 || p.hits() != 1 {
				t.Errorf("%+v after %d faults", res, p.hits())
			}
			if h := nodeHealth(s, 0); h.Slow == "" || !log.has("hangs, its connections are closed", p.addr) {
				t.Errorf("%+v", h)
			}
			p.hang("SELECT 1", false)
			if f == hold {
				p.release()
			}
			dbtest.Until(t, "it is taken back", func() bool { h := nodeHealth(s, 0); return h.Healthy && h.Slow == "" })
			if rows := checkLanes(t, s); len(rows) != 1 {
				t.Errorf("%d feed rows, want 1", len(rows))
			}
		})
	}
}

// A stall of all nodes alike, as at every change of Galera's view, sheds none.
func TestStallOfAllNodesShedsNone(t *testing.T) {
	c := cluster.Need(t)
	c.Whole(t)
	cfg := c.New(t)
	registry := prometheus.NewRegistry()
	cfg.Metrics = registry
	var proxies []*proxy
	for i := range cfg.Nodes {
		p := newProxy(t, cfg.Nodes[i])
		cfg.Nodes[i] = p.addr
		proxies = append(proxies, p)
	}
	s := dbtest.Open(t, cfg)
	for _, p := range proxies {
		p.delay("SELECT 1", 1200*time.Millisecond)
	}
	seen := func(n int) func() bool {
		return func() bool {
			for _, p := range proxies {
				if p.delayed() < n {
					return false
				}
			}
			return true
		}
	}
	dbtest.Until(t, "every node was asked twice", seen(2))
	for _, p := range proxies {
		p.delay("SELECT 1", 0)
	}
	dbtest.Until(t, "the answers came", func() bool { return s.Ready() == nil && seen(2)() })
	for _, h := range s.Nodes() {
		if h.Slow != "" || !h.Healthy {
			t.Errorf("%+v", h)
		}
	}
	if n, err := testutil.GatherAndCount(registry, "trivet_db_shed_total"); err != nil || n != 0 {
		t.Errorf("%d nodes were shed, %v", n, err)
	}
}

// No statement runs on the server for long after everybody has given it up.
func TestStatementsAreBounded(t *testing.T) {
	s := dbtest.Open(t, cluster.Need(t).New(t))
	limit := func(q db.Querier) (seconds float64) {
		if err := q.QueryRowContext(soon(t), "SELECT @@max_statement_time").Scan(&seconds); err != nil {
			t.Error(err)
		}
		return seconds
	}
	if _, err := s.Write(soon(t), "test", func(_ context.Context, tx *sql.Tx) error {
		if l := limit(tx); l != 10 {
			t.Errorf("a write may run for %v s", l)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if _, err := s.Read(soon(t), "test", "", func(_ context.Context, c *sql.Conn) error {
		if l := limit(c); l != 60 {
			t.Errorf("a read may run for %v s", l)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}
