package hsmsync

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"trivet/hsm"
	"trivet/identity"
)

// ActPIN is the action of giving members' tokens new PINs.
const ActPIN = "hsm-pin-rotate"

// pinWait is how long a member may take to come back with its new PIN: its supervisor starts its agent, which tries two PINs at
// most and has its keys proved.
const pinWait = 2 * time.Minute

// PINRotation says whose PINs are to be rotated.
type PINRotation struct {
	// Members by name, each after the other in this order.
	Members []string
	// Prepared takes each PIN from the file that somebody put beside the agent's own; else each agent draws one.
	Prepared bool
	Why      string
	Grant    []byte // see ActPIN; its detail is hsm.PINRequest.Detail
}

// pinEntry is the payload of eventPIN.
type pinEntry struct {
	// Digest is the hex digest of the approved request, which the member tells when it has done it. Empty: it need not do the one before.
	Digest string `json:"digest"`
	Note
}

// RotatePINs gives members' tokens new PINs, one after the other: the next one only when the one before signs again with every live
// key. It first enters that this is to be done, with the approval, so that what is left undone is found by Reconcile. A member
// whose absence for some seconds would leave fewer members than the policy wants copies, or none that proves every live key, is
// refused unless forced (CoordinatorConfig.Force). It may be repeated under the same approval: what is done is not done again.
func (c *Coordinator) RotatePINs(ctx context.Context, r PINRotation) error {
	if err := c.rotatePINs(ctx, r); err != nil {
		return fmt.Errorf("rotating PINs of group %s: %w", c.cfg.Group, err)
	}
	return nil
}

func (c *Coordinator) rotatePINs(ctx context.Context, r PINRotation) error {
	req := hsm.PINRequest{Group: c.cfg.Group, Members: r.Members, Prepared: r.Prepared, Force: c.cfg.Force, Grant: r.Grant}
	if len(r.Members) == 0 {
		return errors.New("no member is named")
	}
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	for _, name := range r.Members { // before people are asked
		if _, err := c.pinMember(s, name); err != nil {
			return err
		}
	}
	evidence, err := c.approved(r.Grant, Act{ActPIN, c.cfg.Group, req.Detail()})
	if err != nil {
		return err
	}
	digest, err := digestOf(evidence)
	if err != nil {
		return err
	}
	for _, name := range r.Members {
		if digest == "" { // a dry run, before anybody has approved
			break
		}
		if _, err := c.decide(ctx, func(s *State) (*Entry, error) {
			if m, err := c.pinMember(s, name); err != nil || m.PIN == digest {
				return nil, err
			}
			return entry(eventPIN, name, pinEntry{digest, Note{Why: r.Why, Approved: evidence}})
		}); err != nil {
			return err
		}
	}
	done := c.counts("rotate PIN", "", len(r.Members))
	for _, name := range r.Members {
		if err := c.rotateOne(ctx, name, req, digest); err != nil {
			return err
		}
		done()
	}
	return nil
}

// pinMember is the member of that name, if its PIN may be rotated.
func (c *Coordinator) pinMember(s *State, name string) (GroupMember, error) {
	m, ok := s.Member(name)
	switch {
	case s.Deleted:
		return m, errors.New("the group was deleted")
	case !ok:
		return m, fmt.Errorf("there is no member %s", name)
	case m.State == MemberJoining:
		return m, fmt.Errorf("member %s has not joined yet: finish enrolling it first", name)
	}
	return m, nil
}

// digestOf is the digest of the approved request, as agents tell it; empty where there is none.
func digestOf(a Approved) (string, error) {
	if len(a.Request) == 0 {
		return "", nil
	}
	var r identity.Request
	if err := json.Unmarshal(a.Request, &r); err != nil {
		return "", err
	}
	return hex.EncodeToString(r.Digest()), nil
}

// rotateOne has one member rotate its PIN, and waits until it signs again.
func (c *Coordinator) rotateOne(ctx context.Context, name string, req hsm.PINRequest, digest string) error {
	s, err := c.State(ctx)
	if err != nil {
		return err
	}
	m, err := c.pinMember(s, name)
	if err != nil {
		return err
	}
	now := c.look(ctx, m)
	if now.err != nil {
		return fmt.Errorf("nothing was done to %s and those after it: %w", name, now.err)
	}
	if rotated(now.info, digest) {
		return nil
	}
	if err := c.expendable(ctx, s, m); err != nil && !c.cfg.Force {
		return fmt.Errorf("nothing was done to %s and those after it: %w", name, err)
	}
	before := now.info.Incarnation
	asked := c.call(ctx, stepTimeout, func(ctx context.Context) error { return now.agent.RotatePIN(ctx, req) })
	switch hsm.ClassOf(asked) {
	case hsm.ClassRequest, hsm.ClassDenied, hsm.ClassOverloaded: // it has not begun
		return errors.Join(fmt.Errorf("member %s refuses, and goes on with its PIN as it is; nothing was done to those after it: %w", name, asked), c.withdraw(ctx, name, digest, asked))
	}
	if c.dry != nil {
		return asked
	}
	c.log.Info("a member's PIN is being rotated; its agent starts anew", "member", name, "answer", asked)
	return c.returned(ctx, s, m, before, digest, asked)
}

