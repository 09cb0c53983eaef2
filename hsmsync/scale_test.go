package hsmsync_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// onDisk is a group's log in a file, for coordinators in several processes.
type onDisk struct{ path string }

func (l onDisk) file(group string) string { return l.path + "-" + filepath.Base(group) }

func (l onDisk) Log(ctx context.Context, group string, from uint64) ([]hsmsync.Entry, error) {
	b, err := os.ReadFile(l.file(group))
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	var out []hsmsync.Entry
	n := uint64(0)
	for line := range bytes.Lines(b) {
		if n++; n < from {
			continue
		}
		var e hsmsync.Entry
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, ctx.Err()
}

func (l onDisk) Append(_ context.Context, group string, entries ...hsmsync.Entry) error {
	f, err := os.OpenFile(l.file(group), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	there, err := os.ReadFile(f.Name())
	if err != nil {
		return err
	}
	if uint64(bytes.Count(there, []byte("\n")))+1 != entries[0].N {
		return hsmsync.ErrTaken
	}
	var out bytes.Buffer
	for _, e := range entries {
		if err := json.NewEncoder(&out).Encode(e); err != nil {
			return err
		}
	}
	_, err = f.Write(out.Bytes())
	return err
}

// oneByOne is onDisk as a Chain.
type oneByOne struct{ onDisk }

func (l oneByOne) Append(ctx context.Context, group string, e hsmsync.Entry) error {
	return l.onDisk.Append(ctx, group, e)
}

// populate makes n keys on member a, enters them as live, and returns how long making took. Other members get them by
// reconciliation.
func (w *works) populate(log onDisk, n int) time.Duration {
	w.t.Helper()
	began := time.Now()
	client := w.at["a"].Client(identity.RoleSync)
	records := make([]hsm.KeyRecord, n)
	making, ctx := errgroup.WithContext(context.Background())
	making.SetLimit(4)
	for i := range n {
		making.Go(func() (err error) {
			call, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			records[i], err = client.Generate(call, hsm.KeySpec{ID: hsm.NewKeyID(), Label: fmt.Sprint("key-", i), Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
			return err
		})
	}
	good(w.t, making.Wait())
	took := time.Since(began)
	at := w.state().Next
	var entries []hsmsync.Entry
	for _, k := range records {
		live, err := json.Marshal(k)
		good(w.t, err)
		for _, event := range []string{"pending", "live"} {
			entries = append(entries, hsmsync.Entry{N: at, Event: event, Subject: string(k.ID), Payload: live, Actor: "test", Created: time.Now().UTC()})
			at++
		}
	}
	good(w.t, log.Append(ctx, "ca", entries...))
	return took
}

// newScale is a group of members a and b that both hold n keys.
func newScale(t testing.TB, n int, names ...string) *works {
	t.Helper()
	w := newWorks(t, names...)
	log := onDisk{filepath.Join(t.TempDir(), "log")}
	w.config.Chain, w.config.Log = oneByOne{log}, slog.New(slog.DiscardHandler)
	w.c = w.coordinator()
	w.setup(hsmsync.Policy{}, "a", "b")
	t.Logf("%d keys made on one member in %v", n, w.populate(log, n).Round(time.Millisecond))
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	began := time.Now()
	for pass, brought := 1, 0; brought < n; pass++ { // a call that took too long on a busy machine is made up for by the next pass
		r, err := w.c.Reconcile(ctx)
		good(t, err)
		brought += r.Copied
		for _, f := range r.Findings {
			if f.Alarm {
				t.Logf("pass %d: %s", pass, f.Detail)
			}
		}
		if pass == 5 && brought < n {
			t.Fatalf("%d of %d keys came over", brought, n)
		}
	}
	t.Logf("reconciliation brought them to another in %v", time.Since(began).Round(time.Millisecond))
	return w
}

// enrolment is what a coordinator's process is told.
type enrolment struct {
	Files   identity.Files
	Log     string
	Request hsmsync.EnrollRequest
}

// TestCoordinatorProcess is no test: it is a process that enrolls, for another test to kill.
func TestCoordinatorProcess(t *testing.T) {
	told := os.Getenv("TRIVET_TEST_ENROL")
	if told == "" {
		t.Skip("another test starts this")
	}
	var e enrolment
	good(t, json.Unmarshal([]byte(told), &e))
	id, err := identity.Load(e.Files)
	good(t, err)
	c, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: "ca", Identity: id, Chain: oneByOne{onDisk{e.Log}}, Log: slog.New(slog.DiscardHandler),
		Progress: func(p hsmsync.Progress) { fmt.Printf("progress %s %s %d %d\n", p.Step, p.Member, p.Done, p.Total) },
	})
	good(t, err)
	good(t, c.Enroll(t.Context(), e.Request))
}

// TestThousandsOfKeysAreEnrolledThroughInterruptions takes minutes, so it runs when asked to:
//
//	TRIVET_MANY_KEYS=3300 go test -v -timeout 60m -run Thousands ./hsmsync
func TestThousandsOfKeysAreEnrolledThroughInterruptions(t *testing.T) {
	n, _ := strconv.Atoi(os.Getenv("TRIVET_MANY_KEYS"))
	if n == 0 {
		t.Skip("set TRIVET_MANY_KEYS, to 3300 for what a CloudHSM cluster holds; it takes minutes then")
	}
	sample := min(n, 200)
	w := newScale(t, n, "a", "b", "c", "d", "e")
	var began time.Time
	var carrier time.Duration // processor time of the coordinators
	told, err := json.Marshal(enrolment{w.lab.Files(identity.RoleSync, "sync2"), w.config.Chain.(oneByOne).path, w.request("c")})
	good(t, err)
	before := w.raw("d", sample)
	// run enrolls in a process of its own, and calls at once that many keys have come over in this run.
	run := func(keys int, at func(*exec.Cmd)) (copied, left int, err error) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestCoordinatorProcess$", "-test.timeout=30m")
		cmd.Env = append(os.Environ(), "TRIVET_TEST_ENROL="+string(told), "TMPDIR="+t.TempDir()) // killed, it cannot clean up
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		good(t, err)
		good(t, cmd.Start())
		left = -1
		last := ""
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var step, member string
			var done, total int
			if k, _ := fmt.Sscanf(lines.Text(), "progress %s %s %d %d", &step, &member, &done, &total); k != 4 || step != "copy" {
				last = lines.Text()
				continue
			}
			if left < 0 {
				left = total
			}
			if copied = done; done > 0 && done%max(1, n/10) == 0 {
				t.Logf("%v: %d of %d keys copied", time.Since(began).Round(time.Second), done, total)
			}
			if at != nil && done >= keys {
				at(cmd)
				at = nil
			}
		}
		err = cmd.Wait()
		carrier += cmd.ProcessState.SystemTime() + cmd.ProcessState.UserTime()
		if err != nil {
			err = fmt.Errorf("%w: %.300s", err, last)
		}
		return copied, left, err
	}
	began = time.Now()
	first, left, err := run(n/4, func(cmd *exec.Cmd) { good(t, cmd.Process.Kill()) })
	if err == nil || left != n {
		t.Fatalf("a coordinator was killed: %d of %d keys, %v", first, left, err)
	}
	t.Logf("coordinator killed after %d of %d keys, %v", first, left, time.Since(began).Round(time.Millisecond))
	again := time.Now()
	second, left, err := run(n/4, func(*exec.Cmd) { w.at["c"].Kill() })
	if err == nil || left > n-first {
		t.Fatalf("the new member was killed: %d of %d keys, %v", second, left, err)
	}
	t.Logf("enrolment repeated: %d keys were left; the new member's agent killed after %d more, %v", left, second, time.Since(again).Round(time.Millisecond))
	w.at["c"].Start()
	w.at["c"].WaitReady()
	again = time.Now()
	third, left, err := run(0, nil)
	if err != nil || left > n-first-second || third != left {
		t.Fatalf("%d of %d keys, %v", third, left, err)
	}
	took := time.Since(began)
	t.Logf("enrolment repeated: %d keys were left, all came and were proved in %v; %v in all", left, time.Since(again).Round(time.Millisecond), took.Round(time.Millisecond))
	per := func(d time.Duration) time.Duration { return (d / time.Duration(n)).Round(time.Millisecond / 10) }
	t.Logf("%v a key, and %v of processor time for the coordinators; exported and imported one by one %d keys took %v each before and %v after", per(took), per(carrier), sample, before, w.raw("e", sample))
	again = time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	r, err := w.c.Verify(ctx)
	if err != nil || !r.OK || r.Fewest != 3 || len(r.Keys) != n {
		t.Fatalf("ok %v, %d copies of %d keys, %.1000q: %v", r.OK, r.Fewest, len(r.Keys), fmt.Sprint(r.Findings), err)
	}
	t.Logf("verified, every copy of every key, in %v", time.Since(again).Round(time.Millisecond))
}

