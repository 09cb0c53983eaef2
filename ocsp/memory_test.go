package ocsp_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sort"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/db"
	"trivet/ocsp"
)

// memory is a Record that can be cut off, and whose nodes can be given other histories. It asserts its contract.
type memory struct {
	mu          sync.Mutex
	incarnation [16]byte
	lanes       map[string][]db.FeedRow
	accused     []string
	altered     map[string]func([]db.FeedRow) []db.FeedRow // what a node shows instead
	nodes       []string
	members     []db.Member
	generations []ocsp.Generation
	err         error
	reads       int
	hold        chan struct{} // while set, Head answers only after it is closed
	waiting     int           // calls of Head that ever waited for that
}

func newMemory(nodes ...string) *memory {
	return &memory{lanes: map[string][]db.FeedRow{}, altered: map[string]func([]db.FeedRow) []db.FeedRow{}, nodes: nodes, incarnation: [16]byte{1}}
}

func (m *memory) Head(ctx context.Context, except string, vector map[string]uint64, limit int) (ocsp.Head, string, error) {
	m.mu.Lock()
	hold := m.hold
	if hold != nil {
		m.waiting++
	}
	m.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ocsp.Head{}, "", ctx.Err()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads++
	if m.err != nil {
		return ocsp.Head{}, "", m.err
	}
	node := m.nodes[0]
	if node == except && len(m.nodes) > 1 {
		node = m.nodes[1]
	}
	var head ocsp.Head
	var names []string
	for name := range m.lanes {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		rows := m.lanes[name]
		if alter := m.altered[node]; alter != nil {
			rows = alter(append([]db.FeedRow(nil), rows...))
		}
		for _, row := range rows {
			if row.Seq > vector[name] {
				head.Rows = append(head.Rows, row)
			}
		}
	}
	if len(head.Rows) > limit {
		head.Rows, head.More = head.Rows[:limit], true
	}
	if n := len(m.members); n > 0 {
		tip := m.members[n-1]
		head.Member = &tip
	}
	return head, node, nil
}

func (m *memory) Join(context.Context) (uint32, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return 0, m.err
	}
	return m.member("in", m.incarnation), nil
}

func (m *memory) Leave(_ context.Context, n uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if uint32(len(m.members)) == n {
		m.member("out", m.incarnation)
	}
	return nil
}

func (m *memory) Accuse(node, lane string, seq uint64) {
	m.locked(func() { m.accused = append(m.accused, fmt.Sprintf("%s %s %d", node, lane, seq)) })
}

func (m *memory) Generations(context.Context) ([]ocsp.Generation, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	return append([]ocsp.Generation(nil), m.generations...), nil
}

// member appends a membership row; the caller holds mu.
func (m *memory) member(event string, incarnation [16]byte) uint32 {
	n := uint32(len(m.members) + 1)
	m.members = append(m.members, db.Member{VA: "ocsp1", N: n, Event: event, Policy: "strict", Incarnation: incarnation[:]})
	return n
}

// locked runs f with the record locked.
func (m *memory) locked(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

// add appends one row to a lane and returns its seq.
func (m *memory) add(lane string, kind db.FeedKind, issuer string, serial []byte, p db.FeedPayload) uint64 {
	payload, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	rows := m.lanes[lane]
	row := db.FeedRow{Lane: lane, Seq: uint64(len(rows) + 1), Kind: kind, Issuer: issuer, Serial: serial, Payload: payload}
	var prev [32]byte
	if len(rows) > 0 {
		prev = rows[len(rows)-1].Chain
	}
	row.Chain = db.ChainHash(prev, row)
	m.lanes[lane] = append(rows, row)
	return row.Seq
}

func (m *memory) issue(issuer string, serial []byte) uint64 {
	return m.add("ca1/0", db.FeedCert, issuer, serial, db.FeedPayload{NotAfter: time.Now().AddDate(0, 0, 60).Unix()})
}

func (m *memory) revoke(issuer string, serial []byte, reason uint8) uint64 {
	return m.add("ca2/0", db.FeedRevocation, issuer, serial,
		db.FeedPayload{N: 1, Event: "revoke", Reason: reason, Date: time.Now().Unix()})
}

func (m *memory) generation(a *authority, crl []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	g := ocsp.Generation{Issuer: a.name + "-g1", CA: a.name, Certificate: a.cert.Raw, CRL: crl,
		Responder: &ocsp.Responder{KeyGroup: "va", KeyID: a.name, Certificate: a.responder.Raw}}
	for i := range m.generations {
		if m.generations[i].Issuer == g.Issuer {
			m.generations[i] = g
			return
		}
	}
	m.generations = append(m.generations, g)
}

func (m *memory) cut(err error) { m.locked(func() { m.err = err }) }

// clock is a CLOCK_BOOTTIME that tests move.
type clock struct{ ns atomic.Int64 }

func (c *clock) read() (time.Duration, error) { return time.Duration(c.ns.Load()), nil }
func (c *clock) advance(d time.Duration)      { c.ns.Add(int64(d)) }

// node is a running VA over a memory.
type node struct {
	*ocsp.VA
	record *memory
	clock  *clock
	stop   func()
}

type option func(*ocsp.Config)

func start(t testing.TB, record *memory, authorities []*authority, options ...option) *node {
	t.Helper()
	n := &node{record: record, clock: &clock{}}
	n.clock.advance(time.Hour)
	cfg := ocsp.Config{
		Node: "ocsp1", Incarnation: record.incarnation, Record: record, BootTime: n.clock.read,
		Log: slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Signer: func(_ context.Context, _, key string) (ocsp.Signer, error) {
			for _, a := range authorities {
				if a.name == key {
					return a.signer, nil
				}
			}
			return nil, fmt.Errorf("no key %s", key)
		},
	}
	for _, o := range options {
		o(&cfg)
	}
	va, err := ocsp.New(cfg)
	must(t, err)
	n.VA = va
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- va.Run(ctx) }()
	var once sync.Once
	n.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("running the VA: %v", err)
			}
		})
	}
	t.Cleanup(n.stop)
	return n
}

func policy(p ocsp.Policy) option { return func(c *ocsp.Config) { c.Policy = p } }

// settle waits until the node has joined and every status is signed.
func (n *node) settle(t testing.TB) {
	t.Helper()
	eventually(t, "joined and everything signed", func() bool {
		p := n.Position()
		if !p.Joined {
			return false
		}
		for _, is := range p.Issuers {
			if is.Unsigned > 0 {
				return false
			}
		}
		return true
	})
}

// polled waits until a causal read that began after the call was applied.
func (n *node) polled(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	must(t, n.Poll(ctx))
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if cond() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never came true: %s", what)
		}
	}
}

type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Logf("%s", b)
	return len(b), nil
}
