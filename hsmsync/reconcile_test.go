package hsmsync_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// kinds lists what a report says, as "kind member", sorted.
func kinds(r hsmsync.Report) string {
	var out []string
	for _, f := range r.Findings {
		out = append(out, strings.TrimSpace(f.Kind+" "+f.Member))
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), ", ")
}

func (d *desk) reconcile() hsmsync.Report {
	d.t.Helper()
	r, err := d.c.Reconcile(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	return r
}

func TestWhileNothingChangesDigestsAreCompared(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must(labels(10)...)
		if r := d.reconcile(); !r.OK || len(r.Findings) > 0 || r.Fewest != 3 || !r.Members[0].Inspected {
			t.Fatalf("%+v", r)
		}
		before := d.at["a"].count("inventory")
		for range 10 {
			time.Sleep(30 * time.Second)
			if r := d.reconcile(); !r.OK || r.Members[0].Inspected {
				t.Fatalf("%+v", r)
			}
		}
		if n := d.at["a"].count("inventory"); n != before {
			t.Errorf("the keys were listed %d times", n-before)
		}
		d.must("one-more") // the log moved on; the digests say that all have it
		if r := d.reconcile(); !r.OK || r.Members[0].Inspected || d.at["a"].count("inventory") != before {
			t.Fatalf("%+v", r)
		}
		time.Sleep(11 * time.Minute) // now and then they are listed all the same
		if r := d.reconcile(); !r.OK || !r.Members[0].Inspected {
			t.Fatalf("%+v", r)
		}
	})
}

// leaveBehind leaves copies of an abandoned key on a and b.
func (d *desk) leaveBehind() {
	d.t.Helper()
	d.at["c"].with("import", func(ctx context.Context, do func() error) error {
		time.Sleep(time.Second)
		return failing(hsm.ClassDevice)(ctx, do)
	})
	_, err := d.create()
	failed(d.t, err, "abandoned")
	d.at["c"].with("import", nil)
}

func TestALeftoverIsLookedAtOnce(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.leaveBehind()
		d.reconcile()
		before := d.at["a"].count("inventory")
		for range 5 {
			if r := d.reconcile(); kinds(r) != "abandoned a, abandoned b" || !r.OK {
				t.Fatalf("%+v", r)
			}
		}
		if n := d.at["a"].count("inventory"); n != before {
			t.Errorf("the keys were listed %d times", n-before)
		}
	})
}

func TestWhatIsNotAsTheLogSaysIsRepairedOrReported(t *testing.T) {
	other := hsm.KeySpec{ID: hsm.NewKeyID(), Label: "planted", Purpose: hsm.PurposeCA, Algorithm: hsm.P256}
	for name, test := range map[string]struct {
		spoil func(*desk, *token, hsm.KeyRecord) // member b, one of its keys
		want  string                             // kinds
		ok    bool                               // no alarm
		after string                             // kinds of the next pass; empty: the same, unless ok
	}{
		"a key is missing":           {func(_ *desk, b *token, k hsm.KeyRecord) { delete(b.keys, k.ID) }, "missing b", true, ""},
		"all keys are missing":       {func(_ *desk, b *token, _ hsm.KeyRecord) { clear(b.keys) }, "missing b", true, ""},
		"a key is half there":        {func(_ *desk, b *token, k hsm.KeyRecord) { b.faulty[k.ID] = "public half missing" }, "missing b", true, ""},
		"another key under its id":   {func(d *desk, b *token, k hsm.KeyRecord) { b.keys[k.ID] = softKey{k.KeySpec, newSoftKey(d.t)} }, "differs b", false, ""},
		"other attributes":           {func(_ *desk, b *token, k hsm.KeyRecord) { b.odd[k.ID] = "weaker" }, "attributes b", false, ""},
		"a key nobody knows":         {func(d *desk, b *token, _ hsm.KeyRecord) { b.keys[other.ID] = softKey{other, newSoftKey(d.t)} }, "unknown b", false, ""},
		"an object that is not ours": {func(_ *desk, b *token, _ hsm.KeyRecord) { b.foreign = []hsm.KeyRecord{{Foreign: true}} }, "foreign b", false, ""},
		"it is away":                 {func(_ *desk, b *token, _ hsm.KeyRecord) { b.with("*", dead) }, "unreachable b", false, ""},
		"it hangs":                   {func(_ *desk, b *token, _ hsm.KeyRecord) { b.with("*", hung) }, "unreachable b", false, ""},
		"it is locked":               {func(_ *desk, b *token, _ hsm.KeyRecord) { b.locked = "PIN refused" }, "locked b", false, ""},
		"it is unwell":               {func(_ *desk, b *token, _ hsm.KeyRecord) { b.probe = hsm.Probe{} }, "unwell b", false, ""},
		"its token was initialised":  {func(d *desk, _ *token, _ hsm.KeyRecord) { d.at["b"] = d.token("b") }, "token-changed b", false, ""},
		"its token is a copy":        {func(d *desk, _ *token, _ hsm.KeyRecord) { d.share("b", "a") }, "token-changed b", false, ""},
		"it lost its domain key":     {func(_ *desk, b *token, _ hsm.KeyRecord) { b.kek = "" }, "domain b", true, ""},
		"it has another domain key":  {func(_ *desk, b *token, _ hsm.KeyRecord) { b.kek = "foreign" }, "domain b", false, ""},
		"it is at another epoch":     {func(_ *desk, b *token, _ hsm.KeyRecord) { b.epoch.Epoch = 0 }, "epoch b", false, ""},
		"it cannot list its keys": {func(_ *desk, b *token, k hsm.KeyRecord) {
			delete(b.keys, k.ID)
			b.with("inventory", failing(hsm.ClassDevice))
		}, "unreachable b", false, ""},
		"a missing key cannot be brought": {func(_ *desk, b *token, k hsm.KeyRecord) {
			delete(b.keys, k.ID)
			b.with("import", failing(hsm.ClassDevice))
		}, "missing b", false, ""},
		"a stale token with a key swapped": {func(_ *desk, b *token, k hsm.KeyRecord) {
			for id := range b.keys {
				if id != k.ID {
					b.keys[k.ID], b.keys[id] = softKey{k.KeySpec, b.keys[id].Signer}, softKey{b.keys[id].KeySpec, b.keys[k.ID].Signer}
					break
				}
			}
		}, "differs b", false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				keys := d.must(labels(6)...)
				good(t, d.c.SetEpoch(t.Context(), hsm.EpochRecord{Site: "here", Epoch: 1}))
				d.reconcile()
				test.spoil(d, d.at["b"], keys[2])
				r := d.reconcile()
				if kinds(r) != test.want || r.OK != test.ok {
					t.Fatalf("%s, ok %v, want %s, %v: %+v", kinds(r), r.OK, test.want, test.ok, r.Findings)
				}
				for _, m := range d.members {
					if m.count("destroy") > 0 {
						t.Errorf("%s was asked to destroy something", m.name)
					}
				}
				again := d.reconcile()
				if test.ok {
					test.want = ""
				}
				if kinds(again) != test.want || again.OK != test.ok {
					t.Errorf("the next time %s, want %s: %+v", kinds(again), test.want, again.Findings)
				}
				if test.ok {
					d.same("b", keys...)
				}
			})
		})
	}
}

