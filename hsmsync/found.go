package hsmsync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"trivet/hsm"
	"trivet/identity"
)

// Actions that need approval.
const (
	ActCreateGroup = "hsm-group-create"
	ActDeleteGroup = "hsm-group-delete"
)

var groupForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)

// CheckGroupName refuses a name that no group may have: it is part of names in tokens, of approvals, and of the name of its
// own lease.
func CheckGroupName(name string) error {
	if len(name) > maxGroup || !groupForm.MatchString(name) {
		return fmt.Errorf("group name %.40q: want 1 to %d lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit", name, maxGroup)
	}
	return nil
}

// Founding is what a group begins with.
type Founding struct {
	Members []Member
	Policy  Policy // zero fields mean their defaults
	// Epoch is the promotion record that the members learn, with its approval where it is not the first. Nil: none.
	Epoch *hsm.EpochRecord
	Why   string
}

// Candidate is a member of a group that is to be, as it answered.
type Candidate struct {
	Member
	TokenSerial string `json:"token_serial"`
	TokenLabel  string `json:"token_label"`
	Transport   string `json:"transport"` // fingerprint of its transport key
}

// CreateAct is the act of beginning a group: with its members, each with the fingerprint of its transport key as people have
// compared it, and its policy. The members are asked for it; nothing is changed.
func (c *Coordinator) CreateAct(ctx context.Context, f Founding) (Act, []Candidate, error) {
	a, all, err := c.createAct(ctx, f)
	if err != nil {
		return a, nil, fmt.Errorf("creating group %s: %w", c.cfg.Group, err)
	}
	return a, all, nil
}

func (c *Coordinator) createAct(ctx context.Context, f Founding) (Act, []Candidate, error) {
	p := f.Policy.defaults()
	if err := errors.Join(CheckGroupName(c.cfg.Group), p.Check(), f.check(p)); err != nil {
		return Act{}, nil, err
	}
	looked, errs := make([]standing, len(f.Members)), make([]error, len(f.Members))
	together(len(f.Members), func(i int) { looked[i], errs[i] = c.inspect(ctx, f.Members[i]) })
	if err := errors.Join(append(errs, distinct(looked))...); err != nil {
		return Act{}, nil, err
	}
	if err := c.free(ctx, looked); err != nil {
		return Act{}, nil, err
	}
	policy, err := json.Marshal(p)
	if err != nil {
		return Act{}, nil, err
	}
	detail := map[string]string{"policy": string(policy), "why": f.Why}
	var all []Candidate
	for i, l := range looked {
		as := "active"
		if l.Standby {
			as = "standby"
		}
		if l.Site != "" {
			as += ", site " + l.Site
		}
		detail[founder+l.Name] = fmt.Sprintf("%s, %s, transport %s", l.Address, as, l.Transport)
		all = append(all, Candidate{f.Members[i], l.TokenSerial, l.TokenLabel, l.Transport})
	}
	return Act{ActCreateGroup, c.cfg.Group, detail}, all, nil
}

// check refuses members that cannot keep the policy.
func (f Founding) check(p Policy) error {
	serve := 0
	for _, m := range f.Members {
		if !m.Standby {
			serve++
		}
	}
	switch {
	case len(f.Members) < p.MinCopies:
		return fmt.Errorf("min_copies %d: of %d members no key could be made: name more", p.MinCopies, len(f.Members))
	case serve == 0:
		return errors.New("every member is a standby: one at least must be active")
	case p.Creation == CreationMaster && !slices.ContainsFunc(f.Members, func(m Member) bool { return m.Name == p.Master && !m.Standby }):
		return fmt.Errorf("master %q is no active member", p.Master)
	}
	return nil
}

// CreateGroup begins a group, as people have approved (CreateAct): it enters the approval, sets the group up (Setup) and has
// its members learn the site epoch. The name must be new, or that of a group that was begun and not finished (State.Unfinished):
// repeating it with the same approval goes on from what is there; so does a new one, be it for the same or for other members, if
// it names all that have been entered.
func (c *Coordinator) CreateGroup(ctx context.Context, f Founding, grant []byte) error {
	if err := c.createGroup(ctx, f, grant); err != nil {
		return fmt.Errorf("creating group %s: %w", c.cfg.Group, err)
	}
	return nil
}

