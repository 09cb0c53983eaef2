package hsmsync

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"trivet/hsm"
)

// Finding is one thing that is not as the log says.
type Finding struct {
	Kind   string    `json:"kind"`
	Member string    `json:"member,omitempty"`
	Key    hsm.KeyID `json:"key,omitempty"`
	Label  string    `json:"label,omitempty"`
	Detail string    `json:"detail"`
	// Alarm is false where nothing is wrong: a leftover that does no harm, something that was repaired.
	Alarm bool `json:"alarm"`
	// Repaired says that it is no longer so.
	Repaired bool `json:"repaired,omitempty"`
}

// Report is what Reconcile or Verify found, to be read and filed.
type Report struct {
	Group string    `json:"group"`
	At    time.Time `json:"at"`
	By    string    `json:"by"`
	// Position is that of the newest entry of the group's log, against which everything was compared.
	Position uint64 `json:"position"`
	Domain   string `json:"domain,omitempty"`
	Policy   Policy `json:"policy"`
	// OK says that there is no alarm.
	OK      bool           `json:"ok"`
	Members []MemberReport `json:"members"`
	// Keys are the live keys, each with its copies, the proofs among them; Verify fills it in.
	Keys []KeyReport `json:"keys,omitempty"`
	// Retired are the retired keys, with the members that hold a copy, which is compared and not proved: they sign no more.
	Retired []RetiredReport `json:"retired,omitempty"`
	// Covers says in words what was looked at, and what was not; Verify fills it in.
	Covers   []string  `json:"covers,omitempty"`
	Findings []Finding `json:"findings"`
	// Copied and Destroyed count what Reconcile did.
	Copied    int `json:"copied"`
	Destroyed int `json:"destroyed"`
	// Fewest is the number of copies that the live key with the fewest has, on members that answered.
	Fewest int `json:"fewest_copies"`
}

// MemberReport is one member in a Report.
type MemberReport struct {
	Name        string      `json:"name"`
	Site        string      `json:"site,omitempty"`
	State       MemberState `json:"state"`
	Reached     bool        `json:"reached"`
	TokenSerial string      `json:"token_serial,omitempty"`
	Transport   string      `json:"transport,omitempty"`
	Incarnation string      `json:"incarnation,omitempty"`
	Domain      string      `json:"domain,omitempty"`
	Epoch       uint64      `json:"epoch,omitempty"`
	// Digest is the member's over the keys it holds. Inspected says that they were listed, and not only the digest compared.
	Digest    string `json:"digest,omitempty"`
	Inspected bool   `json:"inspected"`
	Keys      int    `json:"keys"`
}

// KeyReport is one live key in a Report.
type KeyReport struct {
	ID          hsm.KeyID             `json:"id"`
	Label       string                `json:"label"`
	Purpose     hsm.Purpose           `json:"purpose"`
	Algorithm   hsm.Algorithm         `json:"algorithm"`
	Fingerprint string                `json:"spki_sha256"`
	Copies      map[string]CopyReport `json:"copies"` // by member
}

// RetiredReport is one retired key in a Report.
type RetiredReport struct {
	ID      hsm.KeyID   `json:"id"`
	Label   string      `json:"label"`
	Purpose hsm.Purpose `json:"purpose"`
	// Holders are the members that answered and hold a copy as it should be.
	Holders []string `json:"holders"`
}

// CopyReport is one member's copy of a key. Anybody who has the key's public half can check the proof: the signature is
// over hsm.ChallengeDigest of algorithm, group, member, incarnation, key and nonce.
type CopyReport struct {
	Proved      bool       `json:"proved"`
	At          *time.Time `json:"at,omitempty"`
	Incarnation string     `json:"incarnation,omitempty"`
	Nonce       []byte     `json:"nonce,omitempty"`
	Signature   []byte     `json:"signature,omitempty"`
	Cause       string     `json:"cause,omitempty"`
}

func (c *Coordinator) newReport(s *State) Report {
	return Report{
		Group: c.cfg.Group, At: c.cfg.Now().UTC(), By: c.actor, Position: s.Next - 1, Domain: s.Domain.Name, Policy: s.Policy,
		Members: []MemberReport{}, Findings: []Finding{},
	}
}

func reportOf(m standing) MemberReport {
	r := MemberReport{Name: m.Name, Site: m.Site, State: m.State, Reached: kindOf(m.err) != KindUnreachable}
	if r.Reached {
		r.TokenSerial, r.Transport, r.Incarnation, r.Domain = m.info.TokenSerial, m.info.Transport, m.info.Incarnation, m.info.KEK
		r.Epoch, r.Digest, r.Keys = m.info.Epoch, m.info.Digest, m.info.Keys
	}
	return r
}

// found enters what an error says.
func found(err error, k hsm.KeyRecord, member, otherwise string) Finding {
	kind := kindOf(err)
	if kind == "" {
		kind = otherwise
	}
	return Finding{Kind: kind, Member: member, Key: k.ID, Label: k.Label, Detail: err.Error(), Alarm: true}
}

