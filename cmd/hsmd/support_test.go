package main_test

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
	"trivet/journal"
)

// approved is a grant that an admin and an operator of the lab gave.
func approved(t *testing.T, lab *hsmtest.Lab, action, object string, detail map[string]string) []byte {
	t.Helper()
	g, err := lab.Identity(identity.RoleSRE, "sam").Propose(action, object, detail, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	r := g.Request
	for _, p := range []*identity.Identity{lab.Identity(identity.RoleAdmin, "admin1"), lab.Identity(identity.RoleCAOperator, "operator1")} {
		a, err := p.Approve(r, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		g.Approvals = append(g.Approvals, a)
	}
	b, err := json.Marshal(g)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// carry brings a domain key from one member to another, approved or not.
func carry(t *testing.T, lab *hsmtest.Lab, kek string, from, to *hsmtest.Member, approve bool) error {
	t.Helper()
	ctx := within(t, 30*time.Second)
	source, target := from.Client(identity.RoleSync), to.Client(identity.RoleSync)
	transport, err := target.TransportKey(ctx)
	if err != nil {
		return err
	}
	req := hsm.DomainRequest{Group: "demo", KEK: kek, Recipient: transport}
	if approve {
		fingerprint, member, err := agent.TransportFingerprint(lab.Identity(identity.RoleSync, "sync1"), transport, time.Now())
		if err != nil || member != to.Name {
			t.Fatalf("%q, %v", member, err)
		}
		req.Grant = approved(t, lab, "hsm-enroll", "demo/"+to.Name, map[string]string{"transport": fingerprint})
	}
	wrapped, kek, err := source.ExportDomain(ctx, req)
	if err != nil {
		return err
	}
	return target.ImportDomain(ctx, kek, wrapped)
}

// enroll gives a member the current domain key of another, approved.
func enroll(t *testing.T, lab *hsmtest.Lab, from, to *hsmtest.Member) error {
	t.Helper()
	return carry(t, lab, "", from, to, true)
}

// epoch is a record as people approved it.
func epoch(t *testing.T, lab *hsmtest.Lab, site string, n uint64) hsm.EpochRecord {
	t.Helper()
	return hsm.EpochRecord{Site: site, Epoch: n, Grant: approved(t, lab, "site-promote", site, map[string]string{"epoch": strconv.FormatUint(n, 10)})}
}

func sha(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// record reads a member's audit record.
func record(t *testing.T, m *hsmtest.Member) (acts []journal.Audit) {
	t.Helper()
	err := journal.ReadDir(filepath.Join(m.Dir, "audit"), func(e journal.Entry) error {
		if e.Kind != journal.KindAudit {
			return nil
		}
		var a journal.Audit
		if err := e.Decode(&a); err != nil {
			return err
		}
		acts = append(acts, a)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return acts
}

// wantCode fails unless err is a refusal with that code.
func wantCode(t *testing.T, err error, class hsm.Class, code string) {
	t.Helper()
	if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != class || e.Code != code {
		t.Errorf("got %v, want %s (%s)", err, class, code)
	}
}
