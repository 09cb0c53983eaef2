package hsmsync

import (
	"context"
	"errors"
	"time"

	"trivet/hsm"
)

// Manifest is what a group's members and keys are read from.
type Manifest interface {
	// Log returns the entries of the group's log at positions from and above, in order, from a causal read: an entry
	// acknowledged before the call is seen. A causal read of a database node other than the one that takes the writes is
	// better, when there is another. It is safe for concurrent use; an error means that nothing was learnt.
	Log(ctx context.Context, group string, from uint64) ([]Entry, error)
}

// Chain is a group's log: the one place where is decided what the group has. Entries are only ever added, each at the
// position after the last (rule P1), so that two coordinators that decide at once cannot both succeed.
type Chain interface {
	Manifest
	// Append adds e at position e.N, durably. The error is ErrTaken when the position holds another entry; any other
	// error leaves open whether e was, or will be, added.
	Append(ctx context.Context, group string, e Entry) error
}

// ErrTaken is a Chain's answer to an entry whose position holds another one: read again, decide again.
var ErrTaken = errors.New("position in the group's log is taken")

// Entry is one entry of a group's log.
type Entry struct {
	N       uint64 // from 1, without holes
	Event   string // see below; at most 16 octets
	Subject string // member name, domain key name, key id, or "group"; at most 64 octets
	Payload []byte // JSON, by event
	Actor   string // principal URI
	Created time.Time
}

// Events about a member; the subject is its name.
const (
	eventMember  = "member"  // MemberEntry: a token joins under this name; state joining
	eventActive  = "active"  // Note: it has proved every live key; it serves
	eventStandby = "standby" // Note: as active, and it serves only when no active one can
	eventDrain   = "drain"   // Note: it gets no work, by an operator's wish
	eventRecover = "recover" // Note: quarantines and given-up recoveries of before this entry are forgotten
	eventPIN     = "pin"     // pinEntry: its token is to have a new PIN; when it has, the member itself tells
	eventRemove  = "remove"  // Note: it is no member any more; the name may join again with another token
)

// Events about the domain key; the subject is its name.
const (
	eventDomain  = "domain"  // DomainEntry: the group's domain key, or the next one while there is one
	eventRotated = "rotated" // Note: the next domain key is the group's now
)

// Events about the group; the subject is subjectGroup.
const (
	eventCreated = "created" // Note: people have approved that there be such a group; one that a ceremony sets up has none
	eventPolicy  = "policy"  // policyEntry
	eventDeleted = "deleted" // Note: nothing may be added any more, nothing signs

	subjectGroup = "group"
)

// KeyState is what became of a key: the newest event about it; the subject is its id. Only live keys sign.
type KeyState string

// The states. An event that this version does not know makes its key unusable as well.
const (
	StatePending   KeyState = "pending"   // pendingEntry: being made (without SPKI), imported or restored (with it)
	StateLive      KeyState = "live"      // hsm.KeyRecord
	StateAbandoned KeyState = "abandoned" // Note: it never became live; nothing is destroyed
	StateRetired   KeyState = "retired"   // Note: it was live and signs no more
	StateDestroyed KeyState = "destroyed" // Note with approvals: members destroy it, also those that come back later
)

// MemberState is a member's state in the log; what it can do at the moment is for each process to find out.
type MemberState string

// The states.
const (
	MemberJoining MemberState = "joining"
	MemberActive  MemberState = "active"
	MemberStandby MemberState = "standby"
	MemberDrained MemberState = "drained"
	MemberRemoved MemberState = "removed"
)

// MemberEntry is the payload of eventMember: who joins, with which token, as those saw it who approved it.
type MemberEntry struct {
	Address     string `json:"address"` // host:port
	Site        string `json:"site,omitempty"`
	TokenSerial string `json:"token_serial"`
	TokenLabel  string `json:"token_label"`
	// Transport is the hex SHA-256 of the transport key's SPKI: the identity of a token whose serial says nothing.
	Transport string `json:"transport,omitempty"`
	Standby   bool   `json:"standby,omitempty"` // what it becomes when it has proved every key
	Approved
}

// DomainEntry is the payload of eventDomain: the one member that may make the domain key; all others import it.
type DomainEntry struct {
	Origin string `json:"origin"`
}

// policyEntry is the payload of eventPolicy: all of the policy, with the evidence where it is weaker than the one before.
type policyEntry struct {
	Policy
	Approved
}

// pendingEntry is the payload of StatePending. Whoever takes the key up has it made by the same member: two that made it under
// one id would be two keys.
type pendingEntry struct {
	hsm.KeyRecord
	Origin string `json:"origin,omitempty"`
}

// Note is the payload of an event that needs none of its own.
type Note struct {
	Why string `json:"why,omitempty"`
	Approved
}

// Approved is the evidence that people agreed to an entry, as an auditor would ask for it.
type Approved struct {
	Request   []byte   `json:"request,omitempty"`   // identity.Request, JSON
	Approvals []byte   `json:"approvals,omitempty"` // []identity.Approval, JSON
	Proposal  []byte   `json:"proposal,omitempty"`  // identity.Approval of the proposer, JSON
	By        []string `json:"by,omitempty"`        // principal URIs
}

// Policy is how a group behaves. The zero Policy means the defaults, which NewState sets.
type Policy struct {
	// Driver is wrap (we clone, with the domain key) or external (the vendor clones, we verify and alarm).
	Driver string `json:"driver"`
	// NonExtractable is for keys that must never leave their tokens; the driver must be external.
	NonExtractable bool `json:"non_extractable,omitempty"`
	// Creation is any, or master: keys are made while the member called Master is active, and by it; existing keys are not affected.
	Creation string `json:"creation"`
	Master   string `json:"master,omitempty"`
	// MinCopies of a key must exist before it lives: 2 or more.
	MinCopies int `json:"min_copies"`
	// Prefer is random, local (members of the asking process's own site first) or priority (in the order of Sites).
	Prefer string   `json:"prefer"`
	Sites  []string `json:"sites,omitempty"`
	// DestroyAfter is how long a retired or abandoned key waits before it may be destroyed.
	DestroyAfter time.Duration `json:"destroy_after"`
}

// The values of Policy's fields.
const (
	DriverWrap     = "wrap"
	DriverExternal = "external"
	CreationAny    = "any"
	CreationMaster = "master"
	PreferRandom   = "random"
	PreferLocal    = "local"
	PreferPriority = "priority"
)

// ManifestKey is one key as the group's log has it.
type ManifestKey struct {
	hsm.KeyRecord
	State KeyState
	// Origin is the member that makes a pending key; empty where it does not matter.
	Origin string
	// N is the position of the log entry that made it so, Since when that was written.
	N     uint64
	Since time.Time
	// Note is the newest event's, for states other than pending and live.
	Note Note
}

// GroupMember is one member as the group's log has it.
type GroupMember struct {
	Name string
	MemberEntry
	State MemberState
	// N is the position of the entry that made State so, Joined that of its eventMember, Recovered that of the newest
	// eventRecover or eventMember.
	N, Joined, Recovered uint64
	Since                time.Time
	// PIN is the digest of the newest approved request to rotate its token's PIN, PINSince when that was entered.
	PIN      string
	PINSince time.Time
}

// Domain is a domain key as the log has it.
type Domain struct {
	Name   string // empty: there is none
	Origin string // the member that makes it
}
