package hsmsync

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"trivet/hsm"
)

const (
	challengeTimeout = time.Second
	// A key that could not be proved is tried again after proveAgain.
	proveAgain = time.Second
	// provers challenges are under way at one member at a time.
	provers = 4
	// proofsAtOnce keys are proved before the member's health is looked at again.
	proofsAtOnce = 64
)

// proof is a member's signature over a fresh challenge, or what came instead.
type proof struct {
	at  time.Time // of the proof; zero when there is none
	err string    // why there is none
}

// anyProvable is some live key that this process's role may have proved, or nil. The caller holds mu.
func (g *Group) anyProvable() *Key {
	for _, k := range g.keys {
		if hsm.MayChallenge(g.role, k.record.Purpose) {
			return k
		}
	}
	return nil
}

// due lists keys that m must prove now: those it has not proved in its present incarnation and, when it is suspect, one
// more that it has, because a module that hangs goes on answering health questions. More tells that there are others.
func (g *Group) due(m *member) (keys []*Key, incarnation string, more bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if m.blocked() || m.misses > 0 || m.info.Incarnation == "" || m.health == healthUnknown || m.health == healthFailed {
		return nil, "", false
	}
	now := time.Now()
	for id, notBefore := range m.todo {
		if now.Before(notBefore) {
			continue
		}
		if len(keys) == proofsAtOnce {
			return keys, m.info.Incarnation, true
		}
		keys = append(keys, g.keys[id])
	}
	if m.health == healthSuspect && len(keys) == 0 {
		if k := g.anyProvable(); k != nil {
			keys = append(keys, k)
		}
	}
	return keys, m.info.Incarnation, false
}

// prove has m sign fresh challenges whenever there is something to prove, until ctx ends.
func (g *Group) prove(ctx context.Context, m *member) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.demand:
		}
		for more := true; more && ctx.Err() == nil; {
			var keys []*Key
			var incarnation string
			keys, incarnation, more = g.due(m)
			next := make(chan *Key)
			off := make(chan struct{})
			var once sync.Once
			var working sync.WaitGroup
			for range min(provers, len(keys)) {
				working.Go(func() {
					for k := range next {
						if !g.challenge(ctx, m, k, incarnation) {
							once.Do(func() { close(off) })
							return
						}
					}
				})
			}
			for _, k := range keys {
				select {
				case next <- k:
					continue
				case <-off:
					more = false
				}
				break
			}
			close(next)
			working.Wait()
		}
	}
}

// challenge has m prove one key and takes in the result. It tells whether it makes sense to go on with the next key.
func (g *Group) challenge(ctx context.Context, m *member, k *Key, incarnation string) bool {
	began := time.Now()
	cctx, cancel := context.WithTimeout(ctx, challengeTimeout)
	answered, err := askProof(cctx, g.cfg.Group, m.Name, m.agent, k.record, k.public)
	cancel()
	g.mu.Lock()
	defer g.mu.Unlock()
	if ctx.Err() != nil || m.blocked() {
		return false
	}
	if answered != "" && answered != incarnation || m.info.Incarnation != incarnation {
		// It was restarted meanwhile: this proves nothing about the one that serves now.
		nudge(m.wakeup)
		return false
	}
	id := k.record.ID
	_, wanted := m.todo[id]
	switch {
	case errors.Is(err, errBadProof):
		g.quarantined(m, fmt.Sprintf("its proof of key %s (%s) does not verify with the manifest's public key", id, k.record.Label))
		g.dispatch()
		return false
	case err != nil:
		g.metrics.probes.WithLabelValues(m.Name, "challenge").Inc()
		if p := m.proofs[id]; p.err != err.Error() { // not the same every second
			g.log.Warn("member could not prove a key", "member", m.Name, "key", id, "label", k.record.Label, "error", err)
		}
		if wanted || hsm.ClassOf(err) == hsm.ClassNotFound {
			m.proofs[id] = proof{err: err.Error()}
			m.todo[id] = began.Add(proveAgain)
		}
		worth := g.judge(m, incarnation, err)
		if !worth {
			if m.refusals++; m.refusals >= missesToFail && m.health == healthSuspect {
				g.fail(m, err.Error())
			}
		}
		g.dispatch()
		return worth
	}
	m.refusals = 0
	if g.keys[id] == k {
		delete(m.todo, id)
		m.proofs[id] = proof{at: g.cfg.Now()}
	}
	if m.health == healthSuspect && began.After(m.suspected) {
		g.trust(m)
	}
	g.restore(m)
	g.dispatch()
	return true
}

// errBadProof is a proof whose signature is wrong.
var errBadProof = errors.New("proof does not verify with the manifest's public key")

// askProof has the member called name sign a fresh challenge for a key and verifies it. The incarnation is the one that
// signed; the error is errBadProof when the signature is wrong.
func askProof(ctx context.Context, group, name string, a Agent, key hsm.KeyRecord, public crypto.PublicKey) (incarnation string, err error) {
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce) // documented never to fail
	sig, incarnation, err := a.Challenge(ctx, group, key.ID, nonce)
	if err != nil {
		return "", fmt.Errorf("challenging %s for key %s: %w", name, key.ID, err)
	}
	if hsm.Verify(public, hsm.ChallengeDigest(key.Algorithm, group, name, incarnation, key.ID, nonce), sig) != nil {
		return incarnation, errBadProof
	}
	return incarnation, nil
}
