package db

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// maxBatch bounds the facts of one transaction: write sets live in every node's memory.
const maxBatch = 500

// Lane is one contiguous change log of one incarnation of a writer. Each fact is committed together with its feed
// row; seqs count from 1 without holes, because one transaction at a time is in flight. Safe for
// concurrent use; callers take turns.
//
// When the fate of a transaction is unknown, the lane inserts the very same rows again, and does nothing else until
// it knows: the feed row's key (lane, seq) admits one transaction only, and its hash tells whose it was.
type Lane struct {
	s    *Store
	name string
	turn chan struct{} // holds a token while nobody appends; guards what follows

	tip     uint64
	chain   [32]byte
	pending *batch // sent, fate unknown; settled before anything else

	committed atomic.Uint64 // tip, for those who only look
	dead      error         // the lane is closed, or not ours
}

// Appended is what became of one fact.
type Appended struct {
	Seq  uint64 // its place in the lane; 0: not in the lane
	Node string // that committed it
	Err  error  // Duplicate: its key was taken by an earlier fact, here or elsewhere, and it was left out. Fatal: malformed, or what it refers to does not exist
}

// Errors that end a lane. They are Fatal: the process must stop, or go on with a new incarnation.
var (
	ErrLaneClosed = errors.New("the lane is closed")
	ErrLaneOwner  = errors.New("the lane holds rows that this process did not write: another process runs with the same incarnation (a copied machine or data directory)")
)

// ErrBehind is in the chain of Append's error when the database, or the node of it that was asked last, lacks the row that the lane
// wrote last: it has not applied it yet, or it has gone back in time.
var ErrBehind = errors.New("the database does not show the lane's last row")

// OpenLane makes a lane known, with its writer, and returns it. index counts a writer's lanes
// from 0. Call it once per incarnation and index.
func (s *Store) OpenLane(ctx context.Context, node string, incarnation [16]byte, index int) (*Lane, error) {
	l := &Lane{s: s, name: LaneName(node, incarnation, index), turn: make(chan struct{}, 1)}
	started := micros(s.cfg.Now())
	// Before the lane is open: others would take it for one of a process that does not know the table.
	s.ownTBS(incarnation)
	if _, err := s.tbsPlace(ctx); err != nil {
		return nil, err
	}
	_, err := s.Write(ctx, "open lane", func(ctx context.Context, tx *sql.Tx) error {
		if _, err := writerTable.insert(ctx, tx, "INSERT IGNORE", [][]any{{incarnation[:], node, s.cfg.Role, started}}); err != nil {
			return err
		}
		_, err := laneTable.insert(ctx, tx, "INSERT IGNORE", [][]any{{l.name, incarnation[:]}})
		return err
	})
	if err != nil {
		return nil, err
	}
	var owner string
	var tip *FeedRow
	_, err = s.Read(ctx, "open lane", "", func(ctx context.Context, c *sql.Conn) (err error) {
		if err := c.QueryRowContext(ctx, "SELECT w.node FROM lane l JOIN writer w USING (incarnation) WHERE l.lane = ?", l.name).Scan(&owner); err != nil {
			return err
		}
		tip, err = laneTip(ctx, c, l.name)
		return err
	})
	if err != nil {
		return nil, err
	}
	if owner != node {
		return nil, l.fatal("", fmt.Errorf("opening lane: incarnation belongs to node %q, not %q: %w", owner, node, ErrLaneOwner))
	}
	if tip != nil {
		if tip.Kind == FeedClosed {
			return nil, l.fatal("", fmt.Errorf("opening lane: %w", ErrLaneClosed))
		}
		l.tip, l.chain = tip.Seq, tip.Chain
		l.committed.Store(tip.Seq)
	}
	l.turn <- struct{}{}
	return l, nil
}

var (
	writerTable = &table{name: "writer", columns: []string{"incarnation", "node", "role", "started"}, key: 1}
	laneTable   = &table{name: "lane", columns: []string{"lane", "incarnation"}, key: 1}
)

func laneTip(ctx context.Context, q Querier, lane string) (*FeedRow, error) {
	var tip *FeedRow
	err := query(ctx, q, func(r *sql.Rows) error {
		row, err := scanFeed(r)
		tip = &row
		return err
	}, "SELECT "+feedColumns+" FROM feed WHERE lane = ? ORDER BY seq DESC LIMIT 1", lane)
	return tip, err
}

