package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
)

// Drain takes a member out of work, by an operator's wish and until Recover, Promote or Standby. It keeps its keys, and
// receives new ones while it answers. The last member that serves is not drained, and another one must prove every live key
// now, unless that is forced (CoordinatorConfig.Force), which takes the approval of people.
func (c *Coordinator) Drain(ctx context.Context, name, why string, grant ...[]byte) error {
	spared := c.spare(ctx, name)
	return c.assign(ctx, "draining", name, func(s *State, m GroupMember) (*Entry, error) {
		refused := spared
		switch {
		case m.State == MemberDrained:
			return nil, nil
		case m.State == MemberJoining:
			return nil, errors.New("it has not joined yet, so it gets no work anyway: finish enrolling it, or remove it")
		case len(s.in(MemberActive, MemberStandby)) == 1 && len(s.In(StateLive)) > 0:
			refused = errors.New("it is the last member that serves; nothing could be signed")
		}
		evidence, err := c.forced(refused, ActDrain, m, grant)
		if err != nil {
			return nil, err
		}
		return entry(eventDrain, name, Note{Why: why, Approved: evidence})
	})
}

// forced is the evidence for doing what is refused, or the refusal.
func (c *Coordinator) forced(refused error, action string, m GroupMember, grant [][]byte) (Approved, error) {
	switch {
	case refused == nil:
		return Approved{}, nil
	case !c.cfg.Force:
		return Approved{}, refused
	}
	evidence, err := c.approvedBy(grant, c.forceAct(action, m))
	if err != nil {
		return evidence, fmt.Errorf("it is refused because %w; to force it: %w", refused, err)
	}
	return evidence, nil
}

// Standby makes a member one that serves only when no active member can. One that was drained proves every live key
// first. The last active member stays active.
func (c *Coordinator) Standby(ctx context.Context, name, why string) error {
	again := false
	err := c.assign(ctx, "putting on standby", name, func(s *State, m GroupMember) (*Entry, error) {
		switch active := s.in(MemberActive); {
		case m.State == MemberStandby:
			return nil, nil
		case m.State != MemberActive:
			again = true
			return nil, nil
		case len(active) == 1:
			return nil, errors.New("it is the last active member: promote another one first")
		}
		return entry(eventStandby, name, Note{Why: why})
	})
	if err != nil || !again {
		return err
	}
	return c.readmit(ctx, "putting on standby", name, MemberStandby, why)
}

// Promote makes a member active, once it has proved every live key.
func (c *Coordinator) Promote(ctx context.Context, name, why string) error {
	return c.readmit(ctx, "promoting", name, MemberActive, why)
}

// Recover has every process forget that it quarantined a member or gave it up, and gives a drained member its place back
// once it has proved every live key. Keys that it lacks are brought to it. It is refused while the member does not answer, or answers
// with another token than it joined with.
func (c *Coordinator) Recover(ctx context.Context, name, why string) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	if m, there := s.Member(name); there && !s.Deleted { // else assign says so
		if err := c.look(ctx, m).err; err != nil {
			return c.failedTo("recovering", name, err)
		}
	}
	drained := false
	if err := c.assign(ctx, "recovering", name, func(_ *State, m GroupMember) (*Entry, error) {
		drained = m.State == MemberDrained
		return entry(eventRecover, name, Note{Why: why})
	}); err != nil || !drained {
		return err
	}
	return c.readmit(ctx, "recovering", name, "", why)
}

// Remove takes a member out of the group for good. Its token keeps its keys: initialise it before it goes anywhere. What is
// left must be members enough for the copies that the policy wants, one of which proves every live key now, unless that is forced
// (CoordinatorConfig.Force), which takes the approval of people; one that never joined may always go.
func (c *Coordinator) Remove(ctx context.Context, name, why string, grant ...[]byte) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	if old := s.members[name]; old != nil && old.State == MemberRemoved {
		return nil
	}
	if err := c.depart(ctx, name, why, c.spare(ctx, name), grant); err != nil {
		return err
	}
	if s, err = c.State(ctx); err != nil {
		return err
	}
	for _, m := range c.survey(ctx, s.Members()) {
		c.forget(ctx, s, m) // whom this does not reach, reconciliation does
	}
	return nil
}

