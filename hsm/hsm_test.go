package hsm_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"trivet/hsm"
)

func TestLabelsRoundTripAndForeignOnesAreForeign(t *testing.T) {
	for _, p := range hsm.Purposes() {
		s := hsm.KeySpec{ID: hsm.NewKeyID(), Label: "demo-g1", Purpose: p, Algorithm: hsm.P256}
		got, name, ok := hsm.ParseObjectLabel(s.ObjectLabel())
		if !ok || got != p || name != "demo-g1" || s.Check() != nil {
			t.Errorf("%s: %s %s %v, %v", s.ObjectLabel(), got, name, ok, s.Check())
		}
	}
	for _, l := range []string{"", "trivet:", "trivet:ca", "trivet:ca:", "trivet:root:x", "trivet:ca:a:b", "trivet:CA:x", "trivet-kek:x", "Trivet:ca:x", "trivet:ca:x\x00", "trivet::x", "trivet:ca:" + strings.Repeat("x", 65)} {
		if _, _, ok := hsm.ParseObjectLabel(l); ok {
			t.Errorf("%q is taken for ours", l)
		}
	}
}

func TestKeyIDsHaveOneSpelling(t *testing.T) {
	id := hsm.NewKeyID()
	if b, err := id.Bytes(); err != nil || hsm.KeyIDOf(b) != id {
		t.Errorf("%s, %v", id, err)
	}
	for _, bad := range []hsm.KeyID{"", "00", hsm.KeyID(strings.ToUpper("aabbccddeeff00112233445566778899")), id + "00", id[:31] + "g"} {
		if _, err := bad.Bytes(); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestOnlyWhatIsListedMaySign(t *testing.T) {
	want := map[string]string{"ca": "ca crl audit", "ocsp": "ocsp", "ceremony": "ca crl"}
	for _, role := range []string{"ca", "ocsp", "hsmd", "lb", "db", "sync", "ceremony", "fsck", "requester", "ra", "ca-operator", "admin", "auditor", "sre", "", "CA"} {
		for _, p := range append(hsm.Purposes(), "", "root") {
			may := p != "" && strings.Contains(" "+want[role]+" ", " "+string(p)+" ")
			if hsm.MaySign(role, p) != may {
				t.Errorf("MaySign(%q, %q) = %v", role, p, !may)
			}
			if challenge := may || role == "sync" && p.Valid(); hsm.MayChallenge(role, p) != challenge {
				t.Errorf("MayChallenge(%q, %q) = %v", role, p, !challenge)
			}
		}
		if hsm.MayManage(role) != (role == "sync" || role == "ceremony") {
			t.Errorf("MayManage(%q)", role)
		}
	}
}

func TestNoTwoChallengesShareADigest(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		draw := func(name string) [5]string {
			var f [5]string
			for i := range f {
				f[i] = rapid.StringMatching(`[ab\x00]{0,3}`).Draw(r, fmt.Sprint(name, i))
			}
			return f
		}
		digest := func(f [5]string) []byte {
			return hsm.ChallengeDigest(hsm.P256, f[0], f[1], f[2], hsm.KeyID(f[3]), []byte(f[4]))
		}
		a, b := draw("a"), draw("b")
		if bytes.Equal(digest(a), digest(b)) != (a == b) {
			r.Fatalf("%q and %q", a, b)
		}
	})
}

func TestErrorsKeepTheirClassWhenWrapped(t *testing.T) {
	err := fmt.Errorf("signing: %w", &hsm.Error{Class: hsm.ClassDevice, Code: "CKR_DEVICE_ERROR", Op: "sign", Err: io.EOF})
	if hsm.ClassOf(err) != hsm.ClassDevice || !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "sign: device (CKR_DEVICE_ERROR): EOF") {
		t.Error(err)
	}
	if hsm.ClassOf(io.EOF) != 0 || hsm.ClassOf(nil) != 0 {
		t.Error("an error of no class has one")
	}
	for c := hsm.ClassSession; c <= hsm.ClassOverloaded; c++ {
		if hsm.ParseClass(c.String()) != c {
			t.Errorf("class %s", c)
		}
	}
}
