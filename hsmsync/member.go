package hsmsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
)

const (
	// A member is asked for its health this often, sooner while it has work or is not well, and must answer in healthTimeout.
	healthIdle, healthBusy, healthTimeout = 500 * time.Millisecond, 250 * time.Millisecond, 250 * time.Millisecond
	// missesToFail health answers or challenges missed in a row turn a suspect member into a failed one.
	missesToFail = 3
	// recoverEvery is how often a failed member is asked by default.
	recoverEvery = time.Second
	// goodToRecover good answers in a row, and a proof of every key, end a recovery.
	goodToRecover = 3
	// givenUp members are not asked at all.
	givenUp = 24 * time.Hour
	// usualCapacity is assumed of a member that has not told its own.
	usualCapacity = 16
)

// health is what the group thinks of a member's ability to answer.
type health uint8

const (
	healthUnknown health = iota // not heard of yet
	healthGood
	healthSuspect    // failed once: no new work while any other is left, until it has answered and signed again
	healthFailed     // failed several times: no work at all
	healthRecovering // answers again: work only when no other is left, until it has proved every key and answered well for a while
)

// member is one HSM as the group sees it. Group.mu guards all but name, address and agent.
type member struct {
	Member
	agent Agent
	stop  context.CancelFunc // ends its goroutines; nil while there are none

	// As the log has it; joined is 0 for a member from the configuration.
	assigned          MemberState
	site              string
	serial, transport string
	joined, recovered uint64
	rank              int // of its site, see Policy.Prefer

	health     health
	cause      string // why not good
	quarantine string // why an operator must look at it; empty: not quarantined
	givenUp    bool   // no more attempts at recovery
	blockedAt  uint64 // how much of the log was known when it was quarantined or given up: a later recover entry lifts that
	misses     int    // health answers missed in a row
	refusals   int    // challenges missed in a row
	attempts   int    // at recovery, in vain since it failed
	well       int    // good answers since it recovers
	suspected  time.Time
	retry      time.Time // when a recovery is attempted next
	info       hsm.Info
	proofs     map[hsm.KeyID]proof     // of the present incarnation
	todo       map[hsm.KeyID]time.Time // keys to be proved, not before
	inflight   int                     // digests handed to it and not yet answered
	requests   int                     // in which they were handed to it
	answered   time.Time               // when it last signed something
	turn       int                     // when it was last given work: the group's turn
	overdue    int                     // attempts that take so long that another member was asked
	pace       pace

	wakeup chan struct{} // asks for a health check at once
	demand chan struct{} // asks for proofs at once

	signSeconds prometheus.Observer
}

func (g *Group) newMember(l GroupMember) *member {
	m := &member{
		Member: Member{Name: l.Name, Address: l.Address}, assigned: l.State, site: l.Site, serial: l.TokenSerial, transport: l.Transport,
		joined: l.Joined, recovered: l.Recovered, proofs: map[hsm.KeyID]proof{}, todo: map[hsm.KeyID]time.Time{},
		wakeup: make(chan struct{}, 1), demand: make(chan struct{}, 1), signSeconds: g.metrics.sign.WithLabelValues(l.Name),
	}
	m.agent = g.cfg.Connect(m.Member)
	g.forget(m)
	return m
}

// serves tells whether the log gives the member work. The caller holds Group.mu.
func (m *member) serves() bool { return m.assigned == MemberActive || m.assigned == MemberStandby }

func (m *member) proved(id hsm.KeyID) bool { return !m.proofs[id].at.IsZero() }

// blocked tells whether an operator must act before the member gets work again.
func (m *member) blocked() bool { return m.quarantine != "" || m.givenUp }

func (m *member) capacity() int { return cmp.Or(max(m.info.Capacity, 0), usualCapacity) }

// end ends the member's goroutines. The caller holds Group.mu.
func (m *member) end() {
	if m.stop != nil {
		m.stop()
		m.stop = nil
	}
}

// reset forgets all that was observed of a member, except what it is quarantined for. The caller holds mu.
func (g *Group) reset(m *member) {
	m.health, m.cause, m.misses, m.refusals, m.givenUp = healthUnknown, "", 0, 0, false
	m.info = hsm.Info{}
	g.forget(m)
}

