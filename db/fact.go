package db

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Fact is something to append to a lane: exactly one field is set, but for Intent. Append fills in Lane and Seq of
// those that have them, and Created where it is zero.
type Fact struct {
	Outcome    *Outcome
	Revocation *Revocation
	CRL        *CRLResult
	Generation *GenerationEvent
	Responder  *Responder

	Intent *Intent // beside Outcome, by recovery: put into the record in the same transaction unless its keys are taken

	closedBy string // the lane's end; no table but the feed
}

// entry is a fact ready to be numbered.
type entry struct {
	intent *Intent
	feed   FeedRow                             // without lane, seq and chain
	table  *table                              // nil for the lane's end
	key    []any                               // of the fact's own row
	row    func(lane string, seq uint64) []any // of the fact's own row
	place  func(lane string, seq uint64)       // tells the caller's struct where it is
}

// entry checks a fact and encodes it. now is used where Created is not set.
func (f *Fact) entry(now time.Time) (entry, error) {
	var e entry
	var p FeedPayload
	set := 0
	e.place = func(string, uint64) {}
	if o := f.Outcome; o != nil {
		set++
		if o.Ver == 0 {
			o.Ver = 1
		}
		if o.Created.IsZero() {
			o.Created = now
		}
		switch o.Kind {
		case OutcomeCert:
			e.feed.Kind = FeedCert
			p.NotAfter, p.Digest = o.NotAfter.Unix(), digest(o.DER)
			if len(o.DER) == 0 || o.NotAfter.IsZero() {
				return e, errors.New("outcome cert: DER and NotAfter must be set")
			}
		case OutcomeAbandoned:
			e.feed.Kind = FeedAbandoned
		default:
			return e, fmt.Errorf("outcome: unknown kind %q", o.Kind)
		}
		if o.Ver > 1 {
			p.Ver = o.Ver
		}
		e.feed.Issuer, e.feed.Serial = o.Issuer, o.Serial
		e.table, e.key, e.row = outcomeTable, []any{o.Issuer, o.Serial, o.Ver}, o.row
		e.place = func(lane string, seq uint64) { o.Lane, o.Seq = lane, seq }
		if f.Intent != nil {
			row := *f.Intent
			if row.Ver == 0 {
				row.Ver = 1
			}
			row.Created = micros(row.Created)
			if err := row.check(); err != nil {
				return e, err
			}
			e.intent = &row
		}
	}
	if r := f.Revocation; r != nil {
		set++
		if r.Created.IsZero() {
			r.Created = now
		}
		if r.N == 0 || r.Date.IsZero() {
			return e, errors.New("revocation: N counts from 1 and Date must be set")
		}
		switch r.Event {
		case EventRevoke, EventHold, EventRelease, EventReasonChange:
		default:
			return e, fmt.Errorf("revocation: unknown event %q", r.Event)
		}
		e.feed.Kind, e.feed.Issuer, e.feed.Serial = FeedRevocation, r.Issuer, r.Serial
		p.N, p.Event, p.Reason, p.Date = r.N, r.Event, r.Reason, r.Date.Unix()
		if !r.InvalidityDate.IsZero() {
			p.Invalid = r.InvalidityDate.Unix()
		}
		e.table, e.key, e.row = revocationTable, []any{r.Issuer, r.Serial, r.N}, r.row
		e.place = func(lane string, seq uint64) { r.Lane, r.Seq = lane, seq }
	}
	if c := f.CRL; c != nil {
		set++
		if c.Created.IsZero() {
			c.Created = now
		}
		if c.Kind != CRLIssued && c.Kind != CRLVoid {
			return e, fmt.Errorf("crl result: unknown kind %q", c.Kind)
		}
		e.feed.Kind, e.feed.Issuer = FeedCRL, c.Issuer
		p.N, p.Shard, p.Number, p.Kind, p.Digest = c.N, c.Shard, c.Number, c.Kind, digest(c.DER)
		e.table, e.key, e.row = crlResultTable, []any{c.Issuer, c.Shard, c.N}, c.row
		e.place = func(lane string, seq uint64) { c.Lane, c.Seq = lane, seq }
	}
	if g := f.Generation; g != nil {
		set++
		if g.Created.IsZero() {
			g.Created = now
		}
		e.feed.Kind, e.feed.Issuer = FeedGeneration, g.Issuer
		p.N, p.Event, p.State, p.Digest = g.N, g.Event, g.State, digest(g.DER)
		e.table, e.key, e.row = generationLogTable, []any{g.Issuer, g.N}, g.row
	}
	if r := f.Responder; r != nil {
		set++
		if r.Created.IsZero() {
			r.Created = now
		}
		e.feed.Kind, e.feed.Issuer, e.feed.Serial = FeedResponder, r.Issuer, r.CertSerial
		p.N, p.Digest = r.N, digest(r.DER)
		e.table, e.key, e.row = responderTable, []any{r.Issuer, r.N}, r.row
	}
	if f.closedBy != "" {
		set++
		e.feed.Kind, p.By = FeedClosed, f.closedBy
	}
	if set != 1 {
		return e, fmt.Errorf("a fact has exactly one field set, this has %d", set)
	}
	var err error
	e.feed.Payload, err = json.Marshal(p)
	return e, err
}

// id tells entries of one batch apart by what they would collide on.
func (e *entry) id() string {
	if e.table == nil {
		return "closed"
	}
	var b bytes.Buffer
	b.WriteString(e.table.name)
	for _, k := range e.key {
		fmt.Fprintf(&b, "/%x", k)
	}
	return b.String()
}

func digest(der []byte) []byte {
	if len(der) == 0 {
		return nil
	}
	sum := sha256.Sum256(der)
	return sum[:]
}
