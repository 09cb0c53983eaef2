package hsmsync_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// desk is a coordinator over three software members in one domain, in virtual time.
type desk struct {
	t       *testing.T
	chain   *memory
	members []*software
	group   *hsmsync.Group
}

func atDesk(t *testing.T, test func(*testing.T, *desk)) {
	as(t, identity.RoleSync)
	synctest.Test(t, func(t *testing.T) {
		d := &desk{t: t, chain: &memory{}, members: []*software{newSoftware("a"), newSoftware("b"), newSoftware("c")}}
		d.group = newGroup(t, identity.RoleSync, d.chain, d.members, nil)
		if err := d.group.CreateDomain(t.Context()); err != nil {
			t.Fatal(err)
		}
		test(t, d)
	})
}

func (d *desk) create() (hsm.KeyRecord, error) {
	return d.group.CreateKey(d.t.Context(), "issuing-g1", hsm.PurposeCA, hsm.P256)
}

// live lists the live keys.
func (d *desk) live() (ids []hsm.KeyID) {
	d.t.Helper()
	keys, err := d.chain.Keys(d.t.Context(), "ca")
	if err != nil {
		d.t.Fatal(err)
	}
	for _, k := range keys {
		if k.State == hsmsync.StateLive {
			ids = append(ids, k.ID)
		}
	}
	return ids
}

func TestAKeyIsOnEveryMemberAndProvedBeforeItLives(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
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
		if err != nil {
			t.Fatal(err)
		}
		if got, want := strings.Join(d.chain.events(), " "), "member member member domain pending live"; got != want {
			t.Errorf("the log says %q, want %q", got, want)
		}
		again, err := d.create()
		if err != nil || again.ID != r.ID || len(d.chain.events()) != 6 {
			t.Errorf("created again: %v %v", again, err)
		}
		if d.members[0].count("generate") != 1 || d.members[1].count("generate") != 0 {
			t.Error("generated on more than one member")
		}
		d.chain.before = nil
		if other, err := d.group.CreateKey(t.Context(), "issuing-g1", hsm.PurposeCRL, hsm.P256); err != nil || other.ID == r.ID {
			t.Errorf("another purpose: %v %v", other, err)
		}
	})
}

func TestCreatingTheDomainAgainChangesNothing(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		before := d.chain.events()
		if err := d.group.CreateDomain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(before, d.chain.events()) {
			t.Errorf("the log grew to %q", d.chain.events())
		}
		kek := d.members[0].kek
		for _, m := range d.members {
			if m.kek != kek || kek == "" {
				t.Errorf("member %s holds %q, a %q", m.name, m.kek, kek)
			}
		}
		d.members[1].kek = "" // as after a crash half-way
		if err := d.group.CreateDomain(t.Context()); err != nil || d.members[1].kek != kek || d.members[0].count("domain") != 1 {
			t.Errorf("domain %q, made %d times: %v", d.members[1].kek, d.members[0].count("domain"), err)
		}
		d.members[2].kek = "foreign"
		if err := d.group.CreateDomain(t.Context()); err == nil || !strings.Contains(err.Error(), "foreign") {
			t.Errorf("a member of another domain: %v", err)
		}
	})
}

func TestAFailureAtAnyStepAbandonsTheKeyAndDestroysNothing(t *testing.T) {
	for step, want := range map[string]string{
		"generate": "generating it on a", "export": "exporting it from a", "import": "importing it into c", "challenge": "proving it on c",
	} {
		for form, f := range map[string]fault{
			"not done": failing(hsm.ClassDevice),
			"done but reported failed": func(_ context.Context, do func() error) error {
				return errors.Join(do(), hsm.Errorf(hsm.ClassDevice, step, "answer lost"))
			},
			"hung": hung,
		} {
			t.Run(step+" "+form, func(t *testing.T) {
				atDesk(t, func(t *testing.T, d *desk) {
					victim := d.members[2]
					if step == "generate" || step == "export" {
						victim = d.members[0]
					}
					victim.with(step, f)
					if _, err := d.create(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "abandoned") {
						t.Fatalf("error %v, want one that says %q", err, want)
					}
					if e := d.chain.events(); e[len(e)-1] != "abandoned" || len(d.live()) != 0 {
						t.Fatalf("the log says %q", e)
					}
					victim.with(step, nil)
					r, err := d.create()
					if err != nil || !slices.Equal(d.live(), []hsm.KeyID{r.ID}) {
						t.Fatalf("afterwards %v, live %v: %v", r.ID, d.live(), err)
					}
				})
			})
		}
	}
}

