package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"

	"github.com/goccy/go-yaml"

	"trivet/cluster"
	"trivet/db"
	"trivet/hsmsync"
	"trivet/identity"
)

// siteConfig is what commands that work on an installation from within read: its database and its HSMs, not its API.
type siteConfig struct {
	// Cluster is the name of the cluster, Node that of whoever runs the command; both as in the identity.
	Cluster string `yaml:"cluster"`
	Node    string `yaml:"node"`
	// Identity names the PEM files of the command's own certificate.
	Identity identity.Files `yaml:"identity"`
	// Database is how to reach the record.
	Database struct {
		// Nodes lists host:port in order of preference.
		Nodes []string `yaml:"nodes"`
		// Name of the database, default trivet.
		Name string `yaml:"name"`
		// User is the account, PasswordFile holds its password.
		User         string `yaml:"user"`
		PasswordFile string `yaml:"password_file"`
		// TLS is for mTLS with Identity; servers must have role db.
		TLS bool `yaml:"tls"`
	} `yaml:"database"`
	// HSM is the key group and the members with which it begins: name and address (host:port) of each hsmd. Only init needs it; of groups
	// that are there the record tells.
	HSM struct {
		Group   string           `yaml:"group"`
		Members []hsmsync.Member `yaml:"members"`
	} `yaml:"hsm"`
}

// demo opens the demo that a command works on when no --config names anything else.
func (a *app) demo() (*cluster.Cluster, error) {
	demo, err := cluster.Open(a.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("no --config given, and %w", err)
	}
	return demo, err
}

// readYAML decodes a file strictly: an unknown key is an error with line and column.
func readYAML(path string, into any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("reading the configuration: %w", err)
	}
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict()).Decode(into); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading the configuration %s: %w", path, err)
	}
	return nil
}

// check finds everything that is wrong without connecting to anything.
func (c *siteConfig) check() error {
	var bad []error
	need := func(ok bool, format string, args ...any) {
		if !ok {
			bad = append(bad, fmt.Errorf(format, args...))
		}
	}
	address := func(name, value string) {
		_, _, err := net.SplitHostPort(value)
		need(err == nil, "%s %q: want host:port", name, value)
	}
	need(c.Cluster != "", "cluster is missing")
	need(c.Node != "", "node is missing")
	need(c.Identity.Cert != "" && c.Identity.Key != "" && c.Identity.Trust != "", "identity: cert, key and trust are all needed")
	need(len(c.Database.Nodes) > 0, "database.nodes is missing")
	for i, n := range c.Database.Nodes {
		address(fmt.Sprintf("database.nodes[%d]", i), n)
	}
	need(c.Database.User != "", "database.user is missing")
	need(c.Database.PasswordFile != "", "database.password_file is missing")
	return errors.Join(append(bad, checkMembers("hsm", c.HSM.Members))...)
}

// checkMembers looks at the members of a group as the configuration lists them under a name.
func checkMembers(under string, members []hsmsync.Member) error {
	var bad []error
	for i, m := range members {
		if m.Name == "" {
			bad = append(bad, fmt.Errorf("%s.members[%d].name is missing", under, i))
		}
		if _, _, err := net.SplitHostPort(m.Address); err != nil {
			bad = append(bad, fmt.Errorf("%s.members[%d].address %q: want host:port", under, i, m.Address))
		}
	}
	return errors.Join(bad...)
}

// database is the record's configuration for id.
func (c *siteConfig) database(id *identity.Identity, log *slog.Logger) db.Config {
	var secure *tls.Config
	if c.Database.TLS {
		secure = id.ClientTLS(identity.RoleDB)
	}
	return db.Config{
		Nodes: c.Database.Nodes, Name: c.Database.Name, User: c.Database.User, PasswordFile: c.Database.PasswordFile,
		TLS: secure, Role: string(id.Principal().Role), Log: log,
	}
}
