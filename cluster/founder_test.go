package cluster

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A database node that is to join is not started before the one that founds it.
func TestANodeThatJoinsWaitsForTheFounder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &database{seed: "db2", up: map[string]bool{}}
		ctx, cancel := context.WithTimeout(t.Context(), founderPatience/2)
		defer cancel()
		if _, err := d.command(ctx, Part{Name: "db1"}); !errors.Is(err, context.DeadlineExceeded) || d.up["db1"] {
			t.Errorf("started, or failed with %v", err)
		}
		began := time.Now()
		if _, err := d.command(t.Context(), Part{Name: "db1"}); err == nil || time.Since(began) < founderPatience {
			t.Errorf("gave up after %s with %v", time.Since(began), err)
		}
	})
}
