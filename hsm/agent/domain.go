package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"maps"

	"trivet/hsm"
	"trivet/identity"
)

func (s *Server) transportKey(ctx context.Context, _ identity.Principal, _ none) (transportKey, error) {
	const op = "transport-key"
	t, err := s.token(op)
	if err != nil {
		return transportKey{}, err
	}
	spki, err := call(ctx, s.dog, op, s.cfg.CallTimeout, t.TransportKey)
	if err != nil {
		return transportKey{}, err
	}
	transport, err := attest(s.cfg.Identity, spki)
	return transportKey{transport}, err
}

// holds tells whether the token holds a whole domain key of that name.
func holds(i hsm.Info, kek string) bool { return kek != "" && (i.KEK == kek || i.NextKEK == kek) }

// named is the token in use, and checks the name of a domain key.
func (s *Server) named(op, kek string) (Token, error) {
	if err := hsm.CheckDomainName(kek); err != nil {
		return nil, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	return s.token(op)
}

func (s *Server) domainGenerate(ctx context.Context, by identity.Principal, req domainRequest) (none, error) {
	const op = "domain-generate"
	t, err := s.named(op, req.KEK)
	if err != nil {
		return none{}, err
	}
	if err := s.own(by, op, req.KEK, t, hsm.DomainGroup(req.KEK)); err != nil {
		return none{}, err
	}
	if !holds(t.Info(), req.KEK) {
		if err := s.change(op, func(f *facts) { put(&f.Domains, req.KEK, made) }); err != nil {
			return none{}, err
		}
	}
	return managed(ctx, s, by, act{op: op, object: req.KEK}, func() (none, error) { return none{}, t.GenerateDomain(req.KEK) })
}

// domainExport lets a domain key go to a token that an hsmd of this cluster vouches for. Once there are keys that it
// protects, people must approve each new one: an agent's identity alone makes nobody a member.
func (s *Server) domainExport(ctx context.Context, by identity.Principal, req hsm.DomainRequest) (wrappedDomain, error) {
	const op = "domain-export"
	if err := checkGroup(op, req.Group); err != nil {
		return wrappedDomain{}, err
	}
	t, err := s.token(op)
	if err != nil {
		return wrappedDomain{}, err
	}
	if err := s.own(by, op, req.Group, t, req.Group); err != nil {
		return wrappedDomain{}, err
	}
	spki, to, err := attested(s.cfg.Identity, req.Recipient, s.cfg.Now())
	if err != nil {
		return wrappedDomain{}, s.refused(by, op, "", hsm.Errorf(hsm.ClassDenied, op, "%w", err))
	}
	transport := hsm.Fingerprint(spki)
	var known, guarded bool
	roster := map[string]string{}
	s.cfg.State.read(func(f facts) {
		_, known = f.Transports[transport]
		guarded = f.Guarded
		maps.Copy(roster, f.Transports)
	})
	i := t.Info()
	guarded = guarded || i.Keys+i.Faulty > 0
	var a approval
	if d := enrolling(req.Group, to.Name, transport); guarded && !known || len(req.Grant) > 0 {
		if a, err = s.approved(req.Grant, d); err != nil {
			return wrappedDomain{}, s.refused(by, op, d.object, err)
		}
	}
	if !known {
		if err := s.change(op, func(f *facts) {
			maps.DeleteFunc(f.Transports, func(_, member string) bool { return member == to.Name }) // the token it had before
			put(&f.Transports, transport, to.Name)
		}); err != nil {
			return wrappedDomain{}, err
		}
	}
	own, err := call(ctx, s.dog, op, s.cfg.CallTimeout, t.TransportKey)
	if err != nil {
		return wrappedDomain{}, err
	}
	for len(roster) >= maxKnown { // more than any group has members; whoever is left out needs an approval again
		for transport := range roster {
			delete(roster, transport)
			break
		}
	}
	roster[hsm.Fingerprint(own)] = s.cfg.Member
	detail := "group=" + req.Group + " to=" + to.String() + " transport=" + transport + " kek=" + cmp.Or(req.KEK, i.KEK) + " " + a.String()
	return managed(ctx, s, by, act{op: op, object: to.Name, detail: detail}, func() (wrappedDomain, error) {
		wrapped, kek, err := t.ExportDomain(req.KEK, spki)
		if err != nil {
			return wrappedDomain{}, err
		}
		c := conveyed{KEK: kek, To: transport, Wrapped: wrapped, Origin: s.origin(kek), Guarded: guarded, Known: roster}
		wrapped, err = c.seal(s.cfg.Identity)
		return wrappedDomain{kek, wrapped}, err
	})
}

// domainImport takes a domain key in. One that was brought in from outside could be known to whoever brought it, and keys
// are exported under any domain key that the token holds: so it comes only into a token that holds nothing yet, be it
// directly or through a member that took it so.
func (s *Server) domainImport(ctx context.Context, by identity.Principal, req wrappedDomain) (none, error) {
	const op = "domain-import"
	t, err := s.named(op, req.KEK)
	if err != nil {
		return none{}, err
	}
	if err := s.own(by, op, req.KEK, t, hsm.DomainGroup(req.KEK)); err != nil {
		return none{}, err
	}
	own, err := call(ctx, s.dog, op, s.cfg.CallTimeout, t.TransportKey)
	if err != nil {
		return none{}, err
	}
	c, err := openConveyed(s.cfg.Identity, req.KEK, req.Wrapped, hsm.Fingerprint(own), s.cfg.Now())
	if err != nil {
		return none{}, s.refused(by, op, req.KEK, err)
	}
	i := t.Info()
	if !holds(i, req.KEK) {
		if c.Origin == brought && (i.KEK != "" || i.NextKEK != "" || i.Keys+i.Faulty > 0) {
			return none{}, s.refused(by, op, req.KEK, hsm.Errorf(hsm.ClassDenied, op,
				"domain key %q was brought in from outside a token, and this one holds domain key %q and %d keys already: rotate to a domain key that a token made", req.KEK, i.KEK, i.Keys))
		}
		if err := s.change(op, func(f *facts) {
			put(&f.Domains, req.KEK, c.Origin)
			f.Guarded = f.Guarded || c.Guarded
			for transport, member := range c.Known {
				put(&f.Transports, transport, member)
			}
		}); err != nil {
			return none{}, err
		}
	}
	return managed(ctx, s, by, act{op: op, object: req.KEK, detail: "origin=" + string(c.Origin)}, func() (none, error) {
		return none{}, t.ImportDomain(req.KEK, c.Wrapped)
	})
}

// sound refuses to move keys under a domain key that was brought in from outside while the token holds one that a token made:
// such a pair is either the end of a rotation, when the new one is the one to use, or somebody's attempt to read keys.
func (s *Server) sound(op string, t Token, kek string) error {
	current, next := t.Domains()
	if kek == "" {
		kek = current
	}
	if kek == "" || kek != current && kek != next || s.origin(kek) == made { // one that it does not hold is the token's to refuse
		return nil
	}
	for _, other := range []string{current, next} {
		if other != "" && other != kek && s.origin(other) == made {
			return hsm.Errorf(hsm.ClassDenied, op, "domain key %q was brought in from outside a token, and this one holds %q, which a token made: finish the rotation", kek, other)
		}
	}
	return nil
}

func (s *Server) origin(kek string) (o origin) {
	s.cfg.State.read(func(f facts) { o = f.Domains[kek] })
	return cmp.Or(o, brought)
}

func (s *Server) domainRotate(ctx context.Context, by identity.Principal, req domainRequest) (none, error) {
	const op = "domain-rotate"
	t, err := s.named(op, req.KEK)
	if err != nil {
		return none{}, err
	}
	return managed(ctx, s, by, act{op: op, object: req.KEK, detail: "from=" + t.Info().KEK}, func() (none, error) { return none{}, t.Rotate(req.KEK) })
}

func (s *Server) domainDrop(ctx context.Context, by identity.Principal, req domainRequest) (none, error) {
	const op = "domain-drop"
	t, err := s.named(op, req.KEK)
	if err != nil {
		return none{}, err
	}
	if _, err := managed(ctx, s, by, act{op: op, object: req.KEK}, func() (none, error) { return none{}, t.DropDomain(req.KEK) }); err != nil {
		return none{}, err
	}
	return none{}, s.change(op, func(f *facts) {
		delete(f.Domains, req.KEK)
		if i := t.Info(); i.KEK == "" && i.NextKEK == "" { // no group's any more
			f.Guarded, f.Transports = false, nil
		}
	})
}

// domainForget takes back that a domain key may go to a transport key unasked. It takes trust away and gives none, so that it
// needs no approval.
func (s *Server) domainForget(ctx context.Context, by identity.Principal, req forgetRequest) (none, error) {
	const op = "domain-forget"
	if b, err := hex.DecodeString(req.Transport); err != nil || len(b) != sha256.Size {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "transport %.80q must be the hex SHA-256 of a transport key", req.Transport)
	}
	known := ""
	s.cfg.State.read(func(f facts) { known = f.Transports[req.Transport] })
	if known == "" {
		return none{}, nil
	}
	return managed(ctx, s, by, act{op: op, object: known, detail: "transport=" + req.Transport}, func() (none, error) {
		return none{}, s.change(op, func(f *facts) { delete(f.Transports, req.Transport) })
	})
}

