package hsmsync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"trivet/hsm"
	"trivet/hsmsync/custody"
)

// Backup makes a bundle of every live and retired key, wrapped with the domain key, and the domain key, wrapped for the
// custodians' recipient. The approval is BackupAct. A live key that cannot be wrapped is an error; of a retired one the
// bundle says why it is not in it.
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
	keys := s.In(StateLive, StateRetired)
	blobs, missing := make([]hsm.Blob, len(keys)), make([]string, len(keys))
	done := c.counts("export", "", len(keys))
	at := map[hsm.KeyID]int{}
	for i, k := range keys {
		at[k.ID] = i
		b.Keys = append(b.Keys, k.KeyRecord)
		if k.State == StateRetired {
			b.Retired = append(b.Retired, k.ID)
		}
	}
	if err := each(ctx, copyAtOnce, keys, func(ctx context.Context, k ManifestKey) (err error) {
		i := at[k.ID]
		if k.NonExtractable || !k.Algorithm.Cloneable() {
			missing[i] = "it never leaves its token (non-extractable)"
			done()
			return nil
		}
		blobs[i], err = c.export(ctx, k.KeyRecord, b.Domain, turned(sources, int(k.N)))
		if err != nil && k.State == StateRetired && ctx.Err() == nil {
			missing[i], err = shorten(err.Error()), nil
		}
		if err == nil {
			done()
		}
		return err
	}); err != nil {
		return b, err
	}
	for i, why := range missing {
		if why == "" {
			b.Blobs = append(b.Blobs, blobs[i])
			continue
		}
		if b.Missing == nil {
			b.Missing = map[hsm.KeyID]string{}
		}
		b.Missing[keys[i].ID] = why
		c.log.Warn("a key is not in the backup", "key", keys[i].ID, "label", keys[i].Label, "state", keys[i].State, "why", why)
	}
	c.log.Warn("group backed up", "keys", len(b.Blobs), "retired_among_them", len(b.Retired)-len(b.Missing), "missing", len(b.Missing), "domain", b.Domain, "recipient", to.Fingerprint(), "approved_by", evidence.By)
	text, err := b.Encode()
	if err != nil {
		return b, err
	}
	return custody.ParseBundle(text)
}
