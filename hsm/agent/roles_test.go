package agent_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"slices"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

func TestEveryRolePurposeAndOperation(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	ctx := soon(t)
	sign := map[identity.Role][]hsm.Purpose{
		identity.RoleCA: {hsm.PurposeCA, hsm.PurposeCRL, hsm.PurposeAudit}, identity.RoleOCSP: {hsm.PurposeOCSP},
		identity.RoleCeremony: {hsm.PurposeCA, hsm.PurposeCRL},
	}
	manage := []identity.Role{identity.RoleSync, identity.RoleCeremony}
	read := []identity.Role{identity.RoleCA, identity.RoleOCSP, identity.RoleSync, identity.RoleCeremony, identity.RoleFsck,
		identity.RoleCAOperator, identity.RoleAdmin, identity.RoleAuditor, identity.RoleSRE}
	activate := []identity.Role{identity.RoleCAOperator, identity.RoleAdmin}

	blob, err := w.token.Export(w.keys[hsm.PurposeCA].ID, "")
	if err != nil {
		t.Fatal(err)
	}
	transport, err := s.client(identity.RoleSync).TransportKey(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fingerprint, member, err := agent.TransportFingerprint(w.id(t, identity.RoleCeremony), transport, time.Now())
	if err != nil || member != "hsmd-a" {
		t.Fatalf("%q, %v", member, err)
	}
	enroll := w.grant(t, "hsm-enroll", "demo/hsmd-a", map[string]string{"transport": fingerprint})
	wrapped, kek, err := s.client(identity.RoleSync).ExportDomain(ctx, hsm.DomainRequest{Group: "demo", Recipient: transport, Grant: enroll})
	if err != nil {
		t.Fatal(err)
	}
	doomed := newKey(t, w, hsm.PurposeAudit)
	destroy := hsm.DestroyRequest{Group: "demo", Key: doomed.ID, SPKI: doomed.SPKI,
		Grant: w.grant(t, "key-destroy", "demo/"+string(doomed.ID), map[string]string{"spki": sha(doomed.SPKI)})}
	custodians, err := rsa.GenerateKey(rand.Reader, hsm.TransportBits)
	if err != nil {
		t.Fatal(err)
	}
	recipient, err := x509.MarshalPKIXPublicKey(&custodians.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	backup := hsm.BackupRequest{Group: "demo", Recipient: recipient, Grant: w.grant(t, "hsm-backup", "demo", map[string]string{"recipient": sha(recipient)})}
	adopt := adoption(t, w, "brought-along")

	// Destroying comes last, so that every role has met the key.
	for _, role := range append(slices.DeleteFunc(identity.Roles(), func(r identity.Role) bool { return slices.Contains(manage, r) }), manage...) {
		c := s.client(role)
		check := func(op string, err error, allowed bool) {
			t.Helper()
			if denied := hsm.ClassOf(err) == hsm.ClassDenied; denied == allowed || allowed && err != nil {
				t.Errorf("%s as %s: %v, want allowed %v", op, role, err, allowed)
			}
		}
		for _, p := range hsm.Purposes() {
			k := w.keys[p]
			_, err := c.Sign(ctx, hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(1), Epoch: s.Info().Epoch})
			check("sign "+string(p), err, slices.Contains(sign[role], p))
			_, _, err = c.Challenge(ctx, "demo", k.ID, make([]byte, 32))
			check("challenge "+string(p), err, role == identity.RoleSync || slices.Contains(sign[role], p))
		}
		may := slices.Contains(manage, role)
		_, err := c.Generate(ctx, w.keys[hsm.PurposeCA].KeySpec)
		check("generate", err, may)
		_, err = c.Export(ctx, w.keys[hsm.PurposeCA].ID, "")
		check("export", err, may)
		_, err = c.Import(ctx, blob)
		check("import", err, may)
		_, err = c.Adopt(ctx, adopt)
		check("adopt", err, may)
		_, err = c.TransportKey(ctx)
		check("transport key", err, may)
		check("generate domain", c.GenerateDomain(ctx, "kek"), may)
		_, _, err = c.ExportDomain(ctx, hsm.DomainRequest{Group: "demo", Recipient: transport, Grant: enroll})
		check("export domain", err, may)
		check("import domain", c.ImportDomain(ctx, kek, wrapped), may)
		check("rotate", c.Rotate(ctx, "kek"), may)
		if err := c.DropDomain(ctx, "kek"); hsm.ClassOf(err) != hsm.ClassRequest && may || hsm.ClassOf(err) != hsm.ClassDenied && !may {
			t.Errorf("drop domain as %s: %v", role, err)
		}
		_, _, err = c.BackupDomain(ctx, backup)
		check("backup", err, may)
		check("set epoch", c.SetEpoch(ctx, hsm.EpochRecord{Site: "here", Epoch: 1}), may)
		check("destroy", c.Destroy(ctx, destroy), may)
		check("activate", c.Activate(ctx, "not looked at"), slices.Contains(activate, role))
		_, err = c.Health(ctx)
		check("health", err, slices.Contains(read, role))
		_, err = c.Inventory(ctx)
		check("inventory", err, slices.Contains(read, role))
	}
	if s.acts.events() == nil || len(s.fatal) > 0 {
		t.Errorf("audit %v, fatal %d", s.acts.events(), len(s.fatal))
	}
}

// adoption is a request to take in a fresh P-256 key, approved.
func adoption(t *testing.T, w *world, label string) hsm.AdoptRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err1 := x509.MarshalPKCS8PrivateKey(key)
	spki, err2 := x509.MarshalPKIXPublicKey(&key.PublicKey)
	transport, err3 := w.token.TransportKey()
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	box, err := hsm.Seal(transport, pkcs8)
	if err != nil {
		t.Fatal(err)
	}
	spec := hsmtest.Spec(label, hsm.PurposeOCSP)
	return hsm.AdoptRequest{Group: "demo", Spec: spec, SPKI: spki, Sealed: box,
		Grant: w.grant(t, "key-import", "demo/"+label, map[string]string{"spki": sha(spki), "purpose": "ocsp", "algorithm": "P-256"})}
}

