package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/journal"
)

// crash stops a node's part in a round at one of its writes, before or after it did its work.
type crash struct {
	*db.Store
	mu    sync.Mutex
	at    string
	after bool
	hit   chan struct{}
}

func (c *crash) step(name string, work func() error) error {
	c.mu.Lock()
	now := c.at == name
	if now {
		c.at = ""
	}
	c.mu.Unlock()
	if !now {
		return work()
	}
	if c.after {
		if err := work(); err != nil {
			return err
		}
	}
	close(c.hit)
	select {} // killed: nothing of it goes on
}

func (c *crash) BeginRound(ctx context.Context, r db.Round) error {
	return c.step("round", func() error { return c.Store.BeginRound(ctx, r) })
}

func (c *crash) AppendRecon(ctx context.Context, r db.Recon) error {
	return c.step(r.Event, func() error { return c.Store.AppendRecon(ctx, r) })
}

func (c *crash) CloseLane(ctx context.Context, lane, by string) (did bool, err error) {
	err = c.step("close", func() error { did, err = c.Store.CloseLane(ctx, lane, by); return err })
	return did, err
}

func (c *crash) OpenLane(ctx context.Context, node string, incarnation [16]byte, index int) (l *db.Lane, err error) {
	if index < 100 {
		return c.Store.OpenLane(ctx, node, incarnation, index)
	}
	err = c.step("open", func() error { l, err = c.Store.OpenLane(ctx, node, incarnation, index); return err })
	return l, err
}

func (c *crash) CertificatesByKey(ctx context.Context, keys []db.CertificateKey) (rows []db.Certificate, err error) {
	err = c.step("put back", func() error { rows, err = c.Store.CertificatesByKey(ctx, keys); return err })
	return rows, err
}

func (c *crash) EndRound(ctx context.Context, r db.RoundEnd) error {
	return c.step("end", func() error { return c.Store.EndRound(ctx, r) })
}

// A node is killed at each write of a round, before it and after it. Its next incarnation goes on, and everything is back.
func TestARoundIsFinishedByANodeThatWasKilledInIt(t *testing.T) {
	for _, at := range []string{"round", db.ReconBegun, "close", "open", "put back", db.ReconDone, "end"} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, done %v", at, after), func(t *testing.T) {
				c := &crash{at: at, after: after, hit: make(chan struct{})}
				s := newSite(t, func(cfg *ca.RoundsConfig) {
					if c.Store == nil {
						c.Store = cfg.Store.(*db.Store)
						cfg.Store = c
					}
				}, "ca1")
				issued := s.issueSome(t, 0, 5, "ca1")
				s.lose(t, 1, true)
				<-c.hit
				s.nodes["ca1"].kill(t)
				s.up(t, "ca1", nil)
				dbtest.Until(t, "the round has ended", func() bool { st := s.nodes["ca1"].rounds.Status(); return st.State.N > 0 && st.Err == nil })
				s.await(t, "ca1")
				s.same(t, issued, "ca1")
				s.intact(t)
			})
		}
	}
}

// kill ends a node whose part in a round hangs for ever.
func (m *member) kill(t *testing.T) {
	t.Helper()
	m.server.Close()
	m.node.stop(t)
	if err := m.held.Close(); err != nil {
		t.Error(err)
	}
	m.killed.Store(true)
}

// What the database made of a request after it lost the first certificate gives way to that one, which was released.
func TestReleasedBeatsWhatCameAfterTheLoss(t *testing.T) {
	for _, earlier := range []bool{false, true} {
		t.Run(fmt.Sprintf("an earlier round %v", earlier), func(t *testing.T) { releasedBeats(t, earlier) })
	}
}