// withdraw enters that a member need not do what it refused: else Reconcile would miss for ever what cannot be done there.
func (c *Coordinator) withdraw(ctx context.Context, name, digest string, refusal error) error {
	_, err := c.decide(ctx, func(s *State) (*Entry, error) {
		if m, ok := s.Member(name); !ok || m.PIN != digest || digest == "" {
			return nil, nil
		}
		return entry(eventPIN, name, pinEntry{Note: Note{Why: "refused: " + refusal.Error()}})
	})
	return err
}

func rotated(i hsm.Info, digest string) bool {
	return digest != "" && i.PIN.Request == digest && i.PIN.Unfinished == "" && i.PIN.Undone == ""
}

// expendable refuses to do without a member for some seconds if that leaves too few.
func (c *Coordinator) expendable(ctx context.Context, s *State, m GroupMember) error {
	if m.State != MemberActive && m.State != MemberStandby {
		return nil // it serves nobody now
	}
	others := slices.DeleteFunc(s.in(MemberActive, MemberStandby), func(o GroupMember) bool { return o.Name == m.Name })
	well := 0
	var why []error
	for _, o := range c.survey(ctx, others) {
		switch {
		case o.err != nil:
			why = append(why, o.err)
		case o.info.PIN.Unfinished != "":
			why = append(why, fmt.Errorf("member %s: %s", o.Name, o.info.PIN.Unfinished))
		default:
			well++
		}
	}
	if want := max(1, s.Policy.MinCopies); well < want && len(s.In(StateLive)) > 0 {
		return errors.Join(append([]error{fmt.Errorf("while the agent of %s starts anew %s would be left, and the policy wants %d copies of every key: bring members back, enroll another one, or use --force, "+
			"which two people approve", m.Name, fewWell(well), s.Policy.MinCopies)}, why...)...)
	}
	return c.spare(ctx, m.Name)
}

func fewWell(n int) string {
	if n == 1 {
		return "one member that is well"
	}
	return fmt.Sprintf("%d members that are well", n)
}

// returned waits until a member is back in a new incarnation, and has it prove every live key.
func (c *Coordinator) returned(ctx context.Context, s *State, m GroupMember, before, digest string, asked error) error {
	ctx, cancel := context.WithTimeout(ctx, pinWait)
	defer cancel()
	for {
		now := c.look(ctx, m)
		switch {
		case now.err == nil && rotated(now.info, digest):
			if _, err := c.proveAll(ctx, s.In(StateLive), now); err == nil {
				c.log.Info("a member has its new PIN and proves every key", "member", m.Name)
				return nil
			} else if ctx.Err() != nil {
				return fmt.Errorf("member %s has its new PIN, but does not prove every key within %s; nothing was done to those after it: %w", m.Name, pinWait, err)
			}
		case now.err == nil && now.info.Incarnation != before && now.info.PIN.Unfinished == "":
			why := now.info.PIN.Undone
			if why == "" || now.info.PIN.Request != digest {
				why = "its agent does not know of the rotation"
			}
			return errors.Join(fmt.Errorf("member %s serves with its old PIN (%s); nothing was done to those after it. Repeat the command under the same approval when the reason is gone", m.Name, why), asked)
		case now.err != nil && now.info.Incarnation != before && now.info.Incarnation != "" && kindOf(now.err) == KindToken:
			return now.err
		}
		if !sleep(ctx, 200*time.Millisecond, nil) {
			return errors.Join(fmt.Errorf("member %s does not serve within %s after it was asked for its rotation: its agent says why; it finishes or undoes the rotation when it starts. "+
				"Nothing was done to those after it: repeat the command under the same approval", m.Name, pinWait), now.err, asked)
		}
	}
}

// pinGrace is how long a rotation may be under way before it is an alarm that it is not done.
const pinGrace = 10 * time.Minute

// pinFindings is what there is to say of a member's PIN: what the token warns of, and a rotation that was approved and is not done.
func (c *Coordinator) pinFindings(m standing) (out []Finding) {
	add := func(alarm bool, format string, args ...any) {
		out = append(out, Finding{Kind: KindPIN, Member: m.Name, Alarm: alarm, Detail: fmt.Sprintf(format, args...)})
	}
	p := m.info.PIN
	if p.Warning != "" {
		add(true, "member %s: %s: find out who tries, and see its agent's audit record", m.Name, p.Warning)
	}
	late := c.age(m.PINSince) > pinGrace
	switch {
	case p.Unfinished != "":
		add(late, "member %s: %s: its agent ends it when it starts", m.Name, p.Unfinished)
	case m.PIN == "":
	case p.Request == m.PIN && p.Undone != "":
		add(true, "member %s has its old PIN: %s: repeat `pkictl hsm rotate-pin` under the same approval, or a new one", m.Name, p.Undone)
	case p.Request != m.PIN:
		add(late, "member %s has not had the PIN rotation that people approved at %s: repeat `pkictl hsm rotate-pin` under the same approval, or a new one",
			m.Name, m.PINSince.UTC().Format(time.RFC3339))
	}
	return out
}
