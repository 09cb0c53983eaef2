package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"trivet/hsm"
	"trivet/hsm/agent"
)

// carry brings the domain key called kek to a member from the first of the sources that gives it away. The receiving
// token has the transport key with which it joined; each source checks for itself that an hsmd of the cluster vouches for
// it, and wants one of the grants unless it knows it already.
func (c *Coordinator) carry(ctx context.Context, kek string, to standing, sources []standing, grants [][]byte) error {
	transport, _, err := c.transport(ctx, to)
	if err != nil {
		return err
	}
	grants = c.withOwn(grants, to)
	var failed []error
	for _, from := range sources {
		if from.Name == to.Name || !holds(from.info, kek) {
			continue
		}
		wrapped, err := c.exportDomain(ctx, from, hsm.DomainRequest{Group: c.cfg.Group, KEK: kek, Recipient: transport}, grants)
		if err != nil {
			failed = append(failed, fmt.Errorf("exporting domain key %s from %s for %s: %w", kek, from.Name, to.Name, err))
			continue
		}
		err = c.call(ctx, stepTimeout, func(ctx context.Context) error { return to.agent.ImportDomain(ctx, kek, wrapped) })
		if err != nil {
			return fmt.Errorf("importing domain key %s into %s: %w", kek, to.Name, err)
		}
		return nil
	}
	if len(failed) == 0 {
		return fmt.Errorf("carrying domain key %s to %s: no member that serves holds it", kek, to.Name)
	}
	return errors.Join(failed...)
}

// introduce has every source learn to know a new member's transport key while the approval for it is in force, so that
// any of them may hand it the next domain key. Not all need to succeed.
func (c *Coordinator) introduce(ctx context.Context, kek string, to standing, sources []standing, grants [][]byte) {
	transport, _, err := c.transport(ctx, to)
	if err != nil {
		return
	}
	grants = c.withOwn(grants, to)
	for _, from := range sources {
		if from.Name == to.Name || !holds(from.info, kek) {
			continue
		}
		if _, err := c.exportDomain(ctx, from, hsm.DomainRequest{Group: c.cfg.Group, KEK: kek, Recipient: transport}, grants); err != nil {
			c.log.Warn("a member did not learn to know another one's transport key; it may want an approval when the domain key is rotated",
				"member", from.Name, "other", to.Name, "error", err)
		}
	}
}

// withOwn adds the approval with which the member joined, as long as it is in force: an agent that once had keys wants it
// also when its token has lost them all.
func (c *Coordinator) withOwn(grants [][]byte, to standing) [][]byte {
	if g := to.Approved.grant(c.cfg.Now()); len(g) > 0 {
		return append(slices.Clone(grants), g)
	}
	return grants
}

// exportDomain asks with each approval in turn, and then without, since most often none is needed.
func (c *Coordinator) exportDomain(ctx context.Context, from standing, req hsm.DomainRequest, grants [][]byte) (wrapped []byte, err error) {
	for _, req.Grant = range append(slices.Clone(grants), nil) {
		err = c.call(ctx, stepTimeout, func(ctx context.Context) error {
			var kek string
			wrapped, kek, err = from.agent.ExportDomain(ctx, req)
			if err == nil && kek != req.KEK {
				err = fmt.Errorf("member %s exported domain key %s instead of %s", from.Name, kek, req.KEK)
			}
			return err
		})
		if codeOf(err) != hsm.CodeApproval {
			break
		}
	}
	return wrapped, err
}

func codeOf(err error) string {
	var e *hsm.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// transport is a member's transport key, as its agent vouches for it and as it is. It must be the one it joined with.
func (c *Coordinator) transport(ctx context.Context, m standing) (attested, spki []byte, err error) {
	err = c.call(ctx, stepTimeout, func(ctx context.Context) (err error) { attested, err = m.agent.TransportKey(ctx); return err })
	if err != nil {
		return nil, nil, fmt.Errorf("asking %s for its transport key: %w", m.Name, err)
	}
	spki, by, err := agent.TransportSPKI(c.cfg.Identity, attested, c.cfg.Now())
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("checking the transport key of %s: %w", m.Name, err)
	case by != m.Name:
		return nil, nil, troubled(KindToken, m.Name, "the transport key of %s is vouched for by member %s", m.Name, by)
	case m.Transport != "" && hsm.Fingerprint(spki) != m.Transport:
		return nil, nil, troubled(KindToken, m.Name, "member %s has transport key %s, but joined with %s: its token was exchanged or initialised: replace the member", m.Name, hsm.Fingerprint(spki), m.Transport)
	}
	return attested, spki, nil
}

// level makes a member's domain keys those of the log: it holds the current one, the next one while there is one, and no
// other. It returns what the member says then.
func (c *Coordinator) level(ctx context.Context, s *State, m standing, sources []standing, grants [][]byte) (standing, error) {
	if s.Policy.Driver == DriverExternal || s.Domain.Name == "" {
		return m, nil // the vendor's business
	}
	want, next, known := s.Domain.Name, s.Rotate.Name, func(kek string) bool {
		return kek == s.Domain.Name || kek == s.Rotate.Name || slices.ContainsFunc(s.Former, func(d Domain) bool { return d.Name == kek })
	}
	for _, kek := range []string{m.info.KEK, m.info.NextKEK} {
		if kek != "" && !known(kek) {
			return m, troubled(KindDomain, m.Name, "member %s holds domain key %s, which was never the group's: its token belongs to another group and must be initialised, then the member replaced", m.Name, kek)
		}
	}
	again := func() (err error) {
		m = c.look(ctx, m.GroupMember)
		return m.err
	}
	do := func(what string, act func(context.Context) error) error {
		if err := c.call(ctx, stepTimeout, act); err != nil {
			return fmt.Errorf("%s on %s: %w", what, m.Name, err)
		}
		return again()
	}
	drop := func(kek string) error {
		return do("dropping domain key "+kek, func(ctx context.Context) error { return m.agent.DropDomain(ctx, kek) })
	}
	// A rotation that was given up leaves a next key behind that is no longer wanted; it is in the way of any other.
	if m.info.NextKEK != "" && m.info.NextKEK != want && m.info.NextKEK != next {
		if err := drop(m.info.NextKEK); err != nil {
			return m, err
		}
	}
	if !holds(m.info, want) {
		if err := c.carry(ctx, want, m, sources, grants); err != nil {
			return m, err
		}
		if err := again(); err != nil {
			return m, err
		}
	}
	if m.info.KEK != want {
		old := m.info.KEK
		if err := do("rotating to domain key "+want, func(ctx context.Context) error { return m.agent.Rotate(ctx, want) }); err != nil {
			return m, err
		}
		if m.info.NextKEK == old && old != "" {
			if err := drop(old); err != nil {
				return m, err
			}
		}
	}
	if next != "" && m.info.NextKEK != next && slices.ContainsFunc(sources, func(f standing) bool { return f.Name != m.Name && holds(f.info, next) }) {
		if err := c.carry(ctx, next, m, sources, grants); err != nil {
			return m, err
		}
		if err := again(); err != nil {
			return m, err
		}
	}
	if m.info.KEK != want {
		return m, troubled(KindDomain, m.Name, "member %s holds domain key %q instead of %s", m.Name, m.info.KEK, want)
	}
	return m, nil
}
