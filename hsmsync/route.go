package hsmsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"trivet/hsm"
)

const (
	// perDigest is what a member of which nothing is known is given per digest: a slow HSM signs some 200 a second.
	perDigest = 5 * time.Millisecond
	// A piece is meant to keep a member busy for at least leastWork, so that the round trip costs little, and at most for
	// mostWork, so that little is lost when the member dies over it. Beyond what its slots take, a member is given work for
	// ahead; the rest waits here, where it can go to whoever is free first.
	leastWork, mostWork, ahead = 8 * time.Millisecond, 100 * time.Millisecond, 50 * time.Millisecond
	// maxLimit bounds the time a member may take over one piece, whatever it took before.
	maxLimit = 10 * time.Second
	// breath is taken between two rounds through all members.
	breath = 20 * time.Millisecond
	// slotsPerRequest is how many digests of one request an agent signs at once.
	slotsPerRequest = 4
	// maxHedges other members may be asked in one go beside slow ones, and one more for every tenth answer: when everything
	// is slow, asking twice would make it slower.
	maxHedges, hedgePerAnswer = 256, 0.1
)

// pace is how long a member takes, as observed lately. Queueing at the member is counted in, so that it holds for a busy
// member as for an idle one.
type pace struct {
	trip time.Duration                   // for the way there and back, of which a health answer takes little more
	by   map[hsm.Algorithm]time.Duration // per digest
}

func (p pace) of(a hsm.Algorithm) time.Duration {
	if d := p.by[a]; d > 0 {
		return d
	}
	return perDigest
}

// expect is how long n digests will take, those counted in that are before them.
func (p pace) expect(a hsm.Algorithm, n int) time.Duration { return p.trip + time.Duration(n)*p.of(a) }

// learn takes in that n digests, of one request and of others before it, took d.
func (p *pace) learn(a hsm.Algorithm, n int, d time.Duration) {
	if p.by == nil {
		p.by = map[hsm.Algorithm]time.Duration{}
	}
	each := max((d-p.trip)/time.Duration(n), time.Microsecond)
	if old := p.by[a]; old > 0 {
		each = old + (each-old)/5
	}
	p.by[a] = each
}

// learnTrip takes in that a health answer took d.
func (p *pace) learnTrip(d time.Duration) {
	if p.trip == 0 || d < p.trip {
		p.trip = d
	}
	p.trip += (d - p.trip) / 8
}

// may tells whether the member can be given work with the key at all. The caller holds Group.mu.
func (m *member) may(k *Key) bool {
	return m.serves() && !m.blocked() && m.proved(k.record.ID) &&
		(m.health == healthGood || m.health == healthSuspect || m.health == healthRecovering)
}

// refuses tells that the member is known to be at another site epoch, and so to refuse the key. The caller holds Group.mu.
func (m *member) refuses(k *Key) bool {
	return m.info.Epoch != 0 && m.info.Epoch != k.group.cfg.Epoch && (k.record.Purpose == hsm.PurposeCA || k.record.Purpose == hsm.PurposeCRL)
}

// tier is how willingly the member is given work with the key: the lower, the sooner. The caller holds Group.mu.
func (m *member) tier(k *Key) int {
	t := 0
	switch {
	case m.health == healthRecovering:
		t = 4
	case m.health == healthSuspect:
		t = 3
	case m.refuses(k):
		t = 2
	case m.overdue > 0:
		t = 1 // somebody waits for it for too long
	}
	t *= 2
	if m.assigned == MemberStandby {
		t++
	}
	return t<<16 + m.rank
}

// full tells whether the member has as much as it should have before it has answered: digests for its slots and for a
// while ahead, in no more requests than its agent surely takes from one of several callers. The caller holds Group.mu.
func (m *member) full(k *Key) bool {
	return m.inflight >= max(m.capacity()+slotsPerRequest, int((ahead+m.pace.trip)/m.pace.of(k.record.Algorithm))) || m.requests >= 2*max(m.capacity(), slotsPerRequest)
}

// lanes is how many more requests the member would work on at full speed. The caller holds Group.mu.
func (m *member) lanes() int { return max(0, m.capacity()-m.inflight) / slotsPerRequest }

