package agent_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/health"
	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
	"trivet/problem"
)

func TestChallengeIsBoundToGroupMemberIncarnationAndKey(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	k, nonce := w.keys[hsm.PurposeCA], bytes.Repeat([]byte{7}, 32)
	sig, incarnation, err := s.client(identity.RoleSync).Challenge(soon(t), "demo", k.ID, nonce)
	if err != nil || incarnation != "incarnation-1" {
		t.Fatalf("%q, %v", incarnation, err)
	}
	pub := hsmtest.PublicKey(t, k.SPKI)
	if !ecdsa.VerifyASN1(pub, hsm.ChallengeDigest(k.Algorithm, "demo", "hsmd-a", incarnation, k.ID, nonce), sig) {
		t.Error("the proof does not verify")
	}
	for _, other := range [][]byte{
		hsm.ChallengeDigest(k.Algorithm, "dem", "ohsmd-a", incarnation, k.ID, nonce), hsm.ChallengeDigest(k.Algorithm, "demo", "hsmd-b", incarnation, k.ID, nonce),
		hsm.ChallengeDigest(k.Algorithm, "demo", "hsmd-a", "incarnation-2", k.ID, nonce), hsm.ChallengeDigest(k.Algorithm, "demo", "hsmd-a", incarnation, k.ID, nonce[1:]),
	} {
		if ecdsa.VerifyASN1(pub, other, sig) {
			t.Error("the proof verifies for something else")
		}
	}
	for _, n := range []int{0, hsm.MinNonce - 1, hsm.MaxNonce + 1} {
		_, _, err := s.client(identity.RoleSync).Challenge(soon(t), "demo", k.ID, make([]byte, n))
		hsmtest.WantClass(t, err, hsm.ClassRequest)
	}
	if !slices.Contains(s.acts.events(), "challenge begun") {
		t.Error("the challenge is not in the audit record")
	}
}

func TestAHungModuleAnswersEverybodyAndEndsTheProcess(t *testing.T) {
	w := open(t)
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	var inside atomic.Int64
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if key == w.token.Probe().ID {
			return w.token.Sign(key, d)
		}
		inside.Add(1)
		<-hang
		return nil, errors.New("too late")
	}}
	s := serve(t, token, func(c *agent.Config) { c.Capacity, c.CallTimeout = 2, 300*time.Millisecond })
	eventually(t, "probe", func() bool { return s.Info().Probe.OK })
	errs := make(chan error, 6)
	for range 6 { // two in the module, four waiting for it
		c := s.client(identity.RoleCA)
		go func() {
			_, err := c.Sign(soon(t), request(w.keys[hsm.PurposeCA].ID, hsmtest.Digests(1)))
			errs <- err
		}()
	}
	for range 6 {
		hsmtest.WantClass(t, <-errs, hsm.ClassDevice)
	}
	if err := <-s.fatal; !strings.Contains(err.Error(), "cannot be cancelled") {
		t.Error(err)
	}
	if inside.Load() != 2 {
		t.Errorf("%d calls in the module, capacity 2", inside.Load())
	}
	if r := s.Report(); r.State != health.Degraded || r.Capabilities["sign"].OK {
		t.Errorf("report %+v", r)
	}
	_, err := s.client(identity.RoleCA).Sign(soon(t), request(w.keys[hsm.PurposeCA].ID, hsmtest.Digests(1)))
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	if len(s.fatal) > 0 {
		t.Error("fatal was called twice")
	}
}

func TestALostSessionOrDeviceEndsTheProcess(t *testing.T) {
	w := open(t)
	for _, class := range []hsm.Class{hsm.ClassSession, hsm.ClassDevice} {
		var broken atomic.Bool
		token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
			if broken.Load() {
				return nil, &hsm.Error{Class: class, Code: "CKR_TEST", Op: "sign", Err: errors.New("gone")}
			}
			return w.token.Sign(key, d)
		}}
		s := serve(t, token, nil)
		broken.Store(true)
		_, err := s.client(identity.RoleCA).Sign(soon(t), request(w.keys[hsm.PurposeCA].ID, hsmtest.Digests(3)))
		hsmtest.WantClass(t, err, hsm.ClassSession, hsm.ClassDevice)
		<-s.fatal
	}
}

