package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"time"

	"trivet/health"
	"trivet/hsm"
)

// test signs a fresh random value with the probe key through the path that real signatures take, except that it does
// not queue for a slot: full slots are load, not failure. The signature is verified here, in Go.
func (s *Server) test(ctx context.Context) {
	if s.dog.given("probe") != nil {
		return
	}
	digest := make([]byte, hsm.DigestSize)
	_, _ = rand.Read(digest) // documented never to fail
	key := s.cfg.Token.Probe()
	began := s.cfg.Now()
	sig, err := watch(ctx, s.dog, "probe", s.cfg.CallTimeout, func() {}, func() ([]byte, error) { return s.cfg.Token.Sign(key.ID, digest) })
	if ctx.Err() != nil {
		return // stopping, which says nothing about the token
	}
	if err == nil {
		err = verify(key.SPKI, digest, sig)
	}
	now := s.cfg.Now()
	p := hsm.Probe{OK: err == nil, At: now, Millis: float64(now.Sub(began)) / float64(time.Millisecond)}
	s.metrics.probe.Set(1)
	if err != nil {
		s.metrics.probe.Set(0)
		p.Cause = err.Error()
		s.cfg.Log.Error("test signature failed", "error", err)
	}
	s.probe.Store(&p)
}

func verify(spki, digest, sig []byte) error {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return fmt.Errorf("parsing the probe key: %w", err)
	}
	pub, ok := key.(*ecdsa.PublicKey)
	if !ok || !ecdsa.VerifyASN1(pub, digest, sig) {
		return fmt.Errorf("the token's signature over a random value does not verify")
	}
	return nil
}

// probed is the newest probe, not OK once it is stale.
func (s *Server) probed() hsm.Probe {
	if err := s.dog.given("probe"); err != nil {
		return hsm.Probe{At: s.cfg.Now(), Cause: err.Error()}
	}
	p := s.probe.Load()
	if p == nil {
		return hsm.Probe{Cause: "no test signature made yet"}
	}
	out := *p
	if age := s.cfg.Now().Sub(out.At); out.OK && age > stale {
		out.OK, out.Cause = false, fmt.Sprintf("the last test signature is %s old", age.Round(time.Millisecond))
	}
	return out
}

// Report is the health report: one capability, sign.
func (s *Server) Report() health.Report {
	now, p := s.cfg.Now(), s.probed()
	r := health.Report{
		Node: s.cfg.Member, Role: "hsmd", Incarnation: s.cfg.Incarnation, Version: s.cfg.Version, Time: now, State: health.OK,
		Capabilities: map[string]health.Capability{"sign": {OK: p.OK, Cause: p.Cause}},
		Checks:       []health.Check{{Name: "probe", OK: p.OK, Detail: p.Cause}},
	}
	if !p.At.IsZero() {
		r.Checks[0].AgeMS = now.Sub(p.At).Milliseconds()
	}
	if !p.OK {
		r.State = health.Degraded
	}
	if s.draining.Load() {
		r.State = health.Draining
	}
	return r
}
