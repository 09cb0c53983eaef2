package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/goccy/go-yaml"

	"trivet/identity"
	"trivet/ocsp"
)

// config is the file given by --config. Unknown keys are refused with line and column.
type config struct {
	Cluster  string         `yaml:"cluster"`  // name of the cluster, as in every identity of it
	Node     string         `yaml:"node"`     // name of this node, that of its identity; revocations wait for it by this name
	Identity identity.Files `yaml:"identity"` // PEM files; re-read when they change and on SIGHUP

	Listen struct {
		Public    string `yaml:"public"`    // host:port, plain HTTP for relying parties: OCSP, CRLs, issuer certificates
		Internal  string `yaml:"internal"`  // host:port, mTLS: health, metrics, the revocation barrier, and the public paths for balancers
		Advertise string `yaml:"advertise"` // host:port under which CA nodes reach internal; default: internal
	} `yaml:"listen"`

	Site   string        `yaml:"site"`   // name of this site
	Policy ocsp.Policy   `yaml:"policy"` // without a lease: strict (default) answers tryLater instead of good, serve goes on
	Drain  time.Duration `yaml:"drain"`  // how long to report "draining" before closing on SIGTERM, 0s to 1m; default 2s

	Database struct {
		Nodes        []string `yaml:"nodes"`         // host:port, in order of preference
		Name         string   `yaml:"name"`          // default trivet
		User         string   `yaml:"user"`          //
		PasswordFile string   `yaml:"password_file"` // re-read at every connection
		TLS          bool     `yaml:"tls"`           // with this node's identity; servers must have role db
	} `yaml:"database"`
}

// readConfig reads and checks the file; it connects to nothing.
func readConfig(path string) (*config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	c := &config{Policy: ocsp.Strict, Drain: 2 * time.Second}
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict()).Decode(c); err != nil {
		return nil, fmt.Errorf("reading the configuration %s: %w", path, err)
	}
	if c.Listen.Advertise == "" {
		c.Listen.Advertise = c.Listen.Internal
	}
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("checking the configuration %s: %w", path, err)
	}
	return c, nil
}

func (c *config) validate() error {
	var bad []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			bad = append(bad, fmt.Errorf(format, args...))
		}
	}
	address := func(name, value string) {
		_, _, err := net.SplitHostPort(value)
		check(err == nil, "%s %q: want host:port", name, value)
	}
	check(c.Cluster != "", "cluster is missing")
	check(c.Node != "", "node is missing")
	check(c.Site != "", "site is missing")
	check(c.Identity.Cert != "" && c.Identity.Key != "" && c.Identity.Trust != "", "identity: cert, key and trust are all needed")
	address("listen.public", c.Listen.Public)
	address("listen.internal", c.Listen.Internal)
	check(c.Listen.Public != c.Listen.Internal, "listen: public and internal must differ")
	host, port, err := net.SplitHostPort(c.Listen.Advertise)
	check(err == nil, "listen.advertise %q: want host:port", c.Listen.Advertise)
	ip := net.ParseIP(host)
	check(host != "" && port != "0" && (ip == nil || !ip.IsUnspecified()), "listen.advertise is needed: CA nodes cannot reach %q", c.Listen.Advertise)
	check(len(c.Listen.Advertise) <= 255, "listen.advertise is longer than 255 octets")
	check(c.Policy == ocsp.Strict || c.Policy == ocsp.Serve, "policy %q: want strict or serve", c.Policy)
	check(c.Drain >= 0 && c.Drain <= time.Minute, "drain %s: want 0s to 1m", c.Drain)
	check(len(c.Database.Nodes) > 0, "database.nodes is missing")
	for i, node := range c.Database.Nodes {
		address(fmt.Sprintf("database.nodes[%d]", i), node)
	}
	check(c.Database.User != "", "database.user is missing")
	return errors.Join(bad...)
}