// forget has the member prove every key anew. The caller holds mu.
func (g *Group) forget(m *member) {
	clear(m.proofs)
	clear(m.todo)
	for id, k := range g.keys {
		if hsm.MayChallenge(g.role, k.record.Purpose) {
			m.todo[id] = time.Time{}
		}
	}
}

func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // already asked for
	}
}

// attend watches a member and has it prove its keys until ctx ends.
func (g *Group) attend(ctx context.Context, m *member) {
	var proving sync.WaitGroup
	proving.Go(func() { g.prove(ctx, m) })
	g.watch(ctx, m)
	proving.Wait()
	if c, ok := m.agent.(interface{ Close() }); ok {
		c.Close()
	}
}

// watch asks m for its health until ctx ends.
func (g *Group) watch(ctx context.Context, m *member) {
	for {
		began := time.Now()
		hctx, cancel := context.WithTimeout(ctx, healthTimeout)
		info, err := m.agent.Health(hctx)
		cancel()
		g.mu.Lock()
		if ctx.Err() != nil {
			g.mu.Unlock()
			return
		}
		next := g.heard(m, began, info, err)
		g.dispatch()
		g.mu.Unlock()
		nudge(m.demand)
		if !sleep(ctx, next-time.Since(began), m.wakeup) {
			return
		}
	}
}

// heard takes in one health answer to a question asked at began and says how long after that to ask again. The caller
// holds mu.
func (g *Group) heard(m *member, began time.Time, info hsm.Info, err error) time.Duration {
	if m.givenUp {
		return givenUp
	}
	switch {
	case err == nil:
		err = g.unfit(m, info)
	case m.answered.After(began) && m.health == healthGood:
		return healthBusy // it has just signed, which says more: it is this process or the network that has no time
	default:
		g.metrics.probes.WithLabelValues(m.Name, "health").Inc()
	}
	if err != nil {
		m.misses++
		m.well = 0
		return g.missed(m, err.Error())
	}
	m.misses = 0
	m.pace.learnTrip(time.Since(began))
	was := m.info.Incarnation
	m.info = info
	switch {
	case was != info.Incarnation && m.health != healthUnknown:
		g.log.Info("member has a new incarnation; it proves its keys before it gets work", "member", m.Name, "incarnation", info.Incarnation, "was", was)
		g.recovering(m)
	case m.health == healthUnknown:
		m.health, m.cause = healthGood, ""
	case m.health == healthFailed:
		if d := time.Until(m.retry); d > 0 {
			return d
		}
		g.recovering(m)
	}
	switch m.health {
	case healthRecovering:
		m.well++
		g.restore(m)
	case healthSuspect:
		if began.After(m.suspected) && g.anyProvable() == nil {
			g.trust(m)
		}
	}
	if m.inflight > 0 || m.health != healthGood {
		return healthBusy
	}
	return healthIdle
}

// unfit says why a member that answers is not well, or nil.
func (g *Group) unfit(m *member, info hsm.Info) error {
	switch {
	case info.Member != m.Name:
		return fmt.Errorf("%s answers as member %q", m.Address, info.Member)
	case info.Locked != "":
		return fmt.Errorf("its token is locked: %s", info.Locked)
	case m.transport != "" && info.Transport != "" && info.Transport != m.transport, m.serial != "" && info.TokenSerial != m.serial:
		return fmt.Errorf("token %s answers instead of %s, with which it joined: it was replaced or initialised; replace the member", info.TokenSerial, m.serial)
	case !info.Probe.OK:
		g.metrics.probes.WithLabelValues(m.Name, "probe").Inc()
		return fmt.Errorf("its own test signature failed: %s", info.Probe.Cause)
	}
	return nil
}

// suspect stops new work for a member that failed at something. The caller holds mu.
func (g *Group) suspect(m *member, cause string) {
	m.suspected = time.Now()
	m.cause = cause
	switch m.health {
	case healthGood, healthUnknown:
		m.health = healthSuspect
		g.log.Warn("member is suspect", "member", m.Name, "cause", cause)
	case healthRecovering:
		g.fail(m, cause)
	}
}

// missed draws the conclusion from a health question that was not answered well, and says when to ask again. The caller
// holds mu.
func (g *Group) missed(m *member, cause string) time.Duration {
	if m.health == healthFailed {
		m.cause = cause
		g.attempted(m)
	} else if g.suspect(m, cause); m.misses >= missesToFail && m.health == healthSuspect {
		g.fail(m, cause)
	}
	switch {
	case m.givenUp:
		return givenUp
	case m.health == healthFailed:
		return time.Until(m.retry)
	}
	return healthBusy
}

