package custody_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync/custody"
)

// made is what tests share, because RSA keys take a second each.
var made = sync.OnceValue(func() (m struct {
	recipient, other custody.Recipient
	shares, others   []custody.Share
	member           *rsa.PrivateKey
	err              error
}) {
	if m.recipient, m.shares, m.err = custody.NewRecipient(5, 3); m.err != nil {
		return m
	}
	if m.other, m.others, m.err = custody.NewRecipient(2, 2); m.err != nil {
		return m
	}
	m.member, m.err = rsa.GenerateKey(rand.Reader, 3072)
	return m
})

var kek, mac = bytes.Repeat([]byte{0xaa}, 32), bytes.Repeat([]byte{0xbb}, 32)

// wrap is what a token does.
func wrap(t testing.TB, spki []byte, halves ...[]byte) (out []byte) {
	t.Helper()
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range halves {
		w, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, key.(*rsa.PublicKey), h, nil)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, w...)
	}
	return out
}

func blob(t testing.TB, label string) (hsm.KeyRecord, hsm.Blob) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	spec := hsm.KeySpec{ID: hsm.NewKeyID(), Label: label, Purpose: hsm.PurposeCA, Algorithm: hsm.P256}
	b := hsm.Blob{KeySpec: spec, SPKI: spki, KEK: "main-1", Wrapped: make([]byte, 80)}
	seal(&b)
	return hsm.KeyRecord{KeySpec: spec, SPKI: spki, Extractable: true, Attributes: "ab"}, b
}

func seal(b *hsm.Blob) {
	h := hmac.New(sha256.New, mac)
	h.Write(b.Authenticated())
	b.MAC = h.Sum(nil)
}

// bundle is a good one with two keys.
func bundle(t testing.TB) custody.Bundle {
	t.Helper()
	m := made()
	if m.err != nil {
		t.Fatal(m.err)
	}
	b := custody.Bundle{
		Cluster: "lab", Group: "main", Created: time.Now(), Policy: json.RawMessage(`{"min_copies": 2, "note": "a<b"}`),
		Domain: "main-1", Wrapped: wrap(t, m.recipient.SPKI, kek, mac), Recipient: m.recipient,
	}
	for _, label := range []string{"root-g1", "demo-g1"} {
		k, w := blob(t, label)
		b.Keys, b.Blobs = append(b.Keys, k), append(b.Blobs, w)
	}
	b.Version = 1
	return b
}

func encode(t testing.TB, b custody.Bundle) []byte {
	t.Helper()
	text, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestABackupIsRestoredByItsCustodians(t *testing.T) {
	m, b := made(), bundle(t)
	back, err := custody.ParseBundle(encode(t, b))
	if err != nil {
		t.Fatal(err)
	}
	if len(back.Digest) != 64 || fmt.Sprint(back.Keys) != fmt.Sprint(b.Keys) || fmt.Sprint(back.Blobs) != fmt.Sprint(b.Blobs) {
		t.Errorf("it came back as %+v", back)
	}
	for _, shares := range [][]custody.Share{m.shares[:3], {m.shares[4], m.shares[0], m.shares[2]}, m.shares} {
		u, err := custody.Unlock(back, shares)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		spki, _ := x509.MarshalPKIXPublicKey(m.member.Public())
		for range 2 { // members are several
			wrapped, err := u.WrapFor(spki)
			if err != nil || len(wrapped) != 768 {
				t.Fatal(len(wrapped), err)
			}
			for i, want := range [][]byte{kek, mac} {
				got, err := rsa.DecryptOAEP(sha1.New(), nil, m.member, wrapped[i*384:][:384], nil)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("half %d: %x, %v", i, got, err)
				}
			}
		}
		for name, bad := range map[string][]byte{"nothing": nil, "an EC key": b.Keys[0].SPKI, "junk": []byte("junk"), "a short RSA key": shortRSA(t)} {
			if _, err := u.WrapFor(bad); err == nil {
				t.Errorf("wrapped for %s", name)
			}
		}
		u.Close()
		u.Close()
		if _, err := u.WrapFor(spki); err == nil || !strings.Contains(err.Error(), "closed") {
			t.Error("wrapped after the end:", err)
		}
	}
}

