package galera_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"trivet/ops/galera"
)

// down kills the nodes, all before the first is reaped.
func (r *rig) down(nodes ...int) {
	for _, i := range nodes {
		r.procs[i].Process.Kill()
	}
	for _, i := range nodes {
		r.kill(i)
	}
}

func (r *rig) survey() []galera.Inspection {
	r.t.Helper()
	in, err := galera.Survey(r.ctx(), r.nodes)
	if err != nil {
		r.t.Fatal(err)
	}
	return in
}

func (r *rig) until(what string, cond func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("waited in vain until %s", what)
		}
	}
}

// follow starts the cluster as the plan says.
func (r *rig) follow(p galera.Plan) {
	r.t.Helper()
	index := map[string]int{}
	for i, n := range r.nodes {
		index[n.Name] = i
	}
	seed := index[p.Bootstrap]
	for range 2 { // it may be repeated
		if err := galera.Prime(r.ctx(), r.nodes[seed], p); err != nil {
			r.t.Fatal(err)
		}
	}
	r.start(seed, true)
	for _, j := range p.Join {
		if err := galera.Prepare(r.ctx(), r.nodes[index[j.Node]]); err != nil {
			r.t.Fatal(err)
		}
		r.start(index[j.Node], false)
	}
}

func (r *rig) history(i int) string {
	r.t.Helper()
	s, err := galera.Query(r.ctx(), r.nodes[i])
	if err != nil {
		r.t.Fatal(err)
	}
	return s.StateUUID
}

// transfers counts the full state transfers that a node has received.
func (r *rig) transfers(i int) int {
	b, err := os.ReadFile(r.log(i))
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.Count(string(b), "rsync SST completed on joiner")
}

func (r *rig) rows(want int) {
	r.t.Helper()
	for i := range r.nodes {
		if n := r.count(i, "SELECT COUNT(*) FROM trivet.t"); n != want {
			r.t.Errorf("node %d holds %d rows, want %d", i, n, want)
		}
	}
}

