package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// list runs one command with JSON output that is a list.
func (l *groupLab) list(args ...string) []map[string]any {
	l.t.Helper()
	r := l.run(exitOK, append(args, "--output", "json")...)
	var v []map[string]any
	if err := json.Unmarshal([]byte(r.out), &v); err != nil {
		l.t.Fatalf("pkictl %s: %v\n%s", strings.Join(args, " "), err, r.out)
	}
	return v
}

// cutOff is a record that takes no members.
type cutOff struct{ *hsmsync.Record }

func (c cutOff) Append(ctx context.Context, group string, e hsmsync.Entry) error {
	if e.Event == "member" {
		return errors.New("connection lost")
	}
	return c.Record.Append(ctx, group, e)
}

// A group whose creation was interrupted is listed as such, with the ways on, and can be ended.
func TestAGroupThatWasBegunIsShownAsIncomplete(t *testing.T) {
	l := newGroupLab(t)
	third, fourth := l.Start("hsmd-c"), l.Start("hsmd-d")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: "half", Identity: l.Identity(identity.RoleSync, "sync1"), Chain: cutOff{hsmsync.NewManifest(dbtest.Open(t, l.database))}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f := hsmsync.Founding{Members: []hsmsync.Member{{Name: third.Name, Address: third.Addr}, {Name: fourth.Name, Address: fourth.Addr}}, Why: "a test"}
	act, _, err := c.CreateAct(ctx, f)
	if err == nil {
		err = c.CreateGroup(ctx, f, l.Approved(act.Action, act.Object, act.Detail))
	}
	if err == nil || !strings.Contains(err.Error(), "connection lost") {
		t.Fatal(err)
	}
	if all := l.list("hsm", "group", "list"); all[0]["name"] != "half" || fmt.Sprint(all[0]["incomplete"]) != "[hsmd-c hsmd-d]" || all[1]["incomplete"] != nil {
		t.Errorf("%v", all)
	}
	for _, want := range []string{"half   incomplete", "main   in use", "hsmd-c and hsmd-d have yet to serve", "pkictl hsm group delete half"} {
		if r := l.run(exitOK, "hsm", "group", "list"); !strings.Contains(r.out, want) {
			t.Errorf("no %q in:\n%s", want, r.out)
		}
	}
	request := filepath.Join(t.TempDir(), "delete.json")
	remove := []string{"hsm", "group", "delete", "half", "--why", "never mind"}
	l.object(exitOK, l.proposing(append(slices.Clone(remove), "--request-out", request)...)...)
	l.approve(request)
	l.object(exitOK, append(slices.Clone(remove), "--grant", request)...)
	if all := l.list("hsm", "group", "list"); len(all) != 2 || all[1]["name"] != "half" || all[1]["deleted"] != true || all[1]["incomplete"] != nil {
		t.Errorf("%v", all)
	}
}