// among calls use for the members of the best tier that may sign with the key, except those in not. Standbys are not
// among them while an active member can sign with it, be it one of not. The caller holds mu.
func (g *Group) among(k *Key, not []*member, use func(*member)) {
	if g.keys[k.record.ID] != k {
		return // no longer live
	}
	best, active := -1, false
	for _, m := range g.members {
		active = active || m.assigned == MemberActive && m.health == healthGood && m.may(k) && !m.refuses(k)
	}
	usable := func(m *member) bool {
		return m.may(k) && !(active && m.assigned == MemberStandby) && !slices.Contains(not, m)
	}
	for _, m := range g.members {
		if usable(m) {
			if t := m.tier(k); best < 0 || t < best {
				best = t
			}
		}
	}
	for _, m := range g.members {
		if usable(m) && m.tier(k) == best {
			use(m)
		}
	}
}

// choose finds the least busy member for the key. Full tells that there is none only because all have their window full,
// which urgent ignores. The caller holds mu.
func (g *Group) choose(k *Key, not []*member, urgent bool) (best *member, full bool) {
	g.among(k, not, func(m *member) {
		switch {
		case !urgent && m.full(k):
			full = true
		case best == nil || m.busier(best) < 0:
			best = m
		}
	})
	return best, full && best == nil
}

// busier compares members by the work they have for what they can do at once, then by when they were last given any.
func (m *member) busier(than *member) int {
	return cmp.Or(cmp.Compare(m.inflight*than.capacity(), than.inflight*m.capacity()), cmp.Compare(m.turn, than.turn))
}

// idle tells whether some member would work at once on what it is given now, when so many requests are on their way already.
func (g *Group) idle(k *Key, leaving int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	lanes := 0
	g.among(k, nil, func(m *member) { lanes += m.lanes() })
	return lanes > leaving
}

// admit lets n digests in, or refuses them because too many wait already. Pieces is into how many they should be cut.
func (g *Group) admit(k *Key, n int) (pieces int, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.backlog > 0 && g.backlog+n > g.cfg.Queue {
		g.metrics.refused.Add(float64(n))
		return 0, hsm.Errorf(hsm.ClassOverloaded, "sign", "%d digests wait for an HSM already, %d more are too many", g.backlog, n)
	}
	g.backlog += n
	lanes, members := 0, 0
	var each time.Duration
	g.among(k, nil, func(m *member) {
		lanes += m.lanes()
		members++
		each += m.pace.of(k.record.Algorithm)
	})
	if members == 0 {
		return parts(n, hsm.MaxBatch), nil // it will fail
	}
	each /= time.Duration(members)
	// As many as the members would work on at once, unless that makes them too small to be worth their way.
	pieces = max(1, min(lanes, n/max(1, int(leastWork/each))))
	if pieces > members {
		pieces -= pieces % members // or one of them gets one more
	}
	return max(pieces, parts(n, min(max(1, int(mostWork/each)), hsm.MaxBatch))), nil
}

// dismiss takes back that n digests were let in.
func (g *Group) dismiss(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.backlog -= n
}

// parts is into how many parts of at most size n must be cut.
func parts(n, size int) int { return (n + size - 1) / size }

// attempt is digests handed to one member.
type attempt struct {
	member      *member
	incarnation string // that proved the key
	n           int
	load        int           // digests at the member, these included
	patience    time.Duration // after which another member is asked as well
	limit       time.Duration // after which the member is suspect
	overdue     bool          // guarded by Group.mu, as done is
	done        bool          // the member has answered
}

// charge hands n digests to m. The caller holds mu.
func (g *Group) charge(m *member, k *Key, n int) *attempt {
	m.inflight += n
	m.requests++
	g.turn++
	m.turn = g.turn
	a := &attempt{member: m, incarnation: m.info.Incarnation, n: n, load: m.inflight}
	expected := m.pace.expect(k.record.Algorithm, a.load)
	a.patience = min(max(3*expected, g.cfg.Attempt/2), g.cfg.Attempt*5/6)
	a.limit = min(g.cfg.Attempt+max(perDigest*time.Duration(n-1), 4*expected), maxLimit)
	return a
}

// piece is work for which no member is free.
type piece struct {
	n    int
	turn chan *attempt // gets one: nil when no member is left
}

