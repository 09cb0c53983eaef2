// Package db is the record: a MariaDB Galera cluster of which any node may be written.
//
// A commit there is not proof and a lost answer is normal, so the package rests on keys: all
// rows are inserts, whatever changes is a chain whose next number only one can take, and
// after an ambiguous answer the very same rows are inserted again until it is known
// which transaction holds the keys. Errors say what happened (see Class).
//
// A Store keeps small pools of connections per node. Its Run probes every node; a node that stops
// answering, leaves the primary component or turns read-only is demoted, and its connections
// are closed, so that calls in flight on it fail at once and are replayed elsewhere.
package db

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config describes how a process reaches the cluster.
type Config struct {
	Nodes        []string              // host:port, in order of preference: the first healthy one is written, the others confirm
	Name         string                // the database; "trivet" if empty
	User         string                // account, see Grant for what each may do
	PasswordFile string                // read at every new connection; surrounding white space is not part of the password. "" = none
	TLS          *tls.Config           // nil = no TLS. ServerName is filled in from the address unless verification is the config's own
	MaxConns     int                   // writing connections per node; half as many, and at least 4, for causal reads. 16 if 0
	Role         string                // the process's role, shown to the server as a connection attribute
	Now          func() time.Time      // time.Now if nil
	Log          *slog.Logger          // discarded if nil
	Metrics      prometheus.Registerer // none if nil
}

// Store is the record. Safe for concurrent use.
type Store struct {
	cfg     Config
	nodes   []*node // in order of preference
	metrics *metrics

	running atomic.Bool // Run is active; otherwise every call probes first

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when a node's health changes

	sweep   sweep
	blocked blockedCache
	audit   audit
	signs   signs
	tbs     tbsPlaces
}

// Open checks the configuration; it connects to nothing. Close the store when done.
func Open(cfg Config) (*Store, error) {
	if len(cfg.Nodes) == 0 {
		return nil, errors.New("opening database: no nodes configured")
	}
	if cfg.User == "" {
		return nil, errors.New("opening database: no user configured")
	}
	if cfg.Name == "" {
		cfg.Name = "trivet"
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 16
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	s := &Store{cfg: cfg, metrics: newMetrics(cfg.Metrics), changed: make(chan struct{})}
	for _, address := range cfg.Nodes {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return nil, fmt.Errorf("opening database: node %q: want host:port: %w", address, err)
		}
		n, err := newNode(cfg, address)
		if err != nil {
			return nil, fmt.Errorf("opening database: node %s: %w", address, err)
		}
		s.nodes = append(s.nodes, n)
		s.metrics.healthy.WithLabelValues(address).Set(0) // an alert must see a node that was never well
	}
	return s, nil
}

// Close closes every connection; calls in flight fail.
func (s *Store) Close() error {
	var errs []error
	for _, n := range s.nodes {
		errs = append(errs, n.close())
	}
	return errors.Join(errs...)
}

// NodeHealth is what the last probe of a node found.
type NodeHealth struct {
	Address  string
	Healthy  bool
	Cause    string        // why it is not healthy, "" if it is
	Slow     string        // why it gets no new work although it is healthy: its answers take far longer than its peers'; "" otherwise
	Diverged bool          // its contents are not the other nodes': it stays out of use until they are; Cause says what to do
	History  string        // state UUID; "" if it did not answer
	State    string        // the node's own word: Synced, Donor/Desynced, Joined, …; "" if it did not answer
	Size     int           // nodes in its component
	Since    time.Time     // when Healthy last changed
	Took     time.Duration // of the last answered probe

	view    view
	primary bool // synced, and in the primary component
}

// Nodes returns the health of every node, in order of preference.
func (s *Store) Nodes() []NodeHealth {
	out := make([]NodeHealth, len(s.nodes))
	for i, n := range s.nodes {
		out[i] = n.status()
	}
	return out
}

// Ready returns nil when some node can be written, else an error that names each node's trouble.
func (s *Store) Ready() error {
	var errs []string
	for _, h := range s.Nodes() {
		if h.Healthy {
			return nil
		}
		errs = append(errs, h.Address+": "+h.Cause)
	}
	return &Error{Class: NotReady, Op: "ready", Err: errors.New(strings.Join(errs, "; "))}
}

// metrics of one Store. Labels come from bounded sets: operation names, classes, configured nodes.
type metrics struct {
	attempts *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	healthy  *prometheus.GaugeVec
	demoted  *prometheus.CounterVec
	diverged *prometheus.GaugeVec
	slow     *prometheus.GaugeVec
	shed     *prometheus.CounterVec
	pending  prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_db_attempts_total",
			Help: "Attempts at the database by operation and class of the result."}, []string{"op", "class"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "trivet_db_seconds",
			Help: "Duration of an operation, retries included.", Buckets: prometheus.ExponentialBuckets(0.001, 2, 14)}, []string{"op"}),
		healthy: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "trivet_db_node_healthy",
			Help: "1 when the node can be written."}, []string{"node"}),
		demoted: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_db_demotions_total",
			Help: "Times that a node was found unfit and its connections were closed."}, []string{"node"}),
		diverged: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "trivet_db_node_diverged",
			Help: "1 when the node holds other contents than the others and is kept out of use."}, []string{"node"}),
		slow: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "trivet_db_node_slow",
			Help: "1 when the node answers far slower than its peers and gets no new work."}, []string{"node"}),
		shed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_db_shed_total",
			Help: "Times that a node got no new work any more because it was far slower than its peers."}, []string{"node"}),
		pending: prometheus.NewGauge(prometheus.GaugeOpts{Name: "trivet_db_lanes_unsettled",
			Help: "Lanes that wait to learn whether their last transaction was committed."}),
	}
	if r != nil {
		r.MustRegister(m.attempts, m.seconds, m.healthy, m.demoted, m.diverged, m.slow, m.shed, m.pending)
	}
	return m
}
