package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"regexp"
	"time"

	"github.com/goccy/go-yaml"

	"trivet/hsmsync"
	"trivet/identity"
)

// config is the file given by --config. Unknown keys are refused with line and column.
type config struct {
	Cluster  string         `yaml:"cluster"`  // name of the cluster, as in every identity of it
	Node     string         `yaml:"node"`     // name of this node; that of its identity
	Identity identity.Files `yaml:"identity"` // PEM files; re-read when they change and on SIGHUP

	Listen struct {
		API   string `yaml:"api"`   // host:port, mTLS: /v1, behind the balancer or direct
		Admin string `yaml:"admin"` // host:port, mTLS of persons alone, never through the balancer
	} `yaml:"listen"`

	StateDir string `yaml:"state_dir"` // directory of the journal; must exist, belongs to this node alone
	Site     string `yaml:"site"`      // name of this site; must be the writing one
	BaseURL  string `yaml:"base_url"`  // http://host[:port] of CRLs, OCSP and issuer certificates, without a trailing slash; goes into certificates
	Profiles string `yaml:"profiles"`  // directory of *.yaml profiles; empty: those that come with the program

	Database struct {
		Nodes        []string `yaml:"nodes"`         // host:port, in order of preference
		Name         string   `yaml:"name"`          // default trivet
		User         string   `yaml:"user"`          //
		PasswordFile string   `yaml:"password_file"` // re-read at every connection
		TLS          bool     `yaml:"tls"`           // with this node's identity; servers must have role db
	} `yaml:"database"`

	HSM struct {
		Group   string           `yaml:"group"`   // key group
		Members []hsmsync.Member `yaml:"members"` // name and address of each hsmd with which the group began; of others its log tells
	} `yaml:"hsm"`

	Sync *syncConfig `yaml:"sync"` // absent: the HSM group's keys are kept in step elsewhere
}

// syncConfig is who keeps the HSM group's keys in step: one node at a time, whichever holds the lease. It is not the node itself, which may
// sign: this identity may move keys and use none.
type syncConfig struct {
	Identity     identity.Files `yaml:"identity"`      // PEM files of role sync; re-read when they change
	User         string         `yaml:"user"`          // database account of role sync, in the database of this node
	PasswordFile string         `yaml:"password_file"` // re-read at every connection
	Every        time.Duration  `yaml:"every"`         // pause between two rounds, 1s to 1h; default 10s
}

var (
	nodeForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	errNoDir = errors.New("it is no directory; create it, or correct the path: a journal is never begun by mistake")
)

// readConfig reads and checks the file; it connects to nothing.
func readConfig(path string) (*config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	c := new(config)
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict()).Decode(c); err != nil {
		return nil, fmt.Errorf("reading the configuration %s: %w", path, err)
	}
	if c.Sync != nil && c.Sync.Every == 0 {
		c.Sync.Every = 10 * time.Second
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
	check(c.Cluster != "", "cluster is missing")
	check(nodeForm.MatchString(c.Node), "node %q: want lower-case letters, digits, '.', '_' and '-'", c.Node)
	check(c.Identity.Cert != "" && c.Identity.Key != "" && c.Identity.Trust != "", "identity: cert, key and trust are all needed")
	address := func(name, value string) {
		_, _, err := net.SplitHostPort(value)
		check(err == nil, "%s %q: want host:port", name, value)
	}
	address("listen.api", c.Listen.API)
	address("listen.admin", c.Listen.Admin)
	check(c.Listen.API != c.Listen.Admin, "listen: api and admin must differ")
	check(c.Site != "", "site is missing")
	check(c.StateDir != "", "state_dir is missing")
	base, err := url.Parse(c.BaseURL)
	check(err == nil && base.Scheme == "http" && base.Host != "" && base.Path == "" && base.RawQuery == "" && base.User == nil,
		"base_url %q: want http://host[:port] without a path", c.BaseURL)
	check(len(c.BaseURL) <= 60, "base_url is %d octets long: 60 are the most that leave room for an OCSP request by GET", len(c.BaseURL))
	check(len(c.Database.Nodes) > 0, "database.nodes is missing")
	for i, node := range c.Database.Nodes {
		address(fmt.Sprintf("database.nodes[%d]", i), node)
	}
	check(c.Database.User != "", "database.user is missing")
	check(c.Database.PasswordFile != "", "database.password_file is missing")
	check(c.HSM.Group != "", "hsm.group is missing")
	check(len(c.HSM.Members) > 0, "hsm.members is missing")
	for i, m := range c.HSM.Members {
		check(m.Name != "", "hsm.members[%d].name is missing", i)
		address(fmt.Sprintf("hsm.members[%d].address", i), m.Address)
	}
	if s := c.Sync; s != nil {
		check(s.Identity.Cert != "" && s.Identity.Key != "" && s.Identity.Trust != "", "sync.identity: cert, key and trust are all needed")
		check(s.User != "", "sync.user is missing")
		check(s.PasswordFile != "", "sync.password_file is missing")
		check(s.Every >= time.Second && s.Every <= time.Hour, "sync.every %s: want 1s to 1h", s.Every)
	}
	return errors.Join(bad...)
}

// checkFiles looks at what the configuration points to, still without a connection.
func (c *config) checkFiles() error {
	if info, err := os.Stat(c.StateDir); err != nil {
		return fmt.Errorf("state_dir: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("state_dir %s: %w", c.StateDir, errNoDir)
	}
	if _, err := os.Stat(c.Database.PasswordFile); err != nil {
		return fmt.Errorf("database.password_file: %w", err)
	}
	if c.Sync != nil {
		if _, err := os.Stat(c.Sync.PasswordFile); err != nil {
			return fmt.Errorf("sync.password_file: %w", err)
		}
	}
	return nil
}
