package agent

import (
	"context"

	"trivet/hsm"
	"trivet/identity"
)

// activate opens the token of a locked agent with the PIN that an operator gives: one try per call. A refused PIN leaves the
// agent locked, and alive; anything worse ends it, as everywhere. Nothing keeps the PIN.
func (s *Server) activate(ctx context.Context, by identity.Principal, req activateRequest) (none, error) {
	if s.locked() == "" {
		return none{}, nil
	}
	if n := len(req.PIN); n < 1 || n > maxPIN {
		return none{}, hsm.Errorf(hsm.ClassRequest, opActivate, "PIN of %d octets: must be 1 to %d", n, maxPIN)
	}
	return managed(ctx, s, by, act{op: opActivate, object: s.cfg.Label, limit: s.long()}, func() (none, error) {
		t, err := s.cfg.Activate(req.PIN)
		if err != nil {
			return none{}, err
		}
		return none{}, s.open(t)
	})
}
