package hsmsync_test

import (
	"context"
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
)

// given signs n times and says how many digests each member, in order, was given for it.
func (b *bed) given(n int) (out []int) {
	b.t.Helper()
	before := make([]int, len(b.members))
	for i, m := range b.members {
		before[i] = m.signed()
	}
	for range n {
		b.sign(1)
	}
	for i, m := range b.members {
		out = append(out, m.signed()-before[i])
	}
	return out
}

func (s *software) signed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.digests
}

func (b *bed) expectGiven(n int, want ...int) {
	b.t.Helper()
	if got := b.given(n); fmt.Sprint(got) != fmt.Sprint(want) {
		b.t.Fatalf("of %d signatures the members made %v, want %v (they are %s)", n, got, want, b.states())
	}
}

// settle gives the group time to read the log and have keys proved.
func settle() { time.Sleep(5 * time.Second) }

func TestAStandbyWorksOnlyWhileNoActiveMemberCan(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.enter(t, "standby", "c", hsmsync.Note{})
		settle()
		b.expect("active active standby")
		b.expectGiven(30, 15, 15, 0)
		b.members[0].with("sign", failing(hsm.ClassOverloaded)) // full is not gone
		b.members[1].with("*", dead)
		settle()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := b.key.SignBatch(ctx, digests(1)); err == nil || b.members[2].signed() != 0 {
			t.Fatalf("the standby worked while an active member was merely full: %v", err)
		}
		b.members[0].with("*", dead)
		b.members[0].with("sign", nil)
		b.sign(1) // promoted within the request
		settle()
		b.expect("failed failed standby")
		b.expectGiven(10, 0, 0, 10)
		if n, err := b.group.Ready(string(b.record.ID)); n != 1 || err != nil {
			t.Errorf("ready on %d: %v", n, err)
		}
		b.members[1].with("*", nil)
		settle()
		b.expect("failed active standby")
		b.expectGiven(10, 0, 10, 0)
		b.chain.enter(t, "active", "c", hsmsync.Note{})
		settle()
		b.expectGiven(10, 0, 5, 5)
	})
}

func TestASiteIsPreferredAsThePolicySays(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) { // a and b are in the east, c in the west
		prefer := func(p hsmsync.Policy) {
			t.Helper()
			b.chain.enter(t, "policy", "group", p)
			settle()
		}
		p := hsmsync.NewState().Policy
		b.expectGiven(30, 10, 10, 10)
		p.Prefer = hsmsync.PreferLocal
		prefer(p)
		b.expectGiven(10, 0, 0, 10)
		b.members[2].with("*", dead)
		settle()
		b.expectGiven(10, 5, 5, 0)
		b.members[2].with("*", nil)
		settle()
		b.expectGiven(10, 0, 0, 10) // it has returned by itself
		p.Prefer, p.Sites = hsmsync.PreferPriority, []string{"north", "east"}
		prefer(p)
		b.expectGiven(10, 5, 5, 0)
		p.Prefer = hsmsync.PreferRandom
		prefer(p)
		b.expectGiven(30, 10, 10, 10)
	}, func(_ *bed, cfg *hsmsync.Config) { cfg.Site = "west" })
}

