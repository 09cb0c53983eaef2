package ocsp

import (
	"encoding/hex"
	"sync"
)

// Serial is a certificate serial number: its minimal big-endian octets, 1 to 20 of them. It is comparable.
type Serial struct {
	n uint8
	b [20]byte
}

// MakeSerial reads big-endian octets, leading zeros allowed. It refuses zero and more than 20 significant
// octets (RFC 5280 4.1.2.2).
func MakeSerial(octets []byte) (Serial, bool) {
	for len(octets) > 0 && octets[0] == 0 {
		octets = octets[1:]
	}
	var s Serial
	if len(octets) == 0 || len(octets) > len(s.b) {
		return Serial{}, false
	}
	s.n = uint8(copy(s.b[:], octets))
	return s, true
}

// Bytes returns a copy of the octets.
func (s Serial) Bytes() []byte { return append([]byte(nil), s.b[:s.n]...) }

// String is the serial in lower-case hex, as in certificate ids.
func (s Serial) String() string { return hex.EncodeToString(s.b[:s.n]) }

// State is what a certificate's status says. Its zero value is TryLater, so that nothing forgotten reads as Good.
type State uint8

const (
	// TryLater means that the table knows the serial but not enough to say more.
	TryLater State = iota
	// Good means that a certificate was issued and no event stands against it.
	Good
	// Revoked means revoked, on hold, or abandoned before it was issued.
	Revoked
)

// EventKind is the kind of one event in a serial's revocation chain.
type EventKind uint8

const (
	// EventRevoke revokes for good; a change of reason is one too.
	EventRevoke EventKind = iota + 1
	// EventHold revokes until a release.
	EventHold
	// EventRelease ends a hold.
	EventRelease
)

// reasonKeyCompromise is CRLReason keyCompromise, RFC 5280 5.3.1.
const reasonKeyCompromise = 1

// Event is one event of a serial's revocation chain. Events are ordered by N alone: clocks order nothing.
type Event struct {
	N      uint32 // 1 for the first; 0 means no event
	Kind   EventKind
	Reason uint8 // RFC 5280 CRLReason
	Date   int64 // revocationDate, unix seconds
}

// beats says whether e is to be shown rather than f. N decides. Two events with one N can only be the same event
// imported twice; should they differ nevertheless, the graver one wins, whatever the order of arrival.
func (e Event) beats(f Event) bool {
	if e.N != f.N {
		return e.N > f.N
	}
	if released, other := e.Kind == EventRelease, f.Kind == EventRelease; released != other {
		return other
	}
	if e.Kind != f.Kind {
		return e.Kind < f.Kind
	}
	if key, other := e.Reason == reasonKeyCompromise, f.Reason == reasonKeyCompromise; key != other {
		return key
	}
	if e.Date != f.Date {
		return e.Date < f.Date
	}
	return e.Reason < f.Reason
}

// Outcome is what became of an intent. The highest Ver wins.
type Outcome struct {
	Ver       uint32 // 1 for the first; 0 means no outcome known
	Abandoned bool   // no certificate exists: the serial reads revoked
	NotAfter  int64  // of the certificate, unix seconds
	Date      int64  // of an abandonment, unix seconds
}

func (o Outcome) beats(p Outcome) bool {
	if o.Ver != p.Ver {
		return o.Ver > p.Ver
	}
	if o.Abandoned != p.Abandoned {
		return o.Abandoned
	}
	if o.NotAfter != p.NotAfter {
		return o.NotAfter > p.NotAfter
	}
	return o.Date < p.Date
}

// Status is what a response shows of one certificate.
type Status struct {
	State     State
	Reason    uint8 // of a revocation; 0 (unspecified) is not shown
	RevokedAt int64 // unix seconds
}

// entry is one serial. Signatures belong to the status of the current epoch: changing the status drops them.
type entry struct {
	outcome    Outcome
	event      Event
	epoch      uint32
	signatures [hashes]*Signature
}

