package hsmsync_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
)

func TestMembersAreDrainedAndComeBack(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		d.must("x")
		good(t, d.c.Standby(ctx, "c", "spare"))
		good(t, d.c.Drain(ctx, "c", "new fan"))
		good(t, d.c.Drain(ctx, "c", "new fan"))
		d.expect("a active, b active, c drained")
		d.at["c"].with("*", dead)
		late := d.must("late")[0]
		entries := len(d.chain.events())
		failed(t, d.c.Recover(ctx, "c", ""), "asking c")
		d.expect("a active, b active, c drained")
		if len(d.chain.events()) != entries {
			t.Error("it was refused, and the log says that it is to be recovered")
		}
		d.at["c"].with("*", nil)
		good(t, d.c.Recover(ctx, "c", "done"))
		d.expect("a active, b active, c standby") // as it was
		if _, there := d.at["c"].keys[late.ID]; !there {
			t.Error("it came back without a key")
		}
		good(t, d.c.Promote(ctx, "c", ""))
		d.expect("a active, b active, c active")
		before := len(d.chain.events())
		good(t, d.c.Promote(ctx, "c", ""))
		if len(d.chain.events()) != before {
			t.Error("promoted again, the log grew")
		}
		good(t, d.c.Recover(ctx, "a", "was quarantined"))
		if m, _ := d.state().Member("a"); m.Recovered != uint64(before+1) || m.State != hsmsync.MemberActive {
			t.Errorf("%+v", m)
		}
		failed(t, d.c.Drain(ctx, "nobody", ""), "no such member")
		failed(t, d.c.Recover(ctx, "nobody", ""), "no such member")
	})
}

func TestAMemberThatCannotProveAKeyDoesNotComeBack(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		keys := d.must("x", "y")
		good(t, d.c.Drain(ctx, "c", ""))
		// Two keys under each other's id: both sign, and neither is what it says.
		x, y := d.at["c"].keys[keys[0].ID], d.at["c"].keys[keys[1].ID]
		d.at["c"].keys[keys[0].ID], d.at["c"].keys[keys[1].ID] = softKey{x.KeySpec, y.Signer}, softKey{y.KeySpec, x.Signer}
		failed(t, d.c.Promote(ctx, "c", ""), "another key under the id")
		good(t, d.c.Drain(ctx, "c", ""))
		d.expect("a active, b active, c drained")
		d.at["c"].keys[keys[0].ID], d.at["c"].keys[keys[1].ID] = x, y
		d.at["c"].with("challenge", failing(hsm.ClassDevice))
		failed(t, d.c.Standby(ctx, "c", ""), "proving key")
		d.at["c"].with("challenge", nil)
		good(t, d.c.Standby(ctx, "c", ""))
		d.expect("a active, b active, c standby")
	})
}

func TestTheLastMembersStay(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		d.must("x")
		good(t, d.c.Remove(ctx, "c", "sold"))
		good(t, d.c.Remove(ctx, "c", "sold"))
		d.expect("a active, b active")
		for _, left := range []string{"a", "b"} {
			if f := d.at[left].forgotten; len(f) == 0 {
				t.Errorf("%s still knows the transport key of the member that was removed", left)
			}
		}
		failed(t, d.c.Remove(ctx, "b", ""), "it would leave 1", "2 copies")
		good(t, d.c.Drain(ctx, "b", ""))
		failed(t, d.c.Drain(ctx, "a", ""), "last member that serves")
		failed(t, d.c.Standby(ctx, "a", ""), "last active member")
		d.force = true
		forced := d.coordinator("sync1")
		failed(t, forced.Remove(ctx, "b", "burnt"), "it would leave 1", "to force it", "approval of 2 people")
		failed(t, forced.Drain(ctx, "a", ""), "last member that serves", "to force it")
		remove := d.grant(wanted(t, forced, func(c *hsmsync.Coordinator) error { return c.Remove(ctx, "b", "burnt") }), time.Hour)
		drain := d.grant(wanted(t, forced, func(c *hsmsync.Coordinator) error { return c.Drain(ctx, "a", "") }), time.Hour)
		failed(t, forced.Remove(ctx, "b", "burnt", drain), "what was approved is hsm-drain")
		failed(t, d.c.Remove(ctx, "b", "burnt", remove), "it would leave 1") // an approval forces nothing by itself
		good(t, forced.Remove(ctx, "b", "burnt", remove))
		good(t, forced.Drain(ctx, "a", "", drain))
		if m, _ := d.state().Departed("b"); m.State != hsmsync.MemberRemoved {
			t.Errorf("%+v", m)
		}
		d.expect("a drained")
		good(t, forced.Recover(ctx, "a", ""))
		d.expect("a active")
		failed(t, forced.Drain(ctx, "a", "", drain), "what was approved says since") // not a second time
	})
}

