package cluster

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/goccy/go-yaml"
)

// tree is a YAML mapping that is written in the order of its keys here.
type tree = yaml.MapSlice

func item(key string, value any) yaml.MapItem { return yaml.MapItem{Key: key, Value: value} }

// softHSMConf is the file that SOFTHSM2_CONF names for the agent p.
func softHSMConf(p Part) string { return filepath.Join(p.Dir, "softhsm2.conf") }

// tokens is where SoftHSM keeps the token of the agent p.
func tokens(p Part) string { return filepath.Join(p.Dir, "tokens") }

// writeConfigs writes every process' configuration, as an operator would have written it by hand.
func writeConfigs(l Layout) error {
	for _, p := range l.Parts() {
		var c tree
		switch p.Role {
		case RoleDB:
			continue // node.cnf is rendered by ops/galera
		case RoleHSMD:
			conf := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", tokens(p))
			if err := os.Mkdir(tokens(p), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
				return fmt.Errorf("making the token directory of %s: %w", p.Name, err)
			}
			if err := replaceFile(softHSMConf(p), []byte(conf), 0o600); err != nil {
				return err
			}
			c = l.hsmdConfig(p)
		case RoleCA:
			c = l.caConfig(p)
		case RoleOCSP:
			c = l.ocspConfig(p)
		case RoleLB:
			c = l.lbConfig(p)
		}
		if err := writeConfig(l, p.Name, append(l.common(p.Name), c...)); err != nil {
			return err
		}
	}
	if err := writeConfig(l, "sync", append(l.common("sync"), l.syncConfig()...)); err != nil {
		return err
	}
	if err := writeConfig(l, "fsck", append(l.common("fsck"), l.fsckConfig()...)); err != nil {
		return err
	}
	return writeConfig(l, "init", append(l.common("ceremony"), l.initConfig()...))
}

func writeConfig(l Layout, name string, c tree) error {
	text, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("writing the configuration of %s: %w", name, err)
	}
	return replaceFile(l.Config(name), text, 0o644)
}

// common is the block that all processes share.
func (l Layout) common(name string) tree {
	f := l.Files(name)
	return tree{
		item("cluster", Name),
		item("node", name),
		item("identity", tree{item("cert", f.Cert), item("key", f.Key), item("trust", f.Trust)}),
	}
}

func (l Layout) hsmdConfig(p Part) tree {
	return tree{
		item("listen", p.Addresses["agent"]),
		item("module", cmp.Or(l.addition(p.Name).Module, softHSMModule)),
		item("token", p.Name),
		item("pin_file", l.Secret(p.Name+"-pin")),
		item("so_pin_file", l.Secret(p.Name+"-so-pin")),
		item("state_dir", p.Dir),
	}
}

func (l Layout) caConfig(p Part) tree {
	sync := l.Files(syncName(p))
	peers := []tree{}
	for _, other := range l.role(RoleCA) {
		if other.Name != p.Name {
			peers = append(peers, tree{item("name", other.Name), item("address", other.Addresses["api"])})
		}
	}
	return tree{
		item("listen", tree{item("api", p.Addresses["api"]), item("admin", p.Addresses["admin"])}),
		item("peers", peers),
		item("state_dir", p.Dir),
		item("site", p.Site),
		item("base_url", l.PublicURL()),
		item("mac_key_file", l.Secret("mac-keys")),
		item("database", l.databaseConfig("ca", p)),
		item("sync", tree{
			item("identity", tree{item("cert", sync.Cert), item("key", sync.Key), item("trust", sync.Trust)}),
			item("user", "sync"),
			item("password_file", l.Secret("db-sync")),
		}),
	}
}

func (l Layout) ocspConfig(p Part) tree {
	return tree{
		item("listen", tree{item("public", p.Addresses["public"]), item("internal", p.Addresses["internal"])}),
		item("site", p.Site),
		item("database", l.databaseConfig("ocsp", p)),
	}
}