func shortRSA(t *testing.T) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return spki
}

func TestUnlockRefuses(t *testing.T) {
	m := made()
	three := m.shares[:3]
	for name, c := range map[string]struct {
		change func(*custody.Bundle)
		shares []custody.Share
		want   string
	}{
		"two of three":            {nil, m.shares[:2], "3 are needed"},
		"nobody":                  {nil, nil, "there are none"},
		"one of another backup":   {nil, []custody.Share{m.shares[0], m.others[1], m.shares[2]}, "share 2 (index 2) is of set " + m.other.Set.ID},
		"a wrong one":             {nil, []custody.Share{m.shares[0], m.shares[1], m.shares[2].Alter()}, "share 3 (index 3) of set " + m.recipient.Set.ID + " is wrong"},
		"two wrong ones":          {nil, []custody.Share{m.shares[0].Alter(), m.shares[1], m.shares[2].Alter()}, "is wrong: it is not the one that was handed out; share 3"},
		"one twice":               {nil, []custody.Share{m.shares[0], m.shares[1], m.shares[0]}, "share 3 is share 1 again"},
		"an altered seal":         {func(b *custody.Bundle) { b.Recipient.Sealed = flip(b.Recipient.Sealed) }, three, "the recipient was altered"},
		"an altered threshold":    {func(b *custody.Bundle) { b.Recipient.Set.Threshold = 2 }, three, "the recipient was altered"},
		"another public key":      {func(b *custody.Bundle) { b.Recipient.SPKI = m.other.SPKI }, three, "the recipient was altered"},
		"another recipient":       {func(b *custody.Bundle) { b.Recipient = m.other }, three, "not of " + m.other.Set.ID},
		"wrapped to another":      {func(b *custody.Bundle) { b.Wrapped = wrap(t, m.other.SPKI, kek, mac) }, three, "wrapped to another one"},
		"wrapped and damaged":     {func(b *custody.Bundle) { b.Wrapped = flip(b.Wrapped) }, three, "or damaged"},
		"short halves":            {func(b *custody.Bundle) { b.Wrapped = wrap(t, m.recipient.SPKI, kek[:16], mac) }, three, "does not open"},
		"halves changed about":    {func(b *custody.Bundle) { b.Wrapped = wrap(t, m.recipient.SPKI, mac, kek) }, three, "was altered: nothing is restored"},
		"a blob of other content": {func(b *custody.Bundle) { b.Blobs[1].Wrapped = make([]byte, 88) }, three, "demo-g1) was not made with this domain key"},
		"a key for another use": {func(b *custody.Bundle) {
			b.Keys[1].Purpose, b.Blobs[1].Purpose = hsm.PurposeOCSP, hsm.PurposeOCSP
		}, three, "was altered"},
	} {
		b := bundle(t)
		if c.change != nil {
			c.change(&b)
		}
		if u, err := custody.Unlock(b, c.shares); err == nil || u != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)/3] ^= 4
	return b
}

