package fsck

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"sort"

	"trivet/journal"
)

// journals reads every node's journal: each signature needs an intent before it (I1), over the same bytes (I8), and no serial was released twice (I2).
func (c *check) journals(ctx context.Context) error {
	nodes := make([]string, 0, len(c.Journals))
	for node := range c.Journals {
		nodes = append(nodes, node)
	}
	sort.Strings(nodes)
	for _, node := range nodes {
		intents := map[key][32]byte{} // digest of the TBS
		err := journal.ReadDir(c.Journals[node], func(e journal.Entry) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			c.count("journal_records", 1)
			return c.entry(node, e, intents)
		})
		if err != nil {
			return fmt.Errorf("reading the journal of %s: %w", node, err)
		}
		if err := c.copies(ctx, node); err != nil {
			return err
		}
		c.count("journals", 1)
	}
	return nil
}

func (c *check) entry(node string, e journal.Entry, intents map[key][32]byte) error {
	switch e.Kind {
	case journal.KindIntent:
		var p journal.Intent
		k, err := decode(e, &p, func() (string, string) { return p.Issuer, p.Serial })
		if err != nil {
			return err
		}
		intents[k] = sha256.Sum256(p.TBS)
	case journal.KindSign:
		var p journal.Sign
		k, err := decode(e, &p, func() (string, string) { return p.Issuer, p.Serial })
		if err != nil {
			return err
		}
		c.count("signatures", 1)
		digest, ok := intents[k]
		switch {
		case !ok:
			c.violate("I1", k, "%s journalled a signature without an intent before it", node)
		case !bytes.Equal(digest[:], p.Digest):
			c.violate("I8", k, "%s signed a digest that is not that of the intent", node)
		}
	case journal.KindDone:
		var p journal.Done
		k, err := decode(e, &p, func() (string, string) { return p.Issuer, p.Serial })
		if err != nil {
			return err
		}
		c.done(node, k, p)
	}
	return nil
}

func (c *check) done(node string, k key, p journal.Done) {
	switch p.Kind {
	case journal.DoneCert:
		digest := sha256.Sum256(p.DER)
		if before, ok := c.acked[k]; ok && before != digest {
			c.violate("I2", k, "two different certificates were released under this serial, one of them by %s", node)
		}
		if _, ok := c.acked[k]; !ok {
			c.count("released_certificates", 1)
		}
		c.acked[k] = digest
	case journal.DoneBlock:
		c.ackedBlocks[p.Serial] = node
	case journal.DoneRevocation:
		if p.Event == nil {
			c.violate("I4", k, "%s journalled a revocation without its event", node)
			return
		}
		if c.ackedEvents[k] == nil {
			c.ackedEvents[k] = map[int]bool{}
		}
		if !c.ackedEvents[k][p.Event.N] {
			c.count("acknowledged_revocations", 1)
		}
		c.ackedEvents[k][p.Event.N] = true
	}
}

func doneKey(d journal.Done) (key, error) {
	serial, err := hex.DecodeString(d.Serial)
	if err != nil {
		return key{}, fmt.Errorf("decoding the serial of a done record: %w", err)
	}
	return key{d.Issuer, string(serial)}, nil
}

func decode(e journal.Entry, into any, name func() (issuer, serial string)) (key, error) {
	if err := e.Decode(into); err != nil {
		return key{}, err
	}
	issuer, text := name()
	serial, err := hex.DecodeString(text)
	if err != nil {
		return key{}, fmt.Errorf("decoding the serial of a %s record: %w", e.Kind, err)
	}
	return key{issuer, string(serial)}, nil
}