// Tip returns the number of the lane's last row that is known to be committed.
func (l *Lane) Tip() uint64 { return l.committed.Load() }

// Name returns "{node}/{incarnation hex}/{index}".
func (l *Lane) Name() string { return l.name }

// Append commits the facts and their feed rows, in order, in transactions of at most 500. The
// result has one element per fact. A fact whose key is taken does not hinder its neighbours.
//
// When Append returns an error, elements with a Seq are committed. The others are not, and never
// will be, unless the error is Ambiguous: then the lane goes on settling them, at Settle or at the next Append, and
// the caller learns their fate there or by reading them back. They must not be appended again
// before that. While an earlier batch cannot be settled, Append sends nothing and returns NotReady.
func (l *Lane) Append(ctx context.Context, facts []Fact) ([]Appended, error) {
	results := make([]Appended, len(facts))
	var entries []entry
	var index []int
	apart := false
	seen := map[string]bool{}
	now := micros(l.s.cfg.Now())
	for i := range facts {
		e, err := facts[i].entry(now)
		switch {
		case err != nil:
			results[i].Err = l.fatal("", err)
		case seen[e.id()]:
			results[i].Err = &Error{Class: Duplicate, Op: "append", Err: errors.New("an earlier fact of the same batch has the same key")}
		default:
			seen[e.id()] = true
			apart = apart || e.intent != nil
			entries, index = append(entries, e), append(index, i)
		}
	}
	if apart { // nobody asks without need
		place, err := l.s.tbsPlace(ctx)
		if err != nil {
			return results, err
		}
		apart = place.apart
	}
	if err := l.enter(ctx); err != nil {
		return results, err
	}
	defer l.leave()
	if _, err := l.settle(ctx); err != nil {
		if ClassOf(err) == Ambiguous {
			err = &Error{Class: NotReady, Op: "append", Err: fmt.Errorf("an earlier batch is not settled: %w", errors.Unwrap(err))}
		}
		return results, err
	}
	for len(entries) > 0 {
		n := min(len(entries), maxBatch)
		b := &batch{entries: entries[:n], index: index[:n], results: results, apart: apart}
		if err := l.commit(ctx, b); err != nil {
			return results, err
		}
		entries, index = entries[n:], index[n:]
	}
	return results, nil
}

// Settle finds out what became of the batch whose Append returned Ambiguous, by completing it, and returns that Append's
// results. It returns nil, nil when nothing is unsettled.
func (l *Lane) Settle(ctx context.Context) ([]Appended, error) {
	if err := l.enter(ctx); err != nil {
		return nil, err
	}
	defer l.leave()
	return l.settle(ctx)
}

// Close ends the lane for good: its next row says so, and whatever transaction of an older self is still in
// flight loses against that row.
func (l *Lane) Close(ctx context.Context) error {
	fact := Fact{closedBy: l.name}
	e, err := fact.entry(l.s.cfg.Now())
	if err != nil {
		return err
	}
	if err := l.enter(ctx); err != nil {
		if errors.Is(err, ErrLaneClosed) {
			return nil
		}
		return err
	}
	defer l.leave()
	if _, err := l.settle(ctx); err != nil {
		return err
	}
	if err := l.commit(ctx, &batch{entries: []entry{e}, index: []int{0}, results: make([]Appended, 1)}); err != nil {
		return err
	}
	l.dead = l.fatal("", ErrLaneClosed)
	return nil
}

func (l *Lane) fatal(node string, err error) error {
	return &Error{Class: Fatal, Op: "append", Node: node, Err: fmt.Errorf("lane %s: %w", l.name, err)}
}

func (l *Lane) enter(ctx context.Context) error {
	select {
	case <-l.turn:
	case <-ctx.Done():
		return &Error{Class: NotReady, Op: "append", Err: fmt.Errorf("waiting for lane %s: %w", l.name, ctx.Err())}
	}
	if l.dead != nil {
		l.leave()
		return l.dead
	}
	return nil
}

func (l *Lane) leave() { l.turn <- struct{}{} }

