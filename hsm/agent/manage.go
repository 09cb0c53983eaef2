package agent

import (
	"bytes"
	"cmp"
	"context"
	"time"

	"trivet/hsm"
	"trivet/identity"
)

// act is one operation that changes the token or lets a key out.
type act struct {
	op, object, detail string
	limit              time.Duration // 0: five calls
}

// managed runs an act between two audit entries, and to its end: a caller who gives up changes nothing about what happens
// and what is recorded of it.
func managed[T any](ctx context.Context, s *Server, by identity.Principal, a act, fn func() (T, error)) (T, error) {
	var zero T
	caller := by.String()
	if err := s.audit(Act{caller, a.op, a.object, "begun", a.detail}); err != nil {
		return zero, err
	}
	if a.limit == 0 {
		a.limit = 5 * s.cfg.CallTimeout
	}
	var v T
	free, err := s.dog.slot(ctx, a.op)
	if err == nil {
		v, err = watch(context.WithoutCancel(ctx), s.dog, a.op, a.limit, free, fn)
	}
	outcome, detail := "ok", a.detail
	if err != nil {
		outcome, detail = hsm.ClassOf(err).String(), err.Error()
	}
	s.cfg.Log.Info("management", "caller", caller, "op", a.op, "object", a.object, "outcome", outcome, "detail", detail)
	if failed := s.audit(Act{caller, a.op, a.object, outcome, detail}); failed != nil {
		return zero, failed
	}
	return v, err
}

// refused records that an act was refused for want of approval: somebody tried.
func (s *Server) refused(by identity.Principal, op, object string, cause error) error {
	s.cfg.Log.Warn("management refused", "caller", by.String(), "op", op, "object", object, "cause", cause)
	if failed := s.audit(Act{by.String(), op, object, hsm.ClassOf(cause).String(), cause.Error()}); failed != nil {
		return failed
	}
	return cause
}

// granted is approved and take in one: the approval to act on, and whether the deed was finished before.
func (s *Server) granted(by identity.Principal, grant []byte, d deed) (a approval, finished bool, err error) {
	if a, err = s.approved(grant, d); err == nil {
		finished, err = s.take(a, d)
	}
	if err != nil {
		return a, false, s.refused(by, d.op, d.object, err)
	}
	return a, finished, nil
}

func (s *Server) inventory(ctx context.Context, _ identity.Principal, _ none) (keysResponse, error) {
	const op = "inventory"
	t, err := s.token(op)
	if err != nil {
		return keysResponse{}, err
	}
	free, err := s.dog.slot(ctx, op)
	if err != nil {
		return keysResponse{}, err
	}
	keys, err := watch(context.WithoutCancel(ctx), s.dog, op, s.long(), free, t.Inventory)
	return keysResponse{keys}, err
}

func (s *Server) generate(ctx context.Context, by identity.Principal, spec hsm.KeySpec) (hsm.KeyRecord, error) {
	const op = "generate"
	t, err := s.token(op)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	if err := spec.Check(); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if err := s.cfg.State.destroyed(op, spec.ID); err != nil {
		return hsm.KeyRecord{}, err
	}
	a := act{op: op, object: string(spec.ID), detail: describe(spec)}
	if spec.Algorithm.RSABits() > 0 {
		a.limit = s.long()
	}
	return managed(ctx, s, by, a, func() (hsm.KeyRecord, error) { return t.Generate(spec) })
}

func describe(spec hsm.KeySpec) string {
	return "label=" + spec.Label + " purpose=" + string(spec.Purpose) + " algorithm=" + string(spec.Algorithm)
}

