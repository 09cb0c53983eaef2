package hsmsync_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// patience is what a request may take at worst, whatever happens to the members; most of it is allowed to the race detector
// and to the tests beside.
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
	_, err := m.Client(identity.RoleCA).Sign(s.soon(), hsm.SignRequest{Key: s.record.ID, Digests: digests(1), Incarnation: was})
	if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassSession || e.Code != hsm.CodeStaleIncarnation {
		s.t.Errorf("work for its former incarnation: %v", err)
	}
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

// TestLargeBatchesOfSlowMembers has one member stop while all work on batches that take them a while.
func TestLargeBatchesOfSlowMembers(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	rsa := s.newKey("rsa-g1", hsm.RSA3072)
	s.open("active active active")
	k, err := s.group.Key(s.soon(), string(rsa.ID))
	if err != nil {
		t.Fatal(err)
	}
	sigs, err := k.SignBatch(s.soon(), digests(5))
	if err != nil {
		t.Fatal(err)
	}
	verify(t, k, digests(5), sigs)

	for _, f := range s.faults { // as RSA is, without using up the machine
		f.Rate(150)
	}
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{t: t, stop: cancel}
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
	l.more()
	l.within("all well", patience)
	s.members[1].Freeze()
	l.within("one frozen", patience)
	s.wait("active failed active")
	l.within("one failed", patience)
	s.members[1].Thaw()
	s.wait("active active active")
	l.end()
}
