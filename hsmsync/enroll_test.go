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
)

func TestANewMemberServesOnceItHasProvedEveryKey(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		keys := d.must(labels(20)...)
		good(t, d.retire(keys[3].ID, "old"))
		good(t, d.c.SetEpoch(t.Context(), hsm.EpochRecord{Site: "here", Epoch: 1}))
		r := d.newcomer("d")
		info, fingerprint, err := d.c.Inspect(t.Context(), "d", r.Address)
		if err != nil || fingerprint != sum(d.at["d"].transport) || info.Member != "d" {
			t.Fatalf("%+v %s %v", info, fingerprint, err)
		}
		d.chain.before = func(e hsmsync.Entry) error {
			if e.Event == "active" {
				if n := d.at["d"].count("challenge"); n != 19 {
					t.Errorf("it proved %d keys before it became active, want the 19 live ones", n)
				}
			}
			return nil
		}
		r.Standby = false
		good(t, d.c.Enroll(t.Context(), r))
		d.chain.before = nil
		d.same("d", keys...)
		d.expect("a active, b active, c active, d active")
		if d.at["d"].epoch.Epoch != 1 {
			t.Errorf("its epoch is %+v", d.at["d"].epoch)
		}
		m, _ := d.state().Member("d")
		if len(m.By) != 2 || len(m.Approvals) == 0 || len(m.Request) == 0 {
			t.Errorf("the evidence is missing: %+v", m.Approved)
		}
		before := len(d.chain.events())
		good(t, d.c.Enroll(t.Context(), r)) // again
		if len(d.chain.events()) != before {
			t.Error("enrolled again, the log grew")
		}
		var steps []string
		for _, p := range d.seen {
			if p.Member == "d" && p.Done == p.Total {
				steps = append(steps, fmt.Sprintf("%s %d", p.Step, p.Total))
			}
		}
		if got := strings.Join(steps, ", "); got != "copy 19, copy 1, prove 19" {
			t.Errorf("progress was %q", got)
		}
		d.must("after") // it takes part from now on
		if d.at["d"].count("import") != 21 {
			t.Errorf("%d imports", d.at["d"].count("import"))
		}
	})
}

func TestAKeyThatBecomesLiveWhileAMemberJoinsIsBroughtToIt(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		made := 0
		d.chain.before = func(e hsmsync.Entry) error {
			if e.Event != "active" || made == 2 {
				return nil
			}
			made++
			_, err := d.coordinator("sync2").CreateKey(t.Context(), hsm.KeySpec{Label: fmt.Sprint("late-", made), Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
			return err
		}
		good(t, d.c.Enroll(t.Context(), d.newcomer("d")))
		if n := d.at["d"].count("challenge"); n != 3 || len(d.at["d"].keys) != 3 {
			t.Errorf("it proved %d keys and holds %d, want 3", n, len(d.at["d"].keys))
		}
		d.expect("a active, b active, c active, d active")
	})
}

func TestEnrollingGoesOnAfterAFailureAtAnyPoint(t *testing.T) {
	for _, op := range []string{"health", "transport", "import-domain", "inventory", "import", "challenge", "epoch"} {
		for form, f := range forms {
			t.Run(op+" "+form, func(t *testing.T) {
				atDesk(t, func(t *testing.T, d *desk) {
					keys := d.must(labels(9)...)
					good(t, d.c.SetEpoch(t.Context(), hsm.EpochRecord{Site: "here", Epoch: 1}))
					r := d.newcomer("d")
					failures := 0
					for n := 1; ; n += 2 {
						d.at["d"].with(op, once(n, f))
						if err := d.c.Enroll(t.Context(), r); err == nil {
							break
						}
						if m, ok := d.state().Member("d"); ok && m.State != hsmsync.MemberJoining {
							t.Fatalf("it is %s after a failure", m.State)
						}
						if failures++; failures > 30 {
							t.Fatal("never done")
						}
					}
					d.same("d", keys...)
					d.expect("a active, b active, c active, d active")
				})
			})
		}
	}
	for _, event := range []string{"member", "active"} {
		for _, written := range []bool{false, true} {
			t.Run(fmt.Sprintf("entry %s written %v", event, written), func(t *testing.T) {
				atDesk(t, func(t *testing.T, d *desk) {
					d.must("x")
					lost := errors.New("connection lost")
					first := true
					hook := func(e hsmsync.Entry) error {
						if e.Event == event && first {
							first = false
							return lost
						}
						return nil
					}
					if written {
						d.chain.after = hook
					} else {
						d.chain.before = hook
					}
					r := d.newcomer("d")
					if err := d.c.Enroll(t.Context(), r); err != nil {
						if written {
							t.Fatal(err)
						}
						good(t, d.c.Enroll(t.Context(), r))
					}
					d.expect("a active, b active, c active, d active")
				})
			})
		}
	}
}

