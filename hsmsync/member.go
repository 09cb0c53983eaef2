package hsmsync

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"trivet/hsm"
)

// health is what the group thinks of a member's ability to answer.
type health uint8

const (
	healthUnknown health = iota // not heard of yet
	healthGood
	healthSuspect // failed once: no new work while any other is left, until it has answered and signed again
	healthFailed  // missed several health answers: no work at all
)

// proof is a member's signature over a fresh challenge, or what came instead.
type proof struct {
	at  time.Time // of the proof; zero when there is none
	try time.Time // not before this is it asked for again
	err string    // why there is none
}

// member is one HSM as the group sees it. Group.mu guards the changing fields.
type member struct {
	Member
	agent Agent

	health     health
	cause      string // why not good
	quarantine string // why an operator must look at it; empty: not quarantined
	misses     int    // health answers missed in a row
	suspected  time.Time
	info       hsm.Info
	proofs     map[hsm.KeyID]proof // of the present incarnation
	inflight   int                 // digests handed to it and not yet answered

	wakeup chan struct{} // asks for a health check at once
	demand chan struct{} // asks for proofs at once
}

func newMember(m Member, a Agent) *member {
	return &member{
		Member: m, agent: a, proofs: map[hsm.KeyID]proof{},
		wakeup: make(chan struct{}, 1), demand: make(chan struct{}, 1),
	}
}

func (m *member) wake()         { nudge(m.wakeup) }
func (m *member) demandProofs() { nudge(m.demand) }

func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // already asked for
	}
}

func (m *member) proved(id hsm.KeyID) bool { return !m.proofs[id].at.IsZero() }

// suspect stops new work for a member that failed at something. The caller holds mu.
func (g *Group) suspect(m *member, cause string) {
	m.suspected = time.Now()
	m.cause = cause
	if m.health == healthGood || m.health == healthUnknown {
		m.health = healthSuspect
		g.log.Warn("member is suspect", "member", m.Name, "cause", cause)
	}
}

// quarantined takes a member out until an operator lifts it (Recover). The caller holds mu.
func (g *Group) quarantined(m *member, why string) {
	if m.quarantine != "" {
		return
	}
	m.quarantine = why
	clear(m.proofs)
	g.metrics.quarantines.WithLabelValues(m.Name).Inc()
	g.log.Error("member is quarantined: it gets no work until it was examined and recovered by hand", "member", m.Name, "why", why)
}

// watch asks m for its health until ctx ends.
func (g *Group) watch(ctx context.Context, m *member) {
	for {
		began := time.Now()
		hctx, cancel := context.WithTimeout(ctx, healthTimeout)
		info, err := m.agent.Health(hctx)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if !sleep(ctx, g.heard(m, began, info, err)-time.Since(began), m.wakeup) {
			return
		}
	}
}

// heard takes in one health answer to a question asked at began and says how long after that to ask again.
func (g *Group) heard(m *member, began time.Time, info hsm.Info, err error) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case err != nil:
	case info.Member != m.Name:
		err = fmt.Errorf("%s answers as member %q", m.Address, info.Member)
	case !info.Probe.OK:
		err = fmt.Errorf("its own test signature failed: %s", info.Probe.Cause)
	}
	if err != nil {
		m.misses++
		g.suspect(m, err.Error())
		if m.misses >= missesToFail && m.health != healthFailed {
			m.health = healthFailed
			g.log.Error("member failed", "member", m.Name, "cause", m.cause)
		}
		return healthBusy
	}
	m.misses = 0
	if info.Incarnation != m.info.Incarnation {
		g.log.Info("member has a new incarnation; its keys are proved before it gets work",
			"member", m.Name, "incarnation", info.Incarnation, "was", m.info.Incarnation)
		clear(m.proofs)
		// Whatever the old incarnation was suspected of, the new one shows by its proofs.
		m.health, m.cause = healthGood, ""
	}
	m.info = info
	switch m.health {
	case healthUnknown:
		m.health, m.cause = healthGood, ""
	case healthFailed:
		m.health, m.suspected = healthSuspect, began
	}
	if m.health == healthSuspect && began.After(m.suspected) && len(g.provable()) == 0 {
		g.trust(m)
	}
	m.demandProofs()
	if m.inflight > 0 || m.health != healthGood {
		return healthBusy
	}
	return healthIdle
}