func (e *entry) status() Status {
	switch {
	case e.event.N > 0 && e.event.Kind != EventRelease:
		return Status{State: Revoked, Reason: e.event.Reason, RevokedAt: e.event.Date}
	case e.outcome.Ver == 0:
		return Status{} // an event came before its certificate: nothing is good without a row
	case e.outcome.Abandoned:
		return Status{State: Revoked, RevokedAt: e.outcome.Date}
	default:
		return Status{State: Good}
	}
}

// View is a consistent picture of one serial.
type View struct {
	Status
	NotAfter int64  // unix seconds; 0 while no certificate row is known
	Epoch    uint32 // rises with every change of Status

	signatures [hashes]*Signature
}

// Counts are the serials of a table by what they show.
type Counts struct {
	Good     int `json:"good"`
	Revoked  int `json:"revoked"`
	TryLater int `json:"try_later"`
	Unsigned int `json:"unsigned"` // without a SHA-1 CertID signature
}

// Table is the status of every serial of one issuer, that is of one CA generation. Facts may be merged in any
// order and any number of times and give the same table. It is safe for concurrent use.
type Table struct {
	mu      sync.RWMutex
	entries map[Serial]*entry
	counts  [Revoked + 1]int
	signed  int
}

// NewTable returns an empty table.
func NewTable() *Table { return &Table{entries: map[Serial]*entry{}} }

// MergeOutcome merges what became of an intent. It says whether the status shown changed.
func (t *Table) MergeOutcome(s Serial, o Outcome) bool {
	return t.merge(s, func(e *entry) {
		if o.beats(e.outcome) {
			e.outcome = o
		}
	})
}

// MergeEvent merges one event of the revocation chain. It says whether the status shown changed.
func (t *Table) MergeEvent(s Serial, ev Event) bool {
	return t.merge(s, func(e *entry) {
		if ev.beats(e.event) {
			e.event = ev
		}
	})
}

func (t *Table) merge(s Serial, change func(*entry)) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, known := t.entries[s]
	if !known {
		e = &entry{}
		t.entries[s] = e
		t.counts[TryLater]++
	}
	before := e.status()
	change(e)
	after := e.status()
	if before == after {
		return false
	}
	t.counts[before.State]--
	t.counts[after.State]++
	if e.signatures[hashSHA1] != nil {
		t.signed--
	}
	e.signatures = [hashes]*Signature{}
	e.epoch++
	return true
}

// Lookup returns the serial's picture; false when no lane has named it.
func (t *Table) Lookup(s Serial) (View, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	e, ok := t.entries[s]
	if !ok {
		return View{}, false
	}
	return View{Status: e.status(), NotAfter: e.outcome.NotAfter, Epoch: e.epoch, signatures: e.signatures}, true
}

// publish keeps a verified signature, if the status that it was made for is still the one shown.
func (t *Table) publish(s Serial, h hash, epoch uint32, sig *Signature) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[s]
	if !ok || e.epoch != epoch {
		return false
	}
	if h == hashSHA1 && e.signatures[h] == nil {
		t.signed++
	}
	e.signatures[h] = sig
	return true
}

// Counts returns how many serials show what.
func (t *Table) Counts() Counts {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return Counts{
		Good:     t.counts[Good],
		Revoked:  t.counts[Revoked],
		TryLater: t.counts[TryLater],
		Unsigned: t.counts[Good] + t.counts[Revoked] - t.signed,
	}
}

// unsigned lists the serials that have a status to sign and no SHA-1 CertID signature.
func (t *Table) unsigned() (revoked, good []Serial) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for s, e := range t.entries {
		if e.signatures[hashSHA1] != nil {
			continue
		}
		switch e.status().State {
		case Revoked:
			revoked = append(revoked, s)
		case Good:
			good = append(good, s)
		}
	}
	return revoked, good
}