// inspection is what a member's inventory amounts to beside the log.
type inspection struct {
	holds    map[hsm.KeyID]bool // live and retired keys that are as they should be
	missing  []ManifestKey      // live and retired ones that it lacks, or holds half
	doomed   []ManifestKey      // destroyed ones that it holds
	findings []Finding          // all else
}

// expected is the digest of a member that holds the live and retired keys and no other.
func expected(s *State) string {
	var keys []hsm.KeyRecord
	for _, k := range s.In(StateLive, StateRetired) {
		keys = append(keys, k.KeyRecord)
	}
	return hsm.InventoryDigest(keys)
}

// compare holds what a member's token holds against the log.
func compare(s *State, member string, all []hsm.KeyRecord) inspection {
	out := inspection{holds: map[hsm.KeyID]bool{}}
	has := map[hsm.KeyID]hsm.KeyRecord{}
	add := func(kind string, k hsm.KeyRecord, alarm bool, format string, args ...any) {
		out.findings = append(out.findings, Finding{Kind: kind, Member: member, Key: k.ID, Label: k.Label, Alarm: alarm, Detail: fmt.Sprintf(format, args...)})
	}
	for _, got := range all {
		switch {
		case got.Foreign && s.Policy.Driver == DriverExternal && strings.HasPrefix(got.Label, hsm.TransportPrefix+":"):
			add(KindForeign, got, false, "member %s holds %q: the vendor has cloned another member's transport key; it is used by nobody there", member, got.Label)
			continue
		case got.Foreign:
			add(KindForeign, got, true, "member %s holds an object that is not ours, %q: find out who put it there", member, got.Label)
			continue
		case got.Purpose == hsm.PurposeProbe:
			continue
		}
		has[got.ID] = got
		k, known := s.Key(got.ID)
		switch {
		case !known:
			add(KindUnknown, got, true, "member %s holds key %s (%s), which the log does not know: perhaps the database has lost entries; nothing was changed", member, got.ID, got.Label)
		case k.State == StateAbandoned:
			add(KindAbandoned, got, false, "member %s holds a copy of key %s (%s), which never became live; it may be destroyed", member, got.ID, got.Label)
		case k.State == StateDestroyed:
			out.doomed = append(out.doomed, k)
		}
	}
	for _, k := range s.In(StateLive, StateRetired) {
		got, ok := has[k.ID]
		if !ok {
			out.missing = append(out.missing, k)
			continue
		}
		switch err := differs(member, k.KeyRecord, got); kindOf(err) {
		case "":
			out.holds[k.ID] = true
		case KindFaulty: // importing it again may complete it
			out.missing = append(out.missing, k)
		default:
			out.findings = append(out.findings, found(err, k.KeyRecord, member, ""))
		}
	}
	return out
}

// copies counts for each live key the members that hold it, and reports those with too few.
func copies(s *State, r *Report, holds map[string]map[hsm.KeyID]bool) {
	live := s.In(StateLive)
	for i, k := range live {
		n := 0
		for _, has := range holds {
			if has[k.ID] {
				n++
			}
		}
		if i == 0 || n < r.Fewest {
			r.Fewest = n
		}
		if n < s.Policy.MinCopies {
			r.Findings = append(r.Findings, Finding{Kind: KindCopies, Key: k.ID, Label: k.Label, Alarm: true,
				Detail: fmt.Sprintf("key %s (%s) has %d copies on members that answer; the policy wants %d: bring members back, or enroll others", k.ID, k.Label, n, s.Policy.MinCopies)})
		}
	}
	r.OK = !slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Alarm })
}

// contrast lists what a member holds and compares it with the log, as it is by then: a key that is being made is in tokens
// before whoever has read the log knows of it.
func (c *Coordinator) contrast(ctx context.Context, s *State, m standing) (inspection, error) {
	all, err := c.everything(ctx, m)
	if err != nil {
		return inspection{}, err
	}
	i := compare(s, m.Name, all)
	if slices.ContainsFunc(i.findings, func(f Finding) bool { return f.Kind == KindUnknown }) {
		now, err := c.State(ctx)
		if err != nil {
			return i, err
		}
		if now.Next != s.Next {
			i = compare(now, m.Name, all)
		}
	}
	return i, nil
}

// everything is a member's inventory, foreign objects and probe keys included.
func (c *Coordinator) everything(ctx context.Context, m standing) (all []hsm.KeyRecord, err error) {
	err = c.call(ctx, slowTimeout, func(ctx context.Context) (err error) { all, err = m.agent.Inventory(ctx); return err })
	if err != nil {
		return nil, fmt.Errorf("asking %s for its keys: %w", m.Name, err)
	}
	return all, nil
}

// inventory is what of the group's a member's token holds, by id.
func (c *Coordinator) inventory(ctx context.Context, m standing) (map[hsm.KeyID]hsm.KeyRecord, error) {
	all, err := c.everything(ctx, m)
	if err != nil {
		return nil, err
	}
	out := map[hsm.KeyID]hsm.KeyRecord{}
	for _, k := range all {
		if !k.Foreign && k.Purpose != hsm.PurposeProbe {
			out[k.ID] = k
		}
	}
	return out, nil
}
