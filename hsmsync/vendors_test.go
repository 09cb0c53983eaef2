package hsmsync_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// nss adds members on NSS's software token.
func (w *works) nss(names ...string) {
	w.t.Helper()
	for _, n := range names {
		w.at[n] = w.lab.NSS(n).Serve()
	}
}

// serve runs a group of what the log says until the test ends.
func (w *works) serve(epoch uint64) *hsmsync.Group {
	w.t.Helper()
	g, err := hsmsync.New(hsmsync.Config{
		Group: "ca", Identity: w.lab.Identity(identity.RoleCA, "ca1"), Manifest: manifest{w.chain}, Epoch: epoch, Log: logger(w.t),
	})
	good(w.t, err)
	w.t.Cleanup(run(w.t, g))
	return g
}

// are waits until a group's members are in those states, by name.
func are(t testing.TB, g *hsmsync.Group, want map[string]string) {
	t.Helper()
	eventually(t, fmt.Sprint("the members are ", want), func() (string, bool) {
		got := map[string]string{}
		for _, m := range g.Status().Groups[0].Members {
			got[m.Name] = m.State
		}
		return fmt.Sprint(got), fmt.Sprint(got) == fmt.Sprint(want)
	})
}

// proved waits until so many members have proved each key.
func proved(t testing.TB, g *hsmsync.Group, members int, keys ...hsm.KeyRecord) {
	t.Helper()
	for _, k := range keys {
		eventually(t, fmt.Sprint(members, " members have proved key ", k.Label), func() (string, bool) {
			n, err := g.Ready(string(k.ID))
			return fmt.Sprint(n, " have: ", err), n == members && err == nil
		})
	}
}

// signWith signs a batch with each key; every signature must verify.
func signWith(ctx context.Context, t testing.TB, g *hsmsync.Group, keys ...hsm.KeyRecord) {
	t.Helper()
	for _, r := range keys {
		k, err := g.Key(ctx, string(r.ID))
		good(t, err)
		ds := digestsFor(r.Algorithm, 4)
		sigs, err := k.SignBatch(ctx, ds)
		if err != nil {
			t.Fatalf("%s: %v", r.Label, err)
		}
		verify(t, k, ds, sigs)
	}
}

func digestsFor(a hsm.Algorithm, n int) (out [][]byte) {
	for i := range n {
		h := a.Hash().New()
		_, _ = fmt.Fprint(h, i)
		out = append(out, h.Sum(nil))
	}
	return out
}

// TestAGroupOfTwoVendors has SoftHSM and NSS hold the same keys.
func TestAGroupOfTwoVendors(t *testing.T) {
	t.Parallel()
	w := newWorks(t, "a")
	w.nss("n")
	w.setup(hsmsync.Policy{}, "a", "n")
	ctx := w.soon()
	var keys []hsm.KeyRecord
	for _, a := range []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048} {
		keys = append(keys, w.key("key-"+string(a), a))
	}
	w.verify(2, 3)
	g := w.serve(1)
	are(t, g, map[string]string{"a": "active", "n": "active"})

	t.Run("each makes keys and signs alone with all", func(t *testing.T) {
		good(t, w.c.SetPolicy(ctx, hsmsync.Policy{Creation: hsmsync.CreationMaster, Master: "n"}))
		for _, a := range []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048} {
			keys = append(keys, w.key("made-by-n-"+string(a), a))
		}
		w.verify(2, 6)
		w.eachAlone(t, g, keys)
	})
	t.Run("another of each joins", func(t *testing.T) {
		w.add("b")
		w.nss("o")
		good(t, w.c.Enroll(ctx, w.request("b")))
		good(t, w.c.Enroll(ctx, w.request("o")))
		w.verify(4, 6)
	})
	t.Run("the domain key changes", func(t *testing.T) {
		good(t, w.c.RotateDomain(ctx))
		w.verify(4, 6)
		s := w.state()
		for name, m := range w.at {
			if i := m.WaitReady(); i.KEK != s.Domain.Name || i.NextKEK != "" {
				t.Errorf("%s holds domain keys %q and %q, the group's is %q", name, i.KEK, i.NextKEK, s.Domain.Name)
			}
		}
		keys = append(keys, w.key("after", hsm.P256))
		w.verify(4, 7)
		if r, err := w.c.Reconcile(ctx); err != nil || !r.OK || r.Copied+r.Destroyed+len(r.Findings) > 0 {
			t.Errorf("%+v %v", r, err)
		}
	})
	t.Run("signing goes on on NSS when SoftHSM is killed", func(t *testing.T) {
		are(t, g, map[string]string{"a": "active", "b": "active", "n": "active", "o": "active"})
		k, err := g.Key(ctx, string(keys[0].ID))
		good(t, err)
		proved(t, g, 4, keys...)
		w.at["a"].Kill()
		w.at["b"].Kill()
		worst := time.Duration(0)
		for range 200 {
			began := time.Now()
			sigs, err := k.SignBatch(ctx, digests(3))
			good(t, err)
			verify(t, k, digests(3), sigs)
			worst = max(worst, time.Since(began))
		}
		t.Logf("worst %v", worst.Round(time.Millisecond))
		if worst > patience {
			t.Errorf("worst %v, want %v", worst, patience)
		}
		are(t, g, map[string]string{"a": "failed", "b": "failed", "n": "active", "o": "active"})
		signWith(ctx, t, g, keys...)
		w.at["a"].Start()
		w.at["b"].Start()
		are(t, g, map[string]string{"a": "active", "b": "active", "n": "active", "o": "active"})
		w.at["n"].Kill()
		w.at["o"].Kill()
		signWith(ctx, t, g, keys...)
	})
}

