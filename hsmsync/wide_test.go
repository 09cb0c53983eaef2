package hsmsync_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"trivet/hsmsync"
	"trivet/identity"
)

// running is the desk's group as a CA node at a site runs it, until the test ends, once it has proved its keys.
func (d *desk) running(site string) *hsmsync.Group {
	d.t.Helper()
	g, err := hsmsync.New(hsmsync.Config{
		Group: "ca", Site: site, Identity: as(d.t, identity.RoleCA), Manifest: manifest{d.chain}, Log: logger(d.t),
		Connect: func(m hsmsync.Member) hsmsync.Agent { return d.at[m.Name] },
	})
	good(d.t, err)
	d.t.Cleanup(run(d.t, g))
	settle()
	return g
}

// signs makes n signatures, one after the other, and tells how many each member made, without those that made none.
func (d *desk) signs(k *hsmsync.Key, n int) map[string]int {
	d.t.Helper()
	made := map[string]int{}
	for name, m := range d.at {
		made[name] = -m.signed()
	}
	for range n {
		sigs, err := k.SignBatch(d.t.Context(), digests(1))
		good(d.t, err)
		verify(d.t, k, digests(1), sigs)
	}
	for name, m := range d.at {
		if made[name] += m.signed(); made[name] == 0 {
			delete(made, name)
		}
	}
	return made
}

// calls counts what members were ever asked.
func (d *desk) calls() (n int) {
	for _, m := range d.at {
		m.set(func() {
			for _, of := range m.calls {
				n += of
			}
		})
	}
	return n
}

// atWideDesk is atEmptyDesk with members of these names besides.
func atWideDesk(t *testing.T, names []string, test func(*testing.T, *desk)) {
	t.Helper()
	as(t, identity.RoleCA) // files are read outside the bubble
	for _, n := range names {
		named(t, identity.RoleHSMD, n)
	}
	atEmptyDesk(t, func(t *testing.T, d *desk) {
		for _, n := range names {
			d.at[n] = d.token(n)
		}
		test(t, d)
		time.Sleep(time.Minute) // for what was asked in vain and is still under way
	})
}

// TestWhoSignsKnowsTheGroupAlone exchanges every member of a group for another, of another name at another address, under
// one user of one key, who is never told.
func TestWhoSignsKnowsTheGroupAlone(t *testing.T) {
	others := []string{"x", "y", "z"}
	atWideDesk(t, others, func(t *testing.T, d *desk) {
		good(t, d.setup(hsmsync.Policy{}))
		record := d.must("issuing-g1")[0]
		g := d.running("here")
		key, err := g.Key(t.Context(), string(record.ID))
		good(t, err)
		signs := func(want ...string) {
			t.Helper()
			made := d.signs(key, 30)
			for _, n := range want {
				if made[n] != 30/len(want) {
					t.Fatalf("signatures were made by %v, want as many by each of %v", made, want)
				}
			}
		}
		all := []string{"a", "b", "c"}
		signs(all...)
		for i, name := range others {
			gone := all[0]
			d.at[gone].with("*", dead) // at any time, without a word
			if made := d.signs(key, 30); made[gone] != 0 {
				t.Fatalf("signatures were made by %v, and %s is dead", made, gone)
			}
			good(t, d.c.Enroll(t.Context(), d.newcomer(name)))
			good(t, d.c.Remove(t.Context(), gone, "dead"))
			settle()
			asked := d.at[gone].count("health")
			all = append(all[1:], name)
			signs(all...)
			settle()
			if now := d.at[gone].count("health"); now != asked {
				t.Errorf("%s is not a member any more, and was asked %d times", gone, now-asked)
			}
			if i == len(others)-1 {
				d.expect("x active, y active, z active")
			}
		}
	})
}

// TestQuestionsAboutKeysAskNoMember has the group's log answer them: the same whether members are there or not.
func TestQuestionsAboutKeysAskNoMember(t *testing.T) {
	atWideDesk(t, nil, func(t *testing.T, d *desk) {
		good(t, d.setup(hsmsync.Policy{}))
		records := d.must(labels(50)...)
		good(t, d.retire(records[7].ID, "old"))
		g := d.running("here")
		answers := func() string {
			t.Helper()
			var out []string
			s, err := d.c.State(t.Context())
			good(t, err)
			for _, k := range s.Keys() {
				out = append(out, fmt.Sprintf("%s %s %s %s", k.ID, k.Label, k.State, sum(k.SPKI)))
			}
			for i, r := range records {
				key, err := g.Key(t.Context(), string(r.ID))
				if i == 7 {
					failed(t, err, "retired")
					continue
				}
				good(t, err)
				out = append(out, fmt.Sprint(key.Record().Label, key.Public()))
			}
			return strings.Join(out, "\n")
		}
		quiet := func() { time.Sleep(10 * time.Millisecond); synctest.Wait() } // no question about health falls due at this moment
		quiet()
		before := d.calls()
		was := answers()
		if n := d.calls() - before; n != 0 {
			t.Errorf("members were asked %d times", n)
		}
		for _, m := range d.at {
			m.with("*", dead)
		}
		settle()
		quiet()
		before = d.calls()
		if now := answers(); now != was {
			t.Errorf("with every member dead the answers are\n%s\nand were\n%s", now, was)
		}
		if n := d.calls() - before; n != 0 {
			t.Errorf("dead members were asked %d times", n)
		}
	})
}

