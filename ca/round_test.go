package ca_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/ca"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/journal"
)

// The database loses its last commits while the nodes run: they notice, and put back every certificate byte for byte.
func TestLostCommitsArePutBackByNodesThatRun(t *testing.T) {
	for _, c := range []struct {
		name    string
		keep    int
		intents bool
	}{{"outcomes", 2, false}, {"outcomes and intents", 2, true}, {"whole lanes", 0, true}} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, nil, "ca1", "ca2")
			issued := s.issueSome(t, 0, 12, "ca1", "ca2")
			before := s.rows(t)
			s.lose(t, c.keep, c.intents)
			dbtest.Until(t, "a round has ended", func() bool { st := s.nodes["ca2"].rounds.Status(); return st.State.N > 0 && st.Err == nil })
			s.await(t, "ca1")
			s.same(t, issued, "ca1", "ca2")
			if after := s.rows(t); !slices.Equal(before, after) {
				t.Errorf("rows differ:\n%s\nand were\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
			}
			if r := s.round(t); !r.Proved || r.End == nil {
				t.Errorf("the round is %+v", r)
			}
			s.issueSome(t, 100, 4, "ca1", "ca2")
			s.intact(t)
		})
	}
}

// Every node is down when the database loses commits. They come back in any order, the last one late or with its disk gone.
func TestLostCommitsArePutBackWhateverTheOrderOfStarts(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewSource(seed))
	for i := range 3 {
		names := []string{"ca1", "ca2"}
		random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		t.Run(fmt.Sprintf("%d: %s", i, strings.Join(names, " ")), func(t *testing.T) {
			s := newSite(t, nil, "ca1", "ca2")
			issued := s.issueSome(t, 0, 8+random.Intn(8), "ca1", "ca2")
			for _, m := range s.nodes {
				m.stop()
			}
			s.lose(t, random.Intn(4), random.Intn(2) == 0)
			for _, name := range names {
				s.up(t, name, nil)
			}
			for _, name := range names {
				s.await(t, name)
			}
			s.same(t, issued, names...)
			s.intact(t)
		})
	}
}

// The only node that knows of what is lost was restarted meanwhile: it compares before it ends the lanes of its earlier life.
func TestANodeThatWasRestartedNoticesALoss(t *testing.T) {
	s := newSite(t, nil, "ca1")
	issued := s.issueSome(t, 0, 5, "ca1")
	s.nodes["ca1"].stop()
	s.lose(t, 2, true)
	s.up(t, "ca1", nil)
	s.await(t, "ca1")
	s.same(t, issued, "ca1")
	s.intact(t)
}

// requireCopies has nodes release nothing without a copy.
func requireCopies(c *ca.RoundsConfig) { c.RequireCopy = true }

// A commit and the journal that knew of it are gone together: the copy brings the certificate back, and since nothing was released without one,
// the others go on by themselves.
func TestACopySurvivesTheLossOfDatabaseAndDisk(t *testing.T) {
	s := newSite(t, requireCopies, "ca1", "ca2", "ca3")
	issued := s.issueSome(t, 0, 6, "ca1")
	s.nodes["ca1"].stop()
	s.dirs["ca1"] = filepath.Join(t.TempDir(), "ca1") // a new disk
	s.lose(t, 1, true)
	dbtest.Until(t, "a round has ended", func() bool { st := s.nodes["ca2"].rounds.Status(); return st.State.N > 0 && st.Err == nil })
	s.same(t, issued, "ca2")
	s.up(t, "ca1", nil)
	s.await(t, "ca1")
	s.same(t, issued, "ca1", "ca2")
	s.intact(t)
}

