package agent

import (
	"bytes"
	"context"
	"fmt"

	"trivet/hsm"
	"trivet/identity"
)

// agreeOnEpoch brings the site epochs of token and state together: the higher counts, so that neither a disk that was put
// back nor a token that was restored takes the member back to an older site. With equal numbers the token is right, since it
// is written first.
func (s *Server) agreeOnEpoch(t Token) error {
	inToken, err := t.Epoch()
	if err != nil {
		return fmt.Errorf("reading the site epoch in the token: %w", err)
	}
	inToken.Grant = nil
	onDisk := s.cfg.State.epoch()
	if inToken.Epoch == onDisk.Epoch && inToken.Site == onDisk.Site {
		return nil
	}
	right := inToken
	if onDisk.Epoch > inToken.Epoch {
		right = onDisk
	}
	self := s.cfg.Identity.Principal().String()
	if err := s.cfg.Audit(Act{self, "epoch", right.Site, "begun", fmt.Sprintf("epoch=%d; token had %d of %q, disk %d of %q", right.Epoch, inToken.Epoch, inToken.Site, onDisk.Epoch, onDisk.Site)}); err != nil {
		return fmt.Errorf("writing the audit record: %w", err)
	}
	s.cfg.Log.Warn("site epochs differ, the higher counts", "token", inToken.Epoch, "token_site", inToken.Site, "disk", onDisk.Epoch, "disk_site", onDisk.Site)
	if right.Epoch > inToken.Epoch {
		if err := t.SetEpoch(right); err != nil {
			return fmt.Errorf("writing the site epoch into the token: %w", err)
		}
	} else if err := s.cfg.State.change(s.cfg.Now(), func(f *facts) { f.Site, f.Epoch = right.Site, right.Epoch }); err != nil {
		return err
	}
	if err := s.cfg.Audit(Act{self, "epoch", right.Site, "ok", fmt.Sprintf("epoch=%d", right.Epoch)}); err != nil {
		return fmt.Errorf("writing the audit record: %w", err)
	}
	return nil
}

// setEpoch learns which site may write, from a record that people approved; never from a request to sign.
func (s *Server) setEpoch(ctx context.Context, by identity.Principal, r hsm.EpochRecord) (none, error) {
	const op = "epoch"
	t, err := s.token(op)
	if err != nil {
		return none{}, err
	}
	if n := len(r.Site); n < 1 || n > 64 || bytes.ContainsAny([]byte(r.Site), "\x00\n") {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "site name of %d octets: must be 1 to 64", n)
	}
	if r.Epoch == 0 {
		return none{}, hsm.Errorf(hsm.ClassRequest, op, "site epoch 0 means that there is none: it begins with 1")
	}
	now := s.cfg.State.epoch()
	if now.Site == r.Site && now.Epoch == r.Epoch {
		return none{}, nil
	}
	var a approval
	if first := now.Epoch == 0 && r.Epoch == 1; !first || len(r.Grant) > 0 {
		d := promoting(r)
		if a, err = s.approved(r.Grant, d); err != nil {
			return none{}, s.refused(by, op, r.Site, err)
		}
		if a.action == actionPromote && r.Epoch != now.Epoch+1 {
			return none{}, s.refused(by, op, r.Site, &hsm.Error{Class: hsm.ClassDenied, Code: hsm.CodeEpoch, Op: op,
				Err: fmt.Errorf("a promotion leads from site epoch %d to %d, this one is to %d: use the records in between, or %s", now.Epoch, now.Epoch+1, r.Epoch, actionRepair)})
		}
		finished, err := s.take(a, d)
		if err != nil {
			return none{}, s.refused(by, op, r.Site, err)
		}
		if finished { // and another record came later: this one is history
			return none{}, nil
		}
	}
	record := hsm.EpochRecord{Site: r.Site, Epoch: r.Epoch}
	detail := fmt.Sprintf("epoch=%d from=%d of %q %s", r.Epoch, now.Epoch, now.Site, a)
	if _, err := managed(ctx, s, by, act{op: op, object: r.Site, detail: detail}, func() (none, error) { return none{}, t.SetEpoch(record) }); err != nil {
		return none{}, err
	}
	return none{}, s.fenced(op, func(f *facts) {
		f.Site, f.Epoch = r.Site, r.Epoch
		a.finish(f)
	})
}