// Phases on one cluster: all killed with one node behind; a disk lost of a node that had left before; a disk lost of the one that stood highest.
func TestWholeClusterIsRecovered(t *testing.T) {
	r := newRig(t, "127.90.2", 3, nil)
	r.found()
	if n := r.count(0, "SELECT COUNT(*) FROM mysql.global_priv WHERE User = '' OR (User = 'root' AND Host <> 'localhost')"); n != 0 {
		t.Errorf("%d accounts that should not be", n)
	}
	r.exec(0, "CREATE TABLE trivet.t (a INT PRIMARY KEY)")
	for i := range 30 {
		r.exec(i%3, fmt.Sprintf("INSERT INTO trivet.t VALUES (%d)", i))
	}
	old := r.history(0)

	t.Run("running nodes are no matter for recovery", func(t *testing.T) {
		in := r.survey()
		if _, err := galera.Choose(in, galera.Accept{}); err == nil || !strings.Contains(err.Error(), "the cluster lives") {
			t.Errorf("got %v", err)
		}
		if !in[2].Running || in[2].View == nil || len(in[2].View.Members) != 3 || in[2].State.UUID != old {
			t.Errorf("%+v", in[2])
		}
		if _, err := galera.Recover(r.ctx(), r.nodes[2]); err == nil {
			t.Error("recovered the position of a running node")
		}
		r.procs[2].Process.Signal(syscall.SIGSTOP)
		defer r.procs[2].Process.Signal(syscall.SIGCONT)
		if in, err := galera.Inspect(r.ctx(), r.nodes[2]); err != nil || !in.Running {
			t.Errorf("a frozen node: %+v, %v", in, err)
		}
	})

	t.Run("all killed, the one that misses a write does not found", func(t *testing.T) {
		r.together() // the others may have given up the frozen one
		r.kill(0)
		r.insert(1, 100)
		r.down(1, 2)
		in := r.survey()
		p, err := galera.Choose(in, galera.Accept{})
		if err != nil || p.Bootstrap == "db1" || p.NewHistory {
			t.Fatalf("%+v, %v", p, err)
		}
		if err := galera.Prime(r.ctx(), r.nodes[0], p); err == nil || !strings.Contains(err.Error(), "the plan names "+p.Bootstrap) {
			t.Errorf("another node made ready: %v", err)
		}
		seed := 1
		if p.Bootstrap == "db3" {
			seed = 2
		}
		stale := p
		stale.Position.Seqno--
		if err := galera.Prime(r.ctx(), r.nodes[seed], stale); err == nil || !strings.Contains(err.Error(), "inspect all nodes again") {
			t.Errorf("an old plan followed: %v", err)
		}
		ln, err := net.Listen("tcp", net.JoinHostPort(r.nodes[0].Address, galera.PortGroup))
		if err != nil {
			t.Fatal(err)
		}
		if err := galera.Prime(r.ctx(), r.nodes[seed], p); err == nil || !strings.Contains(err.Error(), "two founders") {
			t.Errorf("founded beside another: %v", err)
		}
		ln.Close()
		r.follow(p)
		r.rows(31)
		for i := range r.nodes {
			if r.history(i) != old || r.transfers(i) != 0 {
				t.Errorf("node %d: history %s after %s, %d full transfers", i, r.history(i), old, r.transfers(i))
			}
		}
	})

	if t.Failed() {
		return
	}
	t.Run("the disk of a node that had left is no loss", func(t *testing.T) {
		r.kill(2)
		r.insert(0, 101)
		for i := range 2 { // the provider writes a new view down a moment after it goes by it
			r.until("the view without db3 is written down", func() bool {
				in, err := galera.Glance(r.ctx(), r.nodes[i])
				return err == nil && in.View != nil && len(in.View.Members) == 2
			})
		}
		r.down(0, 1)
		if err := os.RemoveAll(r.nodes[2].Data()); err != nil {
			t.Fatal(err)
		}
		p, err := galera.Choose(r.survey(), galera.Accept{})
		if err != nil || p.NewHistory || p.Bootstrap == "db3" {
			t.Fatalf("%+v, %v", p, err)
		}
		r.follow(p)
		r.rows(32)
		if r.history(2) != old || r.transfers(2) != 1 {
			t.Errorf("history %s, %d full transfers", r.history(2), r.transfers(2))
		}
	})

	if t.Failed() {
		return
	}
	t.Run("the disk of the most advanced node is lost: refused, and with the flag a new history", func(t *testing.T) {
		r.down(0, 1, 2)
		lost := filepath.Join(r.nodes[1].Dir, "kept")
		if err := os.Rename(r.nodes[1].Data(), lost); err != nil {
			t.Fatal(err)
		}
		in := r.survey()
		if _, err := galera.Choose(in, galera.Accept{}); err == nil || !strings.Contains(err.Error(), "--without db2 --i-accept-loss") {
			t.Fatalf("got %v", err)
		}
		p, err := galera.Choose(in, galera.Accept{Without: []string{"db2"}, Loss: true})
		if err != nil || !p.NewHistory {
			t.Fatalf("%+v, %v", p, err)
		}
		// The lost disk turns up again, before its node is started: it must not bring its past along.
		if err := os.Rename(lost, r.nodes[1].Data()); err != nil {
			t.Fatal(err)
		}
		before := r.transfers(1)
		r.follow(p)
		r.rows(32)
		if h := r.history(1); h == old || r.transfers(1) != before+1 {
			t.Errorf("history %s, %d full transfers after %d", h, r.transfers(1), before)
		}
	})
}

func TestLoadReadsWhatPrepareWrote(t *testing.T) {
	dir := t.TempDir()
	n := galera.Node{Name: "db2", Address: "10.0.0.2", Dir: dir, Peers: peers, Cluster: "c"}
	text, err := galera.Render(n)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.Config(), text, 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := galera.Load(n.Config())
	if err != nil || got.Name != n.Name || got.Address != n.Address || got.Cluster != n.Cluster || strings.Join(got.Peers, " ") != strings.Join(peers, " ") ||
		got.Data() != n.Data() || got.Socket() != n.Socket() || got.Config() != n.Config() {
		t.Errorf("%+v, %v", got, err)
	}
	for name, text := range map[string]string{
		"wsrep_cluster_address": "[mysqld]\ndatadir=/d\nsocket=/s\n",
		"gcomm://":              "[galera]\ndatadir=/d\nsocket=/s\nwsrep-cluster-address=10.0.0.1\nwsrep_node_address=10.0.0.1\nwsrep_node_name=db1\nwsrep_cluster_name=c\n",
		"includes others":       "[mysqld]\n!includedir /etc/mysql/conf.d\n",
	} {
		path := filepath.Join(dir, "bad.cnf")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := galera.Load(path); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want %q, got %v", name, err)
		}
	}
	if in, err := galera.Inspect(context.Background(), galera.Node{Name: "db1", Address: "10.0.0.1", Dir: dir, Peers: peers}); err != nil || in.Position != nil || in.Problem == "" {
		t.Errorf("a node without data: %+v, %v", in, err)
	}
}
