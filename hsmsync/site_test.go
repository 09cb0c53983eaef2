package hsmsync_test

import (
	"context"
	"crypto"
	"fmt"
	"log/slog"
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

// load is several callers that sign again and again, in batches and one by one. They pause, or they would take the processors from those whom they wait for.
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
			time.Sleep(5 * time.Millisecond)
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