// raw brings so many keys to a member of no group, one by one and without anything else, and returns what each took.
func (w *works) raw(name string, n int) time.Duration {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	from, to := w.at["a"].Client(identity.RoleSync), w.at[name].Client(identity.RoleSync)
	transport, err := to.TransportKey(ctx)
	good(w.t, err)
	wrapped, kek, err := from.ExportDomain(ctx, hsm.DomainRequest{Group: "ca", Recipient: transport, Grant: w.request(name).Grant})
	good(w.t, err)
	good(w.t, to.ImportDomain(ctx, kek, wrapped))
	began := time.Now()
	for _, k := range w.state().Keys()[:n] {
		blob, err := from.Export(ctx, k.ID, kek)
		good(w.t, err)
		_, err = to.Import(ctx, blob)
		good(w.t, err)
	}
	return (time.Since(began) / time.Duration(n)).Round(time.Millisecond / 10)
}

// BenchmarkReconcileMany is what reconciliation costs a group of three real members with many keys, in percent of one core at the
// default interval: the processor time of the coordinator and of all agents over a few minutes in which nothing changes, whatever
// they do meanwhile (agents count their keys once a minute, and test themselves), and every ten minutes a listing of each
// member's keys.
func BenchmarkReconcileMany(b *testing.B) {
	n, _ := strconv.Atoi(os.Getenv("TRIVET_MANY_KEYS"))
	if n == 0 {
		n = 1000
	}
	w := newScale(b, n, "a", "b", "c")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	r := w.request("c")
	for try := 1; ; try++ { // on a busy machine a call takes too long: the enrolment goes on when it is repeated
		if err := w.c.Enroll(ctx, r); err == nil {
			break
		} else if try == 10 {
			b.Fatal(err)
		}
	}
	all := &site{t: b}
	for _, m := range w.at {
		all.members = append(all.members, m)
	}
	used := func(do func()) time.Duration {
		before := all.cpu()
		do()
		return all.cpu() - before
	}
	pass := func(inspected bool) {
		if r, err := w.c.Reconcile(ctx); err != nil || !r.OK || r.Members[0].Inspected != inspected {
			b.Fatalf("%+v %v", r.Findings, err)
		}
	}
	w.c = w.coordinator() // one that has listed nothing yet
	listing := used(func() { pass(true) })
	const passes = 20 // in one go: run it with -benchtime 1x, since setting up takes long
	comparing := used(func() {
		for range passes {
			pass(false)
		}
	}) / passes
	const window = 4 * 30 * time.Second
	b.ResetTimer()
	kept := used(func() {
		while, stop := context.WithTimeout(ctx, window)
		defer stop()
		good(b, w.c.RunReconcile(while, 0))
	})
	b.StopTimer()
	b.ReportMetric(float64(comparing.Microseconds())/1000, "pass-cpu-ms")
	b.ReportMetric(float64(listing.Microseconds())/1000, "listing-cpu-ms")
	b.ReportMetric(100*kept.Seconds()/window.Seconds(), "%kept")
	b.ReportMetric(100*(kept.Seconds()/window.Seconds()+listing.Seconds()/600), "%core")
}
