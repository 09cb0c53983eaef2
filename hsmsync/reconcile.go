package hsmsync

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"trivet/hsm"
)

const (
	defaultEvery = 30 * time.Second
	// listEvery is how often a member's keys are listed although their digest is as it should be: the digest is from its
	// agent's memory.
	listEvery = 10 * time.Minute
)

// checked is what the last look at a member's keys found. It holds as long as the member, what it holds, and the log are
// the same.
type checked struct {
	incarnation, digest string
	foreign, faulty     int
	position            uint64
	listed              time.Time
	holds               map[hsm.KeyID]bool // nil: all live and retired keys
	findings            []Finding
}

// Reconcile goes once over all members: brings keys to those that lack them, destroys what was destroyed while they were
// away, brings their domain keys in line, and reports all else. It deletes nothing but keys that people have had destroyed.
// While nothing changes it asks each member one question, and compares digests. A member that is away is reported and
// looked at the next time.
func (c *Coordinator) Reconcile(ctx context.Context) (Report, error) {
	began := time.Now()
	s, err := c.State(ctx)
	if err != nil {
		return Report{}, fmt.Errorf("reconciling group %s: %w", c.cfg.Group, err)
	}
	r := c.newReport(s)
	if s.Deleted {
		r.OK = true
		return r, nil
	}
	all := c.survey(ctx, s.Members())
	theirs := epochOf(serving(all, s.Domain))
	want := whole{expected(s), every(s)}
	holds := map[string]map[hsm.KeyID]bool{}
	for i := range all {
		m := &all[i]
		if m.err != nil {
			r.Members = append(r.Members, reportOf(*m))
			r.Findings = append(r.Findings, found(m.err, hsm.KeyRecord{}, m.Name, KindUnreachable))
			continue
		}
		c.forget(ctx, s, *m)
		c.remind(ctx, s, *m)
		if m.State != MemberJoining {
			r.Findings = append(r.Findings, c.align(ctx, s, m, all)...)
			seen, inspected := c.inspectKeys(ctx, s, m, all, want, &r)
			holds[m.Name] = seen
			r.Members = append(r.Members, reportOf(*m))
			r.Members[len(r.Members)-1].Inspected = inspected
		} else {
			r.Members = append(r.Members, reportOf(*m))
		}
		r.Findings = append(r.Findings, drift(*m, theirs)...)
		r.Findings = append(r.Findings, c.pinFindings(*m)...)
	}
	if err := ctx.Err(); err != nil {
		return r, fmt.Errorf("reconciling group %s: %w", c.cfg.Group, err)
	}
	copies(s, &r, holds)
	c.stats.report(r, time.Since(began))
	return r, nil
}

// align brings a member's domain keys in line with the log.
func (c *Coordinator) align(ctx context.Context, s *State, m *standing, all []standing) []Finding {
	was := m.info
	now, err := c.level(ctx, s, *m, serving(all, s.Domain), nil)
	if now.err == nil {
		*m = now
	}
	switch {
	case err != nil && codeOf(err) == hsm.CodeApproval:
		return []Finding{{Kind: KindDomain, Member: m.Name, Alarm: true, Detail: fmt.Sprintf(
			"member %s holds domain key %q instead of %s, and the members that have it want a new approval to give it away (%s of %s/%s, transport %s): %v",
			m.Name, was.KEK, s.Domain.Name, ActEnroll, c.cfg.Group, m.Name, m.Transport, err)}}
	case err != nil:
		return []Finding{found(err, hsm.KeyRecord{}, m.Name, KindDomain)}
	case was.KEK != now.info.KEK || was.NextKEK != now.info.NextKEK:
		c.log.Info("member's domain keys brought in line", "member", m.Name, "domain", now.info.KEK, "was", was.KEK)
		return []Finding{{Kind: KindDomain, Member: m.Name, Repaired: true, Detail: fmt.Sprintf("member %s held domain keys %q and %q; it holds %q now", m.Name, was.KEK, was.NextKEK, now.info.KEK)}}
	}
	return nil
}

