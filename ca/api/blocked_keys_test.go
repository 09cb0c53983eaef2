package api_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"strings"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/identity"
)

var otto = person(identity.RoleCAOperator, "otto")

type blockedKey struct {
	SPKI         string `json:"spki_sha256"`
	Sequence     int
	Reason       string
	Certificates []struct{ ID, Status, Reason string }
	Failed       []struct{ ID, Problem string }
}

// grant has people approve that by blocks a key.
func (s *site) grant(t *testing.T, by identity.Principal, q ca.BlockRequest, approvers ...identity.Principal) identity.Grant {
	t.Helper()
	action, object, detail := q.Approval()
	g := identity.Grant{Request: identity.NewRequest(by, action, object, detail, time.Now(), time.Hour), Approvals: []identity.Approval{}}
	for _, p := range approvers {
		a, err := s.identity(t, p).Approve(g.Request, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		g.Approvals = append(g.Approvals, a)
	}
	return g
}

func blockJSON(t *testing.T, fields map[string]any) string {
	t.Helper()
	text, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestTwoOperatorsBlockAKey(t *testing.T) {
	s := newSite(t, nil)
	csr := catest.CSR(t, "www.example.org")
	issued := s.call(t, s.public, alice, "POST", "/v1/certificates", issueBody(t, csr, ""), "Idempotency-Key", "k1")
	var cert struct{ ID, Certificate, Status string }
	issued.decode(t, &cert)
	var of struct {
		SPKI string `json:"spki_sha256"`
	}
	issued.decode(t, &of)
	spki, err := hex.DecodeString(of.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	q := ca.BlockRequest{SPKI: spki, Reason: "keyCompromise", Comment: "found on a paste site", Revoke: true}
	fields := func(change map[string]any) string {
		all := map[string]any{"spki_sha256": of.SPKI, "reason": q.Reason, "comment": q.Comment, "revoke": true, "grant": s.grant(t, olga, q, otto)}
		for k, v := range change {
			if all[k] = v; v == nil {
				delete(all, k)
			}
		}
		return blockJSON(t, all)
	}
	block := func(by identity.Principal, body string) answer {
		return s.call(t, s.admin, by, "POST", "/v1/blocked-keys", body)
	}

	elsewhere := q
	elsewhere.SPKI = make([]byte, 32)
	for name, c := range map[string]struct {
		by          identity.Principal
		body        string
		name, field string
	}{
		"without a grant":              {olga, fields(map[string]any{"grant": nil}), ca.Forbidden, "grant"},
		"alone":                        {olga, fields(map[string]any{"grant": s.grant(t, olga, q)}), ca.Forbidden, "grant"},
		"for another key":              {olga, fields(map[string]any{"grant": s.grant(t, olga, elsewhere, otto)}), ca.Forbidden, "grant"},
		"without revoking":             {olga, fields(map[string]any{"revoke": false}), ca.Forbidden, "grant"},
		"with another comment":         {olga, fields(map[string]any{"comment": "x"}), ca.Forbidden, "grant"},
		"proposed by somebody else":    {otto, fields(map[string]any{"grant": s.grant(t, olga, q, otto)}), ca.Forbidden, "grant"},
		"approved by an administrator": {olga, fields(map[string]any{"grant": s.grant(t, olga, q, person(identity.RoleAdmin, "ada"))}), ca.Forbidden, "grant"},
		"two keys":                     {olga, fields(map[string]any{"csr": string(csr)}), ca.MalformedRequest, "spki_sha256"},
		"no key":                       {olga, fields(map[string]any{"spki_sha256": nil}), ca.MalformedRequest, "spki_sha256"},
		"a short hash":                 {olga, fields(map[string]any{"spki_sha256": "00"}), ca.MalformedRequest, "spki_sha256"},
		"no PEM":                       {olga, fields(map[string]any{"spki_sha256": nil, "certificate": "x"}), ca.MalformedRequest, "certificate"},
	} {
		a := block(c.by, c.body)
		if got, field := a.problem(t); got != c.name || field != c.field {
			t.Errorf("%s: %d %s in %s: %s", name, a.status, got, field, a.body)
		}
	}

	var got blockedKey
	for _, change := range []map[string]any{nil, {"spki_sha256": nil, "certificate": cert.Certificate}, {"spki_sha256": nil, "csr": string(csr)}} {
		a := block(olga, fields(change))
		if a.decode(t, &got); a.status != http.StatusOK || got.SPKI != of.SPKI || got.Sequence != 2 || len(got.Certificates) != 1 || len(got.Failed) != 0 ||
			got.Certificates[0].ID != cert.ID || got.Certificates[0].Status != "revoked" || got.Certificates[0].Reason != "keyCompromise" {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	again := s.call(t, s.public, alice, "POST", "/v1/certificates", issueBody(t, csr, ""), "Idempotency-Key", "k2")
	if name, _ := again.problem(t); again.status != http.StatusUnprocessableEntity || name != ca.BlockedKey {
		t.Errorf("a new certificate for the key: %d %s", again.status, again.body)
	}
	carls := person(identity.RoleAuditor, "carl")
	var list struct {
		Keys []blockedKey `json:"blocked_keys"`
	}
	s.call(t, s.admin, carls, "GET", "/v1/blocked-keys?limit=10", "").decode(t, &list)
	if len(list.Keys) != 1 || list.Keys[0].SPKI != of.SPKI {
		t.Errorf("list: %+v", list)
	}
	s.call(t, s.admin, carls, "GET", "/v1/blocked-keys/"+of.SPKI, "").decode(t, &got)
	if len(got.Certificates) != 1 {
		t.Errorf("shown: %+v", got)
	}
	if a := s.call(t, s.admin, carls, "GET", "/v1/blocked-keys/"+strings.Repeat("0", 64), ""); a.status != http.StatusNotFound {
		t.Errorf("a key that is not blocked: %d", a.status)
	}
	if a := s.call(t, s.admin, carls, "GET", "/v1/blocked-keys?cursor="+of.SPKI+"&limit=1", ""); a.status != http.StatusOK || strings.Contains(string(a.body), of.SPKI) {
		t.Errorf("after the last: %d %s", a.status, a.body)
	}

	demo, _ := s.node.Engine.Authorities().Issuer("demo-g1")
	sum := sha256.Sum256(demo.SPKI)
	own := ca.BlockRequest{SPKI: sum[:], Reason: "other"}
	a := block(olga, blockJSON(t, map[string]any{
		"certificate": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: demo.Certificate.Raw})), "reason": "other", "grant": s.grant(t, olga, own, otto),
	}))
	if name, _ := a.problem(t); name != ca.KeyNotPermitted {
		t.Errorf("a CA's own key: %d %s", a.status, a.body)
	}
}
