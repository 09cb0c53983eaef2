package custody_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"trivet/hsmsync/custody"
)

func split(t rapid.TB, secret []byte, shares, threshold int) []custody.Share {
	t.Helper()
	out, err := custody.Split(secret, shares, threshold)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestFieldIsTheOneOfAES(t *testing.T) {
	if got := custody.Mul(0x57, 0x83); got != 0xc1 { // FIPS 197, 4.2
		t.Errorf("57·83 = %x", got)
	}
	slow := func(a, b byte) (p byte) { // long multiplication, then reduction
		wide := uint16(0)
		for i := range 8 {
			if b>>i&1 == 1 {
				wide ^= uint16(a) << i
			}
		}
		for i := 15; i >= 8; i-- {
			if wide>>i&1 == 1 {
				wide ^= 0x11b << (i - 8)
			}
		}
		return byte(wide)
	}
	for a := range 256 {
		for b := range 256 {
			if got, want := custody.Mul(byte(a), byte(b)), slow(byte(a), byte(b)); got != want {
				t.Fatalf("%x·%x = %x, want %x", a, b, got, want)
			}
		}
		if inv := custody.Inverse(byte(a)); a > 0 && custody.Mul(byte(a), inv) != 1 || a == 0 && inv != 0 {
			t.Fatalf("1/%x = %x", a, inv)
		}
	}
}

// set draws a secret and its shares in some order.
func set(t *rapid.T) (secret []byte, threshold int, shares []custody.Share) {
	count := rapid.IntRange(custody.MinThreshold, custody.MaxShares).Draw(t, "shares")
	threshold = rapid.IntRange(custody.MinThreshold, count).Draw(t, "threshold")
	secret = rapid.SliceOfN(rapid.Byte(), 16, 64).Draw(t, "secret")
	return secret, threshold, rapid.Permutation(split(t, secret, count, threshold)).Draw(t, "order")
}

func TestAnyThresholdOfSharesGivesTheSecretAndFewerNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		secret, threshold, shares := set(t)
		given := rapid.IntRange(0, len(shares)).Draw(t, "given")
		got, err := custody.Join(shares[:given])
		switch {
		case given >= threshold && (err != nil || !bytes.Equal(got, secret)):
			t.Fatalf("%d of %d shares gave %x, %v", given, threshold, got, err)
		case given < threshold && (err == nil || got != nil):
			t.Fatalf("%d of %d shares gave %x", given, threshold, got)
		}
	})
}

func TestWrongSharesAreNamedWhenThereIsOneMoreThanNeeded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		_, threshold, shares := set(t)
		wrong := rapid.IntRange(1, len(shares)).Draw(t, "wrong")
		for i := range wrong {
			shares[i] = shares[i].Alter()
		}
		shares = rapid.Permutation(shares).Draw(t, "order again")
		_, err := custody.Join(shares)
		if err == nil {
			t.Fatal("joined with wrong shares")
		}
		if len(shares)-wrong < threshold {
			if !strings.Contains(err.Error(), "at least one of them is wrong") {
				t.Fatal(err)
			}
			return
		}
		if n := strings.Count(err.Error(), "(index "); n != wrong {
			t.Fatalf("%d are wrong, named are %d: %v", wrong, n, err)
		}
	})
}

func TestJoinNamesWhatDoesNotBelong(t *testing.T) {
	s := split(t, bytes.Repeat([]byte{7}, 32), 5, 3)
	same := split(t, bytes.Repeat([]byte{7}, 32), 5, 3) // of the same secret, and yet another set
	for name, c := range map[string]struct {
		shares []custody.Share
		want   string
	}{
		"none":                     {nil, "there are none"},
		"an empty one":             {[]custody.Share{s[0], {}}, "share 2 is empty"},
		"too few":                  {s[1:3], "3 are needed"},
		"one twice":                {[]custody.Share{s[0], s[4], s[1], s[4]}, "share 4 is share 2 again (index 5)"},
		"one twice and altered":    {[]custody.Share{s[0], s[4], s[4].Alter()}, "shares 2 and 3 both have index 5 and differ"},
		"one of another set":       {[]custody.Share{s[0], s[1], same[2]}, "share 3 is of set " + same[0].Set()},
		"a wrong one":              {[]custody.Share{s[0], s[1].Alter(), s[2]}, "at least one of them is wrong"},
		"a wrong one, and a spare": {[]custody.Share{s[0], s[1].Alter(), s[2], s[3]}, "wrong of set " + s[0].Set() + ": share 2 (index 2);"},
		"a wrong spare":            {[]custody.Share{s[0], s[1], s[2], s[3].Alter()}, "share 4 (index 4)"},
	} {
		if got, err := custody.Join(c.shares); err == nil || got != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %x, %v; want %q", name, got, err, c.want)
		}
	}
}

