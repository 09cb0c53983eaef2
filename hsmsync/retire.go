package hsmsync

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"trivet/hsm"
)

// RetireKey ends a live key's work for good, which takes the approval of people: nobody signs with it any more, and the members
// are told, who check the approval and refuse the key from then on; those that do not answer learn it by Reconcile. Its copies
// stay until it is destroyed. A pending key is abandoned instead, and needs none.
func (c *Coordinator) RetireKey(ctx context.Context, id hsm.KeyID, why string, grant ...[]byte) error {
	want := StateRetired
	s, err := c.decide(ctx, func(s *State) (*Entry, error) {
		k, ok := s.Key(id)
		switch {
		case !ok:
			return nil, errors.New("there is no such key")
		case k.State == StatePending:
			want = StateAbandoned
			return entry(string(StateAbandoned), string(id), Note{Why: why})
		case k.State == StateLive:
			want = StateRetired
			evidence, err := c.approvedBy(grant, c.retireAct(k))
			if err != nil {
				return nil, err
			}
			return entry(string(StateRetired), string(id), Note{Why: why, Approved: evidence})
		}
		want = k.State // it signs with nobody any more
		return nil, nil
	})
	if err == nil {
		err = c.confirm(ctx, fmt.Sprintf("key %s is %s", id, want), func(s *State) bool { k, _ := s.Key(id); return k.State == want })
	}
	if err != nil {
		return fmt.Errorf("retiring key %s of group %s: %w", id, c.cfg.Group, err)
	}
	if want == StateRetired {
		all := c.survey(ctx, s.Members())
		together(len(all), func(i int) { c.remind(ctx, s, all[i]) })
	}
	return nil
}

// Destruction is what became of a key's copies.
type Destruction struct {
	// Done lists the members that hold no copy now; Left those that do, or may, and why.
	Done []string          `json:"done"`
	Left map[string]string `json:"left,omitempty"`
}

// DestroyKey destroys every copy of a key that was retired or abandoned as long ago as the policy wants. The decision is
// entered first, with the approval (DestroyAct); members that are not there destroy their copies when they come back, by
// Reconcile, as long as the approval is in force. After that the members left want a new one: repeat this with it.
func (c *Coordinator) DestroyKey(ctx context.Context, id hsm.KeyID, grant []byte) (Destruction, error) {
	d, err := c.destroy(ctx, id, grant)
	if err != nil {
		return d, fmt.Errorf("destroying key %s of group %s: %w", id, c.cfg.Group, err)
	}
	return d, nil
}

func (c *Coordinator) destroy(ctx context.Context, id hsm.KeyID, grant []byte) (Destruction, error) {
	s, err := c.State(ctx)
	if err != nil {
		return Destruction{}, err
	}
	k, ok := s.Key(id)
	if !ok {
		return Destruction{}, errors.New("there is no such key")
	}
	if err := c.mayDestroy(s, k); err != nil { // before people are asked
		return Destruction{}, err
	}
	spki, err := c.publicHalf(ctx, s, k)
	if err != nil {
		return Destruction{}, err
	}
	evidence, err := c.approved(grant, c.destroyAct(id, spki))
	if err != nil {
		return Destruction{}, err
	}
	if s, err = c.decide(ctx, func(s *State) (*Entry, error) {
		k, _ := s.Key(id)
		if err := c.mayDestroy(s, k); err != nil {
			return nil, err
		}
		if k.State == StateDestroyed && bytes.Equal(k.Note.Request, evidence.Request) {
			return nil, nil
		}
		return entry(string(StateDestroyed), string(id), Note{Why: k.Note.Why, Approved: evidence})
	}); err != nil {
		return Destruction{}, err
	}
	// Before anything irrevocable: a retirement that the database has lost again would have left the key live.
	if err := c.confirm(ctx, "it is to be destroyed", func(s *State) bool { k, _ := s.Key(id); return k.State == StateDestroyed }); err != nil {
		return Destruction{}, err
	}
	c.log.Warn("destroying a key", "key", id, "label", k.Label, "approved_by", evidence.By)
	all := c.survey(ctx, s.Members())
	errs := make([]error, len(all))
	together(len(all), func(i int) {
		if errs[i] = all[i].err; errs[i] == nil {
			errs[i] = c.destroyOn(ctx, all[i], id, spki, grant)
		}
	})
	d := Destruction{Done: []string{}}
	for i, m := range all {
		if errs[i] == nil {
			d.Done = append(d.Done, m.Name)
			continue
		}
		if d.Left == nil {
			d.Left = map[string]string{}
		}
		d.Left[m.Name] = errs[i].Error()
	}
	return d, nil
}

