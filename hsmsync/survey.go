package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"trivet/hsm"
)

// standing is one member as the log has it and as it answers now.
type standing struct {
	GroupMember
	agent Agent
	info  hsm.Info
	err   error // *trouble; nil when it is the member that joined, and well
}

// Kinds of trouble with a member, and of findings of Reconcile and Verify.
const (
	KindUnreachable = "unreachable"   // it does not answer
	KindLocked      = "locked"        // an operator must activate its token
	KindUnwell      = "unwell"        // its own test signature fails
	KindToken       = "token-changed" // it has another token than the one that joined
	KindShared      = "token-shared"  // it has the same token as another member
	KindDomain      = "domain"        // it holds another domain key than the group's
	KindEpoch       = "epoch"         // it is at another site epoch than the others
	KindJoining     = "joining"       // its enrolment has not been finished
	KindMissing     = "missing"       // it lacks a key
	KindDiffers     = "differs"       // it holds another key under a key's id
	KindAttributes  = "attributes"    // its copy has other policy attributes than the key
	KindFaulty      = "faulty"        // its copy is incomplete
	KindUnproved    = "unproved"      // it could not prove a key
	KindDestroyed   = "destroyed"     // it holds a key that was destroyed
	KindAbandoned   = "abandoned"     // it holds a copy of a key that never became live
	KindUnknown     = "unknown"       // it holds a key of ours that the log does not know
	KindForeign     = "foreign"       // it holds an object that is not ours
	KindPIN         = "pin"           // its token warns of its PIN, or a rotation of it is not done
	KindCopies      = "copies"        // a live key has fewer copies than the group's policy wants
)

// trouble is what is wrong with a member.
type trouble struct {
	kind, member string
	err          error
}

func (t *trouble) Error() string { return t.err.Error() }
func (t *trouble) Unwrap() error { return t.err }

func troubled(kind, member, format string, args ...any) *trouble {
	return &trouble{kind, member, fmt.Errorf(format, args...)}
}

// kindOf is the kind of the first trouble in err's chain, or empty.
func kindOf(err error) string {
	var t *trouble
	if errors.As(err, &t) {
		return t.kind
	}
	return ""
}

// look asks a member who it is and compares it with the log.
func (c *Coordinator) look(ctx context.Context, m GroupMember) standing {
	s := standing{GroupMember: m, agent: c.agent(m.Name, m.Address)}
	err := within(ctx, lookTimeout, func(ctx context.Context) (err error) { s.info, err = s.agent.Health(ctx); return err })
	switch {
	case err != nil:
		s.err = troubled(KindUnreachable, m.Name, "asking %s at %s for its health: %w", m.Name, m.Address, err)
	case s.info.Member != m.Name:
		s.err = troubled(KindUnreachable, m.Name, "%s answers as member %q instead of %s: correct its configuration", m.Address, s.info.Member, m.Name)
	case s.info.Locked != "":
		s.err = troubled(KindLocked, m.Name, "member %s is locked (%s): activate it", m.Name, s.info.Locked)
	case !sameToken(m.MemberEntry, s.info):
		s.err = troubled(KindToken, m.Name, "member %s has token %s (transport key %.16s…), but joined with %s (%.16s…): its token was exchanged or initialised: replace the member",
			m.Name, s.info.TokenSerial, s.info.Transport, m.TokenSerial, m.Transport)
	case !s.info.Probe.OK:
		s.err = troubled(KindUnwell, m.Name, "member %s cannot sign: %s", m.Name, s.info.Probe.Cause)
	}
	return s
}

// sameToken tells whether a member still has the token with which it joined. The serial alone says little: some modules
// give every token the same, and a token that was initialised may keep it. Its transport key never leaves it.
func sameToken(joined MemberEntry, now hsm.Info) bool {
	return joined.TokenSerial == now.TokenSerial && (joined.Transport == "" || joined.Transport == now.Transport)
}

// survey looks at members at once; the answers are in their order.
func (c *Coordinator) survey(ctx context.Context, members []GroupMember) []standing {
	out := make([]standing, len(members))
	together(len(members), func(i int) { out[i] = c.look(ctx, members[i]) })
	for i := range out {
		for j := range i {
			a, b := &out[i], &out[j]
			if a.err == nil && b.err == nil && sharedToken(a.info, b.info) {
				a.err = troubled(KindShared, a.Name, "members %s and %s share token %s: that is one copy, not two: remove one of them", b.Name, a.Name, a.info.TokenSerial)
				b.err = a.err
			}
		}
	}
	return out
}

// sharedToken tells whether two members have one token, or one a copy of the other's.
func sharedToken(a, b hsm.Info) bool {
	if a.Transport != "" && b.Transport != "" {
		return a.Transport == b.Transport || image(a.TokenSerial, a.Transport, b) || image(b.TokenSerial, b.Transport, a)
	}
	return a.TokenSerial == b.TokenSerial
}

// image tells whether a token is a copy of the one with that serial and transport key. A vendor's cloning may bring the key
// along, but not the serial; some modules give every token the same serial, but not the key.
func image(serial, transport string, of hsm.Info) bool {
	return serial == of.TokenSerial && transport != "" && slices.Contains(of.Strangers, transport)
}

// in lists the members in one of the given states, by name.
func (s *State) in(states ...MemberState) []GroupMember {
	return slices.DeleteFunc(s.Members(), func(m GroupMember) bool { return !slices.Contains(states, m.State) })
}

// serving lists the members that may be asked for what they hold: active first, then standby, the earliest joined first.
// Those joined when the others were there already, so they have exported their domain key to all of them.
func serving(all []standing, d Domain) []standing {
	out := slices.DeleteFunc(slices.Clone(all), func(m standing) bool {
		return m.err != nil || m.State != MemberActive && m.State != MemberStandby || !holds(m.info, d.Name)
	})
	slices.SortStableFunc(out, func(a, b standing) int {
		if a.State != b.State {
			if a.State == MemberActive {
				return -1
			}
			return 1
		}
		return int(a.Joined) - int(b.Joined)
	})
	return out
}

// holds tells whether a token holds the domain key called kek; any does where there is none.
func holds(i hsm.Info, kek string) bool { return kek == "" || i.KEK == kek || i.NextKEK == kek }

// firstTrouble is the first thing wrong with any of the members.
func firstTrouble(all []standing) error {
	for _, m := range all {
		if m.err != nil {
			return m.err
		}
	}
	return nil
}

// epochOf is the greatest site epoch among the members, and its site.
func epochOf(all []standing) (r hsm.EpochRecord) {
	for _, m := range all {
		if m.err == nil && m.info.Epoch > r.Epoch {
			r = hsm.EpochRecord{Site: m.info.Site, Epoch: m.info.Epoch}
		}
	}
	return r
}