func TestAnInterruptedEnrolmentCopiesWhatIsMissing(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must(labels(40)...)
		r := d.newcomer("d")
		ctx, cancel := context.WithCancel(t.Context())
		d.at["d"].with("import", once(25, func(_ context.Context, do func() error) error { cancel(); return do() }))
		if err := d.c.Enroll(ctx, r); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		had := len(d.at["d"].keys)
		d.at["d"].with("import", nil)
		before := d.at["d"].count("import")
		good(t, d.c.Enroll(t.Context(), r))
		if n := d.at["d"].count("import") - before; had < 25 || n != 40-had {
			t.Errorf("it held %d keys, and %d more were brought", had, n)
		}
	})
}

func TestAMemberThatRestartsWhileItJoinsProvesEverythingAgain(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must(labels(10)...)
		r := d.newcomer("d")
		d.at["d"].with("challenge", once(5, func(_ context.Context, do func() error) error { d.at["d"].restart(); return do() }))
		failed(t, d.c.Enroll(t.Context(), r), "restarted meanwhile")
		before := d.at["d"].count("challenge")
		good(t, d.c.Enroll(t.Context(), r))
		if n := d.at["d"].count("challenge") - before; n != 10 {
			t.Errorf("it proved %d keys", n)
		}
	})
}

func TestAnotherSourceGivesWhatOneCannot(t *testing.T) {
	for form, f := range forms {
		t.Run(form, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				keys := d.must(labels(6)...)
				d.at["b"].with("export", f)
				d.at["a"].with("export-domain", f)
				good(t, d.c.Enroll(t.Context(), d.newcomer("d")))
				d.same("d", keys...)
			})
		})
	}
}

func TestWhoMayNotJoinIsRefused(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(*desk, *hsmsync.EnrollRequest)
		want  string
	}{
		"not approved":          {func(_ *desk, r *hsmsync.EnrollRequest) { r.Grant = nil }, "needs the approval of 2 people"},
		"another token":         {func(d *desk, _ *hsmsync.EnrollRequest) { d.at["d"] = d.token("d") }, "what was approved says transport="},
		"approval expired":      {func(*desk, *hsmsync.EnrollRequest) { time.Sleep(2 * time.Hour) }, "expired"},
		"a copied token":        {func(d *desk, r *hsmsync.EnrollRequest) { d.share("d", "a"); *r = d.request("d") }, "share token"},
		"a key under an old id": {func(d *desk, _ *hsmsync.EnrollRequest) { d.plant("d") }, "holds another key under the id"},
		"of another group":      {func(d *desk, _ *hsmsync.EnrollRequest) { d.at["d"].kek = "foreign" }, "never the group's"},
		"nobody serves":         {func(d *desk, _ *hsmsync.EnrollRequest) { d.downAll() }, "no member that serves"},
		"not there":             {func(d *desk, _ *hsmsync.EnrollRequest) { d.at["d"].with("*", dead) }, "asking d"},
		"another epoch": {func(d *desk, _ *hsmsync.EnrollRequest) {
			for _, m := range d.members {
				m.epoch = hsm.EpochRecord{Site: "there", Epoch: 3}
			}
		}, "promotion record"},
	} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				d.must("x", "y")
				r := d.newcomer("d")
				test.spoil(d, &r)
				failed(t, d.c.Enroll(t.Context(), r), test.want)
				if m, ok := d.state().Member("d"); ok && m.State != hsmsync.MemberJoining {
					t.Errorf("it is %s", m.State)
				}
			})
		})
	}
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		for _, m := range d.members {
			m.epoch = hsm.EpochRecord{Site: "there", Epoch: 3}
		}
		r := d.newcomer("d")
		r.Epoch = &hsm.EpochRecord{Site: "there", Epoch: 3}
		good(t, d.c.Enroll(t.Context(), r))
		if d.at["d"].epoch.Epoch != 3 {
			t.Errorf("%+v", d.at["d"].epoch)
		}
	})
}

// plant puts a key of the test's own under the id of each live key.
func (d *desk) plant(name string) {
	for _, k := range d.state().In(hsmsync.StateLive) {
		d.at[name].keys[k.ID] = softKey{k.KeySpec, newSoftKey(d.t)}
	}
}

