package lb

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"trivet/identity"
)

// class is how a request is treated, and its label in metrics.
type class string

const (
	classIssue   class = "issue"
	classBulk    class = "issue-bulk"
	classRevoke  class = "revoke"
	classRelease class = "release"
	classRead    class = "read"
	classOCSP    class = "ocsp"
	classCRL     class = "crl"
	classAIA     class = "aia"
	classOther   class = "other" // answered here
)

// route is where a request goes and what may be done to it.
type route struct {
	class  class
	role   identity.Role // of the nodes that serve it
	need   string        // capability
	body   int64         // most octets of the request body; 0: it has none
	write  bool          // fails closed, has the long deadline; else fails open
	once   bool          // must not reach two nodes
	gather bool          // company makes it cheaper: a CA node's batch costs its transactions and fsyncs whatever its size
	slowOK bool          // slowness says nothing about the node: a revocation may wait for a responder's lease
	hedge  time.Duration // after which another node is asked as well; 0: as Timing has it for its kind
}

// api routes requests of the API listener by method and raw path.
func routeAPI(method, path string) (route, bool) {
	rest, ok := strings.CutPrefix(path, "/v1/")
	if !ok {
		return route{}, false
	}
	if method == http.MethodGet || method == http.MethodHead {
		return route{class: classRead, role: identity.RoleCA, need: "read"}, rest != ""
	}
	if method != http.MethodPost {
		return route{}, false
	}
	if rest == "certificates" {
		return route{class: classIssue, role: identity.RoleCA, need: "issue:*", body: maxBody, write: true, gather: true}, true
	}
	if rest == "certificates:batch" { // each of its items has an Idempotency-Key: asking another node as well is safe, but doubles much work
		return route{class: classBulk, role: identity.RoleCA, need: "issue:*", body: maxBulk, write: true, slowOK: true, hedge: 4 * time.Second}, true
	}
	parts := strings.Split(rest, "/")
	if len(parts) != 3 || parts[0] != "certificates" || parts[1] == "" {
		return route{}, false
	}
	r := route{role: identity.RoleCA, need: "revoke", body: maxBody, write: true, slowOK: true}
	switch parts[2] {
	case "revoke": // again with the same reason is the same revocation
		r.class = classRevoke
	case "release": // again is an error: "not on hold"
		r.class, r.once = classRelease, true
	default:
		return route{}, false
	}
	return r, true
}

// public routes requests of the plain HTTP listener.
func routePublic(method, path string) (route, bool) {
	get := method == http.MethodGet || method == http.MethodHead
	switch {
	case path == "/ocsp", strings.HasPrefix(path, "/ocsp/"):
		r := route{class: classOCSP, role: identity.RoleOCSP, need: "ocsp:*"}
		if method == http.MethodPost {
			r.body = maxOCSPBody
		}
		return r, get || method == http.MethodPost
	case strings.HasPrefix(path, "/crl/"):
		return route{class: classCRL, role: identity.RoleOCSP, need: "crl:*"}, get
	case strings.HasPrefix(path, "/ca/"):
		return route{class: classAIA, role: identity.RoleOCSP, need: "aia"}, get
	}
	return route{}, false
}

// target returns the request target to forward, octet for octet as it came, and its path. Nothing is decoded, cleaned or merged: an OCSP
// request in a path may hold //, %2F and +.
func target(r *http.Request) (uri, path string, ok bool) {
	uri = r.RequestURI
	if !strings.HasPrefix(uri, "/") { // absolute form (RFC 9112 §3.2.2)
		_, rest, found := strings.Cut(uri, "://")
		slash := strings.IndexByte(rest, '/')
		if !found || slash < 0 {
			return "", "", false
		}
		uri = rest[slash:]
	}
	path, _, _ = strings.Cut(uri, "?")
	return uri, path, !strings.HasPrefix(uri, "//")
}

// issueNeed narrows the capability to the CA that the body names, if it names one that nodes know.
func (b *Balancer) issueNeed(body []byte) string {
	var named struct {
		CA string `json:"ca"`
	}
	if json.Unmarshal(body, &named) != nil || named.CA == "" {
		return "issue:*" // the node says what is wrong with the body
	}
	need := "issue:" + named.CA
	for _, n := range b.nodes() {
		if _, known := n.standing().report.Capabilities[need]; known {
			return need
		}
	}
	return "issue:*" // nobody knows it: the node says so
}