// The log says that a and b serve. Only c does.
func TestTheLastCopyStaysWhateverTheLogSays(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		d.must("x")
		d.at["a"].with("*", dead)
		d.at["b"].with("challenge", failing(hsm.ClassDevice))
		failed(t, d.c.Drain(ctx, "c", ""), "nothing could be signed", "asking a", "proving key")
		failed(t, d.c.Remove(ctx, "c", ""), "nothing could be signed")
		d.expect("a active, b active, c active")
		d.at["b"].with("challenge", nil)
		good(t, d.c.Drain(ctx, "c", ""))
		d.at["b"].with("challenge", failing(hsm.ClassDevice))
		failed(t, d.c.Remove(ctx, "c", ""), "nothing could be signed")
		d.force = true
		forced := d.coordinator("sync1")
		act := wanted(t, forced, func(c *hsmsync.Coordinator) error { return c.Remove(ctx, "c", "") })
		good(t, forced.Remove(ctx, "c", "", d.grant(act, time.Hour)))
		d.expect("a active, b active")
	})
}

// A replacement that was interrupted has removed the member and not entered it again.
func TestAnInterruptedReplacementIsRepeated(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		d.must("x")
		good(t, d.c.Remove(ctx, "c", "replaced by token 7"))
		gone, ok := d.state().Departed("c")
		if _, there := d.state().Member("c"); !ok || there || gone.Address == "" {
			t.Fatalf("%+v %v %v", gone, ok, there)
		}
		r := d.newcomer("c")
		r.Address = gone.Address
		good(t, d.c.Replace(ctx, r))
		d.expect("a active, b active, c active")
		if _, ok := d.state().Departed("c"); ok {
			t.Error("it is back and counts as gone")
		}
	})
}

func TestTheMasterIsNotRemoved(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		good(t, d.c.SetPolicy(t.Context(), hsmsync.Policy{Creation: hsmsync.CreationMaster, Master: "c"}))
		failed(t, d.c.Remove(t.Context(), "c", ""), "change the policy first")
		failed(t, d.c.SetPolicy(t.Context(), hsmsync.Policy{MinCopies: 4}), "enroll more first")
	})
}

func TestAPolicyThatProtectsLessNeedsPeople(t *testing.T) {
	strong := hsmsync.Policy{MinCopies: 3, DestroyAfter: 48 * time.Hour, Creation: hsmsync.CreationMaster, Master: "a"}
	for name, weaken := range map[string]func(*hsmsync.Policy){
		"fewer copies":       func(p *hsmsync.Policy) { p.MinCopies = 2 },
		"destroyed sooner":   func(p *hsmsync.Policy) { p.DestroyAfter = time.Hour },
		"anybody makes keys": func(p *hsmsync.Policy) { p.Creation = hsmsync.CreationAny },
	} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				ctx := t.Context()
				d.must("x")
				good(t, d.c.SetPolicy(ctx, strong)) // one person may do that
				weak := strong
				weaken(&weak)
				failed(t, d.c.SetPolicy(ctx, weak), "hsm-policy of ca", "approval of 2 people")
				act := wanted(t, d.c, func(c *hsmsync.Coordinator) error { return c.SetPolicy(ctx, weak) })
				grant := d.grant(act, time.Hour)
				other := weak
				other.DestroyAfter = time.Minute
				failed(t, d.c.SetPolicy(ctx, other, grant), "what was approved")
				good(t, d.c.SetPolicy(ctx, weak, grant))
				good(t, d.c.SetPolicy(ctx, weak))
				good(t, d.c.SetPolicy(ctx, strong))
				failed(t, d.c.SetPolicy(ctx, weak, grant), "what was approved says since") // not a second time
				if p := d.state().Policy; p.MinCopies != 3 || p.DestroyAfter != 48*time.Hour {
					t.Errorf("%+v", p)
				}
			})
		})
	}
}

