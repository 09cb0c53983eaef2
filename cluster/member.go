package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// founders are the HSM members that every cluster begins with.
var founders = []string{"hsmd-a", "hsmd-b", "hsmd-c"}

// furtherGroups are the HSM groups that a cluster may have beside KeyGroup, each with its members and the block of their addresses.
var furtherGroups = []struct {
	name    string
	members []string
	block   int
}{
	{RootGroup, []string{"hsmd-root-a", "hsmd-root-b"}, 6},
	{VAGroup, []string{"hsmd-va-a", "hsmd-va-b"}, 7},
}

// checkGroups returns the groups beside KeyGroup of a list that names all.
func checkGroups(all []string) (further []string, err error) {
	left := slices.DeleteFunc(slices.Clone(all), func(name string) bool { return name == KeyGroup })
	for _, g := range furtherGroups {
		if slices.Contains(left, g.name) {
			further = append(further, g.name)
			left = slices.DeleteFunc(left, func(name string) bool { return name == g.name })
		}
	}
	if len(left) > 0 || !slices.Contains(all, KeyGroup) {
		return nil, fmt.Errorf("HSM groups %s: there can be %s, %s and %s, and %s is always there", strings.Join(all, ","), RootGroup, KeyGroup, VAGroup, KeyGroup)
	}
	return further, nil
}

// CheckGroups refuses a list of HSM groups that no cluster can have; an empty one is fine.
func CheckGroups(all []string) error {
	if len(all) == 0 {
		return nil
	}
	_, err := checkGroups(all)
	return err
}

// groupMembers lists the members with which a group begins.
func (l Layout) groupMembers(group string) []string {
	if group == KeyGroup {
		return founders
	}
	for _, g := range furtherGroups {
		if g.name == group && slices.Contains(l.groups, group) {
			return g.members
		}
	}
	return nil
}

// founders lists the members with which the cluster's groups begin.
func (l Layout) founders() []string {
	all := slices.Clone(founders)
	for _, g := range l.groups {
		all = append(all, l.groupMembers(g)...)
	}
	return all
}

// Added is an HSM agent that was added to the cluster later. The HSM group knows nothing of it before it is enrolled.
type Added struct {
	Name string `json:"name"` // hsmd-d to hsmd-z
	// Module is the PKCS#11 module in place of SoftHSM's own, and Env what it needs in its environment, for tests with faults.
	Module string   `json:"module,omitempty"`
	Env    []string `json:"env,omitempty"`
}

var addedForm = regexp.MustCompile(`^hsmd-[d-z]$`)

func (a Added) check() error {
	if !addedForm.MatchString(a.Name) {
		return fmt.Errorf("%q cannot be added: added HSM members are called hsmd-d to hsmd-z", a.Name)
	}
	return nil
}

// agentAddress is where the HSM agent of that name listens: hsmd-a on the first address of its block, and so on.
func (l Layout) agentAddress(name string) map[string]string {
	block := 2
	for _, g := range furtherGroups {
		if slices.Contains(g.members, name) {
			block = g.block
		}
	}
	return map[string]string{"agent": l.host(block, int(name[len(name)-1]-'a')+1) + ":7443"}
}

// addition is how the part of that name was added; the zero Added if it was not.
func (l Layout) addition(name string) Added {
	for _, a := range l.added {
		if a.Name == name {
			return a
		}
	}
	return Added{}
}

// with is l with one more member, without is l with one less.
func (l Layout) with(a Added) Layout {
	l.added = append(slices.Clone(l.added), a)
	slices.SortFunc(l.added, func(a, b Added) int { return strings.Compare(a.Name, b.Name) })
	return l
}

func (l Layout) without(name string) Layout {
	l.added = slices.DeleteFunc(slices.Clone(l.added), func(a Added) bool { return a.Name == name })
	return l
}

// Add adds an HSM agent with a blank token to the running cluster and returns when it is ready. It may be repeated. The agent belongs to
// the cluster from then on, over Stop and Up, until Remove. It holds no key before it is enrolled in the HSM group.
func (c *Cluster) Add(a Added) error {
	if err := a.check(); err != nil {
		return err
	}
	return c.member(a.Name, "add", url.Values{"module": {a.Module}, "env": a.Env})
}

