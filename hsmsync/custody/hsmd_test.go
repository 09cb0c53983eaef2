package custody_test

import (
	"context"
	"encoding/json"
	"os"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsmsync/custody"
	"trivet/identity"
)

func TestMain(m *testing.M) { os.Exit(hsmtest.Main(m)) }

// A group is backed up, every HSM of it is lost, and the custodians bring it back on a new one.
func TestAGroupIsRestoredOnANewHSM(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lab := hsmtest.NewLab(t)
	old := lab.Start("hsmd-a")
	from := old.Client(identity.RoleSync)
	if err := from.GenerateDomain(ctx, "lab-1"); err != nil {
		t.Fatal(err)
	}
	r, shares, err := custody.NewRecipient(3, 2)
	if err != nil {
		t.Fatal(err)
	}
	b := custody.Bundle{Cluster: "lab", Group: "lab", Created: time.Now(), Policy: json.RawMessage(`{}`), Recipient: r}
	for _, a := range []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048} {
		spec := hsmtest.Spec("backed-up-"+string(a), hsm.PurposeCA)
		spec.Algorithm = a
		k, err := from.Generate(ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		blob, err := from.Export(ctx, k.ID, "")
		if err != nil {
			t.Fatal(err)
		}
		b.Keys, b.Blobs = append(b.Keys, k), append(b.Blobs, blob)
	}
	b.Wrapped, b.Domain, err = from.BackupDomain(ctx, hsm.BackupRequest{
		Group: "lab", Recipient: r.SPKI, Grant: lab.Approved("hsm-backup", "lab", map[string]string{"recipient": r.Fingerprint()}),
	})
	if err != nil {
		t.Fatal(err)
	}
	text := encode(t, b)
	old.Kill()

	back, err := custody.ParseBundle(text)
	if err != nil {
		t.Fatal(err)
	}
	typed, err := custody.ParseShares(shares[2].Text() + "\n" + shares[0].Text())
	if err != nil {
		t.Fatal(err)
	}
	u, err := custody.Unlock(back, typed)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	fresh := lab.Start("hsmd-b")
	to := fresh.Client(identity.RoleSync)
	attested, err := to.TransportKey(ctx)
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := u.WrapFor(fresh.Contract().SPKI(t, attested))
	if err != nil {
		t.Fatal(err)
	}
	if err := to.ImportDomain(ctx, back.Domain, wrapped); err != nil {
		t.Fatal(err)
	}
	for i, blob := range back.Blobs {
		k, err := to.Import(ctx, blob)
		if err != nil {
			t.Fatal(err)
		}
		if k.Attributes != b.Keys[i].Attributes {
			t.Errorf("%s came back with other attributes", k.Label)
		}
		hsmtest.SignAndVerify(t, fresh.Client(identity.RoleCA), b.Keys[i], 1)
	}
}
