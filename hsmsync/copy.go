package hsmsync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"trivet/hsm"
)

const (
	// copyAtOnce keys are carried to one member at once: enough to keep both tokens at work while the third is on its way.
	copyAtOnce = 4
	// proveAtOnce keys are proved by one member at once.
	proveAtOnce = 8
	// patience is how often a member that is overloaded is asked again, breath·2ⁿ apart.
	patience = 6
)

// differs says how a key in a token is not the one that the log has, or is nil. The kind is KindDiffers, KindFaulty or
// KindAttributes.
func differs(member string, want, got hsm.KeyRecord) error {
	what := fmt.Sprintf("key %s (%s)", want.ID, want.Label)
	switch {
	case got.Fault != "":
		return troubled(KindFaulty, member, "%s on member %s is incomplete: %s", what, member, got.Fault)
	case got.KeySpec != want.KeySpec, len(want.SPKI) > 0 && !bytes.Equal(got.SPKI, want.SPKI):
		return troubled(KindDiffers, member, "member %s holds another key under the id of %s: take it out of the group and have people look at it; nothing was changed", member, what)
	case want.Attributes != "" && got.Attributes != want.Attributes:
		return troubled(KindAttributes, member, "the policy attributes of %s on member %s differ from the original's", what, member)
	}
	return nil
}

// export has the first of the sources that can wrap a key with a domain key.
func (c *Coordinator) export(ctx context.Context, k hsm.KeyRecord, kek string, sources []standing) (hsm.Blob, error) {
	var failed []error
	for _, from := range sources {
		var b hsm.Blob
		err := c.call(ctx, stepTimeout, func(ctx context.Context) (err error) { b, err = from.agent.Export(ctx, k.ID, kek); return err })
		switch {
		case err != nil:
			failed = append(failed, fmt.Errorf("exporting key %s (%s) from %s: %w", k.ID, k.Label, from.Name, err))
		case b.KeySpec != k.KeySpec || !bytes.Equal(b.SPKI, k.SPKI) || b.KEK != kek:
			failed = append(failed, troubled(KindDiffers, from.Name, "exporting key %s (%s) from %s: the blob is of another key", k.ID, k.Label, from.Name))
		default:
			return b, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	if len(failed) == 0 {
		failed = append(failed, fmt.Errorf("exporting key %s (%s): no member that serves holds it and domain key %s", k.ID, k.Label, kek))
	}
	return hsm.Blob{}, errors.Join(failed...)
}

// bring imports a wrapped key into a member and compares what came of it.
func (c *Coordinator) bring(ctx context.Context, k hsm.KeyRecord, b hsm.Blob, to standing) error {
	var got hsm.KeyRecord
	err := c.call(ctx, stepTimeout, func(ctx context.Context) (err error) { got, err = to.agent.Import(ctx, b); return err })
	if err != nil {
		return fmt.Errorf("importing key %s (%s) into %s: %w", k.ID, k.Label, to.Name, err)
	}
	return differs(to.Name, k, got)
}

// copyAll brings keys to a member, several at once, each from whichever source can. It stops at the first key that
// cannot be brought.
func (c *Coordinator) copyAll(ctx context.Context, keys []ManifestKey, kek string, sources []standing, to standing) error {
	done := c.counts("copy", to.Name, len(keys))
	return each(ctx, copyAtOnce, keys, func(ctx context.Context, k ManifestKey) error {
		b, err := c.export(ctx, k.KeyRecord, kek, turned(sources, int(k.N)))
		if err == nil {
			err = c.bring(ctx, k.KeyRecord, b, to)
		}
		if err == nil {
			done()
		}
		return err
	})
}

// turned begins with another source each time, so that all share the work.
func turned(sources []standing, n int) []standing {
	if len(sources) == 0 {
		return nil
	}
	n %= len(sources)
	return append(sources[n:len(sources):len(sources)], sources[:n]...)
}

// proveAll has a member sign a fresh challenge for each key, all in one incarnation, which it returns.
func (c *Coordinator) proveAll(ctx context.Context, keys []ManifestKey, m standing) (incarnation string, err error) {
	incarnation = m.info.Incarnation
	done := c.counts("prove", m.Name, len(keys))
	return incarnation, each(ctx, proveAtOnce, keys, func(ctx context.Context, k ManifestKey) error {
		answered, err := c.prove(ctx, k.KeyRecord, m)
		if err == nil && answered != incarnation {
			err = troubled(KindUnproved, m.Name, "proving key %s (%s) on %s: it was restarted meanwhile, so its earlier proofs hold no more: try again", k.ID, k.Label, m.Name)
		}
		if err == nil {
			done()
		}
		return err
	})
}

// prove has a member prove one key.
func (c *Coordinator) prove(ctx context.Context, k hsm.KeyRecord, m standing) (incarnation string, err error) {
	if c.dry != nil {
		if incarnation, ok := c.dry.proves(m.Name, k); ok {
			return incarnation, nil
		}
	}
	public, err := k.Algorithm.ParsePublic(k.SPKI)
	if err != nil {
		return "", fmt.Errorf("key %s (%s): %w", k.ID, k.Label, err)
	}
	err = c.call(ctx, stepTimeout, func(ctx context.Context) (err error) {
		incarnation, err = askProof(ctx, c.cfg.Group, m.Name, m.agent, k, public)
		return err
	})
	if err != nil {
		return "", &trouble{KindUnproved, m.Name, fmt.Errorf("proving key %s (%s) on %s: %w", k.ID, k.Label, m.Name, err)}
	}
	return incarnation, nil
}

// call makes one call to a member, with a deadline, and again when the member was overloaded.
func (c *Coordinator) call(ctx context.Context, limit time.Duration, do func(context.Context) error) error {
	for try := 0; ; try++ {
		err := within(ctx, limit, do)
		if hsm.ClassOf(err) != hsm.ClassOverloaded || try == patience || !sleep(ctx, breath<<try, nil) {
			return err
		}
	}
}
