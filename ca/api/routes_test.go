package api_test

import (
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"trivet/ca/api"
	"trivet/identity"
)

var parameter = regexp.MustCompile(`/:([a-z]+)`)

// Every route of the table on each listener, asked by every role and by nobody: only those listed get past the door.
func TestRoleMatrix(t *testing.T) {
	s := newSite(t, nil)
	for _, listener := range []struct {
		name   string
		on     api.Listener
		server *httptest.Server
	}{{"api", api.Public, s.public}, {"admin", api.Admin, s.admin}} {
		for _, route := range api.Routes() {
			path := parameter.ReplaceAllString(route.Path, "/nonesuch")
			for _, role := range append(identity.Roles(), "") {
				p := person(role, "x")
				if role == "" {
					p = identity.Principal{}
				}
				a := s.call(t, listener.server, p, route.Method, path, "")
				name := ""
				if a.status >= 400 && a.header.Get("Content-Type") == "application/problem+json" {
					name, _ = a.problem(t)
				}
				var want string
				switch {
				case role == "":
					want = "unauthenticated"
				case route.On&listener.on == 0:
					want = "not-found"
				case slices.Contains(route.Roles, role):
				case role == identity.RoleLB && listener.on == api.Public:
					want = "unauthenticated" // it conveys nobody here
				default:
					want = "forbidden"
				}
				switch {
				case want != "" && name != want && !(want == "not-found" && name == "method-not-allowed"):
					t.Errorf("%s: %s %s by %q: %d %s, want %s", listener.name, route.Method, route.Path, role, a.status, name, want)
				case want == "" && (a.status == http.StatusUnauthorized || a.status == http.StatusForbidden):
					t.Errorf("%s: %s %s by %q was refused: %d", listener.name, route.Method, route.Path, role, a.status)
				}
			}
		}
	}
}

// What the roles exclude is written down twice, here by hand (pki-profile §9).
func TestSeparationOfRoles(t *testing.T) {
	may := func(role identity.Role) (routes []string) {
		for _, r := range api.Routes() {
			if !r.Peer && slices.Contains(r.Roles, role) {
				routes = append(routes, r.Method+" "+r.Path)
			}
		}
		return routes
	}
	for _, role := range []identity.Role{identity.RoleAdmin, identity.RoleAuditor, identity.RoleSRE} {
		for _, r := range may(role) {
			if strings.HasPrefix(r, "POST ") {
				t.Errorf("%s may %s", role, r)
			}
		}
	}
	for _, role := range identity.Roles() {
		if got := may(role); role.Machine() && len(got) > 0 {
			t.Errorf("machine role %s may %v", role, got)
		}
		if got := slices.Contains(may(role), "GET /v1/audit"); got != (role == identity.RoleAuditor) {
			t.Errorf("%s reads the audit log: %v", role, got)
		}
		if got := slices.Contains(may(role), "POST /v1/blocked-keys"); got != (role == identity.RoleCAOperator) {
			t.Errorf("%s blocks keys: %v", role, got)
		}
		if got := slices.Contains(may(role), "POST /v1/cas/:ca/crl"); got != (role == identity.RoleCAOperator) {
			t.Errorf("%s forces CRLs: %v", role, got)
		}
	}
	for _, r := range api.Routes() {
		if len(r.Roles) == 0 {
			t.Errorf("%s %s: nobody may", r.Method, r.Path)
		}
	}
}

// openapi.yaml and the table say the same: routes, roles, listeners.
func TestDescriptionMatchesTheTable(t *testing.T) {
	doc, err := openapi3.NewLoader().LoadFromData(api.OpenAPI())
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	sorted := func(v any) (out []string) {
		list, _ := v.([]any)
		for _, e := range list {
			out = append(out, e.(string))
		}
		slices.Sort(out)
		return out
	}
	described := map[string]bool{}
	for _, r := range api.Routes() {
		path := parameter.ReplaceAllString(r.Path, "/{$1}")
		item := doc.Paths.Value(path)
		if item == nil || item.GetOperation(r.Method) == nil {
			t.Errorf("%s %s is not described", r.Method, path)
			continue
		}
		described[r.Method+" "+path] = true
		op := item.GetOperation(r.Method)
		var roles []string
		for _, role := range r.Roles {
			roles = append(roles, string(role))
		}
		slices.Sort(roles)
		if len(roles) == len(identity.Roles()) {
			roles = []string{"any"}
		}
		if got := sorted(op.Extensions["x-roles"]); !slices.Equal(got, roles) {
			t.Errorf("%s %s: described for %v, served to %v", r.Method, path, got, roles)
		}
		var listeners []string
		if r.On&api.Admin != 0 {
			listeners = append(listeners, "admin")
		}
		if r.On&api.Public != 0 {
			listeners = append(listeners, "api")
		}
		if got := sorted(op.Extensions["x-listeners"]); !slices.Equal(got, listeners) {
			t.Errorf("%s %s: described on %v, served on %v", r.Method, path, got, listeners)
		}
	}
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			if !described[method+" "+path] {
				t.Errorf("%s %s is described and not served", method, path)
			}
		}
	}
}