func TestKeysWithTooFewCopiesAreAlarmed(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		d.at["b"].with("*", dead)
		if r := d.reconcile(); r.Fewest != 2 || kinds(r) != "unreachable b" {
			t.Errorf("%+v", r)
		}
		d.at["c"].with("*", dead)
		if r := d.reconcile(); r.Fewest != 1 || kinds(r) != "copies, unreachable b, unreachable c" {
			t.Errorf("%+v", r)
		}
	})
}

func TestAJoiningMemberIsReportedAndLeftAlone(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		req := d.newcomer("d")
		d.at["d"].with("challenge", failing(hsm.ClassDevice))
		failed(t, d.c.Enroll(t.Context(), req), "proving")
		if r := d.reconcile(); kinds(r) != "joining d" || r.Fewest != 3 {
			t.Errorf("%+v", r)
		}
	})
}

// impostor signs with another private key than the public one that it shows.
type impostor struct {
	crypto.Signer
	public crypto.PublicKey
}

func (i impostor) Public() crypto.PublicKey { return i.public }

func TestVerifyingAsksEveryMemberToProveEveryKey(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		keys := d.must(labels(5)...)
		r, err := d.c.Verify(t.Context())
		if err != nil || !r.OK || len(r.Keys) != 5 || len(r.Members) != 3 || r.Fewest != 3 || r.Position != d.state().Next-1 {
			t.Fatalf("%+v %v", r, err)
		}
		for i, k := range r.Keys { // anybody can check the evidence
			public, err := keys[i].Algorithm.ParsePublic(keys[i].SPKI)
			good(t, err)
			for m, p := range k.Copies {
				good(t, hsm.Verify(public, hsm.ChallengeDigest(k.Algorithm, r.Group, m, p.Incarnation, k.ID, p.Nonce), p.Signature))
			}
			if len(k.Copies) != 3 || k.Fingerprint != sum(keys[i].SPKI) {
				t.Errorf("%+v", k)
			}
		}
		// A copy that has the right public half, and another private one, is seen by its signature alone.
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		good(t, err)
		copied := d.at["b"].keys[keys[0].ID]
		copied.Signer = impostor{private, copied.Public()}
		d.at["b"].keys[keys[0].ID] = copied
		delete(d.at["c"].keys, keys[4].ID)
		before := len(d.chain.events())
		r, err = d.c.Verify(t.Context())
		if err != nil || r.OK || kinds(r) != "missing c, unproved b, unproved c" || r.Fewest != 2 {
			t.Errorf("%s %+v %v", kinds(r), r, err)
		}
		if len(d.at["c"].keys) != 4 || len(d.chain.events()) != before {
			t.Error("verifying changed something")
		}
	})
}

