package agent

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"trivet/hsm"
	"trivet/identity"
)

// usable is the key with its token, if this caller may use it so.
func (s *Server) usable(op string, by identity.Principal, id hsm.KeyID, may func(string, hsm.Purpose) bool) (Token, hsm.KeyRecord, error) {
	t, err := s.token(op)
	if err != nil {
		return nil, hsm.KeyRecord{}, err
	}
	k, err := t.Key(id)
	if err != nil {
		return nil, k, err
	}
	if !may(string(by.Role), k.Purpose) {
		return nil, k, hsm.Errorf(hsm.ClassDenied, op, "role %s may not %s with keys of purpose %s", by.Role, op, k.Purpose)
	}
	if err := s.cfg.State.destroyed(op, id); err != nil {
		return t, k, err
	}
	return t, k, s.cfg.State.retired(op, id)
}

func (s *Server) sign(ctx context.Context, by identity.Principal, req hsm.SignRequest) (signResponse, error) {
	const op = "sign"
	if n := len(req.Digests); n < 1 || n > hsm.MaxBatch {
		return signResponse{}, hsm.Errorf(hsm.ClassRequest, op, "%d digests: must be 1 to %d", n, hsm.MaxBatch)
	}
	if req.Incarnation != "" && req.Incarnation != s.cfg.Incarnation {
		return signResponse{}, &hsm.Error{Class: hsm.ClassSession, Code: hsm.CodeStaleIncarnation, Op: op,
			Err: fmt.Errorf("this agent was started again since incarnation %.40q proved to hold the key: have it prove again", req.Incarnation)}
	}
	s.fence.RLock()
	defer s.fence.RUnlock()
	t, k, err := s.usable(op, by, req.Key, hsm.MaySign)
	if err != nil {
		return signResponse{}, err
	}
	if own := s.cfg.State.epoch(); (k.Purpose == hsm.PurposeCA || k.Purpose == hsm.PurposeCRL) && req.Epoch != own.Epoch {
		return signResponse{}, &hsm.Error{Class: hsm.ClassDenied, Code: hsm.CodeEpoch, Op: op,
			Err: fmt.Errorf("the request is of site epoch %d, this member of %d (site %q): it signs with keys of purpose %s for its own alone", req.Epoch, own.Epoch, own.Site, k.Purpose)}
	}
	for _, d := range req.Digests {
		if err := k.Algorithm.CheckDigest(d); err != nil {
			return signResponse{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
		}
	}
	sigs, err := s.batch(ctx, t, by.String(), k, req.Digests)
	return signResponse{sigs}, err
}

// batch sends one batch through the module, a few digests at a time: all signatures or an error.
func (s *Server) batch(ctx context.Context, t Token, caller string, k hsm.KeyRecord, digests [][]byte) ([][]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// A goroutine for each signature, whose stack grows on its way into the module, took a tenth of an agent's time.
	parts := slices.Collect(slices.Chunk(digests, min(together, (len(digests)+parallel-1)/parallel)))
	results := make([][][]byte, len(parts))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(parallel, len(parts)) {
		wg.Go(func() {
			for n := int(next.Add(1)) - 1; n < len(parts) && ctx.Err() == nil; n = int(next.Add(1)) - 1 {
				sigs, err := calls(ctx, s.dog, "sign", s.cfg.CallTimeout, func(next func()) ([][]byte, error) {
					sigs := make([][]byte, 0, len(parts[n]))
					defer func() { s.count(caller, k, len(sigs)) }() // here, since nobody may wait for them any more
					for i, digest := range parts[n] {
						if i > 0 {
							if ctx.Err() != nil {
								break // which is no fault of the token's
							}
							next()
						}
						sig, err := t.Sign(k.ID, digest)
						if err != nil {
							return nil, err
						}
						sigs = append(sigs, sig)
					}
					return sigs, nil
				})
				if err != nil {
					cancel(err)
					return
				}
				results[n] = sigs
			}
		})
	}
	wg.Wait()
	if sigs := slices.Concat(results...); len(sigs) == len(digests) {
		return sigs, nil
	}
	err := context.Cause(ctx)
	if hsm.ClassOf(err) == 0 {
		err = &hsm.Error{Class: hsm.ClassDevice, Op: "sign", Err: err}
	}
	return nil, err
}

// count adds signatures that were made to the metrics and to what the audit record will say of the caller.
func (s *Server) count(caller string, k hsm.KeyRecord, made int) {
	s.metrics.signatures.WithLabelValues(string(k.Purpose), string(k.ID)).Add(float64(made))
	s.countsMu.Lock()
	defer s.countsMu.Unlock()
	s.counts[signed{caller, k.ID}] += uint64(made)
}

// challenge proves possession of a key: the agent builds what is signed, and records it before it is signed.
func (s *Server) challenge(ctx context.Context, by identity.Principal, req challengeRequest) (challengeResponse, error) {
	const op = "challenge"
	if n := len(req.Nonce); n < hsm.MinNonce || n > hsm.MaxNonce || len(req.Group) < 1 || len(req.Group) > 64 {
		return challengeResponse{}, hsm.Errorf(hsm.ClassRequest, op, "nonce of %d octets must be %d to %d, group name of %d must be 1 to 64", n, hsm.MinNonce, hsm.MaxNonce, len(req.Group))
	}
	t, k, err := s.usable(op, by, req.Key, hsm.MayChallenge)
	if err != nil {
		return challengeResponse{}, err
	}
	caller, digest := by.String(), hsm.ChallengeDigest(k.Algorithm, req.Group, s.cfg.Member, s.cfg.Incarnation, k.ID, req.Nonce)
	shown := hex.EncodeToString(digest)
	if err := s.audit(Act{caller, op, string(k.ID), "begun", "class=pop group=" + req.Group + " digest=" + shown}); err != nil {
		return challengeResponse{}, err
	}
	sig, err := call(ctx, s.dog, op, s.cfg.CallTimeout, func() ([]byte, error) { return t.Sign(k.ID, digest) })
	s.cfg.Log.Info("challenge", "class", "pop", "caller", caller, "group", req.Group, "key", k.ID, "digest", shown, "ok", err == nil)
	return challengeResponse{sig, s.cfg.Incarnation}, err
}
