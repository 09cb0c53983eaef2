package hsmsync

import (
	"context"
	"fmt"
	"math"

	"trivet/db"
)

// Record is the group logs in the database: Manifest and Chain of every group.
type Record struct{ store *db.Store }

// NewManifest reads and writes group logs in store.
func NewManifest(store *db.Store) *Record { return &Record{store} }

// Keys implements Manifest.
func (r *Record) Keys(ctx context.Context, group string) ([]ManifestKey, error) {
	entries, err := r.Log(ctx, group)
	if err != nil {
		return nil, err
	}
	f, err := Fold(entries)
	return f.Keys, err
}

// Log implements Chain.
func (r *Record) Log(ctx context.Context, group string) ([]Entry, error) {
	events, err := r.store.GroupLog(ctx, group)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, len(events))
	for i, e := range events {
		entries[i] = Entry{N: uint64(e.N), Event: e.Event, Subject: e.Subject, Payload: e.Payload, Actor: e.Actor, Created: e.Created}
	}
	return entries, nil
}

// Append implements Chain. The store settles what an answer lost on the way left open, as long as ctx lasts.
func (r *Record) Append(ctx context.Context, group string, e Entry) error {
	if e.N < 1 || e.N > math.MaxUint32 {
		return fmt.Errorf("position %d of a group log: must be 1 to %d", e.N, uint32(math.MaxUint32))
	}
	err := r.store.AppendGroupLog(ctx, db.GroupEvent{
		Group: group, N: uint32(e.N), Event: e.Event, Subject: e.Subject, Payload: e.Payload, Actor: e.Actor, Created: e.Created,
	})
	if db.ClassOf(err) == db.Duplicate {
		return fmt.Errorf("%w: %w", ErrTaken, err)
	}
	return err
}
