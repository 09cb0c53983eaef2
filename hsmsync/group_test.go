package hsmsync_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// bed is a group of three software members a, b, c with one live key, running as a CA node, in virtual time.
type bed struct {
	t       *testing.T
	group   *hsmsync.Group
	chain   *memory
	members []*software
	byName  map[string]*software // those that can be connected to
	record  hsm.KeyRecord
	key     *hsmsync.Key
	metrics *prometheus.Registry
}

func newGroup(t *testing.T, role identity.Role, m hsmsync.Manifest, members []*software, reg prometheus.Registerer) *hsmsync.Group {
	t.Helper()
	cfg := hsmsync.Config{Group: "ca", Identity: as(t, role), Manifest: m, Log: logger(t), Metrics: reg}
	byName := map[string]*software{}
	for _, s := range members {
		byName[s.name] = s
		cfg.Members = append(cfg.Members, hsmsync.Member{Name: s.name, Address: "127.0.0.1:1"})
	}
	cfg.Connect = func(m hsmsync.Member) hsmsync.Agent { return byName[m.Name] }
	g, err := hsmsync.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// join enters a member as active, or what else is said.
func (b *bed) join(m *software, site string, events ...string) {
	b.t.Helper()
	b.byName[m.name] = m
	b.chain.enter(b.t, "member", m.name, hsmsync.MemberEntry{Address: m.name + ".example:9443", Site: site, TokenSerial: m.serial, TokenLabel: m.name})
	for _, e := range events {
		b.chain.enter(b.t, e, m.name, hsmsync.Note{})
	}
}

// newKey gives all members a key and enters it as live.
func (b *bed) newKey(label string, p hsm.Purpose, a hsm.Algorithm) hsm.KeyRecord {
	b.t.Helper()
	signer, err := newSigner(a)
	if err != nil {
		b.t.Fatal(err)
	}
	k := softKey{hsm.KeySpec{ID: hsm.NewKeyID(), Label: label, Purpose: p, Algorithm: a}, signer}
	for _, m := range b.members {
		m.set(func() { m.keys[k.ID] = k })
	}
	r := b.members[0].record(k)
	b.chain.live(b.t, r)
	return r
}

// inBed runs a test in virtual time: deadlines pass exactly, and when nothing else is left to do. Change changes the
// configuration of the group.
func inBed(t *testing.T, test func(*testing.T, *bed), change ...func(*bed, *hsmsync.Config)) {
	as(t, identity.RoleCA) // files are read outside the bubble
	synctest.Test(t, func(t *testing.T) {
		b := &bed{t: t, chain: &memory{}, members: []*software{newSoftware("a"), newSoftware("b"), newSoftware("c")}, metrics: prometheus.NewRegistry(), byName: map[string]*software{}}
		for i, m := range b.members {
			b.join(m, []string{"east", "east", "west"}[i], "active")
		}
		b.record = b.newKey("issuing-g1", hsm.PurposeCA, hsm.P256)
		cfg := hsmsync.Config{Group: "ca", Identity: as(t, identity.RoleCA), Manifest: manifest{b.chain}, Log: logger(t), Metrics: b.metrics}
		cfg.Connect = func(m hsmsync.Member) hsmsync.Agent { return b.byName[m.Name] }
		for _, c := range change {
			c(b, &cfg)
		}
		var err error
		if b.group, err = hsmsync.New(cfg); err != nil {
			t.Fatal(err)
		}
		stop := run(t, b.group)
		defer time.Sleep(time.Minute) // for what was asked in vain and is still under way
		defer stop()
		time.Sleep(time.Second)
		if n, err := b.group.Ready(string(b.record.ID)); n == 0 || err != nil {
			t.Fatalf("%d members hold a verified copy: %v", n, err)
		}
		if b.key, err = b.group.Key(t.Context(), string(b.record.ID)); err != nil {
			t.Fatal(err)
		}
		test(t, b)
	})
}

func run(t testing.TB, g *hsmsync.Group) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func digests(n int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		var b [8]byte
		binary.BigEndian.PutUint64(b[:], uint64(i))
		d := sha256.Sum256(b[:])
		out[i] = d[:]
	}
	return out
}

// sign signs n digests in one batch and checks the signatures.
func (b *bed) sign(n int) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 5*time.Second)
	defer cancel()
	ds := digests(n)
	sigs, err := b.key.SignBatch(ctx, ds)
	if err != nil {
		b.t.Fatalf("signing: %v", err)
	}
	verify(b.t, b.key, ds, sigs)
}

