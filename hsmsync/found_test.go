package hsmsync_test

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// founding is three members, of which the last is a standby.
func founding() hsmsync.Founding {
	f := hsmsync.Founding{Members: crew("a", "b", "c"), Policy: hsmsync.Policy{Prefer: hsmsync.PreferLocal}, Epoch: &hsm.EpochRecord{Site: "here", Epoch: 1}, Why: "tests"}
	f.Members[2].Standby = true
	return f
}

// agreed is the approval of a founding.
func (d *desk) agreed(f hsmsync.Founding) []byte {
	d.t.Helper()
	act, _, err := d.c.CreateAct(d.t.Context(), f)
	good(d.t, err)
	return d.grant(act, time.Hour)
}

func TestAGroupIsCreatedAsPeopleHaveApproved(t *testing.T) {
	atEmptyDesk(t, func(t *testing.T, d *desk) {
		ctx, f := t.Context(), founding()
		act, all, err := d.c.CreateAct(ctx, f)
		good(t, err)
		for i, name := range []string{"a", "b", "c"} {
			if print := sum(d.at[name].transport); all[i].Transport != print || !strings.Contains(act.Detail["member "+name], print) {
				t.Errorf("%s: %+v, %q", name, all[i], act.Detail)
			}
		}
		failed(t, d.c.CreateGroup(ctx, f, nil), "2 people")
		fewer := f
		fewer.Members = f.Members[:2]
		failed(t, d.c.CreateGroup(ctx, f, d.agreed(fewer)), "does not say everything")
		failed(t, d.c.CreateGroup(ctx, fewer, d.agreed(f)), "member c")
		if n := len(d.chain.events()); n > 0 {
			t.Fatalf("%d entries before anybody agreed", n)
		}
		grant := d.agreed(f)
		good(t, d.c.CreateGroup(ctx, f, grant))
		d.expect("a active, b active, c standby")
		if got := strings.Join(d.chain.events(), " "); got != "created policy member member member domain active active standby" {
			t.Errorf("the log says %q", got)
		}
		s := d.state()
		if s.Created.Why != "tests" || len(s.Created.By) != 2 || s.Policy.Prefer != hsmsync.PreferLocal || hsm.DomainGroup(s.Domain.Name) != "ca" {
			t.Errorf("%+v", s)
		}
		for _, m := range d.members {
			if m.epoch.Epoch != 1 {
				t.Errorf("%s is at %+v", m.name, m.epoch)
			}
		}
		d.must("x")
		good(t, d.c.CreateGroup(ctx, f, grant)) // once more is once
		failed(t, d.c.CreateGroup(ctx, f, d.agreed(f)), "there already")
	})
}

func TestCreatingAGroupGoesOnAfterACrashAtAnyPoint(t *testing.T) {
	for _, event := range []string{"created", "policy", "member", "domain", "active"} {
		for _, form := range []string{"not done", "done but reported failed"} {
			t.Run(event+" "+form, func(t *testing.T) {
				atEmptyDesk(t, func(t *testing.T, d *desk) {
					f := founding()
					grant := d.agreed(f)
					n := 0
					hook := func(e hsmsync.Entry) error {
						if e.Event != event {
							return nil
						}
						if n++; n%2 == 1 {
							d.chain.mu.Lock()
							d.chain.down = hsm.Errorf(hsm.ClassDevice, "log", "connection lost") // nor can it be read whether it was written
							d.chain.mu.Unlock()
							return d.chain.down
						}
						return nil
					}
					if form == "not done" {
						d.chain.before = hook
					} else {
						d.chain.after = func(e hsmsync.Entry) error { // the chain's lock is held
							if e.Event != event {
								return nil
							}
							if n++; n%2 == 1 {
								d.chain.down = hsm.Errorf(hsm.ClassDevice, "log", "connection lost")
								return d.chain.down
							}
							return nil
						}
					}
					tries := 0
					for d.c.CreateGroup(t.Context(), f, grant) != nil {
						d.chain.fail(nil)
						if tries++; tries > 10 {
							t.Fatal("never done")
						}
					}
					if tries == 0 {
						t.Fatal("nothing went wrong")
					}
					d.expect("a active, b active, c standby")
					d.must("x")
				})
			})
		}
	}
}