func TestAPolicyDoesNotSayOfKeysWhatIsNotSo(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		k := d.must("x")[0]
		failed(t, d.c.SetPolicy(ctx, hsmsync.Policy{Driver: hsmsync.DriverExternal}), "were cloned with the domain key", "another group")
		failed(t, d.c.SetPolicy(ctx, hsmsync.Policy{Driver: hsmsync.DriverExternal, NonExtractable: true}), "can leave its token")
		good(t, d.retire(k.ID, ""))
		failed(t, d.c.SetPolicy(ctx, hsmsync.Policy{Driver: hsmsync.DriverExternal}), "were cloned with the domain key") // also of retired ones
	})
	atEmptyDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		good(t, d.setup(hsmsync.Policy{Driver: hsmsync.DriverExternal, NonExtractable: true}))
		good(t, d.c.SetPolicy(ctx, hsmsync.Policy{Driver: hsmsync.DriverExternal}))
		if p := d.state().Policy; p.NonExtractable {
			t.Errorf("what was taken back is in force still: %+v", p)
		}
	})
}

func TestRetiringAKeyNeedsPeople(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		keys := d.must("x", "y")
		failed(t, d.c.RetireKey(ctx, keys[0].ID, "old"), "key-retire of ca/"+string(keys[0].ID), "approval of 2 people")
		act := wanted(t, d.c, func(c *hsmsync.Coordinator) error { return c.RetireKey(ctx, keys[0].ID, "old") })
		grant := d.grant(act, time.Hour)
		failed(t, d.c.RetireKey(ctx, keys[1].ID, "old", grant), "what was approved is key-retire of ca/"+string(keys[0].ID))
		good(t, d.c.RetireKey(ctx, keys[0].ID, "old", grant))
		if k, _ := d.state().Key(keys[0].ID); k.State != hsmsync.StateRetired || len(k.Note.By) != 2 {
			t.Errorf("%+v", k)
		}
	})
}

func TestAGroupWithoutLiveKeysIsDeleted(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		k := d.must("x")[0]
		act := func(why string) []byte {
			a, err := d.c.DeleteAct(ctx, why)
			good(t, err)
			return d.grant(a, time.Hour)
		}
		failed(t, d.c.DeleteGroup(ctx, "moved", act("moved")), "retire them first", string(k.ID))
		early := act("moved")
		good(t, d.retire(k.ID, ""))
		failed(t, d.c.DeleteGroup(ctx, "moved", nil), "2 people")
		failed(t, d.c.DeleteGroup(ctx, "moved", act("another reason")), "why")
		failed(t, d.c.DeleteGroup(ctx, "moved", early), "keys left in tokens") // nobody knew of it when that was approved
		part, err := d.c.DeleteAct(ctx, "moved")
		good(t, err)
		delete(part.Detail, "members")
		failed(t, d.c.DeleteGroup(ctx, "moved", d.grant(part, time.Hour)), "does not say everything")
		good(t, d.c.DeleteGroup(ctx, "moved", act("moved")))
		good(t, d.c.DeleteGroup(ctx, "moved", nil)) // done already
		if s := d.state(); !s.Deleted || s.Ended.Why != "moved" || len(s.Ended.By) != 2 {
			t.Errorf("%+v", s.Ended)
		}
		if keys := len(d.at["a"].all()); keys != 1 {
			t.Errorf("a holds %d keys: deleting a group destroys nothing", keys)
		}
		_, err = d.make("y")
		failed(t, err, "deleted")
		for _, err := range []error{d.setup(hsmsync.Policy{}), d.c.Enroll(ctx, d.newcomer("d")), d.c.Drain(ctx, "a", ""), d.c.SetPolicy(ctx, hsmsync.Policy{MinCopies: 3})} {
			failed(t, err, "deleted")
		}
		if r, err := d.c.Reconcile(ctx); err != nil || !r.OK {
			t.Errorf("%+v %v", r, err)
		}
	})
}

func TestAnEntryThatIsLostAgainIsNotAcknowledged(t *testing.T) {
	for event, act := range map[string]func(*desk) error{
		"drain":   func(d *desk) error { return d.c.Drain(d.t.Context(), "c", "") },
		"standby": func(d *desk) error { return d.c.Standby(d.t.Context(), "c", "") },
		"remove":  func(d *desk) error { return d.c.Remove(d.t.Context(), "c", "") },
		"recover": func(d *desk) error { return d.c.Recover(d.t.Context(), "c", "") },
		"retired": func(d *desk) error { return d.retire(d.live()[0], "") },
		"active": func(d *desk) error {
			if d.at["d"] == nil {
				d.newcomer("d")
			}
			return d.c.Enroll(d.t.Context(), d.request("d"))
		},
	} {
		t.Run(event, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				d.must("x")
				d.chain.after = func(e hsmsync.Entry) error {
					if e.Event == event {
						d.chain.entries = d.chain.entries[:len(d.chain.entries)-1]
						d.chain.after = nil
					}
					return nil
				}
				failed(t, act(d), "lost the entry")
				good(t, act(d)) // and a repetition does it
				if e := d.chain.events(); e[len(e)-1] != event {
					t.Errorf("the log ends with %s", e[len(e)-1])
				}
			})
		})
	}
}