// Phases: a second group by request and approvals; which group is meant; status; an HSM in two groups; deletion, refused and done.
func TestOperatorsWorkOnSeveralGroups(t *testing.T) {
	l := newGroupLab(t)
	dir := t.TempDir()
	c, d := l.Start("hsmd-c"), l.Start("hsmd-d")
	create := []string{"hsm", "group", "create", "va", "--member", "hsmd-c=" + c.Addr, "--member", "hsmd-d=" + d.Addr, "--set", "prefer=local", "--why", "responders"}
	named := func(group string, args ...string) []string { return append(args, "--group", group) }

	t.Run("a group is created when two people have approved it", func(t *testing.T) {
		for _, bad := range [][]string{
			{"hsm", "group", "create", "VA", "--member", "hsmd-c=" + c.Addr}, {"hsm", "group", "create", "va", "--member", "hsmd-c"},
			append(slices.Clone(create), "--set", "min_copies=1"), {"hsm", "group", "create"}, append(slices.Clone(create), "--group", "main"),
		} {
			l.run(exitUsage, bad...)
		}
		if r := l.run(exitFailed, append(slices.Clone(create), "--set", "min_copies=3")...); !strings.Contains(r.err, "min_copies 3") {
			t.Errorf("%s", r.err)
		}
		plan := l.object(exitOK, append(slices.Clone(create), "--dry-run")...)
		if plan["done"] != false || len(plan["steps"].([]any)) != 5 {
			t.Errorf("%v", plan)
		}
		request := filepath.Join(dir, "create.json")
		l.object(exitOK, l.proposing(append(slices.Clone(create), "--request-out", request)...)...)
		if r := l.run(exitFailed, append(slices.Clone(create), "--grant", request)...); !strings.Contains(r.err, "2 people") {
			t.Errorf("nobody has approved it: %s", r.err)
		}
		if all := l.list("hsm", "group", "list"); len(all) != 1 {
			t.Errorf("%v", all)
		}
		l.approve(request)
		if r := l.run(exitFailed, append(slices.Clone(create), "--set", "min_copies=2", "--set", "prefer=random", "--grant", request)...); !strings.Contains(r.err, "policy") {
			t.Errorf("another policy than was approved: %s", r.err)
		}
		done := l.object(exitOK, append(slices.Clone(create), "--grant", request)...)
		result := done["result"].(map[string]any)
		if done["done"] != true || result["name"] != "va" || result["why"] != "responders" || len(result["approved_by"].([]any)) != 2 || len(result["tokens"].([]any)) != 2 {
			t.Errorf("%v", done)
		}
		l.object(exitOK, append(slices.Clone(create), "--grant", request)...) // a repetition finds it done
	})

	t.Run("which group is meant has to be said", func(t *testing.T) {
		for _, args := range [][]string{{"key", "list"}, {"hsm", "verify"}, {"hsm", "policy"}, {"key", "create", "x", "--purpose", "audit"}, {"hsm", "drain", "hsmd-a"}} {
			if r := l.run(exitUsage, args...); !strings.Contains(r.err, "main, va") {
				t.Errorf("%v: %s", args, r.err)
			}
			if r := l.run(exitFailed, named("nonesuch", args...)...); !strings.Contains(r.err, "main, va") {
				t.Errorf("%v: %s", args, r.err)
			}
		}
		l.run(exitOK, named("va", "key", "create", "demo-g1", "--purpose", "ocsp")...)
		if keys := l.list(named("main", "key", "list")...); len(keys) != 0 {
			t.Errorf("%v", keys)
		}
		if keys := l.list(named("va", "key", "list")...); len(keys) != 1 {
			t.Errorf("%v", keys)
		}
		if r := l.run(exitOK, named("va", "hsm", "policy")...); !strings.Contains(r.out, "local") {
			t.Errorf("%s", r.out)
		}
		if r := l.run(exitFailed, named("main", "hsm", "drain", "hsmd-c")...); !strings.Contains(r.err, "hsmd-a, hsmd-b") {
			t.Errorf("a member of another group: %s", r.err)
		}
	})

	t.Run("status shows all groups", func(t *testing.T) {
		for want, args := range map[string][]string{"main va": {"hsm", "status"}, "va": named("va", "hsm", "status")} {
			var names []string
			for _, g := range l.object(exitOK, args...)["groups"].([]any) {
				names = append(names, g.(map[string]any)["name"].(string))
			}
			if got := strings.Join(names, " "); got != want {
				t.Errorf("%v shows %s", args, got)
			}
		}
		l.run(exitFailed, named("nonesuch", "hsm", "status")...)
		d.Kill()
		l.run(exitFailed, "hsm", "status", "--wait", "500ms") // one that is unwell is enough
		l.run(exitOK, named("main", "hsm", "status")...)
		d.Start()
		d.WaitReady()
	})

	t.Run("an HSM is in one group", func(t *testing.T) {
		for _, args := range [][]string{
			named("main", "hsm", "enroll", "hsmd-c", "--address", c.Addr, "--dry-run", "--grant", filepath.Join(dir, "create.json")),
			{"hsm", "group", "create", "third", "--member", "hsmd-c=" + c.Addr, "--member", "hsmd-d=" + d.Addr},
		} {
			if r := l.run(exitFailed, args...); !strings.Contains(r.err, "group") {
				t.Errorf("%v: %s", args, r.err)
			}
		}
	})

	t.Run("a group is deleted when nothing refers to it, and two people have approved it", func(t *testing.T) {
		store := dbtest.Open(t, l.database)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if err := store.InsertGeneration(ctx, db.Generation{Issuer: "demo-g1", CA: "demo", Generation: 1, Parent: "demo-g1", KeyGroup: "main", KeyID: "00", SPKI: []byte{1}}); err != nil {
			t.Fatal(err)
		}
		if r := l.run(exitFailed, "hsm", "group", "delete", "main", "--why", "x"); !strings.Contains(r.err, "CA demo-g1 (pending) signs with key 00") {
			t.Errorf("%s", r.err)
		}
		if r := l.run(exitFailed, "hsm", "group", "delete", "va", "--why", "x"); !strings.Contains(r.err, "ocsp:demo-g1") {
			t.Errorf("%s", r.err)
		}
		l.run(exitUsage, "hsm", "group", "delete", "va")
		retire, asked := named("va", "key", "retire", "ocsp:demo-g1", "--why", "a test"), filepath.Join(dir, "retire.json")
		l.run(exitOK, l.proposing(append(slices.Clone(retire), "--request-out", asked)...)...)
		l.approve(asked)
		l.run(exitOK, append(slices.Clone(retire), "--grant", asked)...)
		request := filepath.Join(dir, "delete.json")
		remove := []string{"hsm", "group", "delete", "va", "--why", "not needed"}
		if r := l.run(exitUsage, remove...); !strings.Contains(r.err, "two people") {
			t.Errorf("%s", r.err)
		}
		l.object(exitOK, l.proposing(append(slices.Clone(remove), "--request-out", request)...)...)
		l.approve(request)
		if r := l.run(exitFailed, "hsm", "group", "delete", "va", "--why", "another reason", "--grant", request); !strings.Contains(r.err, "not needed") {
			t.Errorf("approved for another reason: %s", r.err)
		}
		if r := l.object(exitOK, append(slices.Clone(remove), "--grant", request)...); r["result"].(map[string]any)["deleted"] != true {
			t.Errorf("%v", r)
		}
		if i := c.WaitReady(); i.Keys == 0 || i.KEK == "" {
			t.Errorf("what its token held is gone: %+v", i)
		}
		for _, args := range [][]string{remove, named("va", "key", "list"), create} {
			if r := l.run(exitFailed, args...); !strings.Contains(r.err, "deleted") {
				t.Errorf("%v: %s", args, r.err)
			}
		}
		all := l.list("hsm", "group", "list")
		if len(all) != 2 || all[1]["name"] != "va" || all[1]["deleted"] != true || all[1]["why"] != "not needed" {
			t.Errorf("%v", all)
		}
		l.run(exitOK, "key", "list") // one is left
		l.run(exitOK, "hsm", "status")
	})
}

