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

// BenchmarkReconcile is one pass over 1,000 keys on three members while nothing changes: processor time of the coordinator
// and of all members. At the default interval 1 % of a core is 300 ms a pass.
func BenchmarkReconcile(b *testing.B) {
	w := benchWorks(b, 1000, "a", "b", "c")
	good(b, w.c.Enroll(w.soon(), w.request("c")))
	ctx := context.Background()
	for range 2 {
		if r, err := w.c.Reconcile(ctx); err != nil || !r.OK {
			b.Fatalf("%+v %v", r.Findings, err)
		}
	}
	all := &site{t: b}
	for _, m := range w.at {
		all.members = append(all.members, m)
	}
	members := func() time.Duration { return all.cpu() - own() }
	const passes = 500
	coordinator, them, began := own(), members(), time.Now()
	for range passes {
		if r, err := w.c.Reconcile(ctx); err != nil || !r.OK || r.Members[0].Inspected {
			b.Fatalf("%+v %v", r.Findings, err)
		}
	}
	b.ReportMetric(float64((own()-coordinator).Microseconds())/1000/passes, "cpu-ms/pass")
	b.ReportMetric(float64((members()-them).Microseconds())/1000/passes, "member-cpu-ms/pass")
	b.ReportMetric(float64(time.Since(began).Microseconds())/1000/passes, "ms/pass")
	listed := w.coordinator() // one that knows nothing lists every key
	coordinator, them, began = own(), members(), time.Now()
	if r, err := listed.Reconcile(ctx); err != nil || !r.OK || !r.Members[0].Inspected {
		b.Fatalf("%+v %v", r.Findings, err)
	}
	b.ReportMetric(float64((own()-coordinator).Microseconds())/1000, "listing-cpu-ms")
	b.ReportMetric(float64((members()-them).Microseconds())/1000, "listing-member-cpu-ms")
	b.ReportMetric(float64(time.Since(began).Microseconds())/1000, "listing-ms")
}
