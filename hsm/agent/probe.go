package agent

import (
	"context"
	"crypto/rand"
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
	token, err := s.token("probe")
	if err != nil {
		return
	}
	digest := make([]byte, hsm.DigestSize)
	_, _ = rand.Read(digest) // documented never to fail
	key := token.Probe()
	began := s.cfg.Now()
	sig, err := watch(ctx, s.dog, "probe", s.cfg.CallTimeout, func() {}, func() ([]byte, error) { return token.Sign(key.ID, digest) })
	if ctx.Err() != nil {
		return // stopping, which says nothing about the token
	}
	if err == nil {
		err = verify(key, digest, sig)
	}
	now := s.cfg.Now()
	p := hsm.Probe{OK: err == nil, At: now, Millis: float64(now.Sub(began)) / float64(time.Millisecond)}
	if err != nil {
		p.Cause = err.Error()
		s.cfg.Log.Error("test signature failed", "error", err)
	}
	s.probe.Store(&p)
}

func verify(k hsm.KeyRecord, digest, sig []byte) error {
	pub, err := k.Algorithm.ParsePublic(k.SPKI)
	if err != nil {
		return fmt.Errorf("reading the probe key: %w", err)
	}
	if err := hsm.Verify(pub, digest, sig); err != nil {
		return fmt.Errorf("the token's signature over a random value does not verify: %w", err)
	}
	return nil
}

// probed is the newest probe, not OK once it is stale.
func (s *Server) probed() hsm.Probe {
	if err := s.dog.given("probe"); err != nil {
		return hsm.Probe{At: s.cfg.Now(), Cause: err.Error()}
	}
	if why := s.locked(); why != "" {
		return hsm.Probe{Cause: why}
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
