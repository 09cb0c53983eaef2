package hsmsync

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"trivet/hsm"
)

const (
	// minCopies of a key must exist before it may be used.
	minCopies = 2
	// stepTimeout bounds one call to a member while a key is made.
	stepTimeout = 5 * time.Second
	// giveUpTimeout bounds the writing of `abandoned` after the caller's context ended.
	giveUpTimeout = 5 * time.Second
)

// CreateDomain gives the group its domain key: one member makes it, the others receive it wrapped for their transport
// keys. Every configured member must be well and is entered into the group's log with its token's serial. It may be
// repeated, by several coordinators too: the log decides once which key it is and who makes it; members that have it
// are left alone, one that has another is an error.
func (g *Group) CreateDomain(ctx context.Context) error {
	if err := g.mayCoordinate(); err != nil {
		return err
	}
	g.creating.Lock()
	defer g.creating.Unlock()
	infos, err := g.infos(ctx)
	if err != nil {
		return fmt.Errorf("creating the domain key of group %s: %w", g.cfg.Group, err)
	}
	domain, err := g.decideDomain(ctx, infos)
	if err != nil {
		return fmt.Errorf("creating the domain key of group %s: %w", g.cfg.Group, err)
	}
	if err := g.spreadDomain(ctx, domain, infos); err != nil {
		return fmt.Errorf("spreading domain key %s of group %s: %w", domain.Name, g.cfg.Group, err)
	}
	return nil
}

// decideDomain enters the members, and the domain key's name and maker, into the log where they are missing.
func (g *Group) decideDomain(ctx context.Context, infos []hsm.Info) (Domain, error) {
	for {
		f, err := g.fold(ctx)
		if err != nil {
			return Domain{}, err
		}
		if err := g.sameMembers(f, infos); err != nil {
			return Domain{}, err
		}
		e := Entry{N: f.Next}
		if i := slices.IndexFunc(infos, func(m hsm.Info) bool { return f.Members[m.Member] == "" }); i >= 0 {
			e.Event, e.Subject = eventMember, infos[i].Member
			e.Payload, err = json.Marshal(memberPayload{
				Address: g.members[i].Address, TokenSerial: infos[i].TokenSerial, TokenLabel: infos[i].TokenLabel,
			})
		} else if f.Domain.Name == "" {
			e.Event, e.Subject = eventDomain, string(hsm.NewKeyID())
			e.Payload, err = json.Marshal(domainPayload{Origin: g.members[0].Name})
		} else {
			return f.Domain, nil
		}
		if err != nil {
			return Domain{}, err
		}
		if err := g.append(ctx, e); err != nil && !errors.Is(err, ErrTaken) {
			return Domain{}, err
		}
	}
}

// spreadDomain brings the domain key to every member that has none.
func (g *Group) spreadDomain(ctx context.Context, d Domain, infos []hsm.Info) error {
	origin := -1
	for i, info := range infos {
		switch {
		case info.KEK != "" && info.KEK != d.Name:
			return fmt.Errorf("member %s holds domain key %s instead: its token belongs to another group and must be initialised", info.Member, info.KEK)
		case info.KEK != "":
			origin = i
		case origin < 0 && info.Member == d.Origin:
			origin = i
		}
	}
	if origin < 0 {
		return fmt.Errorf("nobody holds it, and member %s, which makes it, is not configured here", d.Origin)
	}
	source := g.members[origin]
	if infos[origin].KEK == "" {
		if err := step(ctx, func(ctx context.Context) error { return source.agent.GenerateDomain(ctx, d.Name) }); err != nil {
			return fmt.Errorf("generating it on %s: %w", source.Name, err)
		}
	}
	return g.each(ctx, func(ctx context.Context, i int, m *member) error {
		if m == source || infos[i].KEK == d.Name {
			return nil
		}
		transport, err := m.agent.TransportKey(ctx)
		if err != nil {
			return fmt.Errorf("asking %s for its transport key: %w", m.Name, err)
		}
		wrapped, kek, err := source.agent.ExportDomain(ctx, transport)
		if err != nil {
			return fmt.Errorf("exporting it from %s for %s: %w", source.Name, m.Name, err)
		}
		if kek != d.Name {
			return fmt.Errorf("member %s exported domain key %s instead", source.Name, kek)
		}
		if err := m.agent.ImportDomain(ctx, kek, wrapped); err != nil {
			return fmt.Errorf("importing it into %s: %w", m.Name, err)
		}
		return nil
	})
}

