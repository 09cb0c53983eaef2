package hsmsync_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

func TestAKeyIsOnEveryMemberAndProvedBeforeItLives(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		before := len(d.chain.events())
		d.chain.before = func(e hsmsync.Entry) error {
			if e.Event == "live" {
				for _, m := range d.members {
					if m.count("challenge") != 1 {
						t.Errorf("%s has not proved the key when it goes live", m.name)
					}
				}
			}
			return nil
		}
		r, err := d.create()
		good(t, err)
		if got := strings.Join(d.chain.events()[before:], " "); got != "pending live" {
			t.Errorf("the log says %q", got)
		}
		again, err := d.create()
		if err != nil || again.ID != r.ID || len(d.chain.events()) != before+2 {
			t.Errorf("created again: %v %v", again, err)
		}
		if d.members[0].count("generate") != 1 || d.members[1].count("generate") != 0 {
			t.Error("generated on more than one member")
		}
		d.chain.before = nil
		other, err := d.c.CreateKey(t.Context(), hsm.KeySpec{Label: "issuing-g1", Purpose: hsm.PurposeCRL, Algorithm: hsm.P384})
		if err != nil || other.ID == r.ID {
			t.Errorf("another purpose: %v %v", other, err)
		}
		_, err = d.c.CreateKey(t.Context(), hsm.KeySpec{Label: "issuing-g1", Purpose: hsm.PurposeCRL, Algorithm: hsm.P256})
		failed(t, err, "live already", "P-384")
		for _, m := range d.members {
			d.same(m.name, r, other)
		}
	})
}

func TestAFailureAtAnyStepAbandonsTheKeyAndDestroysNothing(t *testing.T) {
	for step, want := range map[string]string{
		"generate": "generating it on a", "export": "exporting key", "import": "into c", "challenge": "on c",
	} {
		for form, f := range forms {
			t.Run(step+" "+form, func(t *testing.T) {
				atDesk(t, func(t *testing.T, d *desk) {
					victim := d.at["c"]
					if step == "generate" || step == "export" {
						victim = d.at["a"]
					}
					victim.with(step, f)
					_, err := d.create()
					failed(t, err, want, "abandoned")
					if e := d.chain.events(); e[len(e)-1] != "abandoned" || len(d.live()) != 0 {
						t.Fatalf("the log says %q", e)
					}
					victim.with(step, nil)
					r, err := d.create()
					if err != nil || !slices.Equal(d.live(), []hsm.KeyID{r.ID}) {
						t.Fatalf("afterwards %v, live %v: %v", r.ID, d.live(), err)
					}
					for _, m := range d.members {
						if m.count("destroy") > 0 {
							t.Errorf("%s was asked to destroy something", m.name)
						}
					}
				})
			})
		}
	}
}

func TestAWrongCloneAbandonsTheKey(t *testing.T) {
	for name, spoil := range map[string]struct {
		do   func(*testing.T, *token)
		want string
	}{
		"another key signs": {func(t *testing.T, b *token) {
			b.with("challenge", func(_ context.Context, do func() error) error {
				b.set(func() {
					for id, k := range b.keys {
						b.keys[id] = softKey{k.KeySpec, newSoftKey(t)}
					}
				})
				return do()
			})
		}, "does not verify"},
		"another key is imported": {func(t *testing.T, b *token) { b.instead = newSoftKey(t) }, "holds another key"},
	} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				spoil.do(t, d.at["b"])
				_, err := d.create()
				failed(t, err, spoil.want, "abandoned")
				if len(d.live()) != 0 {
					t.Error("live all the same")
				}
			})
		})
	}
}

func TestACallerThatGivesUpLeavesTheKeyAbandoned(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.at["b"].with("import", hung)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := d.c.CreateKey(ctx, hsm.KeySpec{Label: "x", Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
		if e := d.chain.events(); !errors.Is(err, context.DeadlineExceeded) || e[len(e)-1] != "abandoned" {
			t.Fatalf("the log says %q: %v", e, err)
		}
	})
}

func TestAKeyLeftPendingByACrashIsFinished(t *testing.T) {
	for _, at := range []string{"generate", "import", "challenge"} {
		t.Run(at, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				before := len(d.chain.events())
				crash := errors.New("crash")
				d.chain.after = func(e hsmsync.Entry) error {
					if e.Event == "pending" {
						d.chain.down = crash
					}
					return nil
				}
				for _, m := range d.members {
					m.with(at, lostAnswer)
				}
				_, err := d.create()
				failed(t, err, "crash")
				d.chain.down, d.chain.after = nil, nil
				for _, m := range d.members {
					m.with(at, nil)
				}
				r, err := d.create()
				good(t, err)
				if got := strings.Join(d.chain.events()[before:], " "); got != "pending live" || !slices.Equal(d.live(), []hsm.KeyID{r.ID}) {
					t.Errorf("the log says %q", got)
				}
				for _, m := range d.members {
					d.same(m.name, r)
				}
			})
		})
	}
}

