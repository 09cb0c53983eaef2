package cluster

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"trivet/db"
	"trivet/identity"
)

// Identities live long enough for a forgotten demo, and are renewed by the next `up` when less than a third is left.
const identityLifetime = 90 * 24 * time.Hour

// people of the demo, and the programs that act for operators.
var people = []struct {
	name string
	role identity.Role
}{
	{"requester", identity.RoleRequester},
	{"ra", identity.RoleRA},
	{"operator1", identity.RoleCAOperator},
	{"operator2", identity.RoleCAOperator},
	{"admin1", identity.RoleAdmin},
	{"admin2", identity.RoleAdmin},
	{"auditor", identity.RoleAuditor},
	{"sre", identity.RoleSRE},
	{"ceremony", identity.RoleCeremony}, // pkictl init
	{"sync", identity.RoleSync},         // pkictl hsm
	{"fsck", identity.RoleFsck},         // pkictl fsck
}

// dbAccounts are the accounts that `pkictl init` makes, each with the rights of the role of its name. With mtls the account must present an
// identity as well; the auditor's serves any client.
var dbAccounts = []struct {
	name string
	mtls bool
}{{"ca", true}, {"ocsp", true}, {"sync", true}, {"ceremony", true}, {"fsck", true}, {"auditor", false}}

// provision makes whatever of the cluster's files is not there yet: directories, secrets, infrastructure CA, identities, configuration. It
// is safe to repeat, and after an interruption. Data is never touched.
func provision(l Layout) error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{
		{l.Dir, 0o755}, {l.run(), 0o700}, {filepath.Join(l.Dir, "log"), 0o755}, {filepath.Join(l.Dir, "etc"), 0o755},
		{filepath.Join(l.Dir, "secret"), 0o700}, {filepath.Join(l.Dir, "identity"), 0o755}, {l.Published(), 0o755},
		{filepath.Join(l.Dir, "data"), 0o755},
	} {
		if err := os.Mkdir(d.path, d.mode); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("making the cluster's directories: %w", err)
		}
		if err := os.Chmod(d.path, d.mode); err != nil { // whatever the umask: mariadbd may be another user
			return fmt.Errorf("making the cluster's directories: %w", err)
		}
	}
	// Early: from here on the directory is known to be a cluster's, and may be removed as one.
	if err := l.describe(); err != nil {
		return err
	}
	private := []string{l.Data("ceremony")}
	for _, p := range l.Parts() {
		if p.Role != RoleDB { // made by ops/galera, for another user
			private = append(private, p.Dir)
		}
	}
	for _, dir := range private {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("making the cluster's directories: %w", err)
		}
	}
	if err := provisionSecrets(l); err != nil {
		return err
	}
	if err := provisionIdentities(l); err != nil {
		return err
	}
	return writeConfigs(l)
}

// describe writes down what the cluster is made with.
func (l Layout) describe() error {
	about, err := json.Marshal(manifest{Format: 1, Network: l.Network, Groups: l.groups, Added: l.added})
	if err != nil {
		return fmt.Errorf("describing the cluster: %w", err)
	}
	return replaceFile(l.manifest(), append(about, '\n'), 0o644)
}

func provisionSecrets(l Layout) error {
	names := []string{"db-" + dbOwner}
	for _, account := range dbAccounts {
		names = append(names, "db-"+account.name)
	}
	for _, p := range l.role(RoleHSMD) {
		names = append(names, p.Name+"-pin", p.Name+"-so-pin")
	}
	for _, name := range names {
		if err := writeOnce(l.Secret(name), []byte(rand.Text()+"\n"), 0o600); err != nil {
			return err
		}
	}
	return writeOnce(l.Secret("mac-keys"), db.NewMACKey(), 0o600)
}

// syncName is under which name a CA node keeps the HSM group's keys in step.
func syncName(node Part) string { return "sync-" + node.Name }

func provisionIdentities(l Layout) error {
	authority, err := identity.OpenAuthority(l.authority())
	if errors.Is(err, os.ErrNotExist) {
		if err = os.RemoveAll(l.authority()); err == nil { // half of one certifies nobody
			authority, err = identity.CreateAuthority(l.authority(), Name)
		}
	}
	if err != nil {
		return err
	}
	issue := func(name string, role identity.Role, ips []net.IP) error {
		if fresh(filepath.Join(l.Identity(name), "cert.pem")) {
			return nil
		}
		_, err := authority.IssueTo(l.Identity(name), identity.Principal{Cluster: Name, Role: role, Name: name}, ips, nil, identityLifetime)
		return err
	}
	for _, p := range people {
		if err := issue(p.name, p.role, nil); err != nil {
			return err
		}
	}
	for _, p := range l.Parts() {
		var ips []net.IP
		for _, a := range p.Addresses {
			if host, _, err := net.SplitHostPort(a); err == nil {
				ips = []net.IP{net.ParseIP(host)} // all of a part's listeners share one
			}
		}
		if err := issue(p.Name, identity.Role(p.Role), ips); err != nil {
			return err
		}
		if p.Role == RoleCA { // its second one, for the key-sync job
			if err := issue(syncName(p), identity.RoleSync, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// fresh tells whether the certificate in file has a third of its life before it.
func fresh(file string) bool {
	data, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return false
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	return err == nil && time.Until(cert.NotAfter) > identityLifetime/3
}

// writeOnce writes a file that must not change afterwards; one that is there already stays. A crash leaves all of it or nothing.
func writeOnce(file string, data []byte, mode os.FileMode) error {
	if st, err := os.Stat(file); err == nil && st.Size() > 0 {
		return nil
	}
	return replaceFile(file, data, mode)
}

func replaceFile(file string, data []byte, mode os.FileMode) error {
	tmp := file + ".new"
	if err := os.WriteFile(tmp, data, mode); err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	if err := os.Rename(tmp, file); err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	return nil
}
