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
	KindRound  Kind = 6 // Round: this node entered a recovery round (protocols §3)
	KindCRL    Kind = 7 // CRL: a CRL is about to be signed
	KindAudit  Kind = 8 // Audit: an act that is none of the above
	KindHeld   Kind = 9 // Held: a done record of another node, kept for it

	KindPromise Kind = 10 // Promise: what another node promises to whoever keeps its copies

	KindSeal    Kind = 32 // Seal: the last record of a segment
	KindCarry   Kind = 33 // Carry: intents that are open at the end of a segment
	KindSettled Kind = 34 // Settled: nothing of earlier incarnations is open any more
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
	case KindSeal:
		return "seal"
	case KindCarry:
		return "carry"
	case KindSettled:
		return "settled"
	case KindHeld:
		return "held"
	case KindPromise:
		return "promise"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// ParseKind is the opposite of String.
func ParseKind(name string) (Kind, bool) {
	for k := KindStart; k <= KindSettled; k++ {
		if k.String() == name {
			return k, true
		}
	}
	return 0, false
}

// Start opens an incarnation. The journal writes it itself.
type Start struct {
	Node        string    `json:"node"`
	Incarnation string    `json:"incarnation"` // lower-case hex
	Time        time.Time `json:"time"`
	Cut         int64     `json:"cut,omitempty"` // bytes of a torn tail removed at this start
}

// Intent is a certificate about to be signed (I1). Serial is lower-case hex. It holds all that the intent's row does, so that the row can be
// put back into a database that lost it.
type Intent struct {
	Issuer    string `json:"issuer"`
	Serial    string `json:"serial"`
	Req       []byte `json:"req,omitempty"`  // SHA-256(principal ‖ 0 ‖ Idempotency-Key)
	Body      []byte `json:"body,omitempty"` // SHA-256 of the parsed request
	TBS       []byte `json:"tbs,omitempty"`  // absent inside a Done that has the certificate
	Requester string `json:"requester"`
	Profile   string `json:"profile"`
	Takeover  bool   `json:"takeover,omitempty"` // another node's intent, finished here

	Ver            int       `json:"ver,omitempty"` // 1 if 0
	ProfileVersion int       `json:"profile_version,omitempty"`
	ProfileHash    []byte    `json:"profile_hash,omitempty"`
	Reference      string    `json:"reference,omitempty"`
	SiteEpoch      uint64    `json:"site_epoch,omitempty"`
	Node           string    `json:"node,omitempty"` // that made the row
	MAC            []byte    `json:"mac,omitempty"`
	MACKey         []byte    `json:"mac_key,omitempty"` // id of the key that made MAC
	Created        time.Time `json:"created,omitzero"`
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
	DoneBlock      = "block" // of a subject key: Serial is the SHA-256 of its SubjectPublicKeyInfo, Issuer is empty, and so is Lane
)

// Done is a fact read back from the database, written before it is released (I4, protocols §2 step 7).
type Done struct {
	Issuer string      `json:"issuer"`
	Serial string      `json:"serial"`
	Ver    int         `json:"ver"`
	DER    []byte      `json:"der,omitempty"`
	Lane   string      `json:"lane"`
	Seq    uint64      `json:"seq"`
	Kind   string      `json:"kind"` // DoneCert, DoneAbandoned, DoneRevocation, or crl
	Event  *Revocation `json:"event,omitempty"`

	N       uint64    `json:"n,omitempty"`     // place among the done records of the incarnation, from 1; holders take them in this order
	Round   uint64    `json:"round,omitempty"` // newest recovery round when it was read back
	Created time.Time `json:"created,omitzero"`
	Intent  *Intent   `json:"intent,omitempty"` // the fact's intent, so that both rows can be put back
	CRL     *CRL      `json:"crl,omitempty"`    // of a CRL: what was signed, without its content
	Block   *Block    `json:"block,omitempty"`  // of a block
}

// Block is why a subject key must not be certified any more.
type Block struct {
	Reason  string `json:"reason"`
	Comment string `json:"comment,omitempty"`
	Actor   string `json:"actor"`
}

// Revocation is one event of a serial's chain (protocols §1); the highest N wins.
type Revocation struct {
	N              int        `json:"n"`
	Event          string     `json:"event"` // revoke, hold, release, reason-change
	Reason         string     `json:"reason,omitempty"`
	Date           time.Time  `json:"date"`
	InvalidityDate *time.Time `json:"invalidity_date,omitempty"`
	Actor          string     `json:"actor,omitempty"`

	Comment   string    `json:"comment,omitempty"`
	SiteEpoch uint64    `json:"site_epoch,omitempty"`
	Created   time.Time `json:"created,omitzero"`
}

