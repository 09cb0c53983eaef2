package hsmsync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"trivet/hsm"
	"trivet/hsmsync/custody"
)

// Restore brings the keys of a backup into a group of which no member holds them any more: one that was set up anew, or
// one whose tokens were all lost and replaced (EnrollRequest.Bare). Keys keep their ids. The backup's domain key was
// outside of tokens, so it never becomes the group's: one member alone holds it, for as long as it takes to bring the
// keys in, and takes the group's domain key after that from another. Unwrap wraps the backup's for that member's
// transport key (DER SPKI). All members are active or standby afterwards, and keys live, but for those that were retired when
// the backup was made, or are so in the log: their copies are restored, and they sign no more. It may be repeated.
func (c *Coordinator) Restore(ctx context.Context, b custody.Bundle, unwrap func(transportSPKI []byte) ([]byte, error)) error {
	if err := c.restore(ctx, b, unwrap); err != nil {
		return fmt.Errorf("restoring group %s: %w", c.cfg.Group, err)
	}
	return nil
}

func (c *Coordinator) restore(ctx context.Context, b custody.Bundle, unwrap func([]byte) ([]byte, error)) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	if err := c.fits(s, b); err != nil {
		return err
	}
	all, err := c.everyone(ctx, s)
	if err != nil {
		return err
	}
	into, err := c.entrance(ctx, b, all)
	if err != nil {
		return err
	}
	if s, all, err = c.shelter(ctx, s, all, into); err != nil {
		return err
	}
	keys, err := c.restored(ctx, b)
	if err != nil {
		return err
	}
	if err := c.unpack(ctx, s, b, all, into, keys, unwrap); err != nil {
		return err
	}
	if all, err = c.everyone(ctx, s); err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(m standing) bool { return m.Name == into })
	for _, m := range all {
		if err := c.copyAll(ctx, c.lacks(ctx, m, keys), s.Domain.Name, all[i:i+1], m); err != nil {
			return err
		}
		if _, err := c.proveAll(ctx, slices.DeleteFunc(slices.Clone(keys), func(k ManifestKey) bool { return k.State == StateRetired }), m); err != nil {
			return err
		}
	}
	proved := map[string]bool{}
	for _, m := range all {
		proved[m.Name] = true
	}
	for _, k := range keys {
		if k.State == StatePending {
			if err := c.goLive(ctx, k.KeyRecord, proved); err != nil {
				return err
			}
		}
	}
	for _, m := range all {
		if m.State == MemberJoining {
			if err := c.admit(ctx, admission{name: m.Name, note: Note{Why: "restored from a backup"}}); err != nil {
				return fmt.Errorf("admitting member %s: %w", m.Name, err)
			}
		}
	}
	c.log.Warn("group restored", "keys", len(keys), "domain", s.Domain.Name)
	return c.confirm(ctx, "every key is live, or retired as it was", func(s *State) bool {
		return !slices.ContainsFunc(keys, func(k ManifestKey) bool {
			now, _ := s.Key(k.ID)
			return now.State != StateLive && (now.State != StateRetired || k.State != StateRetired)
		})
	})
}

// fits refuses a backup of something else, and one that contradicts the log.
func (c *Coordinator) fits(s *State, b custody.Bundle) error {
	if _, err := b.Encode(); err != nil {
		return err
	}
	switch {
	case s.Deleted:
		return errors.New("it was deleted: choose another name")
	case b.Cluster != c.cfg.Identity.Principal().Cluster || b.Group != c.cfg.Group:
		return fmt.Errorf("the backup is of group %s of cluster %s", b.Group, b.Cluster)
	case s.Policy.Driver == DriverExternal:
		return errors.New("the vendor does the cloning in this group: restore it with the vendor's tools")
	}
	for _, k := range s.In(StateLive, StatePending) {
		i := slices.IndexFunc(b.Keys, func(r hsm.KeyRecord) bool { return r.ID == k.ID })
		held, why := b.Holds(k.ID)
		switch {
		case i < 0 && k.State == StateLive:
			return fmt.Errorf("key %s (%s) is live and not in the backup: retire it if it is lost, or find a newer backup", k.ID, k.Label)
		case !held && k.State == StateLive:
			return fmt.Errorf("key %s (%s) is live, and the backup names it without holding it: %s: retire it if it is lost, or find another backup", k.ID, k.Label, why)
		case i >= 0 && len(k.SPKI) > 0 && !bytes.Equal(b.Keys[i].SPKI, k.SPKI):
			return fmt.Errorf("key %s (%s) has another public key in the backup: one of the two is not genuine", k.ID, k.Label)
		}
	}
	return nil
}