func (s *Server) export(ctx context.Context, by identity.Principal, req exportRequest) (hsm.Blob, error) {
	const op = "export"
	t, err := s.token(op)
	if err != nil {
		return hsm.Blob{}, err
	}
	if _, err := t.Key(req.Key); err != nil {
		return hsm.Blob{}, err
	}
	if err := s.cfg.State.destroyed(op, req.Key); err != nil {
		return hsm.Blob{}, err
	}
	if req.KEK != "" {
		if err := hsm.CheckDomainName(req.KEK); err != nil {
			return hsm.Blob{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
		}
	}
	if err := s.sound(op, t, req.KEK); err != nil {
		return hsm.Blob{}, err
	}
	current, _ := t.Domains()
	return managed(ctx, s, by, act{op: op, object: string(req.Key), detail: "kek=" + cmp.Or(req.KEK, current)}, func() (hsm.Blob, error) { return t.Export(req.Key, req.KEK) })
}

func (s *Server) importKey(ctx context.Context, by identity.Principal, b hsm.Blob) (hsm.KeyRecord, error) {
	const op = "import"
	t, err := s.token(op)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	if err := b.Check(); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if err := s.cfg.State.destroyed(op, b.ID); err != nil {
		return hsm.KeyRecord{}, err
	}
	if err := s.sound(op, t, b.KEK); err != nil {
		return hsm.KeyRecord{}, err
	}
	return managed(ctx, s, by, act{op: op, object: string(b.ID), detail: describe(b.KeySpec) + " kek=" + b.KEK}, func() (hsm.KeyRecord, error) { return t.Import(b) })
}

func (s *Server) adopt(ctx context.Context, by identity.Principal, req hsm.AdoptRequest) (hsm.KeyRecord, error) {
	const op = "adopt"
	t, err := s.token(op)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	if err := req.Spec.Check(); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if err := checkGroup(op, req.Group); err != nil {
		return hsm.KeyRecord{}, err
	}
	if err := s.own(by, op, string(req.Spec.ID), t, req.Group); err != nil {
		return hsm.KeyRecord{}, err
	}
	if _, err := req.Spec.Algorithm.ParsePublic(req.SPKI); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if n := len(req.Sealed); n == 0 || n > maxSealed {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "sealed key of %d octets: must be 1 to %d", n, maxSealed)
	}
	if err := s.cfg.State.destroyed(op, req.Spec.ID); err != nil {
		return hsm.KeyRecord{}, err
	}
	d := adopting(req)
	a, _, err := s.granted(by, req.Grant, d)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	k, err := managed(ctx, s, by, act{op: op, object: string(req.Spec.ID), detail: describe(req.Spec) + " " + a.String()}, func() (hsm.KeyRecord, error) {
		// Under another id it could have another purpose, and sign what its own may not.
		held, err := t.Inventory()
		if err != nil {
			return hsm.KeyRecord{}, err
		}
		for _, k := range held {
			if k.ID != req.Spec.ID && bytes.Equal(k.SPKI, req.SPKI) {
				return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "this key is in the token already, as key %s (%s:%s)", k.ID, k.Purpose, k.Label)
			}
		}
		return t.Adopt(req.Spec, req.SPKI, req.Sealed)
	})
	if err == nil {
		err = s.finish(a, op)
	}
	return k, err
}

// destroy forgets a key for good. The tombstone comes before the deed: from the moment that it is there the key is used by
// nobody and comes back from nowhere, whatever happens in between.
func (s *Server) destroy(ctx context.Context, by identity.Principal, req hsm.DestroyRequest) (none, error) {
	const op = "destroy"
	t, err := s.token(op)
	if err != nil {
		return none{}, err
	}
	if _, err := req.Key.Bytes(); err != nil {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if err := checkGroup(op, req.Group); err != nil {
		return none{}, err
	}
	if err := s.own(by, op, string(req.Key), t, req.Group); err != nil {
		return none{}, err
	}
	if len(req.SPKI) == 0 || len(req.SPKI) > hsm.MaxBlob {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "spki of %d octets: must be 1 to %d", len(req.SPKI), hsm.MaxBlob)
	}
	k, err := t.Key(req.Key)
	held := err == nil
	switch {
	case held && !bytes.Equal(k.SPKI, req.SPKI):
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "key %s has public key %s here, not %s", req.Key, hsm.Fingerprint(k.SPKI), hsm.Fingerprint(req.SPKI))
	case held && k.Purpose == hsm.PurposeProbe:
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "key %s is the agent's own", req.Key)
	}
	a, finished, err := s.granted(by, req.Grant, destroying(req))
	if err != nil || finished && !held { // a copy that came back with an old token goes under the same approval
		return none{}, err
	}
	buried := s.cfg.State.destroyed(op, req.Key) != nil
	if !buried {
		if err := s.fenced(op, func(f *facts) { put(&f.Destroyed, req.Key, s.cfg.Now().UTC().Truncate(time.Second)) }); err != nil {
			return none{}, err
		}
	}
	_, err = managed(ctx, s, by, act{op: op, object: string(req.Key), detail: "spki=" + hsm.Fingerprint(req.SPKI) + " " + a.String()}, func() (none, error) {
		return none{}, t.Destroy(req.Key, req.SPKI)
	})
	switch {
	case err == nil:
		s.metrics.signatures.DeleteLabelValues(string(k.Purpose), string(req.Key))
		return none{}, s.finish(a, op)
	case hsm.ClassOf(err) == hsm.ClassRequest && !buried: // the token left it alone: it is another key than was approved
		if failed := s.change(op, func(f *facts) { delete(f.Destroyed, req.Key) }); failed != nil {
			return none{}, failed
		}
	}
	return none{}, err
}

