package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/api"
	"trivet/ca/catest"
)

const bulkPath = "/v1/certificates:batch"

type bulk struct {
	Results []struct {
		Status      int
		Replayed    bool
		Certificate *certificate
		Problem     *struct{ Type, Detail, Field string }
	}
	Chains map[string][]string
}

// bulkBody joins requests; each is an idempotency key and a CSR.
func bulkBody(t *testing.T, requests ...[2]string) string {
	t.Helper()
	items := make([]string, len(requests))
	for i, r := range requests {
		csr, err := json.Marshal(r[1])
		if err != nil {
			t.Fatal(err)
		}
		items[i] = fmt.Sprintf(`{"idempotency_key":%q,"profile":"tls-server","csr":%s}`, r[0], csr)
	}
	return `{"requests":[` + strings.Join(items, ",") + `]}`
}

func TestEachRequestOfABatchHasItsOwnOutcome(t *testing.T) {
	s := newSite(t, nil)
	good := string(catest.CSR(t, "www.example.org"))
	body := bulkBody(t, [2]string{"b1", good}, [2]string{"b2", "nonsense"}, [2]string{"b3", string(catest.CSR(t, "w2.example.org"))},
		[2]string{"b4", string(catest.CSR(t, "www.elsewhere.test"))})
	a := s.call(t, s.public, alice, "POST", bulkPath, body)
	var first bulk
	a.decode(t, &first)
	if a.status != http.StatusMultiStatus || len(first.Results) != 4 || len(first.Chains["demo-g1"]) != 2 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	for i, want := range []int{201, 400, 201, 422} {
		r := first.Results[i]
		if r.Status != want || (r.Certificate != nil) != (want == 201) || (r.Problem != nil) == (want == 201) || r.Replayed {
			t.Errorf("request %d: %+v, want status %d", i, r, want)
		}
	}

	// Repeated, alone or in a batch, each is the same certificate.
	var again bulk
	if a = s.call(t, s.public, alice, "POST", bulkPath, body); a.status != http.StatusMultiStatus {
		t.Fatalf("%d %s", a.status, a.body)
	}
	a.decode(t, &again)
	if c := again.Results[0]; !c.Replayed || c.Certificate == nil || c.Certificate.Certificate != first.Results[0].Certificate.Certificate {
		t.Errorf("the repeat: %+v", c)
	}
	var alone certificate
	a = s.call(t, s.public, alice, "POST", "/v1/certificates", issueBody(t, []byte(good), ""), "Idempotency-Key", "b1")
	if a.decode(t, &alone); a.status != http.StatusCreated || a.header.Get("Idempotency-Replayed") != "true" || alone.Certificate != first.Results[0].Certificate.Certificate {
		t.Errorf("the repeat alone: %d %s", a.status, a.body)
	}
	a = s.call(t, s.public, alice, "POST", bulkPath, bulkBody(t, [2]string{"b3", string(catest.CSR(t, "w3.example.org"))}))
	again = bulk{}
	if a.decode(t, &again); a.status != http.StatusMultiStatus || again.Results[0].Status != http.StatusUnprocessableEntity {
		t.Errorf("another request under a taken key: %d %s", a.status, a.body)
	}
}

func TestAWholeBatchIs200(t *testing.T) {
	s := newSite(t, nil)
	var requests [][2]string
	for i := range 128 {
		requests = append(requests, [2]string{fmt.Sprintf("w%d", i), string(catest.CSR(t, fmt.Sprintf("w%d.example.org", i)))})
	}
	a := s.call(t, s.public, alice, "POST", bulkPath, bulkBody(t, requests...))
	var got bulk
	a.decode(t, &got)
	serials := map[string]bool{}
	for _, r := range got.Results {
		if r.Certificate != nil {
			serials[r.Certificate.Serial] = true
		}
	}
	if a.status != http.StatusOK || len(serials) != 128 {
		t.Errorf("%d, %d serials of 128", a.status, len(serials))
	}
	if len(a.body) > 256<<10 {
		t.Errorf("the answer has %d octets: more than the balancer holds back", len(a.body))
	}
}

func TestABatchThatCannotBeReadIsRefusedWhole(t *testing.T) {
	s := newSite(t, nil)
	csr := string(catest.CSR(t, "www.example.org"))
	var many [][2]string
	for i := range 129 {
		many = append(many, [2]string{fmt.Sprint(i), "x"})
	}
	for name, c := range map[string]struct{ body, field string }{
		"none":        {`{"requests":[]}`, "requests"},
		"too many":    {bulkBody(t, many...), "requests"},
		"no key":      {bulkBody(t, [2]string{"", csr}), "requests[0].idempotency_key"},
		"a key twice": {bulkBody(t, [2]string{"a", csr}, [2]string{"a", csr}), "requests[1].idempotency_key"},
		"no CSR":      {bulkBody(t, [2]string{"a", csr}, [2]string{"b", ""}), "requests[1].csr"},
		"unknown":     {`{"requests":[{"idempotency_key":"a","profile":"tls-server","csr":"x","cn":"y"}]}`, "cn"},
	} {
		if got, field := s.call(t, s.public, alice, "POST", bulkPath, c.body).problem(t); got != "malformed-request" || field != c.field {
			t.Errorf("%s: %s, field %q", name, got, field)
		}
	}
}

// failing issues nothing, or every second request only.
type failing struct {
	api.Issuer
	every bool
}

func (f failing) Issue(ctx context.Context, r ca.Request) (*ca.Issued, error) {
	if f.every || r.IdempotencyKey == "u1" {
		return nil, &ca.Error{Name: ca.HSMUnavailable, Detail: "no HSM could sign", RetryAfter: time.Second}
	}
	return f.Issuer.Issue(ctx, r)
}

func TestABatchOfWhichNothingCanBeIssuedIsUnavailable(t *testing.T) {
	for _, every := range []bool{true, false} {
		s := newSite(t, func(c *api.Config) { c.Issuer = failing{c.Issuer, every} })
		a := s.call(t, s.public, alice, "POST", bulkPath, bulkBody(t, [2]string{"u1", string(catest.CSR(t, "w1.example.org"))}, [2]string{"u2", string(catest.CSR(t, "w2.example.org"))}))
		if every {
			if name, _ := a.problem(t); a.status != http.StatusServiceUnavailable || name != "hsm-unavailable" || a.header.Get("Retry-After") != "1" {
				t.Errorf("%d %s", a.status, a.body)
			}
			continue
		}
		var got bulk
		if a.decode(t, &got); a.status != http.StatusMultiStatus || got.Results[0].Status != 503 || got.Results[1].Status != 201 {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
}