// everyone looks at all members, the earliest joined first. Each must be well.
func (c *Coordinator) everyone(ctx context.Context, s *State) ([]standing, error) {
	all := c.survey(ctx, s.in(MemberActive, MemberStandby, MemberJoining))
	if err := firstTrouble(all); err != nil {
		return nil, fmt.Errorf("every member must be there, or removed: %w", err)
	}
	if n := max(2, s.Policy.MinCopies); len(all) < n {
		return nil, fmt.Errorf("its members are %d; %d copies of a key are needed: set it up, or replace its members, first", len(all), n)
	}
	slices.SortStableFunc(all, func(a, b standing) int { return int(a.Joined) - int(b.Joined) })
	return all, nil
}

// entrance is the name of the member through which the keys come in: the one that an earlier attempt has begun with, or
// the first that holds none.
func (c *Coordinator) entrance(ctx context.Context, b custody.Bundle, all []standing) (string, error) {
	for _, m := range all {
		if holds(m.info, b.Domain) {
			return m.Name, nil
		}
	}
	into := all[0].Name
	for _, m := range all {
		has, err := c.inventory(ctx, m)
		if err != nil {
			return "", err
		}
		for id := range has {
			if !slices.ContainsFunc(b.Keys, func(k hsm.KeyRecord) bool { return k.ID == id }) {
				return "", fmt.Errorf("member %s holds key %s, which is not in the backup: keys are restored into tokens that hold none", m.Name, id)
			}
			into = m.Name
		}
		if len(has) > 0 {
			break
		}
	}
	return into, nil
}

// shelter has every member but the one through which the keys come in hold a domain key that one of them made: the
// group's, or a new one where all tokens that held it are gone.
func (c *Coordinator) shelter(ctx context.Context, s *State, all []standing, into string) (*State, []standing, error) {
	others := slices.DeleteFunc(slices.Clone(all), func(m standing) bool { return m.Name == into })
	kept := slices.ContainsFunc(all, func(m standing) bool { return s.Domain.Name != "" && holds(m.info, s.Domain.Name) })
	domain := s.Domain
	if !kept {
		var err error
		if s, err = c.decide(ctx, func(s *State) (*Entry, error) {
			if s.Rotate.Name != "" {
				return nil, nil // an earlier attempt has entered it
			}
			return entry(eventDomain, hsm.NewDomainName(c.cfg.Group), DomainEntry{Origin: others[0].Name})
		}); err != nil {
			return nil, nil, err
		}
		if domain = s.Rotate; domain.Name == "" {
			domain = s.Domain
		}
	}
	if err := c.spread(ctx, domain, others, nil); err != nil {
		return nil, nil, fmt.Errorf("spreading domain key %s: %w", domain.Name, err)
	}
	s, err := c.decide(ctx, func(s *State) (*Entry, error) {
		if s.Domain.Name == domain.Name {
			return nil, nil
		}
		return entry(eventRotated, domain.Name, Note{Why: "no token is left that held the former one; restored from a backup"})
	})
	if err != nil {
		return nil, nil, err
	}
	if all, err = c.everyone(ctx, s); err != nil {
		return nil, nil, err
	}
	for _, to := range all { // as long as they hold no key, nobody's approval is needed
		c.introduce(ctx, s.Domain.Name, to, all, nil)
	}
	return s, all, nil
}