// A node went on while its holder was away, and nobody but its disk knows: the holder's copy, which lags, must not speak for it. Neither must a
// copy that does not lag, of a node that might have gone on.
func TestACopyThatMayLagSpeaksForNobody(t *testing.T) {
	for _, away := range []bool{true, false} {
		t.Run(fmt.Sprintf("holder away %v", away), func(t *testing.T) {
			s := newSite(t, nil, "ca1", "ca2")
			issued := s.issueSome(t, 0, 3, "ca1")
			if away {
				s.nodes["ca2"].stop()
			}
			maps.Copy(issued, s.issueSome(t, 3, 3, "ca1"))
			s.nodes["ca1"].stop()
			if away {
				s.up(t, "ca2", nil)
				s.await(t, "ca2")
			}
			s.lose(t, 1, true)
			s.staysShut(t, "ca2", "ca1")
			s.up(t, "ca1", nil)
			s.await(t, "ca1")
			s.await(t, "ca2")
			s.same(t, issued, "ca1", "ca2")
			s.intact(t)
		})
	}
}

// staysShut demands that a round in which a loss is proved waits for a node, beyond the time after which others may speak for it or give it up.
func (s *site) staysShut(t *testing.T, name, absent string) {
	t.Helper()
	m := s.nodes[name]
	due := s.due(t, m)
	dbtest.Until(t, "giving up is due, and it is waited for "+absent, func() bool {
		st := m.rounds.Status()
		return st.Err != nil && time.Now().After(due) && slices.Contains(st.Waiting, absent) || st.State.N > 0 && st.Err == nil
	})
	if r := s.round(t); !r.Proved || r.End != nil {
		t.Fatalf("the round has ended without %s: %+v", absent, r)
	}
	if _, err := m.issue(t, s.request(t, "new")); ca.NameOf(err) != ca.DatabaseUnavailable || !strings.Contains(err.Error(), absent) {
		t.Fatalf("while %s is away: %v", absent, err)
	}
	// Nor is anything told that promises to be all there is, not even that there is nothing.
	if err := m.rounds.Complete(t.Context(), func() error { return nil }); ca.NameOf(err) != ca.DatabaseUnavailable || !strings.Contains(err.Error(), absent) {
		t.Fatalf("a list while %s is away: %v", absent, err)
	}
	if c, err := ca.NewViewer(m.engine).Certificate(t.Context(), "demo-g1", []byte{1, 2, 3}); ca.NameOf(err) != ca.DatabaseUnavailable {
		t.Fatalf("a certificate that is not there: %v, %v", c, err)
	}
}

// due is when a round that waits has been waiting for longer than for anybody.
func (s *site) due(t *testing.T, m *member) time.Time {
	t.Helper()
	dbtest.Until(t, "a round waits", func() bool { return len(m.rounds.Status().Waiting) > 0 })
	return time.Now().Add(4 * time.Second)
}

// A node that required copies only since after the point to which the database went back may have released what nobody holds.
func TestAPromiseIsGoodForWhatCameAfterIt(t *testing.T) {
	s := newSite(t, nil, "ca1", "ca2")
	s.nodes["ca2"].stop()
	issued := s.issueSome(t, 0, 3, "ca1") // nobody has a copy of these
	for _, m := range s.nodes {
		m.stop()
	}
	s.rounds = requireCopies
	for _, name := range s.names {
		s.up(t, name, nil)
	}
	for _, name := range s.names {
		s.await(t, name)
		dbtest.Until(t, name+" is promised", func() bool {
			_, ok := s.nodes[name].held.Promised(map[string]string{"ca1": "ca2", "ca2": "ca1"}[name])
			return ok
		})
	}
	maps.Copy(issued, s.issueSome(t, 3, 3, "ca1"))
	first := s.nodes["ca1"].journal.Incarnation()
	s.nodes["ca1"].stop()
	s.lose(t, 0, true)
	for _, q := range []string{"DELETE FROM {db}.lane WHERE incarnation = 0x%x", "DELETE FROM {db}.writer WHERE incarnation = 0x%x"} {
		cluster.Exec(t, 0, strings.ReplaceAll(fmt.Sprintf(q, first), "{db}", s.db.Name))
	}
	s.staysShut(t, "ca2", "ca1")
	s.up(t, "ca1", nil)
	s.await(t, "ca1")
	s.await(t, "ca2")
	s.same(t, issued, "ca1", "ca2")
	s.intact(t)
}

