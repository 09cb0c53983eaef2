package hsmsync

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"trivet/hsm"
)

// The log is read this often.
const followEvery, followTimeout = 500 * time.Millisecond, 5 * time.Second

// mark is by what an entry is recognised. The time is part of it: two entries that say the same may have others before them.
type mark [8]byte

func markOf(e Entry) (m mark) {
	h := sha256.New()
	_ = binary.Write(h, binary.BigEndian, e.Created.UnixMicro()) // a hash takes everything
	for _, f := range [][]byte{[]byte(e.Event), []byte(e.Subject), e.Payload, []byte(e.Actor)} {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(f)))
		h.Write(n[:])
		h.Write(f)
	}
	copy(m[:], h.Sum(nil))
	return m
}

// follow keeps up with the group's log. What was read last stays in force while it cannot be read.
func (g *Group) follow(ctx context.Context) {
	healthy := true
	for {
		rctx, cancel := context.WithTimeout(ctx, followTimeout)
		err := g.refresh(rctx)
		cancel()
		if ctx.Err() != nil {
			return
		}
		switch {
		case err != nil && healthy:
			g.log.Warn("group log cannot be read; members and keys known so far stay in use", "error", err)
		case err == nil && !healthy:
			g.log.Info("group log is read again")
		}
		healthy = err == nil
		if !sleep(ctx, followEvery, nil) {
			return
		}
	}
}

// refresh reads what is new in the log and takes it in. It reads from the last entry known: when that is another one now,
// the database has lost entries, and the log is read anew. While it is shorter than what is known its own last entry is looked
// at, so that what follows the loss is seen as soon as anything else.
func (g *Group) refresh(ctx context.Context) error {
	fail := func(err error) error {
		return fmt.Errorf("reading the log of group %s: %w", g.cfg.Group, err)
	}
	select {
	case g.reading <- struct{}{}:
		defer func() { <-g.reading }()
	case <-ctx.Done():
		return fail(ctx.Err())
	}
	g.mu.Lock()
	from, lost, left := max(1, g.state.Next-1), g.lost, g.left
	g.mu.Unlock()
	if lost {
		entries, err := g.cfg.Manifest.Log(ctx, g.cfg.Group, uint64(max(1, left)))
		if err != nil {
			return fail(err)
		}
		if g.unchanged(entries, left) {
			return nil
		}
	}
	entries, err := g.cfg.Manifest.Log(ctx, g.cfg.Group, from)
	if err != nil {
		return fail(err)
	}
	if g.joins(entries) {
		if err := g.extend(entries); err != nil {
			return fail(err)
		}
		return nil
	}
	if entries, err = g.cfg.Manifest.Log(ctx, g.cfg.Group, 1); err != nil {
		return fail(err)
	}
	if err := g.replace(entries); err != nil {
		return fail(err)
	}
	return nil
}

// unchanged tells whether entries, read from the last one left of a log that has lost some, are that one alone.
func (g *Group) unchanged(entries []Entry, left int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if left == 0 {
		return len(entries) == 0
	}
	return len(entries) == 1 && markOf(entries[0]) == g.trail[left-1]
}

// joins tells whether entries, read from the last known one, go on from there.
func (g *Group) joins(entries []Entry) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.trail) == 0 || len(entries) > 0 && entries[0].N == g.state.Last.N && markOf(entries[0]) == g.trail[len(g.trail)-1]
}

// extend takes in entries that join, of which the first is known unless none is.
func (g *Group) extend(entries []Entry) (err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.trail) > 0 {
		entries = entries[1:]
	}
	changed := map[hsm.KeyID]bool{}
	for _, e := range entries {
		if err = g.state.Apply(e); err != nil {
			break // what came before it counts
		}
		g.trail = append(g.trail, markOf(e))
		changed[hsm.KeyID(e.Subject)] = true
	}
	if g.lost {
		g.lost = false
		g.log.Info("group log has again what it had lost")
	}
	g.read = g.read || err == nil
	if len(changed) > 0 || g.state.Deleted {
		g.takeOver(changed)
	}
	return err
}