func TestAPendingKeyWhoseMakerIsGoneIsMadeAnew(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		crash := errors.New("crash")
		d.chain.after = func(e hsmsync.Entry) error {
			if e.Event == "pending" {
				d.chain.down = crash
			}
			return nil
		}
		d.at["a"].with("generate", lostAnswer) // and if it has made it, another member must not make another one under that id
		_, err := d.create()
		failed(t, err, "crash")
		d.chain.down, d.chain.after = nil, nil
		good(t, d.c.Drain(t.Context(), "a", "burnt"))
		before := len(d.chain.events())
		r, err := d.create()
		good(t, err)
		if got := strings.Join(d.chain.events()[before:], " "); got != "abandoned pending live" || !slices.Equal(d.live(), []hsm.KeyID{r.ID}) {
			t.Errorf("the log says %q", got)
		}
		d.same("b", r)
		d.same("c", r)
	})
}

func TestAnotherKindOfKeyUnderALabelThatIsBeingMadeIsRefused(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.at["b"].with("import", slow(time.Minute))
		var making sync.WaitGroup
		making.Go(func() {
			if _, err := d.create(); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(time.Second)
		_, err := d.coordinator("sync2").CreateKey(t.Context(), hsm.KeySpec{Label: "issuing-g1", Purpose: hsm.PurposeCA, Algorithm: hsm.P384})
		failed(t, err, "is being made", "P-256", "choose another label")
		making.Wait()
		_, err = d.coordinator("sync2").CreateKey(t.Context(), hsm.KeySpec{Label: "issuing-g1", Purpose: hsm.PurposeCA, Algorithm: hsm.P384})
		failed(t, err, "live already")
	})
}

// One of two that make a key cannot reach a member, and gives the key up.
func TestAKeyThatAnotherCoordinatorGivesUpIsMadeAnew(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		hurried, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		d.at["c"].with("import", slow(4*time.Second))
		var both sync.WaitGroup
		both.Go(func() {
			_, err := d.coordinator("sync2").CreateKey(hurried, hsm.KeySpec{Label: "issuing-g1", Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the one that gives up: %v", err)
			}
		})
		var r hsm.KeyRecord
		both.Go(func() {
			time.Sleep(time.Second)
			var err error
			if r, err = d.create(); err != nil {
				t.Error(err)
			}
		})
		both.Wait()
		if !slices.Equal(d.live(), []hsm.KeyID{r.ID}) {
			t.Errorf("made %s, live are %v; the log says %q", r.ID, d.live(), d.chain.events())
		}
	})
}

func TestAnEntryReportedLostMayHaveBeenWritten(t *testing.T) {
	lost := errors.New("connection lost")
	for _, event := range []string{"pending", "live", "abandoned"} {
		for _, written := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s written %v", event, written), func(t *testing.T) {
				atDesk(t, func(t *testing.T, d *desk) {
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
					if event == "abandoned" {
						d.at["b"].with("import", failing(hsm.ClassDevice))
					}
					_, err := d.create()
					switch {
					case event == "abandoned":
						failed(t, err, "into b")
					case written: // it is there when looked for, so all is well
						good(t, err)
					case !errors.Is(err, lost):
						t.Fatalf("error %v", err)
					}
					d.at["b"].with("import", nil)
					r, err := d.create()
					if err != nil || !slices.Equal(d.live(), []hsm.KeyID{r.ID}) {
						t.Fatalf("afterwards %v, live %v: %v", r.ID, d.live(), err)
					}
				})
			})
		}
	}
}

func TestALiveEntryThatAnotherDatabaseNodeLacksIsNotAcknowledged(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.chain.elsewhere = func(e []hsmsync.Entry) []hsmsync.Entry {
			return slices.DeleteFunc(e, func(e hsmsync.Entry) bool { return e.Event == "live" })
		}
		_, err := d.create()
		failed(t, err, "lost the entry")
		// The copies stay, whatever the log has lost: nothing automatic destroys a key that may have been live.
		d.chain.elsewhere = nil
		d.chain.cut(1)
		for _, m := range d.members {
			if len(m.keys) != 1 {
				t.Errorf("%s holds %d keys", m.name, len(m.keys))
			}
		}
		r, err := d.c.Reconcile(t.Context())
		if err != nil || r.Destroyed > 0 || len(d.at["a"].keys) != 1 {
			t.Errorf("%+v %v", r, err)
		}
	})
}

