// Package galera runs one MariaDB node of a Galera cluster: it renders the node's
// configuration, installs its data directory, decides how it may start, recovers its
// position after a crash, and waits until it serves. It starts no process by itself,
// except short-lived ones; a supervisor (systemd, or the local cluster) runs Command.
//
// # First start
//
// On one machine, Found prepares every node at once. On several, run Prepare on each,
// start the seed with bootstrap, then Secure and CreateAccount there, then start the others:
// they fetch everything by state transfer.
//
// # Restart
//
// Restart a node that died with Command(ctx, n, false): the others are still there. It
// rejoins by incremental transfer when a peer's gcache still holds what it missed. A lone node never
// founds by itself: it joins, and waits until somebody is primary.
//
// # All nodes down
//
// Never bootstrap the node that happens to be at hand: what only another one holds would be
// lost. Inspect every node, on its own host (Survey where all are on this machine); Choose finds the node that holds
// everything, or refuses and says what is missing. Prime that node with the plan, start it with bootstrap,
// WaitSynced, then start the others, one after another, without. The state UUID stays, so that the others join incrementally,
// unless an operator gave a node up: then it changes, so that the lost past cannot come back with that node, and so
// that CA nodes learn that commits may be missing.
//
// # Privileges
//
// Run by root, everything belongs to user mysql and mariadbd runs as mysql (the rsync state
// transfer fails as root). Run by anybody else, everything belongs to that user. The
// database's own administrator is the operating-system user who installed it, by socket only.
package galera

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"
)

// Ports of a node, on its Address.
const (
	PortSQL   = "3306" // clients
	PortGroup = "4567" // group communication
	PortIST   = "4568" // incremental state transfer
	PortSST   = "4444" // full state transfer
)

// Node is one MariaDB node as an operator describes it. The zero values of the optional
// fields give a node for a small machine.
type Node struct {
	Name    string   // unique in the cluster: "db1"
	Address string   // the node's own IP address; all four ports are bound there
	Dir     string   // holds node.cnf, data/, tls/ and the socket; created by Prepare. Its parents must be traversable by user mysql when root runs this
	Peers   []string // the addresses of all nodes, this one included, in the same order everywhere
	Cluster string   // cluster name; "trivet" if empty

	BufferPool string        // innodb_buffer_pool_size, "128M" if empty
	GCache     string        // gcache.size, "128M" if empty: bytes written per second × longest outage to survive without a full transfer
	Suspect    time.Duration // evs.suspect_timeout, 1s if zero; the other group timeouts follow from it
	TLS        *TLS          // nil: no TLS

	files files // of a node that Load found elsewhere than Prepare puts it
}

// files overrides where a node's files are.
type files struct{ config, data, socket string }

// TLS names PEM files. Prepare copies them into Dir, readable by mariadbd alone. They serve
// clients on the SQL port (server certificate; a client certificate is verified if given) and
// encrypt and authenticate group communication and incremental transfer, where every peer must
// hold a certificate of the same CA. Full transfer is encrypted through stunnel; without it
// a full transfer is refused, except between nodes that all live on loopback addresses.
type TLS struct{ Cert, Key, CA string }

// Data returns the data directory.
func (n Node) Data() string { return cmp.Or(n.files.data, filepath.Join(n.Dir, "data")) }

// Socket returns the path of the administrator's socket.
func (n Node) Socket() string { return cmp.Or(n.files.socket, filepath.Join(n.Dir, "sql.sock")) }

// Config returns the path of the configuration that Prepare renders.
func (n Node) Config() string { return cmp.Or(n.files.config, filepath.Join(n.Dir, "node.cnf")) }

// SQL returns host:port for clients.
func (n Node) SQL() string { return net.JoinHostPort(n.Address, PortSQL) }

// ErrMissing says that a program this package needs is not installed.
var ErrMissing = errors.New("not installed: install mariadb-server, galera-4 and rsync")

// Installed reports ErrMissing, wrapped with the name, when a program or the provider library is missing.
func Installed() error {
	for _, p := range []string{"mariadbd", "mariadb-install-db", "rsync"} {
		if _, err := program(p); err != nil {
			return err
		}
	}
	if _, err := os.Stat(provider); err != nil {
		return fmt.Errorf("%s: %w", provider, ErrMissing)
	}
	return nil
}

const provider = "/usr/lib/galera/libgalera_smm.so"

// program finds an executable also where an ordinary user's PATH does not look.
func program(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, ErrMissing)
}

// Prepare renders the configuration and, where there is no data directory yet, installs one.
// It is idempotent and never touches existing data. Do not call it for a running node whose
// TLS files changed without calling ReloadTLS afterwards.
func Prepare(ctx context.Context, n Node) error {
	if err := Installed(); err != nil {
		return err
	}
	if err := n.validate(); err != nil {
		return err
	}
	if err := n.makeDir(); err != nil {
		return err
	}
	if err := n.copyTLS(); err != nil {
		return fmt.Errorf("preparing %s: copying TLS files: %w", n.Name, err)
	}
	cnf, err := Render(n)
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.Config(), cnf, 0o644); err != nil {
		return fmt.Errorf("preparing %s: %w", n.Name, err)
	}
	return Install(ctx, n)
}

