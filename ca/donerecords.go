package ca

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"slices"

	"trivet/db"
	"trivet/journal"
)

// DoneRecords reads this incarnation's done records from its journal in the order of their numbers: for holder.CopierConfig. Batches that are
// journalled at once may lie there in another order.
func DoneRecords(j *journal.Journal) func(from uint64, fn func(n uint64, record []byte) error) error {
	return func(from uint64, fn func(n uint64, record []byte) error) error {
		type record struct {
			n       uint64
			payload []byte
		}
		var found []record
		incarnation := j.Incarnation()
		err := j.Replay(func(e journal.Entry) error {
			if e.Kind != journal.KindDone || e.Incarnation != incarnation {
				return nil
			}
			var d struct {
				N uint64 `json:"n"`
			}
			if err := e.Decode(&d); err != nil {
				return err
			}
			if d.N >= from {
				found = append(found, record{d.N, e.Payload})
			}
			return nil
		})
		if err != nil {
			return err
		}
		slices.SortFunc(found, func(a, b record) int { return cmp.Compare(a.n, b.n) })
		for i, r := range found {
			if r.n != from+uint64(i) {
				return fmt.Errorf("done record %d is not in the journal yet", from+uint64(i))
			}
			if err := fn(r.n, r.payload); err != nil {
				return err
			}
		}
		return nil
	}
}

// intentRow makes the row again that a journal kept.
func intentRow(issuer string, serial []byte, i *journal.Intent, tbs []byte) *db.Intent {
	if len(tbs) == 0 {
		tbs = i.TBS
	}
	row := &db.Intent{
		Issuer: issuer, Serial: serial, Req: i.Req, Ver: uint32(max(i.Ver, 1)), Body: i.Body, TBS: tbs, Profile: i.Profile, ProfileVersion: uint32(i.ProfileVersion),
		ProfileHash: i.ProfileHash, Requester: i.Requester, Reference: i.Reference, SiteEpoch: i.SiteEpoch, Node: i.Node, MAC: i.MAC, MACKey: i.MACKey, Created: i.Created,
	}
	if len(row.Req) == 0 {
		row.Req = nil
	}
	if len(row.MAC) == 0 {
		row.MAC, row.MACKey = nil, nil
	}
	if len(row.Body) != 32 {
		row.Body = make([]byte, 32)
	}
	if len(row.ProfileHash) != 32 {
		row.ProfileHash = make([]byte, 32)
	}
	return row
}

// journalIntent is everything that an intent's row holds, for the journal.
func journalIntent(i *db.Intent) *journal.Intent {
	return &journal.Intent{
		Issuer: i.Issuer, Serial: hex.EncodeToString(i.Serial), Req: i.Req, Body: i.Body, TBS: i.TBS, Requester: i.Requester, Profile: i.Profile,
		Ver: int(i.Ver), ProfileVersion: int(i.ProfileVersion), ProfileHash: i.ProfileHash, Reference: i.Reference, SiteEpoch: i.SiteEpoch, Node: i.Node,
		MAC: i.MAC, MACKey: i.MACKey, Created: i.Created,
	}
}

// doneOf is the record of an outcome that was read back. tbs is needed only for one that was abandoned.
func doneOf(intent *db.Intent, outcome *db.Outcome, tbs []byte) *journal.Done {
	d := &journal.Done{
		Issuer: outcome.Issuer, Serial: hex.EncodeToString(outcome.Serial), Ver: int(outcome.Ver), Lane: outcome.Lane, Seq: outcome.Seq,
		Created: outcome.Created, Intent: journalIntent(intent),
	}
	d.Intent.Issuer, d.Intent.Serial, d.Intent.TBS = "", "", nil // said already, and within the certificate
	if outcome.Kind == outcomeCert {
		d.Kind, d.DER = journal.DoneCert, outcome.DER
	} else {
		d.Kind, d.Intent.TBS = journal.DoneAbandoned, tbs
	}
	return d
}
