package db

import (
	"bytes"
	"context"
	"crypto/tls"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/go-sql-driver/mysql"
)

// Timeouts of a connection. Reading and writing ones are the last resort: Galera stalls commits on healthy nodes for
// over a second when its view changes, so it is the probe that finds dead nodes.
const (
	dialTimeout = time.Second
	ioTimeout   = 5 * time.Second

	// What nobody waits for any more is not left running on the server: it holds locks, and a hung node's piles up. Reads are given
	// longer, because the time to fetch many rows counts.
	writeStatement = 2 * ioTimeout
	readStatement  = time.Minute
)

// node is one member of the cluster as this process sees it.
type node struct {
	address string
	write   *sql.DB // wsrep_sync_wait=0
	causal  *sql.DB // wsrep_sync_wait=1: reads see every commit acknowledged before they began
	fresh   *sql.DB // causal, and every connection is new
	probe   *sql.DB // one connection, not closed by a demotion
	audit   *sql.DB // causal; one connection, not closed by a demotion

	ping *sql.DB // causal; one connection, not closed by a demotion

	kick chan struct{} // asks for a probe now

	mu       sync.Mutex
	health   NodeHealth
	answered NodeHealth // what the last probe that was well found, whatever was made of it
	found    *finding   // it holds other contents than the others
	compared time.Time  // with the others, last
	pace     pace
	accused  []stretch // to be compared next
	marked   time.Time // last demotion by a caller; a probe that began earlier does not overrule it
	epoch    uint64    // rises at every demotion; connections of an older epoch are not used again
	socks    map[*socket]struct{}
}

func newNode(cfg Config, address string) (*node, error) {
	n := &node{address: address, kick: make(chan struct{}, 1), socks: map[*socket]struct{}{},
		health: NodeHealth{Address: address, Cause: "not probed yet"}}
	pool := func(k kind, open, idle int) (*sql.DB, error) {
		c, err := newConnector(cfg, n, k)
		if err != nil {
			return nil, err
		}
		db := sql.OpenDB(c)
		db.SetMaxOpenConns(open)
		db.SetMaxIdleConns(idle)
		db.SetConnMaxLifetime(5 * time.Minute)
		return db, nil
	}
	few := max(4, cfg.MaxConns/2)
	var err [6]error
	n.write, err[0] = pool(kind{tracked: true}, cfg.MaxConns, cfg.MaxConns)
	n.causal, err[1] = pool(kind{syncWait: 1, tracked: true}, few, few)
	n.fresh, err[2] = pool(kind{syncWait: 1, tracked: true}, few, -1)
	n.probe, err[3] = pool(kind{}, 1, 1)
	n.ping, err[5] = pool(kind{syncWait: 1}, 1, 1)
	n.audit, err[4] = pool(kind{syncWait: 1}, 1, 1)
	return n, errors.Join(err[:]...)
}

func (n *node) close() error {
	err := errors.Join(n.write.Close(), n.causal.Close(), n.fresh.Close(), n.probe.Close(), n.audit.Close(), n.ping.Close())
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drop()
	return err
}

// drop ends every connection to the node, those with a call in flight included. The caller holds mu.
func (n *node) drop() {
	n.epoch++
	for s := range n.socks {
		// Reset rather than close politely: a frozen server then never sees the statement
		// that waits in its socket buffer, which saves a late commit. Safety does not rest on it.
		s.SetLinger(0)
		s.TCPConn.Close()
	}
	clear(n.socks)
}

func (n *node) currentEpoch() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.epoch
}

func (n *node) status() NodeHealth {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.health
}

// socket is a TCP connection that its node can close.
type socket struct {
	*net.TCPConn
	node *node
}

// Close also forgets the socket.
func (s *socket) Close() error {
	s.node.mu.Lock()
	delete(s.node.socks, s)
	s.node.mu.Unlock()
	return s.TCPConn.Close()
}

// connector makes connections to one node. It implements driver.Connector.
type connector struct {
	node    *node
	driver  driver.Connector
	tracked bool // closed when the node is demoted
}