// restored enters the backup's keys where the log does not know them, as pending, and those that were retired as retired; it
// lists those that are to be brought back.
func (c *Coordinator) restored(ctx context.Context, b custody.Bundle) ([]ManifestKey, error) {
	var out []ManifestKey
	for _, k := range b.Keys {
		if held, why := b.Holds(k.ID); !held {
			c.log.Warn("the backup does not hold a key that it names", "key", k.ID, "label", k.Label, "why", why)
			continue
		}
		var now ManifestKey
		for settled := false; !settled; {
			s, err := c.decide(ctx, func(s *State) (*Entry, error) {
				var known bool
				now, known = s.Key(k.ID)
				settled = known && (now.State != StatePending || !b.IsRetired(k.ID))
				switch {
				case !known:
					return entry(string(StatePending), string(k.ID), pendingEntry{KeyRecord: k})
				case !settled: // it never signs between the two
					return entry(string(StateRetired), string(k.ID), Note{Why: "restored from a backup as it was"})
				}
				return nil, nil
			})
			if err != nil {
				return nil, err
			}
			now, _ = s.Key(k.ID)
		}
		if now.State == StatePending || now.State == StateLive || now.State == StateRetired {
			now.KeyRecord = k
			out = append(out, now)
		}
	}
	return out, nil
}

// lacks lists the keys that a member does not hold.
func (c *Coordinator) lacks(ctx context.Context, m standing, keys []ManifestKey) []ManifestKey {
	has, err := c.inventory(ctx, m)
	if err != nil {
		return keys // bringing a key that is there changes nothing
	}
	return slices.DeleteFunc(slices.Clone(keys), func(k ManifestKey) bool {
		got, ok := has[k.ID]
		return ok && differs(m.Name, k.KeyRecord, got) == nil
	})
}

// unpack imports the backup's blobs into one member, which holds the backup's domain key meanwhile and no longer.
func (c *Coordinator) unpack(ctx context.Context, s *State, b custody.Bundle, all []standing, into string, keys []ManifestKey, unwrap func([]byte) ([]byte, error)) error {
	m := all[slices.IndexFunc(all, func(m standing) bool { return m.Name == into })]
	do := func(what, kek string, act func(ctx context.Context) error) error {
		if err := c.call(ctx, stepTimeout, act); err != nil {
			return fmt.Errorf("%s %s on %s: %w", what, kek, m.Name, err)
		}
		m = c.look(ctx, m.GroupMember)
		return m.err
	}
	drop := func(kek string) error {
		return do("dropping domain key", kek, func(ctx context.Context) error { return m.agent.DropDomain(ctx, kek) })
	}
	if missing := c.lacks(ctx, m, keys); len(missing) > 0 {
		if m.info.KEK != b.Domain {
			// It takes a domain key from outside only while it holds none.
			for _, kek := range []string{m.info.NextKEK, m.info.KEK} {
				if kek == "" {
					continue
				}
				if err := drop(kek); err != nil {
					return err
				}
			}
			_, to, err := c.transport(ctx, m)
			if err != nil {
				return err
			}
			wrapped, err := unwrap(to)
			if err != nil {
				return fmt.Errorf("opening the backup's domain key: %w", err)
			}
			if err := do("importing the backup's domain key", b.Domain, func(ctx context.Context) error { return m.agent.ImportDomain(ctx, b.Domain, wrapped) }); err != nil {
				return err
			}
			// While it holds no key it may give its domain key to anyone, and from then on to those that it knows.
			for _, to := range all {
				c.introduce(ctx, b.Domain, to, []standing{m}, nil)
			}
		}
		done := c.counts("restore", m.Name, len(missing))
		if err := each(ctx, copyAtOnce, missing, func(ctx context.Context, k ManifestKey) error {
			i := slices.IndexFunc(b.Blobs, func(blob hsm.Blob) bool { return blob.ID == k.ID })
			err := c.bring(ctx, k.KeyRecord, b.Blobs[i], m)
			if err == nil {
				done()
			}
			return err
		}); err != nil {
			return err
		}
	}
	if !holds(m.info, s.Domain.Name) {
		if err := c.carry(ctx, s.Domain.Name, m, all, nil); err != nil {
			return err
		}
		if m = c.look(ctx, m.GroupMember); m.err != nil {
			return m.err
		}
	}
	if m.info.KEK != s.Domain.Name {
		if err := do("rotating to domain key", s.Domain.Name, func(ctx context.Context) error { return m.agent.Rotate(ctx, s.Domain.Name) }); err != nil {
			return err
		}
	}
	if m.info.NextKEK == b.Domain && b.Domain != s.Domain.Name {
		return drop(b.Domain)
	}
	return nil
}