func TestAFullQueueTurnsCallersAway(t *testing.T) {
	w := open(t)
	gate, inside := make(chan struct{}), make(chan struct{}, 10)
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if key != w.token.Probe().ID {
			inside <- struct{}{}
			<-gate
		}
		return w.token.Sign(key, d)
	}}
	s := serve(t, token, func(c *agent.Config) { c.Capacity, c.Queue = 1, 1 })
	c, k := s.client(identity.RoleCA), w.keys[hsm.PurposeCA]
	errs := make(chan error, 2)
	for range 2 {
		go func() { _, err := c.Sign(soon(t), request(k.ID, hsmtest.Digests(1))); errs <- err }()
	}
	<-inside
	eventually(t, "both are in", func() bool { return s.Info().InFlight == 2 })
	_, err := c.Sign(soon(t), request(k.ID, hsmtest.Digests(1)))
	hsmtest.WantClass(t, err, hsm.ClassOverloaded)
	close(gate)
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if len(s.fatal) > 0 {
		t.Error("load ended the process")
	}
}

func TestCallersThatGiveUpLeaveTheQueue(t *testing.T) {
	w := open(t)
	gate, inside := make(chan struct{}), make(chan struct{}, 10)
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if key != w.token.Probe().ID {
			inside <- struct{}{}
			<-gate
		}
		return w.token.Sign(key, d)
	}}
	s := serve(t, token, func(c *agent.Config) { c.Capacity = 1 })
	c, k := s.client(identity.RoleCA), w.keys[hsm.PurposeCA]
	first := make(chan error, 1)
	go func() { _, err := c.Sign(soon(t), request(k.ID, hsmtest.Digests(1))); first <- err }()
	<-inside
	ctx, cancel := context.WithCancel(soon(t))
	second := make(chan error, 1)
	go func() { _, err := c.Sign(ctx, request(k.ID, hsmtest.Digests(1))); second <- err }()
	eventually(t, "both are in", func() bool { return s.Info().InFlight == 2 })
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) || hsm.ClassOf(err) != hsm.ClassDevice {
		t.Error(err)
	}
	eventually(t, "the second has left", func() bool { return s.Info().InFlight == 1 })
	close(gate)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if len(inside) > 0 {
		t.Error("the abandoned request was signed")
	}
}

// Signatures under way are made to their end and counted, no further ones are begun, and nothing is held against the token.
func TestACallerThatGivesUpWithinABatchEndsNothing(t *testing.T) {
	w := open(t)
	gate, inside := make(chan struct{}), make(chan struct{}, 64)
	var made atomic.Int64
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if key != w.token.Probe().ID {
			inside <- struct{}{}
			<-gate
			made.Add(1)
		}
		return w.token.Sign(key, d)
	}}
	registry := prometheus.NewRegistry()
	s := serve(t, token, func(c *agent.Config) { c.Metrics = registry })
	counted := func() (n float64) {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "trivet_hsm_signatures_total" {
					n += m.GetCounter().GetValue()
				}
			}
		}
		return n
	}
	c, k := s.client(identity.RoleCA), w.keys[hsm.PurposeCA]
	ctx, cancel := context.WithCancel(soon(t))
	answer := make(chan error, 1)
	go func() { _, err := c.Sign(ctx, request(k.ID, hsmtest.Digests(32))); answer <- err }()
	for range 4 { // of one batch at once
		<-inside
	}
	cancel()
	hsmtest.WantClass(t, <-answer, hsm.ClassDevice)
	eventually(t, "the request has left", func() bool { return s.Info().InFlight == 0 })
	close(gate)
	eventually(t, "the four are made and counted", func() bool { return made.Load() == 4 && counted() == 4 })
	if _, err := c.Sign(soon(t), request(k.ID, hsmtest.Digests(8))); err != nil {
		t.Error(err)
	}
	if n := made.Load(); n != 4+8 || counted() != 4+8 || len(s.fatal) > 0 {
		t.Errorf("%d signatures were made and %v counted, want 12; fatal: %d", n, counted(), len(s.fatal))
	}
}