func TestAStaleCoordinatorDecidesAnew(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.must("x")
		good(t, d.c.Standby(t.Context(), "c", ""))
		// Between reading and writing another coordinator drains b: then a is the last one, and stays.
		d.chain.before = func(e hsmsync.Entry) error {
			d.chain.before = nil
			return d.coordinator("sync2").Standby(t.Context(), "b", "")
		}
		failed(t, d.c.Standby(t.Context(), "a", ""), "last active member")
		d.expect("a active, b standby, c standby")
	})
}

func TestARetiredKeyIsDestroyedAfterItsTimeByTwoPeople(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		keys := d.must("x", "y")
		act, err := d.c.DestroyAct(ctx, keys[0].ID)
		good(t, err)
		_, err = d.c.DestroyKey(ctx, keys[0].ID, d.grant(act, time.Hour))
		failed(t, err, "it is live: retire it first")
		good(t, d.retire(keys[0].ID, "rolled over"))
		good(t, d.retire(keys[0].ID, "rolled over"))
		_, err = d.c.DestroyKey(ctx, keys[0].ID, d.grant(act, time.Hour))
		failed(t, err, "24h0m0s must pass", "wait until")
		time.Sleep(25 * time.Hour)
		_, err = d.c.DestroyKey(ctx, keys[0].ID, nil)
		failed(t, err, "needs the approval of 2 people")
		other, err := d.c.DestroyAct(ctx, keys[1].ID)
		good(t, err)
		_, err = d.c.DestroyKey(ctx, keys[0].ID, d.grant(other, time.Hour))
		failed(t, err, "what was approved is")
		d.same("a", keys...)

		d.at["c"].with("*", dead)
		grant := d.grant(act, time.Hour)
		out, err := d.c.DestroyKey(ctx, keys[0].ID, grant)
		if err != nil || len(out.Done) != 2 || len(out.Left) != 1 || out.Left["c"] == "" {
			t.Fatalf("%+v %v", out, err)
		}
		d.same("a", keys[1])
		if k, _ := d.state().Key(keys[0].ID); k.State != hsmsync.StateDestroyed || len(k.Note.By) != 2 {
			t.Errorf("%+v", k)
		}
		// c comes back within the hour: the approval in the log is still in force.
		d.at["c"].with("*", nil)
		r, err := d.c.Reconcile(ctx)
		if err != nil || r.Destroyed != 1 || !r.OK {
			t.Fatalf("%+v %v", r, err)
		}
		d.same("c", keys[1])
		out, err = d.c.DestroyKey(ctx, keys[0].ID, grant)
		if err != nil || len(out.Left) != 0 {
			t.Errorf("%+v %v", out, err)
		}
		// It does not come back by an enrolment either.
		good(t, d.c.Enroll(ctx, d.newcomer("d")))
		d.same("d", keys[1])
	})
}

func TestADestroyedKeyBroughtBackByARestoredMemberWantsANewApproval(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		keys := d.must("x", "y")
		old := d.at["b"].keys[keys[0].ID]
		good(t, d.retire(keys[0].ID, ""))
		time.Sleep(25 * time.Hour)
		act, err := d.c.DestroyAct(ctx, keys[0].ID)
		good(t, err)
		_, err = d.c.DestroyKey(ctx, keys[0].ID, d.grant(act, time.Hour))
		good(t, err)
		time.Sleep(2 * time.Hour)
		d.at["b"].set(func() { d.at["b"].keys[keys[0].ID] = old; clear(d.at["b"].destroyed) })
		r, err := d.c.Reconcile(ctx)
		if err != nil || r.OK || r.Destroyed != 0 || len(r.Findings) != 1 {
			t.Fatalf("%+v %v", r, err)
		}
		failed(t, errorOf(r.Findings[0].Detail), "needs a new approval", "key-destroy of ca/"+string(keys[0].ID), "expired")
		d.same("b", keys...)
		out, err := d.c.DestroyKey(ctx, keys[0].ID, d.grant(act, time.Hour))
		if err != nil || len(out.Left) != 0 {
			t.Fatalf("%+v %v", out, err)
		}
		d.same("b", keys[1])
		if r, err := d.c.Reconcile(ctx); err != nil || !r.OK || len(r.Findings) > 0 {
			t.Errorf("%+v %v", r, err)
		}
	})
}

