package lb

import (
	"testing"
	"time"
)

// A node that failed weighs more for a while and then no more than any other: at low load, where the lighter one always wins, it would get no work again.
func TestErrorIsForgottenInTheEnd(t *testing.T) {
	now := time.Now()
	var failed, other node
	failed.penalise(now)
	if failed.score(now) <= other.score(now) {
		t.Error("a node that has just failed weighs no more than another")
	}
	for range penaltyMax * 2 { // however often it failed
		failed.penalise(now)
	}
	later := now.Add(8 * penaltyHalf)
	if got, want := failed.score(later), other.score(later); got != want {
		t.Errorf("%v later it weighs %v, another %v", later.Sub(now), got, want)
	}
}