func TestALyingTokenLosesItsCapability(t *testing.T) {
	w := open(t)
	var lie atomic.Bool
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if lie.Load() {
			d = bytes.Repeat([]byte{1}, 32)
		}
		return w.token.Sign(key, d)
	}}
	s := serve(t, token, nil)
	eventually(t, "well", func() bool { return s.Report().Capabilities["sign"].OK })
	lie.Store(true)
	eventually(t, "unwell", func() bool { return !s.Report().Capabilities["sign"].OK })
	if cause := s.Report().Capabilities["sign"].Cause; !strings.Contains(cause, "does not verify") {
		t.Errorf("cause %q", cause)
	}
	lie.Store(false)
	eventually(t, "well again", func() bool { return s.Report().Capabilities["sign"].OK })
}

func TestAnOldProbeSaysNothing(t *testing.T) {
	w := open(t)
	var ahead atomic.Int64
	s := serve(t, w.token, func(c *agent.Config) {
		c.ProbeEvery, c.Now = time.Hour, func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	eventually(t, "well", func() bool { return s.Report().State == health.OK })
	ahead.Store(int64(4 * time.Second))
	if r := s.Report(); r.State != health.Degraded || !strings.Contains(r.Capabilities["sign"].Cause, "old") {
		t.Errorf("%+v", r)
	}
	s.Drain()
	if r := s.Report(); r.State != health.Draining {
		t.Errorf("%+v", r)
	}
}

func TestNoAuditRecordNoAct(t *testing.T) {
	w := open(t)
	var made atomic.Bool
	token := &faulty{Token: w.token, generate: func(hsm.KeySpec) (hsm.KeyRecord, error) {
		made.Store(true)
		return hsm.KeyRecord{}, nil
	}}
	s := serve(t, token, nil)
	s.acts.mu.Lock()
	s.acts.fail = errors.New("disk full")
	s.acts.mu.Unlock()
	_, err := s.client(identity.RoleSync).Generate(soon(t), hsmtest.Spec("x", hsm.PurposeCA))
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	if made.Load() {
		t.Error("the key was made without a record")
	}
	<-s.fatal
}

func TestSignaturesAreCountedInTheAuditRecord(t *testing.T) {
	w := open(t)
	s := &served{acts: &acts{}}
	state, err := agent.CreateState(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	server, err := agent.NewServer(agent.Config{Token: &faulty{Token: w.token}, Identity: w.id(t, identity.RoleHSMD), State: state, Incarnation: "i",
		Audit: s.acts.record, Fatal: func(error) {}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.91.0.1:0", w.id(t, identity.RoleHSMD).ServerTLS())
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: server.Handler()}
	go func() { _ = web.Serve(l) }()
	defer web.Close()
	c := agent.NewClient("hsmd-a", l.Addr().String(), w.id(t, identity.RoleOCSP))
	defer c.Close()
	k := w.keys[hsm.PurposeOCSP]
	for range 2 {
		if _, err := c.Sign(soon(t), request(k.ID, hsmtest.Digests(5))); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := server.Run(ctx); err != nil { // an ended Run writes what is still to be written
		t.Fatal(err)
	}
	want := agent.Act{Actor: "trivet://lab/ocsp/ocsp-a", Event: "signatures", Object: string(k.ID), Outcome: "ok", Detail: "count=10"}
	if !slices.Contains(s.acts.list, want) {
		t.Errorf("want %+v in %+v", want, s.acts.list)
	}
}

func TestBodiesOutOfBoundsAreRefused(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: w.id(t, identity.RoleCA).ClientTLS(identity.RoleHSMD)}}
	defer web.CloseIdleConnections()
	id := string(w.keys[hsm.PurposeCA].ID)
	for _, c := range []struct {
		method, path, body string
		status             int
		name               string
	}{
		{"POST", "/v1/sign", ``, 400, "malformed-request"},
		{"POST", "/v1/sign", `[]`, 400, "malformed-request"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digests":["!"]}`, 400, "malformed-request"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digest":[]}`, 400, "malformed-request"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digests":[]} {}`, 400, "malformed-request"},
		{"POST", "/v1/sign", `{"key":"` + strings.Repeat("a", 1<<20), 413, "too-large"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digests":[]}`, 422, "request-refused"},
		{"POST", "/v1/sign", `{"key":"` + id + `","digests":["AAAA"]}`, 422, "request-refused"},
		{"POST", "/v1/sign", `{"key":"00","digests":["` + strings.Repeat("A", 43) + `="]}`, 404, "not-found"},
		{"POST", "/v1/challenge", `{"group":"` + strings.Repeat("a", 3<<10), 413, "too-large"},
		{"POST", "/v1/export", `{"key":"` + id + `"}`, 403, "forbidden"},
		{"GET", "/v1/nothing", ``, 404, "not-found"},
		{"GET", "/v1/sign", ``, 404, "not-found"},
	} {
		req, err := http.NewRequestWithContext(soon(t), c.method, "https://"+s.addr+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := web.Do(req)
		if err != nil {
			t.Fatalf("%.60s: %v", c.body, err)
		}
		var p problem.Problem
		err = json.NewDecoder(resp.Body).Decode(&p)
		_ = resp.Body.Close()
		if resp.StatusCode != c.status || err != nil || p.Name() != c.name {
			t.Errorf("%s %s %.60s: %d %+v %v, want %d %s", c.method, c.path, c.body, resp.StatusCode, p, err, c.status, c.name)
		}
	}
}

func TestHealthEndpointsAreForKnownRolesOnly(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	eventually(t, "well", func() bool { return s.Report().State == health.OK })
	for _, role := range []identity.Role{identity.RoleLB, identity.RoleSRE, identity.RoleRequester} {
		web := &http.Client{Transport: &http.Transport{TLSClientConfig: w.id(t, role).ClientTLS(identity.RoleHSMD)}}
		for _, path := range []string{"/livez", "/readyz", "/healthz"} {
			resp, err := web.Get("https://" + s.addr + path)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("%s as %s: %s", path, role, resp.Status)
			}
		}
		web.CloseIdleConnections()
	}
	bare := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer bare.CloseIdleConnections()
	if resp, err := bare.Get("https://" + s.addr + "/healthz"); err == nil {
		_ = resp.Body.Close()
		t.Errorf("without a certificate: %s", resp.Status)
	}
}

func TestTheClientWantsADeadlineAndTheRightMember(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	_, err := s.client(identity.RoleCA).Health(context.Background())
	hsmtest.WantClass(t, err, hsm.ClassRequest)
	other := agent.NewClient("hsmd-b", s.addr, w.id(t, identity.RoleCA))
	defer other.Close()
	_, err = other.Health(soon(t))
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	if err == nil || !strings.Contains(err.Error(), "want the hsmd called hsmd-b") {
		t.Error(err)
	}
	l, err := net.Listen("tcp", "127.91.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	gone := agent.NewClient("hsmd-a", l.Addr().String(), w.id(t, identity.RoleCA))
	_, err = gone.Health(soon(t))
	hsmtest.WantClass(t, err, hsm.ClassDevice)
}

func TestErrorsKeepClassAndCodeOverTheWire(t *testing.T) {
	w := open(t)
	for _, class := range []hsm.Class{hsm.ClassRequest, hsm.ClassNotFound, hsm.ClassSession, hsm.ClassDevice, hsm.ClassPIN} {
		token := &faulty{Token: w.token, generate: func(hsm.KeySpec) (hsm.KeyRecord, error) {
			return hsm.KeyRecord{}, &hsm.Error{Class: class, Code: "CKR_TEST", Op: "generate", Err: fmt.Errorf("because")}
		}}
		s := serve(t, token, nil)
		_, err := s.client(identity.RoleSync).Generate(soon(t), hsmtest.Spec("x", hsm.PurposeCA))
		e, ok := errors.AsType[*hsm.Error](err)
		if !ok || e.Class != class || e.Code != "CKR_TEST" || !strings.Contains(e.Error(), "because") {
			t.Errorf("%s became %v", class, err)
		}
	}
}

func FuzzRequestBody(f *testing.F) {
	f.Add([]byte(`{"key":"00112233445566778899aabbccddeeff","digests":["AAAA"]}`))
	f.Add([]byte(`{"key":1}{`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var r hsm.SignRequest
		if err := agent.Decode(bytes.NewReader(body), &r); err == nil {
			_, _ = r.Key.Bytes()
		}
	})
}

func FuzzTransportKey(f *testing.F) {
	w := open(f)
	id := w.id(f, identity.RoleHSMD)
	good, err := agent.Attest(id, []byte("spki"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"chain":["AA=="]}`))
	f.Fuzz(func(t *testing.T, transport []byte) {
		if spki, _, err := agent.Attested(id, transport, time.Now()); err == nil && string(spki) != "spki" {
			t.Errorf("forged: %q", transport)
		}
	})
}
