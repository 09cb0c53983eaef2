package hsmsync

import (
	"context"
	"fmt"
	"math"
	"strings"

	"trivet/db"
)

// Record is the group logs in the database: Manifest and Chain of every group.
type Record struct{ store *db.Store }

// NewManifest reads and writes group logs in store.
func NewManifest(store *db.Store) *Record { return &Record{store} }

// Log implements Manifest.
func (r *Record) Log(ctx context.Context, group string, from uint64) ([]Entry, error) {
	if from > math.MaxUint32 {
		return nil, nil
	}
	return entries(r.store.GroupLog(ctx, group, uint32(from)))
}

// Newest returns the last entry of a group's log, from a causal read; none while there is none.
func (r *Record) Newest(ctx context.Context, group string) ([]Entry, error) {
	return entries(r.store.GroupLogEnd(ctx, group))
}

// Known is a group that the record has a log of.
type Known struct {
	Name string `json:"name"`
	// Deleted groups are over; their names are not used again.
	Deleted bool `json:"deleted"`
}

// Groups implements Lister: every group that was ever begun, by name, from a causal read.
func (r *Record) Groups(ctx context.Context) ([]Known, error) {
	ends, err := r.store.GroupLogEnds(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading which HSM groups there are: %w", err)
	}
	var all []Known
	for _, e := range ends {
		if !strings.Contains(e.Group, "/") { // else it is a group's lease
			all = append(all, Known{Name: e.Group, Deleted: e.Event == eventDeleted}) // after which there is no entry
		}
	}
	return all, nil
}

func entries(events []db.GroupEvent, err error) ([]Entry, error) {
	if err != nil {
		return nil, err
	}
	out := make([]Entry, len(events))
	for i, e := range events {
		out[i] = Entry{N: uint64(e.N), Event: e.Event, Subject: e.Subject, Payload: e.Payload, Actor: e.Actor, Created: e.Created}
	}
	return out, nil
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
