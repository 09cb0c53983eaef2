package hsmsync_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
)

func TestAGroupIsSetUp(t *testing.T) {
	atEmptyDesk(t, func(t *testing.T, d *desk) {
		members := crew("a", "b", "c")
		members[2].Standby, members[2].Site = true, "there"
		good(t, d.c.Setup(t.Context(), members, hsmsync.Policy{Prefer: hsmsync.PreferLocal}))
		d.expect("a active, b active, c standby")
		if got := strings.Join(d.chain.events(), " "); got != "policy member member member domain active active standby" {
			t.Errorf("the log says %q", got)
		}
		s := d.state()
		if m, _ := s.Member("c"); m.Site != "there" || m.Transport != sum(d.at["c"].transport) || s.Policy.Prefer != hsmsync.PreferLocal || s.Policy.MinCopies != 2 {
			t.Errorf("%+v %+v", m, s.Policy)
		}
		for _, m := range d.members {
			if m.kek != s.Domain.Name || m.kek == "" || m.nextKEK != "" {
				t.Errorf("%s holds %q and %q", m.name, m.kek, m.nextKEK)
			}
			if len(m.known) < 2 {
				t.Errorf("%s knows %d others' transport keys, so that it could not hand them the next domain key", m.name, len(m.known))
			}
		}
		before := d.chain.events()
		d.must("x")
		good(t, d.c.Setup(t.Context(), members, hsmsync.Policy{}))
		if len(d.chain.events()) != len(before)+2 {
			t.Errorf("set up again, the log grew to %q", d.chain.events())
		}
	})
}

func TestSettingUpGoesOnAfterACrashAtAnyPoint(t *testing.T) {
	for _, op := range []string{"health", "transport", "domain", "export-domain", "import-domain", "inventory"} {
		for form, f := range forms {
			t.Run(op+" "+form, func(t *testing.T) {
				atEmptyDesk(t, func(t *testing.T, d *desk) {
					victim := d.at["b"]
					if op == "domain" || op == "export-domain" {
						victim = d.at["a"]
					}
					for n := 1; ; n++ { // the n-th call goes wrong, until none does
						victim.with(op, once(n, f))
						err := d.setup(hsmsync.Policy{})
						if err == nil {
							break
						}
						if n > 20 {
							t.Fatal(err)
						}
					}
					victim.with(op, nil)
					good(t, d.setup(hsmsync.Policy{}))
					d.expect("a active, b active, c active")
					d.must("x")
				})
			})
		}
	}
	for _, event := range []string{"member", "domain", "active"} {
		for _, written := range []bool{false, true} {
			t.Run(event, func(t *testing.T) {
				atEmptyDesk(t, func(t *testing.T, d *desk) {
					n := 0
					hook := func(e hsmsync.Entry) error {
						if n++; e.Event == event && n%2 == 0 {
							return hsm.Errorf(hsm.ClassDevice, "log", "connection lost")
						}
						return nil
					}
					if written {
						d.chain.after = hook
					} else {
						d.chain.before = hook
					}
					for try := 0; d.setup(hsmsync.Policy{}) != nil; try++ {
						if try > 10 {
							t.Fatal("never done")
						}
					}
					d.expect("a active, b active, c active")
				})
			})
		}
	}
}

func TestSettingUpRefusesWhatIsNotThere(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(*desk)
		want  string
	}{
		"dead":           {func(d *desk) { d.at["b"].with("*", dead) }, "asking b"},
		"shared":         {func(d *desk) { d.share("c", "a") }, "share token"},
		"another domain": {func(d *desk) { d.at["b"].kek = "foreign" }, "another group"},
		"locked":         {func(d *desk) { d.at["b"].locked = "not activated" }, "activate it"},
		"an impostor":    {func(d *desk) { d.at["b"].id = d.at["a"].id }, "vouched for by member a"},
	} {
		t.Run(name, func(t *testing.T) {
			atEmptyDesk(t, func(t *testing.T, d *desk) {
				test.spoil(d)
				failed(t, d.setup(hsmsync.Policy{}), test.want)
			})
		})
	}
	atEmptyDesk(t, func(t *testing.T, d *desk) {
		failed(t, d.setup(hsmsync.Policy{MinCopies: 1}), "min_copies")
		failed(t, d.c.Setup(t.Context(), nil, hsmsync.Policy{}), "no members")
		good(t, d.setup(hsmsync.Policy{}))
		d.must("x")
		d.newcomer("d")
		failed(t, d.c.Setup(t.Context(), crew("a", "b", "c", "d"), hsmsync.Policy{}), "enroll the member")
		good(t, d.c.Enroll(t.Context(), d.request("d")))
		good(t, d.c.Remove(t.Context(), "b", ""))
		good(t, d.c.Setup(t.Context(), crew("a", "b", "c"), hsmsync.Policy{})) // what was removed stays out
		d.expect("a active, c active, d active")
		moved := crew("a", "c")
		moved[1].Address = "elsewhere:1"
		failed(t, d.c.Setup(t.Context(), moved, hsmsync.Policy{}), "elsewhere")
	})
}

func TestTwoCoordinatorsSetUpOneGroup(t *testing.T) {
	atEmptyDesk(t, func(t *testing.T, d *desk) {
		for _, m := range d.members {
			for _, op := range []string{"health", "transport", "domain", "import-domain"} {
				m.with(op, slow(3*time.Millisecond))
			}
		}
		other := d.coordinator("sync2")
		done := make(chan error)
		go func() { done <- other.Setup(t.Context(), crew("a", "b", "c"), hsmsync.Policy{}) }()
		one, two := d.setup(hsmsync.Policy{}), <-done
		for range 2 { // a loser may have to repeat
			if one != nil {
				one = d.setup(hsmsync.Policy{})
			}
			if two != nil {
				two = other.Setup(t.Context(), crew("a", "b", "c"), hsmsync.Policy{})
			}
		}
		good(t, one)
		good(t, two)
		d.expect("a active, b active, c active")
		if n := len(slices.DeleteFunc(d.chain.events(), func(e string) bool { return e != "domain" })); n != 1 {
			t.Errorf("%d domain keys", n)
		}
		d.must("x")
	})
}

func TestTheFirstSiteEpochReachesEveryMember(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.at["c"].with("*", dead)
		failed(t, d.c.SetEpoch(t.Context(), hsm.EpochRecord{Site: "here", Epoch: 1}), "c")
		d.at["c"].with("*", nil)
		good(t, d.c.SetEpoch(t.Context(), hsm.EpochRecord{Site: "here", Epoch: 1}))
		for _, m := range d.members {
			if m.epoch.Epoch != 1 || m.epoch.Site != "here" || m.count("epoch") != 1 {
				t.Errorf("%s is at %+v after %d records", m.name, m.epoch, m.count("epoch"))
			}
		}
	})
}
