package journal_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trivet/journal"
)

func record(t testing.TB, payload any) journal.Record {
	t.Helper()
	r, err := journal.New(payload)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func done(lane string, seq uint64, kind string) journal.Done {
	return journal.Done{Issuer: "demo-g1", Serial: fmt.Sprintf("%s%04x", lane, seq), Ver: 1, Lane: lane, Seq: seq, Kind: kind}
}

func TestSelectFindsWhatIsAskedForAndNothingElse(t *testing.T) {
	clock := time.Unix(1000, 0)
	cfg := config(filepath.Join(t.TempDir(), "j"))
	cfg.SegmentSize = 2000
	cfg.Now = func() time.Time { return clock }
	j := open(t, cfg)
	for seq := uint64(1); seq <= 30; seq++ {
		clock = clock.Add(time.Second)
		kind := journal.DoneCert
		if seq%10 == 0 {
			kind = journal.DoneRevocation
		}
		if err := j.Append(record(t, journal.Sign{Issuer: "demo-g1", Serial: fmt.Sprintf("aa%04x", seq)}), record(t, done("aa", seq, kind)), record(t, done("bb", 31-seq, kind)),
			record(t, journal.CRL{Issuer: "demo-g1", Number: seq})); err != nil {
			t.Fatal(err)
		}
		if seq == 4 {
			if err := j.Append(record(t, journal.Audit{Event: "revoke", Object: "demo-g1:aa0005"}), record(t, journal.Audit{Event: "other", Object: "aa0005"})); err != nil {
				t.Fatal(err)
			}
		}
	}
	at := func(seq int) time.Time { return time.Unix(1000+int64(seq), 0) }
	for name, c := range map[string]struct {
		q    journal.Query
		want string
	}{
		"a lane's end":             {journal.Query{Lane: "aa", After: 27}, "done aa001c, done aa001d, done aa001e"},
		"a lane written backwards": {journal.Query{Lane: "bb", After: 28}, "done bb001e, done bb001d"},
		"nothing after the end":    {journal.Query{Lane: "aa", After: 30}, ""},
		"no such lane":             {journal.Query{Lane: "cc"}, ""},
		"revocations":              {journal.Query{Done: []string{journal.DoneRevocation}, Lane: "aa"}, "done aa000a, done aa0014, done aa001e"},
		"revocations since":        {journal.Query{Done: []string{journal.DoneRevocation}, Since: at(30)}, "done aa001e, done bb0001"},
		"CRLs and revocations since": {journal.Query{Kinds: []journal.Kind{journal.KindCRL, journal.KindDone}, Done: []string{journal.DoneRevocation}, Since: at(29)},
			"crl 29, done aa001e, done bb0001, crl 30"},
		"CRLs within a time":        {journal.Query{Kinds: []journal.Kind{journal.KindCRL}, Since: at(7), Until: at(9)}, "crl 7, crl 8"},
		"a serial":                  {journal.Query{Serial: "aa0005"}, "audit , sign aa0005, done aa0005"},
		"an event":                  {journal.Query{Event: "revoke"}, "audit "},
		"an event that never was":   {journal.Query{Event: "release"}, ""},
		"a kind that is not a done": {journal.Query{Kinds: []journal.Kind{journal.KindCRL}, Lane: "aa"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			if err := j.Select(c.q, func(e journal.Entry) error {
				var p struct {
					Serial string
					Number uint64
				}
				if err := e.Decode(&p); err != nil {
					return err
				}
				if e.Kind == journal.KindCRL {
					p.Serial = fmt.Sprint(p.Number)
				}
				got = append(got, e.Kind.String()+" "+p.Serial)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if strings.Join(got, ", ") != c.want {
				t.Errorf("got %q, want %q", strings.Join(got, ", "), c.want)
			}
		})
	}
}
