package ocsp

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"math"
	"sync/atomic"

	"trivet/db"
)

// Record is what a VA asks of the database; NewRecord's is the real one. Implementations are safe for concurrent use,
// and every call ends with its context.
type Record interface {
	// Head reads the feed beyond vector (lane to seq; lanes that it does not name from their beginning, those at LaneEnded not at
	// all) and this node's newest membership row, causally: all that was committed before the call, on whatever node, is in the
	// answer, unless More is set because a lane had limit rows or more. It asks a database node other than except if it can, and
	// names the one that answered.
	Head(ctx context.Context, except string, vector map[string]uint64, limit int) (Head, string, error)
	// Join durably makes this process the member of its name and returns the number of the row that did. When it
	// returns, every later causal read of the members shows the row.
	Join(ctx context.Context) (uint32, error)
	// Leave durably ends the membership begun by row n, unless another row ended it.
	Leave(ctx context.Context, n uint32) error
	// Accuse says that a node showed a lane that does not continue after seq: it is to be compared with the others.
	Accuse(node, lane string, seq uint64)
	// Generations reads every CA generation with its newest responder and complete CRL, causally.
	Generations(ctx context.Context) ([]Generation, error)
}

// LaneEnded is the position of a lane that is not to be read any more.
const LaneEnded = math.MaxUint64

// Generation is one CA generation.
type Generation struct {
	Issuer      string     // "demo-g1"
	CA          string     // "demo"
	Certificate []byte     // DER; empty while it has none
	Responder   *Responder // nil while it has none
	CRL         []byte     // DER of the newest complete CRL; empty while there is none
}

// Responder is a delegated responder certificate and where its key is.
type Responder struct {
	KeyGroup    string
	KeyID       string
	Certificate []byte // DER
}

// Events of a membership.
const (
	memberIn  = "in"
	memberOut = "out"
)

// NewRecord returns the record kept in store. self says how this process appears in va_member; its N, Event and Created
// are not used.
func NewRecord(store *db.Store, self db.Member) Record {
	r := &record{store: store, self: self}
	r.lanes.Store(&laneSet{})
	return r
}

type record struct {
	store *db.Store
	self  db.Member
	lanes atomic.Pointer[laneSet] // as last read
}

// Head asks for the rows of the lanes it knew last time, in the same round trip with what tells whether there are others. Each statement waits for
// what was committed before it began. The members come first and the lanes before their rows: what is missed that way was committed
// after the call.
func (r *record) Head(ctx context.Context, except string, vector map[string]uint64, limit int) (Head, string, error) {
	var head Head
	node, err := r.store.Read(ctx, "ocsp head", except, func(ctx context.Context, c *sql.Conn) error {
		lanes := r.lanes.Load()
		read, err := db.ReadFeedHead(ctx, c, r.self.VA, beyond(vector, lanes.names), limit)
		if err != nil {
			return err
		}
		if read.Lanes != lanes.mark {
			all, err := db.Lanes(ctx, c)
			if err != nil {
				return err
			}
			now := &laneSet{mark: read.Lanes}
			for _, l := range all {
				now.names = append(now.names, l.Lane)
			}
			if read.Rows, err = db.FeedSince(ctx, c, beyond(vector, now.names), limit); err != nil {
				return err
			}
			r.lanes.Store(now)
		}
		head = Head{Member: read.Member, Round: read.Round, Rows: read.Rows}
		run := 0
		for i, row := range head.Rows {
			if i == 0 || row.Lane != head.Rows[i-1].Lane {
				run = 0
			}
			if run++; run >= limit {
				head.More = true
			}
		}
		return nil
	})
	return head, node, err
}

// laneSet is every lane there was at some reading, or a few more.
type laneSet struct {
	mark  db.LaneMark
	names []string
}

// beyond returns where to read lanes on from; those that have ended are left out.
func beyond(vector map[string]uint64, lanes []string) map[string]uint64 {
	from := make(map[string]uint64, len(lanes))
	for _, lane := range lanes {
		if at := vector[lane]; at != LaneEnded {
			from[lane] = at
		}
	}
	return from
}

// tip returns this name's newest membership row; the zero Member when there is none.
func (r *record) tip(ctx context.Context) (db.Member, error) {
	members, err := r.store.Members(ctx)
	if err != nil {
		return db.Member{}, fmt.Errorf("reading members: %w", err)
	}
	for _, m := range members {
		if m.VA == r.self.VA {
			return m, nil
		}
	}
	return db.Member{}, nil
}

// Join implements Record.
func (r *record) Join(ctx context.Context) (uint32, error) {
	for {
		tip, err := r.tip(ctx)
		if err != nil {
			return 0, err
		}
		if tip.Event == memberIn && bytes.Equal(tip.Incarnation, r.self.Incarnation) {
			return tip.N, nil // an earlier try whose answer was lost
		}
		switch err := r.append(ctx, tip.N+1, memberIn); {
		case err == nil:
			return tip.N + 1, nil
		case db.ClassOf(err) != db.Duplicate:
			return 0, err
		}
	}
}

// Leave implements Record.
func (r *record) Leave(ctx context.Context, n uint32) error {
	err := r.append(ctx, n+1, memberOut)
	if db.ClassOf(err) == db.Duplicate {
		return nil
	}
	return err
}

func (r *record) append(ctx context.Context, n uint32, event string) error {
	row := r.self
	row.N, row.Event = n, event
	return r.store.InsertMember(ctx, row)
}

// Accuse implements Record.
func (r *record) Accuse(node, lane string, seq uint64) { r.store.Accuse(node, lane, seq) }

// Generations implements Record.
func (r *record) Generations(ctx context.Context) ([]Generation, error) {
	generations, err := r.store.Generations(ctx)
	if err != nil {
		return nil, err
	}
	responders, err := r.store.Responders(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading responders: %w", err)
	}
	newest := map[string]*Responder{}
	for _, p := range responders { // in order of their numbers
		newest[p.Issuer] = &Responder{KeyGroup: p.KeyGroup, KeyID: p.KeyID, Certificate: p.DER}
	}
	out := make([]Generation, 0, len(generations))
	for i := range generations {
		g := &generations[i]
		_, crl, err := r.store.LatestCRL(ctx, nil, g.Issuer, 0)
		if err != nil {
			return nil, fmt.Errorf("reading the CRL of %s: %w", g.Issuer, err)
		}
		is := Generation{Issuer: g.Issuer, CA: g.CA, Certificate: g.Certificate(), Responder: newest[g.Issuer]}
		if crl != nil {
			is.CRL = crl.DER
		}
		out = append(out, is)
	}
	return out, nil
}
