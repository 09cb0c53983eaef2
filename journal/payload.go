package journal

import (
	"encoding/json"
	"fmt"
	"time"
)

// Kind says what a record's payload is.
type Kind uint8

// Kinds of records. The numbers are on disk: never reuse one.
const (
	KindStart  Kind = 1 // Start: an incarnation begins
	KindIntent Kind = 2 // Intent: a certificate is about to be signed
	KindSign   Kind = 3 // Sign: a digest is about to be sent to an HSM
	KindDone   Kind = 4 // Done: a fact is in the database, and may be released
	KindVoid   Kind = 5 // Void: an intent of ours that will never be signed
	KindRound  Kind = 6 // a recovery round began (protocols §3)
	KindCRL    Kind = 7 // CRL: a CRL is about to be signed
	KindAudit  Kind = 8 // Audit: an act that is none of the above
)

// String names the kind as reports do.
func (k Kind) String() string {
	switch k {
	case KindStart:
		return "start"
	case KindIntent:
		return "intent"
	case KindSign:
		return "sign"
	case KindDone:
		return "done"
	case KindVoid:
		return "void"
	case KindRound:
		return "round"
	case KindCRL:
		return "crl"
	case KindAudit:
		return "audit"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Start opens an incarnation. The journal writes it itself.
type Start struct {
	Node        string    `json:"node"`
	Incarnation string    `json:"incarnation"` // lower-case hex
	Time        time.Time `json:"time"`
	Cut         int64     `json:"cut,omitempty"` // bytes of a torn tail removed at this start
}

// Intent is a certificate about to be signed (I1). Serial is lower-case hex.
type Intent struct {
	Issuer    string `json:"issuer"`
	Serial    string `json:"serial"`
	Req       []byte `json:"req,omitempty"`  // SHA-256(principal ‖ 0 ‖ Idempotency-Key)
	Body      []byte `json:"body,omitempty"` // SHA-256 of the parsed request
	TBS       []byte `json:"tbs"`
	Requester string `json:"requester"`
	Profile   string `json:"profile"`
	Takeover  bool   `json:"takeover,omitempty"` // another node's intent, finished here
}

// Sign is a digest about to be sent to an HSM.
type Sign struct {
	Issuer string `json:"issuer"`
	Serial string `json:"serial"`
	Digest []byte `json:"digest"` // SHA-256 of the TBS
}

// Kinds of Done.
const (
	DoneCert       = "cert"
	DoneAbandoned  = "abandoned"
	DoneRevocation = "revocation"
)

// Done is a fact read back from the database, written before it is released (I4, protocols §2 step 7).
type Done struct {
	Issuer string      `json:"issuer"`
	Serial string      `json:"serial"`
	Ver    int         `json:"ver"`
	DER    []byte      `json:"der,omitempty"`
	Lane   string      `json:"lane"`
	Seq    uint64      `json:"seq"`
	Kind   string      `json:"kind"` // DoneCert, DoneAbandoned, DoneRevocation
	Event  *Revocation `json:"event,omitempty"`
}

// Revocation is one event of a serial's chain (protocols §1); the highest N wins.
type Revocation struct {
	N              int        `json:"n"`
	Event          string     `json:"event"` // revoke, hold, release, reason-change
	Reason         string     `json:"reason,omitempty"`
	Date           time.Time  `json:"date"`
	InvalidityDate *time.Time `json:"invalidity_date,omitempty"`
	Actor          string     `json:"actor,omitempty"`
}

// Void is an intent of this node that will never be signed.
type Void struct {
	Issuer string `json:"issuer"`
	Serial string `json:"serial"`
	Why    string `json:"why"`
}

// CRL is a CRL about to be signed.
type CRL struct {
	Issuer  string `json:"issuer"`
	Shard   int    `json:"shard"`
	N       int    `json:"n"`
	Number  uint64 `json:"number"`
	TBSHash []byte `json:"tbs_hash"`
}

// Audit is an act worth a record that no other kind holds.
type Audit struct {
	Actor   string `json:"actor"`
	Event   string `json:"event"`
	Object  string `json:"object,omitempty"`
	Outcome string `json:"outcome"`
	Detail  string `json:"detail,omitempty"`
}

// New makes a record of one of this package's payloads; the kind follows from its type. It fails on any other type, and on a time that
// JSON cannot hold (years outside 0 to 9999).
func New(payload any) (Record, error) {
	var k Kind
	switch payload.(type) {
	case Start, *Start:
		k = KindStart
	case Intent, *Intent:
		k = KindIntent
	case Sign, *Sign:
		k = KindSign
	case Done, *Done:
		k = KindDone
	case Void, *Void:
		k = KindVoid
	case CRL, *CRL:
		k = KindCRL
	case Audit, *Audit:
		k = KindAudit
	default:
		return Record{}, fmt.Errorf("encoding a journal record: %T is no payload", payload)
	}
	b, err := json.Marshal(payload)
	if err != nil {
		return Record{}, fmt.Errorf("encoding a %s record: %w", k, err)
	}
	return Record{Kind: k, Payload: b}, nil
}

// Decode reads the payload into p, a pointer to one of this package's types. Unknown fields are left out, so that an older reader can read a newer journal.
func (r Record) Decode(p any) error {
	if err := json.Unmarshal(r.Payload, p); err != nil {
		return fmt.Errorf("decoding a %s record: %w", r.Kind, err)
	}
	return nil
}
