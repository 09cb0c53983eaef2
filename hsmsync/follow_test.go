package hsmsync_test

import (
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

func TestWithoutALogTheConfiguredMembersAreUsed(t *testing.T) {
	as(t, identity.RoleCA)
	synctest.Test(t, func(t *testing.T) {
		members := []*software{newSoftware("x"), newSoftware("y")}
		chain := &memory{}
		g := newGroup(t, identity.RoleCA, manifest{chain}, members, nil)
		defer run(t, g)()
		time.Sleep(time.Second)
		if s := statesOf(g); s != "active active" {
			t.Errorf("members are %q", s)
		}
		chain.enter(t, "member", "y", hsmsync.MemberEntry{Address: "127.0.0.1:1", TokenSerial: "token-y"})
		chain.enter(t, "active", "y", hsmsync.Note{})
		settle()
		if s := g.Status().Groups[0].Members; len(s) != 1 || s[0].Name != "y" || s[0].State != "active" {
			t.Errorf("members are %+v", s)
		}
		if n := members[1].count("health"); n > 14 {
			t.Errorf("y was asked for its health %d times: by two", n)
		}
		chain.enter(t, "remove", "y", hsmsync.Note{})
		settle()
		if s := g.Status().Groups[0].Members; len(s) != 0 {
			t.Errorf("members are %+v", s)
		}
	})
}

func TestAKeyJustMadeIsUsableAtOnceWhereItIsAskedForAndElsewhereWithinASecond(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		for _, m := range b.members {
			m.with("challenge", slow(50*time.Millisecond))
		}
		asked := b.newKey("asked-g1", hsm.PurposeCA, hsm.P256)
		k, err := b.group.Key(t.Context(), string(asked.ID))
		good(t, err)
		if _, err := k.SignBatch(t.Context(), digests(1)); err != nil {
			t.Errorf("at once: %v", err)
		}
		other := b.newKey("other-g1", hsm.PurposeCA, hsm.P256)
		time.Sleep(time.Second)
		if n, err := b.group.Ready(string(other.ID)); n != 3 || err != nil {
			t.Errorf("a second later %d members are ready: %v", n, err)
		}
		// With nobody to prove it, whoever asks is not kept waiting for long.
		for _, m := range b.members {
			m.with("*", dead)
		}
		none := b.newKey("none-g1", hsm.PurposeCA, hsm.P256)
		began := time.Now()
		_, err = b.group.Key(t.Context(), string(none.ID))
		if took := time.Since(began); err != nil || took > time.Second {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

func TestADatabaseThatWentBackTakesNothingAway(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		whole := b.chain.entries
		b.chain.cut(3) // without the key, and c's "active"
		time.Sleep(30 * time.Second)
		b.expect("active active active")
		b.sign(1)
		b.chain.mu.Lock()
		b.chain.entries = whole
		b.chain.mu.Unlock()
		b.chain.enter(t, "drain", "a", hsmsync.Note{})
		time.Sleep(30 * time.Second)
		b.expect("drained active active")
	})
}

func TestALogThatWentOnOtherwiseIsFollowed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.cut(3)
		b.chain.enter(t, "standby", "c", hsmsync.Note{})
		settle()
		b.expect("active active standby")
		b.sign(10) // the key was live, its certificate is in use: what the log has lost is no reason to stop
		if k, err := b.group.Key(t.Context(), string(b.record.ID)); err != nil || k != b.key {
			t.Error(err)
		}
		b.chain.enter(t, "pending", string(b.record.ID), hsm.KeyRecord{KeySpec: b.record.KeySpec})
		settle()
		b.sign(1)
		b.chain.enter(t, "abandoned", string(b.record.ID), hsmsync.Note{}) // this is
		settle()
		if _, err := b.key.SignBatch(t.Context(), digests(1)); !errors.Is(err, hsmsync.ErrNoMember) || !strings.Contains(err.Error(), "abandoned") {
			t.Error(err)
		}
	})
}