func TestSplitRefusesWhatWouldKeepNoSecret(t *testing.T) {
	for name, c := range map[string]struct{ octets, shares, threshold int }{
		"one is enough": {32, 3, 1}, "none is needed": {32, 3, 0}, "more than there are": {32, 2, 3}, "too many": {32, 17, 2},
		"no secret": {0, 3, 2}, "a short one": {15, 3, 2}, "a long one": {65, 3, 2}, "negative": {32, 3, -1},
	} {
		if got, err := custody.Split(make([]byte, c.octets), c.shares, c.threshold); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A share by itself says nothing about the secret: it is another one in every split of the same.
func TestOneShareIsRandom(t *testing.T) {
	seen := map[string]bool{}
	const n = 200
	for range n {
		s := split(t, make([]byte, 32), 2, 2)
		seen[strings.Split(s[0].Text(), ":")[5][40:]] = true // what follows the hash
	}
	if len(seen) != n {
		t.Errorf("%d different shares of %d", len(seen), n)
	}
}

func TestTextComesBackAsPeopleTypeIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		_, _, shares := set(t)
		text := shares[0].Text()
		typed := rapid.Map(rapid.SliceOfN(rapid.SampledFrom([]string{"", " ", "-", "\t"}), len(text), len(text)), func(fill []string) string {
			fields := strings.SplitN(text, ":", 7)
			for i := range fields[5] {
				fields[0] += string(fields[5][i]) + fill[i]
			}
			fields[5], fields[0] = fields[0][len("trivet-share-1"):], "trivet-share-1"
			return strings.Join(fields, ":")
		}).Draw(t, "typed")
		if rapid.Bool().Draw(t, "upper case") {
			typed = strings.ToUpper(typed)
		}
		if rapid.Bool().Draw(t, "lookalikes") {
			fields := strings.SplitN(typed, ":", 7)
			fields[5] = strings.NewReplacer("0", "O", "1", "l").Replace(fields[5])
			typed = strings.Join(fields, ":")
		}
		got, err := custody.ParseShare(" " + typed + "\n")
		if err != nil || got.Text() != text {
			t.Fatalf("%q: %v, %v", typed, got, err)
		}
	})
}

func TestEveryMistypedSignIsFound(t *testing.T) {
	text := split(t, bytes.Repeat([]byte{7}, 32), 3, 2)[1].Text()
	for i := range text {
		for _, c := range "0123456789abcdefghjkmnpqrstuvwxyz:-" {
			typed := text[:i] + string(c) + text[i+1:]
			if got, err := custody.ParseShare(typed); err == nil && got.Text() != text {
				t.Errorf("%q was read as %q", typed, got.Text())
			}
		}
		for _, typed := range []string{text[:i], text[i+1:], text[:i] + text[i+1:], text[:i] + "x" + text[i:]} {
			if got, err := custody.ParseShare(typed); err == nil && got.Text() != text {
				t.Errorf("%q was read as %q", typed, got.Text())
			} else if err != nil && len(typed) > 60 && strings.Contains(err.Error(), text[40:60]) {
				t.Errorf("the error shows the secret: %v", err)
			}
		}
	}
}

func TestParseSharesNamesTheLine(t *testing.T) {
	s := split(t, bytes.Repeat([]byte{7}, 32), 3, 2)
	got, err := custody.ParseShares("# anne\n" + s[0].Text() + "\n\n  " + s[2].Text() + "  ")
	if err != nil || len(got) != 2 || got[1].Index() != 3 {
		t.Fatal(got, err)
	}
	bad := []byte(s[1].Text())
	bad[30] = map[bool]byte{true: 'b', false: 'a'}[bad[30] == 'a']
	if _, err := custody.ParseShares(s[0].Text() + "\n" + string(bad)); err == nil || !strings.Contains(err.Error(), "line 2: reading share 2 of set "+s[0].Set()) {
		t.Error(err)
	}
	if _, err := custody.ParseShares(strings.Repeat(s[0].Text()+"\n", 17)); err == nil || !strings.Contains(err.Error(), "line 17") {
		t.Error(err)
	}
}

func TestAShareIsNotPrintedByAccident(t *testing.T) {
	s := split(t, bytes.Repeat([]byte{7}, 32), 3, 2)[0]
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("got", "share", s)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("got", "share", s)
	text, _ := json.Marshal([]any{s})
	all := fmt.Sprintf("%v %+v %#v %s %s %s", s, s, s, s, text, log.String())
	for _, part := range strings.Split(strings.Split(s.Text(), ":")[5], "-")[4:] {
		if strings.Contains(all, part) {
			t.Errorf("%q is shown in %s", part, all)
		}
	}
}

// Shares that lie in safes for years must be read by every later version.
func TestSharesOfTheFirstVersionAreRead(t *testing.T) {
	shares, err := custody.ParseShares(firstShares)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := custody.Join(shares); err != nil || string(got) != "thirty-two octets of a secret..." {
		t.Errorf("%q, %v", got, err)
	}
}

const firstShares = `trivet-share-1:ytv4w148:5:3:5:6d7vvzr-m3qte62-nhs9ygw-ky9gybe-9gb2cfb-xvmwmy9-4k04c5s-5kekrvq-1wmk9d8-ygg8mke-wptjtaw-2aawb90:aq13r3g
trivet-share-1:ytv4w148:1:3:5:6d7vvzr-m3qte62-nhs9ygw-ky9gybe-9gb22d9-3neetzp-h67130r-r9wvkr9-0tcyyaq-3g6n1ah-1yzfyck-tswzhd0:xbxgj5r
trivet-share-1:ytv4w148:3:3:5:6d7vvzr-m3qte62-nhs9ygw-ky9gybe-9gb2hx7-ntq5xk4-2w4vs1t-ckvk2wc-6394k65-ccfjm6q-ppqw9jg-2z4vbb0:dhc054g`

func FuzzParseShare(f *testing.F) {
	f.Add(split(f, bytes.Repeat([]byte{7}, 32), 3, 2)[0].Text())
	f.Add(split(f, bytes.Repeat([]byte{7}, 64), 16, 16)[15].Text())
	f.Add("trivet-share-1:aaaaaaaa:1:2:3:x:y")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := custody.ParseShare(text)
		if err != nil {
			return
		}
		again, err := custody.ParseShare(s.Text())
		if err != nil || again.Text() != s.Text() || s.Index() < 1 || s.Index() > s.Count() || s.Threshold() > s.Count() {
			t.Fatalf("%q: %v, %v", text, s, err)
		}
	})
}
