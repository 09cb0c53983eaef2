package hsmsync_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/hsmsync/custody"
	"trivet/identity"
)

// another is the same works with a second group of other members.
func (w *works) another(group string, names ...string) *works {
	w.t.Helper()
	o := *w
	o.config.Group = group
	o.c = o.coordinator()
	o.add(names...)
	return &o
}

// TestATokenIsInOneGroup has the carrier, an identity of role sync, try to bring two groups together behind the coordinator's
// back: each agent refuses it by itself.
func TestATokenIsInOneGroup(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b")
	w.setup(hsmsync.Policy{}, "a", "b")
	va := w.another("va", "c", "d")
	va.setup(hsmsync.Policy{}, "c", "d")
	key := w.key("issuing", hsm.P256)
	va.key("responder", hsm.P256)
	w.add("e") // belongs to nobody
	ctx := w.soon()
	a, c := w.at["a"].Client(identity.RoleSync), w.at["c"].Client(identity.RoleSync)
	mine, other := w.at["a"].WaitReady().KEK, w.at["c"].WaitReady().KEK
	denied := func(what string, err error) {
		t.Helper()
		if hsm.ClassOf(err) != hsm.ClassDenied || !strings.Contains(err.Error(), "belongs to group") {
			t.Errorf("%s: %v", what, err)
		}
	}
	approved := func(group, member string) (transport, grant []byte) {
		t.Helper()
		transport, err := w.at[member].Client(identity.RoleSync).TransportKey(ctx)
		good(t, err)
		_, fingerprint, err := w.c.Inspect(ctx, member, w.at[member].Addr)
		good(t, err)
		return transport, w.lab.Approved("hsm-enroll", group+"/"+member, map[string]string{"transport": fingerprint})
	}

	// Two people approved that e joins va. That must not get it the domain key of ca.
	transport, grant := approved("va", "e")
	_, _, err := a.ExportDomain(ctx, hsm.DomainRequest{Group: "va", KEK: mine, Recipient: transport, Grant: grant})
	denied("ca's domain key for a member of va", err)
	// Two people approved, by mistake, that c of va joins ca.
	transport, grant = approved("ca", "c")
	wrapped, kek, err := a.ExportDomain(ctx, hsm.DomainRequest{Group: "ca", KEK: mine, Recipient: transport, Grant: grant})
	good(t, err)
	denied("a second group's domain key", c.ImportDomain(ctx, kek, wrapped))
	denied("a domain key made for a second group", c.GenerateDomain(ctx, hsm.NewDomainName("ca")))
	denied("a domain key of no group", c.GenerateDomain(ctx, "nameless"))
	recipient, _, err := custody.NewRecipient(3, 2)
	good(t, err)
	_, _, err = a.BackupDomain(ctx, hsm.BackupRequest{Group: "va", Recipient: recipient.SPKI,
		Grant: w.lab.Approved("hsm-backup", "va", map[string]string{"recipient": hsm.Fingerprint(recipient.SPKI)})})
	denied("a backup under va's approval", err)
	err = a.Destroy(ctx, hsm.DestroyRequest{Group: "va", Key: key.ID, SPKI: key.SPKI,
		Grant: w.lab.Approved("key-destroy", "va/"+string(key.ID), map[string]string{"spki": hsm.Fingerprint(key.SPKI)})})
	denied("a destruction under va's approval", err)
	_, err = a.Adopt(ctx, hsm.AdoptRequest{Group: "va", Spec: hsm.KeySpec{ID: hsm.NewKeyID(), Label: "x", Purpose: hsm.PurposeCA, Algorithm: hsm.P256}, SPKI: key.SPKI, Sealed: []byte{1}})
	denied("a key from outside under va's approval", err)
	if i := w.at["c"].WaitReady(); i.KEK != other || i.NextKEK != "" {
		t.Errorf("c holds domain keys %q and %q", i.KEK, i.NextKEK)
	}

	// The coordinator says so before it asks anybody.
	failed(t, w.c.Enroll(ctx, w.request("c")), "belongs to group va")
	// Out of its group by the record it still holds the group's domain key.
	good(t, va.c.Enroll(ctx, va.request("e")))
	good(t, va.c.Remove(ctx, "c", "moved"))
	failed(t, w.c.Enroll(ctx, w.request("c")), "domain key of group va")
	if _, there := w.state().Member("c"); there {
		t.Error("c was entered")
	}
	w.wipe("c")
	good(t, w.c.Enroll(ctx, w.request("c")))
	w.verify(3, 1)
	va.verify(2, 1)
	if group := hsm.DomainGroup(w.at["c"].WaitReady().KEK); group != "ca" {
		t.Errorf("c is group %q's", group)
	}
}

