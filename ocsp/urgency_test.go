package ocsp

import (
	"io"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

func newTestPresigner() *presigner {
	return newPresigner(time.Now, slog.New(slog.NewTextHandler(io.Discard, nil)), nil)
}

func jobOf(is *issuer, n int) job {
	return job{issuer: is, serial: Serial{n: 2, b: [20]byte{byte(n >> 8), byte(n)}}}
}

// TestWhatIsNewPassesWhatCanWait has far more certificates become known at once than are issued at once: once they are a backlog, those issued later
// and those revoked pass them.
func TestWhatIsNewPassesWhatCanWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, is := newTestPresigner(), &issuer{}
		for i := range 3000 {
			p.enqueue(Good, jobOf(is, i))
		}
		for range backlog / maxBatch {
			if batch, trailing := p.next(); len(batch) != maxBatch || trailing {
				t.Fatalf("a batch of %d, trailing: %v", len(batch), trailing)
			}
		}
		if batch, trailing := p.next(); len(batch) != maxBatch || !trailing {
			t.Fatalf("of the backlog: a batch of %d, trailing: %v", len(batch), trailing)
		}
		fresh, revoked := jobOf(is, 5000), jobOf(is, 1)
		p.enqueue(Good, fresh)
		p.enqueue(Revoked, revoked)
		for _, want := range []job{revoked, fresh} {
			if batch, trailing := p.next(); len(batch) != 1 || batch[0] != want || trailing {
				t.Errorf("%d jobs, the first %v, trailing: %v; want %v alone", len(batch), batch[0].serial, trailing, want.serial)
			}
		}
	})
}

// TestOneWorkerAtATimeSignsWhatCanWait has thousands of refreshes come due in one moment, as half a validity after a start, or retries after an
// outage of the key.
func TestOneWorkerAtATimeSignsWhatCanWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, is := newTestPresigner(), &issuer{}
		for i := range 3000 {
			p.schedule(time.Now().Unix(), jobOf(is, i))
		}
		if batch, trailing := p.next(); len(batch) != maxBatch || !trailing {
			t.Fatalf("a batch of %d, trailing: %v", len(batch), trailing)
		}
		second := make(chan []job)
		go func() {
			batch, _ := p.next()
			second <- batch
		}()
		synctest.Wait()
		select {
		case <-second:
			t.Error("a second worker got refreshes while the first was at some")
		default:
		}
		p.rested()
		if batch := <-second; len(batch) != maxBatch {
			t.Errorf("then a batch of %d", len(batch))
		}
	})
}
