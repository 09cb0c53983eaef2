package api_test

import (
	"bytes"
	"net/http"
	"slices"
	"strings"
	"testing"

	"trivet/ca/api"
)

func TestAdministration(t *testing.T) {
	s := newSite(t, nil)
	for _, name := range []string{"demo", "demo-g1", "root-g1"} {
		a := s.call(t, s.admin, olga, "POST", "/v1/cas/"+name+"/crl", "")
		if a.status != http.StatusCreated || !strings.Contains(string(a.body), strings.TrimSuffix(name, "-g1")+"-g1") {
			t.Errorf("CRL of %s: %d %s", name, a.status, a.body)
		}
	}
	if name, _ := s.call(t, s.admin, olga, "POST", "/v1/cas/nonesuch/crl", "").problem(t); name != "not-found" {
		t.Errorf("CRL of nobody: %s", name)
	}
	var seen []string
	kinds := map[string]bool{}
	path := "/v1/audit?limit=7"
	for pages := 0; path != "" && pages < 100; pages++ {
		var page struct {
			Entries []struct {
				ID, Kind string
				Payload  map[string]any
			}
			Next *string
		}
		s.call(t, s.admin, carl, "GET", path, "").decode(t, &page)
		for _, e := range page.Entries {
			seen, kinds[e.Kind] = append(seen, e.ID), true
		}
		path = ""
		if page.Next != nil {
			path = "/v1/audit?limit=7&cursor=" + *page.Next
		}
		if len(page.Entries) == 0 {
			break
		}
	}
	if unique := slices.Compact(slices.Sorted(slices.Values(seen))); len(unique) != len(seen) {
		t.Errorf("%d entries, %d different", len(seen), len(unique))
	}
	for _, kind := range []string{"start", "intent", "sign", "done", "crl", "audit"} {
		if !kinds[kind] {
			t.Errorf("no %s among %v", kind, kinds)
		}
	}
	for _, cursor := range []string{"x", strings.Repeat("0", 32) + ":1", "%00"} {
		if a := s.call(t, s.admin, carl, "GET", "/v1/audit?cursor="+cursor, ""); a.status != http.StatusBadRequest {
			t.Errorf("cursor %s: %d", cursor, a.status)
		}
	}
}

func TestCAsAndProfiles(t *testing.T) {
	s := newSite(t, nil)
	var all struct {
		CAs []struct {
			ID          string
			Active      *int
			Generations []struct {
				ID, Parent, State, Certificate string
				Chain                          []string
				URLs                           struct{ CRL, OCSP, Certificate string }
			}
		}
	}
	s.call(t, s.public, alice, "GET", "/v1/cas", "").decode(t, &all)
	if len(all.CAs) != 2 || all.CAs[0].ID != "demo" || all.CAs[0].Active == nil || *all.CAs[0].Active != 1 {
		t.Fatalf("%+v", all)
	}
	g := all.CAs[0].Generations[0]
	if g.ID != "demo-g1" || g.Parent != "root-g1" || g.State != "active" || len(g.Chain) != 1 || g.URLs.CRL != "http://pki.test/crl/demo-g1.crl" || g.URLs.OCSP != "http://pki.test/ocsp/demo" {
		t.Errorf("%+v", g)
	}
	if a := s.call(t, s.public, alice, "GET", "/v1/cas/root", ""); a.status != http.StatusOK {
		t.Errorf("%d", a.status)
	}
	if name, _ := s.call(t, s.public, alice, "GET", "/v1/cas/nonesuch", "").problem(t); name != "not-found" {
		t.Error(name)
	}
	if a := s.call(t, s.public, alice, "GET", "/v1/profiles", ""); a.status != http.StatusOK || !strings.Contains(string(a.body), `"tls-server"`) {
		t.Errorf("%d %s", a.status, a.body)
	}
	if a := s.call(t, s.public, alice, "GET", "/v1/openapi.yaml", ""); a.status != http.StatusOK || !bytes.Equal(a.body, api.OpenAPI()) {
		t.Errorf("%d", a.status)
	}
}