func TestAWrongCloneAbandonsTheKey(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		b := d.members[1]
		b.with("challenge", func(_ context.Context, do func() error) error {
			b.mu.Lock()
			for id, k := range b.keys {
				b.keys[id] = softKey{k.KeySpec, newSoftKey(t)}
			}
			b.mu.Unlock()
			return do()
		})
		if _, err := d.create(); err == nil || !strings.Contains(err.Error(), "proving it on b") {
			t.Fatal(err)
		}
		if len(d.live()) != 0 {
			t.Error("live all the same")
		}
		// The member is quarantined: nothing can be created without it.
		if _, err := d.create(); err == nil || !strings.Contains(err.Error(), "quarantined") {
			t.Fatal(err)
		}
	})
}

func TestAnotherKeyUnderTheSameIDAbandonsTheKey(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		b := d.members[1]
		b.instead = newSoftKey(t)
		if _, err := d.create(); err == nil || !strings.Contains(err.Error(), "importing it into b") {
			t.Fatal(err)
		}
		if len(d.live()) != 0 {
			t.Error("live all the same")
		}
	})
}

func TestACallerThatGivesUpLeavesTheKeyAbandoned(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		d.members[1].with("import", hung)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := d.group.CreateKey(ctx, "issuing-g1", hsm.PurposeCA, hsm.P256)
		if e := d.chain.events(); !errors.Is(err, context.DeadlineExceeded) || e[len(e)-1] != "abandoned" {
			t.Fatalf("the log says %q: %v", e, err)
		}
	})
}

func TestAKeyLeftPendingByACrashIsAbandonedAndMadeAnew(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		crash := errors.New("crash")
		d.chain.after = func(e hsmsync.Entry) error {
			if e.Event == "pending" {
				d.chain.down = crash
			}
			return nil
		}
		for _, m := range d.members {
			m.with("generate", failing(hsm.ClassDevice))
		}
		if _, err := d.create(); !errors.Is(err, crash) || !strings.Contains(err.Error(), "stays pending") {
			t.Fatal(err)
		}
		d.chain.down, d.chain.after = nil, nil
		for _, m := range d.members {
			m.with("generate", nil)
		}
		r, err := d.create()
		if err != nil {
			t.Fatal(err)
		}
		e := d.chain.events()
		if got := strings.Join(e[4:], " "); got != "pending abandoned pending live" || !slices.Equal(d.live(), []hsm.KeyID{r.ID}) {
			t.Errorf("the log says %q", got)
		}
	})
}

func TestAnEntryReportedLostMayHaveBeenWritten(t *testing.T) {
	lost := errors.New("connection lost")
	for _, event := range []string{"pending", "live", "abandoned"} {
		for _, written := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s written %v", event, written), func(t *testing.T) {
				atDesk(t, func(t *testing.T, d *desk) {
					once := true
					hook := func(e hsmsync.Entry) error {
						if e.Event == event && once {
							once = false
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
						d.members[1].with("import", failing(hsm.ClassDevice))
					}
					_, err := d.create()
					if !errors.Is(err, lost) {
						t.Fatalf("error %v", err)
					}
					d.members[1].with("import", nil)
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
		if _, err := d.create(); err == nil || !strings.Contains(err.Error(), "lost the entry") {
			t.Fatalf("error %v", err)
		}
	})
}

func TestCoordinatorsAtOnceMakeOneLiveKey(t *testing.T) {
	atDesk(t, func(t *testing.T, d *desk) {
		var all sync.WaitGroup
		var mu sync.Mutex
		made := map[hsm.KeyID]bool{}
		for i := range 4 {
			g := newGroup(t, identity.RoleSync, d.chain, d.members, nil)
			all.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				r, err := g.CreateKey(t.Context(), "issuing-g1", hsm.PurposeCA, hsm.P256)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					made[r.ID] = true
				} else if !strings.Contains(err.Error(), "another coordinator") {
					t.Errorf("a loser's error: %v", err)
				}
			})
		}
		for _, m := range d.members {
			m.with("import", func(_ context.Context, do func() error) error { time.Sleep(20 * time.Millisecond); return do() })
		}
		all.Wait()
		if live := d.live(); len(live) != 1 || len(made) != 1 || !made[live[0]] {
			t.Fatalf("live %v, acknowledged %v", live, made)
		}
	})
}

