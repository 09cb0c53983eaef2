package galera

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"
)

// Position is how far a stopped node's storage went in the cluster's history.
type Position struct {
	UUID  string `json:"uuid"`  // of the history; all zero when the node never belonged to a cluster
	Seqno int64  `json:"seqno"` // -1: unknown

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
	if there, err := n.occupied(); err != nil || there {
		return Position{}, fmt.Errorf("recovering the position of %s: %w", n.Name, cmp.Or(err, fmt.Errorf("a mariadbd is running on %s: stop it first", n.Data())))
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

// Prime makes the stopped node that the plan names ready to found the cluster: start it with bootstrap next. It looks once more:
// the node must stand where the plan says, and nobody may answer at the others' group addresses. It may be repeated.
func Prime(ctx context.Context, n Node, p Plan) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("preparing %s to found the cluster: %w", n.Name, fmt.Errorf(format, args...))
	}
	if n.Name != p.Bootstrap || n.Address != p.Address {
		return fail("the plan names %s (%s): run it there, and start %s without the plan once that node is synced", p.Bootstrap, p.Address, n.Name)
	}
	in, err := Inspect(ctx, n)
	if err != nil {
		return err
	}
	primed := in.State != nil && in.State.SafeToBootstrap && in.State.UUID == noHistory && p.NewHistory // by an attempt before
	if !primed {
		switch {
		case in.Position == nil:
			return fail("%s", in.Problem)
		case in.Position.UUID != p.Position.UUID || in.Position.Seqno != p.Position.Seqno:
			return fail("it stands at %s and the plan was made when it stood at %s: inspect all nodes again", in.Position, p.Position)
		}
	} else if in.Running {
		return fail("%s", in.Problem)
	}
	for _, peer := range n.Peers {
		if peer == n.Address {
			continue
		}
		d := net.Dialer{Timeout: time.Second}
		if c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(peer, PortGroup)); err == nil {
			c.Close()
			return fail("a database node answers at %s: two founders would make two histories. Stop it and inspect all nodes again", net.JoinHostPort(peer, PortGroup))
		}
	}
	st := State{UUID: p.Position.UUID, Seqno: p.Position.Seqno, SafeToBootstrap: true}
	if p.NewHistory {
		st.UUID, st.Seqno = noHistory, -1
	}
	if err := writeState(n, st); err != nil {
		return fail("%w", err)
	}
	return nil
}
