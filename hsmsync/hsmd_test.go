package hsmsync_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsmsync"
	"trivet/identity"
)

// site is members that are hsmd processes on tokens of their own, in one domain, with one live key, and the group's log.
type site struct {
	t       testing.TB
	lab     *hsmtest.Lab
	members []*hsmtest.Member
	faults  []hsmtest.Faults
	chain   *memory
	record  hsm.KeyRecord
	metrics *prometheus.Registry
	config  hsmsync.Config
	group   *hsmsync.Group
	key     *hsmsync.Key
}

// newSite makes a site of n members, hsmd-a and so on, which all have modules with faults on demand.
func newSite(t testing.TB, n int, extra ...string) *site {
	t.Helper()
	if testing.Short() {
		t.Skip("needs an HSM")
	}
	s := &site{t: t, lab: hsmtest.NewLab(t), chain: &memory{}, metrics: prometheus.NewRegistry()}
	for range n {
		s.add(extra...)
	}
	for i, m := range s.members {
		s.enter(m, []string{"east", "west"}[i/2], "active")
	}
	s.record = s.newKey("issuing-g1", hsm.P256)
	s.config = hsmsync.Config{
		Group: "ca", Identity: s.lab.Identity(identity.RoleCA, "ca1"), Manifest: manifest{s.chain}, Site: "west", Metrics: s.metrics,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	return s
}

// add starts one more member, in the domain of the first.
func (s *site) add(extra ...string) *hsmtest.Member {
	s.t.Helper()
	m, f := s.lab.Faulty(fmt.Sprintf("hsmd-%c", 'a'+len(s.members)), extra...)
	m.Serve()
	s.members, s.faults = append(s.members, m), append(s.faults, f)
	if len(s.members) > 1 {
		if err := m.Join(s.members[0]); err != nil {
			s.t.Fatal(err)
		}
	} else if err := m.Client(identity.RoleSync).GenerateDomain(s.soon(), string(hsm.NewKeyID())); err != nil {
		s.t.Fatal(err)
	}
	return m
}

// enter has a member join the group, and then what events say.
func (s *site) enter(m *hsmtest.Member, at string, events ...string) {
	s.t.Helper()
	info := m.WaitReady()
	s.chain.enter(s.t, "member", m.Name, hsmsync.MemberEntry{
		Address: m.Addr, Site: at, TokenSerial: info.TokenSerial, TokenLabel: info.TokenLabel, Transport: info.Transport,
	})
	for _, e := range events {
		s.chain.enter(s.t, e, m.Name, hsmsync.Note{})
	}
}

// newKey makes a key on the first member, clones it to the others and enters it as live.
func (s *site) newKey(label string, a hsm.Algorithm) hsm.KeyRecord {
	s.t.Helper()
	r, err := s.members[0].Client(identity.RoleSync).Generate(s.soon(), hsm.KeySpec{ID: hsm.NewKeyID(), Label: label, Purpose: hsm.PurposeCA, Algorithm: a})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, m := range s.members[1:] {
		s.clone(r, m)
	}
	s.chain.live(s.t, r)
	return r
}

// clone brings a key from the first member to another.
func (s *site) clone(r hsm.KeyRecord, to *hsmtest.Member) {
	s.t.Helper()
	blob, err := s.members[0].Client(identity.RoleSync).Export(s.soon(), r.ID, "")
	if err == nil {
		_, err = to.Client(identity.RoleSync).Import(s.soon(), blob)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) soon() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	s.t.Cleanup(cancel)
	return ctx
}

// open runs the group until the test ends and waits until all members are what states says.
func (s *site) open(states string) {
	s.t.Helper()
	var err error
	if s.group, err = hsmsync.New(s.config); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(run(s.t, s.group))
	s.wait(states)
	if s.key, err = s.group.Key(s.soon(), string(s.record.ID)); err != nil {
		s.t.Fatal(err)
	}
}

// wait waits until the members, in order, are what is said.
func (s *site) wait(states string) {
	s.t.Helper()
	eventually(s.t, "the members are "+states, func() (string, bool) {
		got := statesOf(s.group)
		return fmt.Sprintf("%s: %+v", got, s.group.Status().Groups[0].Members), got == states
	})
}

// eventually waits for a condition that says what is the case while it does not hold.
func eventually(t testing.TB, what string, condition func() (string, bool)) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		is, ok := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s; it is %s", what, is)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// load is several callers that sign all the time, in batches and one by one.
type load struct {
	t              testing.TB
	stop           context.CancelFunc
	all            sync.WaitGroup
	signed, failed atomic.Int64
	worst          atomic.Int64 // nanoseconds that one request took, since it was last asked for
}

func (s *site) load() *load {
	ctx, cancel := context.WithCancel(s.t.Context())
	l := &load{t: s.t, stop: cancel}
	one := func(n int, sign func([][]byte) ([][]byte, error)) {
		for ds := digests(n); ctx.Err() == nil; {
			began := time.Now()
			sigs, err := sign(ds)
			took := time.Since(began)
			for old := l.worst.Load(); int64(took) > old && !l.worst.CompareAndSwap(old, int64(took)); old = l.worst.Load() {
			}
			if err != nil {
				l.failed.Add(1)
				s.t.Errorf("after %v: %v", took, err)
				continue
			}
			for i := range sigs {
				if hsm.Verify(s.key.Public(), ds[i], sigs[i]) != nil {
					s.t.Error("a signature was released that does not verify")
				}
			}
			l.signed.Add(int64(n))
		}
	}
	for range 2 {
		l.all.Go(func() {
			one(16, func(ds [][]byte) ([][]byte, error) {
				sctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				return s.key.SignBatch(sctx, ds)
			})
		})
		l.all.Go(func() {
			one(1, func(ds [][]byte) ([][]byte, error) {
				sig, err := s.key.Sign(nil, ds[0], crypto.SHA256)
				return [][]byte{sig}, err
			})
		})
	}
	s.t.Cleanup(func() { cancel(); l.all.Wait() })
	return l
}

// more waits until some more was signed, in the present state of affairs.
func (l *load) more() {
	l.t.Helper()
	from := l.signed.Load()
	eventually(l.t, "signing goes on", func() (string, bool) { n := l.signed.Load(); return fmt.Sprint(n), n > from+100 })
}

// within fails unless no request since the last call took longer than d.
func (l *load) within(what string, d time.Duration) {
	l.t.Helper()
	l.more()
	worst := time.Duration(l.worst.Swap(0))
	l.t.Logf("%s: worst %v", what, worst.Round(time.Millisecond))
	if worst > d {
		l.t.Errorf("%s: worst %v, want %v", what, worst, d)
	}
}

// end ends the load; no request may have failed.
func (l *load) end() {
	l.t.Helper()
	l.stop()
	l.all.Wait()
	if l.failed.Load() != 0 {
		l.t.Errorf("%d requests failed", l.failed.Load())
	}
}

// patience is what a request may take at worst on a machine that has little else to do; the race detector and other tests
// are allowed as much again.
const patience = time.Second

// TestRealMembers is several scenarios over the same three members: starting them takes longer than all else.
func TestRealMembers(t *testing.T) {
	t.Parallel() // with others: all mostly wait for processes
	s := newSite(t, 3)
	s.open("active active active")
	for _, scenario := range []struct {
		name string
		do   func(*site)
	}{
		{"signing goes on while each in turn is killed, frozen and hung", eachInTurn},
		{"two at once stop without a word", twoFrozen},
		{"a restart is noticed before work goes astray", restarted},
		{"a standby is promoted and steps back", standby},
		{"a drained member gets no work", drained},
		{"a member joins while the group runs", joined},
		{"the database goes, and comes back with less", withoutDatabase},
		{"all are lost and one returns", allLost},
		{"a wrong signature is not released", wrongSignature},
	} {
		if !t.Run(scenario.name, func(t *testing.T) {
			outer := s.t
			s.t = t
			defer func() { s.t = outer }()
			scenario.do(s)
		}) {
			return
		}
	}
}

// others is what the members are when all are active but the i-th.
func (s *site) others(i int, state string) string {
	states := strings.Fields(strings.Repeat("active ", len(s.members)))
	states[i] = state
	return strings.Join(states, " ")
}

func eachInTurn(s *site) {
	well := s.others(0, "active")
	l := s.load()
	l.within("all well", patience)
	for i, m := range s.members {
		m.Kill()
		l.within(m.Name+" killed", patience)
		s.wait(s.others(i, "failed"))
		m.Start()
		s.wait(well)
		l.within(m.Name+" started", patience)

		m.Freeze()
		l.within(m.Name+" frozen", patience)
		s.wait(s.others(i, "failed"))
		m.Thaw()
		s.wait(well)
		l.within(m.Name+" thawed", patience)

		s.faults[i].Set("hang", "")
		l.within(m.Name+"'s module hung", patience)
		m.Exit() // by itself
		s.faults[i].Clear("hang")
		m.Start()
		s.wait(well)
		l.within(m.Name+" started anew", patience)
	}
	l.end()
}

func twoFrozen(s *site) {
	l := s.load()
	l.more()
	s.members[0].Freeze()
	s.members[2].Freeze()
	l.within("two frozen", patience)
	s.wait("failed active failed")
	s.members[0].Thaw()
	s.members[2].Thaw()
	s.wait("active active active")
	l.end()
}

func restarted(s *site) {
	l := s.load()
	m := s.members[1]
	was := s.group.Status().Groups[0].Members[1].Incarnation
	m.Restart()
	s.t.Logf("%s is %s again, and the group thinks it is %s", m.Name, m.WaitReady().Incarnation, was)
	s.wait("active active active")
	if is := s.group.Status().Groups[0].Members[1]; is.Incarnation == was || is.Keys[0].State != "verified" {
		s.t.Errorf("%+v", is)
	}
	l.within("restarted", patience)
	l.end()
}

// sign signs n times, one after the other.
func (s *site) sign(n int) {
	s.t.Helper()
	for range n {
		if _, err := s.key.SignBatch(s.soon(), digests(1)); err != nil {
			s.t.Fatal(err)
		}
	}
}

// share says for which members, in order, of a hundred signatures there were some.
func (s *site) share() (out string) {
	s.t.Helper()
	counts := func() (n []float64) {
		for _, m := range s.members {
			n = append(n, series(s.t, s.metrics, "sign_seconds", m.Name))
		}
		return n
	}
	before := counts()
	s.sign(100)
	for i, n := range counts() {
		if n > before[i] {
			out += "x"
		} else {
			out += "-"
		}
	}
	return out
}

func (s *site) expectShare(want string) {
	s.t.Helper()
	if got := s.share(); got != want {
		s.t.Errorf("work went to %s, want %s (members are %s)", got, want, statesOf(s.group))
	}
}

func standby(s *site) {
	s.chain.enter(s.t, "standby", "hsmd-c", hsmsync.Note{})
	s.wait("active active standby")
	s.expectShare("xx-")
	s.members[0].Kill()
	s.members[1].Kill()
	s.sign(1)
	s.wait("failed failed standby")
	s.expectShare("--x")
	s.members[1].Start()
	s.wait("failed active standby")
	s.expectShare("-x-")
	s.members[0].Start()
	s.chain.enter(s.t, "active", "hsmd-c", hsmsync.Note{})
	s.wait("active active active")
	s.expectShare("xxx")
}

func drained(s *site) {
	l := s.load()
	s.chain.enter(s.t, "drain", "hsmd-b", hsmsync.Note{})
	s.wait("active drained active")
	eventually(s.t, "it has done what it was given", func() (string, bool) {
		n := s.group.Status().Groups[0].Members[1].InFlight
		return fmt.Sprint(n), n == 0
	})
	s.expectShare("x-x")
	s.chain.enter(s.t, "active", "hsmd-b", hsmsync.Note{})
	s.wait("active active active")
	s.expectShare("xxx")
	l.end()
}

func joined(s *site) {
	l := s.load()
	m := s.add()
	s.enter(m, "west")
	s.wait("active active active joining")
	s.expectShare("xxx-")
	s.clone(s.record, m)
	s.chain.enter(s.t, "active", m.Name, hsmsync.Note{})
	s.wait("active active active active")
	s.expectShare("xxxx")
	policy := hsmsync.NewState().Policy
	policy.Prefer = hsmsync.PreferLocal
	s.chain.enter(s.t, "policy", "group", policy)
	eventually(s.t, "members of the own site are preferred", func() (string, bool) { got := s.share(); return got, got == "--xx" })
	policy.Prefer = hsmsync.PreferRandom
	s.chain.enter(s.t, "policy", "group", policy)
	eventually(s.t, "no site is preferred", func() (string, bool) { got := s.share(); return got, got == "xxxx" })
	s.chain.enter(s.t, "remove", m.Name, hsmsync.Note{})
	s.wait("active active active")
	s.members, s.faults = s.members[:3], s.faults[:3]
	m.Kill()
	l.end()
}

func withoutDatabase(s *site) {
	l := s.load()
	s.chain.fail(errors.New("database is gone"))
	s.members[0].Restart()
	s.wait("active active active")
	l.within("no database", patience)
	s.chain.fail(nil)
	s.chain.enter(s.t, "drain", "hsmd-b", hsmsync.Note{})
	s.wait("active drained active")
	s.chain.cut(1)
	s.chain.enter(s.t, "standby", "hsmd-a", hsmsync.Note{})
	s.wait("standby active active")
	l.within("a database that went on otherwise", patience)
	s.chain.enter(s.t, "active", "hsmd-a", hsmsync.Note{})
	s.wait("active active active")
	l.end()
}

func allLost(s *site) {
	for _, m := range s.members {
		m.Kill()
	}
	s.wait("failed failed failed")
	began := time.Now()
	if _, err := s.key.SignBatch(s.soon(), digests(1)); !errors.Is(err, hsmsync.ErrNoMember) || time.Since(began) > patience {
		s.t.Fatalf("after %v: %v", time.Since(began), err)
	}
	s.members[1].Start()
	s.members[1].WaitReady()
	began = time.Now()
	eventually(s.t, "signing resumes", func() (string, bool) {
		_, err := s.key.SignBatch(s.soon(), digests(1))
		return fmt.Sprint(err), err == nil
	})
	s.t.Logf("signing resumed %v after a member was well", time.Since(began).Round(time.Millisecond))
	if d := time.Since(began); d > 5*time.Second {
		s.t.Errorf("signing resumed after %v", d)
	}
	s.members[0].Start()
	s.members[2].Start()
	s.wait("active active active")
}

func wrongSignature(s *site) {
	l := s.load()
	s.faults[2].Set("C_Sign", "keys flip")
	s.wait("active active quarantined")
	l.within("a member that signs wrongly", patience)
	s.expectShare("xx-")
	s.faults[2].Clear("C_Sign")
	s.members[2].Restart()
	s.expectShare("xx-") // a new incarnation is no excuse
	s.chain.enter(s.t, "recover", "hsmd-c", hsmsync.Note{})
	s.wait("active active active")
	s.expectShare("xxx")
	l.end()
}

// TestLargeBatchesOfASlowAlgorithm has one member stop while all sign RSA batches.
func TestLargeBatchesOfASlowAlgorithm(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	s.record = s.newKey("rsa-g1", hsm.RSA3072)
	s.open("active active active")
	l := &load{t: t}
	ctx, cancel := context.WithCancel(t.Context())
	l.stop = cancel
	for range 2 {
		l.all.Go(func() {
			for ds := digests(64); ctx.Err() == nil; {
				began := time.Now()
				sigs, err := s.key.SignBatch(s.soon(), ds)
				l.worst.Store(max(l.worst.Load(), int64(time.Since(began))))
				if err != nil {
					t.Errorf("after %v: %v", time.Since(began), err)
					l.failed.Add(1)
				}
				l.signed.Add(int64(len(sigs)))
			}
		})
	}
	l.more()
	l.within("all well", 2*patience)
	s.members[1].Freeze()
	l.within("one frozen", 2*patience)
	s.wait("active failed active")
	s.members[1].Thaw()
	s.wait("active active active")
	l.end()
}