func TestOneLostEntryInTheMiddleIsNoticed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.cut(1)
		other := b.record
		other.Label = "another"
		b.chain.enter(t, "live", string(b.record.ID), other) // as long as before
		b.chain.enter(t, "drain", "b", hsmsync.Note{})
		settle()
		b.expect("active drained active")
	})
}

// What follows a loss takes effect as soon as anything else, also when the log was read between the two.
func TestWhatFollowsALossThatWasSeenIsFollowedAtOnce(t *testing.T) {
	for name, lose := range map[string]int{"one entry": 1, "several": 4, "all": 100} {
		t.Run(name, func(t *testing.T) {
			inBed(t, func(t *testing.T, b *bed) {
				b.chain.mu.Lock()
				whole := b.chain.entries
				b.chain.mu.Unlock()
				b.chain.cut(min(lose, len(whole)))
				settle()
				b.chain.mu.Lock()
				before := b.chain.reads
				b.chain.mu.Unlock()
				time.Sleep(time.Minute)
				b.chain.mu.Lock()
				if n := b.chain.reads - before; n > 121 { // one row twice a second
					t.Errorf("%d entries were read in a minute in which nothing happened", n)
				}
				left := len(b.chain.entries)
				b.chain.entries = append(b.chain.entries[:left:left], whole[left:]...)
				b.chain.mu.Unlock()
				b.chain.enter(t, "drain", "a", hsmsync.Note{})
				time.Sleep(time.Second)
				b.expect("drained active active")
				b.chain.cut(2)
				time.Sleep(time.Second) // a reading falls between
				b.chain.enter(t, "standby", "b", hsmsync.Note{})
				time.Sleep(time.Second)
				b.expect("active standby active")
			})
		})
	}
}

// The last entry says what the last one known says; those before it are others.
func TestALossBeforeTheSameWordsIsNoticed(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.enter(t, "standby", "b", hsmsync.Note{})
		b.chain.enter(t, "recover", "a", hsmsync.Note{})
		settle()
		b.expect("active standby active")
		b.chain.cut(2)
		b.chain.enter(t, "drain", "c", hsmsync.Note{})
		b.chain.enter(t, "recover", "a", hsmsync.Note{})
		settle()
		b.expect("active active drained")
	})
}

func TestADeletedGroupSignsNothing(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.enter(t, "deleted", "group", hsmsync.Note{})
		settle()
		if _, err := b.key.SignBatch(t.Context(), digests(1)); err == nil {
			t.Error("it signed")
		}
		if _, err := b.group.Key(t.Context(), string(b.record.ID)); err == nil || !strings.Contains(err.Error(), "deleted") {
			t.Error(err)
		}
	})
}

func TestAnEntryThatCannotBeReadStopsNothing(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		b.chain.enter(t, "drain", "a", hsmsync.Note{})
		b.chain.enter(t, "policy", "group", hsmsync.Policy{Driver: "magic"})
		settle()
		b.expect("drained active active")
		b.sign(1)
	})
}

func TestManyKeysDoNotMakeFollowingExpensive(t *testing.T) {
	inBed(t, func(t *testing.T, b *bed) {
		spki, err := x509.MarshalPKIXPublicKey(newSoftKey(t).Public())
		if err != nil {
			t.Fatal(err)
		}
		for range 3300 { // for another role, so that none is proved
			b.chain.live(t, hsm.KeyRecord{KeySpec: hsm.KeySpec{ID: hsm.NewKeyID(), Label: "k", Purpose: hsm.PurposeInfra, Algorithm: hsm.P256}, SPKI: spki})
		}
		settle()
		b.chain.mu.Lock()
		before := b.chain.reads
		b.chain.mu.Unlock()
		time.Sleep(time.Minute)
		b.chain.mu.Lock()
		if n := b.chain.reads - before; n > 121 { // one row twice a second
			t.Errorf("%d entries were read in a minute in which nothing happened", n)
		}
		b.chain.mu.Unlock()
		b.sign(1)
	})
}
