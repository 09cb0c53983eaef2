package api

import (
	"net/http"
	"strings"

	"github.com/gin-gonic/gin"

	"trivet/identity"
)

// Listener tells on which of a node's two listeners a route is served.
type Listener uint8

// Listeners.
const (
	Public Listener = 1 << iota // behind the balancer, or direct
	Admin                       // persons only, TLS from end to end
)

// Route is one row of the table that is the router, the authorisation and their test at once (pki-profile §9).
type Route struct {
	Method string
	Path   string          // /:id is a parameter; any other colon is itself
	On     Listener        //
	Roles  []identity.Role // who may; nobody else. Whose objects they may touch is the handler's matter
	Peer   bool            // whether Roles speaks of the connection's peer, even if that is the balancer: what nodes say about themselves

	handle func(*server, *gin.Context)
}

var (
	people    = []identity.Role{identity.RoleRequester, identity.RoleRA, identity.RoleCAOperator, identity.RoleAdmin, identity.RoleAuditor, identity.RoleSRE}
	searchers = []identity.Role{identity.RoleRequester, identity.RoleRA, identity.RoleCAOperator, identity.RoleAdmin, identity.RoleAuditor}
	askers    = []identity.Role{identity.RoleRequester, identity.RoleRA, identity.RoleCAOperator}
	approvers = []identity.Role{identity.RoleRA, identity.RoleCAOperator}
	operators = []identity.Role{identity.RoleCAOperator}
	overseers = []identity.Role{identity.RoleCAOperator, identity.RoleAdmin, identity.RoleAuditor}
	auditors  = []identity.Role{identity.RoleAuditor}
)

// Routes returns the whole table.
func Routes() []Route {
	everyone := identity.Roles()
	health := func(s *server, c *gin.Context) { s.health.ServeHTTP(c.Writer, c.Request) }
	return []Route{
		{http.MethodPost, "/v1/certificates", Public, askers, false, (*server).issue},
		{http.MethodPost, "/v1/certificates:batch", Public, askers, false, (*server).issueBulk},
		{http.MethodGet, "/v1/certificates", Public | Admin, searchers, false, (*server).list},
		{http.MethodGet, "/v1/certificates/:id", Public | Admin, searchers, false, (*server).show},
		{http.MethodPost, "/v1/certificates/:id/revoke", Public, askers, false, (*server).revoke},
		{http.MethodPost, "/v1/certificates/:id/release", Public, approvers, false, (*server).release},
		{http.MethodGet, "/v1/cas", Public | Admin, people, false, (*server).listCAs},
		{http.MethodGet, "/v1/cas/:ca", Public | Admin, people, false, (*server).showCA},
		{http.MethodPost, "/v1/cas/:ca/crl", Admin, operators, false, (*server).issueCRL},
		{http.MethodPost, "/v1/blocked-keys", Admin, operators, false, (*server).block},
		{http.MethodGet, "/v1/blocked-keys", Admin, overseers, false, (*server).listBlocked},
		{http.MethodGet, "/v1/blocked-keys/:spki", Admin, overseers, false, (*server).showBlocked},
		{http.MethodGet, "/v1/profiles", Public | Admin, people, false, (*server).listProfiles},
		{http.MethodGet, "/v1/audit", Admin, auditors, false, (*server).audit},
		{http.MethodGet, "/v1/openapi.yaml", Public | Admin, people, false, (*server).openAPI},

		{http.MethodGet, "/livez", Public | Admin, everyone, true, health},
		{http.MethodGet, "/readyz", Public | Admin, everyone, true, health},
		{http.MethodGet, "/healthz", Public | Admin, everyone, true, health},
		{http.MethodGet, "/health/issue", Public | Admin, everyone, true, capability("issue:*")},
		{http.MethodGet, "/health/admin", Public | Admin, everyone, true, capability("admin")},
		{http.MethodGet, "/metrics", Public | Admin, everyone, true, func(s *server, c *gin.Context) { s.cfg.Metrics.ServeHTTP(c.Writer, c.Request) }},
	}
}

// spelling is the path as the router wants it: it takes every colon for a parameter's unless it is escaped.
func (r Route) spelling() string {
	path := strings.ReplaceAll(r.Path, ":", `\:`)
	return strings.ReplaceAll(path, `/\:`, "/:")
}