// A node that requires copies releases nothing without one. When it requires them no more it goes on alone only once everybody knows.
func TestRequiredCopiesAreWaitedFor(t *testing.T) {
	s := newSite(t, requireCopies, "ca1", "ca2")
	s.issueSome(t, 0, 2, "ca1", "ca2")
	s.nodes["ca2"].stop()
	refused := func(key, why string) {
		t.Helper()
		_, err := s.nodes["ca1"].issue(t, s.request(t, key))
		var e *ca.Error
		if !errors.As(err, &e) || !e.Retryable() || !strings.Contains(err.Error(), why) {
			t.Fatalf("without a copy: %v", err)
		}
	}
	refused("k9", "requires one")
	s.nodes["ca1"].stop()
	s.rounds = nil
	s.up(t, "ca1", nil)
	dbtest.Until(t, "ca1 runs", func() bool { return s.nodes["ca1"].engine.Running() && s.nodes["ca1"].rounds.Status().Err == nil })
	refused("k10", "requires copies no more")
	s.up(t, "ca2", nil)
	dbtest.Until(t, "ca2 knows", func() bool { _, ok := s.nodes["ca2"].held.Promised("ca1"); return !ok && s.nodes["ca1"].copier.Told() })
	s.nodes["ca2"].stop()
	s.nodes["ca1"].persist(t, s.request(t, "k11"))
	// And its next incarnation need not tell anybody anew.
	dbtest.Until(t, "ca1 has noted it", func() bool {
		state, err := s.nodes["ca1"].journal.State()
		return err == nil && !strings.Contains(string(state.Round), "copy_required")
	})
	s.nodes["ca1"].stop()
	s.up(t, "ca1", nil)
	s.await(t, "ca1")
	s.nodes["ca1"].persist(t, s.request(t, "k12"))
}

// A loss is proved, and a node that holds copies for nobody is away: what it released is nobody's to know, and issuing stays shut until it is back.
func TestAnUncoveredNodeKeepsIssuingShut(t *testing.T) {
	s := newSite(t, func(c *ca.RoundsConfig) { c.Held = nil }, "ca1", "ca2")
	issued := s.issueSome(t, 0, 6, "ca1", "ca2")
	s.nodes["ca1"].stop()
	s.lose(t, 1, true)
	s.staysShut(t, "ca2", "ca1")
	s.up(t, "ca1", nil)
	s.await(t, "ca1")
	s.await(t, "ca2")
	s.same(t, issued, "ca1", "ca2")
	s.intact(t)
}

// A suspicion without a loss costs a short pause, and a node that is away is waited for no longer than that.
func TestASuspicionWithoutALossEnds(t *testing.T) {
	s := newSite(t, func(c *ca.RoundsConfig) { c.Held = nil }, "ca1", "ca2")
	issued := s.issueSome(t, 0, 4, "ca1", "ca2")
	s.nodes["ca1"].stop()
	m := s.nodes["ca2"]
	if err := m.store.BeginRound(t.Context(), db.Round{N: 1, Node: "ca2", Cause: "a test"}); err != nil {
		t.Fatal(err)
	}
	dbtest.Until(t, "the round has ended", func() bool { st := m.rounds.Status(); return st.State.N == 1 && st.Err == nil })
	s.same(t, issued, "ca2")
	// The one that was away comes back into a round that ended without it.
	s.up(t, "ca1", nil)
	s.await(t, "ca1")
	s.same(t, issued, "ca1", "ca2")
	s.issueSome(t, 10, 4, "ca1", "ca2")
	s.intact(t)
}

// watched is a database at which a frozen node does not look.
type watched struct {
	*db.Store
	frozen atomic.Bool
	once   sync.Once
	thaw   chan struct{}
}

func (w *watched) open() { w.once.Do(func() { close(w.thaw) }) }

func (w *watched) RoundState(ctx context.Context) (db.RoundState, error) {
	if w.frozen.Load() {
		<-w.thaw
	}
	return w.Store.RoundState(ctx)
}

