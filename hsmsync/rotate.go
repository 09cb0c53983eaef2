package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"trivet/hsm"
)

// RotateDomain gives the group a new domain key: entered as the next one, made by one member,
// carried to all others, tried out with a key, entered as the group's, made current by every member, and the old one
// dropped. Every member that was not drained must be well. One that is drained keeps the old one and receives the new
// one when it comes back. A rotation that was interrupted is finished first, and by that alone when all that was left is
// dropping the old one. Grants (hsm-enroll) are needed only for members whose transport key the giving one does not know.
func (c *Coordinator) RotateDomain(ctx context.Context, grants ...[]byte) error {
	if err := c.rotate(ctx, grants); err != nil {
		return fmt.Errorf("rotating the domain key of group %s: %w", c.cfg.Group, err)
	}
	return nil
}

func (c *Coordinator) rotate(ctx context.Context, grants [][]byte) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	if s.Policy.Driver == DriverExternal {
		return errors.New("the vendor does the cloning in this group, with keys of its own: rotate them with the vendor's tools")
	}
	if s.Domain.Name == "" {
		return errors.New("the group has none yet: set it up first")
	}
	all, err := c.present(ctx, s)
	if err != nil {
		return err
	}
	if s.Rotate.Name == "" {
		unfinished := slices.ContainsFunc(all, func(m standing) bool { return m.info.KEK != s.Domain.Name || m.info.NextKEK != "" })
		if unfinished {
			return c.settle(ctx, s, all, grants)
		}
		if s, err = c.decide(ctx, func(s *State) (*Entry, error) {
			if s.Rotate.Name != "" {
				return nil, nil // another coordinator has begun it
			}
			return entry(eventDomain, hsm.NewDomainName(c.cfg.Group), DomainEntry{Origin: serving(all, s.Domain)[0].Name})
		}); err != nil {
			return err
		}
	}
	next := s.Rotate.Name
	if err := c.spread(ctx, s.Rotate, all, grants); err != nil {
		return fmt.Errorf("spreading domain key %s: %w", next, err)
	}
	if all, err = c.present(ctx, s); err != nil {
		return err
	}
	if err := c.try(ctx, s, next, all); err != nil {
		return fmt.Errorf("trying out domain key %s: %w", next, err)
	}
	if s, err = c.decide(ctx, func(s *State) (*Entry, error) {
		if s.Domain.Name == next {
			return nil, nil
		}
		// A member that came meanwhile must hold it, too.
		for _, m := range s.in(MemberActive, MemberStandby) {
			if !slices.ContainsFunc(all, func(a standing) bool { return a.Name == m.Name && a.Joined == m.Joined }) {
				return nil, fmt.Errorf("member %s has joined meanwhile: repeat the rotation, which goes on from here", m.Name)
			}
		}
		return entry(eventRotated, next, Note{})
	}); err != nil {
		return err
	}
	if err := c.confirm(ctx, "domain key "+next+" is the group's", func(s *State) bool { return s.Domain.Name == next }); err != nil {
		return err
	}
	c.log.Info("domain key rotated", "domain", next)
	return c.settle(ctx, s, all, grants)
}

// present looks at the members that serve; all must be well, and there must be one. Those that are joining receive the
// domain key of the time when they are admitted.
func (c *Coordinator) present(ctx context.Context, s *State) ([]standing, error) {
	all := c.survey(ctx, s.in(MemberActive, MemberStandby))
	if err := firstTrouble(all); err != nil {
		return nil, fmt.Errorf("every member must be there, or drained: %w", err)
	}
	if len(all) == 0 {
		return nil, errors.New("no member serves")
	}
	return all, nil
}

// settle has every member hold the group's domain key alone.
func (c *Coordinator) settle(ctx context.Context, s *State, all []standing, grants [][]byte) error {
	sources := serving(all, s.Domain)
	return each(ctx, len(all), all, func(ctx context.Context, m standing) error {
		_, err := c.level(ctx, s, m, sources, grants)
		return err
	})
}

// spread brings a domain key to every member: made by its origin unless somebody has it already.
func (c *Coordinator) spread(ctx context.Context, d Domain, all []standing, grants [][]byte) error {
	has := func(m standing) bool { return holds(m.info, d.Name) }
	sources := slices.DeleteFunc(slices.Clone(all), func(m standing) bool { return !has(m) })
	if len(sources) == 0 {
		i := slices.IndexFunc(all, func(m standing) bool { return m.Name == d.Origin })
		if i < 0 {
			return fmt.Errorf("nobody holds it, and member %s, which is to make it, is not there: bring it back", d.Origin)
		}
		if err := c.call(ctx, stepTimeout, func(ctx context.Context) error { return all[i].agent.GenerateDomain(ctx, d.Name) }); err != nil {
			return fmt.Errorf("generating it on %s: %w", d.Origin, err)
		}
		m := c.look(ctx, all[i].GroupMember)
		if m.err != nil {
			return m.err
		}
		if !has(m) {
			return troubled(KindDomain, m.Name, "member %s has generated it, but says that it holds %q and %q", m.Name, m.info.KEK, m.info.NextKEK)
		}
		all[i], sources = m, []standing{m}
	}
	done := c.counts("domain", "", len(all)-len(sources))
	return each(ctx, len(all), all, func(ctx context.Context, m standing) error {
		if has(m) {
			return nil
		}
		err := c.carry(ctx, d.Name, m, sources, grants)
		if err == nil {
			done()
		}
		return err
	})
}

// try has every member take in a key that it holds already, wrapped with the domain key called kek by another member: it
// is refused unless both have the very same domain key.
func (c *Coordinator) try(ctx context.Context, s *State, kek string, all []standing) error {
	keys := s.In(StateLive)
	i := slices.IndexFunc(keys, func(k ManifestKey) bool { return k.Algorithm.Cloneable() && !k.NonExtractable })
	if i < 0 {
		return nil // nothing to try it with, and nothing to lose
	}
	sources := serving(all, Domain{Name: kek})
	if len(sources) == 0 {
		return errors.New("no member that serves holds it")
	}
	b, err := c.export(ctx, keys[i].KeyRecord, kek, sources)
	if err != nil {
		return err
	}
	return each(ctx, len(all), all, func(ctx context.Context, m standing) error {
		return c.bring(ctx, keys[i].KeyRecord, b, m)
	})
}