func TestCoordinatorsAtOnceMakeOneLiveKey(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		var all sync.WaitGroup
		var mu sync.Mutex
		made := map[hsm.KeyID]bool{}
		for _, m := range d.members {
			m.with("import", slow(20*time.Millisecond))
		}
		for i := range 4 {
			c := d.coordinator("sync1")
			all.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				r, err := c.CreateKey(t.Context(), hsm.KeySpec{Label: "issuing-g1", Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
				mu.Lock()
				defer mu.Unlock()
				if made[r.ID] = true; err != nil {
					t.Errorf("the coordinator that came as number %d: %v", i, err)
				}
			})
		}
		all.Wait()
		if live := d.live(); len(live) != 1 || len(made) != 1 || !made[live[0]] {
			t.Fatalf("live %v, acknowledged %v", live, made)
		}
	})
}

func TestKeysAreNotCreatedUnlessEveryActiveMemberIsThere(t *testing.T) {
	for name, spoil := range map[string]struct {
		do   func(*desk)
		want []string
	}{
		"dead":       {func(d *desk) { d.at["c"].with("*", dead) }, []string{"asking c", "drained"}},
		"exchanged":  {func(d *desk) { d.at["c"] = d.token("c") }, []string{"exchanged", "replace the member"}},
		"shared":     {func(d *desk) { d.share("c", "a") }, []string{"replace the member"}},
		"no kek":     {func(d *desk) { d.at["c"].kek = "" }, []string{"member c holds domain key"}},
		"locked":     {func(d *desk) { d.at["c"].locked = "PIN refused" }, []string{"locked", "activate it"}},
		"unwell":     {func(d *desk) { d.at["c"].probe = hsm.Probe{Cause: "hung"} }, []string{"cannot sign"}},
		"impostor":   {func(d *desk) { d.at["c"] = d.at["b"] }, []string{`answers as member "b"`}},
		"ed25519":    {nil, []string{"no HSM wraps Ed25519", "vendor"}},
		"unwrapable": {nil, []string{"never leaves its token", "vendor"}},
		"probe":      {nil, []string{"probe keys"}},
	} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				spec := hsm.KeySpec{Label: "x", Purpose: hsm.PurposeCA, Algorithm: hsm.P256}
				switch before := d.chain.events(); name {
				case "ed25519":
					spec.Algorithm = hsm.Ed25519
				case "unwrapable":
					spec.NonExtractable = true
				case "probe":
					spec.Purpose = hsm.PurposeProbe
				default:
					spoil.do(d)
					defer func() {
						if !slices.Equal(before, d.chain.events()) {
							t.Errorf("the log grew to %q", d.chain.events())
						}
					}()
				}
				_, err := d.c.CreateKey(t.Context(), spec)
				failed(t, err, spoil.want...)
			})
		})
	}
}

// share gives a member the very token of another one, as a copied token directory does.
func (d *desk) share(name, of string) {
	d.at[name].transport, d.at[name].serial = d.at[of].transport, d.at[of].serial
}

func TestAStandbyMemberThatIsAwayReceivesTheKeyLater(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		good(t, d.c.Standby(t.Context(), "c", "spare"))
		for step, f := range map[string]fault{"*": dead, "import": failing(hsm.ClassDevice)} {
			d.at["c"].with(step, f)
			r := d.must("away-" + strings.Trim(step, "*"))[0]
			d.at["c"].with(step, nil)
			if _, there := d.at["c"].keys[r.ID]; there {
				t.Fatal("it holds the key already")
			}
			report, err := d.c.Reconcile(t.Context())
			if err != nil || report.Copied != 1 || !report.OK {
				t.Fatalf("%+v %v", report, err)
			}
			if _, there := d.at["c"].keys[r.ID]; !there {
				t.Fatal("it does not hold the key")
			}
		}
		// An active member fewer: two copies are two copies; one is too few.
		d.at["c"].with("*", dead)
		good(t, d.c.Drain(t.Context(), "b", ""))
		_, err := d.make("lonely")
		failed(t, err, "members that can hold it are 1", "2 copies")
	})
}

