package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"trivet/hsm"
)

// EnrollRequest says which HSM joins, and how.
type EnrollRequest struct {
	Name, Address, Site string
	// Standby makes it one that serves only when no active member can.
	Standby bool
	// Grant is the approval of EnrollAct; it may be missing while the group has no keys.
	Grant []byte
	// Epoch is the promotion record with its approval, for a group whose site epoch is above 1; the first one comes from
	// the other members.
	Epoch *hsm.EpochRecord
	// Bare enters a replaced member without keys, where no other member is left that could give it any: Restore does.
	Bare bool
	Why  string
}

// Inspect looks at an HSM that is to join: what it says of itself, and the fingerprint of its transport key, which an
// hsmd of this cluster and name vouches for, for people to compare and approve (EnrollAct). It changes nothing.
func (c *Coordinator) Inspect(ctx context.Context, name, address string) (hsm.Info, string, error) {
	m, err := c.inspect(ctx, Member{Name: name, Address: address})
	if err != nil {
		return hsm.Info{}, "", fmt.Errorf("inspecting member %s: %w", name, err)
	}
	return m.info, m.Transport, nil
}

// Enroll takes a new member in: entered as joining with its token and the approval, given the domain key and a copy of
// every live and retired key, made to prove every live one, entered as active or standby. It serves from then on and no
// sooner. A key that becomes live meanwhile is brought to it as well. Repeating it after an interruption goes on from
// what the member holds.
func (c *Coordinator) Enroll(ctx context.Context, r EnrollRequest) error {
	if err := c.enroll(ctx, r); err != nil {
		return fmt.Errorf("enrolling member %s into group %s: %w", r.Name, c.cfg.Group, err)
	}
	return nil
}

func (c *Coordinator) enroll(ctx context.Context, r EnrollRequest) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	m, err := c.candidate(ctx, s, r)
	if err != nil {
		return err
	}
	if old, there := s.Member(r.Name); there {
		switch {
		case !sameToken(old.MemberEntry, m.info):
			return troubled(KindToken, r.Name, "a member of that name joined with token %s (transport key %.16s…), this is token %s (%.16s…): replace the member", old.TokenSerial, old.Transport, m.TokenSerial, m.Transport)
		case old.Address != r.Address:
			return fmt.Errorf("it joined at %s, not %s: replace the member, which moves it", old.Address, r.Address)
		case old.State != MemberJoining:
			return nil // it was enrolled; what it is now is another matter
		}
	} else if err := c.enter(ctx, s, r, m); err != nil {
		return err
	}
	if r.Bare {
		return nil
	}
	a := admission{name: r.Name, note: Note{Why: r.Why}, epoch: r.Epoch}
	if len(r.Grant) > 0 {
		a.grants = [][]byte{r.Grant}
	}
	return c.admit(ctx, a)
}

// candidate looks at the HSM that wants to join, and refuses a token that is in the group already.
func (c *Coordinator) candidate(ctx context.Context, s *State, r EnrollRequest) (standing, error) {
	if s.Deleted {
		return standing{}, errors.New("the group was deleted")
	}
	m, err := c.inspect(ctx, Member{Name: r.Name, Address: r.Address, Site: r.Site, Standby: r.Standby})
	if err != nil {
		return m, err
	}
	if err := c.elsewhere(ctx, m); err != nil {
		return m, err
	}
	if g := hsm.DomainGroup(m.info.KEK); g != "" && g != c.cfg.Group {
		return m, troubled(KindDomain, m.Name, "token %s holds a domain key of group %s (%s): an HSM is in one group; initialise it", m.TokenSerial, g, m.info.KEK)
	}
	others := slices.DeleteFunc(s.Members(), func(o GroupMember) bool { return o.Name == r.Name })
	for _, o := range others {
		if sameToken(o.MemberEntry, m.info) || o.Transport != "" && o.Transport == m.Transport || image(o.TokenSerial, o.Transport, m.info) {
			return m, troubled(KindShared, m.Name, "members %s and %s share token %s: that is one copy, not two", o.Name, m.Name, m.TokenSerial)
		}
	}
	return m, nil
}

