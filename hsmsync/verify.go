package hsmsync

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"trivet/hsm"
)

// Verify compares everything that every member holds with the log, and has every member sign a fresh challenge with every
// live key. It repairs nothing. Copies of retired keys are compared. The report has the proofs in it; the error says only that nothing could be found out.
func (c *Coordinator) Verify(ctx context.Context) (Report, error) {
	s, err := c.State(ctx)
	if err != nil {
		return Report{}, fmt.Errorf("verifying group %s: %w", c.cfg.Group, err)
	}
	r := c.newReport(s)
	live := s.In(StateLive)
	for _, k := range live {
		r.Keys = append(r.Keys, KeyReport{ID: k.ID, Label: k.Label, Purpose: k.Purpose, Algorithm: k.Algorithm, Fingerprint: hsm.Fingerprint(k.SPKI), Copies: map[string]CopyReport{}})
	}
	all := c.survey(ctx, s.Members())
	theirs := epochOf(serving(all, s.Domain))
	holds := map[string]map[hsm.KeyID]bool{}
	for _, m := range all {
		report, seen, findings := c.examine(ctx, s, m, theirs)
		var proofs []CopyReport
		if seen != nil && m.State != MemberJoining {
			holds[m.Name] = seen
			proofs = c.proofs(ctx, live, m)
		}
		for i, p := range proofs {
			r.Keys[i].Copies[m.Name] = p
			if !p.Proved {
				findings = append(findings, Finding{Kind: KindUnproved, Member: m.Name, Key: live[i].ID, Label: live[i].Label, Detail: p.Cause, Alarm: true})
				delete(seen, live[i].ID)
			}
		}
		r.Members = append(r.Members, report)
		r.Findings = append(r.Findings, findings...)
	}
	if err := ctx.Err(); err != nil {
		return r, fmt.Errorf("verifying group %s: %w", c.cfg.Group, err)
	}
	c.retired(s, &r, holds)
	copies(s, &r, holds)
	return r, nil
}

// retired adds which retired keys there are copies of, and says what the report covers.
func (c *Coordinator) retired(s *State, r *Report, holds map[string]map[hsm.KeyID]bool) {
	gone := 0
	for _, k := range s.In(StateRetired) {
		k := RetiredReport{ID: k.ID, Label: k.Label, Purpose: k.Purpose, Holders: []string{}}
		for _, m := range slices.Sorted(maps.Keys(holds)) {
			if holds[m][k.ID] {
				k.Holders = append(k.Holders, m)
			}
		}
		r.Retired = append(r.Retired, k)
		if len(k.Holders) > 0 {
			continue
		}
		gone++
		r.Findings = slices.DeleteFunc(r.Findings, func(f Finding) bool { return f.Kind == KindMissing && f.Key == k.ID })
		r.Findings = append(r.Findings, Finding{Kind: KindCopies, Key: k.ID, Label: k.Label, Alarm: true, Detail: fmt.Sprintf(
			"no member that answers holds a copy of retired key %s (%s), so nobody can bring it and no new backup has it: look whether an older backup does (hsm restore --check), "+
				"and have it destroyed if it is not needed any more", k.ID, k.Label)})
	}
	members := slices.Sorted(maps.Keys(holds))
	on := "no member: none that has joined answered"
	if len(members) > 0 {
		on = strings.Join(members, ", ")
	}
	r.Covers = []string{
		fmt.Sprintf("%d live keys: listed, compared and proved by a signature now on %s", len(r.Keys), on),
		fmt.Sprintf("%d retired keys: listed and compared, not proved, since they sign no more; of %d no copy was found", len(r.Retired), gone),
		"backups: not looked at; `pkictl hsm restore --check` says what one of them holds",
	}
}

