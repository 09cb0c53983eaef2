package agent_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// softKey is a transport key that no token holds.
func softKey(t testing.TB) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, hsm.TransportBits)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return spki
}

// attest is what the agent with that identity says of a transport key, changed on the way.
func attest(t testing.TB, id *identity.Identity, spki []byte, change func(map[string]any)) []byte {
	t.Helper()
	b, err := agent.Attest(id, spki)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(m)
	}
	if b, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	return b
}

// A domain key goes to a token that an agent of this cluster vouches for, and people approved: not to a key somebody made.
func TestADomainKeyGoesOnlyToAnApprovedAgentsToken(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	c := s.client(identity.RoleSync)
	spki, trojan := softKey(t), softKey(t)
	b := w.person(t, identity.RoleHSMD, "hsmd-b")
	strangers, err := identity.CreateAuthority(filepath.Join(t.TempDir(), "authority"), "lab")
	if err != nil {
		t.Fatal(err)
	}
	f, err := strangers.IssueTo(t.TempDir(), b.Principal(), nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := identity.Load(f)
	if err != nil {
		t.Fatal(err)
	}
	export := func(recipient, grant []byte) error {
		_, _, err := c.ExportDomain(soon(t), hsm.DomainRequest{Group: "demo", Recipient: recipient, Grant: grant})
		return err
	}
	for name, recipient := range map[string][]byte{
		"vouched for by sync":           attest(t, w.id(t, identity.RoleSync), spki, nil),
		"vouched for by ca":             attest(t, w.id(t, identity.RoleCA), spki, nil),
		"vouched for by another CA's b": attest(t, stranger, spki, nil),
		"exchanged on the way":          attest(t, b, spki, func(m map[string]any) { m["spki"] = trojan }),
		"no chain":                      attest(t, b, spki, func(m map[string]any) { m["chain"] = nil }),
		"no signature":                  attest(t, b, spki, func(m map[string]any) { m["signature"] = nil }),
		"too long":                      attest(t, b, spki, func(m map[string]any) { m["more"] = strings.Repeat("x", 16<<10) }),
		"bare":                          spki, "nothing": nil,
	} {
		grant := w.grant(t, "hsm-enroll", "demo/hsmd-b", map[string]string{"transport": sha(spki)})
		wantCode(t, export(recipient, grant), hsm.ClassDenied, "")
		if t.Failed() {
			t.Fatal(name)
		}
	}

	good := attest(t, b, spki, nil)
	for name, grant := range map[string][]byte{
		"unapproved":     nil,
		"another member": w.grant(t, "hsm-enroll", "demo/hsmd-c", map[string]string{"transport": sha(spki)}),
		"another token":  w.grant(t, "hsm-enroll", "demo/hsmd-b", map[string]string{"transport": sha(trojan)}),
		"any token":      w.grant(t, "hsm-enroll", "demo/hsmd-b", nil),
		"another group":  w.grant(t, "hsm-enroll", "demo2/hsmd-b", map[string]string{"transport": sha(spki)}),
	} {
		wantCode(t, export(good, grant), hsm.ClassDenied, hsm.CodeApproval)
		if t.Failed() {
			t.Fatal(name)
		}
	}
	if err := export(good, w.grant(t, "hsm-enroll", "demo/hsmd-b", map[string]string{"transport": sha(spki)})); err != nil {
		t.Fatal(err)
	}
	if err := export(good, nil); err != nil { // known by now
		t.Error(err)
	}

	// Member b gets another token: the new one needs an approval, and the old one is unknown again.
	replaced := attest(t, b, trojan, nil)
	wantCode(t, export(replaced, nil), hsm.ClassDenied, hsm.CodeApproval)
	if err := export(replaced, w.grant(t, "hsm-enroll", "demo/hsmd-b", map[string]string{"transport": sha(trojan)})); err != nil {
		t.Fatal(err)
	}
	wantCode(t, export(good, nil), hsm.ClassDenied, hsm.CodeApproval)

	// Member b is removed: its token is a stranger's from then on.
	if err := export(replaced, nil); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := c.ForgetTransport(soon(t), sha(trojan)); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, export(replaced, nil), hsm.ClassDenied, hsm.CodeApproval)
	wantCode(t, c.ForgetTransport(soon(t), "all"), hsm.ClassRequest, "")
	wantCode(t, s.client(identity.RoleCA).ForgetTransport(soon(t), sha(trojan)), hsm.ClassDenied, "")
	if got := s.acts.details("domain-export", "ok"); len(got) != 4 || !strings.Contains(got[0], "approved_by=trivet://lab/admin/admin1") {
		t.Errorf("audit record: %q", got)
	}
}