// mayDestroy refuses a key that is still of use, or too soon.
func (c *Coordinator) mayDestroy(s *State, k ManifestKey) error {
	switch k.State {
	case StateDestroyed:
		return nil
	case StateRetired, StateAbandoned:
		if wait := s.Policy.DestroyAfter - c.age(k.Since); wait > 0 {
			return fmt.Errorf("it was %s at %s, and %s must pass before it may be destroyed: wait until %s", k.State,
				k.Since.UTC().Format(time.RFC3339), s.Policy.DestroyAfter, k.Since.Add(s.Policy.DestroyAfter).UTC().Format(time.RFC3339))
		}
		return nil
	}
	return fmt.Errorf("it is %s: retire it first", k.State)
}

// destroyOn destroys one member's copy. One that is not there is fine.
func (c *Coordinator) destroyOn(ctx context.Context, m standing, id hsm.KeyID, spki []byte, grant []byte) error {
	err := c.call(ctx, stepTimeout, func(ctx context.Context) error {
		return m.agent.Destroy(ctx, hsm.DestroyRequest{Group: c.cfg.Group, Key: id, SPKI: spki, Grant: grant})
	})
	if err != nil && hsm.ClassOf(err) != hsm.ClassNotFound {
		return fmt.Errorf("destroying key %s on %s: %w", id, m.Name, err)
	}
	// An agent that has used an approval says so whatever its token holds now: an old token may have been put back since.
	has, err := c.inventory(ctx, m)
	if err != nil {
		return fmt.Errorf("looking whether key %s is gone from %s: %w", id, m.Name, err)
	}
	if _, still := has[id]; still {
		return fmt.Errorf("member %s says that it has destroyed key %s, and holds it still: its token was put back after the approval had been used, so that it needs a new one", m.Name, id)
	}
	return nil
}

// publicHalf is a key's SPKI: from the log, from the approval that let it in, or, of one that never became live, from
// the members that hold it. It is empty when nobody does.
func (c *Coordinator) publicHalf(ctx context.Context, s *State, k ManifestKey) ([]byte, error) {
	if len(k.SPKI) > 0 {
		return k.SPKI, nil
	}
	var spki []byte
	var unknown []error
	for _, m := range c.survey(ctx, s.Members()) {
		err := m.err
		if err == nil {
			var has map[hsm.KeyID]hsm.KeyRecord
			if has, err = c.inventory(ctx, m); err == nil {
				got, ok := has[k.ID]
				switch {
				case !ok || len(got.SPKI) == 0:
				case len(spki) > 0 && !bytes.Equal(spki, got.SPKI):
					return nil, troubled(KindDiffers, m.Name, "members hold different keys under id %s: people must look at their tokens", k.ID)
				default:
					spki = got.SPKI
				}
			}
		}
		if err != nil {
			unknown = append(unknown, err)
		}
	}
	if len(spki) == 0 {
		return nil, errors.Join(append([]error{fmt.Errorf("no member that answers holds key %s, and the log does not have its public half: there is nothing to destroy", k.ID)}, unknown...)...)
	}
	return spki, nil
}

// remind tells a member which keys were retired and destroyed, with the approvals that the log has kept, once for each of its
// incarnations and whenever there are more: a new agent has never known, and one whose disk and token were put back together has
// forgotten. The member checks the approvals, and refuses such keys whatever the log says later.
func (c *Coordinator) remind(ctx context.Context, s *State, m standing) {
	over := slices.DeleteFunc(s.In(StateRetired, StateDestroyed), func(k ManifestKey) bool { return len(k.SPKI) == 0 || len(k.Note.Request) == 0 })
	gone := 0
	for _, k := range over {
		if k.State == StateDestroyed {
			gone++
		}
	}
	what := fmt.Sprint(m.info.Incarnation, " ", len(over), " ", gone)
	c.mu.Lock()
	told := c.minded[m.Name] == what
	c.mu.Unlock()
	if m.err != nil || len(over) == 0 || told {
		return
	}
	for _, k := range over {
		g, ok := k.Note.evidence()
		if !ok {
			continue
		}
		grant, err := json.Marshal(g)
		if err == nil {
			err = c.call(ctx, stepTimeout, func(ctx context.Context) error {
				if k.State == StateDestroyed {
					return m.agent.Bury(ctx, hsm.DestroyRequest{Group: c.cfg.Group, Key: k.ID, SPKI: k.SPKI, Grant: grant})
				}
				return m.agent.Retire(ctx, hsm.RetireRequest{Group: c.cfg.Group, Key: k.ID, Label: k.Label, Purpose: k.Purpose, SPKI: k.SPKI, Grant: grant})
			})
		}
		if err != nil {
			c.log.Warn("a member does not take in that a key is over; it is told again", "member", m.Name, "key", k.ID, "state", k.State, "error", err)
			return
		}
	}
	c.mu.Lock()
	c.minded[m.Name] = what
	c.mu.Unlock()
}
