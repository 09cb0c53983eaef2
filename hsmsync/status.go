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
	// Epoch rises with every change of the group's keys: the log position of the newest one.
	Epoch   uint64         `json:"epoch"`
	Members []MemberStatus `json:"members"`
}

// MemberStatus is one member.
type MemberStatus struct {
	Name string `json:"name"`
	// State is joining, syncing, active, suspect, failed or quarantined.
	State   string `json:"state"`
	Cause   string `json:"cause,omitempty"`
	Standby bool   `json:"standby"`
	// InFlight counts the digests this process waits for.
	InFlight    int         `json:"inflight"`
	TokenSerial string      `json:"token_serial,omitempty"`
	Incarnation string      `json:"incarnation,omitempty"`
	Keys        []KeyStatus `json:"keys"`
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

// Status tells the state of the group, its members and their copies of the live keys.
func (g *Group) Status() Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := GroupStatus{Name: g.cfg.Group, Epoch: g.tip()}
	keys := make([]*Key, 0, len(g.keys))
	for _, k := range g.keys {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b *Key) int {
		return cmp.Or(cmp.Compare(a.record.Label, b.record.Label), cmp.Compare(a.record.ID, b.record.ID))
	})
	for _, m := range g.members {
		ms := MemberStatus{
			Name: m.Name, State: g.state(m), Cause: cmp.Or(m.quarantine, m.cause), InFlight: m.inflight,
			TokenSerial: m.info.TokenSerial, Incarnation: m.info.Incarnation, Keys: []KeyStatus{},
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
	return Status{Groups: []GroupStatus{s}}
}

// states are all a member can be in.
var states = []string{"joining", "syncing", "active", "suspect", "failed", "quarantined"}

// state is the member's state in one word. The caller holds mu.
func (g *Group) state(m *member) string {
	switch {
	case m.quarantine != "":
		return "quarantined"
	case m.health == healthFailed:
		return "failed"
	case m.health == healthSuspect:
		return "suspect"
	case m.health == healthUnknown:
		return "joining"
	}
	for _, k := range g.provable() {
		if !m.proved(k.record.ID) {
			return "syncing"
		}
	}
	return "active"
}