// fail takes a member out until it has recovered. The caller holds mu.
func (g *Group) fail(m *member, cause string) {
	again := m.health == healthRecovering
	m.health, m.cause, m.well = healthFailed, cause, 0
	g.log.Error("member failed", "member", m.Name, "cause", cause)
	if again {
		g.attempted(m)
		return
	}
	m.attempts, m.retry = 0, g.nextRetry()
	if g.cfg.Recovery.Attempts == 0 {
		g.giveUp(m)
	}
}

// nextRetry is when a failed member is tried again: processes that lost it at once should not all ask it at once.
func (g *Group) nextRetry() time.Time {
	every := g.cfg.Recovery.Every
	return time.Now().Add(every - every/10 + rand.N(every/5+1))
}

// attempted counts a failed attempt at recovery. The caller holds mu.
func (g *Group) attempted(m *member) {
	m.attempts++
	m.retry = g.nextRetry()
	g.metrics.attempts.WithLabelValues(m.Name).Inc()
	if n := g.cfg.Recovery.Attempts; n >= 0 && m.attempts >= n {
		g.giveUp(m)
	}
}

func (g *Group) giveUp(m *member) {
	m.givenUp, m.blockedAt = true, g.state.Next-1
	g.log.Error("member is given up: it gets no work before it is recovered by hand", "member", m.Name, "attempts", m.attempts, "cause", m.cause)
}

// recovering begins the recovery of a member that answers again. The caller holds mu.
func (g *Group) recovering(m *member) {
	if m.health != healthRecovering {
		g.log.Info("member recovers", "member", m.Name)
	}
	m.health, m.cause, m.well, m.refusals = healthRecovering, "", 0, 0
	g.forget(m)
}

// restore ends a recovery that has done all it must. The caller holds mu.
func (g *Group) restore(m *member) {
	if m.health == healthRecovering && m.well >= goodToRecover && len(m.todo) == 0 {
		m.attempts = 0
		g.trust(m)
	}
}

// trust ends a suspicion. The caller holds mu.
func (g *Group) trust(m *member) {
	m.health, m.cause = healthGood, ""
	g.log.Info("member is good again", "member", m.Name)
}

// quarantined takes a member out until an operator lifts it. The caller holds mu.
func (g *Group) quarantined(m *member, why string) {
	if m.quarantine != "" {
		return
	}
	m.quarantine, m.blockedAt = why, g.state.Next-1
	g.forget(m)
	g.metrics.quarantines.WithLabelValues(m.Name).Inc()
	g.log.Error("member is quarantined: it gets no work until it was examined and recovered by hand", "member", m.Name, "why", why)
}

// absolve lifts a quarantine and takes up again what was given up. The caller holds mu.
func (g *Group) absolve(m *member) {
	if m.blocked() {
		g.log.Info("member is to recover by an operator's wish", "member", m.Name, "was", cmp.Or(m.quarantine, m.cause))
	}
	m.quarantine, m.givenUp, m.attempts, m.retry = "", false, 0, time.Time{}
	if m.health != healthUnknown {
		m.health = healthFailed // from where it has to recover
	}
	g.forget(m)
	nudge(m.wakeup)
}

// judge draws the conclusion about m from an error of its agent in an incarnation, and tells whether m is still worth
// asking. The caller holds mu.
func (g *Group) judge(m *member, incarnation string, err error) bool {
	code := ""
	if e, ok := errors.AsType[*hsm.Error](err); ok {
		code = e.Code
	}
	switch class := hsm.ClassOf(err); {
	case code == hsm.CodeStaleIncarnation:
		if m.info.Incarnation == incarnation {
			m.info.Incarnation = "" // the next answer's is new
			g.forget(m)
		}
		nudge(m.wakeup)
		return false
	case class == hsm.ClassRequest || class == hsm.ClassDenied || class == hsm.ClassNotFound || class == hsm.ClassOverloaded:
		return true // it lives; it just will not, or not now
	case class == hsm.ClassPIN && code != hsm.CodeLocked:
		g.quarantined(m, "its token refuses the PIN: "+err.Error())
	default: // also one that waits for its activation, which is all that it needs
		g.suspect(m, err.Error())
		nudge(m.wakeup)
	}
	return false
}
