package health_test

import (
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"

	"trivet/health"
)

func report(state string, caps map[string]health.Capability) func() health.Report {
	return func() health.Report {
		return health.Report{Node: "ca1", Role: "ca", State: state, Capabilities: caps, Checks: []health.Check{{Name: "database", Detail: "not primary"}}}
	}
}

var some = map[string]health.Capability{"issue:demo": {Cause: "database"}, "read": {OK: true}}

func TestCan(t *testing.T) {
	r := report(health.Degraded, some)()
	for c, want := range map[string]bool{"read": true, "issue:demo": false, "issue:*": false, "issue:other": false, "rea*": true, "*": true, "": false} {
		if r.Can(c) != want {
			t.Errorf("%q: %v", c, !want)
		}
	}
	if report(health.Draining, some)().Can("read") {
		t.Error("a draining node takes new work")
	}
}

func TestReadyz(t *testing.T) {
	for name, c := range map[string]struct {
		report func() health.Report
		want   int
	}{
		"ok": {report(health.OK, some), 200}, "degraded, something left": {report(health.Degraded, some), 200},
		"nothing left": {report(health.Degraded, map[string]health.Capability{"read": {}}), 503}, "draining": {report(health.Draining, some), 503},
		"nothing to offer, ok": {report(health.OK, nil), 200}, "nothing to offer, degraded": {report(health.Degraded, nil), 503},
	} {
		w := httptest.NewRecorder()
		health.Handler(c.report).ServeHTTP(w, httptest.NewRequest("GET", "/readyz?verbose", nil))
		if w.Code != c.want {
			t.Errorf("%s: %d, want %d", name, w.Code, c.want)
		}
		if !strings.Contains(w.Body.String(), "[-] database: not primary\n") {
			t.Errorf("%s: %s", name, w.Body)
		}
	}
}

func TestHealthzIsTheReportAndLivezOnlyLives(t *testing.T) {
	h := health.Handler(report(health.Draining, some))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/healthz", nil))
	var r health.Report
	if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil || w.Code != 200 || r.Capabilities["issue:demo"].Cause != "database" {
		t.Error(w.Code, w.Body, err)
	}
	w = httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/livez", nil))
	if w.Code != 200 || w.Body.String() != "ok\n" {
		t.Error(w.Code, w.Body)
	}
}
