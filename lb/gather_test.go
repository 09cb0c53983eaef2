package lb

import (
	"testing"
	"time"
)

// What is cheaper in company goes where most is gathered, until that node has enough, or something is held against it.
func TestIssuingGathersOnOneNodeUntilItHasEnough(t *testing.T) {
	now := time.Now()
	idle, some, more := &node{}, &node{}, &node{}
	nodes := []*node{idle, some, more}
	idle.inflight.Store(5) // that are no reason for company
	if n := fullest(nodes, now); n != nil {
		t.Error("with nothing gathered one node was preferred: the others would never get work")
	}
	some.gathered.Store(3)
	more.gathered.Store(gatherUpTo - 1)
	want := func(n *node, when string) {
		t.Helper()
		if fullest(nodes, now) != n {
			t.Errorf("%s another node was chosen", when)
		}
	}
	want(more, "with room left")
	more.gathered.Add(1)
	want(some, "with the fullest node at its limit")
	more.gathered.Add(-1)

	stuck := &attempt{node: more}
	stuck.delay()
	more.replied(now) // to another request: that says nothing about this one
	want(some, "with a request to the fullest node overdue")
	stuck.end()
	want(more, "after it has ended")
	answered := &attempt{node: more}
	answered.end()
	answered.delay()
	want(more, "with a request that was answered just before it was overdue")

	more.penalise(now)
	want(some, "after an error of the fullest node")
	now = now.Add(8 * penaltyHalf)
	want(more, "after the error is forgotten")

	for range 100 {
		more.took(gatherPace + time.Millisecond)
	}
	want(more, "with nothing to compare its pace with")
	for range 100 {
		some.took(gatherPace / 2)
	}
	want(some, "with the fullest node more than twice as slow as another")
	for range 100 {
		more.took(gatherPace - time.Millisecond)
	}
	want(more, "with the fullest node not slow by itself")
}