// TestTwentyEightMembersAreOneHSM has as many members as the largest cluster of AWS CloudHSM.
func TestTwentyEightMembersAreOneHSM(t *testing.T) {
	var names []string
	for i := range 28 {
		names = append(names, fmt.Sprintf("m%02d", i))
	}
	atWideDesk(t, names, func(t *testing.T, d *desk) {
		good(t, d.c.Setup(t.Context(), crew(names...), hsmsync.Policy{}))
		records := d.must(labels(5)...)
		for _, n := range names {
			d.same(n, records...)
		}
		g := d.running("here")
		key, err := g.Key(t.Context(), string(records[0].ID))
		good(t, err)
		if n, err := g.Ready(string(records[0].ID)); n != 28 || err != nil {
			t.Fatalf("%d members may be given work: %v", n, err)
		}
		for n, made := range d.signs(key, 280) {
			if made != 10 {
				t.Errorf("%s made %d of 280 signatures", n, made)
			}
		}
		for _, n := range names[1:] { // until one is left
			d.at[n].with("*", dead)
			if made := d.signs(key, 1); made[n] != 0 {
				t.Fatalf("%s is dead and signed", n)
			}
		}
		_, err = d.make("one-more")
		failed(t, err, "m01", "m27") // names who is missing
		for _, n := range names[1:] {
			d.at[n].with("*", nil)
		}
		settle()
		if made := d.signs(key, 280); len(made) != 28 {
			t.Errorf("all are back, and the work is done by %v", made)
		}

		lost := d.at["m17"]
		lost.set(func() { delete(lost.keys, records[2].ID) })
		if r := d.reconcile(); r.Copied != 1 {
			t.Errorf("reconciliation brought %d copies of the one that was lost: %+v", r.Copied, r.Findings)
		}
		if r := d.reconcile(); !r.OK || r.Fewest != 28 {
			t.Errorf("a key has %d copies: %+v", r.Fewest, r.Findings)
		}
		good(t, d.c.Enroll(t.Context(), d.newcomer("d"))) // nothing ends at 28
		d.same("d", append(slices.Clone(records), d.must("after")...)...)
	})
}

// TestFourSitesHoldEveryKey has one member at each of four sites, and a process at each.
func TestFourSitesHoldEveryKey(t *testing.T) {
	sites := []string{"north", "east", "south", "west"}
	atWideDesk(t, sites, func(t *testing.T, d *desk) {
		var members []hsmsync.Member
		for _, s := range sites { // a member is called as its site
			members = append(members, hsmsync.Member{Name: s, Address: s + ".example:1", Site: s})
		}
		policy := hsmsync.Policy{MinCopies: 4, Prefer: hsmsync.PreferLocal, Sites: sites}
		good(t, d.c.Setup(t.Context(), members, policy))
		record := d.must("issuing-g1")[0]
		keys := map[string]*hsmsync.Key{}
		for _, s := range sites {
			d.same(s, record)
			var err error
			keys[s], err = d.running(s).Key(t.Context(), string(record.ID))
			good(t, err)
		}
		// work says where the work of the process at each site is done.
		work := func(want map[string]string) {
			t.Helper()
			settle()
			for _, s := range sites {
				made, places := d.signs(keys[s], 12), strings.Fields(want[s])
				for _, at := range places {
					if made[at] != 12/len(places) {
						t.Errorf("the work of %s is done by %v, want %v", s, made, places)
					}
				}
			}
		}
		atHome := map[string]string{"north": "north", "east": "east", "south": "south", "west": "west"}
		work(atHome)

		d.at["south"].with("*", dead)
		work(map[string]string{"north": "north", "east": "east", "south": "north east west", "west": "west"})
		_, err := d.make("while-south-is-away")
		failed(t, err, "south")
		good(t, d.c.Drain(t.Context(), "south", "a flood"))
		_, err = d.make("in-three-places")
		failed(t, err, "4") // of the copies that policy wants
		d.at["south"].with("*", nil)
		good(t, d.c.Recover(t.Context(), "south", "dry again"))
		work(atHome) // by itself

		for _, s := range sites[1:] {
			d.at[s].with("*", dead)
		}
		work(map[string]string{"north": "north", "east": "north", "south": "north", "west": "north"})
		for _, s := range sites[1:] {
			d.at[s].with("*", nil)
		}
		settle()
		d.must("in-four-places-again")
		if r := d.reconcile(); !r.OK || r.Fewest != 4 {
			t.Errorf("a key has %d copies: %+v", r.Fewest, r.Findings)
		}

		// In the order of Sites, whoever asks.
		policy.Prefer, policy.Sites = hsmsync.PreferPriority, []string{"west", "south", "east", "north"}
		good(t, d.c.SetPolicy(t.Context(), policy))
		first := func(s string) map[string]string {
			return map[string]string{"north": s, "east": s, "south": s, "west": s}
		}
		work(first("west"))
		d.at["west"].with("*", dead)
		work(first("south"))
		d.at["south"].with("*", dead)
		work(first("east"))
		d.at["west"].with("*", nil)
		work(first("west"))
		d.at["south"].with("*", nil)
	})
}
