package ocsp_test

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trivet/db"
	"trivet/ocsp"
)

func TestBarrierAnswersOnlyWhenApplied(t *testing.T) {
	n, a := populated(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if n.Applied(expired(), "ca2/0", 2) {
		t.Error("a row that nobody wrote is applied")
	}
	answered := make(chan bool)
	go func() { answered <- n.Applied(ctx, "ca2/0", 2) }()
	n.polled(t)
	select {
	case <-answered:
		t.Fatal("answered before the row was written")
	default:
	}
	n.record.revoke("demo-g1", goodSerial, 1)
	if !<-answered {
		t.Fatal("row is written and not applied")
	}
	expect(t, n, a, goodSerial, "revoked")
}

func expired() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// TestDivergentDatabaseNodeIsPassedOver: the first node has another history; the second serves, and the first is named.
func TestDivergentDatabaseNodeIsPassedOver(t *testing.T) {
	histories := map[string]func([]db.FeedRow) []db.FeedRow{
		"hole": func(rows []db.FeedRow) []db.FeedRow {
			if len(rows) > 3 {
				rows = append(rows[:2], rows[3:]...)
			}
			return rows
		},
		"broken chain": func(rows []db.FeedRow) []db.FeedRow {
			for i := range rows {
				if rows[i].Seq == 3 {
					rows[i].Chain[5] ^= 1
				}
			}
			return rows
		},
		"altered row": func(rows []db.FeedRow) []db.FeedRow {
			for i := range rows {
				if rows[i].Seq == 3 {
					rows[i].Serial = []byte{6, 6, 6}
				}
			}
			return rows
		},
	}
	for name, alter := range histories {
		t.Run(name, func(t *testing.T) {
			n, a := populated(t)
			n.record.locked(func() { n.record.altered["db1"] = alter })
			third, fourth := []byte{3, 3}, []byte{4, 4}
			n.record.issue("demo-g1", third)
			n.record.issue("demo-g1", fourth)
			n.polled(t)
			expect(t, n, a, third, "good")
			expect(t, n, a, fourth, "good")
			alarm := ""
			for _, c := range n.Report().Checks {
				if c.Name == "database-history" && !c.OK {
					alarm = c.Detail
				}
			}
			if !strings.Contains(alarm, "db1") {
				t.Errorf("the node is not named: %q", alarm)
			}
			n.record.locked(func() {
				if len(n.record.accused) == 0 || n.record.accused[0] != "db1 ca1/0 2" {
					t.Errorf("accused: %q", n.record.accused)
				}
			})

			// Every node diverges: nothing is vouched for any more.
			n.record.locked(func() { n.record.altered["db2"] = alter; n.record.altered["db3"] = alter })
			n.record.locked(func() {
				rows := n.record.lanes["ca1/0"]
				for i := range rows {
					rows[i].Chain = [32]byte{}
				}
			})
			n.record.issue("demo-g1", []byte{5, 5})
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := n.Poll(ctx); err == nil {
				t.Error("a lane that all nodes show broken was read well")
			}
			n.clock.advance(ocsp.LeaseDuration + time.Second)
			expect(t, n, a, third, "try later")
		})
	}
}

func TestRowThatMustBeUnderstoodStopsGood(t *testing.T) {
	for _, p := range []ocsp.Policy{ocsp.Strict, ocsp.Serve} {
		n, a := populated(t, policy(p))
		n.record.add("ca1/0", 0x23, "demo-g1", nil, db.FeedPayload{}) // not critical
		n.polled(t)
		expect(t, n, a, goodSerial, "good")
		n.record.add("ca1/0", db.FeedCritical|0x23, "demo-g1", nil, db.FeedPayload{})
		eventually(t, "it is met", func() bool { return !n.Report().Capabilities["ocsp:demo-g1"].OK })
		expect(t, n, a, goodSerial, "try later")
		expect(t, n, a, revokedSerial, "revoked")
		if cause := n.Report().Capabilities["ocsp:demo-g1"].Cause; !strings.Contains(cause, "0xa3") {
			t.Errorf("%s: cause is %q", p, cause)
		}
	}
}

func TestLaneEndsWhereItWasClosed(t *testing.T) {
	n, _ := populated(t)
	n.record.add("ca1/0", db.FeedClosed, "", nil, db.FeedPayload{By: "ca2"})
	n.polled(t)
	late := []byte{8, 8, 8}
	n.record.issue("demo-g1", late)
	n.clock.advance(2 * time.Minute) // beyond the next look at ended lanes
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := n.Poll(ctx); err == nil || !strings.Contains(err.Error(), "beyond its end") {
		t.Errorf("a row beyond the end of a lane: %v", err)
	}
	if _, known := n.Lookup("demo-g1", serialOf(late)); known {
		t.Error("a row beyond the end of a lane took effect")
	}
}

func TestJoiningReplaysLongLanesInPages(t *testing.T) {
	a := newAuthority(t, "demo")
	m := newMemory("db1")
	m.generation(a, nil)
	const many = 2500
	for i := range many {
		m.issue("demo-g1", []byte{1, byte(i >> 8), byte(i)})
	}
	m.revoke("demo-g1", []byte{1, 9, 9}, 0)
	n := start(t, m, []*authority{a})
	n.settle(t)
	p := n.Position()
	if p.Vector["ca1/0"] != many || p.Issuers[0].Good != many-1 || p.Issuers[0].Revoked != 1 {
		t.Errorf("position after joining: %+v", p)
	}
}

func serialOf(octets []byte) ocsp.Serial {
	s, ok := ocsp.MakeSerial(octets)
	if !ok {
		panic("bad serial")
	}
	return s
}

// fact is one thing to merge into a table.
type fact struct {
	serial  ocsp.Serial
	outcome *ocsp.Outcome
	event   *ocsp.Event
}

func merge(table *ocsp.Table, f fact) {
	if f.outcome != nil {
		table.MergeOutcome(f.serial, *f.outcome)
	}
	if f.event != nil {
		table.MergeEvent(f.serial, *f.event)
	}
}

// TestStatusMergesInAnyOrder: lanes are mutually unordered, rows arrive repeatedly, and the table is always the same.
func TestStatusMergesInAnyOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		gen := rapid.Custom(func(t *rapid.T) fact {
			f := fact{serial: serialOf([]byte{byte(rapid.IntRange(1, 4).Draw(t, "serial"))})}
			if rapid.Bool().Draw(t, "outcome") {
				f.outcome = &ocsp.Outcome{
					Ver: uint32(rapid.IntRange(1, 3).Draw(t, "ver")), Abandoned: rapid.Bool().Draw(t, "abandoned"),
					NotAfter: int64(rapid.IntRange(0, 2).Draw(t, "not after")), Date: int64(rapid.IntRange(0, 2).Draw(t, "date")),
				}
			} else {
				f.event = &ocsp.Event{
					N: uint32(rapid.IntRange(1, 4).Draw(t, "n")), Kind: ocsp.EventKind(rapid.IntRange(1, 3).Draw(t, "kind")),
					Reason: uint8(rapid.IntRange(0, 3).Draw(t, "reason")), Date: int64(rapid.IntRange(0, 3).Draw(t, "date")),
				}
			}
			return f
		})
		facts := rapid.SliceOfN(gen, 0, 12).Draw(t, "facts")
		one, other := ocsp.NewTable(), ocsp.NewTable()
		for _, f := range facts {
			merge(one, f)
		}
		shuffle := rapid.Permutation(facts).Draw(t, "order")
		for _, f := range shuffle {
			merge(other, f)
			if rapid.Bool().Draw(t, "again") {
				merge(other, f)
			}
		}
		for b := byte(1); b <= 4; b++ {
			x, knownX := one.Lookup(serialOf([]byte{b}))
			y, knownY := other.Lookup(serialOf([]byte{b}))
			if knownX != knownY || x.Status != y.Status || x.NotAfter != y.NotAfter {
				t.Fatalf("serial %d: %+v in one order, %+v in another", b, x, y)
			}
			var issued, revoked bool
			for _, f := range facts {
				if f.serial == serialOf([]byte{b}) {
					issued = issued || f.outcome != nil && !f.outcome.Abandoned
					revoked = revoked || f.event != nil && f.event.Kind == ocsp.EventRevoke
				}
			}
			if x.State == ocsp.Good && !issued {
				t.Fatalf("serial %d is good without a certificate", b)
			}
		}
		if one.Counts() != other.Counts() {
			t.Fatalf("counts differ: %+v %+v", one.Counts(), other.Counts())
		}
	})
}

