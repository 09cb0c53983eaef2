package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"trivet/hsm"
	"trivet/identity"
)

// approvers are the roles whose people approve what happens to HSMs.
var approvers = []identity.Role{identity.RoleAdmin, identity.RoleCAOperator}

// deed is an act that needs the approval of people, as the agent is about to do it.
type deed struct {
	op string
	// actions and object are what the approval must say.
	actions []string
	object  string
	// facts is everything the act depends on. An approval must say those in must, may say others, and may say nothing else.
	facts map[string]string
	must  []string
}

// digest identifies the deed in every particular.
func (d deed) digest() string {
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(d.facts)) {
		fmt.Fprintf(h, "%q=%q\n", k, d.facts[k])
	}
	fmt.Fprintf(h, "%q %q", d.op, d.object)
	return hex.EncodeToString(h.Sum(nil))
}

// approval is a grant that stands for one deed.
type approval struct {
	digest  string
	action  string
	expires time.Time
	by      []string
}

// String is what the audit record says of it.
func (a approval) String() string {
	if a.digest == "" {
		return ""
	}
	return "approved_by=" + strings.Join(a.by, ",") + " action=" + a.action + " request=" + a.digest
}

func unapproved(op, format string, args ...any) error {
	return &hsm.Error{Class: hsm.ClassDenied, Code: hsm.CodeApproval, Op: op, Err: fmt.Errorf(format, args...)}
}

// approved checks that enough people approved exactly this deed.
func (s *Server) approved(raw []byte, d deed) (approval, error) {
	return s.approvedAt(raw, d, func(identity.Grant) time.Time { return s.cfg.Now() })
}

// approvedOnce is approved for a grant that may have expired: it was in force when the last of the people gave theirs.
func (s *Server) approvedOnce(raw []byte, d deed) (approval, error) {
	return s.approvedAt(raw, d, func(g identity.Grant) (at time.Time) {
		for _, a := range g.Approvals {
			if a.At.After(at) {
				at = a.At
			}
		}
		if now := s.cfg.Now(); at.After(now) {
			return now
		}
		return at
	})
}

func (s *Server) approvedAt(raw []byte, d deed, when func(identity.Grant) time.Time) (approval, error) {
	if len(raw) == 0 {
		return approval{}, unapproved(d.op, "this needs %s of %s approved by %d people", strings.Join(d.actions, " or "), d.object, s.cfg.Approvals)
	}
	g, err := identity.ParseGrant(raw)
	if err != nil {
		return approval{}, unapproved(d.op, "%w", err)
	}
	r := g.Request
	if !slices.Contains(d.actions, r.Action) || r.Object != d.object {
		return approval{}, unapproved(d.op, "the grant is for %.80q of %.200q, this is %s of %s", r.Action, r.Object, strings.Join(d.actions, " or "), d.object)
	}
	for _, k := range d.must {
		if _, ok := r.Detail[k]; !ok {
			return approval{}, unapproved(d.op, "the grant for %s of %s does not say %s", r.Action, r.Object, k)
		}
	}
	for k, v := range r.Detail {
		if known, ok := d.facts[k]; !ok || known != v {
			return approval{}, unapproved(d.op, "the grant for %s of %s says %.40s=%.200q, here it is %.200q", r.Action, r.Object, k, v, known)
		}
	}
	people, err := s.cfg.Identity.Granted(g, s.cfg.Approvals, when(g), approvers...)
	if err != nil {
		return approval{}, unapproved(d.op, "%w", err)
	}
	a := approval{digest: hex.EncodeToString(r.Digest()), action: r.Action, expires: r.Expires}
	for _, p := range people {
		a.by = append(a.by, p.String())
	}
	return a, nil
}

