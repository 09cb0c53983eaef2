package hsmsync_test

import (
	"context"
	"fmt"
	"log/slog"
	"syscall"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// benchWorks is a group of two members with n keys.
func benchWorks(b *testing.B, n int, names ...string) *works {
	b.Helper()
	w := newWorks(b, names...)
	w.config.Log = slog.New(slog.DiscardHandler)
	w.c = w.coordinator()
	w.setup(hsmsync.Policy{}, "a", "b")
	began := time.Now()
	for i := range n {
		w.key(fmt.Sprint("key-", i), hsm.P256)
	}
	b.Logf("%d keys made in %v", n, time.Since(began))
	return w
}

// BenchmarkEnroll enrolls a member into a group that has keys, beside the bare export and import of those keys one by one.
func BenchmarkEnroll(b *testing.B) {
	for _, n := range []int{100, 1000} {
		b.Run(fmt.Sprint(n, " keys"), func(b *testing.B) {
			for range b.N {
				w := benchWorks(b, n, "a", "b", "c", "d")
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
				from, to := w.at["a"].Client(identity.RoleSync), w.at["c"].Client(identity.RoleSync)
				transport, err := to.TransportKey(ctx)
				good(b, err)
				wrapped, kek, err := from.ExportDomain(ctx, hsm.DomainRequest{Group: "ca", Recipient: transport, Grant: w.request("c").Grant})
				good(b, err)
				good(b, to.ImportDomain(ctx, kek, wrapped))
				began := time.Now()
				for _, k := range w.state().Keys() {
					blob, err := from.Export(ctx, k.ID, kek)
					good(b, err)
					_, err = to.Import(ctx, blob)
					good(b, err)
				}
				raw := time.Since(began)
				r := w.request("d")
				began = time.Now()
				good(b, w.c.Enroll(ctx, r))
				took := time.Since(began)
				b.ReportMetric(raw.Seconds(), "raw-s")
				b.ReportMetric(took.Seconds(), "enroll-s")
				b.ReportMetric(took.Seconds()/raw.Seconds(), "ratio")
				w.verify(3, n)
				cancel()
			}
		})
	}
}

func own() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// remembered is a member that has worked out its digest before, as agents do.
type remembered struct {
	*answering
	info hsm.Info
}

func (r remembered) Health(context.Context) (hsm.Info, error) { return r.info, nil }

// BenchmarkReconcile is one pass while nothing changes. At the default interval 1 % of a core is 300 ms a pass.
func BenchmarkReconcile(b *testing.B) {
	b.Run("coordinator with 1000 keys", func(b *testing.B) {
		d := &desk{at: map[string]*token{}, now: time.Now, chain: &memory{}}
		known := map[string]remembered{}
		cfg := hsmsync.CoordinatorConfig{Group: "ca", Identity: named(b, identity.RoleSync, "sync1"), Chain: d.chain, Log: slog.New(slog.DiscardHandler)}
		cfg.Connect = func(name, _ string) hsmsync.Agent {
			if r, ok := known[name]; ok {
				return r
			}
			return &answering{d: d, name: name}
		}
		for _, name := range []string{"a", "b", "c"} {
			d.at[name] = tokenOf(b, name, time.Now)
		}
		c, err := hsmsync.NewCoordinator(cfg)
		good(b, err)
		ctx := context.Background()
		good(b, c.Setup(ctx, crew("a", "b", "c"), hsmsync.Policy{}))
		for i := range 1000 {
			_, err := c.CreateKey(ctx, hsm.KeySpec{Label: fmt.Sprint("key-", i), Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
			good(b, err)
		}
		for name, k := range d.at {
			info, err := k.Health(ctx)
			good(b, err)
			known[name] = remembered{&answering{d: d, name: name}, info}
		}
		if c, err = hsmsync.NewCoordinator(cfg); err != nil {
			b.Fatal(err)
		}
		if r, err := c.Reconcile(ctx); err != nil || !r.OK {
			b.Fatalf("%+v %v", r.Findings, err)
		}
		used := own()
		b.ResetTimer()
		for range b.N {
			if r, err := c.Reconcile(ctx); err != nil || !r.OK || r.Members[0].Inspected || r.Fewest != 3 {
				b.Fatalf("%+v %v", r.Findings, err)
			}
		}
		b.ReportMetric(float64((own()-used).Microseconds())/1000/float64(b.N), "cpu-ms/pass")
	})
	b.Run("real members", func(b *testing.B) {
		w := benchWorks(b, 50, "a", "b", "c")
		good(b, w.c.Enroll(w.soon(), w.request("c")))
		all := &site{t: b}
		for _, m := range w.at {
			all.members = append(all.members, m)
		}
		if r, err := w.c.Reconcile(w.soon()); err != nil || !r.OK {
			b.Fatalf("%+v %v", r.Findings, err)
		}
		ctx, mine, both := context.Background(), own(), all.cpu()
		b.ResetTimer()
		for range b.N {
			if r, err := w.c.Reconcile(ctx); err != nil || !r.OK || r.Members[0].Inspected {
				b.Fatalf("%+v %v", r.Findings, err)
			}
		}
		b.StopTimer()
		mine, both = own()-mine, all.cpu()-both
		b.ReportMetric(float64(mine.Microseconds())/1000/float64(b.N), "cpu-ms/pass")
		b.ReportMetric(float64((both-mine).Microseconds())/1000/float64(b.N), "members-cpu-ms/pass")
	})
}