// examine compares one member with the log. Seen are the keys that it holds as it should; nil when it could not be asked.
func (c *Coordinator) examine(ctx context.Context, s *State, m standing, theirs hsm.EpochRecord) (r MemberReport, seen map[hsm.KeyID]bool, findings []Finding) {
	r = reportOf(m)
	if m.err != nil {
		return r, nil, []Finding{found(m.err, hsm.KeyRecord{}, m.Name, KindUnreachable)}
	}
	findings = append(drift(m, theirs), c.pinFindings(m)...)
	if m.State != MemberJoining && s.Policy.Driver == DriverWrap && m.info.KEK != s.Domain.Name {
		findings = append(findings, Finding{Kind: KindDomain, Member: m.Name, Alarm: true,
			Detail: fmt.Sprintf("member %s holds domain key %q, the group's is %s: the next reconciliation brings it in line", m.Name, m.info.KEK, s.Domain.Name)})
	}
	i, err := c.contrast(ctx, s, m)
	if err != nil {
		return r, nil, append(findings, found(err, hsm.KeyRecord{}, m.Name, KindUnreachable))
	}
	r.Inspected = true
	findings = append(findings, i.findings...)
	remedy := "it is brought by the next reconciliation"
	if s.Policy.Driver == DriverExternal {
		remedy = "look at the vendor's cloning"
	}
	for _, k := range i.missing {
		if m.State != MemberJoining {
			findings = append(findings, Finding{Kind: KindMissing, Member: m.Name, Key: k.ID, Label: k.Label, Alarm: true,
				Detail: fmt.Sprintf("member %s lacks key %s (%s), or holds it incomplete: %s", m.Name, k.ID, k.Label, remedy)})
		}
	}
	for _, k := range i.doomed {
		findings = append(findings, Finding{Kind: KindDestroyed, Member: m.Name, Key: k.ID, Label: k.Label, Alarm: true,
			Detail: fmt.Sprintf("member %s holds key %s (%s), which was destroyed", m.Name, k.ID, k.Label)})
	}
	return r, i.holds, findings
}

// drift is what a member's answer about itself shows to be otherwise than the group's.
func drift(m standing, theirs hsm.EpochRecord) (out []Finding) {
	add := func(kind string, alarm bool, format string, args ...any) {
		out = append(out, Finding{Kind: kind, Member: m.Name, Detail: fmt.Sprintf(format, args...), Alarm: alarm})
	}
	if m.State == MemberJoining {
		add(KindJoining, true, "member %s has been joining since %s: repeat its enrolment, or remove it", m.Name, m.Since.UTC().Format("2006-01-02 15:04:05Z"))
	}
	if m.State != MemberJoining && m.info.Epoch != theirs.Epoch && theirs.Epoch != 0 {
		add(KindEpoch, true, "member %s is at site epoch %d, others are at %d (%s writes): give it that promotion record", m.Name, m.info.Epoch, theirs.Epoch, theirs.Site)
	}
	return out
}

// proofs has a member prove keys, and keeps the evidence.
func (c *Coordinator) proofs(ctx context.Context, keys []ManifestKey, m standing) []CopyReport {
	out := make([]CopyReport, len(keys))
	done := c.counts("prove", m.Name, len(keys))
	var all []int
	for i := range keys {
		all = append(all, i)
	}
	var mu sync.Mutex
	_ = each(ctx, proveAtOnce, all, func(ctx context.Context, i int) error {
		p := c.proofOf(ctx, keys[i].KeyRecord, m)
		mu.Lock()
		defer mu.Unlock()
		out[i] = p
		done()
		return nil
	})
	return out
}

func (c *Coordinator) proofOf(ctx context.Context, k hsm.KeyRecord, m standing) CopyReport {
	public, err := k.Algorithm.ParsePublic(k.SPKI)
	if err != nil {
		return CopyReport{Cause: err.Error()}
	}
	at := c.cfg.Now().UTC()
	p := CopyReport{At: &at, Nonce: make([]byte, 32)}
	_, _ = rand.Read(p.Nonce) // documented never to fail
	err = c.call(ctx, stepTimeout, func(ctx context.Context) (err error) {
		p.Signature, p.Incarnation, err = m.agent.Challenge(ctx, c.cfg.Group, k.ID, p.Nonce)
		return err
	})
	if err == nil {
		err = hsm.Verify(public, hsm.ChallengeDigest(k.Algorithm, c.cfg.Group, m.Name, p.Incarnation, k.ID, p.Nonce), p.Signature)
	}
	if p.Proved = err == nil; err != nil {
		p.Cause = fmt.Sprintf("proving key %s (%s) on %s: %v", k.ID, k.Label, m.Name, err)
	}
	return p
}