// take uses an approval for a deed, durably, before the deed is done. Answers get lost, so the same deed may come again, and
// finished says that it was done already; another deed may not.
func (s *Server) take(a approval, d deed) (finished bool, err error) {
	act := d.digest()
	known := false
	s.cfg.State.read(func(f facts) {
		if u, ok := f.Used[a.digest]; ok {
			known, finished = true, u.Done
			if u.Act != act {
				err = unapproved(d.op, "the approval of %s of %s was used already, for something else", a.action, d.object)
			}
		}
	})
	if known || err != nil {
		return finished, err
	}
	return false, s.change(d.op, func(f *facts) { put(&f.Used, a.digest, use{Act: act, Expires: a.expires}) })
}

// finish records that the deed an approval was used for is done.
func (s *Server) finish(a approval, op string) error { return s.change(op, a.finish) }

func (a approval) finish(f *facts) {
	if u, ok := f.Used[a.digest]; ok {
		u.Done = true
		f.Used[a.digest] = u
	}
}

// change changes the state or gives the process up: what cannot be remembered must not happen.
func (s *Server) change(op string, edit func(*facts)) error {
	if err := s.cfg.State.change(s.cfg.Now(), edit); err != nil {
		s.dog.giveUp(err)
		return &hsm.Error{Class: hsm.ClassDevice, Op: op, Err: err}
	}
	return nil
}

// fenced is change for what decides whether signatures may be made: it waits for those that are being made.
func (s *Server) fenced(op string, edit func(*facts)) error {
	s.fence.Lock()
	defer s.fence.Unlock()
	return s.change(op, edit)
}

// The deeds.

func destroying(r hsm.DestroyRequest) deed {
	return deed{op: "destroy", actions: []string{"key-destroy"}, object: r.Group + "/" + string(r.Key),
		facts: map[string]string{"spki": hsm.Fingerprint(r.SPKI)}, must: []string{"spki"}}
}

func retiring(r hsm.RetireRequest) deed {
	return deed{op: "retire", actions: []string{"key-retire"}, object: r.Group + "/" + string(r.Key), facts: map[string]string{
		"spki": hsm.Fingerprint(r.SPKI), "label": r.Label, "purpose": string(r.Purpose),
	}, must: []string{"spki", "label", "purpose"}}
}

func backingUp(r hsm.BackupRequest) deed {
	return deed{op: "backup", actions: []string{"hsm-backup"}, object: r.Group,
		facts: map[string]string{"recipient": hsm.Fingerprint(r.Recipient)}, must: []string{"recipient"}}
}

func adopting(r hsm.AdoptRequest) deed {
	return deed{op: "adopt", actions: []string{"key-import"}, object: r.Group + "/" + r.Spec.Label, facts: map[string]string{
		"spki": hsm.Fingerprint(r.SPKI), "purpose": string(r.Spec.Purpose), "algorithm": string(r.Spec.Algorithm), "key": string(r.Spec.ID),
	}, must: []string{"spki", "purpose", "algorithm"}}
}

func enrolling(group, member, transport string) deed {
	return deed{op: "domain-export", actions: []string{"hsm-enroll"}, object: group + "/" + member,
		facts: map[string]string{"transport": transport}, must: []string{"transport"}}
}

func promoting(r hsm.EpochRecord) deed {
	return deed{op: "epoch", actions: []string{actionPromote, actionRepair}, object: r.Site,
		facts: map[string]string{"epoch": strconv.FormatUint(r.Epoch, 10)}, must: []string{"epoch"}}
}

func rotatingPIN(r hsm.PINRequest) deed {
	return deed{op: opRotatePIN, actions: []string{"hsm-pin-rotate"}, object: r.Group, facts: r.Detail(), must: slices.Sorted(maps.Keys(r.Detail()))}
}

const (
	actionPromote = "site-promote"
	actionRepair  = "hsm-epoch-repair"
)

// checkGroup refuses a group whose name would make an object read differently than meant.
func checkGroup(op, group string) error {
	if len(group) < 1 || len(group) > 64 || strings.ContainsAny(group, "/\x00\n") {
		return hsm.Errorf(hsm.ClassRequest, op, "group name %.80q must be 1 to 64 octets without '/'", group)
	}
	return nil
}
