package main_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/identity"
	"trivet/journal"
)

func TestMain(m *testing.M) { os.Exit(hsmtest.Main(m)) }

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// newKey makes a CA key in m.
func newKey(t *testing.T, m *hsmtest.Member) hsm.KeyRecord {
	t.Helper()
	k, err := m.Client(identity.RoleSync).Generate(within(t, 10*time.Second), hsmtest.Spec("demo-g1", hsm.PurposeCA))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// prove has m prove, as whoever asks, that it holds k.
func prove(t *testing.T, m *hsmtest.Member, k hsm.KeyRecord) (incarnation string) {
	t.Helper()
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce) // documented never to fail
	sig, incarnation, err := m.Client(identity.RoleSync).Challenge(within(t, 10*time.Second), "demo", k.ID, nonce)
	if err != nil {
		t.Fatal(err)
	}
	if !hsmtest.Verifies(t, k.SPKI, hsm.ChallengeDigest(k.Algorithm, "demo", m.Name, incarnation, k.ID, nonce), sig) {
		t.Errorf("the proof of %s does not verify", m.Name)
	}
	return incarnation
}

// A key made in one member is carried to a second and a third (through the second, so that the first may be gone);
// each signs with it and proves it; what is tampered with on the way is refused and leaves nothing.
func TestKeysAreClonedFromMemberToMember(t *testing.T) {
	lab := hsmtest.NewLab(t)
	a, b, c := lab.Start("hsmd-a"), lab.Start("hsmd-b"), lab.Start("hsmd-c")
	k := newKey(t, a)
	if err := a.Client(identity.RoleSync).GenerateDomain(within(t, 10*time.Second), "kek-1"); err != nil {
		t.Fatal(err)
	}
	for _, hop := range []struct{ from, to *hsmtest.Member }{{a, b}, {b, c}} {
		from, to := hop.from.Client(identity.RoleSync), hop.to.Client(identity.RoleSync)
		ctx := within(t, 20*time.Second)
		blob, err := from.Export(ctx, k.ID, "")
		if err != nil {
			t.Fatal(err)
		}
		_, err = to.Import(ctx, blob)
		hsmtest.WantClass(t, err, hsm.ClassRequest) // no domain key yet
		if err := enroll(t, lab, hop.from, hop.to); err != nil {
			t.Fatal(err)
		}
		for name, bad := range hsmtest.Tampered(blob) {
			if _, err := to.Import(ctx, bad); hsm.ClassOf(err) != hsm.ClassRequest {
				t.Errorf("%s: %v", name, err)
			}
		}
		if list, err := to.Inventory(ctx); err != nil || len(list) != 1 { // the probe key alone
			t.Errorf("after refused imports: %+v, %v", list, err)
		}
		clone, err := to.Import(ctx, blob)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(clone.SPKI, k.SPKI) || clone.KeySpec != k.KeySpec || clone.Attributes != k.Attributes || clone.Local {
			t.Errorf("clone %+v of %+v", clone, k)
		}
		hsmtest.SignAndVerify(t, hop.to.Client(identity.RoleCA), k, 8)
		prove(t, hop.to, k)
		hop.from.Kill()
	}
}

// Two members that made domain keys of the same name separately are not one domain.
func TestAnotherDomainOfTheSameNameIsRefused(t *testing.T) {
	lab := hsmtest.NewLab(t)
	a, b := lab.Start("hsmd-a"), lab.Start("hsmd-b")
	for _, m := range []*hsmtest.Member{a, b} {
		if err := m.Client(identity.RoleSync).GenerateDomain(within(t, 10*time.Second), "kek-1"); err != nil {
			t.Fatal(err)
		}
	}
	hsmtest.WantClass(t, b.Join(a), hsm.ClassRequest)
	k := newKey(t, a)
	blob, err := a.Client(identity.RoleSync).Export(within(t, 10*time.Second), k.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Client(identity.RoleSync).Import(within(t, 10*time.Second), blob)
	hsmtest.WantClass(t, err, hsm.ClassRequest)
}

func TestKillKeepsKeysAndChangesTheIncarnation(t *testing.T) {
	m := hsmtest.NewLab(t).Start("hsmd-a")
	k := newKey(t, m)
	before := prove(t, m, k)
	m.Kill()
	_, err := m.Client(identity.RoleCA).Sign(within(t, 5*time.Second), hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(1)})
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	m.Start()
	m.WaitReady()
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 3)
	if after := prove(t, m, k); after == before {
		t.Error("the incarnation is the same after a restart")
	}
}

