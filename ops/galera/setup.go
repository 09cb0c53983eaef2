package galera

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Found prepares nodes that all live on this machine, for the first time or again. The first time it
// installs one data directory, runs setup on it alone (see Secure, CreateAccount), stops it
// and copies it to the others, so that these join incrementally instead of by a full transfer. Found
// returns with every node stopped: start nodes[0] with bootstrap, wait until it is synced, then the others one after
// another. It reports whether this was the first time; if it was not, see Choose.
func Found(ctx context.Context, nodes []Node, setup func(context.Context, Node) error) (first bool, err error) {
	seed := nodes[0]
	first = !seed.installed()
	for _, n := range nodes {
		if n.installed() {
			first = false
		}
	}
	if !first {
		for _, n := range nodes {
			if err := Prepare(ctx, n); err != nil {
				return false, err
			}
		}
		return false, nil
	}
	if err := Prepare(ctx, seed); err != nil {
		return false, err
	}
	if err := alone(ctx, seed, setup); err != nil {
		// Half a setup must not look like a finished one at the next attempt.
		return false, errors.Join(fmt.Errorf("founding the cluster on %s: %w", seed.Name, err), os.RemoveAll(seed.Data()))
	}
	for _, n := range nodes[1:] {
		if err := clone(ctx, seed, n); err != nil {
			return false, fmt.Errorf("copying %s to %s: %w", seed.Name, n.Name, errors.Join(err, os.RemoveAll(n.Data())))
		}
	}
	return true, nil
}

