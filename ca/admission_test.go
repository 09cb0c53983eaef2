package ca

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestCallersTakeTurnsWhateverEachHasSent lets one caller send a hundred requests before another sends its only one.
func TestCallersTakeTurnsWhateverEachHasSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission(1, 1000, 500)
		held, err := a.enter(t.Context(), "greedy")
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var order []string
		var wg sync.WaitGroup
		send := func(caller string) {
			wg.Go(func() {
				leave, err := a.enter(t.Context(), caller)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, caller)
				mu.Unlock()
				leave()
			})
			synctest.Wait()
		}
		for range 100 {
			send("greedy")
		}
		send("modest")
		held()
		wg.Wait()
		if order[0] != "greedy" || order[1] != "modest" || len(order) != 101 {
			t.Errorf("%d served; the first three: %v", len(order), order[:3])
		}
		if working, waiting := a.depth(); working != 0 || waiting != 0 {
			t.Errorf("at the end %d work and %d wait", working, waiting)
		}
	})
}

func TestRequestsBeyondTheBoundsAreRefusedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission(2, 3, 2)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		enter := func(caller string) {
			wg.Go(func() {
				if leave, err := a.enter(ctx, caller); err == nil {
					<-ctx.Done()
					leave()
				}
			})
			synctest.Wait()
		}
		for range 4 {
			enter("a") // two work, two wait
		}
		if _, err := a.enter(ctx, "a"); !errors.Is(err, errCallerBusy) {
			t.Errorf("the caller's third waiting request: %v", err)
		}
		enter("b")
		if _, err := a.enter(ctx, "c"); !errors.Is(err, errNodeBusy) {
			t.Errorf("the fourth waiting request of all: %v", err)
		}
		cancel()
		wg.Wait()
		if working, waiting := a.depth(); working != 0 || waiting != 0 || len(a.queues) != 0 || len(a.turns) != 0 {
			t.Errorf("left behind: %d, %d, %v, %v", working, waiting, a.queues, a.turns)
		}
	})
}

// TestNoPlaceIsLostToRequestsThatGiveUp has callers give up at every moment, also when their turn comes just then.
func TestNoPlaceIsLostToRequestsThatGiveUp(t *testing.T) {
	const places = 3
	a := newAdmission(places, 1000, 100)
	var wg sync.WaitGroup
	for i := range 2000 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i%7)*100*time.Microsecond)
			defer cancel()
			if leave, err := a.enter(ctx, fmt.Sprint(i%5)); err == nil {
				if working, _ := a.depth(); working > places {
					t.Errorf("%d work", working)
				}
				leave()
				leave() // a second time does nothing
			}
		})
	}
	wg.Wait()
	if working, waiting := a.depth(); working != 0 || waiting != 0 || len(a.queues) != 0 || len(a.turns) != 0 {
		t.Errorf("left behind: %d work, %d wait, %d queues, %d turns", working, waiting, len(a.queues), len(a.turns))
	}
}