// kind is what the connections of a pool are for.
type kind struct {
	syncWait int           // wsrep_sync_wait: 0 none, 1 reads, 15 everything
	io       time.Duration // of one read or write, ioTimeout if 0
	tracked  bool          // closed when the node is demoted
}

func newConnector(cfg Config, n *node, what kind) (*connector, error) {
	if what.io == 0 {
		what.io = ioTimeout
	}
	c := mysql.NewConfig()
	c.Net, c.Addr = "tcp", n.address
	c.User, c.DBName = cfg.User, cfg.Name
	c.Timeout, c.ReadTimeout, c.WriteTimeout = dialTimeout, what.io, what.io
	c.InterpolateParams = true // one round trip per statement
	c.MultiStatements = true   // and one for several, if they only read: see ExecContext
	c.ParseTime, c.Loc = true, time.UTC
	c.Collation = "binary"
	c.ConnectionAttributes = "program_name:trivet-" + cfg.Role
	c.Params = map[string]string{
		"sql_mode":                 "'STRICT_ALL_TABLES'",
		"time_zone":                "'+00:00'",
		"tx_isolation":             "'READ-COMMITTED'",
		"innodb_lock_wait_timeout": "3",
		"wsrep_sync_wait":          strconv.Itoa(what.syncWait),
	}
	if what.tracked {
		limit := readStatement
		if what.syncWait == 0 {
			limit = writeStatement
		}
		c.Params["max_statement_time"] = strconv.Itoa(int(limit.Seconds()))
	}
	c.Logger = &mysql.NopLogger{} // every error it would log is returned
	if cfg.TLS != nil {
		c.TLS = cfg.TLS.Clone()
		if c.TLS.MinVersion == 0 {
			c.TLS.MinVersion = tls.VersionTLS12
		}
	}
	k := &connector{node: n, tracked: what.tracked}
	c.DialFunc = k.dial
	if cfg.PasswordFile != "" {
		if err := c.Apply(mysql.BeforeConnect(func(_ context.Context, c *mysql.Config) error {
			b, err := os.ReadFile(cfg.PasswordFile)
			if err != nil {
				return fmt.Errorf("reading the database password: %w", err)
			}
			c.Passwd = string(bytes.TrimSpace(b))
			return nil
		})); err != nil {
			return nil, err
		}
	}
	var err error
	k.driver, err = mysql.NewConnector(c)
	return k, err
}

// dialed is the context key under which Connect learns which socket dial opened for it.
type dialed struct{}

// dial opens the socket, registers it with the node and hands it to Connect.
func (k *connector) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	s := &socket{TCPConn: c.(*net.TCPConn), node: k.node}
	if k.tracked {
		k.node.mu.Lock()
		k.node.socks[s] = struct{}{}
		k.node.mu.Unlock()
	}
	if to, ok := ctx.Value(dialed{}).(**socket); ok {
		*to = s
	}
	return s, nil
}

// Driver implements driver.Connector.
func (k *connector) Driver() driver.Driver { return k.driver.Driver() }

// Connect implements driver.Connector.
func (k *connector) Connect(ctx context.Context) (driver.Conn, error) {
	epoch := k.node.currentEpoch()
	var s *socket
	c, err := k.driver.Connect(context.WithValue(ctx, dialed{}, &s))
	if err != nil {
		return nil, err
	}
	full, ok := c.(driverConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("the MySQL driver's %T lacks an interface that database/sql relies on", c)
	}
	wrapped := &conn{driverConn: full, connector: k, epoch: epoch, sock: s}
	if !wrapped.current() {
		c.Close()
		return nil, driver.ErrBadConn
	}
	return wrapped, nil
}

// driverConn is every interface of a connection that database/sql looks for and the driver has;
// a wrapper that lost one of them would silently become slower or less safe.
type driverConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.QueryerContext
	driver.NamedValueChecker
	driver.Pinger
	driver.SessionResetter
	driver.Validator
}