func TestOneCoordinatorReconcilesAtATime(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		before := func() int { return d.at["a"].count("health") }
		first, stopFirst := context.WithCancel(t.Context())
		second, stopSecond := context.WithCancel(t.Context())
		done := make(chan error, 2)
		go func() { done <- d.c.RunReconcile(first, 0) }()
		time.Sleep(time.Second)
		go func() { done <- d.coordinator("sync2").RunReconcile(second, 0) }()
		at := before()
		time.Sleep(time.Hour)
		if n := before() - at; n < 110 || n > 125 {
			t.Errorf("%d passes in an hour, want 120", n)
		}
		if n := len(d.chain.logs["ca/lease"]); n > 10 {
			t.Errorf("%d entries about who does it, in an hour", n)
		}
		stopFirst() // it gives the lease back, and the other takes over at once
		good(t, <-done)
		at = before()
		time.Sleep(5 * time.Minute)
		if n := before() - at; n < 8 {
			t.Errorf("%d passes in 5 minutes", n)
		}
		stopSecond()
		good(t, <-done)
	})
}

func TestALeaseRunsOut(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		first, crash := context.WithCancel(t.Context())
		done := make(chan error, 2)
		go func() { done <- d.c.RunReconcile(first, 0) }()
		time.Sleep(time.Second)
		d.chain.fail(context.Canceled) // it cannot give it back
		crash()
		good(t, <-done)
		d.chain.fail(nil)
		ctx, stop := context.WithCancel(t.Context())
		go func() { done <- d.coordinator("sync2").RunReconcile(ctx, 0) }()
		at := d.at["a"].count("health")
		time.Sleep(9 * time.Minute)
		if n := d.at["a"].count("health") - at; n != 0 {
			t.Errorf("%d passes under somebody else's lease", n)
		}
		time.Sleep(3 * time.Minute)
		if n := d.at["a"].count("health") - at; n == 0 {
			t.Error("nobody reconciles")
		}
		stop()
		good(t, <-done)
	})
}

func TestReconciliationIsMeasured(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		registry := prometheus.NewRegistry()
		c, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
			Group: "ca", Identity: named(t, identity.RoleSync, "sync1"), Chain: d.chain, Now: d.now, Log: logger(t), Metrics: registry,
			Connect: func(name, _ string) hsmsync.Agent { return &answering{d: d, name: name} },
		})
		good(t, err)
		d.c = c
		good(t, d.c.Standby(t.Context(), "c", ""))
		d.at["c"].with("*", dead)
		d.must("x")
		time.Sleep(100 * time.Second)
		d.at["c"].with("*", nil)
		d.reconcile()
		d.at["b"].with("*", dead)
		d.reconcile()
		want := `
# HELP trivet_hsmsync_fewest_copies Copies, on members that answer, of the live key that has the fewest.
# TYPE trivet_hsmsync_fewest_copies gauge
trivet_hsmsync_fewest_copies{group="ca"} 2
# HELP trivet_hsmsync_findings What the last reconciliation found and could not repair, by kind.
# TYPE trivet_hsmsync_findings gauge
trivet_hsmsync_findings{group="ca",kind="unreachable"} 1
`
		good(t, testutil.GatherAndCompare(registry, strings.NewReader(want), "trivet_hsmsync_fewest_copies", "trivet_hsmsync_findings"))
		families, err := registry.Gather()
		good(t, err)
		for _, f := range families {
			if f.GetName() == "trivet_hsmsync_copy_lag_seconds" {
				if h := f.GetMetric()[0].GetHistogram(); h.GetSampleCount() != 1 || h.GetSampleSum() < 100 || h.GetSampleSum() > 110 {
					t.Errorf("lag %+v, want once 100 s", h)
				}
				return
			}
		}
		t.Error("no lag was measured")
	})
}

func TestAKeyThatIsBeingMadeIsNoAlarm(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		d.reconcile()
		// Between reading the log and asking c for its keys, another one is made.
		d.at["c"].restart()
		d.at["c"].with("inventory", once(1, func(ctx context.Context, do func() error) error {
			d.at["c"].with("inventory", nil)
			_, err := d.coordinator("sync2").CreateKey(ctx, hsm.KeySpec{Label: "y", Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
			good(t, err)
			return do()
		}))
		if r := d.reconcile(); !r.OK || len(r.Findings) > 0 {
			t.Errorf("%+v", r.Findings)
		}
	})
}

func TestAJoiningStandbyMemberBecomesStandby(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		r := d.newcomer("d")
		r.Standby = true
		good(t, d.c.Enroll(t.Context(), r))
		d.expect("a active, b active, c active, d standby")
	})
}
