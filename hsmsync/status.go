package hsmsync

import (
	"cmp"
	"slices"
	"time"

	"trivet/hsm"
)

// Status is what `hsm status --output json` prints.
type Status struct {
	Groups []GroupStatus `json:"groups"`
}

// GroupStatus is one group as this process sees it.
type GroupStatus struct {
	Name string `json:"name"`
	// Epoch rises with every change of the group: the position of the newest entry of its log. 0: not read yet.
	Epoch   uint64         `json:"epoch"`
	Members []MemberStatus `json:"members"`
	// Waiting counts the digests for which no member is free.
	Waiting int `json:"waiting"`
	// MinCopies is how many verified copies of a key there should be; Keys tells how many there are.
	MinCopies int         `json:"min_copies"`
	Keys      []KeyCopies `json:"keys"`
}

// MemberStatus is one member.
type MemberStatus struct {
	Name string `json:"name"`
	// State is joining, syncing, active, standby, suspect, failed, recovering, drained or quarantined.
	State string `json:"state"`
	Cause string `json:"cause,omitempty"`
	// GivenUp tells that no more attempts at recovery are made until an operator has the member recovered.
	GivenUp bool   `json:"given_up,omitempty"`
	Standby bool   `json:"standby"`
	Site    string `json:"site,omitempty"`
	Address string `json:"address"`
	// InFlight counts the digests this process waits for.
	InFlight    int    `json:"inflight"`
	TokenSerial string `json:"token_serial,omitempty"`
	Incarnation string `json:"incarnation,omitempty"`
	// PIN is how the PIN of its token stands.
	PIN  hsm.PIN     `json:"pin,omitzero"`
	Keys []KeyStatus `json:"keys"`
}

// KeyStatus is one live key on one member.
type KeyStatus struct {
	ID      hsm.KeyID   `json:"id"`
	Label   string      `json:"label"`
	Purpose hsm.Purpose `json:"purpose"`
	// State is verified, unverified, or denied where this process's role may not have the key proved.
	State    string     `json:"state"`
	Cause    string     `json:"cause,omitempty"`
	ProvedAt *time.Time `json:"proved_at,omitempty"`
}

// KeyCopies is one live key of the group.
type KeyCopies struct {
	ID      hsm.KeyID   `json:"id"`
	Label   string      `json:"label"`
	Purpose hsm.Purpose `json:"purpose"`
	// Copies counts the members that have proved their copy to this process, in their present incarnation.
	Copies int `json:"copies"`
}

// Status tells the state of the group, its members and their copies of the live keys.
func (g *Group) Status() Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := GroupStatus{
		Name: g.cfg.Group, Epoch: g.state.Next - 1, Members: []MemberStatus{}, Waiting: g.backlog, MinCopies: g.state.Policy.MinCopies, Keys: []KeyCopies{},
	}
	keys := make([]*Key, 0, len(g.keys))
	for _, k := range g.keys {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b *Key) int {
		return cmp.Or(cmp.Compare(a.record.Label, b.record.Label), cmp.Compare(a.record.ID, b.record.ID))
	})
	for _, m := range g.members {
		ms := MemberStatus{
			Name: m.Name, State: g.stateOf(m), Cause: cmp.Or(m.quarantine, m.cause), GivenUp: m.givenUp, Standby: m.assigned == MemberStandby,
			Site: m.site, Address: m.Address, InFlight: m.inflight,
			TokenSerial: m.info.TokenSerial, Incarnation: m.info.Incarnation, PIN: m.info.PIN, Keys: []KeyStatus{},
		}
		for _, k := range keys {
			p := m.proofs[k.record.ID]
			ks := KeyStatus{ID: k.record.ID, Label: k.record.Label, Purpose: k.record.Purpose, State: "unverified", Cause: p.err}
			switch {
			case !hsm.MayChallenge(g.role, k.record.Purpose):
				ks.State = "denied"
			case !p.at.IsZero():
				ks.State, ks.ProvedAt = "verified", &p.at
			}
			ms.Keys = append(ms.Keys, ks)
		}
		s.Members = append(s.Members, ms)
	}
	for _, k := range keys {
		if hsm.MayChallenge(g.role, k.record.Purpose) {
			s.Keys = append(s.Keys, KeyCopies{k.record.ID, k.record.Label, k.record.Purpose, g.copies(k)})
		}
	}
	return Status{Groups: []GroupStatus{s}}
}

// copies counts the members that have proved the key. The caller holds mu.
func (g *Group) copies(k *Key) (n int) {
	for _, m := range g.members {
		if m.proved(k.record.ID) {
			n++
		}
	}
	return n
}

// states are all a member can be in.
var states = []string{"joining", "syncing", "active", "standby", "suspect", "failed", "recovering", "drained", "quarantined"}

// stateOf is the member's state in one word. The caller holds mu.
func (g *Group) stateOf(m *member) string {
	switch {
	case m.quarantine != "":
		return "quarantined"
	case m.assigned == MemberDrained:
		return "drained"
	case m.assigned == MemberJoining, m.health == healthUnknown:
		return "joining"
	case m.health == healthFailed:
		return "failed"
	case m.health == healthSuspect:
		return "suspect"
	case m.health == healthRecovering:
		return "recovering"
	case len(m.todo) > 0:
		return "syncing"
	case m.assigned == MemberStandby:
		return "standby"
	}
	return "active"
}