// conn is a connection that leaves the pool once its node was demoted.
type conn struct {
	driverConn
	connector *connector
	epoch     uint64
	sock      *socket
	begin     *tx // the server has not heard of it yet; nil: none
}

func (c *conn) current() bool {
	return !c.connector.tracked || c.epoch == c.connector.node.currentEpoch()
}

// abort ends the connection under a call in flight; see drop for why it resets.
func (c *conn) abort() {
	c.sock.SetLinger(0)
	c.sock.TCPConn.Close()
}

// ResetSession is called when the pool hands the connection out.
func (c *conn) ResetSession(ctx context.Context) error {
	if !c.current() {
		return driver.ErrBadConn
	}
	return c.driverConn.ResetSession(ctx)
}

// IsValid is called when the connection comes back to the pool.
func (c *conn) IsValid() bool { return c.current() && c.driverConn.IsValid() }

// Close implements driver.Conn. A connection that cannot say goodbye is closed all the same.
func (c *conn) Close() error {
	c.driverConn.Close()
	return nil
}

// BeginTx implements driver.ConnBeginTx. The server hears of the transaction with its first statement.
func (c *conn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	if opts != (driver.TxOptions{}) {
		t, err := c.driverConn.BeginTx(ctx, opts)
		if err != nil {
			return nil, err
		}
		return &tx{conn: c, ctx: ctx, end: t}, nil
	}
	c.begin = &tx{conn: c, ctx: ctx}
	return c.begin, nil
}

// ExecContext implements driver.ExecerContext. A statement that writes must be alone in its packet, but for START TRANSACTION before it: when another
// node's transaction aborts ours between two statements of a packet, Galera undoes the first and then runs the second by itself, outside of
// any transaction (10.11.19, measured: 77 of some thousand contested transactions in 14 s; none with one statement a packet).
func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	t := c.begin
	if t == nil {
		return c.driverConn.ExecContext(ctx, query, args)
	}
	res, err := c.driverConn.ExecContext(ctx, "START TRANSACTION;\n"+query, args)
	if errors.Is(err, driver.ErrSkip) {
		return res, err // nothing was sent
	}
	t.begun = true // or perhaps not, which ROLLBACK does not mind
	var refused *mysql.MySQLError
	if err == nil || errors.As(err, &refused) {
		c.begin = nil // else nobody knows, and no later statement may go without
	}
	return res, err // of the last statement
}

// QueryContext implements driver.QueryerContext.
func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	return c.driverConn.QueryContext(ctx, query, args)
}

// PrepareContext implements driver.ConnPrepareContext.
func (c *conn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	if err := c.start(ctx); err != nil {
		return nil, err
	}
	return c.driverConn.PrepareContext(ctx, query)
}

// start begins the transaction that the server has not heard of yet, if there is one.
func (c *conn) start(ctx context.Context) error {
	t := c.begin
	if t == nil {
		return nil
	}
	t.begun = true
	_, err := c.driverConn.ExecContext(ctx, "START TRANSACTION", nil)
	if err == nil {
		c.begin = nil
	}
	return err
}

// tx makes COMMIT end with the context of the transaction, which the driver does not.
type tx struct {
	conn  *conn
	ctx   context.Context
	begun bool      // with the first statement
	end   driver.Tx // the driver's, when it began it
}

// Commit implements driver.Tx. When the context ends while the answer is awaited, the connection is closed
// and the error says that it was lost: the transaction's fate is then unknown.
func (t *tx) Commit() error {
	stop := context.AfterFunc(t.ctx, t.conn.abort)
	defer stop()
	if t.end != nil {
		return t.end.Commit()
	}
	return t.finish("COMMIT")
}

// Rollback implements driver.Tx.
func (t *tx) Rollback() error {
	if t.end != nil {
		return t.end.Rollback()
	}
	return t.finish("ROLLBACK")
}

func (t *tx) finish(how string) error {
	t.conn.begin = nil
	if !t.begun {
		return nil // nothing was done in it
	}
	_, err := t.conn.driverConn.ExecContext(context.Background(), how, nil)
	return err
}
