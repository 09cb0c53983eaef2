package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"trivet/hsm"
)

// Setup makes a group of its first members: it enters the policy and each member with its token, has one of them make
// the domain key and the others receive it, and enters all as active, or standby where a member says so. All must be
// well, with tokens that are empty or hold this group's domain key already. It may be repeated, by several coordinators
// too. Once the group has keys it adds nobody any more (Enroll does) and leaves the policy alone (SetPolicy does). Zero
// fields of the policy mean their defaults.
func (c *Coordinator) Setup(ctx context.Context, members []Member, p Policy) error {
	if err := c.setup(ctx, members, p.defaults()); err != nil {
		return fmt.Errorf("setting up group %s: %w", c.cfg.Group, err)
	}
	return nil
}

func (c *Coordinator) setup(ctx context.Context, members []Member, p Policy) error {
	s, err := c.State(ctx)
	switch {
	case err != nil:
		return err
	case s.Deleted:
		return errors.New("it was deleted: choose another name")
	case len(members) == 0:
		return errors.New("it has no members")
	}
	if err := p.Check(); err != nil {
		return err
	}
	var first []Member // those that still belong to it
	for _, m := range members {
		switch old, known := s.members[m.Name]; {
		case known && old.State == MemberRemoved:
		case !known && len(s.order) > 0:
			return fmt.Errorf("member %s is not in it, and it has keys already: enroll the member", m.Name)
		case known && old.Address != m.Address:
			return fmt.Errorf("member %s joined at %s, not %s: correct the configuration, or replace the member", m.Name, old.Address, m.Address)
		default:
			first = append(first, m)
		}
	}
	if len(s.order) == 0 {
		if s, err = c.found(ctx, first, p); err != nil {
			return err
		}
	}
	// What an interrupted run left undone.
	for _, m := range s.in(MemberJoining) {
		if !slices.ContainsFunc(first, func(f Member) bool { return f.Name == m.Name }) {
			continue
		}
		if err := c.admit(ctx, admission{name: m.Name, note: Note{Why: "set up"}}); err != nil {
			return fmt.Errorf("admitting member %s: %w", m.Name, err)
		}
	}
	return nil
}

// found enters policy, members and domain key, and gives the domain key to all.
func (c *Coordinator) found(ctx context.Context, first []Member, p Policy) (*State, error) {
	looked, errs := make([]standing, len(first)), make([]error, len(first))
	together(len(first), func(i int) { looked[i], errs[i] = c.inspect(ctx, first[i]) })
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if err := distinct(looked); err != nil {
		return nil, err
	}
	if err := c.free(ctx, looked); err != nil { // before anything is entered about them
		return nil, err
	}
	s, err := c.decide(ctx, func(s *State) (*Entry, error) {
		if len(s.order) == 0 && !reflect.DeepEqual(s.Policy, p) {
			return entry(eventPolicy, subjectGroup, p)
		}
		for _, l := range looked {
			m, there := s.Member(l.Name)
			if there && !sameToken(m.MemberEntry, l.info) {
				return nil, troubled(KindToken, l.Name, "member %s has token %s, but joined with %s: its token was exchanged or initialised: replace the member", l.Name, l.info.TokenSerial, m.TokenSerial)
			}
		}
		return nil, nil
	})
	if err != nil {
		return nil, err
	}
	for _, l := range looked {
		if s, err = c.decide(ctx, func(s *State) (*Entry, error) {
			if _, there := s.Member(l.Name); there {
				return nil, nil
			}
			return entry(eventMember, l.Name, l.MemberEntry)
		}); err != nil {
			return nil, err
		}
	}
	if p.Driver == DriverExternal {
		return s, nil
	}
	if s, err = c.decide(ctx, func(s *State) (*Entry, error) {
		if s.Domain.Name != "" {
			return nil, nil
		}
		return entry(eventDomain, hsm.NewDomainName(c.cfg.Group), DomainEntry{Origin: first[0].Name})
	}); err != nil {
		return nil, err
	}
	all := c.survey(ctx, s.Members())
	if err := firstTrouble(all); err != nil {
		return nil, err
	}
	for _, m := range all {
		if m.info.KEK != "" && m.info.KEK != s.Domain.Name {
			return nil, troubled(KindDomain, m.Name, "member %s holds domain key %s: its token belongs to another group and must be initialised", m.Name, m.info.KEK)
		}
	}
	if err := c.spread(ctx, s.Domain, all, nil); err != nil {
		return nil, fmt.Errorf("spreading domain key %s: %w", s.Domain.Name, err)
	}
	// As long as there are no keys nobody's approval is needed: now every member learns to know every other.
	all = c.survey(ctx, s.Members())
	for _, m := range all {
		if m.err == nil {
			c.introduce(ctx, s.Domain.Name, m, all, nil)
		}
	}
	return s, nil
}