// hand gives n digests to the least busy member, waiting for one as long as ctx lasts. It returns nil when no member can
// sign with the key.
func (g *Group) hand(ctx context.Context, k *Key, n int) (*attempt, error) {
	g.mu.Lock()
	var m *member
	full := true
	if len(k.waiting) == 0 {
		m, full = g.choose(k, nil, false)
	}
	if !full {
		defer g.mu.Unlock()
		g.backlog -= n
		if m == nil {
			return nil, nil
		}
		return g.charge(m, k, n), nil
	}
	p := &piece{n, make(chan *attempt, 1)}
	if k.waiting = append(k.waiting, p); len(k.waiting) == 1 {
		g.waiting = append(g.waiting, k)
	}
	g.mu.Unlock()
	select {
	case a := <-p.turn:
		return a, nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case a := <-p.turn: // at the last moment; the call will end with ctx, and the member is not to blame
		return a, nil
	default:
	}
	g.backlog -= n
	k.waiting = slices.DeleteFunc(k.waiting, func(q *piece) bool { return q == p })
	if len(k.waiting) == 0 {
		g.waiting = slices.DeleteFunc(g.waiting, func(q *Key) bool { return q == k })
	}
	return nil, &hsm.Error{Class: hsm.ClassOverloaded, Op: "sign", Err: fmt.Errorf("waiting for a member that is free: %w", ctx.Err())}
}

// dispatch hands waiting pieces to members that are free now, key by key in turn. It is called after every change that
// may make room, or take the last member away. The caller holds mu.
func (g *Group) dispatch() {
	for blocked := 0; blocked < len(g.waiting); {
		k := g.waiting[0]
		g.waiting = g.waiting[1:]
		m, full := g.choose(k, nil, false)
		if full {
			blocked++
			g.waiting = append(g.waiting, k)
			continue
		}
		blocked = 0
		p := k.waiting[0]
		if k.waiting = k.waiting[1:]; len(k.waiting) > 0 {
			g.waiting = append(g.waiting, k)
		}
		g.backlog -= p.n
		if m == nil {
			p.turn <- nil
		} else {
			p.turn <- g.charge(m, k, p.n)
		}
	}
}

// another gives n digests to one more member than those in not, however busy; nil when there is none.
func (g *Group) another(k *Key, n int, not []*member) *attempt {
	g.mu.Lock()
	defer g.mu.Unlock()
	m, _ := g.choose(k, not, true)
	if m == nil {
		return nil
	}
	return g.charge(m, k, n)
}

// hedge notes that a takes long and gives its digests to one more member than those in not; nil when there is none, or
// enough was given twice of late.
func (g *Group) hedge(k *Key, a *attempt, not []*member) *attempt {
	g.mu.Lock()
	defer g.mu.Unlock()
	if a.done {
		return nil // it is being verified
	}
	if !a.overdue {
		a.overdue = true
		a.member.overdue++
	}
	m, _ := g.choose(k, not, true)
	if m == nil || g.hedges < 1 {
		return nil
	}
	g.hedges--
	g.metrics.hedges.WithLabelValues(a.member.Name).Inc()
	return g.charge(m, k, a.n)
}

// answer is what became of an attempt.
type answer struct {
	*attempt
	sigs [][]byte
	err  error
}

// sign has one piece signed, by the member that a hands it to or else by others. It goes through the members, best first,
// and through all of them again as long as one may recover. A member that takes long keeps its chance while the next is
// asked; the first good answer counts.
func (k *Key) sign(ctx context.Context, a *attempt, digests [][]byte) ([][]byte, error) {
	g := k.group
	answers, settled := make(chan answer, 2), make(chan struct{})
	defer close(settled)
	slow, pause := time.NewTimer(time.Hour), time.NewTimer(time.Hour)
	defer slow.Stop()
	defer pause.Stop()
	var asked, failed []*member // those that work on it, and those that failed in this round
	var newest *attempt
	var last error
	again := false // some failure of this round may be gone in the next
	for {
		switch {
		case a != nil:
			newest, asked = a, append(asked, a.member)
			slow.Reset(a.patience)
			go g.attempt(ctx, k, a, digests, answers, settled)
		case len(asked) == 0 && len(failed) == 0:
			g.mu.Lock()
			err := g.noMember(k)
			g.mu.Unlock()
			if last != nil {
				err = fmt.Errorf("%w; last failure: %w", err, last)
			}
			return nil, err
		case again:
			pause.Reset(breath)
		case len(asked) == 0:
			return nil, fmt.Errorf("signing with key %s: %w", k.record.ID, last)
		}
		a = nil
		select {
		case got := <-answers:
			if got.err == nil {
				return got.sigs, nil
			}
			asked = slices.DeleteFunc(asked, func(m *member) bool { return m == got.member })
			failed = append(failed, got.member)
			last = fmt.Errorf("member %s: %w", got.member.Name, got.err)
			switch hsm.ClassOf(got.err) {
			case hsm.ClassRequest:
				return nil, fmt.Errorf("signing with key %s: %w", k.record.ID, last)
			case hsm.ClassDenied, hsm.ClassNotFound:
			default:
				again = true
			}
			a = g.another(k, len(digests), slices.Concat(asked, failed))
		case <-slow.C:
			a = g.hedge(k, newest, slices.Concat(asked, failed))
		case <-pause.C:
			failed, again = failed[:0], false
			a = g.another(k, len(digests), asked)
		case <-ctx.Done():
			err := fmt.Errorf("signing with key %s: %w", k.record.ID, ctx.Err())
			if last != nil {
				err = fmt.Errorf("%w; last failure: %w", err, last)
			}
			return nil, err
		}
	}
}