func verify(t testing.TB, k *hsmsync.Key, ds, sigs [][]byte) {
	t.Helper()
	if len(sigs) != len(ds) {
		t.Fatalf("%d signatures for %d digests", len(sigs), len(ds))
	}
	for i := range ds {
		if err := hsm.Verify(k.Public(), ds[i], sigs[i]); err != nil {
			t.Fatalf("signature %d was released: %v", i, err)
		}
	}
}

// states are the members' states in order.
func (b *bed) states() string { return statesOf(b.group) }

func statesOf(g *hsmsync.Group) string {
	var out []string
	for _, m := range g.Status().Groups[0].Members {
		out = append(out, m.State)
	}
	return strings.Join(out, " ")
}

func (b *bed) expect(states string) {
	b.t.Helper()
	if got := b.states(); got != states {
		b.t.Fatalf("members are %q, want %q", got, states)
	}
}

func TestANewIncarnationProvesItsKeysBeforeItGetsWork(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		m := b.members[2]
		m.with("*", dead)
		time.Sleep(2 * time.Second)
		m.with("challenge", hung)
		m.with("*", nil)
		m.restart()
		before := m.count("sign")
		for range 100 {
			time.Sleep(30 * time.Millisecond)
			b.sign(1)
		}
		if m.count("sign") != before {
			t.Fatal("it was given work without proof")
		}
		m.with("challenge", nil)
		time.Sleep(3 * time.Second)
		b.expect("active active active")
		proofs := m.count("challenge")
		m.restart()
		time.Sleep(2 * time.Second)
		b.expect("active active active")
		if m.count("challenge") != proofs+1 {
			t.Errorf("a new incarnation was challenged %d times for one key", m.count("challenge")-proofs)
		}
	})
}

func TestAWrongKeyUnderARightIDIsNotUsed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		m := b.members[0]
		other := newSoftKey(t)
		m.mu.Lock()
		m.keys[b.record.ID] = softKey{b.record.KeySpec, other}
		m.incarnation++
		m.mu.Unlock()
		before := m.count("sign")
		time.Sleep(time.Second)
		b.expect("quarantined active active")
		b.sign(20)
		if m.count("sign") != before {
			t.Error("it was given work")
		}
	})
}

func TestAMemberWithoutTheKeyIsLeftOutAndTriedAgain(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		m := b.members[0]
		m.mu.Lock()
		k := m.keys[b.record.ID]
		delete(m.keys, b.record.ID)
		m.mu.Unlock()
		for m.count("sign") == 0 {
			b.sign(1)
		}
		time.Sleep(2 * time.Second)
		b.expect("syncing active active")
		m.mu.Lock()
		m.keys[b.record.ID] = k
		m.mu.Unlock()
		time.Sleep(2 * time.Second)
		b.expect("active active active")
	})
}

func TestWithoutAnyMemberTheErrorNamesThemAtOnce(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("*", dead)
		}
		time.Sleep(2 * time.Second)
		began := time.Now()
		_, err := b.key.SignBatch(t.Context(), digests(1))
		if !errors.Is(err, hsmsync.ErrNoMember) || time.Since(began) != 0 {
			t.Fatalf("after %v: %v", time.Since(began), err)
		}
		for _, want := range []string{"a failed", "b failed", "c failed", "connection refused", "issuing-g1"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("error %q does not mention %q", err, want)
			}
		}
		if n, err := b.group.Ready(string(b.record.ID)); n != 0 || !errors.Is(err, hsmsync.ErrNoMember) {
			t.Errorf("ready: %d, %v", n, err)
		}
		for _, m := range b.members {
			m.restart()
			m.with("*", nil)
		}
		time.Sleep(2 * time.Second)
		b.sign(3) // healed by itself
	})
}

func TestSigningGoesOnWithoutTheDatabase(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.fail(errors.New("database is gone"))
		time.Sleep(time.Minute)
		b.members[0].restart()
		time.Sleep(2 * time.Second)
		b.expect("active active active")
		b.sign(10)
		if _, err := b.group.Key(t.Context(), string(b.record.ID)); err != nil {
			t.Error(err)
		}
		if _, err := b.group.Key(t.Context(), string(hsm.NewKeyID())); err == nil || !strings.Contains(err.Error(), "database is gone") {
			t.Errorf("an unknown key: %v", err)
		}
	})
}