func (l *Lane) settle(ctx context.Context) ([]Appended, error) {
	b := l.pending
	if b == nil {
		return nil, nil
	}
	if err := l.commit(ctx, b); err != nil {
		return nil, err
	}
	return b.results, nil
}

// batch is the facts of one transaction.
type batch struct {
	entries []entry
	index   []int      // of each entry in results
	results []Appended // of the Append it belongs to; entries of its other batches are not touched
	maybe   bool       // some attempt may have been committed
	node    string     // of the last such attempt

	feed []FeedRow // numbered; empty: to be numbered

	apart bool // the intents are inserted without their TBSCertificates: they have outcomes
}

// number gives the entries their places after the lane's tip.
func (b *batch) number(l *Lane) {
	if b.feed != nil {
		return
	}
	chain := l.chain
	for i := range b.entries {
		row := b.entries[i].feed
		row.Lane, row.Seq = l.name, l.tip+1+uint64(i)
		row.Chain = ChainHash(chain, row)
		chain = row.Chain
		b.feed = append(b.feed, row)
	}
}

// errFeedTaken: some (lane, seq) of the batch exists already.
var errFeedTaken = errors.New("feed rows of these numbers exist")

// factsTaken: these entries' keys are held by other facts.
type factsTaken struct{ entries []int }

func (e *factsTaken) Error() string { return fmt.Sprintf("%d keys are taken", len(e.entries)) }

