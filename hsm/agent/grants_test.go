package agent_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/json"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// What people approved is exactly what happens, or nothing happens.
func TestOnlyWhatEnoughPeopleApprovedIsDestroyed(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	c := s.client(identity.RoleSync)
	k := newKey(t, w, hsm.PurposeAudit)
	object, detail := "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)}
	admin, operator := w.person(t, identity.RoleAdmin, "admin1"), w.person(t, identity.RoleCAOperator, "operator1")
	good := w.propose(t, "key-destroy", object, detail)
	other := newKey(t, w, hsm.PurposeAudit)

	strangers, err := identity.CreateAuthority(filepath.Join(t.TempDir(), "authority"), "lab")
	if err != nil {
		t.Fatal(err)
	}
	f, err := strangers.IssueTo(t.TempDir(), identity.Principal{Cluster: "lab", Role: identity.RoleAdmin, Name: "admin9"}, nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := identity.Load(f)
	if err != nil {
		t.Fatal(err)
	}
	// swap puts the approvals of one request under another.
	swap := func(r identity.Request, approvals []byte) []byte {
		var g identity.Grant
		if err := json.Unmarshal(approvals, &g); err != nil {
			t.Fatal(err)
		}
		g.Request, g.Proposal = r, proposalOf(r)
		b, err := json.Marshal(g)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	byItself := proposed(t, admin, "key-destroy", object, detail, time.Now())
	old := proposed(t, w.person(t, identity.RoleSRE, "sam"), "key-destroy", object, detail, time.Now().Add(-2*time.Hour))
	// Who may use the sync identity names it as the proposer, to approve what is his own wish.
	bySync := identity.NewRequest(w.id(t, identity.RoleSync).Principal(), "key-destroy", object, detail, time.Now(), time.Hour)
	signedBySync := bySync
	signedBySync.Nonce = "another"
	other1 := w.propose(t, "key-destroy", object, detail)
	proposals.Store(string(signedBySync.Digest()), proposalOf(other1))
	oldOnce := old
	oldOnce.Created, oldOnce.Expires = time.Now().UTC().Truncate(time.Second), time.Now().UTC().Truncate(time.Second).Add(time.Hour)
	with := func(more map[string]string) []byte {
		d := maps.Clone(detail)
		maps.Copy(d, more)
		return w.grant(t, "key-destroy", object, d)
	}
	for name, grant := range map[string][]byte{
		"nothing":                     nil,
		"no JSON":                     []byte("{"),
		"nobody":                      approve(t, good),
		"one person":                  approve(t, good, admin),
		"one person twice":            approve(t, good, admin, admin),
		"an auditor":                  approve(t, good, admin, w.person(t, identity.RoleAuditor, "auditor1")),
		"a requester":                 approve(t, good, admin, w.person(t, identity.RoleRequester, "requester1")),
		"another infrastructure CA":   approve(t, good, admin, stranger),
		"signed for another proposer": swap(byItself, approve(t, good, admin, operator)),
		"proposed by a machine":       approve(t, bySync, admin, operator),
		"another's proposal":          approve(t, signedBySync, admin, operator),
		"expired":                     swap(old, approve(t, oldOnce, admin, operator)),
		"approved for something":      swap(good, approve(t, w.propose(t, "key-destroy", object, detail), admin, operator)),
		"another action":              w.grant(t, "key-import", object, detail),
		"another key":                 w.grant(t, "key-destroy", "demo/"+string(other.ID), detail),
		"another group":               w.grant(t, "key-destroy", "demo2/"+string(k.ID), detail),
		"another public key":          w.grant(t, "key-destroy", object, map[string]string{"spki": sha(other.SPKI)}),
		"no public key":               w.grant(t, "key-destroy", object, nil),
		"a condition unknown here":    with(map[string]string{"not_before": "next year"}),
		"a spelling of the same key":  w.grant(t, "key-destroy", strings.ToUpper(object), detail),
	} {
		err := c.Destroy(soon(t), hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI, Grant: grant})
		if e, ok := errors.AsType[*hsm.Error](err); !ok || e.Class != hsm.ClassDenied || e.Code != hsm.CodeApproval {
			t.Errorf("%s: %v", name, err)
		}
	}
	hsmtest.WantClass(t, c.Destroy(soon(t), hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: other.SPKI, Grant: with(nil)}), hsm.ClassRequest)
	if _, err := s.client(identity.RoleCA).Sign(soon(t), request(k.ID, hsmtest.Digests(1))); err != nil {
		t.Fatalf("the key does not sign any more: %v", err)
	}
	if got := s.acts.details("destroy", "denied"); len(got) < 20 {
		t.Errorf("%d refusals in the audit record", len(got))
	}

	grant := approve(t, good, admin, operator)
	for range 2 { // an answer that got lost is asked for again
		if err := c.Destroy(soon(t), hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI, Grant: grant}); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.acts.details("destroy", "ok"); len(got) != 1 || !strings.Contains(got[0], "approved_by=trivet://lab/admin/admin1,trivet://lab/ca-operator/operator1") {
		t.Errorf("audit record: %q", got)
	}
	if keys, err := c.Inventory(soon(t)); err != nil || slices.ContainsFunc(keys, func(r hsm.KeyRecord) bool { return r.ID == k.ID }) {
		t.Errorf("the key is still there: %v", err)
	}
}