// The approval of a creation that was interrupted expires, or a member is found to be broken: a new one finishes it, or ends it.
func TestAnInterruptedCreationIsFinishedOrEnded(t *testing.T) {
	interrupted := func(t *testing.T, d *desk) hsmsync.Founding { // b and c have been entered and do not serve
		f := founding()
		d.at["b"].with("import-domain", dead)
		if d.c.CreateGroup(t.Context(), f, d.agreed(f)) == nil {
			t.Fatal("created")
		}
		d.at["b"].with("import-domain", nil)
		if got := d.state().Unfinished(); !slices.Equal(got, []string{"a", "b", "c"}) {
			t.Fatalf("unfinished: %v", got)
		}
		time.Sleep(25 * time.Hour)
		return f
	}
	for name, test := range map[string]func(*testing.T, *desk, hsmsync.Founding){
		"as it was begun": func(t *testing.T, d *desk, f hsmsync.Founding) {
			good(t, d.c.CreateGroup(t.Context(), f, d.agreed(f)))
			d.expect("a active, b active, c standby")
			if n := strings.Count(strings.Join(d.chain.events(), " "), "created"); n != 1 {
				t.Errorf("it began %d times", n)
			}
		},
		"with another member": func(t *testing.T, d *desk, f hsmsync.Founding) {
			d.newcomer("d")
			f.Members = crew("a", "c", "d")
			failed(t, d.c.CreateGroup(t.Context(), f, d.agreed(f)), "b was entered", "remove it first")
			good(t, d.c.Remove(t.Context(), "b", "broken"))
			failed(t, d.c.CreateGroup(t.Context(), f, d.agreed(f)), "standby true")
			f.Members[1].Standby = true
			failed(t, d.c.CreateGroup(t.Context(), f, nil), "2 people")
			old := f
			old.Members = append(crew("b"), f.Members...)
			failed(t, d.c.CreateGroup(t.Context(), old, d.agreed(old)), "b was removed")
			good(t, d.c.CreateGroup(t.Context(), f, d.agreed(f)))
			d.expect("a active, c standby, d active")
		},
		"not at all": func(t *testing.T, d *desk, f hsmsync.Founding) {
			act, err := d.c.DeleteAct(t.Context(), "never mind")
			good(t, err)
			good(t, d.c.DeleteGroup(t.Context(), "never mind", d.grant(act, time.Hour)))
			if !d.state().Deleted {
				t.Error("it goes on")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			atEmptyDesk(t, func(t *testing.T, d *desk) {
				test(t, d, interrupted(t, d))
				if got := d.state().Unfinished(); len(got) > 0 {
					t.Errorf("unfinished: %v", got)
				}
			})
		})
	}
}