// Whoever brings a domain key in could know it, and could have every key exported under it.
func TestABroughtDomainKeyNeverJoinsKeysThatAreThere(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	c := s.client(identity.RoleSync)
	own, err := w.token.TransportKey()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := hsm.ParseTransport(own)
	if err != nil {
		t.Fatal(err)
	}
	var bare []byte
	for range 2 {
		half, err := hsm.SealSecret(pub, make([]byte, 32))
		if err != nil {
			t.Fatal(err)
		}
		bare = append(bare, half...)
	}
	b := w.person(t, identity.RoleHSMD, "hsmd-b")
	convey := func(id *identity.Identity, to, origin string, change func(map[string]any)) []byte {
		wrapped, err := agent.Convey(id, "evil", to, origin, bare)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(wrapped, &m); err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(m)
		}
		if wrapped, err = json.Marshal(m); err != nil {
			t.Fatal(err)
		}
		return wrapped
	}
	for name, wrapped := range map[string][]byte{
		"bare":                   bare,
		"brought to b":           convey(b, sha(own), "brought", nil),
		"vouched for by sync":    convey(w.id(t, identity.RoleSync), sha(own), "made", nil),
		"called made on the way": convey(b, sha(own), "brought", func(m map[string]any) { m["origin"] = "made" }),
		"exchanged on the way":   convey(b, sha(own), "made", func(m map[string]any) { m["wrapped"] = append([]byte{1}, bare...) }),
	} {
		if err := c.ImportDomain(soon(t), "evil", wrapped); hsm.ClassOf(err) != hsm.ClassDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, wrapped := range map[string][]byte{
		"for another token": convey(b, strings.Repeat("0", 64), "made", nil), "of no origin": convey(b, sha(own), "", nil),
	} {
		if err := c.ImportDomain(soon(t), "evil", wrapped); hsm.ClassOf(err) != hsm.ClassRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	if i := w.token.Info(); i.KEK != "kek" || i.NextKEK != "" {
		t.Errorf("the token holds %q and %q", i.KEK, i.NextKEK)
	}
}

func FuzzConveyedDomain(f *testing.F) {
	w := open(f)
	id := w.id(f, identity.RoleHSMD)
	good, err := agent.Convey(id, "kek", "to", "made", []byte("wrapped"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"chain":[]}`))
	f.Fuzz(func(t *testing.T, wrapped []byte) {
		if inner, origin, err := agent.Conveyed(id, "kek", wrapped, "to", time.Now()); err == nil && origin == "made" && string(inner) != "wrapped" {
			t.Errorf("forged: %q", wrapped)
		}
	})
}

// Requests that wait for one another are no hung module, and more of them than there is room for are turned away.
func TestManagementRequestsWaitForEachOther(t *testing.T) {
	w := open(t)
	gate, inside := make(chan struct{}), make(chan struct{}, 100)
	token := &faulty{Token: w.token, inventory: func() ([]hsm.KeyRecord, error) {
		inside <- struct{}{}
		<-gate
		return nil, nil
	}}
	s := serve(t, token, func(c *agent.Config) { c.CallTimeout = 400 * time.Millisecond })
	errs := make(chan error, 20)
	for range 20 {
		c := s.client(identity.RoleSync)
		go func() { _, err := c.Inventory(soon(t)); errs <- err }()
	}
	<-inside
	for range 4 { // sixteen have room
		hsmtest.WantClass(t, <-errs, hsm.ClassOverloaded)
	}
	if len(inside) > 0 {
		t.Error("two are in the module at once")
	}
	if _, err := s.client(identity.RoleCA).Sign(soon(t), request(w.keys[hsm.PurposeCA].ID, hsmtest.Digests(1))); err != nil {
		t.Errorf("signing beside management: %v", err)
	}
	for range 16 { // each takes 200 ms, all of them longer than one may
		time.AfterFunc(200*time.Millisecond, func() { gate <- struct{}{} })
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if len(s.fatal) > 0 {
		t.Errorf("waiting ended the process: %v", <-s.fatal)
	}
}

// What a caller began is done and recorded also when the caller has gone.
func TestAnActGoesOnWithoutItsCaller(t *testing.T) {
	w := open(t)
	gate, inside := make(chan struct{}), make(chan struct{}, 1)
	token := &faulty{Token: w.token, generate: func(spec hsm.KeySpec) (hsm.KeyRecord, error) {
		inside <- struct{}{}
		<-gate
		return w.token.Generate(spec)
	}}
	s := serve(t, token, nil)
	ctx, cancel := context.WithCancel(soon(t))
	done := make(chan error, 1)
	spec := hsmtest.Spec("left-alone", hsm.PurposeAudit)
	go func() { _, err := s.client(identity.RoleSync).Generate(ctx, spec); done <- err }()
	<-inside
	cancel()
	hsmtest.WantClass(t, <-done, hsm.ClassDevice)
	close(gate)
	eventually(t, "the act is recorded as done", func() bool { return len(s.acts.details("generate", "ok")) == 1 })
	if _, err := w.token.Key(spec.ID); err != nil {
		t.Error(err)
	}
}
