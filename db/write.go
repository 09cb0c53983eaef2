package db

import (
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"time"
)

// Querier runs queries: *sql.Conn and *sql.Tx do.
type Querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// Write runs body in a READ COMMITTED transaction on the preferred healthy node and commits it. It returns the
// node that committed. It runs body again, perhaps on another node, until the transaction is
// committed, ctx ends, or retrying cannot help; ctx should have a deadline.
//
// body may run many times and must issue the same rows each time: after an ambiguous commit it is run again,
// while the first transaction may still become visible. So it must bear meeting its own rows: by INSERT
// IGNORE, or by letting Duplicate out, which the caller answers by comparing rows. What body reads guards
// nothing; keys do. An error of body's own ends the transaction and is returned as it is.
//
// Ambiguous is returned when some attempt may have been committed and ctx ended before that was settled.
func (s *Store) Write(ctx context.Context, op string, body func(context.Context, *sql.Tx) error) (string, error) {
	began := time.Now()
	defer func() { s.metrics.seconds.WithLabelValues(op).Observe(time.Since(began).Seconds()) }()
	a := attempts{s: s, op: op}
	for {
		err := a.once(ctx, body)
		if err == nil {
			return a.node.address, nil
		}
		if err := a.next(ctx, err); err != nil {
			return a.address(), err
		}
	}
}

// attempts is one piece of work that is tried until it is settled.
type attempts struct {
	s     *Store
	op    string
	node  *node // of the last attempt
	avoid *node // its connection failed: try another, if there is one
	maybe bool  // an earlier attempt may have been committed, or may yet be
	tries int
}

func (a *attempts) address() string {
	if a.node == nil {
		return ""
	}
	return a.node.address
}

// once makes one attempt. Its error is an *Error, or body's own error if that is not the database's.
func (a *attempts) once(ctx context.Context, body func(context.Context, *sql.Tx) error) error {
	nodes, err := a.s.await(ctx, a.op)
	if err != nil {
		return err
	}
	a.node = nodes[0]
	if a.node == a.avoid && len(nodes) > 1 {
		a.node = nodes[1]
	}
	a.avoid = nil
	class, err := a.transaction(ctx, body)
	a.s.metrics.attempts.WithLabelValues(a.op, class.String()).Inc()
	if class == None {
		return err
	}
	a.judge(ctx, class, err)
	return &Error{Class: class, Op: a.op, Node: a.node.address, Err: err}
}

func (a *attempts) transaction(ctx context.Context, body func(context.Context, *sql.Tx) error) (Class, error) {
	// The session's isolation level is READ COMMITTED already (see newConnector).
	t, err := a.node.write.BeginTx(ctx, nil)
	if err != nil {
		return connectClass(err), err
	}
	if err := body(ctx, t); err != nil {
		t.Rollback() // a connection that cannot roll back leaves the pool, and the server rolls back
		return classify(err), err
	}
	if err := t.Commit(); err != nil {
		return classifyCommit(err), err
	}
	return None, nil
}

// connectClass judges an error of connecting: nothing was sent, so what is not the server's refusal is the network's.
func connectClass(err error) Class {
	if c := classify(err); c != None {
		return c
	}
	return NotReady
}

// judge draws the conclusion of a failed attempt for the node it was made on.
func (a *attempts) judge(ctx context.Context, class Class, err error) {
	if class == Ambiguous {
		a.maybe = true
	}
	if ctx.Err() != nil {
		return // we gave up, it did not
	}
	switch {
	case number(err) == 1047, class == ReadOnly:
		a.s.demote(a.node, err)
	case class == NotReady, class == Ambiguous:
		// One lost connection does not condemn a node under others' transactions: the probe decides.
		a.avoid = a.node
		a.node.askProbe()
	}
}

