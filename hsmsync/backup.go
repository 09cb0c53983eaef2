package hsmsync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"trivet/hsm"
	"trivet/hsmsync/custody"
)

// Backup makes a bundle of every live key, wrapped with the domain key, and the domain key, wrapped for the custodians'
// recipient. The approval is BackupAct. Retired keys are left out: nothing can use them.
func (c *Coordinator) Backup(ctx context.Context, to custody.Recipient, grant []byte) (custody.Bundle, error) {
	b, err := c.backup(ctx, to, grant)
	if err != nil {
		return b, fmt.Errorf("backing up group %s: %w", c.cfg.Group, err)
	}
	return b, nil
}

func (c *Coordinator) backup(ctx context.Context, to custody.Recipient, grant []byte) (custody.Bundle, error) {
	var b custody.Bundle
	if err := to.Check(); err != nil {
		return b, err
	}
	s, err := c.State(ctx)
	if err != nil {
		return b, err
	}
	if s.Policy.Driver == DriverExternal { // before people are asked to approve it
		return b, errors.New("the vendor does the cloning in this group: back it up with the vendor's tools")
	}
	evidence, err := c.approved(grant, c.BackupAct(to.SPKI))
	if err != nil {
		return b, err
	}
	sources := serving(c.survey(ctx, s.Members()), s.Domain)
	if len(sources) == 0 || s.Domain.Name == "" {
		return b, errors.New("no member serves that holds the group's domain key")
	}
	if b.Policy, err = json.Marshal(s.Policy); err != nil {
		return b, err
	}
	b.Cluster, b.Group, b.Created, b.Recipient = c.cfg.Identity.Principal().Cluster, c.cfg.Group, c.cfg.Now(), to
	// The approval stands for one member's wrapping; another is asked only where that one has not done it.
	var failed []error
	for _, m := range sources {
		err := c.call(ctx, stepTimeout, func(ctx context.Context) (err error) {
			b.Wrapped, b.Domain, err = m.agent.BackupDomain(ctx, hsm.BackupRequest{Group: c.cfg.Group, Recipient: to.SPKI, Grant: grant})
			return err
		})
		if err == nil && b.Domain != s.Domain.Name {
			err = fmt.Errorf("it wrapped domain key %s instead of %s", b.Domain, s.Domain.Name)
		}
		if failed = append(failed, err); err == nil {
			failed = nil
			break
		}
	}
	if err := errors.Join(failed...); err != nil {
		return b, fmt.Errorf("wrapping the domain key: %w", err)
	}
	keys := s.In(StateLive)
	blobs := make([]hsm.Blob, len(keys))
	done := c.counts("export", "", len(keys))
	at := map[hsm.KeyID]int{}
	for i, k := range keys {
		at[k.ID] = i
		b.Keys = append(b.Keys, k.KeyRecord)
	}
	if err := each(ctx, copyAtOnce, keys, func(ctx context.Context, k ManifestKey) (err error) {
		if blobs[at[k.ID]], err = c.export(ctx, k.KeyRecord, b.Domain, turned(sources, int(k.N))); err == nil {
			done()
		}
		return err
	}); err != nil {
		return b, err
	}
	b.Blobs = blobs
	c.log.Warn("group backed up", "keys", len(keys), "domain", b.Domain, "recipient", to.Fingerprint(), "approved_by", evidence.By)
	text, err := b.Encode()
	if err != nil {
		return b, err
	}
	return custody.ParseBundle(text)
}