func (d *desk) downAll() {
	for _, m := range d.members {
		m.with("*", dead)
	}
}

func TestTwoCoordinatorsEnrollOneMember(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		keys := d.must(labels(10)...)
		r := d.newcomer("d")
		for _, op := range []string{"import", "challenge", "health"} {
			d.at["d"].with(op, slow(2*time.Millisecond))
		}
		done := make(chan error)
		go func() { done <- d.coordinator("sync2").Enroll(t.Context(), r) }()
		good(t, d.c.Enroll(t.Context(), r))
		good(t, <-done)
		d.same("d", keys...)
		d.expect("a active, b active, c active, d active")
	})
}

func TestAnExchangedTokenIsRefusedUntilItsMemberIsReplaced(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		keys := d.must(labels(5)...)
		fresh := d.newcomer("b") // a new token under an old name
		failed(t, d.c.Enroll(t.Context(), fresh), "replace the member")
		failed(t, d.c.Recover(t.Context(), "b", ""), "replace the member")
		_, err := d.make("z")
		failed(t, err, "replace the member")
		r, err := d.c.Reconcile(t.Context())
		if err != nil || r.OK || !strings.Contains(kinds(r), "token-changed b") || len(d.at["b"].keys) != 0 {
			t.Fatalf("%s %v", kinds(r), err)
		}
		bad := fresh
		bad.Grant = nil
		failed(t, d.c.Replace(t.Context(), bad), "approval")
		d.expect("a active, b active, c active") // nothing was removed for an act that cannot go on
		good(t, d.c.Replace(t.Context(), fresh))
		d.same("b", keys...)
		d.expect("a active, b active, c active")
		good(t, d.c.Replace(t.Context(), fresh)) // again
		if r, err := d.c.Reconcile(t.Context()); err != nil || !r.OK {
			t.Errorf("%s %v", kinds(r), err)
		}
	})
}

func TestReplacingGoesOnAfterAFailure(t *testing.T) {
	for _, op := range []string{"import-domain", "import", "challenge"} {
		t.Run(op, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				keys := d.must(labels(4)...)
				r := d.newcomer("b")
				d.at["b"].with(op, failing(hsm.ClassDevice))
				failed(t, d.c.Replace(t.Context(), r), "b")
				d.expect("a active, b joining, c active")
				d.must("made-meanwhile")
				d.at["b"].with(op, nil)
				good(t, d.c.Replace(t.Context(), r))
				if len(d.at["b"].keys) != len(keys)+1 {
					t.Errorf("it holds %d keys", len(d.at["b"].keys))
				}
				d.expect("a active, b active, c active")
			})
		})
	}
}

func TestAMemberMovesToAnotherAddress(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		r := d.request("c")
		r.Address, r.Site = "c.elsewhere:1", "there"
		failed(t, d.c.Enroll(t.Context(), r), "replace the member, which moves it")
		good(t, d.c.Replace(t.Context(), r))
		if m, _ := d.state().Member("c"); m.Address != "c.elsewhere:1" || m.Site != "there" || m.State != hsmsync.MemberActive || d.at["c"].count("import") != 1 {
			t.Errorf("%+v after %d imports", m, d.at["c"].count("import"))
		}
	})
}

func TestAMemberJoinsAGroupOfThousandsOfKeys(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		const n = 3300 // what a group of the largest kind holds
		signer := newSoftKey(t)
		for i := range n {
			k := softKey{hsm.KeySpec{ID: hsm.NewKeyID(), Label: fmt.Sprint("key-", i), Purpose: hsm.PurposeCA, Algorithm: hsm.P256}, signer}
			for _, m := range d.members {
				m.keys[k.ID] = k
			}
			d.chain.live(t, d.members[0].record(k))
		}
		r := d.newcomer("d")
		d.at["d"].with("import", once(n/2, failing(hsm.ClassDevice)))
		failed(t, d.c.Enroll(t.Context(), r), "importing key")
		had := len(d.at["d"].keys)
		before := d.at["d"].count("import")
		good(t, d.c.Enroll(t.Context(), r))
		if again := d.at["d"].count("import") - before; len(d.at["d"].keys) != n || again != n-had {
			t.Errorf("%d keys, %d of them brought by the second attempt, after %d", len(d.at["d"].keys), again, had)
		}
		if rep := d.reconcile(); !rep.OK || rep.Fewest != 4 {
			t.Errorf("%+v", rep.Findings)
		}
	})
}
