package ca

import (
	"context"
	"encoding/hex"
	"fmt"

	"trivet/db"
	"trivet/journal"
)

// planRevocation says which event must be inserted for an acknowledged one, nil if none, and what contradicts it.
func planRevocation(d journal.Done, key db.CertificateKey, have []db.Revocation) (*db.Revocation, string) {
	if d.Event == nil {
		return nil, "the journal names no event"
	}
	reason, err := ParseReason(d.Event.Reason)
	if err != nil {
		return nil, err.Error()
	}
	e := &db.Revocation{
		Issuer: d.Issuer, Serial: key.Serial, N: uint32(d.Event.N), Event: d.Event.Event, Reason: uint8(reason), Date: d.Event.Date, Comment: d.Event.Comment,
		Actor: d.Event.Actor, SiteEpoch: d.Event.SiteEpoch, Created: d.Event.Created,
	}
	if d.Event.InvalidityDate != nil {
		e.InvalidityDate = *d.Event.InvalidityDate
	}
	var newest *db.Revocation
	for i := range have {
		newest = &have[i]
		if same := have[i].Event == e.Event && have[i].Reason == e.Reason && have[i].Date.Equal(e.Date); same && have[i].N >= e.N {
			return nil, ""
		}
	}
	for i := range have {
		if have[i].N != e.N {
			continue
		}
		if newest.Revoked() || !e.Revoked() {
			return nil, fmt.Sprintf("event %d is another: %s for %s", e.N, have[i].Event, Reason(have[i].Reason))
		}
		e.N = newest.N + 1
		return e, fmt.Sprintf("event %d is another, and the certificate would read good: the acknowledged one follows as event %d", have[i].N, e.N)
	}
	return e, ""
}

// blocks blocks again what was blocked by revoking for keyCompromise: a block has no record of its own, and was there before the revocation was
// acknowledged. It may be repeated.
func (b *restorer) blocks(ctx context.Context, dones []journal.Done) error {
	for _, d := range dones {
		if d.Event == nil || d.Event.Reason != ReasonKeyCompromise.String() || d.Event.Event == db.EventRelease {
			continue
		}
		key, err := keyOf(d)
		if err != nil {
			return err
		}
		tbs, err := b.r.record.TBS(ctx, key.Issuer, key.Serial)
		if err != nil {
			return err
		}
		if tbs == nil {
			continue // its certificate is lost, which has been told
		}
		spki, err := spkiOf(tbs)
		if err != nil {
			b.conflict(d, "it was revoked for keyCompromise, and its key cannot be read to block it: "+err.Error())
			continue
		}
		hash := keyHash(spki)
		found, err := b.r.record.Blocked(ctx, "", hash)
		if err != nil {
			return err
		}
		if len(found) > 0 {
			continue
		}
		_, err = blockKey(ctx, b.r.record, b.r.cfg.Log, db.BlockedKey{
			SPKI: hash, Reason: BlockKeyCompromise, Comment: "revocation of " + d.Issuer + ":" + d.Serial, Actor: d.Event.Actor, Created: d.Event.Created,
		})
		if err != nil {
			return fmt.Errorf("blocking the key of %s:%s again: %w", d.Issuer, d.Serial, err)
		}
		b.r.cfg.Log.Warn("blocked a key again", "round", b.round, "spki_sha256", hex.EncodeToString(hash), "issuer", d.Issuer, "serial", d.Serial)
	}
	return nil
}