// inspectKeys finds out which keys a member holds, and repairs what can be repaired. Listed says that it asked for all of
// them.
func (c *Coordinator) inspectKeys(ctx context.Context, s *State, m *standing, all []standing, want whole, r *Report) (seen map[hsm.KeyID]bool, listed bool) {
	c.mu.Lock()
	last, known := c.checked[m.Name]
	c.mu.Unlock()
	fresh := known && last.incarnation == m.info.Incarnation && c.age(last.listed) < listEvery
	clean := m.info.Digest == want.digest && m.info.Foreign == 0 && m.info.Faulty == 0
	switch {
	case fresh && clean:
		return want.keys, false
	case fresh && last.position == s.Next-1 && last.digest == m.info.Digest && last.foreign == m.info.Foreign && last.faulty == m.info.Faulty:
		r.Findings = append(r.Findings, last.findings...)
		return last.holds, false
	}
	i, err := c.contrast(ctx, s, *m)
	if err != nil {
		r.Findings = append(r.Findings, found(err, hsm.KeyRecord{}, m.Name, KindUnreachable))
		return nil, false
	}
	since := last.listed // a key that is missing now was there then
	findings := append(i.findings, c.finish(ctx, *m, i.doomed, r)...)
	findings = append(findings, c.repair(ctx, s, *m, all, &i, since, r)...)
	r.Findings = append(r.Findings, findings...)
	now := checked{incarnation: m.info.Incarnation, position: s.Next - 1, listed: c.cfg.Now(), holds: i.holds}
	now.findings = slices.DeleteFunc(slices.Clone(findings), func(f Finding) bool { return f.Repaired })
	if len(i.missing)+len(i.doomed) == 0 { // else look again the next time
		now.digest, now.foreign, now.faulty = m.info.Digest, m.info.Foreign, m.info.Faulty
	}
	c.mu.Lock()
	c.checked[m.Name] = now
	c.mu.Unlock()
	return i.holds, true
}

// whole is a member that holds the live and retired keys and no other.
type whole struct {
	digest string
	keys   map[hsm.KeyID]bool
}

// every is all live and retired keys.
func every(s *State) map[hsm.KeyID]bool {
	out := map[hsm.KeyID]bool{}
	for _, k := range s.In(StateLive, StateRetired) {
		out[k.ID] = true
	}
	return out
}

// finish has a member destroy keys that were destroyed while it was away, or that came back with an old token. The approval
// is in the log; once it has expired people must give a new one.
func (c *Coordinator) finish(ctx context.Context, m standing, doomed []ManifestKey, r *Report) (out []Finding) {
	for _, k := range doomed {
		f := Finding{Kind: KindDestroyed, Member: m.Name, Key: k.ID, Label: k.Label, Alarm: true}
		grant := k.Note.Approved.grant(c.cfg.Now())
		var err error
		if grant == nil {
			err = errors.New("the approval has expired")
		} else {
			var spki []byte
			if spki, err = c.doomedHalf(ctx, k, m); err == nil {
				err = c.destroyOn(ctx, m, k.ID, spki, grant)
			}
		}
		if err == nil {
			r.Destroyed++
			f.Alarm, f.Repaired = false, true
			f.Detail = fmt.Sprintf("member %s held key %s (%s), which was destroyed; it was destroyed there, too", m.Name, k.ID, k.Label)
			c.log.Warn("a destroyed key was destroyed on a member that had it still", "member", m.Name, "key", k.ID, "label", k.Label)
		} else {
			f.Detail = fmt.Sprintf("member %s holds key %s (%s), which was destroyed; destroying it there needs a new approval (%s of %s/%s): repeat the destruction with it: %v",
				m.Name, k.ID, k.Label, ActDestroy, c.cfg.Group, k.ID, err)
		}
		out = append(out, f)
	}
	return out
}

// doomedHalf is the public half of a destroyed key: the log's, or that of the copy, which the approval must be about.
func (c *Coordinator) doomedHalf(ctx context.Context, k ManifestKey, m standing) ([]byte, error) {
	if len(k.SPKI) > 0 {
		return k.SPKI, nil
	}
	has, err := c.inventory(ctx, m)
	return has[k.ID].SPKI, err
}