func TestKeysAreNotCreatedUnlessEveryMemberIsThere(t *testing.T) {
	for name, spoil := range map[string]struct {
		do   func(*desk)
		want string
	}{
		"dead":     {func(d *desk) { d.members[2].with("*", dead) }, "asking c"},
		"replaced": {func(d *desk) { d.members[2].serial = "another" }, "replaced"},
		"shared":   {func(d *desk) { d.members[2].serial = d.members[0].serial }, "share token"},
		"no kek":   {func(d *desk) { d.members[2].kek = "" }, "member c holds domain key"},
		"left out": {func(d *desk) { d.group = newGroup(d.t, identity.RoleSync, d.chain, d.members[:2], nil) }, "member c of the group is not configured"},
		"new": {func(d *desk) {
			d.members = append(d.members, newSoftware("d"))
			d.group = newGroup(d.t, identity.RoleSync, d.chain, d.members, nil)
		}, "member d has not joined"},
		"read-only": {func(d *desk) { d.group = newGroup(d.t, identity.RoleSync, manifest{d.chain}, d.members, nil) }, "read-only"},
	} {
		t.Run(name, func(t *testing.T) {
			atDesk(t, func(t *testing.T, d *desk) {
				before := d.chain.events()
				spoil.do(d)
				if _, err := d.create(); err == nil || !strings.Contains(err.Error(), spoil.want) {
					t.Fatalf("error %v, want one that says %q", err, spoil.want)
				}
				if !slices.Equal(before, d.chain.events()) {
					t.Errorf("the log grew to %q", d.chain.events())
				}
			})
		})
	}
	as(t, identity.RoleSync)
	synctest.Test(t, func(t *testing.T) {
		d := &desk{t: t, chain: &memory{}, members: []*software{newSoftware("a")}}
		d.group = newGroup(t, identity.RoleSync, d.chain, d.members, nil)
		if err := d.group.CreateDomain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := d.create(); err == nil || !strings.Contains(err.Error(), "2 copies") {
			t.Fatal(err)
		}
	})
}

func TestACeremonyMakesOnlyTheKeysItMayProve(t *testing.T) {
	as(t, identity.RoleCeremony)
	atDesk(t, func(t *testing.T, d *desk) {
		d.group = newGroup(t, identity.RoleCeremony, d.chain, d.members, nil)
		if _, err := d.create(); err != nil {
			t.Error(err)
		}
		if _, err := d.group.CreateKey(t.Context(), "r", hsm.PurposeOCSP, hsm.P256); err == nil {
			t.Error("a ceremony made an OCSP key")
		}
		if _, err := d.group.CreateKey(t.Context(), "r", hsm.PurposeCA, "P-384"); err == nil {
			t.Error("made a P-384 key")
		}
	})
}

func TestFold(t *testing.T) {
	id := hsm.NewKeyID()
	payload, err := json.Marshal(hsm.KeyRecord{KeySpec: hsm.KeySpec{ID: id, Label: "x"}})
	if err != nil {
		t.Fatal(err)
	}
	for log, want := range map[string]string{
		"":                                    "",
		"pending":                             "pending",
		"pending live":                        "live",
		"pending abandoned":                   "abandoned",
		"pending abandoned live":              "abandoned",
		"pending live abandoned":              "abandoned",
		"pending abandoned pending":           "abandoned",
		"pending live retired":                "retired",
		"pending abandoned retired":           "abandoned",
		"note pending note live":              "live",
		"live":                                "error",
		"pending pending":                     "error",
		"pending live live":                   "error",
		"pending live retired live":           "error",
		"hole pending":                        "error",
		"pending misnamed":                    "error",
		"domain pending live":                 "live",
		"domain-without-payload pending live": "error",
	} {
		var entries []hsmsync.Entry
		n := uint64(0)
		for _, event := range strings.Fields(log) {
			n++
			e := hsmsync.Entry{N: n, Event: event, Subject: string(id), Payload: payload}
			switch event {
			case "hole":
				continue
			case "misnamed":
				e.Event, e.Subject = "live", "other"
			case "note":
				e.Subject = "something else"
			case "domain-without-payload":
				e.Event, e.Payload = "domain", nil
			}
			entries = append(entries, e)
		}
		f, err := hsmsync.Fold(entries)
		got := ""
		switch {
		case err != nil:
			got = "error"
		case len(f.Keys) > 0:
			got = string(f.Keys[0].State)
		}
		if got != want {
			t.Errorf("log %q is %q, want %q (%v)", log, got, want, err)
		}
	}
}