func (c *Coordinator) createGroup(ctx context.Context, f Founding, grant []byte) error {
	act, _, err := c.createAct(ctx, f)
	if err != nil {
		return err
	}
	evidence, err := c.whole(grant, act)
	if err != nil {
		return err
	}
	if _, err := c.decide(ctx, func(s *State) (*Entry, error) {
		unfinished := len(s.Unfinished()) > 0
		switch {
		case s.Deleted:
			return nil, errors.New("it was deleted, and its name is not used again: choose another")
		case s.Next == 1:
			return entry(eventCreated, subjectGroup, Note{Why: f.Why, Approved: evidence})
		case len(s.Created.Request) > 0 && string(s.Created.Request) == string(evidence.Request):
			return nil, nil // interrupted
		case c.dry != nil && len(grant) == 0 && s.Created.of(act):
			return nil, nil // with the approval that it has it would go on
		case unfinished && s.Created.of(act):
			return nil, nil // the first approval has expired meanwhile
		case unfinished:
			if err := f.follows(s); err != nil {
				return nil, err
			}
			return entry(eventCreated, subjectGroup, Note{Why: f.Why, Approved: evidence})
		}
		return nil, errors.New("it is there already")
	}); err != nil {
		return err
	}
	if err := c.setup(ctx, f.Members, f.Policy.defaults()); err != nil {
		return err
	}
	if f.Epoch != nil {
		if err := c.SetEpoch(ctx, *f.Epoch); err != nil {
			return err
		}
	}
	return c.confirm(ctx, "its members serve", func(s *State) bool {
		return !slices.ContainsFunc(f.Members, func(m Member) bool {
			there, _ := s.Member(m.Name)
			return there.State != MemberActive && there.State != MemberStandby
		})
	})
}

// follows refuses a founding that leaves out, or brings back, whom the unfinished one before it has entered.
func (f Founding) follows(s *State) error {
	named := map[string]Member{}
	for _, m := range f.Members {
		if named[m.Name] = m; s.members[m.Name] != nil && s.members[m.Name].State == MemberRemoved {
			return fmt.Errorf("member %s was removed from it: leave it out, and enroll it when the group is complete", m.Name)
		}
	}
	for _, m := range s.Members() {
		if n := named[m.Name]; n.Name == "" {
			return fmt.Errorf("it was begun before, and %s was entered as a member: name it as well, or remove it first", m.Name)
		} else if n.Address != m.Address || n.Site != m.Site || n.Standby != m.Standby {
			return fmt.Errorf("it was begun before, and %s was entered at %s, site %q, standby %t: name it so, or remove it first", m.Name, m.Address, m.Site, m.Standby)
		}
	}
	return nil
}

// founder begins the name of the detail that describes a member in the act of creating a group.
const founder = "member "