func TestMembersComeAndGoWhileTheGroupRuns(t *testing.T) {
	var connected []string
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.enter(t, "drain", "a", hsmsync.Note{Why: "new firmware"})
		settle()
		b.expect("drained active active")
		asked := b.members[0].count("health")
		b.expectGiven(30, 0, 15, 15)
		if b.members[0].count("health") != asked {
			t.Error("a drained member is asked for its health")
		}

		d := newSoftware("d")
		b.members = append(b.members, d)
		b.join(d, "west")
		settle()
		b.expect("drained active active joining")
		b.expectGiven(20, 0, 10, 10, 0)
		d.set(func() { d.keys[b.record.ID] = b.members[1].keys[b.record.ID] })
		b.chain.enter(t, "active", "d", hsmsync.Note{})
		settle()
		b.expect("drained active active active")
		b.expectGiven(30, 0, 10, 10, 10)

		b.chain.enter(t, "active", "a", hsmsync.Note{})
		proofs := b.members[0].count("challenge")
		settle()
		if b.members[0].count("challenge") != proofs+1 {
			t.Error("it has work again without a new proof")
		}
		b.expectGiven(40, 10, 10, 10, 10)

		b.chain.enter(t, "remove", "b", hsmsync.Note{})
		settle()
		b.expect("active active active")
		asked = b.members[1].count("health")
		b.expectGiven(30, 10, 0, 10, 10)
		if b.members[1].count("health") != asked {
			t.Error("a removed member is asked for its health")
		}

		// Another token under the name of one that was removed, at another address.
		anew := newSoftware("b")
		anew.serial = "another"
		anew.keys[b.record.ID] = b.members[2].keys[b.record.ID]
		b.members[1] = anew
		b.byName["b"] = anew
		b.chain.enter(t, "member", "b", hsmsync.MemberEntry{Address: "elsewhere:1", TokenSerial: "another"})
		b.chain.enter(t, "active", "b", hsmsync.Note{})
		settle()
		b.expect("active active active active")
		b.expectGiven(40, 10, 10, 10, 10)
		if last := connected[len(connected)-1]; last != "b elsewhere:1" {
			t.Errorf("connected to %v", connected)
		}
	}, func(b *bed, cfg *hsmsync.Config) {
		connect := cfg.Connect
		cfg.Connect = func(m hsmsync.Member) hsmsync.Agent {
			connected = append(connected, m.Name+" "+m.Address)
			return connect(m)
		}
	})
}

func TestAMemberThatWasRestartedRefusesWorkForItsOldIncarnation(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		m := b.members[0]
		m.restart()
		asked := m.count("health")
		for m.count("sign") == 0 {
			b.sign(1) // by another
		}
		synctest.Wait()
		if m.signed() != 0 || m.count("health") == asked {
			t.Errorf("it signed %d digests; asked for its health %d times more", m.signed(), m.count("health")-asked)
		}
		b.sign(20)
		b.expectGiven(10, 0, 5, 5) // not before all is proved anew and it is well for a while
		settle()
		b.expect("active active active")
		b.expectGiven(30, 10, 10, 10)
	})
}

func TestAnotherEpochIsRefusedOnceByEachMember(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[0].set(func() { b.members[0].epoch.Epoch = 2 })
		b.members[1].set(func() { b.members[1].epoch.Epoch = 1 }) // a member that has not heard of the promotion
		b.members[2].set(func() { b.members[2].epoch.Epoch = 2 })
		settle()
		b.expectGiven(30, 15, 0, 15)
		if n := b.members[1].count("sign"); n != 0 {
			t.Errorf("the member known to be at another epoch was asked %d times", n)
		}
		b.chain.enter(t, "standby", "c", hsmsync.Note{}) // at another site, say, which was promoted
		b.members[0].set(func() { b.members[0].epoch.Epoch = 1 })
		settle()
		b.expectGiven(10, 0, 0, 10)
		for _, m := range b.members {
			m.set(func() { m.epoch.Epoch, m.calls["sign"] = 3, 0 })
		}
		_, err := b.key.SignBatch(t.Context(), digests(1))
		if hsm.ClassOf(err) != hsm.ClassDenied || !strings.Contains(err.Error(), "EPOCH") {
			t.Fatalf("error %v", err)
		}
		for _, m := range b.members {
			if n := m.count("sign"); n != 1 {
				t.Errorf("%s was asked %d times", m.name, n)
			}
		}
		b.expect("active active standby")
		settle()
		if n, err := b.group.Ready(string(b.record.ID)); n != 0 || err == nil {
			t.Errorf("ready on %d members that are known to refuse", n)
		}
	}, func(_ *bed, cfg *hsmsync.Config) { cfg.Epoch = 2 }, func(b *bed, _ *hsmsync.Config) {
		for _, m := range b.members {
			m.epoch.Epoch = 2
		}
	})
}