// depart enters that a member is removed.
func (c *Coordinator) depart(ctx context.Context, name, why string, spared error, grant [][]byte) error {
	return c.assign(ctx, "removing", name, func(s *State, m GroupMember) (*Entry, error) {
		left := slices.DeleteFunc(s.in(MemberActive, MemberStandby), func(o GroupMember) bool { return o.Name == name })
		refused := spared
		switch {
		case m.State == MemberJoining:
			refused = nil
		case len(left) < s.Policy.MinCopies && len(s.In(StateLive, StatePending)) > 0:
			refused = fmt.Errorf("it would leave %d, and the policy wants %d copies of every key: enroll another member first, or replace this one", len(left), s.Policy.MinCopies)
		case s.Policy.Creation == CreationMaster && s.Policy.Master == name:
			refused = errors.New("it is the master, without which no keys are made: change the policy first")
		}
		evidence, err := c.forced(refused, ActRemove, m, grant)
		if err != nil {
			return nil, err
		}
		return entry(eventRemove, name, Note{Why: why, Approved: evidence})
	})
}

// forget has a member forget the transport keys of those that were removed, so that no domain key goes to them unapproved,
// be it by whoever has a coordinator's identity. It tells each incarnation of a member once.
func (c *Coordinator) forget(ctx context.Context, s *State, m standing) {
	var gone []string
	for _, old := range s.members {
		if old.State == MemberRemoved && old.Transport != "" && !slices.ContainsFunc(s.Members(), func(o GroupMember) bool { return o.Transport == old.Transport }) {
			gone = append(gone, old.Transport)
		}
	}
	slices.Sort(gone)
	what := m.info.Incarnation + " " + strings.Join(gone, " ")
	c.mu.Lock()
	told := c.told[m.Name] == what
	c.mu.Unlock()
	if m.err != nil || len(gone) == 0 || told {
		return
	}
	for _, transport := range gone {
		if err := c.call(ctx, stepTimeout, func(ctx context.Context) error { return m.agent.ForgetTransport(ctx, transport) }); err != nil {
			c.log.Warn("a member does not forget the transport key of one that was removed; it is told again", "member", m.Name, "transport", transport, "error", err)
			return
		}
	}
	c.mu.Lock()
	c.told[m.Name] = what
	c.mu.Unlock()
}

// spare refuses to do without a member whose copies may be the last. The log does not know which members are well, so the
// others are asked: one of them must prove every live key.
func (c *Coordinator) spare(ctx context.Context, name string) error {
	s, err := c.State(ctx)
	if err != nil {
		return nil // assign says so
	}
	m, there := s.Member(name)
	live := s.In(StateLive)
	others := slices.DeleteFunc(s.in(MemberActive, MemberStandby), func(o GroupMember) bool { return o.Name == name })
	if !there || m.State == MemberJoining || s.Deleted || len(live) == 0 || len(others) == 0 {
		return nil // assign says what there is to say
	}
	all := c.survey(ctx, others)
	var why []error
	for _, o := range all {
		if o.err != nil {
			why = append(why, o.err)
		}
	}
	for _, o := range serving(all, s.Domain) {
		if _, err = c.proveAll(ctx, live, o); err == nil {
			return nil
		}
		why = append(why, err)
	}
	return fmt.Errorf("no other member proves every live key now, so that nothing could be signed; bring one back first: %w", errors.Join(why...))
}

// failedTo names the member and the group of an error.
func (c *Coordinator) failedTo(verb, name string, err error) error {
	return fmt.Errorf("%s member %s of group %s: %w", verb, name, c.cfg.Group, err)
}

// assign decides an entry about a member and reads it back.
func (c *Coordinator) assign(ctx context.Context, verb, name string, next func(*State, GroupMember) (*Entry, error)) error {
	var written *Entry
	s, err := c.decide(ctx, func(s *State) (e *Entry, err error) {
		m, ok := s.Member(name)
		switch {
		case !ok:
			return nil, errors.New("there is no such member")
		case s.Deleted:
			return nil, errors.New("the group was deleted")
		}
		e, err = next(s, m)
		written = e
		return e, err
	})
	if err != nil {
		return c.failedTo(verb, name, err)
	}
	if written == nil {
		return nil
	}
	c.log.Info("member's place in the group changed", "member", name, "event", written.Event)
	last := s.Last
	if err := c.confirm(ctx, fmt.Sprintf("member %s: %s", name, written.Event), func(s *State) bool {
		m := s.members[name]
		return m != nil && (m.N >= last.N || m.Recovered >= last.N)
	}); err != nil {
		return c.failedTo(verb, name, err)
	}
	return nil
}

