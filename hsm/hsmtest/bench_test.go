package hsmtest_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// BenchmarkSign is the rate of one agent through mTLS, for batches of 1 and 64 digests and 1 and 8 callers.
func BenchmarkSign(b *testing.B) {
	m := hsmtest.NewLab(b).Start("hsmd-a")
	ctx, cancel := context.WithTimeout(b.Context(), 10*time.Minute)
	defer cancel()
	k, err := m.Client(identity.RoleSync).Generate(ctx, hsmtest.Spec("bench", hsm.PurposeCA))
	if err != nil {
		b.Fatal(err)
	}
	c := m.Client(identity.RoleCA)
	for _, batch := range []int{1, 64} {
		for _, callers := range []int{1, 8} {
			b.Run(fmt.Sprintf("digests=%d/callers=%d", batch, callers), func(b *testing.B) {
				digests := hsmtest.Digests(batch)
				var left atomic.Int64
				left.Store(int64(b.N))
				var wg sync.WaitGroup
				for range callers {
					wg.Go(func() {
						for left.Add(-1) >= 0 {
							if _, err := c.Sign(ctx, hsm.SignRequest{Key: k.ID, Digests: digests}); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "signatures/s")
			})
		}
	}
}