// inspect looks at a member that is not in the log, and takes its token for the one it joins with.
func (c *Coordinator) inspect(ctx context.Context, m Member) (standing, error) {
	s := standing{GroupMember: GroupMember{Name: m.Name, MemberEntry: MemberEntry{Address: m.Address, Site: m.Site, Standby: m.Standby}}, agent: c.agent(m.Name, m.Address)}
	err := within(ctx, lookTimeout, func(ctx context.Context) (err error) { s.info, err = s.agent.Health(ctx); return err })
	switch {
	case m.Name == "" || m.Address == "":
		return s, fmt.Errorf("member %q at %q: name and address are both needed", m.Name, m.Address)
	case err != nil:
		return s, troubled(KindUnreachable, m.Name, "asking %s at %s for its health: %w", m.Name, m.Address, err)
	case s.info.Member != m.Name:
		return s, troubled(KindUnreachable, m.Name, "%s answers as member %q instead of %s: correct its configuration", m.Address, s.info.Member, m.Name)
	case s.info.Locked != "":
		return s, troubled(KindLocked, m.Name, "member %s is locked (%s): activate it", m.Name, s.info.Locked)
	case !s.info.Probe.OK:
		return s, troubled(KindUnwell, m.Name, "member %s cannot sign: %s", m.Name, s.info.Probe.Cause)
	}
	s.TokenSerial, s.TokenLabel, s.Transport = s.info.TokenSerial, s.info.TokenLabel, s.info.Transport
	_, spki, err := c.transport(ctx, s) // vouched for, and the same
	if err == nil {
		s.Transport = hsm.Fingerprint(spki)
	}
	return s, err
}

// distinct refuses two members with one token.
func distinct(all []standing) error {
	for i := range all {
		for j := range i {
			if sharedToken(all[i].info, all[j].info) {
				return troubled(KindShared, all[i].Name, "members %s and %s share token %s: that is one copy, not two", all[j].Name, all[i].Name, all[i].info.TokenSerial)
			}
		}
	}
	return nil
}

// SetEpoch hands every member that does not have it yet the record of which site writes. What members cannot be reached
// are in the error; the others have it. The first record needs no approval; it comes from the ceremony.
func (c *Coordinator) SetEpoch(ctx context.Context, r hsm.EpochRecord) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	all := c.survey(ctx, s.Members())
	failed := make([]error, len(all))
	together(len(all), func(i int) {
		switch m := all[i]; {
		case m.err != nil:
			failed[i] = m.err
		case m.info.Epoch == r.Epoch && m.info.Site == r.Site:
		default:
			if err := c.call(ctx, stepTimeout, func(ctx context.Context) error { return m.agent.SetEpoch(ctx, r) }); err != nil {
				failed[i] = fmt.Errorf("member %s: %w", m.Name, err)
			}
		}
	})
	if err := errors.Join(failed...); err != nil {
		return fmt.Errorf("setting site epoch %d of group %s: %w", r.Epoch, c.cfg.Group, err)
	}
	return nil
}
