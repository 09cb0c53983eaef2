package hsm

import (
	"slices"
	"strings"
)

// SignRequest asks a member for one signature per digest.
type SignRequest struct {
	Key     KeyID    `json:"key"`
	Digests [][]byte `json:"digests"`
	// Incarnation, unless empty, is the one that proved to hold the key: another one refuses with ClassSession and code
	// CodeStaleIncarnation, and lives on.
	Incarnation string `json:"incarnation,omitempty"`
	// Epoch is the site epoch of who asks. For keys of purpose ca and crl it must be the member's own.
	Epoch uint64 `json:"epoch,omitempty"`
}

// Codes of errors that no module returned.
const (
	CodeStaleIncarnation = "STALE_INCARNATION" // ClassSession
	CodeEpoch            = "EPOCH"             // ClassDenied: the member is at another site epoch, or another site writes
	CodeDestroyed        = "DESTROYED"         // ClassDenied: a key of that id was destroyed here
	CodeRetired          = "RETIRED"           // ClassDenied: people have had the key retired
	CodeLocked           = "LOCKED"            // ClassPIN: an operator must activate the token
	CodeApproval         = "APPROVAL"          // ClassDenied: the act needs the approval of more people
)

// DestroyRequest asks a member to destroy its copy of a key. Grant is an identity.Grant, JSON: action key-destroy, object
// {group}/{key}, detail spki = hex SHA-256 of SPKI.
type DestroyRequest struct {
	Group string `json:"group"`
	Key   KeyID  `json:"key"`
	SPKI  []byte `json:"spki"`
	Grant []byte `json:"grant"`
}

// RetireRequest has a member remember that a key signs no more. Grant is an identity.Grant, JSON: action key-retire, object
// {group}/{key}, detail spki = hex SHA-256 of SPKI, label and purpose as here.
type RetireRequest struct {
	Group   string  `json:"group"`
	Key     KeyID   `json:"key"`
	Label   string  `json:"label"`
	Purpose Purpose `json:"purpose"`
	SPKI    []byte  `json:"spki"`
	Grant   []byte  `json:"grant"`
}

// DomainRequest asks a member to wrap its domain key. KEK names it; empty is the current one. Recipient is what
// TransportKey of the receiving member returned. Grant is an identity.Grant, JSON, empty where none is needed: action
// hsm-enroll, object {group}/{member}, detail transport = hex SHA-256 of the transport key's SPKI.
type DomainRequest struct {
	Group     string `json:"group"`
	KEK       string `json:"kek,omitempty"`
	Recipient []byte `json:"recipient"`
	Grant     []byte `json:"grant,omitempty"`
}

// BackupRequest asks a member to wrap its domain key for the custodians of a backup: Recipient is the DER SPKI of an
// RSA-3072 key. Grant: action hsm-backup, object {group}, detail recipient = hex SHA-256 of Recipient.
type BackupRequest struct {
	Group     string `json:"group"`
	Recipient []byte `json:"recipient"`
	Grant     []byte `json:"grant"`
}

// PINRequest asks a member to give its token another user PIN. Members are all that two people approved it for, this one among
// them. Prepared takes the PIN from the file that somebody put beside the agent's own; else the agent draws one that nobody
// sees. Force says that people know that fewer members than usual are left meanwhile. No PIN travels. Grant: action
// hsm-pin-rotate, object {group}, detail members (sorted, with commas), pin (random or prepared), and force=true if forced.
type PINRequest struct {
	Group    string   `json:"group"`
	Members  []string `json:"members"`
	Prepared bool     `json:"prepared,omitempty"`
	Force    bool     `json:"force,omitempty"`
	Grant    []byte   `json:"grant"`
}

// Detail is what the approval says of the request.
func (r PINRequest) Detail() map[string]string {
	d := map[string]string{"members": strings.Join(slices.Sorted(slices.Values(r.Members)), ","), "pin": "random"}
	if r.Prepared {
		d["pin"] = "prepared"
	}
	if r.Force {
		d["force"] = "true"
	}
	return d
}

// AdoptRequest asks a member to take in a key from outside. Sealed is what Seal made of its PKCS#8 for the member's
// transport key. Grant: action key-import, object {group}/{label}, detail spki = hex SHA-256 of SPKI, purpose and algorithm.
type AdoptRequest struct {
	Group  string  `json:"group"`
	Spec   KeySpec `json:"spec"`
	SPKI   []byte  `json:"spki"`
	Sealed []byte  `json:"sealed"`
	Grant  []byte  `json:"grant"`
}

// EpochRecord is which site may write and its number, as approved. Grant is an identity.Grant, JSON: action site-promote
// (Epoch is the old one + 1) or hsm-epoch-repair (any), object {site}, detail epoch = the number. Epoch 0 is none yet; the
// first record, 1, needs no grant and comes from the ceremony.
type EpochRecord struct {
	Site  string `json:"site"`
	Epoch uint64 `json:"epoch"`
	Grant []byte `json:"grant,omitempty"`
}