func TestACapableMemberIsGivenMore(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", slow(10*time.Millisecond))
		}
		var all sync.WaitGroup
		for range 80 {
			all.Go(func() { b.sign(1) })
		}
		all.Wait()
		if x, y, z := b.members[0].digests, b.members[1].digests, b.members[2].digests; x != 48 || y != 16 || z != 16 {
			t.Errorf("members of capacity 48, 16, 16 were given %d, %d, %d", x, y, z)
		}
	}, func(b *bed, _ *hsmsync.Config) { b.members[0].capacity, b.members[1].capacity = 48, 16 })
}

func TestWhatDoesNotFitWaitsAndTooMuchIsRefused(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members { // of capacity 1: each is given eight requests
			m.with("sign", slow(80*time.Millisecond))
		}
		const fit, queue = 3 * 8, 20
		var all sync.WaitGroup
		var done atomic.Int64
		for range fit + queue {
			all.Go(func() { b.sign(1); done.Add(1) })
		}
		synctest.Wait()
		status := b.group.Status().Groups[0]
		for _, m := range status.Members {
			if m.InFlight != fit/3 {
				t.Errorf("%s has %d digests at once", m.Name, m.InFlight)
			}
		}
		if status.Waiting != queue {
			t.Errorf("%d digests wait", status.Waiting)
		}
		began := time.Now()
		if _, err := b.key.SignBatch(t.Context(), digests(1)); hsm.ClassOf(err) != hsm.ClassOverloaded || time.Since(began) != 0 {
			t.Errorf("one more: %v after %v", err, time.Since(began))
		}
		all.Wait()
		if b.group.Status().Groups[0].Waiting != 0 || done.Load() != fit+queue {
			t.Errorf("signed %d; %+v", done.Load(), b.group.Status())
		}
		for _, m := range b.members {
			m.with("sign", nil)
		}
		b.sign(1000) // one batch is never too great
	}, func(b *bed, cfg *hsmsync.Config) {
		cfg.Queue = 20
		for _, m := range b.members {
			m.capacity = 1
		}
	})
}

func TestWaitingForAMemberEndsWithTheCaller(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", slow(100*time.Millisecond))
		}
		var all sync.WaitGroup
		for range 3 * 8 {
			all.Go(func() { b.sign(1) })
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := b.key.SignBatch(ctx, digests(1))
		if !errors.Is(err, context.DeadlineExceeded) || hsm.ClassOf(err) != hsm.ClassOverloaded || time.Since(began) != 20*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		all.Wait()
		if n := b.group.Status().Groups[0].Waiting; n != 0 {
			t.Errorf("%d digests wait for ever", n)
		}
		// All members go while some wait: those are told so.
		for _, m := range b.members {
			m.with("*", dead)
			m.with("sign", nil)
		}
		settle()
		if _, err := b.key.SignBatch(t.Context(), digests(1)); !errors.Is(err, hsmsync.ErrNoMember) {
			t.Error(err)
		}
	}, func(b *bed, _ *hsmsync.Config) {
		for _, m := range b.members {
			m.capacity = 1
		}
	})
}

// TestFrozenMembers has most of seven members stop at once, under load: every request is answered within a second.
func TestFrozenMembers(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, name := range []string{"d", "e", "f", "g"} {
			m := newSoftware(name)
			m.keys[b.record.ID] = b.members[0].keys[b.record.ID]
			b.join(m, "east", "active")
			b.members = append(b.members, m)
		}
		settle()
		for _, m := range b.members {
			m.set(func() { m.perDigest = 2 * time.Millisecond })
		}
		ctx, cancel := context.WithCancel(t.Context())
		var worst, failed, signed atomic.Int64
		var all sync.WaitGroup
		for i := range 6 {
			all.Go(func() {
				for n := 1 + i*8; ctx.Err() == nil; { // batches of 1 to 41: little enough for one member
					began := time.Now()
					if _, err := b.key.SignBatch(t.Context(), digests(n)); err != nil {
						failed.Add(1)
						t.Errorf("after %v: %v", time.Since(began), err)
					}
					worst.Store(max(worst.Load(), int64(time.Since(began))))
					signed.Add(int64(n))
				}
			})
		}
		time.Sleep(time.Second)
		normal := worst.Swap(0)
		for _, m := range b.members[:3] {
			m.with("*", hung)
		}
		time.Sleep(2 * time.Second)
		for _, m := range b.members[3:6] {
			m.with("*", hung)
		}
		time.Sleep(3 * time.Second)
		cancel()
		all.Wait()
		t.Logf("%d signatures, worst %v before and %v after", signed.Load(), time.Duration(normal), time.Duration(worst.Load()))
		if w := time.Duration(worst.Load()); w > time.Second || failed.Load() != 0 {
			t.Errorf("worst %v, %d failed", w, failed.Load())
		}
		b.expect("failed failed failed failed failed failed active")
	})
}

