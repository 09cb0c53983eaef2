package holder_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"trivet/holder"
	"trivet/identity"
	"trivet/journal"
)

const incarnation = "000102030405060708090a0b0c0d0e0f"

var quiet = slog.New(slog.DiscardHandler)

// rounds is the recovery round of a holder's node.
type rounds struct{ n atomic.Uint64 }

func (r *rounds) enter() (uint64, func()) { return r.n.Load(), func() {} }

func open(t testing.TB, dir string, r *rounds) *holder.Holder {
	t.Helper()
	h, err := holder.Open(holder.Config{Dir: dir, Node: "ca2", Log: quiet, Round: r.enter})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// record is the owner's n-th done record.
func record(t testing.TB, n uint64, serial string) json.RawMessage {
	t.Helper()
	r, err := journal.New(journal.Done{Issuer: "demo-g1", Serial: serial, Ver: 1, DER: []byte{1, 2}, Lane: "ca1/x/0", Seq: n, Kind: journal.DoneCert, N: n})
	if err != nil {
		t.Fatal(err)
	}
	return r.Payload
}

// batch is records from..to after what came before.
func batch(t testing.TB, from, to uint64) holder.Batch {
	b := holder.Batch{Incarnation: incarnation, From: from}
	for n := uint64(1); n < from; n++ {
		b.After = holder.Chain(b.After, record(t, n, fmt.Sprintf("%02x", n)))
	}
	for n := from; n <= to; n++ {
		b.Records = append(b.Records, record(t, n, fmt.Sprintf("%02x", n)))
	}
	return b
}

func serials(t testing.TB, h *holder.Holder) (out []string) {
	t.Helper()
	if err := h.Each(func(owner, inc string, d journal.Done) error {
		if owner != "ca1" || inc != incarnation {
			t.Errorf("a record of %s/%s", owner, inc)
		}
		out = append(out, d.Serial)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestAHolderTakesWhatFollowsAndNothingElse(t *testing.T) {
	dir, r := filepath.Join(t.TempDir(), "held"), &rounds{}
	h := open(t, dir, r)
	put := func(b holder.Batch, reason string, n uint64) {
		t.Helper()
		tip, err := h.Put("ca1", b)
		if err != nil || tip.Reason != reason || tip.N != n {
			t.Fatalf("got %+v, %v; want reason %q at %d", tip, err, reason, n)
		}
	}
	put(holder.Batch{Incarnation: incarnation}, "", 0)
	put(batch(t, 2, 3), holder.ReasonGap, 0)
	put(batch(t, 1, 3), "", 3)
	put(batch(t, 1, 3), holder.ReasonGap, 3) // its answer was lost
	other := batch(t, 4, 4)
	other.After = bytes.Repeat([]byte{7}, 32)
	put(other, holder.ReasonChain, 3) // another process under the same incarnation
	r.n.Store(2)
	put(batch(t, 4, 5), holder.ReasonOldRound, 3)
	b := batch(t, 4, 5)
	b.Round = 2
	put(b, "", 5)
	for _, bad := range []holder.Batch{{Incarnation: "zz", Round: 2}, {Incarnation: incarnation, Round: 2, From: 6, Records: []json.RawMessage{[]byte(`{"n": 9}`)}},
		{Incarnation: incarnation, Round: 2, From: 6, Records: []json.RawMessage{[]byte(`7`)}}} {
		if _, err := h.Put("ca1", bad); err == nil {
			t.Errorf("taken: %+v", bad)
		}
	}
	if h.Lanes()["ca1/x/0"] != 5 {
		t.Errorf("it holds lanes %v", h.Lanes())
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	// And after a restart the same.
	h = open(t, dir, r)
	defer h.Close()
	put(holder.Batch{Incarnation: incarnation, Round: 2}, "", 5)
	if got := serials(t, h); fmt.Sprint(got) != "[01 02 03 04 05]" {
		t.Errorf("it holds %v", got)
	}
}

// Whether an owner requires copies is what its newest incarnation said, over restarts too.
func TestAHolderRemembersWhoRequiresCopies(t *testing.T) {
	dir, r := filepath.Join(t.TempDir(), "held"), &rounds{}
	h := open(t, dir, r)
	say := func(last byte, required bool) {
		t.Helper()
		id := incarnation[:30] + fmt.Sprintf("%02x", last)
		if tip, err := h.Put("ca1", holder.Batch{Incarnation: id, Round: r.n.Load(), CopyRequired: required}); err != nil || tip.Reason != "" {
			t.Fatal(tip, err)
		}
	}
	want := func(last byte, ok bool) {
		t.Helper()
		for range 2 {
			since, got := h.Promised("ca1")
			if got != ok || ok && since != incarnation[:30]+fmt.Sprintf("%02x", last) {
				t.Fatalf("promised since %q, %v; want %02x, %v", since, got, last, ok)
			}
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			h = open(t, dir, r)
		}
	}
	defer func() { h.Close() }()
	want(0, false)
	say(1, false)
	want(0, false)
	say(2, true)
	want(2, true)
	say(3, true) // the promise goes on
	want(2, true)
	say(4, false)
	want(0, false)
	say(5, true)
	say(6, false)
	say(5, true) // came late
	want(0, false)
	if _, ok := h.Promised("ca2"); ok {
		t.Error("another's promise counts for ca2")
	}
}

// What is held is sealed, and goes when it is old and on record. A start knows how far every stream is without reading it, and goes on where it was.
func TestWhatIsHeldGoesWhenItIsOldAndOnRecord(t *testing.T) {
	dir, r := filepath.Join(t.TempDir(), "held"), &rounds{}
	var later, recorded atomic.Int64 // hours; how far the record has the lane
	reopen := func() *holder.Holder {
		cfg := holder.Config{Dir: dir, Node: "ca2", Log: quiet, Round: r.enter, Keep: 24 * time.Hour, SegmentSize: 2048, Recorded: func(_ context.Context, lanes map[string]uint64) (bool, error) {
			return int64(lanes["ca1/x/0"]) <= recorded.Load() && len(lanes) == 1, nil
		}}
		cfg.SetNow(func() time.Time { return time.Now().Add(time.Duration(later.Load()) * time.Hour) })
		h, err := holder.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	h := reopen()
	for n := uint64(1); n <= 40; n++ {
		if tip, err := h.Put("ca1", batch(t, n, n)); err != nil || tip.Reason != "" {
			t.Fatal(tip, err)
		}
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	plain, err := filepath.Glob(filepath.Join(dir, "*.journal*"))
	if err != nil || len(plain) < 6 {
		t.Fatalf("segments are %v, %v", plain, err)
	}
	// Nothing goes before its time, nor what the record lacks.
	recorded.Store(12)
	h = reopen()
	if got := len(serials(t, h)); got != 40 {
		t.Fatalf("%d records are held", got)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	later.Store(25)
	h = reopen()
	until(t, "what is on record is gone", func() bool { got := serials(t, h); return got[0] > "01" && got[0] <= "0d" })
	if got := serials(t, h); got[len(got)-1] != "28" || got[0] > "0d" {
		t.Fatalf("it holds %v", got)
	}
	recorded.Store(40)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h = reopen()
	until(t, "all but the newest segment is gone", func() bool { return len(serials(t, h)) < 8 })
	if h.Lanes()["ca1/x/0"] != 40 {
		t.Errorf("lanes are %v", h.Lanes())
	}
	if tip, err := h.Put("ca1", batch(t, 41, 42)); err != nil || tip.Reason != "" || tip.N != 42 {
		t.Errorf("going on: %+v, %v", tip, err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	d, err := journal.OpenDir(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if report, err := d.Verify(); err != nil || len(report.Damage) > 0 || report.Dropped == 0 {
		t.Errorf("verified: %+v, %v", report, err)
	}
	// A start reads none of what is sealed: with its segments unreadable it is the same.
	left, err := filepath.Glob(filepath.Join(dir, "*.zst"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range left {
		if err := os.WriteFile(path, []byte("nothing"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	later.Store(0)
	h = reopen()
	defer h.Close()
	if tip, err := h.Put("ca1", batch(t, 43, 43)); err != nil || tip.Reason != "" || tip.N != 43 {
		t.Errorf("after a start that could read nothing: %+v, %v", tip, err)
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waiting until %s: no", what)
		}
	}
}

// pair is an owner's copier and a holder's server.
type pair struct {
	copier *holder.Copier
	held   *holder.Holder
	server *httptest.Server
	rounds *rounds // of the holder
	own    atomic.Uint64
	sent   []json.RawMessage
	fatal  chan error
	down   atomic.Bool
}

func newPair(t *testing.T) *pair {
	t.Helper()
	authority, err := identity.CreateAuthority(filepath.Join(t.TempDir(), "authority"), "test")
	if err != nil {
		t.Fatal(err)
	}
	load := func(name string) *identity.Identity {
		dir := filepath.Join(t.TempDir(), name)
		if _, err := authority.IssueTo(dir, identity.Principal{Cluster: "test", Role: identity.RoleCA, Name: name}, nil, nil, time.Hour); err != nil {
			t.Fatal(err)
		}
		id, err := identity.Load(identity.Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), Trust: filepath.Join(dir, "trust.pem")})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	p := &pair{rounds: &rounds{}, fatal: make(chan error, 1)}
	p.held = open(t, filepath.Join(t.TempDir(), "held"), p.rounds)
	t.Cleanup(func() { p.held.Close() })
	handler := p.held.Handler()
	p.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p.down.Load() {
			http.Error(w, "down", http.StatusServiceUnavailable)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	p.server.TLS = load("ca2").ServerTLS()
	p.server.StartTLS()
	t.Cleanup(p.server.Close)
	p.copier, err = holder.NewCopier(holder.CopierConfig{
		Incarnation: incarnation, Peers: []holder.Peer{{Name: "ca2", Address: p.server.Listener.Addr().String()}}, Timeout: 2 * time.Second,
		Client: &http.Client{Transport: &http.Transport{TLSClientConfig: load("ca1").ClientTLS(identity.RoleCA)}},
		Round:  p.own.Load, Log: quiet, Fatal: func(err error) {
			select {
			case p.fatal <- err:
			default:
			}
		},
		Records: func(from uint64, fn func(uint64, []byte) error) error {
			for n := from; n <= uint64(len(p.sent)); n++ {
				if err := fn(n, p.sent[n-1]); err != nil {
					return err
				}
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pair) run(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.copier.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

// add gives the next record and waits for its copy.
func (p *pair) add(t *testing.T) error {
	t.Helper()
	n := uint64(len(p.sent) + 1)
	r := record(t, n, fmt.Sprintf("%02x", n))
	p.sent = append(p.sent, r)
	ticket, err := p.copier.Add(n, [][]byte{r})
	if err != nil {
		t.Fatal(err)
	}
	return p.copier.Wait(t.Context(), ticket)
}

func TestACopierSendsAgainWhatAHolderMissed(t *testing.T) {
	p := newPair(t)
	p.run(t)
	if err := p.add(t); err != nil {
		t.Fatal(err)
	}
	p.down.Store(true)
	for range 3 {
		if err := p.add(t); !errors.Is(err, holder.ErrNoHolder) {
			t.Fatalf("while the holder is down: %v", err)
		}
	}
	p.down.Store(false)
	for deadline := time.Now().Add(20 * time.Second); len(serials(t, p.held)) < 4; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it holds %v", serials(t, p.held))
		}
	}
	if err := p.add(t); err != nil || len(serials(t, p.held)) != 5 {
		t.Errorf("afterwards: %v, %v", err, serials(t, p.held))
	}
}

func TestACopierIsToldOfALaterRound(t *testing.T) {
	p := newPair(t)
	p.run(t)
	if err := p.add(t); err != nil {
		t.Fatal(err)
	}
	p.rounds.n.Store(3)
	if err := p.add(t); !errors.Is(err, holder.ErrOldRound) {
		t.Errorf("an older round: %v", err)
	}
	p.own.Store(3)
	for deadline := time.Now().Add(20 * time.Second); p.add(t) != nil; {
		if time.Now().After(deadline) {
			t.Fatal("nothing is taken in the same round")
		}
	}
	if err := <-nilOr(p.fatal); err != nil {
		t.Error(err)
	}
}

func nilOr(c chan error) chan error {
	select {
	case err := <-c:
		c <- err
	default:
		c <- nil
	}
	return c
}

// The holder has records of this incarnation that this process did not write: it is a copy of another's directory.
func TestACopierOfAClonedNodeEndsTheProcess(t *testing.T) {
	for name, b := range map[string]holder.Batch{"more records": batch(t, 1, 3), "other records": {Incarnation: incarnation, From: 1, Records: []json.RawMessage{record(t, 1, "ff")}}} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			if tip, err := p.held.Put("ca1", b); err != nil || tip.Reason != "" {
				t.Fatal(tip, err)
			}
			r := record(t, 1, "01")
			p.sent = append(p.sent, r)
			if _, err := p.copier.Add(1, [][]byte{r}); err != nil {
				t.Fatal(err)
			}
			p.run(t)
			select {
			case err := <-p.fatal:
				if !errors.Is(err, holder.ErrDiverged) {
					t.Error(err)
				}
			case <-time.After(20 * time.Second):
				t.Error("nobody noticed")
			}
		})
	}
}

func FuzzBatch(f *testing.F) {
	b, err := json.Marshal(batch(f, 1, 2))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"incarnation": "` + incarnation + `", "round": 1, "from": 1, "after": "", "records": [{"n": 1}]}`))
	f.Add([]byte(`{"records": [null]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := holder.ParseBatch(text)
		if err != nil {
			return
		}
		h := open(t, filepath.Join(t.TempDir(), "held"), &rounds{})
		defer h.Close()
		tip, err := h.Put("ca1", b)
		if err == nil && tip.Reason == "" && tip.N != uint64(len(b.Records)) {
			t.Errorf("%d records, tip %+v", len(b.Records), tip)
		}
	})
}