// replace takes in a log that was read from its beginning because it does not join. One that is merely shorter tells
// nothing new: the database will get the entries back, or others in their place.
func (g *Group) replace(entries []Entry) error {
	s, err := Fold(entries)
	if err != nil {
		return err
	}
	trail := make([]mark, len(entries))
	for i, e := range entries {
		trail[i] = markOf(e)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	shorter := len(trail) < len(g.trail) && slices.Equal(trail, g.trail[:len(trail)])
	if !g.lost || !shorter {
		at := 0
		for at < min(len(trail), len(g.trail)) && trail[at] == g.trail[at] {
			at++
		}
		g.log.Error("the database has lost entries of the group log: run `pkictl hsm verify`",
			"known", len(g.trail), "from", at+1, "length", len(trail), "others_in_their_place", !shorter)
	}
	if g.lost, g.left = shorter, len(trail); shorter {
		return nil
	}
	changed := map[hsm.KeyID]bool{}
	for _, old := range []*State{g.state, s} {
		for id := range old.keys {
			changed[id] = true
		}
	}
	g.state, g.trail, g.read = s, trail, true
	g.takeOver(changed)
	return nil
}

// takeOver brings keys and members in line with the log; changed are the subjects of what is new in it. The caller holds
// mu.
func (g *Group) takeOver(changed map[hsm.KeyID]bool) {
	if g.state.Deleted {
		clear(changed)
		for id := range g.keys {
			changed[id] = true
		}
	}
	for id := range changed {
		g.takeKey(id)
	}
	if g.state.Deleted { // nobody watches, or alarms, what is no group's
		for _, m := range g.members {
			m.end()
		}
		g.members = nil
		g.dispatch()
		return
	}
	g.enrol()
	for _, m := range g.members {
		nudge(m.demand)
	}
	g.dispatch()
}

// takeKey makes a key usable, or unusable, as the log has it. The caller holds mu.
func (g *Group) takeKey(id hsm.KeyID) {
	old := g.keys[id]
	k, known := g.state.Key(id)
	switch {
	case !g.state.Deleted && known && k.State == StateLive:
		if old != nil {
			return // a live key's record never changes
		}
		public, err := k.Algorithm.ParsePublic(k.SPKI)
		if err != nil {
			g.log.Error("group log holds a key that cannot be used", "key", id, "label", k.Label, "error", err)
			return
		}
		g.keys[id] = newKey(g, k.KeyRecord, public)
		if hsm.MayChallenge(g.role, k.Purpose) {
			for _, m := range g.members {
				m.todo[id] = time.Time{}
			}
		}
	case old == nil:
	case !g.state.Deleted && (!known || k.State == StatePending):
		// It was live, and the log that says so is gone. Its certificate may be out in the world, and its copies were proved:
		// a lost entry must not stop a CA. One that says that the key is dead would.
		g.log.Error("the log has lost that a key is live; this process goes on using it", "key", id, "label", old.record.Label)
	default:
		g.log.Warn("key is no longer live", "key", id, "label", old.record.Label, "state", k.State)
		delete(g.keys, id)
		for _, m := range g.members {
			delete(m.proofs, id)
			delete(m.todo, id)
		}
	}
}

// enrol brings the members in line with the log: those that joined are connected to, those that serve are watched, those
// that were removed are left. The caller holds mu.
func (g *Group) enrol() {
	if len(g.state.members) > 0 {
		listed := g.state.Members()
		var members []*member
		for _, l := range listed {
			i := slices.IndexFunc(g.members, func(m *member) bool { return m.Name == l.Name })
			switch {
			case i < 0:
				members = append(members, g.newMember(l))
				g.log.Info("member found in the group log", "member", l.Name, "address", l.Address, "site", l.Site, "state", l.State)
			case g.members[i].Address != l.Address || g.members[i].joined != 0 && g.members[i].joined != l.Joined:
				g.log.Info("member joined anew", "member", l.Name, "address", l.Address, "was", g.members[i].Address)
				g.members[i].end()
				members = append(members, g.newMember(l))
			default:
				g.reassign(g.members[i], l)
				members = append(members, g.members[i])
			}
		}
		for _, m := range g.members {
			if !slices.ContainsFunc(listed, func(l GroupMember) bool { return l.Name == m.Name }) {
				g.log.Info("member is no longer in the group log", "member", m.Name)
				m.end()
			}
		}
		g.members = members
	}
	for _, m := range g.members {
		m.rank = g.siteRank(m.site)
		switch {
		case m.serves() && m.stop == nil && g.launch != nil:
			g.launch(m)
		case !m.serves() && m.stop != nil:
			m.end()
		}
	}
}

// reassign takes in what the log says about a member that stays connected. The caller holds mu.
func (g *Group) reassign(m *member, l GroupMember) {
	if m.assigned != l.State {
		g.log.Info("member's place in the group changed", "member", m.Name, "state", l.State, "was", m.assigned)
	}
	served := m.serves()
	m.assigned, m.joined = l.State, l.Joined
	m.site, m.serial, m.transport = l.Site, l.TokenSerial, l.Transport
	if served != m.serves() {
		g.reset(m) // what it proved may be stale when it comes back
	}
	if l.Recovered > m.recovered {
		m.recovered = l.Recovered
		if m.blocked() && l.Recovered > m.blockedAt {
			g.absolve(m)
		}
	}
}

// siteRank is the order of preference of members of that site, the best first. The caller holds mu.
func (g *Group) siteRank(site string) int {
	switch p := g.state.Policy; p.Prefer {
	case PreferLocal:
		if g.cfg.Site != "" && site != g.cfg.Site {
			return 1
		}
	case PreferPriority:
		if i := slices.Index(p.Sites, site); i >= 0 {
			return i
		}
		return len(p.Sites)
	}
	return 0
}