// founders are the members that people approved a group to begin with, by name.
func (n Note) founders() (names []string) {
	var r identity.Request
	if json.Unmarshal(n.Request, &r) != nil {
		return nil
	}
	for what := range r.Detail {
		if name, ok := strings.CutPrefix(what, founder); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// of tells whether what people approved is exactly this act.
func (n Note) of(a Act) bool {
	var r identity.Request
	return json.Unmarshal(n.Request, &r) == nil && r.Action == a.Action && r.Object == a.Object && maps.Equal(r.Detail, a.Detail)
}

// whole is approved for acts of which the approval must say everything.
func (c *Coordinator) whole(grant []byte, a Act) (Approved, error) {
	evidence, err := c.approved(grant, a)
	if err != nil || len(grant) == 0 {
		return evidence, err
	}
	var g identity.Grant
	if err := json.Unmarshal(grant, &g); err != nil {
		return Approved{}, err
	}
	if !maps.Equal(g.Request.Detail, a.Detail) {
		return Approved{}, fmt.Errorf("%s of %s: what was approved does not say everything: want %v", a.Action, a.Object, a.Detail)
	}
	return evidence, nil
}

// free refuses members whose tokens belong to another group, by their domain key or by that group's log.
func (c *Coordinator) free(ctx context.Context, looked []standing) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	for _, l := range looked {
		if l.info.KEK != "" && l.info.KEK != s.Domain.Name {
			return troubled(KindDomain, l.Name, "member %s holds domain key %s: its token belongs to another group and must be initialised", l.Name, l.info.KEK)
		}
		if err := c.elsewhere(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// elsewhere refuses a member, or its token, that another group has: the agents refuse it too, once there is a domain key.
func (c *Coordinator) elsewhere(ctx context.Context, m standing) error {
	list, ok := c.cfg.Chain.(Lister)
	if !ok {
		return nil
	}
	all, err := list.Groups(ctx)
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.Deleted || other.Name == c.cfg.Group {
			continue
		}
		entries, err := c.cfg.Chain.Log(ctx, other.Name, 1)
		if err != nil {
			return fmt.Errorf("reading the log of group %s: %w", other.Name, err)
		}
		s, err := Fold(entries)
		if err != nil {
			return fmt.Errorf("reading the log of group %s: %w", other.Name, err)
		}
		for _, o := range s.Members() {
			if o.Name == m.Name || o.Transport != "" && o.Transport == m.Transport {
				return troubled(KindShared, m.Name, "member %s (token %s) belongs to group %s as %s: an HSM is in one group; remove it there and initialise its token first",
					m.Name, m.TokenSerial, other.Name, o.Name)
			}
		}
	}
	return nil
}

// DeleteAct is the act of ending a group for good.
func (c *Coordinator) DeleteAct(ctx context.Context, why string) (Act, error) {
	s, err := c.State(ctx)
	if err != nil {
		return Act{}, err
	}
	return c.deleteAct(s, why), nil
}

func (c *Coordinator) deleteAct(s *State, why string) Act {
	var names []string
	for _, m := range s.Members() {
		names = append(names, m.Name)
	}
	return Act{ActDeleteGroup, c.cfg.Group, map[string]string{
		"why": why, "members": strings.Join(names, ", "), "keys left in tokens": strconv.Itoa(len(s.In(StateRetired, StateAbandoned))),
	}}
}

// DeleteGroup ends a group that has no live key, as people have approved (DeleteAct): nothing is added to it any more,
// nothing signs, nobody watches its members, and its name is not used again. What its tokens hold stays there: retired keys
// that are to go have to be destroyed before. Whether a CA or responder still refers to the group is for the caller to see.
func (c *Coordinator) DeleteGroup(ctx context.Context, why string, grant []byte) error {
	if err := c.deleteGroup(ctx, why, grant); err != nil {
		return fmt.Errorf("deleting group %s: %w", c.cfg.Group, err)
	}
	return nil
}

func (c *Coordinator) deleteGroup(ctx context.Context, why string, grant []byte) error {
	_, err := c.decide(ctx, func(s *State) (*Entry, error) {
		switch {
		case s.Deleted:
			return nil, nil
		case s.Next == 1:
			return nil, errors.New("there is no such group")
		}
		if keys := s.In(StateLive, StatePending); len(keys) > 0 {
			var names []string
			for _, k := range keys {
				names = append(names, fmt.Sprintf("%s (%s:%s, %s)", k.ID, k.Purpose, k.Label, k.State))
			}
			return nil, fmt.Errorf("%d keys are live or being made: retire them first: %s", len(keys), strings.Join(names, ", "))
		}
		evidence, err := c.whole(grant, c.deleteAct(s, why))
		if err != nil {
			return nil, err
		}
		return entry(eventDeleted, subjectGroup, Note{Why: why, Approved: evidence})
	})
	if err != nil {
		return err
	}
	return c.confirm(ctx, "the group is deleted", func(s *State) bool { return s.Deleted })
}

// Groups implements Lister.
func (r *rehearsal) Groups(ctx context.Context) ([]Known, error) {
	if list, ok := r.real.(Lister); ok {
		return list.Groups(ctx)
	}
	return nil, nil
}
