package galera

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Inspection is what one host knows of its node: everything that Choose needs, so that an operator can carry the inspections of
// several hosts together as files.
type Inspection struct {
	Format  int       `json:"format"` // 1
	Node    string    `json:"node"`
	Address string    `json:"address"`
	Cluster string    `json:"cluster"`
	Peers   []string  `json:"peers"` // addresses of all nodes, by this node's configuration
	Data    string    `json:"data"`  // directory
	At      time.Time `json:"at"`

	Running bool `json:"running"` // a mariadbd, alive or frozen, has the directory
	Primary bool `json:"primary"` // it runs and belongs to a primary component

	State    *State    `json:"state"`    // grastate.dat; nil: there is none
	View     *View     `json:"view"`     // gvwstate.dat; nil: there is none, the node left in good order or never belonged to a group
	Position *Position `json:"position"` // nil: unknown, and Problem says why
	Problem  string    `json:"problem,omitempty"`
}

// State is grastate.dat: what the provider wrote down when it last opened or left the group. Seqno is -1 for a node that did not leave in good order.
type State struct {
	UUID            string `json:"uuid"` // all zero: the data are not to be trusted, a transfer was cut short or they contradicted the others
	Seqno           int64  `json:"seqno"`
	SafeToBootstrap bool   `json:"safe_to_bootstrap"` // it was the last one left
}

// View is gvwstate.dat: the last primary component the node belonged to. It is removed when the node leaves in good order.
type View struct {
	Self    string   `json:"self"` // the node's id in the group
	ID      string   `json:"id"`
	Members []string `json:"members"`
}

const inspectionFormat = 1

// problemBlank is the Problem of a node without data.
const problemBlank = "it has no data: new, or its disk was lost"

// Inspect finds out what the node knows. A stopped node's position is found by mariadbd's own recovery, about a second; a running
// node is left alone. The error is about the machine, not about the node: what is wrong with the node is in the Inspection.
func Inspect(ctx context.Context, n Node) (Inspection, error) { return inspect(ctx, n, true) }

// Glance is Inspect without looking for the position.
func Glance(ctx context.Context, n Node) (Inspection, error) { return inspect(ctx, n, false) }

// Survey inspects nodes of this machine side by side.
func Survey(ctx context.Context, nodes []Node) ([]Inspection, error) {
	out, errs := make([]Inspection, len(nodes)), make([]error, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() { out[i], errs[i] = Inspect(ctx, n) })
	}
	all.Wait()
	return out, errors.Join(errs...)
}

func inspect(ctx context.Context, n Node, deep bool) (Inspection, error) {
	n = n.withDefaults()
	in := Inspection{Format: inspectionFormat, Node: n.Name, Address: n.Address, Cluster: n.Cluster, Peers: n.Peers, Data: n.Data(), At: time.Now().UTC()}
	fail := func(err error) (Inspection, error) { return in, fmt.Errorf("inspecting %s: %w", n.Name, err) }
	if !n.installed() {
		in.Problem = problemBlank
		return in, nil
	}
	var err error
	if in.State, err = readState(filepath.Join(n.Data(), "grastate.dat")); err != nil {
		return fail(err)
	}
	if in.View, err = readView(filepath.Join(n.Data(), "gvwstate.dat")); err != nil {
		return fail(err)
	}
	if in.Running, err = n.occupied(); err != nil {
		return fail(err)
	}
	if in.Running {
		asking, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		st, err := Query(asking, n)
		in.Primary = err == nil && st.Primary
		in.Problem = "mariadbd is running on " + n.Data()
		return in, nil
	}
	switch {
	case in.State == nil:
		in.Problem = problemBlank
		return in, nil
	case in.State.UUID == noHistory:
		in.Problem = "its data are not to be trusted: grastate.dat was voided, because a state transfer was cut short or the data contradicted the others'"
		return in, nil
	case !deep:
		in.Problem = "not looked for"
		return in, nil
	}
	pos, err := Recover(ctx, n)
	switch {
	case ctx.Err() != nil:
		return fail(ctx.Err())
	case err != nil:
		in.Problem = err.Error()
	case !pos.Known():
		in.Problem = fmt.Sprintf("its storage engine holds no position (%s)", pos)
	case in.State.UUID != pos.UUID:
		in.Problem = fmt.Sprintf("grastate.dat is of history %s, the storage engine of %s", in.State.UUID, pos.UUID)
	default:
		in.Position = &pos
	}
	return in, nil
}

