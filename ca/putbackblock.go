package ca

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"

	"trivet/db"
	"trivet/journal"
)

// blockedKeys blocks again every key that operators have blocked by this node's word, or by that of a node whose copies are here, and the database does
// not know as blocked. Blocks are in no lane, so nothing tells which are lost; there are few.
func (b *restorer) blockedKeys(ctx context.Context) error {
	known := map[string]journal.Done{}
	take := func(d journal.Done) error {
		if d.Block != nil && d.Kind == journal.DoneBlock {
			known[d.Serial] = d
		}
		return nil
	}
	err := b.r.cfg.Journal.Select(journal.Query{Kinds: []journal.Kind{journal.KindDone}, Done: []string{journal.DoneBlock}, Here: true}, func(e journal.Entry) error {
		var d journal.Done
		if err := e.Decode(&d); err != nil {
			return err
		}
		return take(d)
	})
	if err == nil && b.r.cfg.Held != nil {
		err = b.r.cfg.Held.Blocks(take)
	}
	if err != nil {
		return fmt.Errorf("reading which keys were blocked: %w", err)
	}
	all := make([]journal.Done, 0, len(known))
	for _, d := range known {
		all = append(all, d)
	}
	for chunk := range slices.Chunk(all, putBackChunk) {
		hashes := make([][]byte, len(chunk))
		for i, d := range chunk {
			if hashes[i], err = hex.DecodeString(d.Serial); err != nil {
				return fmt.Errorf("reading which keys were blocked: %q: %w", d.Serial, err)
			}
		}
		found, err := b.r.record.Blocked(ctx, "", hashes...)
		if err != nil {
			return err
		}
		there := map[string]bool{}
		for _, f := range found {
			there[string(f.SPKI)] = true
		}
		for i, d := range chunk {
			if there[string(hashes[i])] {
				continue
			}
			_, err := blockKey(ctx, b.r.record, b.r.cfg.Log, db.BlockedKey{SPKI: hashes[i], Reason: d.Block.Reason, Comment: d.Block.Comment, Actor: d.Block.Actor, Created: d.Created})
			if err != nil {
				return fmt.Errorf("blocking the key %s again: %w", d.Serial, err)
			}
			b.count(func(p *putBack) { p.Blocked++ }, 1)
			b.r.cfg.Log.Warn("blocked a key again", "round", b.round, "spki_sha256", d.Serial, "actor", d.Block.Actor)
		}
	}
	return nil
}
