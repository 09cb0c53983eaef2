package agent_test

import (
	"fmt"
	"strconv"
	"testing"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// epochGrant is a promotion or repair as people approved it.
func epochGrant(t *testing.T, w *world, action, site string, epoch uint64) []byte {
	t.Helper()
	return w.grant(t, action, site, map[string]string{"epoch": strconv.FormatUint(epoch, 10)})
}

func TestTheSiteEpochRisesByApprovedRecordsAlone(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	c := s.client(identity.RoleCeremony)
	repair := epochGrant(t, w, "hsm-epoch-repair", "here", 2)
	for i, step := range []struct {
		record hsm.EpochRecord
		code   string // of the refusal
		site   string
		epoch  uint64
	}{
		{hsm.EpochRecord{Site: "here", Epoch: 2}, hsm.CodeApproval, "", 0},
		{hsm.EpochRecord{Site: "here", Epoch: 2, Grant: epochGrant(t, w, "site-promote", "here", 2)}, hsm.CodeEpoch, "", 0},
		{hsm.EpochRecord{Site: "here", Epoch: 1}, "", "here", 1},
		{hsm.EpochRecord{Site: "here", Epoch: 1}, "", "here", 1},
		{hsm.EpochRecord{Site: "there", Epoch: 1}, hsm.CodeApproval, "here", 1},
		{hsm.EpochRecord{Site: "there", Epoch: 2}, hsm.CodeApproval, "here", 1},
		{hsm.EpochRecord{Site: "there", Epoch: 2, Grant: epochGrant(t, w, "site-promote", "here", 2)}, hsm.CodeApproval, "here", 1},
		{hsm.EpochRecord{Site: "there", Epoch: 2, Grant: epochGrant(t, w, "site-promote", "there", 3)}, hsm.CodeApproval, "here", 1},
		{hsm.EpochRecord{Site: "there", Epoch: 3, Grant: epochGrant(t, w, "site-promote", "there", 3)}, hsm.CodeEpoch, "here", 1},
		{hsm.EpochRecord{Site: "there", Epoch: 1<<32 - 1, Grant: epochGrant(t, w, "site-promote", "there", 1<<32-1)}, hsm.CodeEpoch, "here", 1},
		{hsm.EpochRecord{Site: "there", Epoch: 2, Grant: epochGrant(t, w, "site-promote", "there", 2)}, "", "there", 2},
		{hsm.EpochRecord{Site: "there", Epoch: 3, Grant: epochGrant(t, w, "site-promote", "there", 3)}, "", "there", 3},
		{hsm.EpochRecord{Site: "here", Epoch: 2, Grant: repair}, "", "here", 2},
		{hsm.EpochRecord{Site: "there", Epoch: 3, Grant: epochGrant(t, w, "site-promote", "there", 3)}, "", "there", 3},
		{hsm.EpochRecord{Site: "here", Epoch: 2, Grant: repair}, "", "there", 3}, // done long ago: it takes nothing back
	} {
		err := c.SetEpoch(soon(t), step.record)
		if step.code != "" {
			wantCode(t, err, hsm.ClassDenied, step.code)
		} else if err != nil {
			t.Errorf("step %d: %v", i, err)
		}
		if got := s.Info(); got.Site != step.site || got.Epoch != step.epoch {
			t.Fatalf("step %d: epoch %d of %q, want %d of %q", i, got.Epoch, got.Site, step.epoch, step.site)
		}
	}
	for _, bad := range []hsm.EpochRecord{{Site: "", Epoch: 4}, {Site: "here", Epoch: 0}} {
		hsmtest.WantClass(t, c.SetEpoch(soon(t), bad), hsm.ClassRequest)
	}
}

// Keys that issue sign for the member's own epoch alone; a request to sign teaches nothing.
func TestKeysThatIssueSignForTheMembersOwnEpoch(t *testing.T) {
	w := open(t)
	s := serve(t, w.token, nil)
	sign := func(p hsm.Purpose, role identity.Role, epoch uint64) error {
		_, err := s.client(role).Sign(soon(t), hsm.SignRequest{Key: w.keys[p].ID, Digests: hsmtest.Digests(1), Epoch: epoch})
		return err
	}
	for _, own := range []uint64{0, 1} {
		if own == 1 {
			if err := s.client(identity.RoleSync).SetEpoch(soon(t), hsm.EpochRecord{Site: "here", Epoch: 1}); err != nil {
				t.Fatal(err)
			}
		}
		for _, epoch := range []uint64{0, 1, 2, 1<<32 - 1} {
			for _, p := range []hsm.Purpose{hsm.PurposeCA, hsm.PurposeCRL} {
				if err := sign(p, identity.RoleCA, epoch); epoch == own && err != nil {
					t.Errorf("%s at %d for %d: %v", p, own, epoch, err)
				} else if epoch != own {
					wantCode(t, err, hsm.ClassDenied, hsm.CodeEpoch)
				}
			}
			if err := sign(hsm.PurposeOCSP, identity.RoleOCSP, epoch); err != nil {
				t.Errorf("ocsp at %d for %d: %v", own, epoch, err)
			}
			if err := sign(hsm.PurposeAudit, identity.RoleCA, epoch); err != nil {
				t.Errorf("audit at %d for %d: %v", own, epoch, err)
			}
		}
		if got := s.Info().Epoch; got != own {
			t.Errorf("a request to sign made the epoch %d", got)
		}
	}
}

// Neither a disk that was put back nor a token that was restored takes the member back to an older site.
func TestTheHigherEpochOfDiskAndTokenCounts(t *testing.T) {
	w := open(t)
	for _, c := range []struct{ token, disk, want hsm.EpochRecord }{
		{hsm.EpochRecord{Site: "there", Epoch: 3}, hsm.EpochRecord{Site: "here", Epoch: 2}, hsm.EpochRecord{Site: "there", Epoch: 3}},
		{hsm.EpochRecord{Site: "here", Epoch: 2}, hsm.EpochRecord{Site: "there", Epoch: 3}, hsm.EpochRecord{Site: "there", Epoch: 3}},
		{hsm.EpochRecord{}, hsm.EpochRecord{Site: "there", Epoch: 3}, hsm.EpochRecord{Site: "there", Epoch: 3}},
		{hsm.EpochRecord{Site: "there", Epoch: 3}, hsm.EpochRecord{}, hsm.EpochRecord{Site: "there", Epoch: 3}},
		{hsm.EpochRecord{Site: "here", Epoch: 3}, hsm.EpochRecord{Site: "there", Epoch: 3}, hsm.EpochRecord{Site: "here", Epoch: 3}},
	} {
		t.Run(fmt.Sprintf("token %d disk %d", c.token.Epoch, c.disk.Epoch), func(t *testing.T) {
			dir := t.TempDir()
			state, err := agent.CreateState(dir)
			if err != nil {
				t.Fatal(err)
			}
			if c.disk.Epoch > 0 {
				_ = serve(t, &faulty{Token: w.token, epoch: c.disk}, func(cfg *agent.Config) { cfg.State = state })
			}
			if state, err = agent.OpenState(dir); err != nil {
				t.Fatal(err)
			}
			token := &faulty{Token: w.token, epoch: c.token}
			s := serve(t, token, func(cfg *agent.Config) { cfg.State = state })
			if i := s.Info(); i.Site != c.want.Site || i.Epoch != c.want.Epoch {
				t.Errorf("epoch %d of %q, want %+v", i.Epoch, i.Site, c.want)
			}
			if got, _ := token.Epoch(); got.Epoch != c.want.Epoch || got.Site != c.want.Site {
				t.Errorf("the token has %+v", got)
			}
			if state, err = agent.OpenState(dir); err != nil {
				t.Fatal(err)
			}
			if i := serve(t, token, func(cfg *agent.Config) { cfg.State = state }).Info(); i.Epoch != c.want.Epoch || i.Site != c.want.Site {
				t.Errorf("at the next start: %+v", i)
			}
		})
	}
}

// Once a new epoch is acknowledged, no signature for the old one comes out any more, not even of a batch that was let in.
func TestANewEpochWaitsForSignaturesOfTheOldOne(t *testing.T) {
	w := open(t)
	gate, inside := make(chan struct{}), make(chan struct{}, 10)
	token := &faulty{Token: w.token, sign: func(key hsm.KeyID, d []byte) ([]byte, error) {
		if key != w.token.Probe().ID {
			inside <- struct{}{}
			<-gate
		}
		return w.token.Sign(key, d)
	}}
	s := serve(t, token, nil)
	req := request(w.keys[hsm.PurposeCA].ID, hsmtest.Digests(1))
	old, set := make(chan error, 1), make(chan error, 1)
	go func() { _, err := s.client(identity.RoleCA).Sign(soon(t), req); old <- err }()
	<-inside
	go func() { set <- s.client(identity.RoleSync).SetEpoch(soon(t), hsm.EpochRecord{Site: "here", Epoch: 1}) }()
	eventually(t, "the token has the epoch", func() bool { r, _ := token.Epoch(); return r.Epoch == 1 })
	select {
	case err := <-set:
		t.Errorf("acknowledged while a signature of the old epoch is being made: %v", err)
	default:
	}
	close(gate)
	if err := <-old; err != nil {
		t.Error(err)
	}
	if err := <-set; err != nil {
		t.Error(err)
	}
	_, err := s.client(identity.RoleCA).Sign(soon(t), req)
	wantCode(t, err, hsm.ClassDenied, hsm.CodeEpoch)
}
