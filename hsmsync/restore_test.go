package hsmsync_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/hsmsync/custody"
	"trivet/identity"
)

func TestARealGroupIsRestoredFromItsBackup(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a", "b", "c")
	w.setup(hsmsync.Policy{DestroyAfter: time.Millisecond}, "a", "b", "c")
	ctx := w.soon()
	const keys = 5
	for i := range keys {
		w.key(fmt.Sprint("key-", i), hsm.P256)
	}
	retired, lost := w.key("retired", hsm.RSA2048), w.key("lost", hsm.P256)
	for _, k := range []hsm.KeyID{retired.ID, lost.ID} {
		good(t, w.retire(k, "rolled over"))
	}
	for _, m := range w.at { // behind the coordinator's back: every copy of one goes
		grant := w.approve(hsmsync.Act{Action: "key-destroy", Object: "ca/" + string(lost.ID), Detail: map[string]string{"spki": hsm.Fingerprint(lost.SPKI)}})
		good(t, m.Client(identity.RoleSync).Destroy(ctx, hsm.DestroyRequest{Group: "ca", Key: lost.ID, SPKI: lost.SPKI, Grant: grant}))
	}
	r, err := w.c.Verify(ctx)
	good(t, err)
	if len(r.Retired) != 2 || len(r.Retired[0].Holders) != 3 || len(r.Retired[1].Holders) != 0 || kinds(r) != "copies" || r.OK {
		t.Errorf("verify says %+v, found %s", r.Retired, kinds(r))
	}
	recipient, shares, err := custody.NewRecipient(3, 2)
	good(t, err)
	_, err = w.c.Backup(ctx, recipient, nil)
	failed(t, err, "approval")
	bundle, err := w.c.Backup(ctx, recipient, w.approve(w.c.BackupAct(recipient.SPKI)))
	good(t, err)
	if len(bundle.Blobs) != keys+1 || bundle.Group != "ca" || !slices.Equal(bundle.Retired, []hsm.KeyID{retired.ID, lost.ID}) {
		t.Fatalf("%d blobs of group %s, retired %v", len(bundle.Blobs), bundle.Group, bundle.Retired)
	}
	if held, _ := bundle.Holds(retired.ID); !held {
		t.Error("the retired key is not in the backup")
	}
	if held, why := bundle.Holds(lost.ID); held || !strings.Contains(why, "exporting key") {
		t.Errorf("of a key that nobody holds the backup says %v, %q", held, why)
	}
	// The log would want the lost one for ever.
	act, err := w.c.DestroyAct(ctx, lost.ID)
	good(t, err)
	_, err = w.c.DestroyKey(ctx, lost.ID, w.approve(act))
	good(t, err)
	good(t, w.c.RotateDomain(ctx)) // the backup is under the domain key of its time
	unlock := func() func([]byte) ([]byte, error) {
		u, err := custody.Unlock(bundle, shares[1:])
		good(t, err)
		t.Cleanup(u.Close)
		return u.WrapFor
	}

	for _, fault := range []string{"a C_UnwrapKey after crash nth 6", "c C_Sign keys crash nth 4"} {
		for name := range w.at { // every token is lost
			w.wipe(name)
		}
		failed(t, w.c.Replace(ctx, w.request("a")), "restore the group from its backup")
		for _, name := range []string{"a", "b", "c"} {
			r := w.request(name)
			r.Bare = true
			good(t, w.c.Replace(ctx, r))
		}
		f := strings.SplitN(fault, " ", 3)
		w.faults[f[0]].Set(f[1], f[2])
		failures := w.insist(func() error { return w.c.Restore(w.soon(), bundle, unlock()) })
		w.faults[f[0]].Clear(f[1])
		t.Logf("%s: %d failures", fault, failures)
		w.verify(3, keys)
		if r, err := w.c.Verify(ctx); err != nil || len(r.Retired) != 1 || len(r.Retired[0].Holders) != 3 {
			t.Errorf("the retired key after the restore: %+v %v", r.Retired, err)
		}
		for name, m := range w.at {
			if i := m.WaitReady(); i.KEK == bundle.Domain || i.NextKEK != "" {
				t.Errorf("%s holds domain keys %q and %q, of which the backup's is %q", name, i.KEK, i.NextKEK, bundle.Domain)
			}
		}
		good(t, w.c.RotateDomain(ctx)) // and the members know each other
		w.verify(3, keys)
	}

	t.Run("into a group that was set up anew", func(t *testing.T) {
		w := newWorks(t, "a", "b", "c")
		w.setup(hsmsync.Policy{}, "a", "b", "c")
		good(t, w.c.Restore(ctx, bundle, unlock()))
		good(t, w.c.Restore(ctx, bundle, unlock()))
		w.verify(3, keys)
		entries, err := w.chain.Log(ctx, "ca", 1)
		good(t, err)
		for _, e := range entries {
			if e.Subject == string(retired.ID) && e.Event == "live" {
				t.Error("a retired key was live for a moment")
			}
		}
		if k, _ := w.state().Key(retired.ID); k.State != hsmsync.StateRetired {
			t.Errorf("the retired key is %s", k.State)
		}
		w.key("another", hsm.P256)
		bad := bundle
		bad.Group = "other"
		failed(t, w.c.Restore(ctx, bad, unlock()), "of group other")
		failed(t, w.c.Restore(ctx, bundle, unlock()), "not in the backup")
	})
}