// trust ends a suspicion. The caller holds mu.
func (g *Group) trust(m *member) {
	m.health, m.cause = healthGood, ""
	g.log.Info("member is good again", "member", m.Name)
}

// provable lists the live keys that this process's role may have proved. The caller holds mu.
func (g *Group) provable() (keys []*Key) {
	for _, k := range g.keys {
		if hsm.MayChallenge(g.role, k.record.Purpose) {
			keys = append(keys, k)
		}
	}
	return keys
}

// due lists the keys that m must prove now: those it has not proved in its present incarnation and, when it is
// suspect, one more that it has, because a module that hangs goes on answering health questions.
func (g *Group) due(m *member) (keys []*Key, incarnation string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if m.quarantine != "" || m.misses > 0 || m.health == healthUnknown || m.health == healthFailed {
		return nil, ""
	}
	now, suspect := time.Now(), m.health == healthSuspect
	for _, k := range g.provable() {
		if p := m.proofs[k.record.ID]; (p.at.IsZero() && now.After(p.try)) || (suspect && len(keys) == 0) {
			keys = append(keys, k)
		}
	}
	return keys, m.info.Incarnation
}

// prove has m sign fresh challenges whenever there is something to prove, until ctx ends.
func (g *Group) prove(ctx context.Context, m *member) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.demand:
		}
		keys, incarnation := g.due(m)
		for _, k := range keys {
			if !g.challenge(ctx, m, k, incarnation) {
				break
			}
		}
	}
}

// challenge has m prove one key and takes in the result. It tells whether it makes sense to go on with the next key.
func (g *Group) challenge(ctx context.Context, m *member, k *Key, incarnation string) bool {
	began := time.Now()
	cctx, cancel := context.WithTimeout(ctx, challengeTimeout)
	answered, err := askProof(cctx, g.cfg.Group, m, k.record, k.public)
	cancel()
	if ctx.Err() != nil {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	id := k.record.ID
	switch {
	case m.quarantine != "":
		return false
	case answered != "" && answered != incarnation, m.info.Incarnation != incarnation:
		// It was restarted meanwhile: this proves nothing about the one that serves now.
		m.wake()
		return false
	case errors.Is(err, errBadProof):
		g.quarantined(m, fmt.Sprintf("its proof of key %s (%s) does not verify with the manifest's public key", id, k.record.Label))
		return false
	case err != nil:
		p := m.proofs[id]
		if p.err != err.Error() { // not the same every second
			g.log.Warn("member could not prove a key", "member", m.Name, "key", id, "label", k.record.Label, "error", err)
		}
		if p.at.IsZero() || hsm.ClassOf(err) == hsm.ClassNotFound {
			m.proofs[id] = proof{try: began.Add(proveAgain), err: err.Error()}
		}
		return g.judge(m, err)
	}
	m.proofs[id] = proof{at: g.cfg.Now()}
	if m.health == healthSuspect && began.After(m.suspected) {
		g.trust(m)
	}
	return true
}

// judge draws the conclusion about m from an error of its agent, and tells whether m is still worth asking. The caller
// holds mu.
func (g *Group) judge(m *member, err error) bool {
	switch hsm.ClassOf(err) {
	case hsm.ClassRequest, hsm.ClassDenied, hsm.ClassNotFound, hsm.ClassOverloaded:
		return true // it lives; it just will not, or not now
	case hsm.ClassPIN:
		g.quarantined(m, "its token refuses the PIN: "+err.Error())
	default:
		g.suspect(m, err.Error())
		m.wake()
	}
	return false
}

// errBadProof is a proof whose signature is wrong.
var errBadProof = errors.New("proof does not verify with the manifest's public key")

// askProof has m sign a fresh challenge for a key and verifies it. The incarnation is the one that signed; the error is
// errBadProof when the signature is wrong.
func askProof(ctx context.Context, group string, m *member, key hsm.KeyRecord, public *ecdsa.PublicKey) (incarnation string, err error) {
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce) // documented never to fail
	sig, incarnation, err := m.agent.Challenge(ctx, group, key.ID, nonce)
	if err != nil {
		return "", fmt.Errorf("challenging %s for key %s: %w", m.Name, key.ID, err)
	}
	if !ecdsa.VerifyASN1(public, hsm.ChallengeDigest(group, m.Name, incarnation, key.ID, nonce), sig) {
		return incarnation, errBadProof
	}
	return incarnation, nil
}