// A node is frozen after its read-back, the database loses the row, and the others go on without the node: when it wakes up it releases nothing
// of before, and the request is answered with one certificate.
func TestANodeThatWakesUpReleasesNothingFromBefore(t *testing.T) {
	for _, point := range []string{steps[5], steps[6]} {
		t.Run(point, func(t *testing.T) {
			s := newSite(t, requireCopies, "ca1", "ca2")
			s.issueSome(t, 0, 4, "ca1", "ca2")
			s.nodes["ca1"].stop()
			g := newGate(point)
			defer g.open()
			watch := &watched{thaw: make(chan struct{})}
			defer watch.open()
			s.rounds = func(c *ca.RoundsConfig) { requireCopies(c); watch.Store = c.Store.(*db.Store); c.Store = watch }
			s.up(t, "ca1", func(c *ca.Config) func(*ca.Engine) { return g.interpose(c) })
			s.await(t, "ca1")
			hold := s.nodes["ca1"]
			dbtest.Until(t, "ca1 has a second holder", func() bool { name, _ := hold.copier.Holder(); return name == "ca2" })
			type answer struct {
				issued *ca.Issued
				err    error
			}
			first := make(chan answer, 1)
			r := s.request(t, "contested")
			go func() {
				issued, err := hold.engine.Issue(context.Background(), r)
				first <- answer{issued, err}
			}()
			<-g.reached
			watch.frozen.Store(true) // what watches the database is frozen as well
			s.lose(t, 0, true)
			dbtest.Until(t, "a round has ended", func() bool { st := s.nodes["ca2"].rounds.Status(); return st.State.N > 0 && st.Err == nil })
			second := s.nodes["ca2"].persist(t, r)
			g.thaw()
			got := <-first
			if point == steps[6] && got.err == nil {
				t.Error("what was read before the round was released after it")
			}
			watch.open()
			if got.err == nil && !bytes.Equal(got.issued.DER, second.DER) {
				t.Error("one request was answered with two certificates")
			}
			dbtest.Until(t, "ca1 has learnt of the round and done its part", func() bool { st := hold.rounds.Status(); return st.State.N > 0 && st.Err == nil })
			s.same(t, map[string]*ca.Issued{"contested": second}, "ca1", "ca2")
			s.intact(t)
		})
	}
}

// A second holder that is away is passed over while two database nodes confirm, and gets what it missed when it is back.
func TestAHolderThatWasAwayGetsWhatItMissed(t *testing.T) {
	s := newSite(t, nil, "ca1", "ca2")
	s.issueSome(t, 0, 3, "ca1")
	s.nodes["ca2"].stop()
	s.issueSome(t, 3, 3, "ca1")
	if _, lag := s.nodes["ca1"].copier.Holder(); lag != 3 {
		t.Errorf("%d records lack a copy, want 3", lag)
	}
	s.up(t, "ca2", nil)
	s.await(t, "ca2")
	dbtest.Until(t, "ca2 has it all", func() bool { _, lag := s.nodes["ca1"].copier.Holder(); return lag == 0 })
	n := 0
	if err := s.nodes["ca2"].held.Each(func(owner, _ string, d journal.Done) error {
		if owner == "ca1" && d.Kind == journal.DoneCert {
			n++
		}
		return nil
	}); err != nil || n != 6 {
		t.Errorf("%d records are held, want 6 (%v)", n, err)
	}
}

// oneNode is a database of which a single node is healthy.
type oneNode struct{ *db.Store }

func (o oneNode) Nodes() []db.NodeHealth { return o.Store.Nodes()[:1] }

func TestWithOneDatabaseNodeTheSecondHolderIsMandatory(t *testing.T) {
	s := newSite(t, func(c *ca.RoundsConfig) { c.Store = oneNode{c.Store.(*db.Store)} }, "ca1", "ca2")
	s.issueSome(t, 0, 2, "ca1", "ca2")
	s.nodes["ca2"].stop()
	_, err := s.nodes["ca1"].issue(t, s.request(t, "alone"))
	var e *ca.Error
	if !errors.As(err, &e) || !e.Retryable() || !strings.Contains(err.Error(), "one database node") {
		t.Errorf("without a second holder: %v", err)
	}
	if s.nodes["ca1"].rounds.Status().Alone == nil {
		t.Error("the node does not tell that it releases nothing without a second holder")
	}
	s.up(t, "ca2", nil)
	dbtest.Until(t, "ca1 releases again", func() bool { _, err := s.nodes["ca1"].issue(t, s.request(t, "alone")); return err == nil })
}