// attempt has a member sign digests and verifies the result, unless nobody waits for it any more. Neither the end of the
// caller nor another member's answer ends it, so that a member that hangs is found out.
func (g *Group) attempt(ctx context.Context, k *Key, a *attempt, digests [][]byte, answers chan<- answer, settled <-chan struct{}) {
	began := time.Now()
	actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limit)
	sigs, err := a.member.agent.Sign(actx, hsm.SignRequest{Key: k.record.ID, Digests: digests, Incarnation: a.incarnation, Epoch: g.cfg.Epoch})
	cancel()
	took := time.Since(began)
	g.account(k, a, err, took)
	select {
	case <-settled:
		return
	default:
	}
	if err == nil {
		if bad := k.verify(digests, sigs); bad != "" {
			err = &hsm.Error{Class: hsm.ClassDevice, Op: "sign", Err: errors.New(bad)}
			g.metrics.failovers.WithLabelValues(a.member.Name, "bad-signature").Inc()
			g.mu.Lock()
			g.quarantined(a.member, fmt.Sprintf("key %s (%s): %s", k.record.ID, k.record.Label, bad))
			g.dispatch()
			g.mu.Unlock()
		}
	}
	select {
	case answers <- answer{a, sigs, err}:
	case <-settled:
	}
}

// account takes in that an attempt has ended.
func (g *Group) account(k *Key, a *attempt, err error, took time.Duration) {
	m := a.member
	class := hsm.ClassOf(err)
	switch {
	case err == nil:
		m.signSeconds.Observe(took.Seconds())
	case class != hsm.ClassRequest:
		g.metrics.failovers.WithLabelValues(m.Name, class.String()).Inc()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	m.inflight -= a.n
	m.requests--
	if a.done = true; a.overdue {
		m.overdue--
	}
	if err == nil {
		m.answered, m.refusals = time.Now(), 0
	}
	if err == nil || took >= a.limit {
		m.pace.learn(k.record.Algorithm, a.load, took)
		g.hedges = min(g.hedges+hedgePerAnswer, maxHedges)
	}
	if class == hsm.ClassNotFound && m.info.Incarnation == a.incarnation && g.keys[k.record.ID] == k {
		m.proofs[k.record.ID] = proof{err: err.Error()}
		m.todo[k.record.ID] = time.Time{}
		nudge(m.demand)
	}
	if err != nil {
		g.judge(m, a.incarnation, err)
	}
	g.dispatch()
}

// noMember is ErrNoMember with every member's state. The caller holds mu.
func (g *Group) noMember(k *Key) error {
	if g.keys[k.record.ID] != k {
		now, _ := g.state.Key(k.record.ID)
		return fmt.Errorf("%w with key %s (%s): it is %s", ErrNoMember, k.record.ID, k.record.Label, now.State)
	}
	var states []string
	for _, m := range g.members {
		s := m.Name + " " + g.stateOf(m)
		if cause := m.why(k.record.ID); cause != "" {
			s += " (" + cause + ")"
		}
		states = append(states, s)
	}
	return fmt.Errorf("%w with key %s (%s): %s", ErrNoMember, k.record.ID, k.record.Label, strings.Join(states, "; "))
}

// why says why the member does not sign with a key, if anything is known. The caller holds mu.
func (m *member) why(id hsm.KeyID) string {
	switch p := m.proofs[id]; {
	case m.quarantine != "":
		return m.quarantine
	case m.cause != "":
		return m.cause
	case p.err != "":
		return p.err
	case p.at.IsZero():
		return "key not proved yet"
	}
	return ""
}