// repair brings a member the keys it lacks and has it prove the live ones among them.
func (c *Coordinator) repair(ctx context.Context, s *State, m standing, all []standing, i *inspection, since time.Time, r *Report) (out []Finding) {
	sources := slices.DeleteFunc(serving(all, s.Domain), func(o standing) bool { return o.Name == m.Name })
	failed := map[hsm.KeyID]error{}
	var mu sync.Mutex // guards failed
	done := c.counts("copy", m.Name, len(i.missing))
	_ = each(ctx, copyAtOnce, i.missing, func(ctx context.Context, k ManifestKey) error {
		if err := c.supply(ctx, s, m, k, sources); err != nil {
			mu.Lock()
			defer mu.Unlock()
			failed[k.ID] = err
		}
		done()
		return nil // one that cannot be brought keeps no other away
	})
	if ctx.Err() != nil {
		return nil // nobody knows how far it came; the next pass looks
	}
	for _, k := range i.missing {
		if err := failed[k.ID]; err != nil {
			out = append(out, Finding{Kind: KindMissing, Member: m.Name, Key: k.ID, Label: k.Label, Alarm: true,
				Detail: fmt.Sprintf("member %s lacks key %s (%s): %v", m.Name, k.ID, k.Label, err)})
			continue
		}
		i.holds[k.ID] = true
		r.Copied++
		from := k.Since
		if since.After(from) {
			from = since
		}
		lag := c.age(from)
		c.stats.copied(m.Name, lag)
		c.log.Info("a key was brought to a member that lacked it", "member", m.Name, "key", k.ID, "label", k.Label, "lag", lag)
		out = append(out, Finding{Kind: KindMissing, Member: m.Name, Key: k.ID, Label: k.Label, Repaired: true,
			Detail: fmt.Sprintf("member %s lacked key %s (%s); it was brought there", m.Name, k.ID, k.Label)})
	}
	return out
}

// supply brings one key to a member, and has it proved if it is live.
func (c *Coordinator) supply(ctx context.Context, s *State, m standing, k ManifestKey, sources []standing) error {
	if s.Policy.Driver == DriverExternal {
		return errors.New("the vendor has not cloned it: look at the vendor's cloning")
	}
	b, err := c.export(ctx, k.KeyRecord, s.Domain.Name, turned(sources, int(k.N)))
	if err == nil {
		err = c.bring(ctx, k.KeyRecord, b, m)
	}
	if err == nil && k.State == StateLive {
		_, err = c.prove(ctx, k.KeyRecord, m)
	}
	return err
}

// RunReconcile reconciles at intervals until ctx ends, and returns nil then; 0 means every 30 s. Of several coordinators
// that run it, one at a time works: the one that holds the lease in the log "{group}/lease". The lease saves work; two
// that reconcile at once do no harm.
func (c *Coordinator) RunReconcile(ctx context.Context, interval time.Duration) error {
	if interval <= 0 {
		interval = defaultEvery
	}
	l := newLease(c, interval)
	defer l.release(ctx)
	var last map[string]bool
	for {
		held, err := l.hold(ctx)
		if err == nil && held {
			var r Report
			if r, err = c.Reconcile(ctx); err == nil {
				last = c.announce(r, last)
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			c.log.Warn("reconciliation failed; it is tried again", "error", err)
		}
		if !held {
			c.stats.idle()
		}
		if !sleep(ctx, interval, nil) {
			return nil
		}
	}
}

// announce logs the alarms that are new, and the end of those that are gone.
func (c *Coordinator) announce(r Report, last map[string]bool) map[string]bool {
	now := map[string]bool{}
	for _, f := range r.Findings {
		if !f.Alarm {
			continue
		}
		now[f.Detail] = true
		if !last[f.Detail] {
			c.log.Error("the group is not as its log says", "kind", f.Kind, "member", f.Member, "key", f.Key, "detail", f.Detail)
		}
	}
	for _, gone := range slices.Sorted(maps.Keys(last)) {
		if !now[gone] {
			c.log.Info("no longer so", "detail", gone)
		}
	}
	return now
}
