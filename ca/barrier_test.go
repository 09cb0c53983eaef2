package ca_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"trivet/ca"
	"trivet/db"
)

// responder is a VA as the barrier sees it. It answers long polls as the real one does.
type responder struct {
	name        string
	incarnation []byte

	mu      sync.Mutex
	applied uint64
	change  chan struct{}
	deaf    bool // takes requests and never answers
	asked   int
}

func newResponder(name string, incarnation byte) *responder {
	return &responder{name: name, incarnation: slices.Repeat([]byte{incarnation}, 16), change: make(chan struct{})}
}

func (r *responder) apply(seq uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.applied = seq
	close(r.change)
	r.change = make(chan struct{})
}

func (r *responder) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	seq, _ := strconv.ParseUint(q.FormValue("seq"), 10, 64)
	wait, _ := strconv.Atoi(q.FormValue("wait_ms"))
	end := time.After(time.Duration(wait) * time.Millisecond)
	for waiting := true; waiting; {
		r.mu.Lock()
		done, change, deaf := r.applied >= seq, r.change, r.deaf
		r.asked++
		r.mu.Unlock()
		if deaf {
			<-q.Context().Done()
			return
		}
		if done {
			break
		}
		select {
		case <-change:
		case <-end:
			waiting = false
		case <-q.Context().Done():
			return
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	json.NewEncoder(w).Encode(map[string]any{"va": r.name, "incarnation": hex.EncodeToString(r.incarnation), "applied": r.applied >= seq, "seq": r.applied})
}

func (r *responder) member(policy string) db.Member {
	return db.Member{VA: r.name, N: 1, Event: "in", Policy: policy, Address: r.name + ".test:8443", Incarnation: r.incarnation}
}

// network connects the barrier to responders without sockets, so that synctest's clock governs all of it.
type network map[string]http.Handler

func (n network) RoundTrip(r *http.Request) (*http.Response, error) {
	h, ok := n[strings.TrimSuffix(r.URL.Host, ".test:8443")]
	if !ok {
		return nil, errors.New("no route to " + r.URL.Host)
	}
	answer := make(chan *http.Response, 1)
	go func() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		answer <- w.Result()
	}()
	select {
	case res := <-answer:
		return res, nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// chain is the member table: a chain per VA, in which one insert wins.
type chain struct {
	mu     sync.Mutex
	rows   map[string][]db.Member
	broken error
}

func newChain(members ...db.Member) *chain {
	c := &chain{rows: map[string][]db.Member{}}
	for _, m := range members {
		c.rows[m.VA] = append(c.rows[m.VA], m)
	}
	return c
}

func (c *chain) Members(context.Context) ([]db.Member, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []db.Member
	for _, rows := range c.rows {
		m := rows[len(rows)-1]
		if n := len(rows); n > 1 && rows[n-2].Event == "in" {
			m.Prior, m.PriorPolicy = rows[n-2].Address, rows[n-2].Policy
		}
		out = append(out, m)
	}
	return out, c.broken
}

func (c *chain) InsertMember(_ context.Context, m db.Member) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if int(m.N) != len(c.rows[m.VA])+1 {
		return &db.Error{Class: db.Duplicate, Op: "insert va_member", Err: errors.New("taken")}
	}
	c.rows[m.VA] = append(c.rows[m.VA], m)
	return nil
}

func (c *chain) last(va string) db.Member {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rows[va][len(c.rows[va])-1]
}

// newBarrier returns a barrier on the bubble's clock.
func newBarrier(t *testing.T, members ca.MemberChain, net http.RoundTripper) *ca.Barrier {
	t.Helper()
	began := time.Now()
	b, err := ca.NewBarrier(ca.BarrierConfig{
		Node: "ca1", Members: members, Client: &http.Client{Transport: net}, Boottime: func() time.Duration { return time.Hour + time.Since(began) },
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var position = ca.Position{Lane: "ca1/0/1", Seq: 7}

func TestBarrierEndsAsSoonAsEveryResponderHasApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quick, slow := newResponder("ocsp1", 1), newResponder("ocsp2", 2)
		quick.apply(7)
		b := newBarrier(t, newChain(quick.member("strict"), slow.member("serve")), network{"ocsp1": quick, "ocsp2": slow})
		time.AfterFunc(2300*time.Millisecond, func() { slow.apply(9) })
		began := time.Now()
		reach := b.Wait(t.Context(), position)
		if !reach.Effective() || reach.Applied != 2 || len(reach.Lapsed) != 0 {
			t.Errorf("reach %+v, want two applied", reach)
		}
		if took := time.Since(began); took != 2300*time.Millisecond {
			t.Errorf("it took %v, the slow one 2.3s", took)
		}
	})
}

func TestDeafStrictResponderLapsesOnceAndIsThenOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		well, deaf := newResponder("ocsp1", 1), newResponder("ocsp2", 2)
		well.apply(100)
		deaf.deaf = true
		members := newChain(well.member("strict"), deaf.member("strict"))
		b := newBarrier(t, members, network{"ocsp1": well, "ocsp2": deaf})

		began := time.Now()
		reach := b.Wait(t.Context(), position)
		if took := time.Since(began); took != ca.Lease+ca.LeaseMargin {
			t.Errorf("the first revocation took %v, want a lease and its margin", took)
		}
		if !reach.Effective() || reach.Applied != 1 || !slices.Equal(reach.Lapsed, []string{"ocsp2"}) {
			t.Errorf("reach %+v, want ocsp2 lapsed", reach)
		}
		if out := members.last("ocsp2"); out.Event != "out" || out.N != 2 {
			t.Fatalf("last row of ocsp2 is %+v, want out", out)
		}

		// Until its lease after the out row has ended, it may still answer good for what came later.
		if _, err := members.Members(t.Context()); err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		reach = b.Wait(t.Context(), ca.Position{Lane: "ca1/0/1", Seq: 8})
		if took := time.Since(began); took != ca.Lease+ca.LeaseMargin || !reach.Effective() {
			t.Errorf("right after the out row: %v, %+v", took, reach)
		}
		// From then on nobody waits for it.
		began = time.Now()
		reach = b.Wait(t.Context(), ca.Position{Lane: "ca1/0/1", Seq: 9})
		if took := time.Since(began); took != 0 || !reach.Effective() || reach.Applied != 1 || len(reach.Lapsed) != 0 {
			t.Errorf("long after the out row: %v, %+v", took, reach)
		}
	})
}

func TestServingResponderIsNeverCountedLapsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		deaf := newResponder("ocsp1", 1)
		deaf.deaf = true
		members := newChain(deaf.member("serve"))
		b := newBarrier(t, members, network{"ocsp1": deaf})
		reach := b.Wait(t.Context(), position)
		if reach.Effective() || !slices.Equal(reach.Pending, []string{"ocsp1"}) || len(reach.Lapsed) != 0 {
			t.Errorf("reach %+v, want ocsp1 pending", reach)
		}
		if members.last("ocsp1").Event != "in" {
			t.Error("a serving responder was put out")
		}
	})
}

func TestBarrierNamesThePendingAtTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		well := newResponder("ocsp1", 1)
		well.apply(7)
		b := newBarrier(t, newChain(well.member("strict"), newResponder("ocsp2", 2).member("strict")), network{"ocsp1": well})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		reach := b.Wait(ctx, position)
		if reach.Effective() || reach.Applied != 1 || !slices.Equal(reach.Pending, []string{"ocsp2"}) {
			t.Errorf("reach %+v, want ocsp2 pending", reach)
		}
	})
}

// TestANameTakenOverAtAnotherAddressWaitsForTheOlderProcess: a machine was cloned or moved without being stopped, and the older process, cut off from the
// database, does not know that it lost its name.
func TestANameTakenOverAtAnotherAddressWaitsForTheOlderProcess(t *testing.T) {
	for name, c := range map[string]struct {
		from, policy string
		wait         time.Duration
		effective    bool
	}{
		"moved":               {"old.test:8443", "strict", ca.Lease + ca.LeaseMargin - 2*time.Second, true},
		"moved, serving":      {"old.test:8443", "serve", ca.Lease + ca.LeaseMargin, false},
		"restarted where was": {"ocsp1.test:8443", "strict", 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newResponder("ocsp1", 2)
				r.apply(7)
				before, now := r.member(c.policy), r.member("strict")
				before.Address, before.Incarnation, now.N = c.from, slices.Repeat([]byte{1}, 16), 2
				members := newChain(before)
				b := newBarrier(t, members, network{"ocsp1": r})
				ctx, cancel := context.WithCancel(t.Context())
				ran := make(chan struct{})
				go func() { defer close(ran); _ = b.Run(ctx) }()
				defer func() { cancel(); <-ran }()
				synctest.Wait()
				if err := members.InsertMember(ctx, now); err != nil {
					t.Fatal(err)
				}
				time.Sleep(3 * time.Second) // on the bubble's clock; the row was first seen after one
				began := time.Now()
				reach := b.Wait(ctx, position)
				if took := time.Since(began); took != c.wait || reach.Effective() != c.effective || reach.Applied != 1 {
					t.Errorf("it took %v, want %v: %+v", took, c.wait, reach)
				}
				time.Sleep(10 * time.Second)
				began = time.Now()
				if reach := b.Wait(ctx, position); time.Since(began) != 0 || !reach.Effective() {
					t.Errorf("long after: %v, %+v", time.Since(began), reach)
				}
			})
		})
	}
}

func TestAnotherIncarnationsAnswerDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		restarted := newResponder("ocsp1", 9)
		restarted.apply(7)
		row := restarted.member("strict")
		row.Incarnation = slices.Repeat([]byte{1}, 16) // as registered before the restart
		members := newChain(row)
		b := newBarrier(t, members, network{"ocsp1": restarted})
		// It registers anew two seconds later.
		time.AfterFunc(2*time.Second, func() {
			again := restarted.member("strict")
			again.N = 2
			if err := members.InsertMember(context.Background(), again); err != nil {
				t.Error(err)
			}
		})
		began := time.Now()
		reach := b.Wait(t.Context(), position)
		if took := time.Since(began); reach.Applied != 1 || took < 2*time.Second || took > 2500*time.Millisecond {
			t.Errorf("after %v: %+v, want it applied once registered", took, reach)
		}
	})
}

func TestUnreadableMembersMeanPending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		well := newResponder("ocsp1", 1)
		well.apply(7)
		members := newChain(well.member("strict"))
		b := newBarrier(t, members, network{"ocsp1": well})
		if reach := b.Wait(t.Context(), position); !reach.Effective() {
			t.Fatalf("reach %+v", reach)
		}
		members.broken = errors.New("no database")
		if reach := b.Wait(t.Context(), ca.Position{Lane: "ca1/0/1", Seq: 8}); reach.Effective() {
			t.Errorf("reach %+v although the members are not known", reach)
		}
		// Nobody known at all is no proof either.
		if reach := newBarrier(t, members, network{}).Wait(t.Context(), position); reach.Effective() {
			t.Errorf("reach %+v although no member was ever read", reach)
		}
	})
}

// hostile answers what a responder must not.
type hostile string

func (h hostile) ServeHTTP(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, string(h)) }

func TestGarbledAnswersDoNotCount(t *testing.T) {
	for _, answer := range []string{"", "{", `{"applied":true}`, `{"va":"ocsp2","incarnation":"01010101010101010101010101010101","applied":true}`, strings.Repeat("[", 1<<16)} {
		synctest.Test(t, func(t *testing.T) {
			row := newResponder("ocsp1", 1).member("serve")
			b := newBarrier(t, newChain(row), network{"ocsp1": hostile(answer)})
			if reach := b.Wait(t.Context(), position); reach.Effective() {
				t.Errorf("%.40q was taken for an answer", answer)
			}
		})
	}
}

func TestRunLearnsOutRowsBeforeARevocationAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := newResponder("ocsp1", 1)
		row := gone.member("strict")
		row.Event = "out"
		b := newBarrier(t, newChain(row), network{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- b.Run(ctx) }()
		time.Sleep(ca.Lease + ca.LeaseMargin + 2*time.Second)
		began := time.Now()
		if reach := b.Wait(t.Context(), position); !reach.Effective() || time.Since(began) != 0 {
			t.Errorf("%v: %+v, want nobody waited for", time.Since(began), reach)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
