package agent

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"trivet/hsm"
)

// Calls that follow each other in one place of the module have the limit each for itself: many slow ones are no hang, and one that hangs is,
// whichever it is.
func TestEachCallHasTheLimitForItself(t *testing.T) {
	const limit = 8 * time.Second
	for name, c := range map[string]struct {
		take []time.Duration
		dies time.Duration // 0: does not
	}{
		"slow":         {take: []time.Duration{6500 * time.Millisecond, 6500 * time.Millisecond, 6500 * time.Millisecond, 6500 * time.Millisecond}},
		"first hangs":  {take: []time.Duration{time.Hour, time.Second}, dies: limit},
		"second hangs": {take: []time.Duration{6500 * time.Millisecond, time.Hour}, dies: 6500*time.Millisecond + limit},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				var died atomic.Int64
				w := &watchdog{slots: make(chan struct{}, 1), dead: make(chan struct{}), metrics: newMetrics(),
					fatal: func(error) { died.Store(int64(time.Since(began))) }}
				made, err := calls(context.Background(), w, "sign", limit, func(next func()) (int, error) {
					for i, d := range c.take {
						if i > 0 {
							next()
						}
						time.Sleep(d)
					}
					return len(c.take), nil
				})
				answered := time.Since(began)
				if c.dies == 0 && (err != nil || made != len(c.take)) || c.dies != 0 && (hsm.ClassOf(err) != hsm.ClassDevice || answered != c.dies) {
					t.Errorf("made %d, %v, after %v", made, err, answered)
				}
				time.Sleep(2 * time.Hour) // whoever is in the module comes out
				if after := time.Duration(died.Load()); after != c.dies {
					t.Errorf("given up after %v, want %v", after, c.dies)
				}
				if len(w.slots) != 0 {
					t.Error("the place in the module is still taken")
				}
			})
		})
	}
}