// CreateKey makes a key and returns it once it is usable: entered as pending, generated on one member, cloned to all,
// proved by all, entered as live, read back. Every configured member must be well, and there must be two at least.
// Repeating it returns the live key of that label and purpose; a pending one that a crash left behind is abandoned
// first. On failure the new key is abandoned: it can never be used, and nothing is destroyed. An error after the entry
// `live` was written leaves open whether the key lives; repeating the call tells.
func (g *Group) CreateKey(ctx context.Context, label string, p hsm.Purpose, alg hsm.Algorithm) (hsm.KeyRecord, error) {
	record, err := g.createKey(ctx, hsm.KeySpec{ID: hsm.NewKeyID(), Label: label, Purpose: p, Algorithm: alg})
	if err != nil {
		return hsm.KeyRecord{}, fmt.Errorf("creating key %s (%s) in group %s: %w", label, p, g.cfg.Group, err)
	}
	return record, nil
}

func (g *Group) createKey(ctx context.Context, spec hsm.KeySpec) (hsm.KeyRecord, error) {
	if err := g.mayCoordinate(); err != nil {
		return hsm.KeyRecord{}, err
	}
	if err := spec.Check(); err != nil {
		return hsm.KeyRecord{}, err
	}
	if !hsm.MayChallenge(g.role, spec.Purpose) {
		return hsm.KeyRecord{}, fmt.Errorf("role %q may not have keys for %s proved", g.role, spec.Purpose)
	}
	g.creating.Lock()
	defer g.creating.Unlock()
	if live, err := g.claim(ctx, spec); err != nil || live != nil {
		if err != nil {
			return hsm.KeyRecord{}, err
		}
		return live.KeyRecord, g.refresh(ctx)
	}
	record, incarnations, err := g.replicate(ctx, spec)
	if err != nil {
		return hsm.KeyRecord{}, g.giveUp(ctx, spec, err)
	}
	if err := g.goLive(ctx, record); err != nil {
		return hsm.KeyRecord{}, g.giveUp(ctx, spec, err)
	}
	// A COMMIT is no proof that the entry stays: another database node must know it, too.
	f, err := g.fold(ctx)
	if err != nil {
		return hsm.KeyRecord{}, fmt.Errorf("reading key %s back: %w", record.ID, err)
	}
	if k, _ := f.key(record.ID); k.State != StateLive || !bytes.Equal(k.SPKI, record.SPKI) {
		return hsm.KeyRecord{}, fmt.Errorf("reading key %s back: entered as live, but now %q: the database lost the entry; try again", record.ID, k.State)
	}
	if err := g.refresh(ctx); err != nil {
		return hsm.KeyRecord{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, m := range g.members {
		if m.info.Incarnation == incarnations[i] && m.quarantine == "" {
			m.proofs[record.ID] = proof{at: g.cfg.Now()}
		}
	}
	g.log.Info("key created", "key", record.ID, "label", record.Label, "purpose", record.Purpose, "copies", len(g.members))
	return record, nil
}

// claim enters spec as pending, or returns the live key that is there already.
func (g *Group) claim(ctx context.Context, spec hsm.KeySpec) (*ManifestKey, error) {
	checked := false
	for {
		f, err := g.fold(ctx)
		if err != nil {
			return nil, err
		}
		old, found := f.find(spec.Label, spec.Purpose)
		if found && old.State == StateLive {
			if old.Algorithm != spec.Algorithm {
				return nil, fmt.Errorf("it is live already, as key %s with algorithm %s", old.ID, old.Algorithm)
			}
			return &old, nil
		}
		if !checked {
			if err := g.complete(ctx, f); err != nil {
				return nil, err
			}
			checked = true
		}
		if found {
			err = g.abandon(ctx, f.Next, old.ID, "left pending; created anew")
		} else {
			var payload []byte
			if payload, err = json.Marshal(hsm.KeyRecord{KeySpec: spec}); err == nil {
				err = g.append(ctx, Entry{N: f.Next, Event: string(StatePending), Subject: string(spec.ID), Payload: payload})
			}
			if err == nil {
				return nil, nil
			}
		}
		if err != nil && !errors.Is(err, ErrTaken) {
			return nil, err
		}
	}
}

// complete refuses to create a key unless every member of the group is configured, well, and in the domain.
func (g *Group) complete(ctx context.Context, f Folded) error {
	if len(g.members) < minCopies {
		return fmt.Errorf("the group has %d member; %d copies of a key are needed", len(g.members), minCopies)
	}
	if f.Domain.Name == "" {
		return errors.New("the group has no domain key yet: create the domain first")
	}
	infos, err := g.infos(ctx)
	if err != nil {
		return err
	}
	if err := g.sameMembers(f, infos); err != nil {
		return err
	}
	for _, info := range infos {
		switch {
		case f.Members[info.Member] == "":
			return fmt.Errorf("member %s has not joined the group: create the domain again", info.Member)
		case info.KEK != f.Domain.Name:
			return fmt.Errorf("member %s holds domain key %q instead of %s: create the domain again", info.Member, info.KEK, f.Domain.Name)
		}
	}
	return nil
}

// sameMembers refuses a configuration that leaves out a member of the group, and a token that is not the one that joined.
func (g *Group) sameMembers(f Folded, infos []hsm.Info) error {
	for name, serial := range f.Members {
		i := slices.IndexFunc(infos, func(m hsm.Info) bool { return m.Member == name })
		switch {
		case i < 0:
			return fmt.Errorf("member %s of the group is not configured here", name)
		case infos[i].TokenSerial != serial:
			return fmt.Errorf("member %s has token %s, but joined with %s: the token was replaced or initialised", name, infos[i].TokenSerial, serial)
		}
	}
	return nil
}

// replicate makes the key on the first member, clones it to all others and has all prove it. The incarnations are those
// that proved, in the members' order.
func (g *Group) replicate(ctx context.Context, spec hsm.KeySpec) (hsm.KeyRecord, []string, error) {
	fail := func(format string, args ...any) (hsm.KeyRecord, []string, error) {
		return hsm.KeyRecord{}, nil, fmt.Errorf(format, args...)
	}
	origin := g.members[0]
	var record hsm.KeyRecord
	var blob hsm.Blob
	err := step(ctx, func(ctx context.Context) (err error) { record, err = origin.agent.Generate(ctx, spec); return err })
	if err != nil {
		return fail("generating it on %s: %w", origin.Name, err)
	}
	public, err := parsePublic(record.SPKI)
	if err != nil {
		return fail("generating it on %s: %w", origin.Name, err)
	}
	if record.KeySpec != spec || record.Fault != "" {
		return fail("generating it on %s: asked for %+v, got %+v %s", origin.Name, spec, record.KeySpec, record.Fault)
	}
	err = step(ctx, func(ctx context.Context) (err error) { blob, err = origin.agent.Export(ctx, spec.ID); return err })
	if err != nil {
		return fail("exporting it from %s: %w", origin.Name, err)
	}
	if blob.KeySpec != spec || !bytes.Equal(blob.SPKI, record.SPKI) {
		return fail("exporting it from %s: the blob is of another key", origin.Name)
	}
	err = g.each(ctx, func(ctx context.Context, _ int, m *member) error {
		if m == origin {
			return nil
		}
		clone, err := m.agent.Import(ctx, blob)
		switch {
		case err != nil:
			return fmt.Errorf("importing it into %s: %w", m.Name, err)
		case clone.KeySpec != spec || !bytes.Equal(clone.SPKI, record.SPKI) || clone.Fault != "":
			return fmt.Errorf("importing it into %s: the token holds another key under its id %s", m.Name, clone.Fault)
		case clone.Attributes != record.Attributes:
			return fmt.Errorf("importing it into %s: the clone's policy attributes differ from the original's", m.Name)
		}
		return nil
	})
	if err != nil {
		return hsm.KeyRecord{}, nil, err
	}
	incarnations, err := g.proveAll(ctx, record, public)
	return record, incarnations, err
}

func (g *Group) proveAll(ctx context.Context, record hsm.KeyRecord, public *ecdsa.PublicKey) ([]string, error) {
	incarnations := make([]string, len(g.members))
	err := g.each(ctx, func(ctx context.Context, i int, m *member) (err error) {
		incarnations[i], err = askProof(ctx, g.cfg.Group, m, record, public)
		if errors.Is(err, errBadProof) {
			g.mu.Lock()
			defer g.mu.Unlock()
			g.quarantined(m, fmt.Sprintf("its proof of the new key %s (%s) does not verify", record.ID, record.Label))
		}
		if err != nil {
			return fmt.Errorf("proving it on %s: %w", m.Name, err)
		}
		return nil
	})
	return incarnations, err
}

// goLive enters the key as live.
func (g *Group) goLive(ctx context.Context, record hsm.KeyRecord) error {
	payload, err := json.Marshal(record)
	if err != nil {
		return err
	}
	for {
		f, err := g.fold(ctx)
		if err != nil {
			return err
		}
		if k, _ := f.key(record.ID); k.State != StatePending {
			return fmt.Errorf("key %s is %q: another coordinator is at work", record.ID, k.State)
		}
		err = g.append(ctx, Entry{N: f.Next, Event: string(StateLive), Subject: string(record.ID), Payload: payload})
		if !errors.Is(err, ErrTaken) {
			return err
		}
	}
}

// giveUp enters the key as abandoned after cause, unless it has become live after all or the log cannot be written; the
// next CreateKey takes it from there. It returns the error to report.
func (g *Group) giveUp(ctx context.Context, spec hsm.KeySpec, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpTimeout)
	defer cancel()
	for {
		f, err := g.fold(ctx)
		if err == nil {
			switch k, _ := f.key(spec.ID); k.State {
			case StatePending:
				err = g.abandon(ctx, f.Next, spec.ID, cause.Error())
			case StateLive:
				return fmt.Errorf("key %s became live, although: %w; try again", spec.ID, cause)
			default:
				return cause
			}
		}
		switch {
		case err == nil:
			return fmt.Errorf("%w (key %s is abandoned)", cause, spec.ID)
		case !errors.Is(err, ErrTaken):
			return fmt.Errorf("%w; key %s stays pending: %w", cause, spec.ID, err)
		}
	}
}

func (g *Group) abandon(ctx context.Context, n uint64, id hsm.KeyID, why string) error {
	g.log.Warn("abandoning a key; nothing is destroyed", "key", id, "why", why)
	payload, err := json.Marshal(struct {
		Why string `json:"why"`
	}{why})
	if err != nil {
		return err
	}
	err = g.append(ctx, Entry{N: n, Event: string(StateAbandoned), Subject: string(id), Payload: payload})
	return err
}

func (g *Group) mayCoordinate() error {
	if g.chain == nil {
		return fmt.Errorf("the manifest of group %s is read-only here", g.cfg.Group)
	}
	if !hsm.MayManage(g.role) {
		return fmt.Errorf("role %q may not manage the keys of group %s", g.role, g.cfg.Group)
	}
	return nil
}

func (g *Group) fold(ctx context.Context) (Folded, error) {
	entries, err := g.chain.Log(ctx, g.cfg.Group)
	if err != nil {
		return Folded{}, fmt.Errorf("reading the log of group %s: %w", g.cfg.Group, err)
	}
	return Fold(entries)
}

func (g *Group) append(ctx context.Context, e Entry) error {
	e.Actor, e.Created = g.actor, g.cfg.Now().UTC()
	if err := g.chain.Append(ctx, g.cfg.Group, e); err != nil {
		return fmt.Errorf("writing entry %d (%s) to the log of group %s: %w", e.N, e.Event, g.cfg.Group, err)
	}
	return nil
}

// infos asks every member what it is, in the members' order. It fails unless all are well and each has its own token.
func (g *Group) infos(ctx context.Context) ([]hsm.Info, error) {
	infos := make([]hsm.Info, len(g.members))
	err := g.each(ctx, func(ctx context.Context, i int, m *member) error {
		info, err := m.agent.Health(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("asking %s for its health: %w", m.Name, err)
		case info.Member != m.Name:
			return fmt.Errorf("%s answers as member %q instead of %s", m.Address, info.Member, m.Name)
		case !info.Probe.OK:
			return fmt.Errorf("member %s cannot sign: %s", m.Name, info.Probe.Cause)
		}
		infos[i] = info
		return nil
	})
	if err != nil {
		return nil, err
	}
	tokens := map[string]string{}
	for _, info := range infos {
		if other, twice := tokens[info.TokenSerial]; twice {
			return nil, fmt.Errorf("members %s and %s share token %s: that is one copy, not two", other, info.Member, info.TokenSerial)
		}
		tokens[info.TokenSerial] = info.Member
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range g.members {
		if m.quarantine != "" {
			return nil, fmt.Errorf("member %s is quarantined: %s", m.Name, m.quarantine)
		}
	}
	return infos, nil
}

// each calls do for every member at once, each with its own deadline, and returns the first error.
func (g *Group) each(ctx context.Context, do func(ctx context.Context, i int, m *member) error) error {
	run, ctx := errgroup.WithContext(ctx)
	for i, m := range g.members {
		run.Go(func() error {
			return step(ctx, func(ctx context.Context) error { return do(ctx, i, m) })
		})
	}
	return run.Wait()
}

func step(ctx context.Context, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	return do(ctx)
}