// enter enters a member as joining, with its token and the approval.
func (c *Coordinator) enter(ctx context.Context, s *State, r EnrollRequest, m standing) error {
	evidence, err := c.evidence(s, r, m)
	if err != nil {
		return err
	}
	m.MemberEntry.Approved = evidence
	_, err = c.decide(ctx, func(s *State) (*Entry, error) {
		if old, there := s.Member(r.Name); there {
			if !sameToken(old.MemberEntry, m.info) || old.Address != r.Address {
				return nil, fmt.Errorf("another coordinator has entered a member of that name with token %s at %s", old.TokenSerial, old.Address)
			}
			return nil, nil
		}
		return entry(eventMember, r.Name, m.MemberEntry)
	})
	return err
}

// evidence checks the approval for letting a token in.
func (c *Coordinator) evidence(s *State, r EnrollRequest, m standing) (Approved, error) {
	act := c.EnrollAct(r.Name, m.Transport)
	if len(r.Grant) == 0 && len(s.order) == 0 {
		return Approved{}, nil
	}
	return c.approved(r.Grant, act)
}

// admission says how a member that is in the log comes to serve.
type admission struct {
	name   string
	state  MemberState // empty: as it was, or was meant to be
	note   Note
	grants [][]byte
	epoch  *hsm.EpochRecord
}

// admit brings a member level with the group and enters it as active or standby, at the very position up to which it has
// proved every live key: one that became live at that position makes it read again and prove that one, too.
func (c *Coordinator) admit(ctx context.Context, a admission) error {
	proved, incarnation := map[hsm.KeyID]bool{}, ""
	var has map[hsm.KeyID]hsm.KeyRecord
	for {
		s, err := c.State(ctx)
		if err != nil {
			return err
		}
		gm, ok := s.Member(a.name)
		switch {
		case !ok:
			return errors.New("it was removed meanwhile")
		case s.Deleted:
			return errors.New("the group was deleted")
		}
		want := a.state
		if want == "" {
			want = MemberActive
			if gm.Standby {
				want = MemberStandby
			}
		}
		if gm.State == want {
			return nil
		}
		m, sources, err := c.ready(ctx, s, gm, a)
		if err != nil {
			return err
		}
		if m.info.Incarnation != incarnation {
			has, incarnation = nil, m.info.Incarnation
			clear(proved)
		}
		if has == nil {
			if has, err = c.inventory(ctx, m); err != nil {
				return err
			}
		}
		if err := c.complete(ctx, s, m, sources, has); err != nil {
			return err
		}
		live := slices.DeleteFunc(s.In(StateLive), func(k ManifestKey) bool { return proved[k.ID] })
		if _, err := c.proveAll(ctx, live, m); err != nil {
			return err
		}
		for _, k := range live {
			proved[k.ID] = true
		}
		e, err := entry(eventOf(want), a.name, a.note)
		if err != nil {
			return err
		}
		switch err := c.append(ctx, s, *e); {
		case err == nil:
			c.log.Info("member serves", "member", a.name, "state", want, "keys", len(proved))
			return c.confirm(ctx, fmt.Sprintf("member %s is %s", a.name, want), func(s *State) bool {
				m, _ := s.Member(a.name)
				return m.State == want && m.Joined == gm.Joined
			})
		case !errors.Is(err, ErrTaken):
			return err
		}
	}
}

func eventOf(s MemberState) string {
	return map[MemberState]string{MemberActive: eventActive, MemberStandby: eventStandby, MemberDrained: eventDrain, MemberRemoved: eventRemove}[s]
}

// ready has a member hold the group's domain key and site epoch. It returns the member as it is then, and those it can
// be given keys by.
func (c *Coordinator) ready(ctx context.Context, s *State, gm GroupMember, a admission) (m standing, sources []standing, err error) {
	all := c.survey(ctx, s.Members())
	i := slices.IndexFunc(all, func(m standing) bool { return m.Name == gm.Name })
	if m = all[i]; m.err != nil {
		return m, nil, m.err
	}
	sources = serving(slices.Delete(slices.Clone(all), i, i+1), s.Domain)
	c.remind(ctx, s, m)
	fresh := m.info.KEK == ""
	if m, err = c.level(ctx, s, m, sources, a.grants); err != nil {
		return m, nil, err
	}
	if fresh && s.Domain.Name != "" {
		c.introduce(ctx, s.Domain.Name, m, sources, a.grants)
	}
	switch theirs := epochOf(sources); {
	case len(sources) == 0 || m.info.Epoch == theirs.Epoch:
		return m, sources, nil
	case m.info.Epoch == 0 && theirs.Epoch == 1:
		err = c.call(ctx, stepTimeout, func(ctx context.Context) error {
			return m.agent.SetEpoch(ctx, hsm.EpochRecord{Site: theirs.Site, Epoch: theirs.Epoch})
		})
	case a.epoch != nil && a.epoch.Epoch == theirs.Epoch:
		err = c.call(ctx, stepTimeout, func(ctx context.Context) error { return m.agent.SetEpoch(ctx, *a.epoch) })
	default:
		err = troubled(KindEpoch, m.Name, "it is at site epoch %d, the others are at %d (%s writes): give it that promotion record, with its approval", m.info.Epoch, theirs.Epoch, theirs.Site)
	}
	if err == nil {
		m = c.look(ctx, gm)
		err = m.err
	}
	return m, sources, err
}