// occupied tells whether a process has the data directory: mariadbd locks its system tablespace for as long as it lives, also
// while it starts, waits for a transfer, or is frozen.
func (n Node) occupied() (bool, error) {
	if c, err := net.Dial("unix", n.Socket()); err == nil {
		c.Close()
		return true, nil
	}
	f, err := os.OpenFile(filepath.Join(n.Data(), "ibdata1"), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &lock); err != nil {
		return false, fmt.Errorf("looking for a lock on %s: %w", f.Name(), err)
	}
	return lock.Type != unix.F_UNLCK, nil
}

// readState parses grastate.dat; nil when there is none.
func readState(path string) (*State, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	st := &State{UUID: noHistory, Seqno: -1}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); key {
		case "uuid":
			st.UUID = value
		case "seqno":
			if st.Seqno, err = strconv.ParseInt(value, 10, 64); err != nil {
				return nil, fmt.Errorf("%s: seqno %q is no number", path, value)
			}
		case "safe_to_bootstrap":
			st.SafeToBootstrap = value == "1"
		}
	}
	return st, nil
}

// readView parses gvwstate.dat; nil when there is none, or when it was torn: then it says nothing.
func readView(path string) (*View, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	v, ended := &View{}, false
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		key, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); key {
		case "my_uuid":
			v.Self = value
		case "view_id":
			v.ID = value
		case "member":
			id, _, _ := strings.Cut(value, " ")
			v.Members = append(v.Members, id)
		case "#vwend":
			ended = true
		}
	}
	if !ended || v.Self == "" || v.ID == "" || len(v.Members) == 0 {
		return nil, nil
	}
	slices.Sort(v.Members)
	return v, nil
}

// writeState writes grastate.dat of a stopped node, with the owner and mode it had.
func writeState(n Node, st State) error {
	path := filepath.Join(n.Data(), "grastate.dat")
	safe := 0
	if st.SafeToBootstrap {
		safe = 1
	}
	text := fmt.Sprintf("# GALERA saved state\nversion: 2.1\nuuid:    %s\nseqno:   %d\nsafe_to_bootstrap: %d\n", st.UUID, st.Seqno, safe)
	// In place: the file keeps its owner, and a torn write only costs another recovery.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = io.WriteString(f, text)
	return errors.Join(err, f.Sync(), f.Close())
}

// Load reads the description of a node from its configuration: one that Prepare rendered, or any single file with datadir,
// socket and the wsrep_ settings in a section that mariadbd reads.
func Load(config string) (Node, error) {
	fail := func(err error) (Node, error) { return Node{}, fmt.Errorf("reading %s: %w", config, err) }
	path, err := filepath.Abs(config)
	if err != nil {
		return fail(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return Node{}, err
	}
	set, section := map[string]string{}, ""
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		switch {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '!':
			return fail(fmt.Errorf("it includes others (%s): give one file with everything, as `my_print_defaults` shows it", line))
		case line[0] == '[':
			section = strings.Trim(line, "[]")
		case slices.Contains([]string{"mysqld", "mariadb", "mariadbd", "server", "galera"}, section):
			key, value, _ := strings.Cut(line, "=")
			key = strings.ReplaceAll(strings.TrimSpace(key), "-", "_")
			set[key] = strings.Trim(strings.TrimSpace(value), `"'`)
		}
	}
	if err := lines.Err(); err != nil {
		return fail(err)
	}
	for _, key := range []string{"datadir", "socket", "wsrep_cluster_address", "wsrep_node_address", "wsrep_node_name", "wsrep_cluster_name"} {
		if set[key] == "" {
			return fail(fmt.Errorf("%s is not set: is this the configuration of a Galera node?", key))
		}
	}
	n := Node{
		Name: set["wsrep_node_name"], Address: set["wsrep_node_address"], Cluster: set["wsrep_cluster_name"], Dir: filepath.Dir(path),
		files: files{config: path, data: filepath.Clean(set["datadir"]), socket: set["socket"]},
	}
	list, ok := strings.CutPrefix(set["wsrep_cluster_address"], "gcomm://")
	if !ok {
		return fail(fmt.Errorf("wsrep_cluster_address %q: want gcomm://ADDRESS,ADDRESS,…", set["wsrep_cluster_address"]))
	}
	list, _, _ = strings.Cut(list, "?")
	for p := range strings.SplitSeq(list, ",") {
		if host, _, err := net.SplitHostPort(p); err == nil {
			p = host
		}
		n.Peers = append(n.Peers, strings.TrimSpace(p))
	}
	return n, n.validate()
}
