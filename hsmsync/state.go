package hsmsync

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"trivet/hsm"
)

// State is what a group's log amounts to, built entry by entry. It is not safe for concurrent use.
type State struct {
	// Next is the position of the next entry; Last the newest entry.
	Next    uint64
	Last    Entry
	Policy  Policy
	PolicyN uint64 // position of the entry that made it so; 0: the defaults
	Domain  Domain
	Rotate  Domain   // the next domain key while there is one
	Former  []Domain // those before Domain, the oldest first
	// Created is the approval with which the group began; Ended that with which it was deleted.
	Created, Ended Note
	Deleted        bool
	members        map[string]*GroupMember
	keys           map[hsm.KeyID]*ManifestKey
	order          []hsm.KeyID // of first mention
}

// NewState is the state of an empty log.
func NewState() *State {
	return &State{
		Next: 1, members: map[string]*GroupMember{}, keys: map[hsm.KeyID]*ManifestKey{},
		Policy: Policy{Driver: DriverWrap, Creation: CreationAny, MinCopies: 2, Prefer: PreferRandom, DestroyAfter: 24 * time.Hour},
	}
}

// Clone is a copy that Apply can change without changing s.
func (s *State) Clone() *State {
	c := *s
	c.members = make(map[string]*GroupMember, len(s.members))
	for name, m := range s.members {
		m := *m
		c.members[name] = &m
	}
	c.keys = make(map[hsm.KeyID]*ManifestKey, len(s.keys))
	for id, k := range s.keys {
		k := *k
		c.keys[id] = &k
	}
	c.order = slices.Clone(s.order)
	return &c
}

