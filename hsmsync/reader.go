package hsmsync

import (
	"bytes"
	"context"
	"fmt"
)

// reader keeps the state of one group's log up to date by reading what was added since, and from the beginning where the
// log is not the one it was: a database that went back may have lost entries, and taken others in their place. What
// counts for a coordinator is what the log says now.
type reader struct {
	from  Manifest
	group string
	token chan struct{} // held by who reads; guards state
	state *State
}

func newReader(m Manifest, group string) *reader {
	return &reader{from: m, group: group, token: make(chan struct{}, 1), state: NewState()}
}

// read returns the state of the log as it is now. The caller may do with it what it likes.
func (r *reader) read(ctx context.Context) (*State, error) {
	select {
	case r.token <- struct{}{}:
		defer func() { <-r.token }()
	case <-ctx.Done():
		return nil, fmt.Errorf("reading the log of group %s: %w", r.group, ctx.Err())
	}
	if err := r.advance(ctx); err != nil {
		return nil, fmt.Errorf("reading the log of group %s: %w", r.group, err)
	}
	return r.state.Clone(), nil
}

func (r *reader) advance(ctx context.Context) error {
	if r.state.Next > 1 {
		entries, err := r.from.Log(ctx, r.group, r.state.Next-1)
		if err != nil {
			return err
		}
		if len(entries) > 0 && entries[0].equal(r.state.Last) {
			for _, e := range entries[1:] {
				if err := r.state.Apply(e); err != nil {
					return err
				}
			}
			return nil
		}
	}
	entries, err := r.from.Log(ctx, r.group, 1)
	if err != nil {
		return err
	}
	s, err := Fold(entries)
	if err == nil {
		r.state = s
	}
	return err
}

// equal tells whether two entries are one.
func (e Entry) equal(o Entry) bool {
	return e.N == o.N && e.Event == o.Event && e.Subject == o.Subject && e.Actor == o.Actor && e.Created.Equal(o.Created) && bytes.Equal(e.Payload, o.Payload)
}