// Command returns the command that runs mariadbd in the foreground, logging to its standard
// error; the caller starts it and owns it. Call it afresh for every start: it first finds the
// position that the storage engine reached (which needs mariadbd to be stopped and takes about
// a second), so that a node that was killed rejoins incrementally.
//
// bootstrap founds a new primary component: only for the first node of Found, and for the one that Prime made ready. As root the
// command runs as user mysql. SIGTERM stops mariadbd gracefully.
func Command(ctx context.Context, n Node, bootstrap bool) (*exec.Cmd, error) {
	var args []string
	pos, err := Recover(ctx, n)
	if err != nil {
		return nil, err
	}
	// Voided by the provider, or by Prime for a new history: the storage engine's position is then not to be believed.
	st, err := readState(filepath.Join(n.Data(), "grastate.dat"))
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", n.Name, err)
	}
	if pos.Known() && st != nil && st.UUID != noHistory {
		args = append(args, "--wsrep-start-position="+pos.raw)
	}
	if bootstrap {
		args = append(args, "--wsrep-new-cluster")
	}
	return n.mariadbd(ctx, args...)
}

// mariadbd builds a command line as the right user. It is not bound to ctx: the caller stops it.
func (n Node) mariadbd(_ context.Context, args ...string) (*exec.Cmd, error) {
	bin, err := program("mariadbd")
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, append([]string{"--defaults-file=" + n.Config()}, args...)...)
	cmd.Dir = n.Dir
	own, err := owner()
	if err != nil {
		return nil, err
	}
	if own != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: own}
	}
	// The state transfer scripts need a PATH with the system programs.
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/usr/bin:/sbin:/bin")
	return cmd, nil
}

//go:embed node.cnf.tmpl
var cnfTemplate string

var cnf = template.Must(template.New("node.cnf").Parse(cnfTemplate))

// Render returns the node's configuration, every setting with its reason.
func Render(n Node) ([]byte, error) {
	n = n.withDefaults()
	var b strings.Builder
	err := cnf.Execute(&b, map[string]any{
		"Node": n, "ClusterAddress": n.clusterAddress(), "Index": slices.Index(n.Peers, n.Address) + 1,
		"Provider": provider, "Options": n.providerOptions(), "SSTMode": n.sstMode(),
		"PortSQL": PortSQL, "PortSST": PortSST,
	})
	if err != nil {
		return nil, fmt.Errorf("rendering the configuration of %s: %w", n.Name, err)
	}
	return []byte(b.String()), nil
}

// providerOptions returns wsrep_provider_options. Galera's durations are ISO 8601.
func (n Node) providerOptions() string {
	sec := func(d time.Duration) string {
		return "PT" + strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "S"
	}
	s := n.Suspect
	opts := []string{
		"gmcast.listen_addr=tcp://" + net.JoinHostPort(n.Address, PortGroup),
		"ist.recv_addr=" + net.JoinHostPort(n.Address, PortIST),
		"evs.keepalive_period=" + sec(s/4),
		"evs.inactive_check_period=" + sec(s/10),
		"evs.suspect_timeout=" + sec(s),
		"evs.inactive_timeout=" + sec(3*s),
		"evs.install_timeout=" + sec(2*s),
		"evs.join_retrans_period=" + sec(s*3/10),
		"gcs.fc_limit=1024",
		"gcache.size=" + n.GCache,
		"gcache.recover=yes",
		"pc.recovery=yes",
	}
	if n.TLS != nil {
		t := n.tlsFiles()
		opts = append(opts, "socket.ssl_key="+t.Key, "socket.ssl_cert="+t.Cert, "socket.ssl_ca="+t.CA)
	}
	return strings.Join(opts, ";")
}

// sstMode returns the ssl-mode of full state transfers, "" where TLS is not used.
func (n Node) sstMode() string {
	if n.TLS == nil {
		return ""
	}
	if _, err := program("stunnel"); err == nil {
		return "VERIFY_CA"
	}
	for _, p := range n.Peers {
		if ip := net.ParseIP(p); ip == nil || !ip.IsLoopback() {
			return "VERIFY_CA" // the transfer script then refuses, and names stunnel
		}
	}
	return "DISABLED"
}

func (n Node) clusterAddress() string { return "gcomm://" + strings.Join(n.Peers, ",") }

func (n Node) withDefaults() Node {
	if n.Cluster == "" {
		n.Cluster = "trivet"
	}
	if n.BufferPool == "" {
		n.BufferPool = "128M"
	}
	if n.GCache == "" {
		n.GCache = "128M"
	}
	if n.Suspect == 0 {
		n.Suspect = time.Second
	}
	return n
}

// validate refuses what would only fail later, inside a program that says less.
func (n Node) validate() error {
	switch {
	case n.Name == "" || strings.ContainsAny(n.Name, " /\n\"'"):
		return fmt.Errorf("galera node %q: the name must be one plain word", n.Name)
	case net.ParseIP(n.Address) == nil:
		return fmt.Errorf("galera node %s: address %q is not an IP address", n.Name, n.Address)
	case !slices.Contains(n.Peers, n.Address):
		return fmt.Errorf("galera node %s: peers %v do not contain its own address %s", n.Name, n.Peers, n.Address)
	case !filepath.IsAbs(n.Dir) || strings.ContainsAny(n.Dir, " \n;\"'"):
		return fmt.Errorf("galera node %s: directory %q must be absolute and without spaces, quotes and semicolons", n.Name, n.Dir)
	case len(n.Socket()) > 100: // sockaddr_un holds 108 octets
		return fmt.Errorf("galera node %s: directory %q is too long for a socket path: at most 90 characters", n.Name, n.Dir)
	}
	return nil
}

// owner returns the credential mariadbd must run with, nil when that is who we are.
func owner() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("mysql")
	if err != nil {
		return nil, fmt.Errorf("running as root, mariadbd runs as user mysql: %w", err)
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("reading the ids of user mysql: %w", err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}