// A caller that holds a stale proof is told so, and nothing else happens.
func TestAProofOfAnotherIncarnationIsRefused(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	req := request(w.keys[hsm.PurposeCA].ID, hsmtest.Digests(2))
	req.Incarnation = "incarnation-0"
	_, err := s.client(identity.RoleCA).Sign(soon(t), req)
	wantCode(t, err, hsm.ClassSession, hsm.CodeStaleIncarnation)
	req.Incarnation = "incarnation-1"
	if _, err := s.client(identity.RoleCA).Sign(soon(t), req); err != nil {
		t.Error(err)
	}
	if len(s.fatal) > 0 {
		t.Errorf("the agent gave itself up: %v", <-s.fatal)
	}
}

// Every algorithm signs what fits it, the largest batch included, and nothing else.
func TestDigestsMustFitTheKey(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	for _, alg := range []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048, hsm.Ed25519} {
		spec := hsmtest.Spec("digests-"+string(alg), hsm.PurposeAudit)
		spec.Algorithm, spec.NonExtractable = alg, !alg.Cloneable()
		k, err := s.client(identity.RoleSync).Generate(soon(t), spec)
		if alg == hsm.Ed25519 && hsm.ClassOf(err) == hsm.ClassRequest {
			t.Logf("this module makes no Ed25519 keys: %v", err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		pub, err := alg.ParsePublic(k.SPKI)
		if err != nil {
			t.Fatal(err)
		}
		digest := alg.Digest([]byte("message"))
		if alg == hsm.Ed25519 {
			digest = make([]byte, hsm.MaxMessage)
		}
		batch := make([][]byte, hsm.MaxBatch)
		for i := range batch {
			batch[i] = digest
		}
		if alg == hsm.RSA2048 { // slow under the race detector
			batch = batch[:8]
		}
		sigs, err := s.client(identity.RoleCA).Sign(soon(t), request(k.ID, batch))
		if err != nil {
			t.Fatalf("%s: %v", alg, err)
		}
		for _, sig := range sigs {
			if err := hsm.Verify(pub, digest, sig); err != nil {
				t.Fatalf("%s: %v", alg, err)
			}
		}
		for _, bad := range [][]byte{nil, make([]byte, 20), make([]byte, hsm.MaxMessage+1)} {
			if alg == hsm.Ed25519 && len(bad) == 20 {
				continue
			}
			_, err := s.client(identity.RoleCA).Sign(soon(t), request(k.ID, [][]byte{digest, bad}))
			hsmtest.WantClass(t, err, hsm.ClassRequest)
		}
		nonce := make([]byte, 32)
		sig, incarnation, err := s.client(identity.RoleSync).Challenge(soon(t), "demo", k.ID, nonce)
		if err != nil {
			t.Fatal(err)
		}
		if err := hsm.Verify(pub, hsm.ChallengeDigest(alg, "demo", "hsmd-a", incarnation, k.ID, nonce), sig); err != nil {
			t.Errorf("%s: the proof: %v", alg, err)
		}
	}
}