func (c *Coordinator) readmit(ctx context.Context, verb, name string, to MemberState, why string) error {
	s, err := c.State(ctx)
	if err == nil {
		m, ok := s.Member(name)
		switch {
		case !ok:
			err = errors.New("there is no such member")
		case m.State == MemberJoining:
			err = errors.New("it has not joined yet: finish enrolling it")
		default:
			err = c.admit(ctx, admission{name: name, state: to, note: Note{Why: why}})
		}
	}
	if err != nil {
		return c.failedTo(verb, name, err)
	}
	return nil
}

// SetPolicy changes how the group behaves. Zero fields mean their defaults. Keys that are there stay what they are, so a policy
// that would say of them what is not so is refused; one that protects keys less takes the approval of people once there are
// keys.
func (c *Coordinator) SetPolicy(ctx context.Context, p Policy, grant ...[]byte) error {
	p = p.defaults()
	_, err := c.decide(ctx, func(s *State) (*Entry, error) {
		switch err := p.Check(); {
		case err != nil:
			return nil, err
		case s.Deleted:
			return nil, errors.New("the group was deleted")
		case reflect.DeepEqual(s.Policy, p):
			return nil, nil
		}
		serving := s.in(MemberActive, MemberStandby)
		keys := s.In(StateLive, StatePending)
		switch {
		case p.MinCopies > len(serving):
			return nil, fmt.Errorf("min_copies %d: the members that serve are %d, so no key could be made: enroll more first", p.MinCopies, len(serving))
		case p.Creation == CreationMaster && !slices.ContainsFunc(serving, func(m GroupMember) bool { return m.Name == p.Master && m.State == MemberActive }):
			return nil, fmt.Errorf("master %q is no active member", p.Master)
		case p.Driver == DriverWrap && s.Domain.Name == "" && len(serving) > 0:
			return nil, errors.New("driver wrap: the group has no domain key, because its vendor did the cloning so far; keys cannot change over: make another group")
		}
		for _, k := range keys {
			if p.Driver == DriverWrap && (k.NonExtractable || !k.Algorithm.Cloneable()) {
				return nil, fmt.Errorf("driver wrap: key %s (%s, %s) cannot be cloned with a domain key: retire it first", k.ID, k.Label, k.Algorithm)
			}
			if p.NonExtractable && !k.NonExtractable {
				return nil, fmt.Errorf("non_extractable: key %s (%s) can leave its token, wrapped, and stays so: make the keys that must never leave in another group", k.ID, k.Label)
			}
		}
		if all := s.In(StateLive, StatePending, StateRetired); s.Policy.Driver == DriverWrap && p.Driver == DriverExternal && len(all) > 0 {
			return nil, fmt.Errorf("driver external: %d keys, such as %s (%s), were cloned with the domain key, and nothing proves that a vendor clones them: from then on nobody would bring them to "+
				"a member that lacks them. Make the vendor's keys in another group", len(all), all[0].ID, all[0].Label)
		}
		var evidence Approved
		if len(s.order) > 0 && weaker(s.Policy, p) {
			var err error
			if evidence, err = c.approvedBy(grant, c.policyAct(s.Policy, p, s.PolicyN)); err != nil {
				return nil, err
			}
		}
		return entry(eventPolicy, subjectGroup, policyEntry{p, evidence})
	})
	if err != nil {
		return fmt.Errorf("changing the policy of group %s: %w", c.cfg.Group, err)
	}
	return nil
}

// defaults fills in what is zero.
func (p Policy) defaults() Policy {
	d := NewState().Policy
	if p.Driver == "" {
		p.Driver = d.Driver
	}
	if p.Creation == "" {
		p.Creation = d.Creation
	}
	if p.MinCopies == 0 {
		p.MinCopies = d.MinCopies
	}
	if p.Prefer == "" {
		p.Prefer = d.Prefer
	}
	if p.DestroyAfter == 0 {
		p.DestroyAfter = d.DestroyAfter
	}
	return p
}

// age is how long ago something was entered.
func (c *Coordinator) age(since time.Time) time.Duration { return c.cfg.Now().Sub(since) }