// insert is the transaction's body. The feed rows come first: they are the lane's own, so that a collision there says that this
// transaction was committed before (or that the lane is lost), and only then is a collision on a fact somebody else's fact.
func (b *batch) insert(ctx context.Context, tx *sql.Tx) error {
	rows := make([][]any, len(b.feed))
	for i, f := range b.feed {
		rows[i] = f.row()
	}
	if err := insertAfter(ctx, tx, rows, b.feed[0].Lane, b.feed[0].Seq-1); number(err) == errDupEntry {
		return errFeedTaken
	} else if err != nil {
		return err
	}
	if err := b.insertIntents(ctx, tx); err != nil {
		return err
	}
	for _, t := range factTables {
		var rows, keys [][]any
		var at []int
		for i, e := range b.entries {
			if e.table == t {
				rows, keys, at = append(rows, e.row(b.feed[i].Lane, b.feed[i].Seq)), append(keys, e.key), append(at, i)
			}
		}
		if len(rows) == 0 {
			continue
		}
		_, err := t.insert(ctx, tx, "INSERT", rows)
		if number(err) == errDupEntry {
			return b.taken(ctx, tx, t, keys, at, err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// insertIntents puts back the intents of recovered outcomes. A taken key is passed over here: without its intent the outcome is refused.
func (b *batch) insertIntents(ctx context.Context, tx *sql.Tx) error {
	var rows [][]any
	var intents []*Intent
	for _, e := range b.entries {
		if e.intent != nil {
			rows, intents = append(rows, e.intent.row(b.apart)), append(intents, e.intent)
		}
	}
	if len(rows) == 0 {
		return nil
	}
	if _, err := intentTable.insert(ctx, tx, "INSERT IGNORE", rows); err != nil {
		return err
	}
	// A key that has been blocked since does not keep out what was released before.
	err := useKeys(ctx, tx, intents, true)
	var blocked *keysBlocked
	if errors.As(err, &blocked) {
		return nil
	}
	return err
}

// taken finds which keys collided. The statement was rolled back, so rows seen now are committed and not ours: had an earlier
// attempt of this batch been committed, its feed rows would have stopped us; and it no longer can be, because it holds the same
// key as the row that we see. So the batch may be numbered anew, without them.
func (b *batch) taken(ctx context.Context, tx *sql.Tx, t *table, keys [][]any, at []int, cause error) error {
	where, args := t.whereKeys(keys)
	var held factsTaken
	dest := make([]sql.RawBytes, t.key)
	scan := make([]any, t.key)
	for i := range dest {
		scan[i] = &dest[i]
	}
	err := query(ctx, tx, func(r *sql.Rows) error {
		if err := r.Scan(scan...); err != nil {
			return err
		}
		for i, k := range keys {
			if sameKey(dest, k) {
				held.entries = append(held.entries, at[i])
			}
		}
		return nil
	}, "SELECT "+strings.Join(t.columns[:t.key], ", ")+" FROM "+t.name+" WHERE "+where, args...)
	if err != nil {
		return err
	}
	if len(held.entries) == 0 {
		// Gone again, or another unique key: nothing to leave out.
		return &Error{Class: Conflict, Op: "append", Err: cause}
	}
	return &held
}

// drop leaves entries out and has the rest numbered anew.
func (b *batch) drop(entries []int, err error) {
	var keep []entry
	var index []int
	for i, e := range b.entries {
		if slices.Contains(entries, i) {
			b.results[b.index[i]].Err = err
		} else {
			keep, index = append(keep, e), append(index, b.index[i])
		}
	}
	b.entries, b.index, b.feed, b.maybe = keep, index, nil, false
}

// commit brings a batch to its end: committed, without the facts whose keys are taken; or certainly not; or, when ctx
// ends too early, pending.
func (l *Lane) commit(ctx context.Context, b *batch) error {
	began := time.Now()
	defer func() { l.s.metrics.seconds.WithLabelValues("append").Observe(time.Since(began).Seconds()) }()
	a := attempts{s: l.s, op: "append", maybe: b.maybe}
	for len(b.entries) > 0 {
		b.number(l)
		err := a.once(ctx, b.insert)
		if ClassOf(err) == Ambiguous {
			b.node = a.address()
		}
		var held *factsTaken
		switch {
		case err == nil:
			l.advance(b, a.address())
			return nil
		case errors.Is(err, errFeedTaken):
			err = l.compare(ctx, b)
			if err == nil {
				l.advance(b, b.node)
				return nil
			}
			if ClassOf(err) == Fatal {
				l.dead = err
				l.setPending(nil)
				return err
			}
		case errors.Is(err, ErrBehind):
			err = &Error{Class: Conflict, Op: "append", Node: a.address(), Err: err}
		case errors.As(err, &held):
			b.drop(held.entries, &Error{Class: Duplicate, Op: "append", Node: a.address(), Err: errors.New("another fact has the same key")})
			a.maybe = false
			continue
		case number(err) == errNoParent && !a.maybe:
			// Either this node has not applied the parent yet, or there is none.
			var orphans []int
			if orphans, err = l.orphans(ctx, b); err == nil && len(orphans) > 0 {
				b.drop(orphans, l.fatal(a.address(), errors.New("what the fact refers to is not in the record")))
				continue
			} else if err == nil {
				err = &Error{Class: Conflict, Op: "append", Node: a.address(), Err: errors.New("the node has not yet applied what the facts refer to")}
			}
		case number(err) == errNoParent:
			err = &Error{Class: Conflict, Op: "append", Node: a.address(), Err: err}
		}
		if err := a.next(ctx, err); err != nil {
			if b.maybe = a.maybe; b.maybe {
				b.results = slices.Clone(b.results) // the caller keeps the other one
				l.setPending(b)
			} else if l.pending == b {
				l.setPending(nil)
			}
			return err
		}
	}
	if l.pending == b {
		l.setPending(nil)
	}
	return nil
}

func (l *Lane) setPending(b *batch) {
	if (l.pending == nil) != (b == nil) {
		if b != nil {
			l.s.metrics.pending.Inc()
		} else {
			l.s.metrics.pending.Dec()
		}
	}
	l.pending = b
}

// advance takes a committed batch into the lane.
func (l *Lane) advance(b *batch, node string) {
	for i, e := range b.entries {
		e.place(l.name, b.feed[i].Seq)
		b.results[b.index[i]] = Appended{Seq: b.feed[i].Seq, Node: node}
	}
	last := b.feed[len(b.feed)-1]
	l.tip, l.chain = last.Seq, last.Chain
	l.committed.Store(last.Seq)
	if l.pending == b {
		l.setPending(nil)
	}
}

// compare returns nil when the feed rows at the batch's numbers are the batch's own: then it was committed, whole. Fatal: they
// are not. Conflict: they are not to be seen.
func (l *Lane) compare(ctx context.Context, b *batch) error {
	first, last := b.feed[0], b.feed[len(b.feed)-1]
	var rows []FeedRow
	_, err := l.s.Read(ctx, "append", "", func(ctx context.Context, c *sql.Conn) error {
		rows = rows[:0]
		return query(ctx, c, func(r *sql.Rows) error {
			row, err := scanFeed(r)
			rows = append(rows, row)
			return err
		}, "SELECT "+feedColumns+" FROM feed WHERE lane = ? AND seq BETWEEN ? AND ? ORDER BY seq", l.name, first.Seq, last.Seq)
	})
	switch {
	case err != nil:
		return err
	case len(rows) == 0:
		return &Error{Class: Conflict, Op: "append", Err: errFeedTaken}
	case len(rows) == len(b.feed) && rows[len(rows)-1].Chain == last.Chain:
		return nil
	case rows[0].Kind == FeedClosed:
		return l.fatal("", fmt.Errorf("at %d: %w: %s", rows[0].Seq, ErrLaneClosed, rows[0].Payload))
	}
	return l.fatal("", fmt.Errorf("from %d on: %w", first.Seq, ErrLaneOwner))
}

// orphans returns the entries whose parent row does not exist, by a causal read.
func (l *Lane) orphans(ctx context.Context, b *batch) ([]int, error) {
	var out []int
	_, err := l.s.Read(ctx, "append", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		for i, e := range b.entries {
			var q string
			args := e.key
			switch e.table {
			case outcomeTable, revocationTable:
				q, args = "SELECT COUNT(*) FROM intent WHERE issuer = ? AND serial = ?", e.key[:2]
			case crlResultTable:
				q = "SELECT COUNT(*) FROM crl WHERE issuer = ? AND shard = ? AND n = ?"
			default:
				continue
			}
			var n int
			if err := c.QueryRowContext(ctx, q, args...).Scan(&n); err != nil {
				return err
			}
			if n == 0 {
				out = append(out, i)
			}
		}
		return nil
	})
	return out, err
}

// CloseLanes ends the lanes of a node's other incarnations, which must not run any more; a commit of theirs that is still in
// flight will fail. It returns how many it closed. by is recorded.
func (s *Store) CloseLanes(ctx context.Context, node string, except [16]byte, by string) (int, error) {
	var open []string // those of other incarnations
	_, err := s.Read(ctx, "close lanes", "", func(ctx context.Context, c *sql.Conn) error {
		open = nil
		// One question for all: a node that was restarted ten thousand times must start as fast as any.
		return query(ctx, c, func(r *sql.Rows) error {
			var lane string
			err := r.Scan(&lane)
			open = append(open, lane)
			return err
		}, `SELECT l.lane FROM lane l JOIN writer w USING (incarnation) WHERE w.node = ? AND w.incarnation <> ? AND
			COALESCE((SELECT f.kind FROM feed f WHERE f.lane = l.lane ORDER BY f.seq DESC LIMIT 1), 0) <> ? ORDER BY l.lane`,
			node, except[:], uint8(FeedClosed))
	})
	if err != nil {
		return 0, err
	}
	closed := 0
	for _, lane := range open {
		did, err := s.closeLane(ctx, lane, by)
		if err != nil {
			return closed, err
		}
		if did {
			closed++
		}
	}
	return closed, nil
}

// closeLane inserts the closing row at tip+1, and again one further whenever that number has just been taken.
func (s *Store) closeLane(ctx context.Context, lane, by string) (bool, error) {
	fact := Fact{closedBy: by}
	e, err := fact.entry(s.cfg.Now())
	if err != nil {
		return false, err
	}
	for {
		var tip *FeedRow
		if _, err := s.Read(ctx, "close lanes", "", func(ctx context.Context, c *sql.Conn) (err error) {
			tip, err = laneTip(ctx, c, lane)
			return err
		}); err != nil {
			return false, err
		}
		if tip == nil {
			tip = &FeedRow{}
		} else if tip.Kind == FeedClosed {
			return false, nil
		}
		row := e.feed
		row.Lane, row.Seq = lane, tip.Seq+1
		row.Chain = ChainHash(tip.Chain, row)
		err := s.insertOne(ctx, feedTable, row.row())
		if ClassOf(err) != Duplicate {
			return err == nil, err
		}
	}
}
