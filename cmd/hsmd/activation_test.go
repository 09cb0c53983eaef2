package main_test

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// waitLocked waits until the agent answers that it is locked.
func waitLocked(t *testing.T, m *hsmtest.Member) {
	t.Helper()
	c := m.Client(identity.RoleSync)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		info, err := c.Health(ctx)
		cancel()
		if err == nil && info.Locked != "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not locked: %+v, %v\n%s", info, err, m.Log())
		}
	}
}

// A person gives the PIN, after every start; a wrong one is tried once, and another one may be.
func TestManualActivation(t *testing.T) {
	lab := hsmtest.NewLab(t)
	m, faults := lab.Faulty("hsmd-a", "activation: manual")
	if out, err := m.InitToken(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	right, err := os.ReadFile(m.PIN)
	if err != nil {
		t.Fatal(err)
	}
	pin := strings.TrimSpace(string(right))
	if err := os.Remove(m.PIN); err != nil { // nothing on this machine knows it
		t.Fatal(err)
	}
	faults.Clear("logins")
	logins := func() int { return strings.Count(faults.Read("logins"), "user 1") }

	socket := filepath.Join(t.TempDir(), "notify")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	t.Setenv("NOTIFY_SOCKET", socket)
	m.Start()
	waitLocked(t, m)
	if err := notify.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := notify.Read(b); err != nil || string(b[:n]) != "READY=1" { // up, so that systemd lets it be
		t.Errorf("%q, %v", b[:n], err)
	}
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: lab.Identity(identity.RoleSRE, "sre1").ClientTLS(identity.RoleHSMD)}}
	defer web.CloseIdleConnections()
	if resp, err := web.Get("https://" + m.Addr + "/readyz"); err != nil || resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("/readyz: %v, %v", resp, err)
	} else {
		_ = resp.Body.Close()
	}
	_, err = m.Client(identity.RoleSync).Inventory(within(t, 10*time.Second))
	wantCode(t, err, hsm.ClassPIN, hsm.CodeLocked)
	if logins() != 0 {
		t.Error("somebody logged in")
	}

	operator := m.Client(identity.RoleCAOperator)
	activate := func(pin string) error { return operator.Activate(within(t, 30*time.Second), pin) }
	for i, step := range []struct {
		pin    string
		logins int
	}{{"wrong-1", 1}, {"wrong-1", 1}, {"wrong-2", 2}, {"wrong-1", 2}, {"wrong-2", 2}} {
		hsmtest.WantClass(t, activate(step.pin), hsm.ClassPIN)
		if got := logins(); got != step.logins {
			t.Errorf("step %d: %d attempts, want %d", i, got, step.logins)
		}
	}
	hsmtest.WantClass(t, m.Client(identity.RoleSync).Activate(within(t, 10*time.Second), pin), hsm.ClassDenied)
	if err := activate(pin); err != nil {
		t.Fatal(err)
	}
	m.WaitReady()
	k := newKey(t, m)
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 3)

	m.Kill() // whatever ends the process, a person is needed again
	m.Start()
	waitLocked(t, m)
	_, err = m.Client(identity.RoleCA).Sign(within(t, 10*time.Second), hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(1)})
	wantCode(t, err, hsm.ClassPIN, hsm.CodeLocked)
	if err := activate(pin); err != nil {
		t.Fatal(err)
	}
	m.WaitReady()
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
	if left, err := filepath.Glob(filepath.Join(m.Dir, "pin-refused.json*")); err != nil || len(left) > 0 {
		t.Errorf("the marker is still there: %q, %v", left, err)
	}
	m.Signal(syscall.SIGTERM)
	if code := m.Exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	var outcomes []string
	for _, a := range record(t, m) {
		if a.Event == "activate" {
			outcomes = append(outcomes, a.Outcome)
		}
		if strings.Contains(a.Detail, pin) || strings.Contains(a.Detail, "wrong-") {
			t.Errorf("a PIN is in the audit record: %s", a.Detail)
		}
	}
	if n := strings.Count(strings.Join(outcomes, " "), "begun pin"); n != 5 || slices.Index(outcomes, "ok") < 0 {
		t.Errorf("audit record: %q", outcomes)
	}
	if log := m.Log(); strings.Contains(log, pin) || strings.Contains(log, "wrong-") {
		t.Error("a PIN is in the log")
	}
}

// A PIN file that the token refuses leaves an entry in the audit record.
func TestAFailedLoginIsInTheAuditRecord(t *testing.T) {
	m := hsmtest.NewLab(t).Member("hsmd-a")
	if out, err := m.InitToken(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	hsmtest.Write(t, m.PIN, "not-the-pin")
	m.Start()
	if code := m.Exit(); code != 78 {
		t.Errorf("exit code %d", code)
	}
	acts := record(t, m)
	if last := acts[len(acts)-1]; last.Event != "login" || last.Outcome != "pin" || last.Actor != "trivet://lab/hsmd/hsmd-a" || strings.Contains(last.Detail, "not-the-pin") {
		t.Errorf("%+v", last)
	}
}
