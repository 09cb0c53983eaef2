// Package identity is who the processes and people of one cluster are to each other: a role and a name in a URI SAN, in certificates of
// the cluster's own infrastructure CA. Between processes a peer is verified by chain and role, never by host name.
package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Role is what a principal may be asked to do. Authorisation is by role, default deny.
type Role string

// Machine roles, one per kind of process.
const (
	RoleCA       Role = "ca"
	RoleOCSP     Role = "ocsp"
	RoleHSMD     Role = "hsmd"
	RoleLB       Role = "lb"
	RoleDB       Role = "db"
	RoleSync     Role = "sync"
	RoleCeremony Role = "ceremony"
	RoleFsck     Role = "fsck"
)

// Roles of people and of the programs that act for them.
const (
	RoleRequester  Role = "requester"
	RoleRA         Role = "ra"
	RoleCAOperator Role = "ca-operator"
	RoleAdmin      Role = "admin"
	RoleAuditor    Role = "auditor"
	RoleSRE        Role = "sre"
)

// Roles lists every known role. "Any known role may" means Allow(h, Roles()...).
func Roles() []Role {
	return append(machines(), RoleRequester, RoleRA, RoleCAOperator, RoleAdmin, RoleAuditor, RoleSRE)
}

// Machine tells whether r is the role of a process; only those get server certificates.
func (r Role) Machine() bool { return slices.Contains(machines(), r) }

func machines() []Role {
	return []Role{RoleCA, RoleOCSP, RoleHSMD, RoleLB, RoleDB, RoleSync, RoleCeremony, RoleFsck}
}

// Scheme is the URI scheme of principals.
const Scheme = "trivet"

// Principal is one identity: trivet://{cluster}/{role}/{name}. It is comparable.
type Principal struct {
	Cluster string
	Role    Role
	Name    string
}

// String returns the URI, the one spelling of the principal.
func (p Principal) String() string {
	return Scheme + "://" + p.Cluster + "/" + string(p.Role) + "/" + p.Name
}

// A cluster is the host of a URI, which is compared without case: lower case only, so that there is one spelling.
var (
	clusterForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	nameForm    = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
)

func (p Principal) check() error {
	switch {
	case !clusterForm.MatchString(p.Cluster):
		return fmt.Errorf("cluster %q: want 1 to 63 lower-case letters, digits and inner hyphens", p.Cluster)
	case !slices.Contains(Roles(), p.Role):
		return fmt.Errorf("role %q is not known", p.Role)
	case !nameForm.MatchString(p.Name):
		return fmt.Errorf("name %q: want 1 to 63 lower-case letters, digits, '.', '_' and '-'", p.Name)
	}
	return nil
}

// ParsePrincipal reads the URI. Only the spelling that String makes is accepted: no escapes, no upper case, no trailing slash, no query.
func ParsePrincipal(uri string) (Principal, error) {
	rest, ok := strings.CutPrefix(uri, Scheme+"://")
	if !ok {
		return Principal{}, fmt.Errorf("principal %q: want %s://{cluster}/{role}/{name}", uri, Scheme)
	}
	parts := strings.Split(rest, "/")
	if len(parts) != 3 {
		return Principal{}, fmt.Errorf("principal %q: want %s://{cluster}/{role}/{name}", uri, Scheme)
	}
	p := Principal{Cluster: parts[0], Role: Role(parts[1]), Name: parts[2]}
	if err := p.check(); err != nil {
		return Principal{}, fmt.Errorf("principal %q: %w", uri, err)
	}
	return p, nil
}

// FromCertificate returns the principal a certificate names: its one and only URI SAN. It verifies nothing else.
func FromCertificate(c *x509.Certificate) (Principal, error) {
	if c == nil {
		return Principal{}, errors.New("no certificate")
	}
	if len(c.URIs) != 1 {
		return Principal{}, fmt.Errorf("certificate has %d URI names, want exactly one, %s://{cluster}/{role}/{name}", len(c.URIs), Scheme)
	}
	return ParsePrincipal(c.URIs[0].String())
}
