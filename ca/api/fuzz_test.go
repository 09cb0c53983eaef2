package api_test

import (
	"encoding/json"
	"strings"
	"testing"

	"trivet/ca/api"
)

// Whatever is let pass says the same to a lax decoder: nothing was understood that the text does not say once and plainly.
func FuzzDecodeIssue(f *testing.F) {
	for _, seed := range []string{
		`{"profile":"tls-server","csr":"x"}`, `{"profile":"a","profile":"b"}`, `{"Profile":"a"}`, `{"subject":{"common_name":"x"}}`, `{"sans":[{"type":"dns","value":"x"}]}`,
		`null`, `[]`, `{}`, `{"a":`, `{"profile":"\ud800"}`, "{\"profile\":\"\xff\"}", `{"not_after":"2027-01-01T00:00:00Z"}`, `{} {}`, strings.Repeat("[", 100),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		profile, csr, name := api.DecodeIssue(body)
		if name != "" {
			return
		}
		var lax map[string]json.RawMessage
		if err := json.Unmarshal(body, &lax); err != nil {
			t.Fatalf("%q passed and is no JSON object: %v", body, err)
		}
		for field, want := range map[string]string{"profile": profile, "csr": csr} {
			var got string
			if raw, ok := lax[field]; ok && json.Unmarshal(raw, &got) == nil && got != want {
				t.Errorf("%q: %s is %q, understood as %q", body, field, got, want)
			}
		}
		for field := range lax {
			if field != strings.ToLower(field) {
				t.Errorf("%q: field %q passed", body, field)
			}
		}
	})
}

// FuzzDecodeBulk throws bodies at the decoder of several requests: what passes has between one and as many as there may be, each under a printable key of its own.
func FuzzDecodeBulk(f *testing.F) {
	for _, seed := range []string{
		`{"requests":[{"idempotency_key":"a","profile":"tls-server","csr":"x"},{"idempotency_key":"b","profile":"tls-server","csr":"x"}]}`,
		`{"requests":[{"idempotency_key":"a","profile":"p","csr":"x"},{"idempotency_key":"a","profile":"p","csr":"x"}]}`, `{"requests":[{"idempotency_key":"\u0000","profile":"p","csr":"x"}]}`,
		`{"requests":[]}`, `{"requests":null}`, `{"requests":[{}]}`, `{"requests":[null]}`, `{"requests":{}}`, `{"requests":[[[[[[[[[`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		keys, ok := api.DecodeBulk(body)
		if !ok {
			return
		}
		seen := map[string]bool{}
		for _, k := range keys {
			if k == "" || len(k) > 255 || seen[k] || strings.ContainsFunc(k, func(c rune) bool { return c < ' ' || c > '~' }) {
				t.Errorf("%q passed with key %q", body, k)
			}
			seen[k] = true
		}
		if len(keys) == 0 || len(keys) > 128 {
			t.Errorf("%d requests passed", len(keys))
		}
	})
}

// FuzzDecodeBlock throws bodies at the decoder of blocked keys: none makes it panic, and what passes names one key.
func FuzzDecodeBlock(f *testing.F) {
	for _, seed := range []string{
		`{"spki_sha256":"` + strings.Repeat("0a", 32) + `","reason":"other","grant":{"request":{"cluster":"c","detail":{"a":"b"}},"approvals":[{"chain":["AA=="],"signature":"AA=="}]}}`,
		`{"certificate":"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"}`, `{"csr":"x","spki_sha256":"y"}`, `{"revoke":1}`, `{}`, `[`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		if spki, ok := api.DecodeBlock(body); ok && len(spki) != 32 {
			t.Fatalf("a key of %d octets", len(spki))
		}
	})
}

func FuzzClientCert(f *testing.F) {
	f.Add(":AAAA:")
	f.Add("::")
	f.Add(":=:")
	f.Fuzz(func(t *testing.T, value string) {
		if api.ParseClientCert([]string{value}) && (!strings.HasPrefix(strings.TrimLeft(value, " "), ":") || strings.Contains(value, ",")) {
			t.Errorf("%q passed", value)
		}
	})
}

func FuzzAccept(f *testing.F) {
	f.Add("application/json;q=0.5, */*;q=0.1")
	f.Add("text/html")
	f.Add(";;;,,,q=")
	f.Fuzz(func(t *testing.T, accept string) {
		switch api.Accepted(accept) {
		case "", "application/json", "application/pem-certificate-chain", "application/pkix-cert":
		default:
			t.Errorf("%q", accept)
		}
	})
}