type errorOf string

func (e errorOf) Error() string { return string(e) }

func TestAnAbandonedKeyIsDestroyed(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		d.leaveBehind()
		id := d.state().Keys()[0].ID
		r, err := d.c.Reconcile(ctx)
		if err != nil || !r.OK || kinds(r) != "abandoned a, abandoned b" {
			t.Errorf("%+v %v", r, err)
		}
		time.Sleep(25 * time.Hour)
		act, err := d.c.DestroyAct(ctx, id)
		good(t, err)
		out, err := d.c.DestroyKey(ctx, id, d.grant(act, time.Hour))
		if err != nil || len(out.Left) != 0 || len(d.at["a"].keys)+len(d.at["b"].keys) != 0 {
			t.Errorf("%+v %v", out, err)
		}
	})
}

func TestARetirementThatIsLostAgainDestroysNothing(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		k := d.must("x")[0]
		good(t, d.retire(k.ID, ""))
		time.Sleep(25 * time.Hour)
		act, err := d.c.DestroyAct(ctx, k.ID)
		good(t, err)
		d.chain.after = func(e hsmsync.Entry) error {
			if e.Event == "destroyed" { // the database goes back to where the key was live
				d.chain.entries = d.chain.entries[:len(d.chain.entries)-2]
				d.chain.after = nil
			}
			return nil
		}
		_, err = d.c.DestroyKey(ctx, k.ID, d.grant(act, time.Hour))
		failed(t, err, "lost the entry")
		for _, m := range d.members {
			d.same(m.name, k)
		}
	})
}

func TestAgentsAreToldWhichKeysWereDestroyed(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		k := d.must("x", "y")[0]
		good(t, d.retire(k.ID, ""))
		time.Sleep(25 * time.Hour)
		act, err := d.c.DestroyAct(ctx, k.ID)
		good(t, err)
		_, err = d.c.DestroyKey(ctx, k.ID, d.grant(act, time.Hour))
		good(t, err)
		time.Sleep(48 * time.Hour) // the approval has expired
		good(t, d.c.Enroll(ctx, d.newcomer("d")))
		if b := d.at["d"].buried; len(b) != 1 || b[0] != k.ID {
			t.Errorf("a new agent was told of %v", b)
		}
		for range 3 {
			d.reconcile()
		}
		if n := d.at["a"].count("bury"); n != 1 {
			t.Errorf("told %d times", n)
		}
		d.at["a"].restart()
		d.reconcile()
		if n := d.at["a"].count("bury"); n != 2 {
			t.Errorf("after a restart told %d times", n)
		}
	})
}

func TestAgentsAreToldWhichKeysWereRetired(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx := t.Context()
		k := d.must("x", "y")[0]
		d.at["b"].with("*", dead)
		good(t, d.retire(k.ID, ""))
		told := func(name string, want ...hsm.KeyID) {
			t.Helper()
			if got := d.at[name].retired; !slices.Equal(got, want) {
				t.Errorf("%s was told of %v, want %v", name, got, want)
			}
		}
		told("a", k.ID) // at once
		told("b")
		d.at["b"].with("*", nil)
		time.Sleep(48 * time.Hour) // the approval has expired
		good(t, d.c.Enroll(ctx, d.newcomer("d")))
		for range 3 {
			d.reconcile()
		}
		told("a", k.ID)
		told("b", k.ID)
		told("d", k.ID)
		d.at["a"].restart()
		d.reconcile()
		told("a", k.ID, k.ID)
	})
}

// wanted is what people would have to approve for an act: the one thing that its dry run says.
func wanted(t testing.TB, c *hsmsync.Coordinator, act func(*hsmsync.Coordinator) error) hsmsync.Act {
	t.Helper()
	plan, err := c.DryRun(context.Background(), act)
	if err != nil || len(plan.Wants) != 1 {
		t.Fatalf("a dry run wants %+v approved: %v", plan.Wants, err)
	}
	return plan.Wants[0]
}

// retire retires a key as people approved.
func (d *desk) retire(id hsm.KeyID, why string) error {
	d.t.Helper()
	k, _ := d.state().Key(id)
	if k.State != hsmsync.StateLive {
		return d.c.RetireKey(d.t.Context(), id, why)
	}
	act := wanted(d.t, d.c, func(c *hsmsync.Coordinator) error { return c.RetireKey(d.t.Context(), id, why) })
	return d.c.RetireKey(d.t.Context(), id, why, d.grant(act, time.Hour))
}