// eachAlone has each member in turn sign with all keys while all others are drained.
func (w *works) eachAlone(t *testing.T, g *hsmsync.Group, keys []hsm.KeyRecord) {
	t.Helper()
	forcing := w.config
	forcing.Force = true
	c, err := hsmsync.NewCoordinator(forcing)
	good(t, err)
	defer c.Close()
	all := map[string]string{}
	for alone := range w.at {
		good(t, c.Recover(w.soon(), alone, ""))
		states := map[string]string{alone: "active"}
		for name := range w.at {
			if all[name] = "active"; name != alone {
				good(t, c.Drain(w.soon(), name, "to see whether "+alone+" does alone"))
				states[name] = "drained"
			}
		}
		are(t, g, states)
		signWith(w.soon(), t, g, keys...)
	}
	for name := range w.at {
		good(t, c.Recover(w.soon(), name, ""))
	}
	are(t, g, all)
}

// TestAnHSMOfAnotherVendorJoinsAGroupThatHasKeys is about groups of one vendor.
func TestAnHSMOfAnotherVendorJoinsAGroupThatHasKeys(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name        string
		first, then func(*works, ...string)
		names       []string
	}{
		{"NSS joins SoftHSM", (*works).add, (*works).nss, []string{"a", "b", "n"}},
		{"SoftHSM joins NSS", (*works).nss, (*works).add, []string{"n", "o", "a"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorks(t)
			old, newcomer := test.names[:2], test.names[2]
			test.first(w, old...)
			test.then(w, newcomer)
			w.setup(hsmsync.Policy{}, old...)
			for _, a := range []hsm.Algorithm{hsm.P256, hsm.RSA2048} {
				w.key("key-"+string(a), a)
			}
			good(t, w.retire(w.key("retired", hsm.P256).ID, ""))
			good(t, w.c.Enroll(w.soon(), w.request(newcomer)))
			w.verify(3, 2)
			if i := w.at[newcomer].WaitReady(); i.Keys != 3 || i.Epoch != 1 {
				t.Errorf("%+v", i)
			}
			// And it can hand on what it was given: the source is whoever serves.
			good(t, w.c.Drain(w.soon(), old[0], ""))
			w.at[old[1]].Replace()
			w.at[old[1]].Start()
			w.at[old[1]].WaitReady()
			good(t, w.c.Replace(w.soon(), w.request(old[1])))
			good(t, w.c.Recover(w.soon(), old[0], ""))
			w.verify(3, 2)
		})
	}
}