// An HSM that joins when another site has been promoted learns which one writes from a record that people have approved.
func TestANewHSMLearnsALaterSiteEpochFromAnApprovedRecord(t *testing.T) {
	l := newGroupLab(t)
	dir := t.TempDir()
	store := dbtest.Open(t, l.database)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: "main", Identity: l.Identity(identity.RoleSync, "sync1"), Chain: hsmsync.NewManifest(store), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, r := range []hsm.EpochRecord{
		{Site: "here", Epoch: 1},
		{Site: "there", Epoch: 2, Grant: l.Approved("site-promote", "there", map[string]string{"epoch": "2"})},
		{Site: "here", Epoch: 3, Grant: l.Approved("site-promote", "here", map[string]string{"epoch": "3"})},
	} {
		if err := store.InsertSiteEpoch(ctx, db.SiteEpoch{N: r.Epoch, Site: r.Site}); err != nil {
			t.Fatal(err)
		}
		if err := c.SetEpoch(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	l.run(exitOK, "key", "create", "demo-g1", "--purpose", "ca")
	m := l.Start("hsmd-c")
	request := filepath.Join(dir, "enroll.json")
	enroll := []string{"hsm", "enroll", "hsmd-c", "--address", m.Addr}
	if r := l.run(exitOK, l.proposing(append(slices.Clone(enroll), "--request-out", request)...)...); !strings.Contains(r.err, request+".epoch") {
		t.Errorf("%s", r.err)
	}
	l.approve(request)
	if r := l.run(exitUsage, append(slices.Clone(enroll), "--grant", request)...); !strings.Contains(r.err, "--epoch-record") {
		t.Errorf("without a record: %s", r.err)
	}
	if r := l.run(exitFailed, append(slices.Clone(enroll), "--grant", request, "--epoch-record", request)...); !strings.Contains(r.err, "hsm-epoch-repair of here") {
		t.Errorf("with an approval of something else: %s", r.err)
	}
	with := append(slices.Clone(enroll), "--grant", request, "--epoch-record", request+".epoch")
	if r := l.run(exitFailed, with...); !strings.Contains(r.err, "approv") {
		t.Errorf("with a record that nobody has approved: %s", r.err)
	}
	if i := m.WaitReady(); i.Epoch != 0 {
		t.Fatalf("it is at %d", i.Epoch)
	}
	l.approve(request + ".epoch")
	l.object(exitOK, with...)
	if i := m.WaitReady(); i.Epoch != 3 || i.Site != "here" {
		t.Errorf("it is at %d, %s", i.Epoch, i.Site)
	}
	l.run(exitOK, "hsm", "verify")

	// The members of a new group as well.
	d, e := l.Start("hsmd-d"), l.Start("hsmd-e")
	request = filepath.Join(dir, "create.json")
	create := []string{"hsm", "group", "create", "va", "--member", "hsmd-d=" + d.Addr, "--member", "hsmd-e=" + e.Addr}
	l.object(exitOK, l.proposing(append(slices.Clone(create), "--request-out", request)...)...)
	l.approve(request)
	l.approve(request + ".epoch")
	l.object(exitOK, append(slices.Clone(create), "--grant", request, "--epoch-record", request+".epoch")...)
	for _, m := range []hsm.Info{d.WaitReady(), e.WaitReady()} {
		if m.Epoch != 3 {
			t.Errorf("%s is at %d", m.Member, m.Epoch)
		}
	}
}
