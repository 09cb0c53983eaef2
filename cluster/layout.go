// Package cluster runs a whole Trivet installation on one machine: three database nodes, three HSM agents with a SoftHSM token each and as
// many more as somebody adds, two CA nodes, two responders and a balancer, as plain processes on a block of loopback addresses, everything under one directory.
// It is what `pkictl demo` and the end-to-end tests start; no container engine is involved.
package cluster

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Names of what every local cluster is made of.
const (
	Name       = "demo"    // cluster name in every principal
	Site       = "primary" // the one site
	CA         = "demo"    // the issuing CA
	Generation = 1         // its generation
	Issuer     = "demo-g1"
	RootCA     = "demo-root"
	KeyGroup   = "ca" // the HSM group of every key, or of the issuing CA's where there are others
	RootGroup  = "root"
	VAGroup    = "va"
	Database   = "trivet"
)

// DefaultNetwork is the loopback block of a cluster that was not told another.
const DefaultNetwork = "127.77.0.0/16"

// Roles of processes, as in a principal.
const (
	RoleDB   = "db"
	RoleHSMD = "hsmd"
	RoleCA   = "ca"
	RoleOCSP = "ocsp"
	RoleLB   = "lb"
)

// Part is one process of the cluster.
type Part struct {
	Name      string            // such as ca1
	Role      string            // db, hsmd, ca, ocsp, lb
	Site      string            // the site it stands in
	Addresses map[string]string // host:port by listener, such as api, admin, public, status
	Dir       string            // its data
	Log       string            // its standard error, appended over restarts
}

// Layout says where everything of one cluster is: files below Dir, addresses below a /16 of loopback.
type Layout struct {
	Dir     string   // absolute
	Network string   // such as 127.77.0.0/16
	prefix  string   // first two octets
	groups  []string // HSM groups beside KeyGroup
	added   []Added
}

// NewLayout checks dir and network; empty values stand for DefaultDir and DefaultNetwork. It touches nothing.
func NewLayout(dir, network string) (Layout, error) {
	if dir == "" {
		dir = DefaultDir()
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return Layout{}, fmt.Errorf("resolving the directory %s: %w", dir, err)
	}
	if network == "" {
		network = DefaultNetwork
	}
	p, err := netip.ParsePrefix(network)
	if err != nil || p.Bits() != 16 || !p.Addr().Is4() || p.Addr().As4()[0] != 127 || p.Masked() != p {
		return Layout{}, fmt.Errorf("network %q is not a /16 of the loopback block: give one such as %s", network, DefaultNetwork)
	}
	a := p.Addr().As4()
	if a[1] == 0 {
		return Layout{}, errors.New("network 127.0.0.0/16 holds the machine's own localhost: give another, such as " + DefaultNetwork)
	}
	return Layout{Dir: abs, Network: network, prefix: fmt.Sprintf("%d.%d", a[0], a[1])}, nil
}

// DefaultDir is $TRIVET_DEMO_DIR, or /var/tmp/trivet-demo for root and /var/tmp/trivet-demo-$UID for everybody else.
func DefaultDir() string {
	if d := os.Getenv("TRIVET_DEMO_DIR"); d != "" {
		return d
	}
	if uid := os.Getuid(); uid != 0 {
		return "/var/tmp/trivet-demo-" + strconv.Itoa(uid)
	}
	return "/var/tmp/trivet-demo"
}

// Parts lists the cluster's processes in the order in which they start.
func (l Layout) Parts() []Part {
	var parts []Part
	add := func(name, role string, addresses map[string]string) {
		parts = append(parts, Part{Name: name, Role: role, Site: Site, Addresses: addresses, Dir: l.Data(name), Log: l.Log(name)})
	}
	for i := 1; i <= 3; i++ {
		h := l.host(1, i)
		add("db"+strconv.Itoa(i), RoleDB, map[string]string{
			"mysql": h + ":3306", "group": h + ":4567", "ist": h + ":4568", "sst": h + ":4444",
		})
	}
	for _, name := range l.founders() {
		add(name, RoleHSMD, l.agentAddress(name))
	}
	for _, a := range l.added {
		add(a.Name, RoleHSMD, l.agentAddress(a.Name))
	}
	for i := 1; i <= 2; i++ {
		h := l.host(3, i)
		add("ca"+strconv.Itoa(i), RoleCA, map[string]string{"api": h + ":8443", "admin": h + ":9443"})
	}
	for i := 1; i <= 2; i++ {
		h := l.host(4, i)
		add("ocsp"+strconv.Itoa(i), RoleOCSP, map[string]string{"public": h + ":8080", "internal": h + ":8443"})
	}
	h := l.host(5, 1)
	add("lb1", RoleLB, map[string]string{"api": h + ":8443", "public": h + ":8080", "status": h + ":9443"})
	return parts
}

// Groups lists the cluster's HSM groups.
func (l Layout) Groups() []string { return append([]string{KeyGroup}, l.groups...) }

// Part returns the part of that name.
func (l Layout) Part(name string) (Part, error) {
	var names []string
	for _, p := range l.Parts() {
		if p.Name == name {
			return p, nil
		}
		names = append(names, p.Name)
	}
	return Part{}, fmt.Errorf("%q is no part of the cluster: there are %s", name, strings.Join(names, ", "))
}

// role lists the parts of one role.
func (l Layout) role(role string) []Part {
	var of []Part
	for _, p := range l.Parts() {
		if p.Role == role {
			of = append(of, p)
		}
	}
	return of
}

// HealthAddress is the part's mTLS listener that answers /readyz; databases have none.
func (p Part) HealthAddress() string {
	switch p.Role {
	case RoleHSMD:
		return p.Addresses["agent"]
	case RoleCA:
		return p.Addresses["admin"]
	case RoleOCSP:
		return p.Addresses["internal"]
	case RoleLB:
		return p.Addresses["status"]
	}
	return ""
}

// PublicURL is the base of everything that relying parties fetch, as written into certificates.
func (l Layout) PublicURL() string { return "http://" + l.host(5, 1) + ":8080" }

// APIURL is the balancer's API.
func (l Layout) APIURL() string { return "https://" + l.host(5, 1) + ":8443" }

func (l Layout) host(block, i int) string { return fmt.Sprintf("%s.%d.%d", l.prefix, block, i) }

// Data is the directory of what the named part must not lose.
func (l Layout) Data(part string) string { return filepath.Join(l.Dir, "data", part) }

// Log is the file of the named part's standard error.
func (l Layout) Log(part string) string { return filepath.Join(l.Dir, "log", part+".log") }

// Config is the YAML file of the named part.
func (l Layout) Config(part string) string { return filepath.Join(l.Dir, "etc", part+".yaml") }

// Identity is the directory of the named principal's cert.pem, key.pem and trust.pem.
func (l Layout) Identity(name string) string { return filepath.Join(l.Dir, "identity", name) }

// Secret is a file holding one password or PIN.
func (l Layout) Secret(name string) string { return filepath.Join(l.Dir, "secret", name) }

// Published is the directory of CA certificates that `pkictl init` writes.
func (l Layout) Published() string { return filepath.Join(l.Dir, "ca") }

func (l Layout) manifest() string  { return filepath.Join(l.Dir, "cluster.json") }
func (l Layout) lock() string      { return filepath.Join(l.Dir, "lock") }
func (l Layout) authority() string { return filepath.Join(l.Dir, "infra") }
func (l Layout) run() string       { return filepath.Join(l.Dir, "run") }
func (l Layout) socket() string    { return filepath.Join(l.run(), "supervisor.sock") }
