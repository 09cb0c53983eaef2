package hsmsync_test

import (
	"context"
	"crypto"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"trivet/hsm"
	"trivet/hsmsync"
)

func TestWorkIsSpreadOverTheLeastBusyMembers(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", slow(10*time.Millisecond))
		}
		began := time.Now()
		var all sync.WaitGroup
		for range 30 {
			all.Go(func() { b.sign(2) })
		}
		all.Wait()
		for _, m := range b.members {
			if m.digests < 18 || m.digests > 22 {
				t.Errorf("member %s was given %d of 60 digests", m.name, m.digests)
			}
		}
		if d := time.Since(began); d != 10*time.Millisecond {
			t.Errorf("it took %v: not all at once", d)
		}
	})
}

func TestABusyMemberIsLeftAloneWhileOthersAreIdle(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		release := make(chan struct{})
		b.members[0].with("sign", func(_ context.Context, do func() error) error { <-release; return do() })
		var all sync.WaitGroup
		for range 3 { // one for each member; the first keeps its own
			all.Go(func() { b.sign(1) })
		}
		synctest.Wait()
		for range 10 {
			b.sign(1)
		}
		if n := b.members[0].count("sign"); n != 1 {
			t.Errorf("the busy member was given %d batches", n)
		}
		close(release)
		all.Wait()
	})
}

func TestAGreatBatchIsSharedByTheMembers(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.set(func() { m.perDigest = time.Millisecond })
		}
		b.sign(1000)
		for _, m := range b.members {
			if m.digests < 320 {
				t.Errorf("member %s signed %d of 1000", m.name, m.digests)
			}
		}
	})
}

func TestWorkOfADeadMemberIsDoneByAnother(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[0].with("*", dead)
		began := time.Now()
		for range 10 {
			b.sign(1)
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("a refused connection cost %v", d)
		}
		time.Sleep(2 * time.Second)
		b.expect("failed active active")
		before := b.members[0].count("sign")
		b.sign(10)
		if b.members[0].count("sign") != before {
			t.Error("a failed member was given work")
		}
	})
}

func TestAMemberThatDoesNotAnswerInTimeIsSuspectUntilItHasSignedAgain(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[0].with("sign", hung)
		b.members[0].with("challenge", hung)
		began := time.Now()
		for b.members[0].count("sign") == 0 {
			b.sign(1)
		}
		if d := time.Since(began); d != 150*time.Millisecond {
			t.Errorf("a hung member cost %v, want half the attempt's 300 ms", d)
		}
		for range 10 { // not suspect yet, but somebody waits for it
			b.sign(1)
		}
		time.Sleep(2 * time.Second) // answers health questions all the while
		b.expect("suspect active active")
		for range 10 {
			b.sign(1)
		}
		if n := b.members[0].count("sign"); n != 1 {
			t.Errorf("the suspect was given work %d times", n)
		}
		time.Sleep(3 * time.Second)
		if s := b.states(); s != "failed active active" && s != "recovering active active" { // it goes on answering health questions
			t.Fatalf("members are %q", s)
		}
		b.members[0].with("sign", nil)
		b.members[0].with("challenge", nil)
		time.Sleep(3 * time.Second)
		b.expect("active active active")
	})
}

func TestABatchHasMoreTimeThanOneSignature(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", slow(400*time.Millisecond))
		}
		b.sign(64) // six digests may take 300 + 4·6·5 ms
		b.expect("active active active")
	})
}

func TestALateAnswerIsDropped(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		release := make(chan struct{})
		for _, m := range b.members[:2] {
			m.with("sign", func(_ context.Context, do func() error) error { // deaf to its deadline, and wrong in the end
				<-release
				return flipping(t.Context(), do)
			})
		}
		for range 3 {
			b.sign(3)
		}
		close(release)
		synctest.Wait()
		if s := b.states(); strings.Contains(s, "quarantined") {
			t.Fatalf("members are %q: somebody looked at a late answer", s)
		}
		for _, m := range b.group.Status().Groups[0].Members {
			if m.InFlight != 0 {
				t.Errorf("member %s has %d digests in flight at rest", m.Name, m.InFlight)
			}
		}
	})
}

func TestAWrongSignatureIsNeverReleasedAndQuarantinesItsMember(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[1].with("sign", flipping)
		for range 9 {
			b.sign(1)
		}
		b.expect("active quarantined active")
		if n := b.members[1].count("sign"); n != 1 {
			t.Errorf("the quarantined member was given work %d times", n)
		}
		b.members[1].with("sign", nil)
		b.members[1].restart()
		time.Sleep(5 * time.Second)
		b.expect("active quarantined active") // not lifted by itself
		if err := b.group.Recover("nobody"); err == nil {
			t.Error("recovered a member that is not there")
		}
		if err := b.group.Recover("b"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		b.expect("active active active")
		err := testutil.GatherAndCompare(b.metrics, strings.NewReader(`
# HELP trivet_hsmsync_failovers_total Batches a member did not sign, by class of error; another member was asked.
# TYPE trivet_hsmsync_failovers_total counter
trivet_hsmsync_failovers_total{cause="bad-signature",group="ca",member="b"} 1
# HELP trivet_hsmsync_quarantines_total Times a member was quarantined.
# TYPE trivet_hsmsync_quarantines_total counter
trivet_hsmsync_quarantines_total{group="ca",member="b"} 1
# HELP trivet_hsmsync_verified_keys Live keys of which the member has proved its copy.
# TYPE trivet_hsmsync_verified_keys gauge
trivet_hsmsync_verified_keys{group="ca",member="a"} 1
trivet_hsmsync_verified_keys{group="ca",member="b"} 1
trivet_hsmsync_verified_keys{group="ca",member="c"} 1
`), "trivet_hsmsync_failovers_total", "trivet_hsmsync_quarantines_total", "trivet_hsmsync_verified_keys")
		if err != nil {
			t.Error(err)
		}
	})
}

