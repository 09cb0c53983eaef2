package hsmsync_test

import (
	"context"
	"errors"
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
	if err := r.Append(ctx, "x", entry(0, "x")); err == nil {
		t.Fatal("position 0 was accepted")
	}
	log, err := r.Log(ctx, "x")
	if err != nil || len(log) != 1 {
		t.Fatalf("%+v %v", log, err)
	}
	log[0].Created = log[0].Created.UTC()
	if !reflect.DeepEqual(log[0], first) {
		t.Fatalf("wrote %+v, read %+v", first, log[0])
	}

	t.Run("coordinators at once make one live key", func(t *testing.T) {
		members := []*software{newSoftware("a"), newSoftware("b"), newSoftware("c")}
		if err := newGroup(t, identity.RoleSync, r, members, nil).CreateDomain(ctx); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		var mu sync.Mutex
		made := map[hsm.KeyID]bool{}
		for range 3 {
			g := newGroup(t, identity.RoleSync, r, members, nil)
			all.Go(func() {
				k, err := g.CreateKey(ctx, "issuing-g1", hsm.PurposeCA, hsm.P256)
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
		keys, err := r.Keys(ctx, "ca")
		if err != nil {
			t.Fatal(err)
		}
		live := 0
		for _, k := range keys {
			if k.State == hsmsync.StateLive {
				live++
				if !made[k.ID] || len(k.SPKI) == 0 || k.Label != "issuing-g1" {
					t.Errorf("live is %+v; acknowledged %v", k, made)
				}
			}
		}
		if live != 1 || len(made) != 1 {
			t.Errorf("%d live keys, acknowledged %v", live, made)
		}
	})
}