// Round is a recovery round that this node entered: nothing read back before it is released any more.
type Round struct {
	N     uint64 `json:"n"`
	Ended uint64 `json:"ended"`           // newest round that this node knows to have ended, N at most: the newest in which anything was released
	Cause string `json:"cause,omitempty"` // set by the node that began the round
	// CopyRequired says that this node may have told others that it releases nothing without a copy.
	CopyRequired bool `json:"copy_required,omitempty"`
}

// Held is a done record of another node's incarnation, kept in case that node and the database both lose it.
type Held struct {
	Owner       string          `json:"owner"`
	Incarnation string          `json:"incarnation"` // lower-case hex
	N           uint64          `json:"n"`           // Done.N
	Chain       []byte          `json:"chain"`       // SHA-256 of the chain before and of Record; the first one's chain before is empty
	Record      json.RawMessage `json:"record"`      // the owner's payload, byte for byte
}

// Promise is what a node said when it gave records to be held: whether it releases nothing without a copy.
type Promise struct {
	Owner        string `json:"owner"`
	Incarnation  string `json:"incarnation"` // that said it first, lower-case hex
	CopyRequired bool   `json:"copy_required"`
}

// Stream is how far the records of one incarnation are held.
type Stream struct {
	Owner       string            `json:"owner"`
	Incarnation string            `json:"incarnation"`
	N           uint64            `json:"n"`
	Chain       []byte            `json:"chain"`
	Lanes       map[string]uint64 `json:"lanes"` // highest number of each lane that the records name
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

// Settled says that the database knows every intent of earlier incarnations, by whatever fate: a later start need not look at them again.
type Settled struct {
	Intents int `json:"intents"` // how many were open
}

// Carry repeats intents that are open at the end of a segment. The journal writes it itself, before a Seal.
type Carry struct {
	Open []Carried `json:"open"`
}

// Carried is an open intent.
type Carried struct {
	Incarnation string          `json:"incarnation"` // that began it, lower-case hex
	Time        time.Time       `json:"time"`        // when
	Intent      json.RawMessage `json:"intent"`      // Intent, as journalled
}

// Seal ends a segment. The journal writes it itself. With the carry records before it, it holds all that a start needs of this segment and of
// those before, and what tells a reader whether to look into the segment.
type Seal struct {
	Node     string            `json:"node"`
	Segment  uint64            `json:"segment"`
	Prev     []byte            `json:"prev"`            // hash of the last record of the segment before; zeros in the first
	Records  uint64            `json:"records"`         // in the segment, without carry and seal
	Kinds    map[string]uint64 `json:"kinds"`           // of these: how many, by kind, by kind of done as "done cert", by event of audit as "audit revoke"
	Runs     []Run             `json:"runs"`            // all offsets in the segment, carry and seal included
	First    time.Time         `json:"first"`           // earliest time of a record
	Last     time.Time         `json:"last"`            // latest
	Lanes    map[string]Range  `json:"lanes,omitempty"` // of done records
	Released []Done            `json:"released,omitempty"`
	CRLs     map[string]uint64 `json:"crls,omitempty"`
	Round    json.RawMessage   `json:"round,omitempty"`
	Streams  []Stream          `json:"streams"`            // of all that was ever held, oldest first; null where it was not counted
	Promises map[string]string `json:"promises,omitempty"` // by owner: incarnation since which it requires copies
	Held     map[string]uint64 `json:"held,omitempty"`     // highest number of each lane that held records of this segment name
}

// Run is the records of one incarnation in a segment.
type Run struct {
	Incarnation string    `json:"incarnation"` // lower-case hex
	First       uint64    `json:"first"`       // offset
	Last        uint64    `json:"last"`
	Until       time.Time `json:"until"` // time of the last one
}

// Range is the numbers of one lane in a segment; not all between need be there.
type Range struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
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
	case Round, *Round:
		k = KindRound
	case Held, *Held:
		k = KindHeld
	case Promise, *Promise:
		k = KindPromise
	case Audit, *Audit:
		k = KindAudit
	case Seal, *Seal:
		k = KindSeal
	case Carry, *Carry:
		k = KindCarry
	case Settled, *Settled:
		k = KindSettled
	default:
		return Record{}, fmt.Errorf("encoding a journal record: %T is no payload", payload)
	}
	b, err := json.Marshal(payload)
	if err != nil {
		return Record{}, fmt.Errorf("encoding a %s record: %w", k, err)
	}
	return Record{Kind: k, Payload: b, known: aboutOf(payload)}, nil
}

// Decode reads the payload into p, a pointer to one of this package's types. Unknown fields are left out, so that an older reader can read a newer journal.
func (r Record) Decode(p any) error {
	if err := json.Unmarshal(r.Payload, p); err != nil {
		return fmt.Errorf("decoding a %s record: %w", r.Kind, err)
	}
	return nil
}