func TestOneApprovalIsEnoughWhereItIsConfigured(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, func(c *agent.Config) { c.Approvals = 1 })
	k := newKey(t, w, hsm.PurposeAudit)
	r := w.propose(t, "key-destroy", "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)})
	req := hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI, Grant: approve(t, r)}
	wantCode(t, s.client(identity.RoleSync).Destroy(soon(t), req), hsm.ClassDenied, hsm.CodeApproval)
	req.Grant = approve(t, r, w.person(t, identity.RoleAdmin, "admin1"))
	if err := s.client(identity.RoleSync).Destroy(soon(t), req); err != nil {
		t.Error(err)
	}
}

// A destroyed key comes back in no way, not from a backup and not after a restart.
func TestADestroyedKeyNeverComesBack(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	c := s.client(identity.RoleSync)
	k := newKey(t, w, hsm.PurposeAudit)
	blob, err := c.Export(soon(t), k.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Destroy(soon(t), hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI,
		Grant: w.grant(t, "key-destroy", "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)})}); err != nil {
		t.Fatal(err)
	}
	state, err := agent.OpenState(s.state)
	if err != nil {
		t.Fatal(err)
	}
	again := serve(t, w.token, func(c *agent.Config) { c.State = state })
	for _, c := range []*agent.Client{c, again.client(identity.RoleSync)} {
		_, err := c.Import(soon(t), blob)
		wantCode(t, err, hsm.ClassDenied, hsm.CodeDestroyed)
		_, err = c.Generate(soon(t), k.KeySpec)
		wantCode(t, err, hsm.ClassDenied, hsm.CodeDestroyed)
		req := adoption(t, w, "again")
		req.Spec.ID = k.ID
		_, err = c.Adopt(soon(t), req)
		wantCode(t, err, hsm.ClassDenied, hsm.CodeDestroyed)
	}
	// Behind the agent's back it does come back, and is of no use.
	if _, err := w.token.Import(blob); err != nil {
		t.Fatal(err)
	}
	_, err = again.client(identity.RoleCA).Sign(soon(t), request(k.ID, hsmtest.Digests(1)))
	wantCode(t, err, hsm.ClassDenied, hsm.CodeDestroyed)
	_, err = again.client(identity.RoleSync).Export(soon(t), k.ID, "")
	wantCode(t, err, hsm.ClassDenied, hsm.CodeDestroyed)
	_, _, err = again.client(identity.RoleSync).Challenge(soon(t), "demo", k.ID, make([]byte, 32))
	wantCode(t, err, hsm.ClassDenied, hsm.CodeDestroyed)
}

// The token says that it holds another key than was approved: nothing is buried. It fails: the key is out of use, and the
// same approval finishes the deed.
func TestADestructionThatFailsCanBeTriedAgain(t *testing.T) {
	w := open(t)
	answer := hsm.Errorf(hsm.ClassRequest, "destroy", "another key")
	token := &faulty{Token: w.token, destroy: func(hsm.KeyID, []byte) error { return answer }}
	s := serve(t, token, nil)
	k := newKey(t, w, hsm.PurposeAudit)
	req := hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI,
		Grant: w.grant(t, "key-destroy", "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)})}
	hsmtest.WantClass(t, s.client(identity.RoleSync).Destroy(soon(t), req), hsm.ClassRequest)
	if _, err := s.client(identity.RoleCA).Sign(soon(t), request(k.ID, hsmtest.Digests(1))); err != nil {
		t.Errorf("a key that was not destroyed: %v", err)
	}
	answer = hsm.Errorf(hsm.ClassDevice, "destroy", "no answer")
	hsmtest.WantClass(t, s.client(identity.RoleSync).Destroy(soon(t), req), hsm.ClassDevice)
	<-s.fatal

	state, err := agent.OpenState(s.state)
	if err != nil {
		t.Fatal(err)
	}
	again := serve(t, w.token, func(c *agent.Config) { c.State = state })
	_, err = again.client(identity.RoleCA).Sign(soon(t), request(k.ID, hsmtest.Digests(1)))
	wantCode(t, err, hsm.ClassDenied, hsm.CodeDestroyed)
	if err := again.client(identity.RoleSync).Destroy(soon(t), req); err != nil {
		t.Error(err)
	}
	if _, err := w.token.Key(k.ID); hsm.ClassOf(err) != hsm.ClassNotFound {
		t.Errorf("the key is still there: %v", err)
	}
}

// One approval, one key: not another one of the same label, and not for another purpose.
func TestAKeyIsAdoptedAsApproved(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	c := s.client(identity.RoleSync)
	req := adoption(t, w, "adopted")
	for _, change := range []func(*hsm.AdoptRequest){
		func(r *hsm.AdoptRequest) { r.Spec.Purpose = hsm.PurposeCA },
		func(r *hsm.AdoptRequest) { r.Spec.Label = "other" },
		func(r *hsm.AdoptRequest) { r.Group = "other" },
		func(r *hsm.AdoptRequest) { r.SPKI = w.keys[hsm.PurposeCA].SPKI },
		func(r *hsm.AdoptRequest) { r.Grant = nil },
	} {
		bad := req
		change(&bad)
		_, err := c.Adopt(soon(t), bad)
		wantCode(t, err, hsm.ClassDenied, hsm.CodeApproval)
	}
	for range 2 {
		k, err := c.Adopt(soon(t), req)
		if err != nil || k.KeySpec != req.Spec || !bytes.Equal(k.SPKI, req.SPKI) {
			t.Fatalf("%+v, %v", k, err)
		}
	}
	hsmtest.SignAndVerify(t, s.client(identity.RoleOCSP), hsm.KeyRecord{KeySpec: req.Spec, SPKI: req.SPKI}, 3)
	again := req // the same key, approved for another purpose
	again.Spec = hsm.KeySpec{ID: hsm.NewKeyID(), Label: "again", Purpose: hsm.PurposeAudit, Algorithm: req.Spec.Algorithm}
	again.Grant = w.grant(t, "key-import", "demo/again", map[string]string{"spki": sha(req.SPKI), "purpose": "audit", "algorithm": "P-256"})
	if _, err := c.Adopt(soon(t), again); hsm.ClassOf(err) != hsm.ClassRequest || !strings.Contains(err.Error(), "in the token already") {
		t.Errorf("one key under two purposes: %v", err)
	}
	twice := req
	twice.Spec.ID = hsm.NewKeyID()
	_, err := c.Adopt(soon(t), twice)
	wantCode(t, err, hsm.ClassDenied, hsm.CodeApproval)
}

func TestABackupIsForTheApprovedCustodiansAlone(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	c := s.client(identity.RoleSync)
	newRecipient := func() (*rsa.PrivateKey, []byte) {
		key, err := rsa.GenerateKey(rand.Reader, hsm.TransportBits)
		if err != nil {
			t.Fatal(err)
		}
		spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		return key, spki
	}
	key, spki := newRecipient()
	_, thief := newRecipient()
	grant := w.grant(t, "hsm-backup", "demo", map[string]string{"recipient": sha(spki)})
	for _, bad := range []hsm.BackupRequest{
		{Group: "demo", Recipient: spki}, {Group: "demo", Recipient: thief, Grant: grant}, {Group: "other", Recipient: spki, Grant: grant},
	} {
		_, _, err := c.BackupDomain(soon(t), bad)
		wantCode(t, err, hsm.ClassDenied, hsm.CodeApproval)
	}
	for range 2 { // the answer may have been lost
		wrapped, kek, err := c.BackupDomain(soon(t), hsm.BackupRequest{Group: "demo", Recipient: spki, Grant: grant})
		if err != nil || kek != "kek" || len(wrapped) != 2*hsm.TransportBits/8 {
			t.Fatalf("%d octets of %q, %v", len(wrapped), kek, err)
		}
		if half, err := rsa.DecryptOAEP(sha1.New(), nil, key, wrapped[:hsm.TransportBits/8], nil); err != nil || len(half) != 32 {
			t.Errorf("%d octets, %v", len(half), err)
		}
	}
	if got := s.acts.details("backup", "ok"); len(got) != 2 || !strings.Contains(got[0], "recipient="+sha(spki)) {
		t.Errorf("audit record: %q", got)
	}
}

// An agent that never knew, or has forgotten with its disk, is told by the group's log, with the approval of then.
func TestADestructionIsRememberedByAnApprovalThatHasExpired(t *testing.T) {
	w := open(t)
	later := func(c *agent.Config) { c.Now = func() time.Time { return time.Now().Add(48 * time.Hour) } }
	s := serve(t, w.token, later)
	c := s.client(identity.RoleSync)
	k, other := newKey(t, w, hsm.PurposeAudit), newKey(t, w, hsm.PurposeAudit)
	grant := w.grant(t, "key-destroy", "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)})
	one := approve(t, w.propose(t, "key-destroy", "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)}), w.person(t, identity.RoleAdmin, "admin1"))
	signs := func(k hsm.KeyRecord) error {
		_, err := s.client(identity.RoleCA).Sign(soon(t), request(k.ID, hsmtest.Digests(1)))
		return err
	}
	req := hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI, Grant: grant}
	if err := c.Destroy(soon(t), req); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("destroyed by an expired approval: %v", err)
	}
	for name, bad := range map[string]hsm.DestroyRequest{
		"nobody": {Group: "demo", Key: k.ID, SPKI: k.SPKI}, "one person": {Group: "demo", Key: k.ID, SPKI: k.SPKI, Grant: one},
		"another key": {Group: "demo", Key: other.ID, SPKI: other.SPKI, Grant: grant}, "another group": {Group: "demo2", Key: k.ID, SPKI: k.SPKI, Grant: grant},
		"another public key": {Group: "demo", Key: k.ID, SPKI: other.SPKI, Grant: grant},
	} {
		if err := c.Bury(soon(t), bad); err == nil {
			t.Errorf("%s: buried", name)
		}
	}
	if err := errors.Join(signs(k), signs(other)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.Bury(soon(t), req); err != nil {
			t.Fatal(err)
		}
	}
	if e, ok := errors.AsType[*hsm.Error](signs(k)); !ok || e.Code != hsm.CodeDestroyed {
		t.Errorf("it signs still: %v", e)
	}
	if err := signs(other); err != nil {
		t.Error(err)
	}
	if k, err := w.token.Key(k.ID); err != nil || k.Fault != "" {
		t.Errorf("the copy was touched: %v", err)
	}
	if got := s.acts.details("bury", "ok"); len(got) != 1 || !strings.Contains(got[0], "approved_by=") {
		t.Errorf("audit record: %q", got)
	}
}

// A retired key signs and proves nothing, whatever whoever carries requests makes of the group's log; its copy can still be had.
func TestARetiredKeyIsRefusedAsPeopleApproved(t *testing.T) {
	w := open(t)
	later := func(c *agent.Config) { c.Now = func() time.Time { return time.Now().Add(48 * time.Hour) } }
	s := serve(t, w.token, later)
	c := s.client(identity.RoleSync)
	k, other := newKey(t, w, hsm.PurposeAudit), newKey(t, w, hsm.PurposeAudit)
	detail := map[string]string{"spki": sha(k.SPKI), "label": k.Label, "purpose": string(k.Purpose)}
	grant := w.grant(t, "key-retire", "demo/"+string(k.ID), detail)
	one := approve(t, w.propose(t, "key-retire", "demo/"+string(k.ID), detail), w.person(t, identity.RoleAdmin, "admin1"))
	partly := w.grant(t, "key-retire", "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)})
	used := func(k hsm.KeyRecord) []error {
		var err [2]error
		_, err[0] = s.client(identity.RoleCA).Sign(soon(t), request(k.ID, hsmtest.Digests(1)))
		_, _, err[1] = c.Challenge(soon(t), "demo", k.ID, make([]byte, 32))
		return err[:]
	}
	req := hsm.RetireRequest{Group: "demo", Key: k.ID, Label: k.Label, Purpose: k.Purpose, SPKI: k.SPKI, Grant: grant}
	with := func(change func(*hsm.RetireRequest)) hsm.RetireRequest { r := req; change(&r); return r }
	for name, bad := range map[string]hsm.RetireRequest{
		"nobody": with(func(r *hsm.RetireRequest) { r.Grant = nil }), "one person": with(func(r *hsm.RetireRequest) { r.Grant = one }),
		"without its label": with(func(r *hsm.RetireRequest) { r.Grant = partly }), "another key": with(func(r *hsm.RetireRequest) { r.Key, r.SPKI = other.ID, other.SPKI }),
		"another group": with(func(r *hsm.RetireRequest) { r.Group = "demo2" }), "another public key": with(func(r *hsm.RetireRequest) { r.SPKI = other.SPKI }),
		"another purpose": with(func(r *hsm.RetireRequest) { r.Purpose = hsm.PurposeCA }),
		"to destroy it":   with(func(r *hsm.RetireRequest) { r.Grant = w.grant(t, "key-destroy", "demo/"+string(k.ID), detail) }),
	} {
		if err := c.Retire(soon(t), bad); err == nil {
			t.Errorf("%s: retired", name)
		}
	}
	if err := s.client(identity.RoleCA).Retire(soon(t), req); hsm.ClassOf(err) != hsm.ClassDenied {
		t.Errorf("by who may not manage keys: %v", err)
	}
	if err := errors.Join(append(used(k), used(other)...)...); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.Retire(soon(t), req); err != nil {
			t.Fatal(err)
		}
	}
	dir := s.state
	for range 2 { // and after a restart
		for _, err := range used(k) {
			wantCode(t, err, hsm.ClassDenied, hsm.CodeRetired)
		}
		if err := errors.Join(used(other)...); err != nil {
			t.Error(err)
		}
		b, err := c.Export(soon(t), k.ID, "")
		if err == nil {
			_, err = c.Import(soon(t), b)
		}
		if err != nil {
			t.Errorf("its copy: %v", err)
		}
		state, err := agent.OpenState(dir)
		if err != nil {
			t.Fatal(err)
		}
		s = serve(t, w.token, func(cfg *agent.Config) { later(cfg); cfg.State = state })
		c = s.client(identity.RoleSync)
	}
}
