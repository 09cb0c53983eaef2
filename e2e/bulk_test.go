package e2e_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"trivet/cluster"
	"trivet/load"
)

// Bulk clients lose nothing when a CA node dies in the middle of their batches: each request of a batch has its certificate, one, and a batch
// that is repeated, on whichever node, or one by one, is the same certificates.
func TestBulkRequestsWhileACANodeDies(t *testing.T) {
	const size, batches = 16, 400
	s := up(t)
	recorder := &load.Recorder{}
	issuer := s.issuer(t, recorder)
	op, err := issuer.PrepareBulk(batches, size)
	if err != nil {
		t.Fatal(err)
	}
	if err := op(t.Context(), batches-1); err != nil {
		t.Fatalf("the first batch: %v", err)
	}
	sent := make(chan load.Result, 1)
	go func() {
		sent <- load.Run(context.Background(), load.Config{Rate: 3, Duration: loadTime, Timeout: 15 * time.Second}, op)
	}()
	eventually(t, 30*time.Second, func() error {
		if n := recorder.Len(); n < 2*size {
			return fmt.Errorf("%d certificates so far", n)
		}
		return nil
	})
	pid := s.kill(t, "ca1")
	eventually(t, 60*time.Second, func() error {
		if p := s.process(t, "ca1"); p.State != cluster.Running || p.PID == pid {
			return fmt.Errorf("ca1 is %s with pid %d", p.State, p.PID)
		}
		return nil
	})
	s.allWell(t)
	r := <-sent
	t.Logf("batches of %d: %v", size, r)
	if r.Failed > 0 || recorder.Len() != (r.Requests+1)*size {
		t.Errorf("%d of %d batches failed, %d certificates", r.Failed, r.Requests, recorder.Len())
	}
	for i := range 3 { // the recorder notices another certificate under the same key
		if err := op(t.Context(), i); err != nil {
			t.Errorf("repeating batch %d: %v", i, err)
		}
	}
	for _, a := range recorder.All()[:size] {
		again, err := issuer.Send(t.Context(), a.Request)
		if err != nil || !again.Replayed || string(again.DER) != string(a.DER) {
			t.Errorf("repeating %s alone: replayed %v, %v", a.DNS, again.Replayed, err)
		}
	}
	if d := recorder.Duplicates(); len(d) > 0 || s.namesTwice(t, recorder) > 0 {
		t.Errorf("duplicates: %v", d)
	}
	s.fsck(t)
}
