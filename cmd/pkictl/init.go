package main

import (
	"errors"
	"fmt"
	"net/url"
	"os"

	"trivet/hsmsync"
	"trivet/identity"
)

// initConfig is what `pkictl init` reads.
type initConfig struct {
	// Base is what such commands share.
	Base siteConfig `yaml:",inline"`
	// Site is this site's name; it becomes the writing one.
	Site string `yaml:"site"`
	// BaseURL is http://host[:port] of CRLs, OCSP and issuer certificates, without a trailing slash; it goes into certificates.
	BaseURL string `yaml:"base_url"`
	// StateDir holds the ceremony's journal. It must exist, and be kept: it is the audit record of what was made here.
	StateDir string `yaml:"state_dir"`
	// Publish is the directory where the CAs' certificates go as {issuer}.pem and {issuer}-chain.pem; empty: nowhere.
	Publish string `yaml:"publish"`
	// MACKeyFile holds the keys by which CA nodes recognise each other's rows in the database; made, with mode 0600, if it is not there. Every
	// CA node needs a copy of it.
	MACKeyFile string `yaml:"mac_key_file"`
	// Accounts are the database accounts to make, each with the rights of a role: ca, ocsp, sync, ceremony, fsck, auditor.
	Accounts []account `yaml:"accounts"`
	// Sync names the PEM files of the identity of role sync, which makes keys and has them proved, and can sign with none.
	Sync identity.Files `yaml:"sync"`
	// Groups are HSM groups beside that of Base, for keys that are to be in other HSMs: a root key, say, in some that are locked away most
	// of the time.
	Groups []keyGroup `yaml:"groups"`
	// Root is the self-signed CA, Issuing those below it.
	Root    authority   `yaml:"root"`
	Issuing []authority `yaml:"issuing"`
	// OCSPGroup is the group of all OCSP responders' keys; default: that of Base.
	OCSPGroup string `yaml:"ocsp_group"`
}

// keyGroup is an HSM group and the members with which it begins.
type keyGroup struct {
	Name    string           `yaml:"name"`
	Members []hsmsync.Member `yaml:"members"`
}

// groups lists all HSM groups, that of Base first.
func (c *initConfig) groups() []keyGroup {
	return append([]keyGroup{{c.Base.HSM.Group, c.Base.HSM.Members}}, c.Groups...)
}

type account struct {
	// Name of the account; PasswordFile holds its password.
	Name         string `yaml:"name"`
	PasswordFile string `yaml:"password_file"`
	// Role says what it may do.
	Role string `yaml:"role"`
	// RequireX509 admits it only with a certificate of the infrastructure CA as well.
	RequireX509 bool `yaml:"require_x509"`
}

type authority struct {
	// CA is the CA's id.
	CA string `yaml:"ca"`
	// Subject is the common name of its certificate.
	Subject string `yaml:"subject"`
	// Group is the HSM group of its key; default: that of Base.
	Group string `yaml:"group"`
}

func (c *initConfig) check() error {
	bad := []error{c.Base.check()}
	need := func(ok bool, format string, args ...any) {
		if !ok {
			bad = append(bad, fmt.Errorf(format, args...))
		}
	}
	need(c.Site != "", "site is missing")
	base, err := url.Parse(c.BaseURL)
	need(err == nil && base.Scheme == "http" && base.Host != "" && base.Path == "", "base_url %q: want http://host[:port] without a path", c.BaseURL)
	need(c.StateDir != "", "state_dir is missing")
	need(c.MACKeyFile != "", "mac_key_file is missing")
	need(c.Sync.Cert != "" && c.Sync.Key != "" && c.Sync.Trust != "", "sync: cert, key and trust are all needed")
	for i, a := range c.Accounts {
		need(a.Name != "" && a.Role != "" && a.PasswordFile != "", "accounts[%d]: name, role and password_file are all needed", i)
	}
	need(c.Base.HSM.Group != "", "hsm.group is missing")
	need(len(c.Base.HSM.Members) > 0, "hsm.members is missing")
	known, used := map[string]bool{}, map[string]string{}
	for i, g := range c.groups() {
		if i > 0 {
			need(len(g.Members) > 0, "groups[%d].members is missing", i-1)
			bad = append(bad, checkMembers(fmt.Sprintf("groups[%d]", i-1), g.Members))
		}
		if g.Name != "" || i > 0 {
			bad = append(bad, hsmsync.CheckGroupName(g.Name))
		}
		need(!known[g.Name], "group %q is listed twice", g.Name)
		known[g.Name] = true
		for _, m := range g.Members {
			need(used[m.Name] == "", "member %q is in groups %q and %q: an HSM is in one group", m.Name, used[m.Name], g.Name)
			used[m.Name] = g.Name
		}
	}
	for i, a := range append([]authority{c.Root}, c.Issuing...) {
		need(a.Group == "" || known[a.Group], "group %q of CA %q (%d) is not listed", a.Group, a.CA, i)
	}
	need(c.OCSPGroup == "" || known[c.OCSPGroup], "ocsp_group %q is not listed", c.OCSPGroup)
	need(c.Root.CA != "" && c.Root.Subject != "", "root: ca and subject are both needed")
	need(len(c.Issuing) > 0, "issuing is missing")
	for i, a := range c.Issuing {
		need(a.CA != "" && a.Subject != "", "issuing[%d]: ca and subject are both needed", i)
	}
	return errors.Join(bad...)
}

// readInitConfig reads and checks the file, and looks whether what it points to is there. It connects to nothing.
func readInitConfig(path string) (*initConfig, error) {
	c := &initConfig{}
	if err := readYAML(path, c); err != nil {
		return c, err
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("checking the configuration %s: %w", path, err)
	}
	for _, dir := range []string{c.StateDir, c.Publish} {
		if dir == "" {
			continue
		}
		if st, err := os.Stat(dir); err != nil || !st.IsDir() {
			return c, fmt.Errorf("checking the configuration %s: %s is no directory: create it, or correct the path", path, dir)
		}
	}
	files := []string{c.Base.Database.PasswordFile}
	for _, a := range c.Accounts {
		files = append(files, a.PasswordFile)
	}
	for _, f := range files {
		if _, err := os.Stat(f); err != nil {
			return c, fmt.Errorf("checking the configuration %s: %w", path, err)
		}
	}
	return c, nil
}