// TestThreeMembersSignThriceAsMuch takes the rate of one member and of three that each make 200 signatures a second.
func TestThreeMembersSignThriceAsMuch(t *testing.T) {
	for name, work := range map[string]func(b *bed, n int){
		"one caller, batches of 64": func(b *bed, n int) {
			for range n / 64 {
				b.sign(64)
			}
		},
		"four callers, batches of 64": func(b *bed, n int) {
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() {
					for range n / 64 / 4 {
						b.sign(64)
					}
				})
			}
			all.Wait()
		},
		"24 callers, single signatures": func(b *bed, n int) {
			var all sync.WaitGroup
			for range 24 {
				all.Go(func() {
					for range n / 24 {
						if _, err := b.key.Sign(nil, digests(1)[0], crypto.SHA256); err != nil {
							b.t.Error(err)
						}
					}
				})
			}
			all.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				for _, m := range b.members {
					m.set(func() { m.perDigest = 5 * time.Millisecond })
				}
				rate := func() float64 {
					const n = 64 * 48
					work(b, n/4) // getting to know the members
					began := time.Now()
					work(b, n)
					return n / time.Since(began).Seconds()
				}
				three := rate()
				b.chain.enter(t, "drain", "a", hsmsync.Note{})
				b.chain.enter(t, "drain", "b", hsmsync.Note{})
				settle()
				one := rate()
				if n := b.metric("hedges_total"); n > 30 { // of some thousand
					t.Errorf("%v pieces were signed twice, although nobody is slow", n)
				}
				t.Logf("%.0f/s with one, %.0f/s with three: %.2f", one, three, three/one)
				if three/one < 2.9 || one < 190 {
					t.Errorf("%.0f/s with one, %.0f/s with three: %.2f", one, three, three/one)
				}
			})
		})
	}
}

func TestEveryAlgorithmSigns(t *testing.T) {
	for _, a := range hsm.Algorithms() {
		if a == hsm.RSA3072 || a == hsm.RSA4096 {
			continue // as RSA-2048, and slow to make
		}
		t.Run(string(a), func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				r := b.newKey("key", hsm.PurposeCA, a)
				k, err := b.group.Key(t.Context(), string(r.ID))
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				var ds [][]byte
				for i := range 40 {
					d := a.Digest([]byte(fmt.Sprint("message ", i)))
					if a.Hash() == 0 {
						d = []byte(strings.Repeat(string(d), 300)) // together more than one request takes
					}
					ds = append(ds, d)
				}
				sigs, err := k.SignBatch(t.Context(), ds)
				if err != nil {
					t.Fatal(err)
				}
				verify(t, k, ds, sigs)
				sig, err := k.Sign(nil, ds[0], a.Hash())
				if err != nil {
					t.Fatal(err)
				}
				verify(t, k, ds[:1], [][]byte{sig})
				if _, err := k.Sign(nil, make([]byte, 20), crypto.SHA1); err == nil {
					t.Error("signed a SHA-1 digest")
				}
				if _, err := k.SignBatch(t.Context(), [][]byte{ds[0], {}}); err == nil {
					t.Error("signed nothing")
				}
				if a.RSABits() > 0 {
					if _, err := k.Sign(nil, ds[0], &rsa.PSSOptions{Hash: crypto.SHA256}); err == nil {
						t.Error("made a PKCS #1 v1.5 signature where PSS was asked for")
					}
				}
			})
		})
	}
}