func (l Layout) lbConfig(p Part) tree {
	var nodes []tree
	for _, n := range append(l.role(RoleCA), l.role(RoleOCSP)...) {
		address := n.Addresses["api"]
		if n.Role == RoleOCSP {
			address = n.Addresses["internal"]
		}
		nodes = append(nodes, tree{item("name", n.Name), item("role", n.Role), item("address", address)})
	}
	return tree{
		item("listeners", tree{item("api", p.Addresses["api"]), item("public", p.Addresses["public"]), item("status", p.Addresses["status"])}),
		item("nodes", nodes),
	}
}

// initConfig is what `pkictl init` reads.
func (l Layout) initConfig() tree {
	var accounts []tree
	for _, a := range dbAccounts {
		accounts = append(accounts, tree{item("name", a.name), item("role", a.name), item("password_file", l.Secret("db-"+a.name)), item("require_x509", a.mtls)})
	}
	sync := l.Files("sync")
	groups := []tree{}
	for _, g := range l.groups {
		groups = append(groups, l.groupConfig("name", g))
	}
	return tree{
		item("site", Site),
		item("base_url", l.PublicURL()),
		item("state_dir", l.Data("ceremony")),
		item("mac_key_file", l.Secret("mac-keys")),
		item("publish", l.Published()),
		item("database", l.databaseConfig(dbOwner, Part{})),
		item("accounts", accounts),
		item("hsm", l.groupConfig("group", KeyGroup)),
		item("groups", groups),
		item("sync", tree{item("cert", sync.Cert), item("key", sync.Key), item("trust", sync.Trust)}),
		item("root", tree{item("ca", RootCA), item("subject", "Trivet Demo Root"), item("group", l.in(RootGroup))}),
		item("issuing", []tree{{item("ca", CA), item("subject", "Trivet Demo Issuing CA")}}),
		item("ocsp_group", l.in(VAGroup)),
	}
}

// syncConfig is what `pkictl hsm` and `pkictl key` read.
func (l Layout) syncConfig() tree {
	return tree{item("database", l.databaseConfig("sync", Part{}))}
}

// databaseConfig lists the nodes from a different one on for each part, so that the load is spread.
func (l Layout) databaseConfig(account string, p Part) tree {
	return tree{
		item("nodes", l.databaseNodes(p)),
		item("name", Database),
		item("user", account),
		item("password_file", l.Secret("db-"+account)),
		item("tls", true),
	}
}

func (l Layout) databaseNodes(p Part) []string {
	var nodes []string
	for _, n := range l.role(RoleDB) {
		nodes = append(nodes, n.Addresses["mysql"])
	}
	if n := len(p.Name); n > 0 {
		first := int(p.Name[n-1]-'1') % len(nodes)
		nodes = append(nodes[first:], nodes[:first]...)
	}
	return nodes
}

// groupConfig names the members with which a group begins; of those that join later its log tells.
func (l Layout) groupConfig(key, group string) tree {
	var members []tree
	for _, p := range l.role(RoleHSMD) {
		if !slices.Contains(l.groupMembers(group), p.Name) {
			continue
		}
		members = append(members, tree{item("name", p.Name), item("address", p.Addresses["agent"])})
	}
	return tree{item(key, group), item("members", members)}
}

// in is the group if the cluster has it, or else the one of every key.
func (l Layout) in(group string) string {
	if slices.Contains(l.groups, group) {
		return group
	}
	return KeyGroup
}

// fsckConfig is what `pkictl fsck` reads.
func (l Layout) fsckConfig() tree {
	journals := tree{item("ceremony", filepath.Join(l.Data("ceremony"), "journal"))}
	for _, p := range l.role(RoleCA) {
		journals = append(journals, item(p.Name, p.Dir))
	}
	var responders []tree
	for _, p := range l.role(RoleOCSP) {
		responders = append(responders, tree{item("name", p.Name), item("url", "http://"+p.Addresses["public"])})
	}
	return tree{item("database", l.databaseConfig("fsck", Part{})), item("mac_key_file", l.Secret("mac-keys")), item("journals", journals), item("responders", responders)}
}