func (s *Server) backup(ctx context.Context, by identity.Principal, req hsm.BackupRequest) (wrappedDomain, error) {
	const op = "backup"
	if err := checkGroup(op, req.Group); err != nil {
		return wrappedDomain{}, err
	}
	t, err := s.token(op)
	if err != nil {
		return wrappedDomain{}, err
	}
	if err := s.own(by, op, req.Group, t, req.Group); err != nil {
		return wrappedDomain{}, err
	}
	if len(req.Recipient) == 0 || len(req.Recipient) > hsm.MaxBlob {
		return wrappedDomain{}, hsm.Errorf(hsm.ClassRequest, op, "recipient of %d octets: must be 1 to %d", len(req.Recipient), hsm.MaxBlob)
	}
	a, _, err := s.granted(by, req.Grant, backingUp(req))
	if err != nil {
		return wrappedDomain{}, err
	}
	out, err := managed(ctx, s, by, act{op: op, object: req.Group, detail: "kek=" + t.Info().KEK + " recipient=" + hsm.Fingerprint(req.Recipient) + " " + a.String()}, func() (wrappedDomain, error) {
		wrapped, kek, err := t.ExportDomain("", req.Recipient)
		return wrappedDomain{kek, wrapped}, err
	})
	if err == nil {
		err = s.finish(a, op)
	}
	return out, err
}
