package identity

import "time"

// LoadAt is Load with a clock.
func LoadAt(f Files, now func() time.Time) (*Identity, error) { return load(f, now) }

// SetClock sets the authority's clock.
func (a *Authority) SetClock(now func() time.Time) { a.now = now }

// Digest returns the digest of the files in use.
func (i *Identity) Digest() [32]byte { return i.state.Load().digest }
