package hsmsync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"trivet/hsm"
)

// Manifest tells which keys a group has.
type Manifest interface {
	// Keys returns every key the group's log mentions, whatever its state, from a causal read: an entry acknowledged
	// before the call is seen. It is safe for concurrent use and an error means that nothing was learnt.
	Keys(ctx context.Context, group string) ([]ManifestKey, error)
}

// ManifestKey is one key as the group's log has it.
type ManifestKey struct {
	hsm.KeyRecord
	State KeyState
	// N is the position of the log entry that made it so.
	N uint64
}

// KeyState is what became of a key: the newest event about it. Only live keys sign.
type KeyState string

// The states. An event that this version does not know makes its key unusable as well.
const (
	StatePending   KeyState = "pending"
	StateLive      KeyState = "live"
	StateAbandoned KeyState = "abandoned"
)

// The events of a group's log that are not about a key.
const (
	eventMember = "member"
	eventDomain = "domain"
)

// ErrTaken is a Chain's answer to an entry whose position holds another one: read again, decide again.
var ErrTaken = errors.New("position in the group's log is taken")

// Entry is one entry of a group's log.
type Entry struct {
	N       uint64 // from 1, without holes
	Event   string // member, domain, pending, live, abandoned
	Subject string // member name, domain key name or key id; at most 64 octets
	Payload []byte // JSON: memberPayload, domainPayload or hsm.KeyRecord
	Actor   string // principal URI
	Created time.Time
}

// Chain is a group's log: the one place where is decided what the group has. Entries are only ever added, each at the
// position after the last (rule P1), so that two coordinators that decide at once cannot both succeed.
type Chain interface {
	// Log returns all entries in order, from a causal read of a database node other than the one that takes the
	// writes, when there is another.
	Log(ctx context.Context, group string) ([]Entry, error)
	// Append adds e at position e.N, durably. The error is ErrTaken when the position holds another entry; any other
	// error leaves open whether e was, or will be, added.
	Append(ctx context.Context, group string, e Entry) error
}

// memberPayload records a member's token as it was when it joined.
type memberPayload struct {
	Address     string `json:"address"`
	TokenSerial string `json:"token_serial"`
	TokenLabel  string `json:"token_label"`
}

// domainPayload names the one member that may make the domain key; all others import it.
type domainPayload struct {
	Origin string `json:"origin"`
}

// Domain is the group's domain key as the log has it.
type Domain struct {
	Name   string // empty: none was decided yet
	Origin string // the member that makes it
}

// Folded is what a group's log amounts to.
type Folded struct {
	Next    uint64            // position of the next entry
	Members map[string]string // name to token serial
	Domain  Domain
	Keys    []ManifestKey // in the order of their first mention
}

// Fold reads a group's log. It refuses a log with holes and entries it cannot read; an abandoned key stays abandoned
// whatever follows.
func Fold(entries []Entry) (Folded, error) {
	f := Folded{Next: 1, Members: map[string]string{}}
	at := map[hsm.KeyID]int{}
	for _, e := range entries {
		if e.N != f.Next {
			return Folded{}, fmt.Errorf("group log has entry %d where %d was due", e.N, f.Next)
		}
		f.Next++
		if err := f.add(e, at); err != nil {
			return Folded{}, fmt.Errorf("group log entry %d (%s %s): %w", e.N, e.Event, e.Subject, err)
		}
	}
	return f, nil
}

func (f *Folded) add(e Entry, at map[hsm.KeyID]int) error {
	switch e.Event {
	case eventMember:
		var p memberPayload
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		f.Members[e.Subject] = p.TokenSerial
	case eventDomain:
		var p domainPayload
		if err := json.Unmarshal(e.Payload, &p); err != nil {
			return err
		}
		f.Domain = Domain{Name: e.Subject, Origin: p.Origin}
	case string(StatePending), string(StateLive):
		var r hsm.KeyRecord
		if err := json.Unmarshal(e.Payload, &r); err != nil {
			return err
		}
		if string(r.ID) != e.Subject {
			return fmt.Errorf("payload is about key %s", r.ID)
		}
		i, known := at[r.ID]
		switch {
		case !known && e.Event == string(StatePending):
			at[r.ID] = len(f.Keys)
			f.Keys = append(f.Keys, ManifestKey{KeyRecord: r, State: StatePending, N: e.N})
		case known && f.Keys[i].State == StatePending && e.Event == string(StateLive):
			f.Keys[i] = ManifestKey{KeyRecord: r, State: StateLive, N: e.N}
		case known && f.Keys[i].State == StateAbandoned:
		default:
			return errors.New("out of order")
		}
	default:
		if i, known := at[hsm.KeyID(e.Subject)]; known && f.Keys[i].State != StateAbandoned {
			f.Keys[i].State, f.Keys[i].N = KeyState(e.Event), e.N
		}
	}
	return nil
}

// find returns the newest key of that label and purpose that is neither abandoned nor otherwise gone.
func (f *Folded) find(label string, p hsm.Purpose) (ManifestKey, bool) {
	for i := len(f.Keys) - 1; i >= 0; i-- {
		k := f.Keys[i]
		if k.Label == label && k.Purpose == p && (k.State == StateLive || k.State == StatePending) {
			return k, true
		}
	}
	return ManifestKey{}, false
}

func (f *Folded) key(id hsm.KeyID) (ManifestKey, bool) {
	for _, k := range f.Keys {
		if k.ID == id {
			return k, true
		}
	}
	return ManifestKey{}, false
}