func TestAFrozenAgentMeetsTheCallersDeadline(t *testing.T) {
	// A call takes 100 ms here, and the process is frozen in the middle of one for longer than call_timeout: being
	// frozen is no hang of the module, so it goes on afterwards.
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a", "call_timeout: 1s")
	m.Serve()
	k, c := newKey(t, m), m.Client(identity.RoleCA)
	hsmtest.SignAndVerify(t, c, k, 1)
	before := m.WaitReady().Incarnation
	faults.Set("slow", "100000")
	signing := make(chan error, 1)
	go func() {
		_, err := c.Sign(within(t, 500*time.Millisecond), hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(64)})
		signing <- err
	}()
	for m.WaitReady().InFlight < 1 {
		continue
	}
	m.Freeze()
	_, err := c.Sign(within(t, 1500*time.Millisecond), hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(1)})
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	hsmtest.WantClass(t, <-signing, hsm.ClassDevice)
	faults.Clear("slow")
	m.Thaw()
	if after := m.WaitReady().Incarnation; after != before {
		t.Error("the agent ended for having been frozen")
	}
	hsmtest.SignAndVerify(t, c, k, 1)
}

// The module itself hangs: callers get their answer, the process ends by itself, and a new one works.
func TestAHungModuleEndsTheProcess(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a", "call_timeout: 1s")
	m.Serve()
	k := newKey(t, m)
	faults.Set("hang", "")
	_, err := m.Client(identity.RoleCA).Sign(within(t, 10*time.Second), hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(64)})
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	if code := m.Exit(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	faults.Clear("hang")
	m.Start()
	m.WaitReady()
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 8)
}

func TestALostDeviceOrSessionEndsTheProcess(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
	m.Serve()
	k := newKey(t, m)
	for _, code := range []string{"0x30", "0xB3", "0x101"} { // DEVICE_ERROR, SESSION_HANDLE_INVALID, USER_NOT_LOGGED_IN
		faults.Set("error", code)
		_, err := m.Client(identity.RoleCA).Sign(within(t, 10*time.Second), hsm.SignRequest{Key: k.ID, Digests: hsmtest.Digests(1)})
		hsmtest.WantClass(t, err, hsm.ClassDevice, hsm.ClassSession)
		if code := m.Exit(); code != 1 {
			t.Errorf("exit code %d", code)
		}
		faults.Clear("error")
		m.Start()
		m.WaitReady()
		hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
	}
}