// releasedBeats is the test; earlier has a round end between release and loss, in which both nodes did their part.
func releasedBeats(t *testing.T, earlier bool) {
	s := newSite(t, nil, "ca1", "ca2")
	issued := s.issueSome(t, 0, 3, "ca1")
	if earlier {
		if err := s.nodes["ca1"].store.BeginRound(t.Context(), db.Round{N: 1, Node: "ca1", Cause: "a test"}); err != nil {
			t.Fatal(err)
		}
		for _, m := range s.nodes {
			dbtest.Until(t, "the round has ended", func() bool { st := m.rounds.Status(); return st.State.N == 1 && st.Entered == 1 && st.Err == nil })
		}
	}
	abandoned, other := issued["k1"], issued["k2"]
	for _, m := range s.nodes {
		m.stop()
	}
	s.lose(t, 0, true)
	// A process that knows of no rounds, such as one of an older version, makes other rows meanwhile and releases none of them.
	n := s.start(t, "ca9", nil)
	intents := []db.Intent{s.rowOf(t, "k1", abandoned.Serial), s.rowOf(t, "k2", nil)}
	cert, err := x509.ParseCertificate(abandoned.DER)
	if err != nil {
		t.Fatal(err)
	}
	intents[0].TBS = cert.RawTBSCertificate
	if _, _, err := n.store.InsertIntents(t.Context(), intents); err != nil {
		t.Fatal(err)
	}
	lane, err := n.store.OpenLane(t.Context(), "ca9", n.journal.Incarnation(), 7)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := lane.Append(t.Context(), []db.Fact{{Outcome: &db.Outcome{Issuer: intents[0].Issuer, Serial: intents[0].Serial, Kind: db.OutcomeAbandoned}}}); err != nil || a[0].Err != nil {
		t.Fatal(a, err)
	}
	if err := lane.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.stop(t)
	for _, name := range s.names {
		s.up(t, name, nil)
	}
	for _, name := range s.names {
		s.await(t, name)
	}
	s.same(t, issued, "ca1", "ca2")
	store := dbtest.Open(t, s.db)
	c, err := store.Certificate(t.Context(), abandoned.Issuer, abandoned.Serial)
	if err != nil || c.Outcome == nil || c.Outcome.Ver != 2 || !bytes.Equal(c.Outcome.DER, abandoned.DER) {
		t.Errorf("the abandoned one is %+v, %v; want version 2", c, err)
	}
	if c, err = store.Certificate(t.Context(), other.Issuer, other.Serial); err != nil || c == nil || c.Intent.Ver != 2 {
		t.Errorf("the one whose request key was taken is %+v, %v; want version 2", c, err)
	} else {
		if c.Intent.TBS, err = store.TBS(t.Context(), other.Issuer, other.Serial); err != nil {
			t.Fatal(err)
		}
		if err := catest.MACKeys(t).Verify(&c.Intent); err != nil {
			t.Errorf("its intent is not as a CA node writes it: %v", err)
		}
	}
	conflicts := 0
	for _, e := range s.round(t).Recons {
		if bytes.Contains(e.Detail, []byte(`"conflicts":0`)) || e.Event != db.ReconDone {
			continue
		}
		conflicts++
	}
	if conflicts == 0 {
		t.Error("nobody reported a contradiction")
	}
}

// rowOf is an intent for the request of that key; of another serial if that is nil.
func (s *site) rowOf(t *testing.T, key string, serial []byte) db.Intent {
	t.Helper()
	if serial == nil {
		serial = append([]byte{0x35}, bytes.Repeat([]byte{7}, 19)...)
	}
	r := s.request(t, key)
	req := ca.RequestKey(r.Principal, r.IdempotencyKey)
	body := ca.BodyHash(r)
	return db.Intent{Issuer: "demo-g1", Serial: serial, Req: req[:], Body: body[:], TBS: []byte{1}, Profile: "tls-server", ProfileHash: make([]byte, 32),
		Requester: r.Principal, SiteEpoch: 1, Node: "ca9", Created: time.Now()}
}

