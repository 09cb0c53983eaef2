package hsmsync_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/db/dbtest"
	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
	"trivet/ops/galera"
)

// database is a real database node, and the group logs in it.
func database(t *testing.T) *hsmsync.Record {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a database")
	}
	if err := galera.Installed(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := dbtest.Start(ctx, "127.91.110", 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Stop(t.Failed()) })
	return hsmsync.NewManifest(dbtest.Open(t, c.New(t)))
}

func TestTheRecordIsAChain(t *testing.T) {
	t.Parallel()
	r := database(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	entry := func(n uint64, group string) hsmsync.Entry {
		return hsmsync.Entry{N: n, Event: "note", Subject: group, Payload: []byte(`{"a":1}`), Actor: "trivet://test/sync/sync1", Created: time.Now().UTC().Truncate(time.Microsecond)}
	}
	first := entry(1, "x")
	for range 2 { // the very same entry again is the same entry
		if err := r.Append(ctx, "x", first); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Append(ctx, "x", entry(1, "other")); !errors.Is(err, hsmsync.ErrTaken) {
		t.Fatalf("a second entry at one position: %v", err)
	}
	if err := r.Append(ctx, "X", entry(1, "other group")); err != nil {
		t.Fatalf("the same position of another group: %v", err)
	}
	lease := entry(1, "x/lease")
	if err := r.Append(ctx, "x/lease", lease); err != nil {
		t.Fatal(err)
	}
	over := entry(1, "over")
	over.Event = "deleted"
	if err := r.Append(ctx, "over", over); err != nil {
		t.Fatal(err)
	}
	if all, err := r.Groups(ctx); err != nil || !reflect.DeepEqual(all, []hsmsync.Known{{Name: "X"}, {Name: "over", Deleted: true}, {Name: "x"}}) {
		t.Errorf("groups: %+v %v", all, err)
	}
	if err := r.Append(ctx, "x", entry(0, "x")); err == nil {
		t.Fatal("position 0 was accepted")
	}
	log, err := r.Log(ctx, "x", 1)
	if err != nil || len(log) != 1 {
		t.Fatalf("%+v %v", log, err)
	}
	log[0].Created = log[0].Created.UTC()
	if !reflect.DeepEqual(log[0], first) {
		t.Fatalf("wrote %+v, read %+v", first, log[0])
	}

	if err := r.Append(ctx, "x", entry(2, "x")); err != nil {
		t.Fatal(err)
	}
	for from, want := range []int{2, 2, 1, 0} {
		if log, err := r.Log(ctx, "x", uint64(from)); err != nil || len(log) != want {
			t.Errorf("from %d: %+v %v", from, log, err)
		}
	}
	if log, err := r.Log(ctx, "x", 1<<40); err != nil || len(log) != 0 {
		t.Errorf("from beyond what a log can hold: %+v %v", log, err)
	}
	if log, err := r.Newest(ctx, "x"); err != nil || len(log) != 1 || log[0].N != 2 {
		t.Errorf("%+v %v", log, err)
	}
	if log, err := r.Newest(ctx, "nonesuch"); err != nil || len(log) != 0 {
		t.Errorf("%+v %v", log, err)
	}

	t.Run("coordinators at once make one live key", func(t *testing.T) {
		d := &desk{t: t, at: map[string]*token{}, now: time.Now}
		for _, name := range []string{"a", "b", "c"} {
			d.at[name] = d.token(name)
		}
		coordinator := func() *hsmsync.Coordinator {
			c, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
				Group: "ca", Identity: named(t, identity.RoleSync, "sync1"), Chain: r, Log: logger(t),
				Connect: func(name, _ string) hsmsync.Agent { return &answering{d: d, name: name} },
			})
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		if err := coordinator().Setup(ctx, crew("a", "b", "c"), hsmsync.Policy{}); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		var mu sync.Mutex
		made := map[hsm.KeyID]bool{}
		for range 3 {
			c := coordinator()
			all.Go(func() {
				k, err := c.CreateKey(ctx, hsm.KeySpec{Label: "issuing-g1", Purpose: hsm.PurposeCA, Algorithm: hsm.P256})
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					made[k.ID] = true
				} else if !strings.Contains(err.Error(), "another coordinator") {
					t.Errorf("a loser's error: %v", err)
				}
			})
		}
		all.Wait()
		s, err := coordinator().State(ctx)
		if err != nil {
			t.Fatal(err)
		}
		live := s.In(hsmsync.StateLive)
		if len(live) != 1 || len(made) != 1 || !made[live[0].ID] || len(live[0].SPKI) == 0 || live[0].Label != "issuing-g1" {
			t.Errorf("live %+v, acknowledged %v", live, made)
		}
		// The lease, with the newest entry read alone.
		for _, name := range []string{"first", "second"} {
			ctx, stop := context.WithCancel(ctx)
			done := make(chan error, 1)
			go func() { done <- coordinator().RunReconcile(ctx, 50*time.Millisecond) }()
			eventually(t, name+" holds the lease", func() (string, bool) {
				log, err := r.Newest(t.Context(), "ca/lease")
				return fmt.Sprintf("%+v %v", log, err), err == nil && len(log) == 1 && log[0].N%2 == 1
			})
			stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if log, err := r.Newest(t.Context(), "ca/lease"); err != nil || len(log) != 1 || log[0].N%2 != 0 {
				t.Errorf("it was not given back: %+v %v", log, err)
			}
		}
	})
}