// Fold reads a group's log from its beginning.
func Fold(entries []Entry) (*State, error) {
	s := NewState()
	for _, e := range entries {
		if err := s.Apply(e); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Apply takes in the next entry. It refuses one that is out of turn, that it cannot read, or that cannot follow what is
// there; the state is unchanged then. An abandoned key stays abandoned and a destroyed one destroyed, whatever follows.
func (s *State) Apply(e Entry) error {
	fail := func(err error) error {
		return fmt.Errorf("group log entry %d (%s %s): %w", e.N, e.Event, e.Subject, err)
	}
	if e.N != s.Next {
		return fmt.Errorf("group log has entry %d where %d was due", e.N, s.Next)
	}
	if s.Deleted {
		return fail(errors.New("the group was deleted"))
	}
	if err := s.apply(e); err != nil {
		return fail(err)
	}
	s.Next++
	s.Last = e
	return nil
}

func (s *State) apply(e Entry) error {
	switch e.Event {
	case eventMember:
		var p MemberEntry
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		if m := s.members[e.Subject]; m != nil && m.State != MemberRemoved {
			return errors.New("it is a member already")
		}
		s.members[e.Subject] = &GroupMember{Name: e.Subject, MemberEntry: p, State: MemberJoining, N: e.N, Joined: e.N, Recovered: e.N, Since: e.Created}
	case eventActive, eventStandby, eventDrain, eventRemove, eventRecover:
		m := s.members[e.Subject]
		if m == nil || m.State == MemberRemoved {
			return errors.New("there is no such member")
		}
		if e.Event == eventRecover {
			m.Recovered = e.N
			return nil
		}
		if e.Event == eventActive || e.Event == eventStandby {
			m.Standby = e.Event == eventStandby // what it is to be again after a drain
		}
		m.State = map[string]MemberState{eventActive: MemberActive, eventStandby: MemberStandby, eventDrain: MemberDrained, eventRemove: MemberRemoved}[e.Event]
		m.N, m.Since = e.N, e.Created
	case eventPIN:
		var p pinEntry
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		m := s.members[e.Subject]
		if m == nil || m.State == MemberRemoved {
			return errors.New("there is no such member")
		}
		m.PIN, m.PINSince = p.Digest, e.Created
	case eventDomain:
		var p DomainEntry
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		d := Domain{Name: e.Subject, Origin: p.Origin}
		switch {
		case s.Domain.Name == "":
			s.Domain = d
		case s.Rotate.Name != "" || s.Domain.Name == d.Name:
			return fmt.Errorf("domain key %s is there already", s.Domain.Name)
		default:
			s.Rotate = d
		}
	case eventRotated:
		if s.Rotate.Name != e.Subject || e.Subject == "" {
			return errors.New("it is not the next domain key")
		}
		s.Former = append(slices.Clone(s.Former), s.Domain)
		s.Domain, s.Rotate = s.Rotate, Domain{}
	case eventPolicy:
		p := NewState().Policy // an entry says all of a policy; what it leaves out is as by default
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		if err := p.Check(); err != nil {
			return err
		}
		s.Policy, s.PolicyN = p, e.N
	case eventCreated:
		var note Note
		if err := json.Unmarshal(e.Payload, &note); err != nil {
			return err
		}
		s.Created = note
	case eventDeleted:
		s.Deleted = true
		_ = json.Unmarshal(e.Payload, &s.Ended) // whatever it says, the group is over
	case string(StatePending), string(StateLive):
		return s.applyKey(e)
	default:
		// What this version does not know about a key makes it unusable; about anything else it changes nothing.
		k := s.keys[hsm.KeyID(e.Subject)]
		if k == nil || e.Event != string(StateDestroyed) && (k.State == StateAbandoned || k.State == StateDestroyed) {
			return nil
		}
		var note Note
		_ = json.Unmarshal(e.Payload, &note) // of an event this version does not know: the state says enough
		if k.State == StateDestroyed {
			k.Note = note // approved anew, for members that were not there when the first approval was in force
			return nil
		}
		k.State, k.N, k.Since, k.Note = KeyState(e.Event), e.N, e.Created, note
	}
	return nil
}

func (s *State) applyKey(e Entry) error {
	var p pendingEntry
	if err := json.Unmarshal(e.Payload, &p); err != nil {
		return err
	}
	r := p.KeyRecord
	if string(r.ID) != e.Subject {
		return fmt.Errorf("payload is about key %s", r.ID)
	}
	k := s.keys[r.ID]
	switch {
	case k == nil && e.Event == string(StatePending):
		s.keys[r.ID] = &ManifestKey{KeyRecord: r, State: StatePending, Origin: p.Origin, N: e.N, Since: e.Created}
		s.order = append(s.order, r.ID)
	case k != nil && k.State == StatePending && e.Event == string(StateLive):
		*k = ManifestKey{KeyRecord: r, State: StateLive, N: e.N, Since: e.Created}
	case k != nil && (k.State == StateAbandoned || k.State == StateDestroyed):
	default:
		return errors.New("out of order")
	}
	return nil
}

// Keys lists every key the log mentions, in the order of their first mention.
func (s *State) Keys() []ManifestKey {
	out := make([]ManifestKey, len(s.order))
	for i, id := range s.order {
		out[i] = *s.keys[id]
	}
	return out
}

// Key is the key of that id.
func (s *State) Key(id hsm.KeyID) (ManifestKey, bool) {
	if k := s.keys[id]; k != nil {
		return *k, true
	}
	return ManifestKey{}, false
}

// MayImport refuses a key from outside that the group has, or had, in any other way than spec says: what a key may do depends
// on its purpose, and a destroyed one must not come back. To go on with an import, or to repeat one, is no second time.
func (s *State) MayImport(spec hsm.KeySpec, spki []byte) error {
	for _, k := range s.Keys() {
		repeated := k.Label == spec.Label && k.Purpose == spec.Purpose && (k.State == StatePending || k.State == StateLive)
		if bytes.Equal(k.SPKI, spki) && !repeated && k.State != StateAbandoned {
			return fmt.Errorf("this key is in the group already, as key %s (%s:%s, %s): it is not taken in again", k.ID, k.Purpose, k.Label, k.State)
		}
	}
	return nil
}

// Find returns the newest live or pending key of that label and purpose.
func (s *State) Find(label string, p hsm.Purpose) (ManifestKey, bool) {
	for _, id := range slices.Backward(s.order) {
		if k := s.keys[id]; k.Label == label && k.Purpose == p && (k.State == StateLive || k.State == StatePending) {
			return *k, true
		}
	}
	return ManifestKey{}, false
}

// In lists the keys that are in one of the given states, in the order of their first mention.
func (s *State) In(states ...KeyState) []ManifestKey {
	var out []ManifestKey
	for _, id := range s.order {
		if k := s.keys[id]; slices.Contains(states, k.State) {
			out = append(out, *k)
		}
	}
	return out
}

// Members lists the members that were not removed, by name.
func (s *State) Members() []GroupMember {
	var out []GroupMember
	for _, name := range slices.Sorted(maps.Keys(s.members)) {
		if m := s.members[name]; m.State != MemberRemoved {
			out = append(out, *m)
		}
	}
	return out
}

// Unfinished names the members with which the group was to begin and which do not serve yet: its creation was interrupted.
// There are none once it has had a key.
func (s *State) Unfinished() []string {
	if s.Next == 1 || s.Deleted || len(s.order) > 0 {
		return nil
	}
	founders := s.Created.founders()
	if len(founders) == 0 && len(s.in(MemberActive, MemberStandby)) == 0 { // set up by the ceremony
		founders = slices.Sorted(maps.Keys(s.members))
	}
	return slices.DeleteFunc(founders, func(name string) bool {
		m := s.members[name]
		return m != nil && m.State != MemberJoining
	})
}

// Member is the member of that name, unless it was removed.
func (s *State) Member(name string) (GroupMember, bool) {
	if m := s.members[name]; m != nil && m.State != MemberRemoved {
		return *m, true
	}
	return GroupMember{}, false
}

// Departed is the member of that name as it was when it was removed, unless the name has joined again.
func (s *State) Departed(name string) (GroupMember, bool) {
	if m := s.members[name]; m != nil && m.State == MemberRemoved {
		return *m, true
	}
	return GroupMember{}, false
}

// Check refuses a policy that cannot be kept, naming the field.
func (p Policy) Check() error {
	one := func(field, value string, of ...string) error {
		if !slices.Contains(of, value) {
			return fmt.Errorf("%s %q: want one of %s", field, value, strings.Join(of, ", "))
		}
		return nil
	}
	if err := errors.Join(one("driver", p.Driver, DriverWrap, DriverExternal), one("creation", p.Creation, CreationAny, CreationMaster),
		one("prefer", p.Prefer, PreferRandom, PreferLocal, PreferPriority)); err != nil {
		return err
	}
	switch {
	case p.MinCopies < 2:
		return fmt.Errorf("min_copies %d: a key of which there is one copy is lost with its HSM: want 2 or more", p.MinCopies)
	case p.Creation == CreationMaster && p.Master == "":
		return errors.New("master is missing: creation is by the master")
	case p.NonExtractable && p.Driver != DriverExternal:
		return errors.New("non_extractable: keys that never leave their tokens cannot be cloned with a domain key; the driver must be external")
	case p.Prefer == PreferPriority && len(p.Sites) == 0:
		return errors.New("sites is missing: prefer is by priority")
	case p.DestroyAfter < 0:
		return fmt.Errorf("destroy_after %s is negative", p.DestroyAfter)
	}
	return nil
}
