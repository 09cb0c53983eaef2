package hsmsync_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// BenchmarkOverhead is the rate of one member through its client, each signature verified, beside that of a group of one.
func BenchmarkOverhead(b *testing.B) {
	s := newSite(b, 1)
	s.config.Log = slog.New(slog.DiscardHandler)
	s.open("active")
	c := s.members[0].Client(identity.RoleCA)
	direct := func(ctx context.Context, ds [][]byte) ([][]byte, error) {
		sigs, err := c.Sign(ctx, hsm.SignRequest{Key: s.record.ID, Digests: ds})
		for i := range sigs {
			if err == nil {
				err = hsm.Verify(s.key.Public(), ds[i], sigs[i])
			}
		}
		return sigs, err
	}
	for _, batch := range []int{1, 8, 16, 64} {
		for _, callers := range []int{1, 8, 32} {
			b.Run(fmt.Sprintf("digests=%d/callers=%d", batch, callers), func(b *testing.B) {
				// In turn, round by round, since whatever else the machine does must not be counted against one of them.
				var took, cpu [2]time.Duration
				var ratios []float64
				round, n := 4*callers, 0
				for ; n < b.N; n += round {
					var t [2]time.Duration
					ways := []func(context.Context, [][]byte) ([][]byte, error){direct, s.key.SignBatch}
					for i := range ways {
						i = (i + n/round) % len(ways)
						theirs, began, ours := s.cpu(), time.Now(), own()
						signAll(b, round, batch, callers, ways[i])
						cpu[i] += own() - ours // first, since reading costs, too
						t[i] = time.Since(began)
						took[i] += t[i]
						cpu[i] += s.cpu() - theirs
					}
					ratios = append(ratios, t[1].Seconds()/t[0].Seconds())
				}
				slices.Sort(ratios)
				b.ReportMetric(float64(n*batch)/took[0].Seconds(), "direct/s")
				b.ReportMetric(float64(n*batch)/took[1].Seconds(), "group/s")
				b.ReportMetric(float64(cpu[0])/float64(n*batch), "direct-cpu-ns") // of a signature
				b.ReportMetric(100*(ratios[len(ratios)/2]-1), "%overhead")        // the median: others use the machine, too
				b.ReportMetric(100*(cpu[1].Seconds()/cpu[0].Seconds()-1), "%more-cpu")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// cpu is the processor time that the members have used.
func (s *site) cpu() time.Duration {
	s.t.Helper()
	var total time.Duration
	for _, m := range s.members {
		lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		of := slices.IndexFunc(lines, func(line string) bool {
			b, _ := os.ReadFile(line)
			return strings.Contains(string(b), m.Config)
		})
		if of < 0 {
			s.t.Fatalf("%s does not run", m.Name)
		}
		stats, _ := filepath.Glob(filepath.Dir(lines[of]) + "/task/*/schedstat")
		for _, stat := range stats {
			b, _ := os.ReadFile(stat) // a thread that is gone has used what it used
			field, _, _ := strings.Cut(string(b), " ")
			ns, _ := strconv.ParseInt(field, 10, 64)
			total += time.Duration(ns)
		}
	}
	return total
}

// BenchmarkScaling is the rate of one and of three members that each make 200 signatures a second.
func BenchmarkScaling(b *testing.B) {
	s := newSite(b, 3)
	s.config.Log = slog.New(slog.DiscardHandler)
	s.open("active active active")
	for _, f := range s.faults {
		f.Rate(200)
	}
	for _, active := range []string{"active drained drained", "active active active"} {
		for i, m := range s.members {
			event := "active"
			if i > 0 && active != "active active active" {
				event = "drain"
			}
			s.chain.enter(b, event, m.Name, hsmsync.Note{})
		}
		s.wait(active)
		for _, w := range []struct{ batch, callers int }{{64, 1}, {64, 4}, {1, 48}} {
			b.Run(fmt.Sprintf("members=%s/digests=%d/callers=%d", active, w.batch, w.callers), func(b *testing.B) {
				rate(b, w.batch, w.callers, s.key.SignBatch)
			})
		}
	}
}

// rate signs b.N batches.
func rate(b *testing.B, batch, callers int, sign func(context.Context, [][]byte) ([][]byte, error)) {
	b.ResetTimer()
	signAll(b, b.N, batch, callers, sign)
	b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "signatures/s")
}

func signAll(b *testing.B, n, batch, callers int, sign func(context.Context, [][]byte) ([][]byte, error)) {
	ds := digests(batch)
	ctx, cancel := context.WithTimeout(b.Context(), 10*time.Minute)
	defer cancel()
	var left atomic.Int64
	left.Store(int64(n))
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := sign(ctx, ds); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
}