// Remove ends an added HSM agent and removes all that belongs to it, its token with every key in it included. Whether the HSM group still
// counts on it is for the caller to know.
func (c *Cluster) Remove(name string) error {
	if _, err := c.Layout().Part(name); err != nil {
		return err
	}
	return c.member(name, "remove", nil)
}

// Wipe empties the token of an HSM agent, which starts again with a blank one: a new HSM under an old name. What the agent knows by itself
// stays, its audit record above all.
func (c *Cluster) Wipe(name string) error {
	if _, err := c.Layout().Part(name); err != nil {
		return err
	}
	return c.member(name, "wipe", nil)
}

func (c *Cluster) member(name, verb string, query url.Values) error {
	return c.control.call(context.Background(), "POST", "/members/"+name+"/"+verb, query, nil)
}

// change does what the control socket was asked about an HSM member.
func (s *supervisor) change(ctx context.Context, a Added, verb string) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	s.log.Info("told what to do", "part", a.Name, "verb", verb)
	switch verb {
	case "add":
		return s.addMember(ctx, a)
	case "remove":
		return s.removeMember(ctx, a.Name)
	case "wipe":
		return s.wipeMember(ctx, a.Name)
	}
	return fmt.Errorf("unknown verb %q", verb)
}

func (s *supervisor) addMember(ctx context.Context, a Added) error {
	if err := a.check(); err != nil {
		return err
	}
	u := s.unit(a.Name)
	if u == nil {
		l := s.plan().with(a)
		if err := provision(l); err != nil { // writes the new member down first, so that Down knows of it
			return err
		}
		p, err := l.Part(a.Name)
		if err != nil {
			return err
		}
		if u, err = s.adopt(l, p); err != nil {
			return err
		}
	}
	switch u.state() {
	case Running:
		return s.await(ctx, u, s.ready)
	case Frozen:
		return fmt.Errorf("%s is there already, and frozen: thaw it", a.Name)
	}
	return s.bringHSM(ctx, u)
}

func (s *supervisor) removeMember(ctx context.Context, name string) error {
	if slices.Contains(s.plan().founders(), name) {
		return fmt.Errorf("%s belongs to every cluster and stays; only added members can be removed", name)
	}
	u := s.unit(name)
	if u == nil {
		return fmt.Errorf("%q is no part of the cluster", name)
	}
	if err := u.kill(ctx, true); err != nil {
		return err
	}
	l := s.plan().without(name)
	var failed []error
	for _, path := range []string{
		u.Dir, l.Identity(name), l.Config(name), l.Secret(name + "-pin"), l.Secret(name + "-so-pin"), u.Log,
	} {
		failed = append(failed, os.RemoveAll(path))
	}
	if err := errors.Join(failed...); err != nil {
		return fmt.Errorf("removing the files of %s: %w", name, err)
	}
	if err := l.describe(); err != nil {
		return err
	}
	s.release(l, u) // last: until then it can be repeated
	return nil
}

func (s *supervisor) wipeMember(ctx context.Context, name string) error {
	u := s.unit(name)
	if u == nil || u.Role != RoleHSMD {
		return fmt.Errorf("%q is no HSM member of the cluster", name)
	}
	if err := u.kill(ctx, true); err != nil {
		return err
	}
	if err := os.RemoveAll(tokens(u.Part)); err != nil {
		return fmt.Errorf("emptying the token of %s: %w", name, err)
	}
	if err := os.Mkdir(tokens(u.Part), 0o700); err != nil {
		return fmt.Errorf("emptying the token of %s: %w", name, err)
	}
	return s.bringHSM(ctx, u)
}

// bringHSM makes the agent's token, unless it is there, starts the agent and waits until it is ready.
func (s *supervisor) bringHSM(ctx context.Context, u *unit) error {
	if err := s.once(ctx, u.Part, "init-token", filepath.Join(s.binaries, "hsmd"), "init-token", "--config", s.plan().Config(u.Name)); err != nil {
		return err
	}
	return s.bring(ctx, u)
}