func TestTheMasterMakesKeys(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		p := hsmsync.Policy{Creation: hsmsync.CreationMaster, Master: "b"}
		good(t, d.c.SetPolicy(t.Context(), p))
		d.must("x")
		if d.at["b"].count("generate") != 1 || d.at["a"].count("generate") != 0 {
			t.Error("somebody else made it")
		}
		good(t, d.c.Drain(t.Context(), "b", "away"))
		_, err := d.make("y")
		failed(t, err, "member b alone", "existing keys are not affected")
		// Once it is active again it makes them again, and nobody else does.
		good(t, d.c.Recover(t.Context(), "b", "back"))
		before := d.at["b"].count("generate")
		d.must("z")
		if d.at["b"].count("generate") != before+1 || d.at["a"].count("generate") != 0 || d.at["c"].count("generate") != 0 {
			t.Error("somebody else made it")
		}
		failed(t, d.c.SetPolicy(t.Context(), hsmsync.Policy{Creation: hsmsync.CreationMaster, Master: "nobody"}), "no active member")
	})
}

func TestAMemberThatBecomesActiveMeanwhileReceivesTheKeyBeforeItLives(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		old := d.must("old")
		good(t, d.c.Drain(t.Context(), "c", ""))
		d.chain.before = func(e hsmsync.Entry) error {
			if e.Event != "live" {
				return nil
			}
			d.chain.before = nil
			// At this very moment c comes back: it takes the position that the key wanted.
			return d.coordinator("sync2").Promote(t.Context(), "c", "")
		}
		k := d.must("new")
		d.same("c", append(old, k...)...)
		if e := d.chain.events(); strings.Join(e[len(e)-2:], " ") != "active live" || d.at["c"].count("challenge") != 3 {
			t.Errorf("the log ends %q, c proved %d keys", e[len(e)-3:], d.at["c"].count("challenge"))
		}
	})
}

func TestWhereTheVendorClonesKeysAreWaitedFor(t *testing.T) {
	atEmptyDesk(t, func(t *testing.T, d *desk) {
		good(t, d.setup(hsmsync.Policy{Driver: hsmsync.DriverExternal, NonExtractable: true}))
		d.expect("a active, b active, c active")
		clone := func(to ...string) {
			for _, m := range to {
				d.at["a"].set(func() {
					for id, k := range d.at["a"].keys {
						d.at[m].set(func() { d.at[m].keys[id] = k })
					}
				})
			}
		}
		go func() { time.Sleep(7 * time.Second); clone("b", "c") }()
		began := time.Now()
		r, err := d.c.CreateKey(t.Context(), hsm.KeySpec{Label: "x", Purpose: hsm.PurposeCA, Algorithm: hsm.Ed25519})
		good(t, err)
		if took := time.Since(began); !r.NonExtractable || took < 7*time.Second || took > 9*time.Second {
			t.Errorf("%+v after %v", r, took)
		}
		if n := d.at["a"].count("export") + d.at["b"].count("import") + d.at["a"].count("domain"); n > 0 {
			t.Error("something was wrapped")
		}
		_, err = d.make("never-cloned")
		failed(t, err, "vendor has not cloned 1 keys to member", "abandoned")
		// A copy that the vendor has lost is reported, and left to the vendor.
		d.at["b"].set(func() { delete(d.at["b"].keys, r.ID) })
		report, err := d.c.Reconcile(t.Context())
		if err != nil || report.OK || report.Copied > 0 || !strings.Contains(kinds(report), "missing b") {
			t.Errorf("%+v %v", report, err)
		}
		// A newcomer waits for the vendor, too.
		req := d.newcomer("d")
		go func() { time.Sleep(3 * time.Second); clone("d") }()
		good(t, d.c.Enroll(t.Context(), req))
		_, err = d.c.CreateKey(t.Context(), hsm.KeySpec{Label: "y", Purpose: "unknown", Algorithm: hsm.P256})
		failed(t, err, "purpose")
		failed(t, d.c.SetPolicy(t.Context(), hsmsync.Policy{}), "driver wrap")
		failed(t, d.c.RotateDomain(t.Context()), "vendor")
	})
}

func TestACeremonyMakesOnlyTheKeysItMayProve(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.c = d.as(named(t, identity.RoleCeremony, "ceremony1"))
		d.must("x")
		_, err := d.c.CreateKey(t.Context(), hsm.KeySpec{Label: "r", Purpose: hsm.PurposeOCSP, Algorithm: hsm.P256})
		failed(t, err, "may not have keys for ocsp proved")
		_, err = hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{Group: "ca", Identity: named(t, identity.RoleAdmin, "admin1"), Chain: d.chain, Log: logger(t)})
		failed(t, err, "role sync")
	})
}

func TestAnOverloadedMemberIsAskedAgain(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.at["c"].with("import", once(1, failing(hsm.ClassOverloaded)))
		d.must("x")
	})
}