// TestLanesInterleaveFreely replays the same lanes through nodes that see them in different slices.
func TestLanesInterleaveFreely(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	a := newAuthority(t, "demo")
	m := newMemory("db1")
	m.generation(a, nil)
	n := start(t, m, []*authority{a})
	all := []func(){}
	var serials [][]byte
	for i := range 30 {
		s := []byte{2, byte(i + 1)}
		serials = append(serials, s)
		all = append(all, func() { m.issue("demo-g1", s) })
		if i%3 == 0 {
			all = append(all, func() { m.revoke("demo-g1", s, 0) })
		}
		if i%6 == 0 {
			all = append(all, func() {
				m.add("ca3/0", db.FeedRevocation, "demo-g1", s, db.FeedPayload{N: 2, Event: "reason-change", Reason: 1, Date: 1000})
			})
		}
	}
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, f := range all {
		f()
		if rnd.IntN(4) == 0 {
			n.polled(t)
		}
	}
	n.polled(t)
	n.settle(t)
	for i, s := range serials {
		v, known := n.Lookup("demo-g1", serialOf(s))
		want := ocsp.Status{State: ocsp.Good}
		switch {
		case i%6 == 0:
			want = ocsp.Status{State: ocsp.Revoked, Reason: 1, RevokedAt: 1000}
		case i%3 == 0:
			want.State = ocsp.Revoked
			want.RevokedAt = v.RevokedAt
		}
		if !known || v.Status != want {
			t.Errorf("serial %x: %+v, want %+v", s, v.Status, want)
		}
	}
}

func TestHoldAndReleaseAreEvents(t *testing.T) {
	n, a := populated(t)
	event := func(number uint32, kind string, reason uint8) {
		n.record.add("ca2/0", db.FeedRevocation, "demo-g1", goodSerial, db.FeedPayload{N: number, Event: kind, Reason: reason, Date: time.Now().Unix()})
		n.polled(t)
	}
	event(1, "hold", 6)
	expect(t, n, a, goodSerial, "revoked")
	event(3, "revoke", 1)
	event(2, "release", 0) // late: an older event
	expect(t, n, a, goodSerial, "revoked")
	event(4, "release", 0)
	expect(t, n, a, goodSerial, "good")
}

func TestReleaseBeforeItsCertificateIsNotGood(t *testing.T) {
	n, a := populated(t)
	early := []byte{7, 7, 7}
	n.record.add("ca2/0", db.FeedRevocation, "demo-g1", early, db.FeedPayload{N: 2, Event: "release", Date: 5})
	n.polled(t)
	expect(t, n, a, early, "try later")
	n.record.issue("demo-g1", early)
	n.polled(t)
	expect(t, n, a, early, "good")
}