// complete brings a member every live and retired key that it lacks. Has is what it holds, and is brought up to date.
func (c *Coordinator) complete(ctx context.Context, s *State, m standing, sources []standing, has map[hsm.KeyID]hsm.KeyRecord) error {
	keys := s.In(StateLive, StateRetired)
	if s.Policy.Driver == DriverExternal {
		now, err := c.arrive(ctx, s.In(StateLive), m)
		maps.Copy(has, now)
		return err
	}
	var live, retired []ManifestKey
	for _, k := range keys {
		got, ok := has[k.ID]
		if ok {
			err := differs(m.Name, k.KeyRecord, got)
			if err == nil {
				continue
			}
			if kindOf(err) != KindFaulty { // importing it again completes a key that was half imported
				return err
			}
		}
		if k.State == StateLive {
			live = append(live, k)
		} else {
			retired = append(retired, k)
		}
	}
	if err := c.copyAll(ctx, live, s.Domain.Name, sources, m); err != nil {
		return err
	}
	for _, k := range retired {
		// One of which no copy is left must not keep new members out.
		if err := c.copyAll(ctx, []ManifestKey{k}, s.Domain.Name, sources, m); err != nil {
			if ctx.Err() != nil || kindOf(err) == KindDiffers {
				return err
			}
			c.log.Warn("a retired key was not copied", "member", m.Name, "key", k.ID, "label", k.Label, "error", err)
		}
	}
	for _, k := range keys {
		has[k.ID] = k.KeyRecord
	}
	return nil
}

// Replace gives a member another token, or another address: removed and enrolled again in one go. It is for a token that
// was lost, exchanged or initialised, so the old one is not asked. As long as other members serve, their number does not
// matter.
func (c *Coordinator) Replace(ctx context.Context, r EnrollRequest) error {
	if err := c.replace(ctx, r); err != nil {
		return c.failedTo("replacing", r.Name, err)
	}
	return nil
}

func (c *Coordinator) replace(ctx context.Context, r EnrollRequest) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	m, err := c.candidate(ctx, s, r)
	if err != nil {
		return err
	}
	old, there := s.Member(r.Name)
	if there && (!sameToken(old.MemberEntry, m.info) || old.Address != r.Address) {
		// All that can be refused is refused before the old one goes.
		if _, err := c.evidence(s, r, m); err != nil {
			return err
		}
		if m.info.KEK != "" && m.info.KEK != s.Domain.Name {
			return troubled(KindDomain, m.Name, "its token holds domain key %s, which is not the group's: initialise it", m.info.KEK)
		}
		others := slices.DeleteFunc(s.in(MemberActive, MemberStandby), func(m GroupMember) bool { return m.Name == r.Name })
		nobody := len(serving(c.survey(ctx, others), s.Domain)) == 0
		switch {
		case nobody && !r.Bare && len(s.In(StateLive)) > 0:
			return errors.New("no other member serves, so that nobody could give it the keys: replace all members bare, and restore the group from its backup")
		case r.Bare && !nobody:
			return errors.New("other members serve, which give it the keys: it need not be bare")
		}
		why := strings.TrimSpace("replaced by token " + m.TokenSerial + " at " + r.Address + ". " + r.Why)
		if _, err := c.decide(ctx, func(s *State) (*Entry, error) {
			if now, there := s.Member(r.Name); !there || now.Joined != old.Joined {
				return nil, nil
			}
			return entry(eventRemove, r.Name, Note{Why: why})
		}); err != nil {
			return err
		}
	}
	return c.enroll(ctx, r)
}