// An import that the module spoils halfway leaves nothing, and a second try is as good as a first.
func TestASpoiltImportLeavesNothing(t *testing.T) {
	lab := hsmtest.NewLab(t)
	a := lab.Start("hsmd-a")
	b, faults := lab.Faulty("hsmd-b")
	b.Serve()
	k := newKey(t, a)
	if err := a.Client(identity.RoleSync).GenerateDomain(within(t, 10*time.Second), "kek-1"); err != nil {
		t.Fatal(err)
	}
	if err := enroll(t, lab, a, b); err != nil {
		t.Fatal(err)
	}
	blob, err := a.Client(identity.RoleSync).Export(within(t, 10*time.Second), k.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	faults.Set("flip", "") // also spoils the MAC, so only the outcome counts
	to := b.Client(identity.RoleSync)
	_, err = to.Import(within(t, 10*time.Second), blob)
	hsmtest.WantClass(t, err, hsm.ClassRequest)
	faults.Clear("flip")
	if list, err := to.Inventory(within(t, 10*time.Second)); err != nil || len(list) != 1 {
		t.Errorf("left behind: %+v, %v", list, err)
	}
	if _, err := to.Import(within(t, 10*time.Second), blob); err != nil {
		t.Error(err)
	}
	hsmtest.SignAndVerify(t, b.Client(identity.RoleCA), k, 1)
}

// Every signature of a CA key that the module was asked for is either one a caller asked for or one in the audit record.
func TestEveryDigestInTheModuleHasARecord(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a", "probe_every: 2s")
	if out, err := m.InitToken(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.Start()
	m.WaitReady()
	k := newKey(t, m)
	faults.Set("digests", "")
	digests := hsmtest.Digests(20)
	if _, err := m.Client(identity.RoleCA).Sign(within(t, 10*time.Second), hsm.SignRequest{Key: k.ID, Digests: digests}); err != nil {
		t.Fatal(err)
	}
	prove(t, m, k)
	m.Signal(syscall.SIGTERM)
	if code := m.Exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	var record strings.Builder
	var events []string
	err := journal.ReadDir(filepath.Join(m.Dir, "audit"), func(e journal.Entry) error {
		if e.Kind != journal.KindAudit {
			return nil
		}
		var a journal.Audit
		if err := e.Decode(&a); err != nil {
			return err
		}
		events = append(events, a.Event+" "+a.Outcome)
		record.WriteString(a.Detail + "\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	inModule := faults.Read("digests")
	for _, d := range digests {
		if !strings.Contains(inModule, hex(d)) {
			t.Error("a digest was not signed")
		}
	}
	if got := strings.Join(events, ", "); got != "init-token begun, init-token ok, start ok, generate begun, generate ok, challenge begun, signatures ok" {
		t.Errorf("audit record: %s", got)
	}
	if !strings.Contains(record.String(), "count=20") || !strings.Contains(record.String(), "class=pop group=demo digest=") {
		t.Errorf("audit details: %s", record.String())
	}
}

func hex(b []byte) string {
	const digits = "0123456789abcdef"
	var s strings.Builder
	for _, c := range b {
		s.WriteByte(digits[c>>4])
		s.WriteByte(digits[c&15])
	}
	return s.String()
}

// A wrong PIN costs one attempt, however often the process is started again; the right one works without further ado.
func TestAWrongPINIsTriedOnce(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
	if out, err := m.InitToken(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	right, err := os.ReadFile(m.PIN)
	if err != nil {
		t.Fatal(err)
	}
	faults.Clear("logins")
	hsmtest.Write(t, m.PIN, "not-the-pin")
	for i := range 3 {
		if i == 2 { // the same PIN in a new file is the same PIN
			if err := os.Remove(m.PIN); err != nil {
				t.Fatal(err)
			}
			hsmtest.Write(t, m.PIN, "not-the-pin\n")
		}
		m.Start()
		if code := m.Exit(); code != 78 {
			t.Errorf("exit code %d", code)
		}
		if got := strings.Count(faults.Read("logins"), "user 1"); got != 1 {
			t.Errorf("start %d: %d attempts", i, got)
		}
	}
	if log := m.Log(); !strings.Contains(log, "operator") || !strings.Contains(log, "lock") || strings.Contains(log, "not-the-pin") {
		t.Errorf("log: %s", log)
	}
	if out, err := m.InitToken(); err == nil || strings.Count(faults.Read("logins"), "user 1") != 1 {
		t.Errorf("init-token tried the PIN again: %s", out)
	}
	hsmtest.Write(t, m.PIN, string(right))
	m.Start()
	m.WaitReady()
	if _, err := os.Stat(filepath.Join(m.Dir, "pin-refused.json")); !os.IsNotExist(err) {
		t.Errorf("the marker is still there: %v", err)
	}
}

func TestASecondAgentNeverTouchesTheToken(t *testing.T) {
	m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
	m.Serve()
	logins := faults.Read("logins")
	if out, err := m.InitToken(); err == nil {
		t.Errorf("init-token ran beside the agent: %s", out)
	}
	second := *m
	second.Start()
	if code := second.Exit(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	if faults.Read("logins") != logins {
		t.Error("somebody else logged in")
	}
	m.WaitReady()
}

func TestInitTokenIsIdempotent(t *testing.T) {
	m := hsmtest.NewLab(t).Start("hsmd-a")
	k := newKey(t, m)
	m.Signal(syscall.SIGTERM)
	if code := m.Exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	out, err := m.InitToken()
	if err != nil || !strings.Contains(out, "unchanged; it holds 1 keys") {
		t.Errorf("%s, %v", out, err)
	}
	m.Start()
	m.WaitReady()
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
}

func TestConfigurationMistakesAreNamed(t *testing.T) {
	m := hsmtest.NewLab(t).Member("hsmd-a")
	good, err := os.ReadFile(m.Config)
	if err != nil {
		t.Fatal(err)
	}
	for change, want := range map[string]string{
		"": "", "approvals: 0\n": "approvals is 0", "activation: sometimes\n": "must be auto or manual", "colour: red\n": "colour", "sessions: 0\n": "sessions is 0", "call_timeout: 1h\n": "call_timeout is 1h0m0s", "queue: none\n": "queue",
	} {
		hsmtest.Write(t, m.Config, string(good)+change)
		out, err := m.Command("--config", m.Config, "--check").CombinedOutput()
		if want == "" && (err != nil || string(out) != "ok\n") || want != "" && (err == nil || !strings.Contains(string(out), want)) {
			t.Errorf("%q: %v, %s", change, err, out)
		}
	}
	if out, err := m.Command().CombinedOutput(); err == nil || !strings.Contains(string(out), "usage") {
		t.Errorf("%v, %s", err, out)
	}
}

func TestHealthAndMetricsTellTheTruth(t *testing.T) {
	lab := hsmtest.NewLab(t)
	m := lab.Start("hsmd-a")
	k := newKey(t, m)
	hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 5)
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: lab.Identity(identity.RoleSRE, "sre1").ClientTLS(identity.RoleHSMD)}}
	defer web.CloseIdleConnections()
	get := func(path string) string {
		resp, err := web.Get("https://" + m.Addr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var b bytes.Buffer
		if _, err := b.ReadFrom(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s, %v", path, resp.Status, err)
		}
		return b.String()
	}
	var report struct {
		Node, Role, State string
		Capabilities      map[string]struct{ OK bool }
	}
	if err := json.Unmarshal([]byte(get("/healthz")), &report); err != nil || report.Node != "hsmd-a" || report.Role != "hsmd" || report.State != "ok" || !report.Capabilities["sign"].OK {
		t.Errorf("%+v, %v", report, err)
	}
	get("/readyz")
	text := get("/metrics")
	for _, want := range []string{`trivet_hsm_calls_total{class="ok",op="sign"} 1`, `trivet_hsm_signatures_total{key="` + string(k.ID) + `",purpose="ca"} 5`, "trivet_hsm_keys 1", "trivet_hsm_locked 0", "trivet_hsm_epoch 0", "trivet_hsm_queue_depth 0", "trivet_hsm_foreign_objects 0", "trivet_hsm_capacity 16", `trivet_hsm_probe_ok 1`, `trivet_hsm_module_seconds_count{op="sign"} 5`, "trivet_hsm_in_flight 0"} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	info := m.WaitReady()
	if info.Keys != 1 || info.Capacity != 16 || info.Member != "hsmd-a" || !strings.Contains(info.Model, "SoftHSM") || info.TokenSerial == "" {
		t.Errorf("info %+v", info)
	}
}

func TestEightCallersSignAtOnce(t *testing.T) {
	m := hsmtest.NewLab(t).Start("hsmd-a")
	k := newKey(t, m)
	var wg sync.WaitGroup
	for range 8 {
		c := m.Client(identity.RoleCA)
		wg.Go(func() {
			for range 20 {
				hsmtest.SignAndVerify(t, c, k, 16)
			}
		})
	}
	wg.Wait()
}