func TestABundleThatCannotBeRestoredIsNotWritten(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*custody.Bundle)
		want   string
	}{
		"no cluster":                           {func(b *custody.Bundle) { b.Cluster = "" }, "cluster"},
		"no group":                             {func(b *custody.Bundle) { b.Group = "" }, "group"},
		"no time":                              {func(b *custody.Bundle) { b.Created = time.Time{} }, "created"},
		"no policy":                            {func(b *custody.Bundle) { b.Policy = nil }, "policy"},
		"a policy that is no object":           {func(b *custody.Bundle) { b.Policy = json.RawMessage("3") }, "policy"},
		"no domain":                            {func(b *custody.Bundle) { b.Domain = "" }, "domain key name"},
		"no domain key":                        {func(b *custody.Bundle) { b.Wrapped = nil }, "must be 768"},
		"no recipient":                         {func(b *custody.Bundle) { b.Recipient = custody.Recipient{} }, "recipient spki"},
		"nothing sealed":                       {func(b *custody.Bundle) { b.Recipient.Sealed = nil }, "sealed"},
		"a recipient without set":              {func(b *custody.Bundle) { b.Recipient.Set = custody.Set{} }, "share set"},
		"a key without blob":                   {func(b *custody.Bundle) { b.Blobs = b.Blobs[:1] }, "demo-g1) has no blob"},
		"a blob without key":                   {func(b *custody.Bundle) { b.Keys = b.Keys[:1] }, "does not match the list of keys"},
		"a blob twice":                         {func(b *custody.Bundle) { b.Blobs = append(b.Blobs, b.Blobs[0]) }, "or is there twice"},
		"a key twice":                          {func(b *custody.Bundle) { b.Keys = append(b.Keys, b.Keys[0]) }, "is there twice"},
		"a blob of another domain":             {func(b *custody.Bundle) { b.Blobs[0].KEK = "main-2" }, "wrapped with domain key main-2"},
		"a blob of another key":                {func(b *custody.Bundle) { b.Blobs[0].SPKI = b.Blobs[1].SPKI }, "does not match the list of keys"},
		"a blob without MAC":                   {func(b *custody.Bundle) { b.Blobs[0].MAC = nil }, "mac of 0 octets"},
		"a foreign object":                     {func(b *custody.Bundle) { b.Keys[0].Foreign = true }, "not a key of the group"},
		"a broken key":                         {func(b *custody.Bundle) { b.Keys[0].Fault = "x" }, "not a key of the group"},
		"a probe key":                          {func(b *custody.Bundle) { b.Keys[0].Purpose = hsm.PurposeProbe }, "not a key of the group"},
		"a key that is none":                   {func(b *custody.Bundle) { b.Keys[0].SPKI = []byte("x") }, "parsing public key"},
		"a key of another kind":                {func(b *custody.Bundle) { b.Keys[0].Algorithm = hsm.P384 }, "is P-256, not P-384"},
		"a retired key without blob or reason": {func(b *custody.Bundle) { b.Blobs, b.Retired = b.Blobs[:1], []hsm.KeyID{b.Keys[1].ID} }, "nothing says why"},
		"a live key with a reason for its absence": {func(b *custody.Bundle) {
			b.Blobs, b.Missing = b.Blobs[:1], map[hsm.KeyID]string{b.Keys[1].ID: "lost"}
		}, "demo-g1) has no blob"},
		"a key that is there and missing":  {func(b *custody.Bundle) { b.Missing = map[hsm.KeyID]string{b.Keys[1].ID: "lost"} }, "is said to be missing"},
		"a retired key that is not listed": {func(b *custody.Bundle) { b.Retired = []hsm.KeyID{hsm.NewKeyID()} }, "retired key"},
		"a key retired twice":              {func(b *custody.Bundle) { b.Retired = []hsm.KeyID{b.Keys[1].ID, b.Keys[1].ID} }, "retired key"},
	} {
		b := bundle(t)
		c.change(&b)
		if _, err := b.Encode(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	// A retired key of which no copy is left has none either, and the backup says so.
	lost := bundle(t)
	lost.Blobs, lost.Retired = lost.Blobs[:1], []hsm.KeyID{lost.Keys[1].ID}
	lost.Missing = map[hsm.KeyID]string{lost.Keys[1].ID: "nobody holds it"}
	if got, err := custody.ParseBundle(encode(t, lost)); err != nil {
		t.Error(err)
	} else if held, why := got.Holds(lost.Keys[1].ID); held || why != "nobody holds it" || !got.IsRetired(lost.Keys[1].ID) {
		t.Errorf("%v %q", held, why)
	}
	// A key that cannot leave its token has no blob, and is still listed.
	b := bundle(t)
	b.Keys[1].NonExtractable, b.Keys[1].Extractable = true, false
	b.Blobs = b.Blobs[:1]
	if got, err := custody.ParseBundle(encode(t, b)); err != nil || len(got.Keys) != 2 || len(got.Blobs) != 1 {
		t.Error(err)
	}
}

func TestADamagedBundleIsRefused(t *testing.T) {
	text := encode(t, bundle(t))
	var compact bytes.Buffer
	if err := json.Compact(&compact, text); err != nil {
		t.Fatal(err)
	}
	if _, err := custody.ParseBundle(compact.Bytes()); err != nil {
		t.Error("written another way it is the same:", err)
	}
	for name, bad := range map[string]string{
		"empty": "", "cut": string(text[:len(text)-2]), "more": string(text) + "{}",
		"an unknown field": strings.Replace(string(text), `"domain"`, `"domains"`, 1),
		"another version":  strings.Replace(string(text), `"version": 1`, `"version": 2`, 1),
		"another label":    strings.ReplaceAll(string(text), "demo-g1", "demo-g2"),
		"another policy":   strings.Replace(string(text), `"min_copies": 2`, `"min_copies": 1`, 1),
		"another time":     strings.Replace(string(text), `"created": "20`, `"created": "21`, 1),
		"no digest":        strings.Replace(string(text), `"digest": "`, `"digest": "0`, 1),
		"huge":             string(text) + strings.Repeat(" ", custody.MaxBundle),
	} {
		if b, err := custody.ParseBundle([]byte(bad)); err == nil {
			t.Errorf("%s: read as %+v", name, b)
		}
	}
}

func TestRecipientIsReadStrictly(t *testing.T) {
	m := made()
	text, err := json.Marshal(m.recipient)
	if err != nil {
		t.Fatal(err)
	}
	r, err := custody.ParseRecipient(text)
	if sum := sha256.Sum256(m.recipient.SPKI); err != nil || r.Fingerprint() != fmt.Sprintf("%x", sum) {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"nothing": "", "more": string(text) + "1", "an unknown field": strings.Replace(string(text), "sealed", "seal", 1),
		"another set id": strings.Replace(string(text), `"id":"`, `"id":"x`, 1), "a threshold of one": strings.Replace(string(text), `"threshold":3`, `"threshold":1`, 1),
		"a threshold out of reach": strings.Replace(string(text), `"threshold":3`, `"threshold":6`, 1),
	} {
		if _, err := custody.ParseRecipient([]byte(bad)); err == nil {
			t.Errorf("%s: read", name)
		}
	}
	for _, c := range [][2]int{{1, 1}, {2, 3}, {17, 2}} {
		if _, _, err := custody.NewRecipient(c[0], c[1]); err == nil {
			t.Errorf("%d of %d", c[1], c[0])
		}
	}
}

func FuzzParseBundle(f *testing.F) {
	f.Add(encode(f, bundle(f)))
	f.Add([]byte(`{"version":1,"policy":{},"keys":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := custody.ParseBundle(text)
		if err != nil {
			return
		}
		again, err := custody.ParseBundle(encode(t, b))
		if err != nil {
			t.Fatal(err)
		}
		if again.Domain != b.Domain || len(again.Keys) != len(b.Keys) || !bytes.Equal(again.Wrapped, b.Wrapped) {
			t.Fatalf("%s became another backup", text)
		}
	})
}

func FuzzParseRecipient(f *testing.F) {
	text, _ := json.Marshal(made().recipient)
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		if r, err := custody.ParseRecipient(text); err == nil && r.Check() != nil {
			t.Fatal("not checked")
		}
	})
}
