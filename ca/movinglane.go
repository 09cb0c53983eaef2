package ca

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"trivet/db"
)

// movingLane is a lane that a recovery round ends and replaces: whatever is still on its way in the old one is lost, whole.
type movingLane struct {
	r     *Rounds
	index int      // of its kind: certificates, status
	first *db.Lane // that the process began with

	mu    sync.Mutex
	cur   *db.Lane  // nil while it is being replaced
	round uint64    // in which cur was opened
	ended time.Time // when cur was first found closed by another node
	ctx   context.Context
	stop  context.CancelFunc // ends what is on its way in cur
}

var errMoved = errors.New("a recovery round has ended the lane")

// lane returns the lane that takes the place of l, now and after every round. Rounds may be nil.
func (r *Rounds) lane(l *db.Lane) lane {
	if r == nil {
		return l
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.lanes {
		if m.first == l {
			return m
		}
	}
	m := &movingLane{r: r, index: len(r.lanes), first: l, cur: l}
	m.ctx, m.stop = context.WithCancel(context.Background())
	r.lanes = append(r.lanes, m)
	return m
}

func (r *Rounds) moving() []*movingLane {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]*movingLane(nil), r.lanes...)
}

// Lanes returns the lanes in use, for closing them at the end.
func (r *Rounds) Lanes() []*db.Lane {
	var out []*db.Lane
	for _, m := range r.moving() {
		if l := m.current(); l != nil {
			out = append(out, l)
		}
	}
	return out
}

// Append appends to the present lane, in the contract of *db.Lane. When a round replaces it meanwhile, the error says that nothing is certain.
func (m *movingLane) Append(ctx context.Context, facts []db.Fact) ([]db.Appended, error) {
	m.mu.Lock()
	cur, running := m.cur, m.ctx
	m.mu.Unlock()
	if cur == nil {
		return make([]db.Appended, len(facts)), &db.Error{Class: db.NotReady, Op: "append", Err: errMoved}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(running, cancel)()
	out, err := cur.Append(ctx, facts)
	if err != nil && errors.Is(err, db.ErrLaneClosed) && m.closed() {
		return out, &db.Error{Class: db.NotReady, Op: "append", Err: errMoved}
	}
	if err != nil && running.Err() != nil {
		// Also what the old lane calls fatal is over with it.
		err = &db.Error{Class: db.Ambiguous, Op: "append", Err: fmt.Errorf("%w: %v", errMoved, err)}
	}
	return out, err
}

// closed is told that another node has ended the lane: a round has begun of which this node has not heard yet. Unless one follows soon, this
// incarnation can record nothing more.
func (m *movingLane) closed() bool {
	m.r.hurry()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended.IsZero() {
		m.ended = time.Now()
	}
	return time.Since(m.ended) < closedFor
}

// closedFor is how long a lane may be found closed before its process gives up.
const closedFor = 30 * time.Second

// current returns the lane in use, nil while it is being replaced.
func (m *movingLane) current() *db.Lane {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cur
}

// retire takes the lane out of use.
func (m *movingLane) retire() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cur = nil
	m.stop()
}

// set puts a lane opened in a round to use.
func (m *movingLane) set(l *db.Lane, round uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cur, m.round, m.ended = l, round, time.Time{}
	m.ctx, m.stop = context.WithCancel(context.Background())
}

// in returns the round that the lane in use was opened in; false if there is none in use.
func (m *movingLane) in() (uint64, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.round, m.cur != nil
}