func TestAKeyOfAnotherRoleIsRefused(t *testing.T) {
	as(t, identity.RoleOCSP)
	inBed(t, func(t *testing.T, b *bed) {
		before := b.members[0].count("challenge")
		g := newGroup(t, identity.RoleOCSP, b.chain, b.members, nil)
		defer run(t, g)()
		time.Sleep(time.Second)
		if _, err := g.Key(t.Context(), string(b.record.ID)); err == nil || !strings.Contains(err.Error(), "may not sign") {
			t.Errorf("an ocsp node got the CA's key: %v", err)
		}
		if n, _ := g.Ready(string(b.record.ID)); n != 0 || b.members[0].count("challenge") != before {
			t.Errorf("ready on %d members, challenged %d times", n, b.members[0].count("challenge")-before)
		}
	})
}

func TestAnAddressThatBelongsToAnotherMemberIsNotUsed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.members[0].mu.Lock()
		b.members[0].name = "b"
		b.members[0].mu.Unlock()
		time.Sleep(3 * time.Second)
		b.expect("failed active active")
	})
}

func TestANewKeyIsTakenUpByRunningGroups(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		r := b.newKey("issuing-g2", hsm.PurposeCA, hsm.P256)
		k, err := b.group.Key(t.Context(), string(r.ID)) // asked for before the manifest is read again
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n, err := b.group.Ready(string(r.ID)); n != 3 {
			t.Fatalf("ready on %d: %v", n, err)
		}
		b.key = k
		b.sign(1)
	})
}

func TestAKeyThatIsNoLongerLiveSignsNoMore(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.enter(t, "retired", string(b.record.ID), hsmsync.Note{Why: "renewed"})
		time.Sleep(5 * time.Second)
		if _, err := b.key.SignBatch(t.Context(), digests(1)); err == nil || !strings.Contains(err.Error(), "retired") {
			t.Fatalf("error %v", err)
		}
		if _, err := b.group.Key(t.Context(), string(b.record.ID)); err == nil || !strings.Contains(err.Error(), "retired") {
			t.Fatalf("error %v", err)
		}
	})
}

func TestStatusHasTheAgreedShape(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		out, err := json.Marshal(b.group.Status())
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Groups []struct {
				Name    string
				Epoch   int
				Members []struct {
					Name, State string
					Standby     *bool
					Inflight    *int
					Keys        []struct {
						ID, Label, Purpose, State string
						ProvedAt                  time.Time `json:"proved_at"`
					}
				}
			}
		}
		d := json.NewDecoder(bytes.NewReader(out))
		if err := d.Decode(&got); err != nil {
			t.Fatal(err)
		}
		g := got.Groups[0]
		m := g.Members[0]
		if g.Name != "ca" || g.Epoch < 1 || len(g.Members) != 3 || m.Name != "a" || m.State != "active" || m.Standby == nil || m.Inflight == nil {
			t.Fatalf("%s", out)
		}
		if k := m.Keys[0]; k.ID != string(b.record.ID) || k.Label != "issuing-g1" || k.Purpose != "ca" || k.State != "verified" || k.ProvedAt.IsZero() {
			t.Fatalf("%s", out)
		}
	})
}

func TestAGroupIsCheckedWhenMade(t *testing.T) {
	id := as(t, identity.RoleCA)
	good := hsmsync.Config{Group: "ca", Identity: id, Manifest: &memory{}, Log: logger(t), Members: []hsmsync.Member{{Name: "a", Address: "127.0.0.1:1"}}}
	for name, spoil := range map[string]func(*hsmsync.Config){
		"no name":     func(c *hsmsync.Config) { c.Group = "" },
		"recovery":    func(c *hsmsync.Config) { c.Recovery.Attempts = -2 },
		"no manifest": func(c *hsmsync.Config) { c.Manifest = nil },
		"one twice":   func(c *hsmsync.Config) { c.Members = append(c.Members, c.Members[0]) },
	} {
		cfg := good
		spoil(&cfg)
		if _, err := hsmsync.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	good.Members = nil // the log may name them
	if _, err := hsmsync.New(good); err != nil {
		t.Error(fmt.Errorf("a good one: %w", err))
	}
}