// A journal that is older than the database's memory of the node is refused until somebody takes it upon himself.
func TestAnOlderJournalIsRefused(t *testing.T) {
	p := newPKI(t)
	a := p.start(t, "ca1", nil)
	a.mustIssue(t, ask(t, "k1"))
	a.stop(t)
	// A copy from here: an incarnation is missing in it later.
	older := filepath.Join(t.TempDir(), "older")
	copyDir(t, a.dir, older)
	b := p.startIn(t, "ca1", a.dir, nil)
	b.mustIssue(t, ask(t, "k2"))
	// And a copy of the running one: an intent is missing in it later.
	running := filepath.Join(t.TempDir(), "running")
	copyDir(t, a.dir, running)
	time.Sleep(1100 * time.Millisecond) // the clock of the rows has moved on
	b.mustIssue(t, ask(t, "k3"))
	latest := b.journal.Incarnation()
	b.stop(t)
	store := dbtest.Open(t, p.db)
	// What somebody else put there in the node's name, newer than all that it did itself, is not held against its journal.
	for i := range 20 {
		forged := db.Intent{Issuer: "demo-g1", Serial: append([]byte{0x35, byte(i)}, bytes.Repeat([]byte{7}, 18)...), Req: bytes.Repeat([]byte{byte(i)}, 32), Body: make([]byte, 32), TBS: []byte{1},
			Profile: "tls-server", ProfileHash: make([]byte, 32), Requester: "mallory", SiteEpoch: 1, Node: "ca1", Created: time.Now()}
		if i%2 == 0 {
			forged.MAC, forged.MACKey = make([]byte, 32), make([]byte, 8)
		}
		if _, _, err := store.InsertIntents(t.Context(), []db.Intent{forged}); err != nil {
			t.Fatal(err)
		}
	}
	check := func(dir string, acknowledged ...string) error {
		j, err := journal.Open(journal.Config{Dir: dir, Node: "ca1"})
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		return ca.CheckJournal(t.Context(), nodeAsCA{store}, catest.MACKeys(t), j, "ca1", acknowledged)
	}
	if err := check(a.dir); err != nil {
		t.Errorf("the right journal: %v", err)
	}
	for name, dir := range map[string]string{"an incarnation": older, "an intent": running} {
		id := hex.EncodeToString(latest[:])
		if err := check(dir); !errors.Is(err, ca.ErrJournalBehind) || !strings.Contains(err.Error(), id) {
			t.Fatalf("%s is missing: %v", name, err)
		}
		if err := check(dir, id); err != nil {
			t.Errorf("%s is missing, acknowledged: %v", name, err)
		}
	}
	if err := check(older); err != nil {
		t.Errorf("acknowledged earlier: %v", err)
	}
	// One that is not the newest is missing: another process ran from a copy.
	intents, err := store.IntentsAfter(t.Context(), "ca1", time.Now().Add(-time.Hour), 100)
	if err != nil || len(intents) != 23 {
		t.Fatal(intents, err)
	}
	intents = intents[20:] // those of before are the node's own
	foreign := db.Intent{Issuer: "demo-g1", Serial: append([]byte{0x36}, bytes.Repeat([]byte{7}, 19)...), Req: bytes.Repeat([]byte{99}, 32), Body: make([]byte, 32), TBS: []byte{1}, Profile: "tls-server",
		ProfileHash: make([]byte, 32), Requester: "somebody", SiteEpoch: 1, Node: "ca1", Created: intents[1].Created.Add(time.Millisecond)}
	catest.MACKeys(t).Seal(&foreign)
	if _, _, err := store.InsertIntents(t.Context(), []db.Intent{foreign}); err != nil {
		t.Fatal(err)
	}
	if err := check(a.dir); !errors.Is(err, ca.ErrJournalBehind) {
		t.Errorf("an intent before the newest is missing: %v", err)
	}
	if err := check(older); err != nil {
		t.Errorf("acknowledged later than that intent: %v", err)
	}
}

// nodeAsCA shows the writers of a test, whose role is another, as those of CA nodes.
type nodeAsCA struct{ *db.Store }

func (n nodeAsCA) Writers(ctx context.Context, node string) ([]db.Writer, error) {
	all, err := n.Store.Writers(ctx, node)
	for i := range all {
		all[i].Role = "ca"
	}
	return all, err
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}