func TestAWrongSignatureIsFoundWhereverItIsInABatch(t *testing.T) {
	for at := range 8 {
		inBed(t, func(t *testing.T, b *bed) {
			for _, m := range b.members { // once they are known to be fast, eight digests are one piece
				b.sign(1)
				m.with("sign", func(_ context.Context, do func() error) error { return errors.Join(do(), errFlip, flipAt(at)) })
			}
			if _, err := b.key.SignBatch(t.Context(), digests(8)); !errors.Is(err, hsmsync.ErrNoMember) {
				t.Fatalf("signature %d wrong: error %v", at, err)
			}
			b.expect("quarantined quarantined quarantined")
		})
	}
}

func TestAWrongNumberOfSignaturesIsAWrongAnswer(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", func(context.Context, func() error) error { return nil })
		}
		_, err := b.key.SignBatch(t.Context(), digests(2))
		if !errors.Is(err, hsmsync.ErrNoMember) {
			t.Fatalf("error %v, want ErrNoMember", err)
		}
		b.expect("quarantined quarantined quarantined")
	})
}

func TestASuspectIsAskedWhenNoOneElseIsLeft(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", hung) // the machine is overloaded, say
			m.with("challenge", hung)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := b.key.SignBatch(ctx, digests(1)); err == nil {
			t.Fatal("signed by nobody")
		}
		b.expect("suspect suspect suspect")
		for _, m := range b.members {
			m.with("sign", nil)
		}
		b.sign(1)
	})
}

func TestAFullMemberIsPassedOverButNotSuspect(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[0].with("sign", failing(hsm.ClassOverloaded))
		for range 6 {
			b.sign(1)
		}
		b.expect("active active active")
		for _, m := range b.members {
			m.with("sign", failing(hsm.ClassOverloaded))
		}
		time.AfterFunc(time.Second, func() { b.members[1].with("sign", nil) })
		b.sign(1) // waits for the second that is left of its five
	})
}

func TestARequestAtFaultIsNotTriedElsewhere(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", failing(hsm.ClassRequest))
		}
		_, err := b.key.SignBatch(t.Context(), digests(1))
		if hsm.ClassOf(err) != hsm.ClassRequest {
			t.Fatal(err)
		}
		if n := b.members[0].count("sign") + b.members[1].count("sign") + b.members[2].count("sign"); n != 1 {
			t.Errorf("asked %d members", n)
		}
		for _, m := range b.members {
			m.with("sign", failing(hsm.ClassDenied))
		}
		if _, err = b.key.SignBatch(t.Context(), digests(1)); hsm.ClassOf(err) != hsm.ClassDenied {
			t.Fatal(err)
		}
		b.expect("active active active")
	})
}

func TestARefusedPINQuarantines(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[0].with("sign", failing(hsm.ClassPIN))
		for range 3 {
			b.sign(1)
		}
		b.expect("quarantined active active")
	})
}

func TestTheCallersEndIsNoFaultOfTheMembers(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", hung)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := b.key.SignBatch(ctx, digests(1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		b.expect("active active active")
	})
}

func TestMembersAreAskedAgainAsLongAsTheCallerWaits(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		var failed atomic.Int64
		for _, m := range b.members {
			m.with("sign", func(_ context.Context, do func() error) error {
				if failed.Add(1) <= 5 {
					return hsm.Errorf(hsm.ClassDevice, "sign", "CKR_DEVICE_ERROR")
				}
				return do()
			})
		}
		b.sign(1)
	})
}

func TestConcurrentSignCallsShareBatches(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("sign", slow(5*time.Millisecond))
		}
		const callers = 200
		ds := digests(callers)
		sigs := make([][]byte, callers)
		var all sync.WaitGroup
		for i := range callers {
			all.Go(func() {
				var err error
				if sigs[i], err = b.key.Sign(nil, ds[i], crypto.SHA256); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		verify(t, b.key, ds, sigs)
		calls := 0
		for _, m := range b.members {
			calls += m.count("sign")
		}
		if calls > callers/2 {
			t.Errorf("%d callers took %d calls", callers, calls)
		}
		began := time.Now()
		if _, err := b.key.Sign(nil, ds[0], crypto.SHA256); err != nil || time.Since(began) != 5*time.Millisecond {
			t.Errorf("a lone caller waited %v: %v", time.Since(began), err)
		}
	})
}

func TestOnlySHA256DigestsAreSigned(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		if _, err := b.key.Sign(nil, make([]byte, 48), crypto.SHA384); err == nil {
			t.Error("signed a SHA-384 digest")
		}
		if _, err := b.key.Sign(nil, make([]byte, 20), crypto.SHA256); err == nil {
			t.Error("signed 20 octets")
		}
		if _, err := b.key.SignBatch(t.Context(), [][]byte{make([]byte, 32), nil}); err == nil {
			t.Error("signed nothing")
		}
		if sigs, err := b.key.SignBatch(t.Context(), nil); len(sigs) != 0 || err != nil {
			t.Error(sigs, err)
		}
	})
}