func TestAGroupThatCannotBeIsNotCreated(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(*desk, *hsmsync.Founding)
		want  string
	}{
		"fewer members than copies": {func(_ *desk, f *hsmsync.Founding) { f.Policy.MinCopies = 4 }, "min_copies 4"},
		"one copy":                  {func(_ *desk, f *hsmsync.Founding) { f.Policy.MinCopies = 1 }, "min_copies 1"},
		"a master from elsewhere": {func(_ *desk, f *hsmsync.Founding) {
			f.Policy.Creation, f.Policy.Master = hsmsync.CreationMaster, "d"
		}, "no active member"},
		"standbys alone": {func(_ *desk, f *hsmsync.Founding) {
			for i := range f.Members {
				f.Members[i].Standby = true
			}
		}, "every member is a standby"},
		"one token twice": {func(d *desk, _ *hsmsync.Founding) { d.share("c", "a") }, "share token"},
		"dead":            {func(d *desk, _ *hsmsync.Founding) { d.at["b"].with("*", dead) }, "asking b"},
	} {
		t.Run(name, func(t *testing.T) {
			atEmptyDesk(t, func(t *testing.T, d *desk) {
				f := founding()
				test.spoil(d, &f)
				_, _, err := d.c.CreateAct(t.Context(), f)
				failed(t, err, test.want)
				failed(t, d.c.CreateGroup(t.Context(), f, nil), test.want)
			})
		})
	}
	t.Run("under a bad name", func(t *testing.T) {
		for _, name := range []string{"", "A", "a/b", "a b", "-a", "ä", strings.Repeat("a", 27)} {
			if hsmsync.CheckGroupName(name) == nil {
				t.Errorf("%q is let through", name)
			}
		}
		good(t, hsmsync.CheckGroupName(strings.Repeat("a", 26)))
	})
	t.Run("of another group's members", func(t *testing.T) {
		atDesk(t, func(t *testing.T, d *desk) { // a, b and c are group ca's
			f := founding()
			_, _, err := d.of("va").CreateAct(t.Context(), f)
			failed(t, err, "belongs to another group")
			failed(t, d.of("va").Setup(t.Context(), f.Members, f.Policy), "belongs to another group")
			for _, m := range d.members { // who has no domain key, as in a group that the vendor clones, is found in the record
				m.kek = ""
			}
			_, _, err = d.of("va").CreateAct(t.Context(), f)
			failed(t, err, "belongs to group ca as")
			failed(t, d.of("va").Setup(t.Context(), f.Members, f.Policy), "belongs to group ca as")
			if n := len(d.chain.logs["va"]); n > 0 {
				t.Errorf("%d entries", n)
			}
			d.newcomer("d")
			d.newcomer("e")
			f.Members, f.Epoch = crew("d", "e"), nil
			act, _, err := d.of("other").CreateAct(t.Context(), f)
			good(t, err)
			good(t, d.of("other").CreateGroup(t.Context(), f, d.grant(act, time.Hour)))
			failed(t, d.c.Enroll(t.Context(), d.request("d")), "belongs to group other")
		})
	})
}

// of is a coordinator of another group.
func (d *desk) of(group string) *hsmsync.Coordinator {
	d.t.Helper()
	c, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: group, Identity: named(d.t, identity.RoleSync, "sync1"), Chain: d.chain, Now: d.now, Log: logger(d.t),
		Connect: func(name, _ string) hsmsync.Agent { return &answering{d: d, name: name} },
	})
	good(d.t, err)
	return c
}

// TestEveryGroupIsReconciledUntilItIsDeleted has a group come, and go, while the job runs.
func TestEveryGroupIsReconciledUntilItIsDeleted(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- hsmsync.ReconcileAll(ctx, hsmsync.CoordinatorConfig{
				Identity: named(t, identity.RoleSync, "sync1"), Chain: d.chain, Now: d.now, Log: logger(t),
				Connect: func(name, _ string) hsmsync.Agent { return &answering{d: d, name: name} },
			}, d.chain, 10*time.Second)
		}()
		asked := func() map[string]int { // in a minute
			before := map[string]int{}
			for name, m := range d.at {
				before[name] = m.count("health")
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			now := map[string]int{}
			for name := range before {
				if n := d.at[name].count("health") - before[name]; n > 0 {
					now[name] = n
				}
			}
			return now
		}
		if got := asked(); len(got) != 3 {
			t.Errorf("asked: %v", got)
		}
		d.newcomer("d")
		d.newcomer("e")
		other, f := d.of("va"), hsmsync.Founding{Members: crew("d", "e")}
		act, _, err := other.CreateAct(ctx, f)
		good(t, err)
		good(t, other.CreateGroup(ctx, f, d.grant(act, time.Hour)))
		if got := asked(); len(got) != 5 {
			t.Errorf("with a second group, asked: %v", got)
		}
		d.chain.fail(context.DeadlineExceeded) // who cannot read goes on when he can
		asked()
		d.chain.fail(nil)
		if got := asked(); len(got) != 5 {
			t.Errorf("after the database was gone, asked: %v", got)
		}
		if act, err = other.DeleteAct(ctx, "done"); err == nil {
			err = other.DeleteGroup(ctx, "done", d.grant(act, time.Hour))
		}
		good(t, err)
		asked()
		if got := asked(); len(got) != 3 || got["d"]+got["e"] > 0 {
			t.Errorf("after it was deleted, asked: %v", got)
		}
		stop()
		good(t, <-done)
		if leases := maps.Clone(d.chain.logs); len(leases["ca/lease"]) == 0 || len(leases["va/lease"]) == 0 {
			t.Errorf("each group has its lease: %d entries, %d", len(leases["ca/lease"]), len(leases["va/lease"]))
		}
	})
}
