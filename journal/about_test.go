package journal

import (
	"encoding/json"
	"testing"
)

// Whatever skim reads, the real decoder reads the same.
func FuzzSkim(f *testing.F) {
	for _, p := range []any{
		Intent{Issuer: "demo-g1", Serial: "0a", TBS: []byte{1, 2, 3}, Takeover: true}, Sign{Issuer: "demo-g1", Serial: "0a", Digest: []byte{1}},
		Done{Issuer: "demo-g1", Serial: "0a", Ver: 2, DER: []byte{1}, Lane: "l", Seq: 7, Kind: DoneCert}, Void{Issuer: "demo-g1", Serial: "0a", Why: `quo"ted`},
		Done{Issuer: "demo-g1", Kind: DoneRevocation, Event: &Revocation{N: 1, Actor: "a{\"b"}}, Done{Issuer: "demo-g1", Seq: 3, Event: &Revocation{Reason: "superseded"}}, CRL{Issuer: "demo-g1", Number: 1 << 63},
	} {
		b, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := skim(b)
		if !ok || !json.Valid(b) {
			return
		}
		var want struct {
			about
			Event, Object json.RawMessage // of other kinds of records
		}
		if json.Unmarshal(b, &want) == nil && a != want.about {
			t.Fatalf("%s: skimmed %+v, decoded %+v", b, a, want)
		}
	})
}
