package api

import (
	"crypto/x509"
	"encoding/base64"
	"net/http"
	"slices"
	"strings"

	"github.com/gin-gonic/gin"

	"trivet/identity"
	"trivet/problem"
)

const (
	clientCertHeader = "Client-Cert" // RFC 9440
	callerKey        = "caller"
)

// caller returns who sent the request. It is set on every route that permit guards.
func caller(c *gin.Context) identity.Principal { return c.MustGet(callerKey).(identity.Principal) }

// permit lets the given roles through and nobody else.
func (s *server) permit(roles []identity.Role) gin.HandlerFunc {
	return func(c *gin.Context) {
		p, refusal := s.identify(c.Request)
		if refusal == nil && !slices.Contains(roles, p.Role) {
			refusal = problem.New(http.StatusForbidden, "forbidden", "role "+string(p.Role)+" may not do this")
		}
		if refusal != nil {
			s.fail(c, refusal)
			return
		}
		c.Set(callerKey, p)
	}
}

// identify finds out who sent a request: the peer of the connection, or, when that is the balancer, whoever the balancer took the request
// from. What the balancer conveys is a certificate that this node verifies itself. On the administrative listener it conveys nothing:
// whoever holds the balancer must not be able to act as an operator.
func (s *server) identify(r *http.Request) (identity.Principal, *problem.Problem) {
	peer, ok := identity.Peer(r)
	if !ok {
		return peer, problem.New(http.StatusUnauthorized, "unauthenticated", "a client certificate of this cluster is needed")
	}
	conveyed := r.Header.Values(clientCertHeader)
	switch {
	case peer.Role != identity.RoleLB && len(conveyed) > 0:
		return peer, problem.New(http.StatusForbidden, "forbidden", clientCertHeader+" is taken from the balancer alone")
	case peer.Role != identity.RoleLB:
		return peer, nil
	case s.admin:
		return peer, problem.New(http.StatusForbidden, "forbidden", "administrative routes take a person's own connection, not one through the balancer")
	case len(conveyed) == 0:
		return peer, problem.New(http.StatusUnauthorized, "unauthenticated", "a client certificate of this cluster is needed")
	}
	cert, ok := parseClientCert(conveyed)
	if !ok {
		return peer, problem.New(http.StatusUnauthorized, "unauthenticated", "the conveyed client certificate cannot be read")
	}
	p, err := s.cfg.Identity.Verify([]*x509.Certificate{cert}, s.cfg.Now())
	if err != nil {
		if off := s.cfg.Clock(); off != nil { // it may well be valid: others can tell
			return peer, toProblem(off)
		}
		return peer, problem.New(http.StatusUnauthorized, "unauthenticated", "the client certificate is not valid in this cluster")
	}
	if p.Role.Machine() { // processes speak to nodes directly; a conveyed one is a stolen or a confused identity
		return peer, problem.New(http.StatusForbidden, "forbidden", "role "+string(p.Role)+" may not do this")
	}
	return p, nil
}

// parseClientCert reads RFC 9440's single structured-field byte sequence, :base64:.
func parseClientCert(values []string) (*x509.Certificate, bool) {
	if len(values) != 1 {
		return nil, false
	}
	text := strings.Trim(values[0], " ")
	if len(text) < 2 || text[0] != ':' || text[len(text)-1] != ':' {
		return nil, false
	}
	der, err := base64.StdEncoding.Strict().DecodeString(text[1 : len(text)-1])
	if err != nil {
		return nil, false
	}
	cert, err := x509.ParseCertificate(der)
	return cert, err == nil
}
