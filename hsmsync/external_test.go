package hsmsync_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/hsmsync"
	"trivet/hsmsync/custody"
	"trivet/identity"
)

// vendor clones keys between SoftHSM tokens as an HSM vendor's own tools do: no key is wrapped and no agent is asked. The
// tokens share the key that encrypts what is in them, as HSMs of one cloning domain do, and each has a serial of its own.
// Cloning is then the copying of the files of a key's two halves.
type vendor struct {
	*works
	origin string
	own    map[string]bool // files that are the origin's own
}

// newVendor makes members of one cloning domain. They run, and are in no group. The members named in twins have the serial
// of the first one's token.
func newVendor(t testing.TB, names []string, twins ...string) *vendor {
	t.Helper()
	v := &vendor{works: newWorks(t), origin: names[0]}
	first := v.lab.Member(names[0])
	v.at[names[0]] = first
	if out, err := first.InitToken(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for i, n := range names[1:] {
		m := v.lab.Member(n)
		v.at[n] = m
		v.replaceToken(n, v.tokens(names[0]))
		v.rename(n, i+1, slices.Contains(twins, n))
		for _, f := range v.objects(n) { // what the first agent has made for itself
			good(t, os.Remove(filepath.Join(v.dir(n), f)))
		}
		pin, err := os.ReadFile(first.PIN)
		good(t, err)
		hsmtest.Write(t, m.PIN, string(pin))
	}
	for _, n := range names {
		v.at[n].Start()
		v.at[n].WaitReady()
	}
	return v
}

// rename gives the origin's token, copied to a member, the member's label and a serial of its own.
func (v *vendor) rename(name string, i int, twin bool) {
	v.t.Helper()
	file := filepath.Join(v.dir(name), "token.object")
	b, err := os.ReadFile(file)
	good(v.t, err)
	pad := func(s string) []byte { return fmt.Appendf(nil, "%-32s", s) }
	change := func(from, to []byte) {
		if bytes.Count(b, from) != 1 {
			v.t.Fatalf("%q is %d times in a token's description", from, bytes.Count(b, from))
		}
		b = bytes.Replace(b, from, to, 1)
	}
	change(pad(v.origin), pad(name))
	if !twin {
		// The serial is the end of the directory's name.
		serial := strings.ReplaceAll(filepath.Base(v.dir(name)), "-", "")[16:]
		change([]byte(serial), fmt.Appendf(nil, "%s%04x", serial[:12], i))
	}
	hsmtest.Write(v.t, file, string(b))
}

// dir is the directory of a member's token.
func (v *vendor) dir(name string) string {
	v.t.Helper()
	all, err := filepath.Glob(filepath.Join(v.tokens(name), "*", "token.object"))
	if err != nil || len(all) != 1 {
		v.t.Fatalf("%s has tokens %q: %v", name, all, err)
	}
	return filepath.Dir(all[0])
}

// objects lists the files of what is in a member's token.
func (v *vendor) objects(name string) (out []string) {
	v.t.Helper()
	all, err := filepath.Glob(filepath.Join(v.dir(name), "*-*.object"))
	good(v.t, err)
	for _, f := range all {
		out = append(out, filepath.Base(f))
	}
	return out
}

// begin has the vendor leave out what is in the origin's token by now: what its agent has made for itself.
func (v *vendor) begin() {
	v.t.Helper()
	v.own = map[string]bool{}
	for _, f := range v.objects(v.origin) {
		v.own[f] = true
	}
}

// made waits until the origin holds so many keys of the group, all whole.
func (v *vendor) made(keys int) {
	v.t.Helper()
	c := v.at[v.origin].Client(identity.RoleSync)
	eventually(v.t, fmt.Sprint(v.origin, " holds ", keys, " keys"), func() (string, bool) {
		i, err := c.Health(v.soon())
		return fmt.Sprintf("%+v %v", i, err), err == nil && i.Keys == keys && i.Faulty == 0
	})
}

// clone copies the group's keys to a member's token.
func (v *vendor) clone(to string) {
	v.t.Helper()
	has := v.objects(to)
	for _, f := range v.objects(v.origin) {
		if v.own[f] || slices.Contains(has, f) {
			continue
		}
		b, err := os.ReadFile(filepath.Join(v.dir(v.origin), f))
		good(v.t, err)
		v.put(to, f, b)
	}
	v.touch(to)
}

// put puts an object into a member's token, with the lock without which the module could not delete it.
func (v *vendor) put(to, file string, content []byte) {
	v.t.Helper()
	hsmtest.Write(v.t, filepath.Join(v.dir(to), strings.TrimSuffix(file, ".object")+".lock"), "")
	hsmtest.Write(v.t, filepath.Join(v.dir(to), file), string(content))
}

// lose takes the group's keys out of a member's token.
func (v *vendor) lose(from string) {
	v.t.Helper()
	has := v.objects(from)
	for _, f := range v.objects(v.origin) {
		if !v.own[f] && slices.Contains(has, f) {
			good(v.t, os.Remove(filepath.Join(v.dir(from), f)))
		}
	}
	v.touch(from)
}

// touch has a module that runs look at its token's directory anew.
func (v *vendor) touch(name string) {
	v.t.Helper()
	file := filepath.Join(v.dir(name), "generation")
	b, err := os.ReadFile(file)
	good(v.t, err)
	binary.BigEndian.PutUint64(b, binary.BigEndian.Uint64(b)+1000) // not what the module itself would write next
	good(v.t, os.WriteFile(file, b, 0o600))
}

// stopped does something with a member's token while its agent is stopped.
func (v *vendor) stopped(name string, do func(string)) {
	v.t.Helper()
	v.at[name].Kill()
	do(name)
	v.at[name].Start()
	v.at[name].WaitReady()
}

// watched counts the failures to list a member's keys.
type watched struct {
	*agent.Client
	away *atomic.Int64
}

func (w *watched) Inventory(ctx context.Context) ([]hsm.KeyRecord, error) {
	keys, err := w.Client.Inventory(ctx)
	if err != nil {
		w.away.Add(1)
	}
	return keys, err
}

func TestARealVendorClonesTheKeys(t *testing.T) {
	t.Parallel()
	v := newVendor(t, []string{"a", "b", "c", "d", "e"}, "e")
	v.setup(hsmsync.Policy{Driver: hsmsync.DriverExternal, NonExtractable: true, DestroyAfter: time.Millisecond}, "a", "b", "c")
	v.begin()
	ctx := v.soon()
	g := v.serve(1)
	var away atomic.Int64
	v.config.Connect = func(name, address string) hsmsync.Agent {
		return &watched{agent.NewClient(name, address, v.config.Identity), &away}
	}
	v.c = v.coordinator()
	spec := hsm.KeySpec{Label: "key", Purpose: hsm.PurposeCA, Algorithm: hsm.P256}

	// The key is there and not live as long as one member lacks it.
	type result struct {
		key hsm.KeyRecord
		err error
	}
	created := make(chan result, 1)
	go func() { k, err := v.c.CreateKey(ctx, spec); created <- result{k, err} }()
	v.made(1)
	v.clone("b") // which sees it come
	if !proves(t, v, "b") {
		t.Error("b does not prove what was cloned to it")
	}
	if found, ok := v.state().Find(spec.Label, spec.Purpose); !ok || found.State != hsmsync.StatePending {
		t.Fatalf("c lacks it: %+v", found)
	}
	select {
	case r := <-created:
		t.Fatalf("c lacks it: %+v", r)
	default:
	}
	v.at["c"].Kill() // which the vendor stops for it
	eventually(t, "c is found to be away", func() (string, bool) { n := away.Load(); return fmt.Sprint(n), n > 0 })
	v.clone("c")
	v.at["c"].Start()
	r := <-created
	good(t, r.err)
	key := r.key
	if !key.NonExtractable || key.Extractable {
		t.Errorf("%+v", key)
	}
	v.verify(3, 1)
	are(t, g, map[string]string{"a": "active", "b": "active", "c": "active"})
	proved(t, g, 3, key)
	signWith(ctx, t, g, key)

	t.Run("it cannot be exported", func(t *testing.T) {
		c := v.at["b"].Client(identity.RoleSync) // a clone
		good(t, c.GenerateDomain(ctx, "of-b"))
		_, err := c.Export(ctx, key.ID, "")
		failed(t, err, "extract")
		failed(t, v.c.RotateDomain(ctx), "vendor")
		recipient, _, err := custody.NewRecipient(3, 2)
		good(t, err)
		_, err = v.c.Backup(ctx, recipient, nil)
		failed(t, err, "vendor")
		failed(t, v.c.SetPolicy(ctx, hsmsync.Policy{}), "driver wrap")
	})
	t.Run("one that is never cloned does not live", func(t *testing.T) {
		soon, cancel := context.WithTimeout(ctx, 1200*time.Millisecond)
		defer cancel()
		never := spec
		never.Label = "never"
		_, err := v.c.CreateKey(soon, never)
		failed(t, err, "vendor has not cloned 1 keys", "is abandoned")
	})
	t.Run("a clone that is lost is reported and left to the vendor", func(t *testing.T) {
		v.stopped("b", v.lose)
		report, err := v.c.Reconcile(ctx)
		if err != nil || report.OK || report.Copied > 0 || !strings.Contains(kinds(report), "missing b") {
			t.Errorf("%s %+v %v", kinds(report), report, err)
		}
		if holdsKey(ctx, t, v.works, "b", key.ID) {
			t.Error("somebody brought it back")
		}
		report, err = v.c.Verify(ctx)
		if err != nil || report.OK || report.Fewest != 2 {
			t.Errorf("%+v %v", report, err)
		}
		for _, f := range report.Findings {
			if f.Kind == hsmsync.KindMissing && strings.Contains(f.Detail, "next reconciliation") {
				t.Errorf("%s: nothing is brought by us", f.Detail)
			}
		}
		v.clone("b")
		report, err = v.c.Reconcile(ctx)
		if err != nil || !report.OK {
			t.Errorf("cloned again: %s %+v %v", kinds(report), report.Findings, err)
		}
		v.verify(3, 1)
	})
	t.Run("a clone that is lost behind its agent's back is found", func(t *testing.T) {
		v.lose("c")
		report, err := v.c.Verify(ctx)
		if err != nil || report.OK || !strings.Contains(kinds(report), "missing c") {
			t.Errorf("%s %v", kinds(report), err)
		}
		report, err = v.c.Reconcile(ctx)
		if err != nil || report.OK || report.Copied > 0 || !strings.Contains(kinds(report), "missing c") {
			t.Errorf("%s %v", kinds(report), err)
		}
		v.clone("c")
		v.verify(3, 1)
	})
	t.Run("a destroyed key that the vendor brings back does not stay", func(t *testing.T) {
		spec := spec
		spec.Label, spec.Algorithm = "gone", hsm.Ed25519 // which no HSM wraps
		before := v.objects("a")
		created := make(chan result, 1)
		go func() { k, err := v.c.CreateKey(ctx, spec); created <- result{k, err} }()
		v.made(3) // with the one that was never cloned
		v.clone("b")
		v.clone("c")
		r := <-created
		good(t, r.err)
		v.verify(3, 2)
		files := map[string][]byte{}
		for _, f := range v.objects("b") {
			if slices.Contains(v.objects("a"), f) && !slices.Contains(before, f) {
				b, err := os.ReadFile(filepath.Join(v.dir("b"), f))
				good(t, err)
				files[f] = b
			}
		}
		good(t, v.retire(r.key.ID, ""))
		act, err := v.c.DestroyAct(ctx, r.key.ID)
		good(t, err)
		d, err := v.c.DestroyKey(ctx, r.key.ID, v.approve(act))
		if err != nil || len(d.Left) > 0 {
			t.Fatalf("%+v %v", d, err)
		}
		v.stopped("b", func(b string) {
			for f, content := range files {
				v.put(b, f, content)
			}
		})
		if !holdsKey(ctx, t, v.works, "b", r.key.ID) {
			t.Fatal("it did not come back")
		}
		report, err := v.c.Reconcile(ctx)
		if still := holdsKey(ctx, t, v.works, "b", r.key.ID); err != nil || still == report.OK || still == (report.Destroyed == 1) {
			t.Errorf("it holds the key: %v; the report says %+v %v", still, report, err)
		}
		if !report.OK { // the agent knows that this approval was used
			_, err = v.c.DestroyKey(ctx, r.key.ID, v.approve(act))
			good(t, err)
		}
		if holdsKey(ctx, t, v.works, "b", r.key.ID) {
			t.Error("it is there still")
		}
		v.verify(3, 1)
	})
	t.Run("a newcomer waits for the vendor", func(t *testing.T) {
		for _, name := range []string{"d", "e"} { // of which e's token has the serial of a's
			enrolled := make(chan error, 1)
			request := v.request(name)
			soon, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			go func() { enrolled <- v.c.Enroll(soon, request) }()
			// That writes to the token as well, which would be in the vendor's way.
			eventually(t, name+" has the site epoch", func() (string, bool) {
				i := v.at[name].WaitReady()
				return fmt.Sprintf("%+v", i), i.Epoch == 1
			})
			if m, ok := v.state().Member(name); !ok || m.State != hsmsync.MemberJoining {
				t.Errorf("%s has no clone yet: %+v", name, m)
			}
			v.clone(name)
			good(t, <-enrolled)
		}
		if a, e := v.at["a"].WaitReady(), v.at["e"].WaitReady(); a.TokenSerial != e.TokenSerial || a.Transport == e.Transport {
			t.Errorf("serials %s and %s, transport keys %s and %s", a.TokenSerial, e.TokenSerial, a.Transport, e.Transport)
		}
		v.verify(5, 1)
	})
	t.Run("the image of a whole token is no second copy", func(t *testing.T) {
		v.stopped("e", func(string) {
			v.at["a"].Kill()
			v.replaceToken("e", v.tokens("a"))
			v.rename("e", 0, true)
			v.at["a"].Start()
			v.at["a"].WaitReady()
		})
		report, err := v.c.Reconcile(ctx)
		if err != nil || report.OK || !strings.Contains(kinds(report), "token-changed e") {
			t.Errorf("%s %v", kinds(report), err)
		}
		good(t, v.c.Remove(ctx, "e", "its token is a copy"))
		_, fingerprint, err := v.c.Inspect(ctx, "e", v.at["e"].Addr)
		good(t, err)
		err = v.c.Enroll(ctx, hsmsync.EnrollRequest{Name: "e", Address: v.at["e"].Addr, Grant: v.approve(v.c.EnrollAct("e", fingerprint))})
		failed(t, err, "share token", "one copy, not two")
	})
	t.Run("a vendor that clones the agents' own keys as well", func(t *testing.T) {
		v.own = nil
		v.at["d"].Kill()
		v.clone("d")
		v.at["d"].Start()
		i := v.at["d"].WaitReady()
		m, _ := v.state().Member("d")
		if i.Transport != m.Transport || len(i.Strangers) != 1 || i.Strangers[0] != v.at["a"].WaitReady().Transport || i.Foreign != 1 {
			t.Errorf("%+v, joined with transport key %s", i, m.Transport)
		}
		report, err := v.c.Reconcile(ctx)
		if told := slices.ContainsFunc(report.Findings, func(f hsmsync.Finding) bool {
			return f.Kind == hsmsync.KindForeign && f.Member == "d" && !f.Alarm && strings.Contains(f.Detail, "trivet-transport:a")
		}); err != nil || !report.OK || !told {
			t.Errorf("%s %+v %v", kinds(report), report.Findings, err)
		}
		v.verify(4, 1)
	})
}

// proves tells whether a member signs a challenge with the one key that its origin holds.
func proves(t *testing.T, v *vendor, name string) bool {
	t.Helper()
	all, err := v.at[v.origin].Client(identity.RoleSync).Inventory(v.soon())
	good(t, err)
	i := slices.IndexFunc(all, func(k hsm.KeyRecord) bool { return k.Purpose == hsm.PurposeCA })
	key, c, nonce := all[i], v.at[name].Client(identity.RoleSync), make([]byte, 32)
	_, err = c.Inventory(v.soon())
	good(t, err)
	sig, incarnation, err := c.Challenge(v.soon(), "ca", key.ID, nonce)
	good(t, err)
	public, err := x509.ParsePKIXPublicKey(key.SPKI)
	good(t, err)
	return hsm.Verify(public, hsm.ChallengeDigest(key.Algorithm, "ca", name, incarnation, key.ID, nonce), sig) == nil
}
