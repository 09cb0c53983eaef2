package agent_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"trivet/health"
	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// A locked agent says so in every way there is, does nothing, and lives; an operator's PIN opens it.
func TestALockedAgentDoesNothingUntilItIsActivated(t *testing.T) {
	w := open(t)
	var tried []string
	s := serve(t, nil, func(c *agent.Config) {
		c.Label = "agent"
		c.Activate = func(pin string) (agent.Token, error) {
			tried = append(tried, pin)
			if pin != "right" {
				return nil, &hsm.Error{Class: hsm.ClassPIN, Code: "CKR_PIN_INCORRECT", Op: "login", Err: errors.New("refused")}
			}
			return &faulty{Token: w.token}, nil
		}
	})
	locked := func(err error) { t.Helper(); wantCode(t, err, hsm.ClassPIN, hsm.CodeLocked) }
	c, k := s.client(identity.RoleSync), w.keys[hsm.PurposeCA]
	_, err := s.client(identity.RoleCA).Sign(soon(t), request(k.ID, hsmtest.Digests(1)))
	locked(err)
	_, _, err = c.Challenge(soon(t), "demo", k.ID, make([]byte, 32))
	locked(err)
	_, err = c.Inventory(soon(t))
	locked(err)
	_, err = c.Generate(soon(t), hsmtest.Spec("x", hsm.PurposeCA))
	locked(err)
	_, err = c.Export(soon(t), k.ID, "")
	locked(err)
	_, err = c.TransportKey(soon(t))
	locked(err)
	locked(c.GenerateDomain(soon(t), "kek"))
	locked(c.SetEpoch(soon(t), hsm.EpochRecord{Site: "here", Epoch: 1}))
	locked(c.Destroy(soon(t), hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI}))

	info, err := c.Health(soon(t))
	if err != nil || !strings.Contains(info.Locked, "operator") || info.Probe.OK || info.TokenLabel != "agent" || info.Member != "hsmd-a" {
		t.Errorf("%+v, %v", info, err)
	}
	if r := s.Report(); r.State != health.Degraded || r.Ready() || !strings.Contains(r.Capabilities["sign"].Cause, "activated") {
		t.Errorf("%+v", r)
	}
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: w.id(t, identity.RoleSRE).ClientTLS(identity.RoleHSMD)}}
	defer web.CloseIdleConnections()
	resp, err := web.Get("https://" + s.addr + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("/readyz: %s", resp.Status)
	}

	for _, role := range []identity.Role{identity.RoleSync, identity.RoleCA, identity.RoleSRE} {
		hsmtest.WantClass(t, s.client(role).Activate(soon(t), "right"), hsm.ClassDenied)
	}
	operator := s.client(identity.RoleCAOperator)
	hsmtest.WantClass(t, operator.Activate(soon(t), ""), hsm.ClassRequest)
	hsmtest.WantClass(t, operator.Activate(soon(t), strings.Repeat("x", 256)), hsm.ClassRequest)
	wantCode(t, operator.Activate(soon(t), "wrong"), hsm.ClassPIN, "CKR_PIN_INCORRECT")
	locked(c.Rotate(soon(t), "kek"))
	for range 2 { // the second finds it open
		if err := s.client(identity.RoleAdmin).Activate(soon(t), "right"); err != nil {
			t.Fatal(err)
		}
	}
	if len(tried) != 2 {
		t.Errorf("%d attempts", len(tried))
	}
	eventually(t, "well", func() bool { return s.Report().State == health.OK && s.Info().Locked == "" })
	hsmtest.SignAndVerify(t, s.client(identity.RoleCA), k, 2)
	if len(s.fatal) > 0 {
		t.Errorf("the agent gave itself up: %v", <-s.fatal)
	}
	if got := strings.Join(s.acts.events(), ", "); !strings.Contains(got, "activate begun, activate pin, activate begun, activate ok") {
		t.Errorf("audit record: %s", got)
	}
	for _, d := range append(s.acts.details("activate", "ok"), s.acts.details("activate", "pin")...) {
		if strings.Contains(d, "right") || strings.Contains(d, "wrong") {
			t.Errorf("the PIN is in the audit record: %q", d)
		}
	}
}

// A token that breaks while it is opened cannot be opened again by this process.
func TestATokenThatBreaksWhileItIsOpenedEndsTheProcess(t *testing.T) {
	s := serve(t, nil, func(c *agent.Config) {
		c.Activate = func(string) (agent.Token, error) { return nil, hsm.Errorf(hsm.ClassDevice, "open", "gone") }
	})
	hsmtest.WantClass(t, s.client(identity.RoleAdmin).Activate(soon(t), "right"), hsm.ClassDevice)
	<-s.fatal
}