// next returns nil when the work should be tried again, after a pause; else the error to report.
func (a *attempts) next(ctx context.Context, err error) error {
	class := ClassOf(err)
	switch class {
	case Conflict, NotReady, ReadOnly, Ambiguous:
		a.tries++
		if pause(ctx, a.tries) == nil {
			return nil
		}
	case Duplicate:
		return err
	}
	if a.maybe && class != Ambiguous {
		return &Error{Class: Ambiguous, Op: a.op, Node: a.address(), Err: fmt.Errorf("an earlier attempt may have been committed; last: %w", err)}
	}
	return err
}

// pause waits a little longer after each try, with jitter, so that contenders part.
func pause(ctx context.Context, tries int) error {
	limit := min(100*time.Millisecond, time.Millisecond<<min(tries, 7))
	t := time.NewTimer(rand.N(limit) + time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Read runs body on a connection that sees every commit acknowledged, on whatever node, before the
// read began (wsrep_sync_wait=1), on a healthy node other than except; when except is the only one, on
// a new connection to it. It returns the node. body may run several times. Outside a transaction
// each statement has its own view; see Snapshot.
func (s *Store) Read(ctx context.Context, op, except string, body func(context.Context, *sql.Conn) error) (string, error) {
	return s.read(ctx, op, body, func(nodes []*node) (*node, func(context.Context) (*sql.Conn, error)) {
		// The writer does enough: ask it last.
		for _, n := range append(nodes[1:len(nodes):len(nodes)], nodes[0]) {
			if n.address != except {
				return n, n.causal.Conn
			}
		}
		return nodes[0], nodes[0].fresh.Conn
	})
}

// ReadLocal runs body on a connection to the preferred healthy node without waiting for replication: it
// may miss commits acknowledged by other nodes.
func (s *Store) ReadLocal(ctx context.Context, op string, body func(context.Context, *sql.Conn) error) error {
	_, err := s.read(ctx, op, body, func(nodes []*node) (*node, func(context.Context) (*sql.Conn, error)) {
		return nodes[0], nodes[0].write.Conn
	})
	return err
}

func (s *Store) read(ctx context.Context, op string, body func(context.Context, *sql.Conn) error,
	choose func([]*node) (*node, func(context.Context) (*sql.Conn, error))) (string, error) {
	began := time.Now()
	defer func() { s.metrics.seconds.WithLabelValues(op).Observe(time.Since(began).Seconds()) }()
	a := attempts{s: s, op: op}
	for {
		nodes, err := s.await(ctx, op)
		if err != nil {
			return a.address(), err
		}
		if len(nodes) > 1 && a.avoid != nil {
			nodes = without(nodes, a.avoid)
		}
		a.avoid = nil
		var conn func(context.Context) (*sql.Conn, error)
		a.node, conn = choose(nodes)
		class, err := readOnce(ctx, conn, body)
		s.metrics.attempts.WithLabelValues(op, class.String()).Inc()
		if class == None {
			return a.node.address, err
		}
		a.judge(ctx, class, err)
		if err := a.next(ctx, &Error{Class: class, Op: op, Node: a.node.address, Err: err}); err != nil {
			return a.node.address, err
		}
	}
}

func readOnce(ctx context.Context, conn func(context.Context) (*sql.Conn, error), body func(context.Context, *sql.Conn) error) (Class, error) {
	c, err := conn(ctx)
	if err != nil {
		return connectClass(err), err
	}
	defer c.Close()
	if err := body(ctx, c); err != nil {
		return classify(err), err
	}
	return None, nil
}

func without(nodes []*node, drop *node) []*node {
	var out []*node
	for _, n := range nodes {
		if n != drop {
			out = append(out, n)
		}
	}
	return out
}

// Snapshot runs fn in a read-only transaction whose statements all see the same moment.
func Snapshot(ctx context.Context, c *sql.Conn, fn func(*sql.Tx) error) error {
	t, err := c.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
	if err != nil {
		return err
	}
	defer t.Rollback()
	return fn(t)
}