// bury remembers that people have had a key destroyed, as the group's log has it, and destroys nothing: from then on the key is
// used by nobody here and comes in from nowhere. So an approval that has expired is as good: it says what was decided. This is
// how an agent learns what it never knew, being new, or has forgotten, its disk and its token having been put back together.
func (s *Server) bury(_ context.Context, by identity.Principal, req hsm.DestroyRequest) (none, error) {
	const op = "bury"
	if _, err := req.Key.Bytes(); err != nil {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if err := checkGroup(op, req.Group); err != nil {
		return none{}, err
	}
	if s.cfg.State.destroyed(op, req.Key) != nil {
		return none{}, nil
	}
	t, err := s.token(op)
	if err != nil {
		return none{}, err
	}
	if k, err := t.Key(req.Key); err == nil && (!bytes.Equal(k.SPKI, req.SPKI) || k.Purpose == hsm.PurposeProbe) {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "key %s has public key %s here, not %s", req.Key, hsm.Fingerprint(k.SPKI), hsm.Fingerprint(req.SPKI))
	}
	d := destroying(req)
	d.op = op
	a, err := s.approvedOnce(req.Grant, d)
	if err != nil {
		return none{}, s.refused(by, op, d.object, err)
	}
	if err := s.fenced(op, func(f *facts) { put(&f.Destroyed, req.Key, s.cfg.Now().UTC().Truncate(time.Second)) }); err != nil {
		return none{}, err
	}
	return none{}, s.audit(Act{by.String(), op, string(req.Key), "ok", "spki=" + hsm.Fingerprint(req.SPKI) + " " + a.String()})
}

// retire remembers that people have had a key retired, as the group's log has it: from then on it signs and proves nothing here,
// whoever asks and whatever the log says later. Its copy stays, for backups and new members. The approval may have expired, as
// in bury.
func (s *Server) retire(_ context.Context, by identity.Principal, req hsm.RetireRequest) (none, error) {
	const op = "retire"
	if _, err := req.Key.Bytes(); err != nil {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if err := checkGroup(op, req.Group); err != nil {
		return none{}, err
	}
	if s.cfg.State.retired(op, req.Key) != nil {
		return none{}, nil
	}
	t, err := s.token(op)
	if err != nil {
		return none{}, err
	}
	if err := s.own(by, op, string(req.Key), t, req.Group); err != nil {
		return none{}, err
	}
	if k, err := t.Key(req.Key); err == nil && (!bytes.Equal(k.SPKI, req.SPKI) || k.Label != req.Label || k.Purpose != req.Purpose) {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "key %s is %s:%s here, with public key %s, not %s:%s with %s", req.Key, k.Purpose, k.Label, hsm.Fingerprint(k.SPKI), req.Purpose, req.Label, hsm.Fingerprint(req.SPKI))
	}
	d := retiring(req)
	a, err := s.approvedOnce(req.Grant, d)
	if err != nil {
		return none{}, s.refused(by, op, d.object, err)
	}
	if err := s.fenced(op, func(f *facts) { put(&f.Retired, req.Key, s.cfg.Now().UTC().Truncate(time.Second)) }); err != nil {
		return none{}, err
	}
	return none{}, s.audit(Act{by.String(), op, string(req.Key), "ok", "spki=" + hsm.Fingerprint(req.SPKI) + " " + a.String()})
}
