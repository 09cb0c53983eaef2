package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"trivet/ops/galera"
)

// dbOwner is the account that owns the schema: migrations and grants, nothing else.
const dbOwner = "owner"

// database is the cluster's three Galera nodes. That they may start, and how, is decided in ops/galera.
type database struct {
	layout Layout
	nodes  []galera.Node

	log *slog.Logger

	mu        sync.Mutex
	seed      string          // the node whose next start founds the primary component; "" when none may
	lost      bool            // the nodes did not find together: what they remember is not enough
	up        map[string]bool // nodes that have a process, or are about to
	accept    galera.Accept   // what an operator gave up, for the next decision
	refusal   *galera.Refusal // the last decision; nil when there was none, or it was a plan
	refusedAt time.Time
}

func newDatabase(l Layout, log *slog.Logger) (*database, error) {
	d := &database{layout: l, log: log, up: map[string]bool{}}
	var peers []string
	for _, p := range l.role(RoleDB) {
		host, _, err := net.SplitHostPort(p.Addresses["mysql"])
		if err != nil {
			return nil, fmt.Errorf("laying out the database: %w", err)
		}
		peers = append(peers, host)
	}
	for i, p := range l.role(RoleDB) {
		id := l.Identity(p.Name)
		d.nodes = append(d.nodes, galera.Node{
			Name: p.Name, Address: peers[i], Dir: p.Dir, Peers: peers, Cluster: "trivet-" + Name,
			TLS: &galera.TLS{Cert: filepath.Join(id, "cert.pem"), Key: filepath.Join(id, "key.pem"), CA: filepath.Join(id, "trust.pem")},
		})
	}
	return d, nil
}

func (d *database) node(name string) galera.Node {
	for _, n := range d.nodes {
		if n.Name == name {
			return n
		}
	}
	panic("cluster: no database node " + name)
}

// prepare makes the data directories, or finds out which node saw the most, and names the nodes in the order in which to start them. All must be down.
func (d *database) prepare(ctx context.Context) (order []string, err error) {
	password, err := os.ReadFile(d.layout.Secret("db-" + dbOwner))
	if err != nil {
		return nil, fmt.Errorf("reading the database owner's password: %w", err)
	}
	first, err := galera.Found(ctx, d.nodes, func(ctx context.Context, n galera.Node) error {
		if err := galera.Secure(ctx, n); err != nil {
			return err
		}
		return galera.CreateAccount(ctx, n, Database, dbOwner, strings.TrimSpace(string(password)))
	})
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.seed = d.nodes[0].Name; !first {
		d.seed, d.lost = "", true // the first one must be ready before the others start: they cannot find together
		if err := d.decide(ctx); err != nil {
			return nil, err
		}
	}
	order = []string{d.seed}
	for _, n := range d.nodes {
		if n.Name != d.seed {
			order = append(order, n.Name)
		}
	}
	return order, nil
}

// founderPatience is how long a node that is to join waits for the start of the one that founds.
const founderPatience = 10 * time.Second

// command makes the node's command line. It founds a primary component only on the one node that may: that which holds everything when all
// are down. When all were killed at once nobody needs to: each remembers its peers and they find together. While another node has a process, a
// node only ever joins.
//
// A node that only joins has its turn after the one that founds: started earlier, it forms a component of its own with others like it, and
// may never find the founder's.
func (d *database) command(ctx context.Context, p Part) (*exec.Cmd, error) {
	d.mu.Lock() // for as long as it takes: finding positions needs every node it looks at to be down
	defer d.mu.Unlock()
	for began := time.Now(); ; {
		if d.seed == "" && len(d.up) == 0 {
			if err := d.decide(ctx); err != nil {
				return nil, err
			}
		}
		if d.seed == "" || d.seed == p.Name {
			break
		}
		if time.Since(began) > founderPatience {
			return nil, fmt.Errorf("%s founds the cluster anew, and has not been started yet: start it", d.seed)
		}
		d.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
		d.mu.Lock()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	n, bootstrap := d.node(p.Name), d.seed == p.Name
	if err := galera.Prepare(ctx, n); err != nil { // its data may have been lost
		return nil, err
	}
	cmd, err := galera.Command(ctx, n, bootstrap)
	if err != nil {
		return nil, err
	}
	if bootstrap {
		d.seed = ""
	}
	d.up[p.Name] = true
	return cmd, nil
}

// ended is told when a process made by command is gone, or was never started.
func (d *database) ended(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.up, name)
}

// primary tells whether some node belongs to a primary component.
func (d *database) primary(ctx context.Context) bool {
	for _, n := range d.nodes {
		asking, cancel := context.WithTimeout(ctx, time.Second)
		st, err := galera.Query(asking, n)
		cancel()
		if err == nil && st.Primary {
			return true
		}
	}
	return false
}

// reunionPatience is how long running nodes may go without a primary component before they are started anew from the one that holds everything. On a
// busy machine a start alone takes ten seconds.
const reunionPatience = 20 * time.Second

// reunite watches for nodes that all run and all wait for one another, as happens when they end in good order at almost the same time and are
// restarted one by one, none knowing that it was the last. All of them are on this machine, so that their positions can be compared, which
// an operator of several machines would do by hand. Nodes that somebody keeps away are waited for: what they know counts.
func (s *supervisor) reunite(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for since := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		nodes := s.of(RoleDB)
		waiting := !slices.ContainsFunc(nodes, func(u *unit) bool { return u.state() != Running })
		if !waiting || s.galera.primary(ctx) {
			since = time.Now()
			continue
		}
		if time.Since(since) < reunionPatience || ctx.Err() != nil {
			continue
		}
		s.log.Warn("the database nodes do not find together; starting them anew from the one that saw the most")
		s.galera.mu.Lock()
		s.galera.lost = true
		s.galera.mu.Unlock()
		for _, u := range nodes {
			if err := u.signal(syscall.SIGKILL); err != nil { // all before the first is back
				s.log.Warn("killing a database node", "part", u.Name, "error", err)
			}
		}
		since = time.Now()
	}
}

// ready is nil when the node is synced with a primary component.
func (d *database) ready(ctx context.Context, p Part) error {
	st, err := galera.Query(ctx, d.node(p.Name))
	if err != nil {
		return err
	}
	if !st.Serving() {
		return fmt.Errorf("%w: primary %t, state %q", errNotReady, st.Primary, st.State)
	}
	return nil
}