// alone runs fn against a node that is a cluster of itself, and stops it cleanly.
func alone(ctx context.Context, n Node, fn func(context.Context, Node) error) error {
	cmd, err := n.mariadbd(ctx, "--wsrep-cluster-address=gcomm://", "--wsrep-new-cluster")
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(n.Dir, "found.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting mariadbd: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait(); cancel() }()
	err = WaitSynced(ctx, n)
	if err == nil {
		err = fn(ctx, n)
	}
	if err != nil {
		cmd.Process.Kill()
		<-exited
		return fmt.Errorf("%w (see %s)", err, log.Name())
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stopping mariadbd: %w", err)
	}
	return <-exited
}

// clone copies a cleanly stopped node's data to a node that has none.
func clone(ctx context.Context, from, to Node) error {
	if err := to.validate(); err != nil {
		return err
	}
	if err := to.makeDir(); err != nil {
		return err
	}
	// gcache and the last view are a node's own.
	rsync, err := program("rsync")
	if err != nil {
		return err
	}
	cmd := exec.Command(rsync, "--archive", "--sparse", "--exclude=/galera.cache", "--exclude=/gvwstate.dat", from.Data()+"/", to.Data()+"/")
	if err := run(ctx, cmd); err != nil {
		return err
	}
	state := filepath.Join(to.Data(), "grastate.dat")
	b, err := os.ReadFile(state)
	if err != nil {
		return err
	}
	b = bytes.Replace(b, []byte("safe_to_bootstrap: 1"), []byte("safe_to_bootstrap: 0"), 1)
	if err := os.WriteFile(state, b, 0o660); err != nil {
		return err
	}
	return Prepare(ctx, to)
}

// Secure drops anonymous accounts (they take loopback logins away from the real ones), the
// test database, and every way in but the socket for the administrator. Idempotent; needs a synced node.
func Secure(ctx context.Context, n Node) error {
	db, err := Admin(n)
	if err != nil {
		return err
	}
	defer db.Close()
	// '%' in the account names of unix_socket accounts would be remote access: only localhost may stay.
	rows, err := db.QueryContext(ctx, `SELECT User, Host FROM mysql.global_priv
		WHERE User = '' OR (Host <> 'localhost' AND User IN ('root', 'mysql', 'mariadb.sys', SUBSTRING_INDEX(CURRENT_USER(), '@', 1)))`)
	if err != nil {
		return fmt.Errorf("securing %s: %w", n.Name, err)
	}
	defer rows.Close()
	var drop []string
	for rows.Next() {
		var u, h string
		if err := rows.Scan(&u, &h); err != nil {
			return fmt.Errorf("securing %s: %w", n.Name, err)
		}
		drop = append(drop, fmt.Sprintf("DROP USER %s@%s", quote(u), quote(h)))
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("securing %s: %w", n.Name, err)
	}
	// Not IF EXISTS: that which is not there cannot be replicated, and is refused.
	var test int
	if err := db.QueryRowContext(ctx, "SELECT COUNT(*) FROM information_schema.schemata WHERE schema_name = 'test'").Scan(&test); err != nil {
		return fmt.Errorf("securing %s: %w", n.Name, err)
	}
	if test > 0 {
		drop = append(drop, "DROP DATABASE test")
	}
	for _, q := range drop {
		if _, err := db.ExecContext(ctx, q); err != nil {
			return fmt.Errorf("securing %s: %w", n.Name, err)
		}
	}
	return nil
}

// CreateAccount creates a database and an account that owns it: it may create tables and hand on rights
// in it, and create accounts. It is meant for migrations and grants, not for the processes
// of the stack. Idempotent; an existing account gets the password. Needs a synced node.
func CreateAccount(ctx context.Context, n Node, database, name, password string) error {
	db, err := Admin(n)
	if err != nil {
		return err
	}
	defer db.Close()
	account := quote(name) + "@'%'"
	for _, q := range []string{
		"CREATE DATABASE IF NOT EXISTS `" + strings.ReplaceAll(database, "`", "``") + "` CHARACTER SET binary",
		"CREATE USER IF NOT EXISTS " + account,
		"ALTER USER " + account + " IDENTIFIED BY " + quote(password),
		"GRANT ALL ON `" + strings.ReplaceAll(database, "`", "``") + "`.* TO " + account + " WITH GRANT OPTION",
		"GRANT CREATE USER ON *.* TO " + account,
	} {
		if _, err := db.ExecContext(ctx, q); err != nil {
			// The statement may hold the password: it is not part of the message.
			return fmt.Errorf("creating account %s on %s: %w", name, n.Name, err)
		}
	}
	return nil
}

// quote returns an SQL string literal.
func quote(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`, "\x00", `\0`).Replace(s) + "'"
}

// Install gives a node that has no data directory, because it is new or its data were taken away, an empty one, with which it fetches everything
// from the others. Idempotent; it never touches existing data, nor the configuration.
func Install(ctx context.Context, n Node) error {
	if n.installed() {
		return nil
	}
	if err := Installed(); err != nil {
		return err
	}
	if err := n.makeDir(); err != nil {
		return err
	}
	return n.install(ctx)
}

func (n Node) installed() bool {
	_, err := os.Stat(filepath.Join(n.Data(), "mysql"))
	return err == nil
}

// install creates the data directory under another name first: an interrupted
// installation never looks like a finished one.
func (n Node) install(ctx context.Context) error {
	bin, err := program("mariadb-install-db")
	if err != nil {
		return err
	}
	me, err := user.Current()
	if err != nil {
		return fmt.Errorf("installing the data directory of %s: %w", n.Name, err)
	}
	tmp := n.Data() + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("installing the data directory of %s: %w", n.Name, err)
	}
	args := []string{"--no-defaults", "--datadir=" + tmp, "--skip-test-db", "--skip-name-resolve",
		"--auth-root-authentication-method=socket", "--auth-root-socket-user=" + me.Username}
	if os.Geteuid() == 0 {
		args = append(args, "--user=mysql")
	}
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+n.tmp()) // see tmpdir in node.cnf
	if err := run(ctx, cmd); err != nil {
		return fmt.Errorf("installing the data directory of %s: %w", n.Name, err)
	}
	if err := os.Rename(tmp, n.Data()); err != nil {
		return fmt.Errorf("installing the data directory of %s: %w", n.Name, err)
	}
	return nil
}

// makeDir creates the node's directory for the user that mariadbd runs as, who must be able to reach it.
func (n Node) makeDir() error {
	for _, dir := range []string{n.Dir, n.tmp()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("preparing %s: %w", n.Name, err)
		}
	}
	own, err := owner()
	if err != nil || own == nil {
		return err
	}
	for _, dir := range []string{n.Dir, n.tmp()} {
		if err := os.Chown(dir, int(own.Uid), int(own.Gid)); err != nil {
			return fmt.Errorf("preparing %s: %w", n.Name, err)
		}
	}
	for dir := filepath.Dir(n.Dir); dir != "/"; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err != nil {
			return fmt.Errorf("preparing %s: %w", n.Name, err)
		}
		if st.Mode().Perm()&0o001 == 0 {
			return fmt.Errorf("preparing %s: user mysql cannot reach %s: allow it to traverse %s (chmod o+x), or choose another directory", n.Name, n.Dir, dir)
		}
	}
	return nil
}

func (n Node) tmp() string { return filepath.Join(n.Dir, "tmp") }

func (n Node) tlsFiles() TLS {
	dir := filepath.Join(n.Dir, "tls")
	return TLS{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), CA: filepath.Join(dir, "ca.pem")}
}

// copyTLS gives mariadbd its own copy of the identity: the original key is readable by its owner alone.
func (n Node) copyTLS() error {
	if n.TLS == nil {
		return nil
	}
	own, err := owner()
	if err != nil {
		return err
	}
	to := n.tlsFiles()
	if err := os.MkdirAll(filepath.Dir(to.Key), 0o755); err != nil {
		return err
	}
	for _, f := range []struct{ from, to string }{{n.TLS.CA, to.CA}, {n.TLS.Cert, to.Cert}, {n.TLS.Key, to.Key}} {
		b, err := os.ReadFile(f.from)
		if err != nil {
			return err
		}
		tmp := f.to + ".new"
		if err := os.RemoveAll(tmp); err != nil {
			return err
		}
		if err := os.WriteFile(tmp, b, 0o600); err != nil {
			return err
		}
		if own != nil {
			if err := os.Chown(tmp, int(own.Uid), int(own.Gid)); err != nil {
				return err
			}
		}
		if err := os.Rename(tmp, f.to); err != nil {
			return err
		}
	}
	return nil
}

// run runs a short-lived program until it ends or ctx does; its output is part of the error.
func run(ctx context.Context, cmd *exec.Cmd) error {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), errors.Join(err, ctx.Err()), bytes.TrimSpace(out.Bytes()))
	}
	return nil
}
