package galera

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Position is how far a stopped node's storage went in the cluster's history.
type Position struct {
	UUID  string // of the history; all zero when the node never belonged to a cluster
	Seqno int64  // -1: unknown

	raw string // as mariadbd printed it, GTID included
}

const noHistory = "00000000-0000-0000-0000-000000000000"

// Known reports whether the node has a position in some history.
func (p Position) Known() bool { return p.UUID != "" && p.UUID != noHistory && p.Seqno >= 0 }

// String returns "uuid:seqno".
func (p Position) String() string { return p.UUID + ":" + strconv.FormatInt(p.Seqno, 10) }

var recovered = regexp.MustCompile(`WSREP: Recovered position:? *([0-9a-f-]{36}):(-?\d+)(\S*)`)

// Recover finds a stopped node's position by running mariadbd's InnoDB recovery (about a second; more
// after a crash with a large redo log). It fails when a mariadbd is running on the directory.
func Recover(ctx context.Context, n Node) (Position, error) {
	if _, err := os.Stat(filepath.Join(n.Data(), "grastate.dat")); errors.Is(err, os.ErrNotExist) {
		return Position{UUID: noHistory, Seqno: -1}, nil
	}
	// mariadbd itself would wait half a minute for the locks of a running one.
	if c, err := net.Dial("unix", n.Socket()); err == nil {
		c.Close()
		return Position{}, fmt.Errorf("recovering the position of %s: a mariadbd is running on %s: stop it first", n.Name, n.Dir)
	}
	cmd, err := n.mariadbd(ctx, "--wsrep-recover", "--log-error="+filepath.Join(n.Dir, "recover.log"))
	if err != nil {
		return Position{}, err
	}
	log := filepath.Join(n.Dir, "recover.log")
	if err := os.Remove(log); err != nil && !errors.Is(err, os.ErrNotExist) {
		return Position{}, fmt.Errorf("recovering the position of %s: %w", n.Name, err)
	}
	runErr := run(ctx, cmd)
	out, err := os.ReadFile(log)
	if err != nil {
		return Position{}, fmt.Errorf("recovering the position of %s: %w", n.Name, errors.Join(runErr, err))
	}
	m := recovered.FindSubmatch(out)
	if m == nil {
		return Position{}, fmt.Errorf("recovering the position of %s: mariadbd printed none, see %s: %w",
			n.Name, log, errors.Join(runErr, errors.New(lastError(out))))
	}
	seqno, err := strconv.ParseInt(string(m[2]), 10, 64)
	if err != nil {
		return Position{}, fmt.Errorf("recovering the position of %s: %w", n.Name, err)
	}
	uuid := string(m[1])
	return Position{UUID: uuid, Seqno: seqno, raw: uuid + ":" + string(m[2]) + string(m[3])}, nil
}

// lastError returns the last line of a log that says error.
func lastError(log []byte) string {
	last := "no error in its log"
	for line := range bytes.Lines(log) {
		if bytes.Contains(line, []byte("ERROR")) {
			last = string(bytes.TrimSpace(line))
		}
	}
	return last
}

// Seed returns the index of the position that may found the cluster anew: the highest
// seqno of the one history. Nodes without a history do not count. It refuses when
// two histories exist, because then somebody must decide which one is lost.
func Seed(positions []Position) (int, error) {
	seed := -1
	for i, p := range positions {
		if !p.Known() {
			continue
		}
		if seed >= 0 && positions[seed].UUID != p.UUID {
			return 0, fmt.Errorf("choosing a node to bootstrap: two histories, %s and %s: keep the data directories of both and decide which one is right", positions[seed], p)
		}
		if seed < 0 || p.Seqno > positions[seed].Seqno {
			seed = i
		}
	}
	if seed < 0 {
		return 0, errors.New("choosing a node to bootstrap: no node has a position")
	}
	return seed, nil
}

// RestartOrder returns all nodes, which must be stopped and on this machine, in the order in which
// to start them: the first with bootstrap (it has been marked safe), the others after it is synced.
func RestartOrder(ctx context.Context, nodes []Node) ([]Node, error) {
	positions := make([]Position, len(nodes))
	for i, n := range nodes {
		p, err := Recover(ctx, n)
		if err != nil {
			return nil, err
		}
		positions[i] = p
	}
	seed, err := Seed(positions)
	if err != nil {
		return nil, err
	}
	if err := MarkSafe(nodes[seed]); err != nil {
		return nil, err
	}
	order := []Node{nodes[seed]}
	for i, n := range nodes {
		if i != seed {
			order = append(order, n)
		}
	}
	return order, nil
}

// MarkSafe lets a stopped node bootstrap although it was not the last to stop. Only for the node that Seed names.
func MarkSafe(n Node) error {
	path := filepath.Join(n.Data(), "grastate.dat")
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("marking %s safe to bootstrap: %w", n.Name, err)
	}
	b = bytes.Replace(b, []byte("safe_to_bootstrap: 0"), []byte("safe_to_bootstrap: 1"), 1)
	// Written in place: the file keeps its owner, and a torn write only costs another recovery.
	if err := os.WriteFile(path, b, 0o660); err != nil {
		return fmt.Errorf("marking %s safe to bootstrap: %w", n.Name, err)
	}
	return nil
}

// MayBootstrap decides whether a node about to start may found the primary component: only
// when no peer is Primary (as asked through primary, see Primary), and either no node
// ever ran and this one is the first of Peers, or its own state says that it was the last to stop.
// Otherwise it must join, and if nobody is Primary, wait for the operator (see "All nodes down").
func MayBootstrap(ctx context.Context, n Node, primary func(ctx context.Context, address string) bool) (bool, error) {
	for _, p := range n.Peers {
		if p != n.Address && primary(ctx, p) {
			return false, nil
		}
	}
	b, err := os.ReadFile(filepath.Join(n.Data(), "grastate.dat"))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return n.Peers[0] == n.Address, nil
	case err != nil:
		return false, fmt.Errorf("deciding whether %s may bootstrap: %w", n.Name, err)
	}
	return strings.Contains(string(b), "safe_to_bootstrap: 1"), nil
}