// TestAProcessUsesSeveralGroups loses one of them while it signs with both.
func TestAProcessUsesSeveralGroups(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b")
	w.setup(hsmsync.Policy{}, "a", "b")
	root := w.another("root", "c", "d")
	root.setup(hsmsync.Policy{}, "c", "d")
	issuing, top := w.key("demo-g1", hsm.P256), root.key("root-g1", hsm.P256)
	ctx := w.soon()
	metrics := prometheus.NewRegistry()
	g, err := hsmsync.NewGroups(hsmsync.Config{Identity: w.lab.Identity(identity.RoleCA, "ca1"), Manifest: manifest{w.chain}, Epoch: 1, Log: logger(t), Metrics: metrics})
	good(t, err)
	running, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- g.Run(running) }()
	t.Cleanup(func() { stop(); good(t, <-done) })
	sign := func(group string, key hsm.KeyRecord) error {
		k, err := g.Key(ctx, group, string(key.ID))
		if err == nil {
			var sigs [][]byte
			if sigs, err = k.SignBatch(ctx, digests(2)); err == nil {
				verify(t, k, digests(2), sigs)
			}
		}
		return err
	}
	signs := func(group string, key hsm.KeyRecord) {
		t.Helper()
		eventually(t, "group "+group+" signs", func() (string, bool) { err := sign(group, key); return fmt.Sprint(err), err == nil })
	}
	names := func() (out string) {
		for _, s := range g.Status().Groups {
			out += fmt.Sprintf("%s:%d ", s.Name, len(s.Members))
		}
		return strings.TrimSpace(out)
	}
	if got := names(); got != "" {
		t.Errorf("it knows %s before it was asked for any key", got)
	}
	signs("ca", issuing)
	if got := names(); got != "ca:2" {
		t.Errorf("it knows %s, and uses keys of ca alone", got)
	}
	signs("root", top)
	if got := names(); got != "ca:2 root:2" {
		t.Errorf("it knows %s", got)
	}
	failed(t, sign("root", issuing), "group root has no key") // an id is a name in its own group alone
	failed(t, sign("nonesuch", issuing), "no key")
	failed(t, sign("no such", issuing), "group name")
	good(t, eachHas(metrics, "trivet_hsmsync_member_state", "ca", "root"))

	w.at["c"].Kill()
	w.at["d"].Kill()
	eventually(t, "root is gone", func() (string, bool) { err := sign("root", top); return fmt.Sprint(err), err != nil })
	if n, err := g.Ready("root", string(top.ID)); n != 0 || err == nil {
		t.Errorf("%d members of root are ready: %v", n, err)
	}
	for range 50 {
		good(t, sign("ca", issuing))
	}
	w.at["c"].Start()
	w.at["d"].Start()
	signs("root", top)

	good(t, root.retire(top.ID, ""))
	act, err := root.c.DeleteAct(ctx, "done with")
	good(t, err)
	good(t, root.c.DeleteGroup(ctx, "done with", w.approve(act)))
	eventually(t, "the deleted group is not shown", func() (string, bool) { return names(), names() == "ca:2 nonesuch:0" })
	failed(t, sign("root", top), "deleted")
	good(t, sign("ca", issuing))
}

// eachHas tells whether a metric has a series for each group.
func eachHas(from *prometheus.Registry, name string, groups ...string) error {
	all, err := from.Gather()
	if err != nil {
		return err
	}
	has := map[string]bool{}
	for _, f := range all {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					if l.GetName() == "group" {
						has[l.GetValue()] = true
					}
				}
			}
		}
	}
	for _, g := range groups {
		if !has[g] {
			return fmt.Errorf("%s has no series for group %s: %v", name, g, has)
		}
	}
	return nil
}
