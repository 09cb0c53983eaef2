package db

import (
	"database/sql"
	"strings"
	"time"
)

// Kinds of an outcome. Both compete for one key.
const (
	OutcomeCert      = "cert"
	OutcomeAbandoned = "abandoned"
)

// Outcome is what became of an intent. It is appended to a lane (see Fact).
type Outcome struct {
	Issuer   string
	Serial   []byte
	Ver      uint32 // 1 if 0; only recovery writes higher
	Kind     string // OutcomeCert or OutcomeAbandoned
	DER      []byte // the certificate; nil when abandoned
	NotAfter time.Time
	Lane     string // set by Append
	Seq      uint64 // set by Append
	Created  time.Time
}

const outcomeColumns = "issuer, serial, ver, kind, der, not_after, lane, seq, created"

var outcomeTable = &table{name: "outcome", columns: strings.Split(outcomeColumns, ", "), key: 3}

// factTables are the tables that lanes append to, in the order in which every transaction does.
var factTables = []*table{outcomeTable, revocationTable, crlResultTable, generationLogTable, responderTable}

func (o *Outcome) row(lane string, seq uint64) []any {
	return []any{o.Issuer, o.Serial, o.Ver, o.Kind, o.DER, orNull(seconds(o.NotAfter)), lane, seq, micros(o.Created)}
}

// nullOutcome scans the outer side of a join.
type nullOutcome struct {
	issuer, kind, lane sql.NullString
	serial, der        []byte
	ver                sql.Null[uint32]
	seq                sql.Null[uint64]
	notAfter, created  sql.NullTime
}

func (o *nullOutcome) dest() []any {
	return []any{&o.issuer, &o.serial, &o.ver, &o.kind, &o.der, &o.notAfter, &o.lane, &o.seq, &o.created}
}

func (o *nullOutcome) outcome() *Outcome {
	if !o.issuer.Valid {
		return nil
	}
	return &Outcome{Issuer: o.issuer.String, Serial: o.serial, Ver: o.ver.V, Kind: o.kind.String, DER: o.der, NotAfter: o.notAfter.Time,
		Lane: o.lane.String, Seq: o.seq.V, Created: o.created.Time}
}
