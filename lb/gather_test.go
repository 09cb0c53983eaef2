package lb

import (
	"testing"
	"time"
)

// What is cheaper in company goes where most is under way, until that node has enough, or something is held against it.
func TestIssuingGathersOnOneNodeUntilItHasEnough(t *testing.T) {
	now := time.Now()
	idle, some, more := &node{}, &node{}, &node{}
	nodes := []*node{idle, some, more}
	if n := fullest(nodes, now); n != nil {
		t.Error("with nothing under way one node was preferred: the others would never get work")
	}
	some.inflight.Store(3)
	more.inflight.Store(gatherUpTo - 1)
	want := func(n *node, when string) {
		t.Helper()
		if fullest(nodes, now) != n {
			t.Errorf("%s another node was chosen", when)
		}
	}
	want(more, "with room left")
	more.inflight.Add(1)
	want(some, "with the fullest node at its limit")
	more.inflight.Add(-1)
	more.late()
	want(some, "with a request to the fullest node overdue")
	more.replied(now)
	want(more, "after it has answered")
	more.penalise(now)
	want(some, "after an error of the fullest node")
	now = now.Add(8 * penaltyHalf)
	want(more, "after the error is forgotten")
}
