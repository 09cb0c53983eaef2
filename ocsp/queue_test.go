package ocsp

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func jobOf(is *issuer, n int) job {
	return job{issuer: is, serial: Serial{n: 3, b: [20]byte{1, byte(n >> 8), byte(n)}}}
}

// takes checks the next batch: whose it is, how many, and whether it could wait.
func takes(t *testing.T, q *queue, is *issuer, jobs int, trailing bool) *batch {
	t.Helper()
	b := q.next()
	if b.jobs[0].issuer != is || len(b.jobs) != jobs || b.trailing != trailing {
		t.Fatalf("%d jobs of %s, trailing: %v; want %d of %s, %v", len(b.jobs), b.jobs[0].issuer.name, b.trailing, jobs, is.name, trailing)
	}
	return b
}

// TestWhatIsNewPassesWhatCanWait has far more certificates become known at once than are issued at once: once they are a backlog, those issued later
// and those revoked pass them.
func TestWhatIsNewPassesWhatCanWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, is := newQueue(time.Now), &issuer{name: "a"}
		for i := range 3000 {
			q.enqueue(Good, jobOf(is, i))
		}
		for range backlog / maxBatch {
			takes(t, q, is, maxBatch, false)
		}
		takes(t, q, is, maxBatch, true)
		fresh, revoked := jobOf(is, 5000), jobOf(is, 1)
		q.enqueue(Good, fresh)
		q.enqueue(Revoked, revoked)
		for _, want := range []job{revoked, fresh} {
			if b := takes(t, q, is, 1, false); b.jobs[0] != want {
				t.Errorf("%v instead of %v", b.jobs[0].serial, want.serial)
			}
		}
	})
}

// TestOneWorkerAtATimeSignsWhatCanWait has thousands of refreshes come due in one moment, as half a validity after a start.
func TestOneWorkerAtATimeSignsWhatCanWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, is := newQueue(time.Now), &issuer{name: "a"}
		for i := range 3000 {
			q.schedule(time.Now().Unix(), jobOf(is, i))
		}
		b := takes(t, q, is, maxBatch, true)
		second := make(chan *batch)
		go func() { second <- q.next() }()
		synctest.Wait()
		select {
		case <-second:
			t.Error("a second worker got refreshes while the first was at some")
		default:
		}
		q.done(b, true)
		q.rested()
		if b := <-second; len(b.jobs) != maxBatch {
			t.Errorf("then a batch of %d", len(b.jobs))
		}
	})
}

// TestIssuersTakeTurnsInWholeBatches drains what a start finds of two issuers, while each answer made schedules its refresh.
func TestIssuersTakeTurnsInWholeBatches(t *testing.T) {
	q, all := newQueue(time.Now), []*issuer{{name: "a"}, {name: "b"}}
	const each = 20_000
	for _, is := range all {
		serials := make([]Serial, each)
		for i := range serials {
			serials[i] = jobOf(is, i).serial
		}
		q.enqueueAll(is, nil, serials)
	}
	batches, left := 0, map[*issuer]int{all[0]: each, all[1]: each}
	for left[all[0]]+left[all[1]] > 0 {
		b := q.next()
		for _, j := range b.jobs {
			q.schedule(time.Now().Add(72*time.Hour).Unix(), j)
		}
		left[b.jobs[0].issuer] -= len(b.jobs)
		if ahead := left[all[0]] - left[all[1]]; max(ahead, -ahead) > maxBatch {
			t.Fatalf("of the one %d are left, of the other %d", left[all[0]], left[all[1]])
		}
		batches++
		q.done(b, true)
		q.rested()
	}
	if want := 2 * (each + maxBatch - 1) / maxBatch; batches > want+1 {
		t.Errorf("%d batches, %d would do", batches, want)
	}
}

// TestAKeyThatHangsHoldsUpNobodyElse has one issuer whose every batch takes until its deadline and fails, and another's answers come due meanwhile.
func TestAKeyThatHangsHoldsUpNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, dead, well := newQueue(time.Now), &issuer{name: "dead"}, &issuer{name: "well"}
		for i := range 10_000 {
			q.schedule(time.Now().Unix(), jobOf(dead, i))
			if i < 1000 {
				q.schedule(time.Now().Unix()+10, jobOf(well, i))
			}
		}
		began, signed, finished := time.Now(), 0, make(chan time.Duration, 1)
		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for b := q.next(); b != nil; b = q.next() {
					if b.jobs[0].issuer == dead {
						time.Sleep(batchTimeout)
						q.done(b, false)
						for _, j := range b.jobs {
							q.schedule(time.Now().Add(retryAfter).Unix(), j)
						}
					} else {
						time.Sleep(10 * time.Millisecond)
						q.done(b, true)
						if signed += len(b.jobs); signed == 1000 { // one worker at a time
							finished <- time.Since(began)
						}
					}
					if b.trailing {
						q.rested()
					}
				}
			})
		}
		tick := time.NewTicker(250 * time.Millisecond)
		ended := make(chan struct{})
		go func() {
			for {
				select {
				case <-tick.C:
					q.look()
				case <-ended:
					return
				}
			}
		}()
		took := <-finished
		close(ended)
		q.close()
		wg.Wait()
		t.Logf("all of the other's were signed %v after they came due", took-10*time.Second)
		if took > 12*time.Second {
			t.Error("the other had to wait")
		}
	})
}

// TestARevocationIsTriedAgainBeforeAnythingElse lets a key fail once, at a start with very much to sign.
func TestARevocationIsTriedAgainBeforeAnythingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, is := newQueue(time.Now), &issuer{name: "a"}
		for i := range 10_000 {
			q.schedule(time.Now().Unix(), jobOf(is, i))
		}
		q.enqueue(Revoked, jobOf(is, 7))
		b := takes(t, q, is, 1, false)
		q.enqueue(Revoked, b.jobs[0])
		q.done(b, false)
		time.Sleep(pause)
		takes(t, q, is, 1, false)
	})
}

// TestEveryWorkerThatIsNeededWakesUp gathers certificates of two issuers at once; the batch of the first takes long.
func TestEveryWorkerThatIsNeededWakesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, a, b := newQueue(time.Now), &issuer{name: "a"}, &issuer{name: "b"}
		taken := make(chan *batch, workers)
		for range workers {
			go func() { taken <- q.next() }()
		}
		synctest.Wait()
		q.enqueue(Good, jobOf(a, 1))
		for i := range 10 {
			q.enqueue(Good, jobOf(b, i))
		}
		time.Sleep(2 * gatherFor)
		synctest.Wait()
		jobs := 0
		for range len(taken) {
			jobs += len((<-taken).jobs)
		}
		if jobs != 11 {
			t.Errorf("of 11 jobs %d were taken", jobs)
		}
		q.close()
		synctest.Wait()
	})
}
