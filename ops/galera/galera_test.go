package galera_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"trivet/ops/galera"
)

// rig runs the nodes of one test.
type rig struct {
	t      *testing.T
	nodes  []galera.Node
	procs  []*exec.Cmd
	launch chan func()
}

func newRig(t *testing.T, prefix string, size int, tls *galera.TLS) *rig {
	if err := galera.Installed(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "trivet-galera")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // user mysql must reach it
		t.Fatal(err)
	}
	r := &rig{t: t, procs: make([]*exec.Cmd, size), launch: make(chan func())}
	go func() { // Pdeathsig follows the thread that started a process
		runtime.LockOSThread()
		for f := range r.launch {
			f()
		}
	}()
	var peers []string
	for i := range size {
		peers = append(peers, fmt.Sprintf("%s.%d", prefix, i+1))
	}
	for i, p := range peers {
		name := fmt.Sprintf("db%d", i+1)
		r.nodes = append(r.nodes, galera.Node{Name: name, Address: p, Dir: filepath.Join(dir, name), Peers: peers, Cluster: "test", TLS: tls})
	}
	t.Cleanup(func() {
		for i := range r.nodes {
			r.kill(i)
			if t.Failed() {
				b, _ := os.ReadFile(r.log(i))
				t.Logf("--- %s\n%s", r.nodes[i].Name, b[max(0, len(b)-3000):])
			}
		}
		close(r.launch)
		os.RemoveAll(dir)
	})
	return r
}

func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	r.t.Cleanup(cancel)
	return ctx
}

func (r *rig) log(i int) string { return r.nodes[i].Dir + ".log" }

func (r *rig) start(i int, bootstrap bool) {
	r.t.Helper()
	for try := 1; ; try++ {
		r.launched(i, bootstrap)
		ctx, cancel := context.WithTimeout(r.ctx(), 30*time.Second)
		err := galera.WaitSynced(ctx, r.nodes[i])
		cancel()
		if err == nil {
			return
		}
		if bootstrap || try == 3 {
			r.t.Fatal(err)
		}
		// A node that joins while the view changes may get a position older than the view, and ends itself ("SST script passed bogus GTID"). Whoever
		// runs it starts it again.
		r.t.Logf("%s is started again: %v", r.nodes[i].Name, err)
		r.kill(i)
	}
}

func (r *rig) launched(i int, bootstrap bool) {
	r.t.Helper()
	cmd, err := galera.Command(r.ctx(), r.nodes[i], bootstrap)
	if err != nil {
		r.t.Fatal(err)
	}
	log, err := os.OpenFile(r.log(i), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		r.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	r.launch <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		r.t.Fatal(err)
	}
	r.procs[i] = cmd
}

func (r *rig) kill(i int) {
	if p := r.procs[i]; p != nil {
		p.Process.Kill()
		p.Wait()
		r.procs[i] = nil
	}
}

// found installs and starts all nodes.
func (r *rig) found() {
	r.t.Helper()
	first, err := galera.Found(r.ctx(), r.nodes, func(ctx context.Context, n galera.Node) error {
		return errors.Join(galera.Secure(ctx, n), galera.CreateAccount(ctx, n, "trivet", "owner", "it's a \\ secret"))
	})
	if err != nil || !first {
		r.t.Fatalf("first %t, %v", first, err)
	}
	for i := range r.nodes {
		r.start(i, i == 0)
	}
}

func (r *rig) exec(i int, q string) {
	r.t.Helper()
	db, err := galera.Admin(r.nodes[i])
	if err != nil {
		r.t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(r.ctx(), q); err != nil {
		r.t.Fatal(err)
	}
}

// insert writes a row at a node whose peers are leaving: until they have agreed on who is left, it may refuse, or not know whether it has written.
func (r *rig) insert(i, row int) {
	r.t.Helper()
	db, err := galera.Admin(r.nodes[i])
	if err != nil {
		r.t.Fatal(err)
	}
	defer db.Close()
	for ctx := r.ctx(); ; time.Sleep(50 * time.Millisecond) {
		if _, err = db.ExecContext(ctx, "INSERT IGNORE INTO trivet.t VALUES (?)", row); err == nil {
			return
		}
		if ctx.Err() != nil {
			r.t.Fatalf("%s takes no row: %v", r.nodes[i].Name, err)
		}
	}
}

// together waits until every node sees all of them, and goes on to for three seconds: long enough for one that was silent to be given up, on a busy machine, too.
// Whoever is given up at the moment in which another one dies leaves the third without a majority.
func (r *rig) together() {
	r.t.Helper()
	sees := func(i int) error {
		st, err := galera.Query(r.ctx(), r.nodes[i])
		if err == nil && (!st.Serving() || st.Size != len(r.nodes)) {
			err = fmt.Errorf("%s is not in step with all others: %+v", r.nodes[i].Name, st)
		}
		return err
	}
	deadline := time.Now().Add(time.Minute)
	for good := 0; good < 30; time.Sleep(100 * time.Millisecond) {
		good++
		for i := range r.nodes {
			if err := sees(i); err != nil {
				good = 0
				if time.Now().After(deadline) {
					r.t.Fatal(err)
				}
			}
		}
	}
}

func (r *rig) count(i int, q string) (n int) {
	r.t.Helper()
	db, err := galera.Admin(r.nodes[i])
	if err != nil {
		r.t.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRowContext(r.ctx(), "SET STATEMENT wsrep_sync_wait=1 FOR "+q).Scan(&n); err != nil {
		r.t.Fatal(err)
	}
	return n
}

func TestGroupAndClientsUseTLS(t *testing.T) {
	files := selfSigned(t)
	r := newRig(t, "127.90.3", 2, files)
	r.found()
	for i := range r.nodes {
		if s, err := galera.Query(r.ctx(), r.nodes[i]); err != nil || s.Size != 2 {
			t.Errorf("node %d: %+v, %v", i, s, err)
		}
	}
	if n := r.count(0, "SELECT @@have_ssl = 'YES' AND @@wsrep_provider_options LIKE '%socket.ssl = YES%'"); n != 1 {
		t.Error("TLS is not in use")
	}
	if err := galera.Prepare(r.ctx(), r.nodes[0]); err != nil {
		t.Fatal(err)
	}
	if err := galera.ReloadTLS(r.ctx(), r.nodes[0]); err != nil {
		t.Error(err)
	}
	// A plain connection to the group port is no member.
	c, err := net.Dial("tcp", net.JoinHostPort(r.nodes[0].Address, galera.PortGroup))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	// A node that falls out of the group is brought back.
	ctx, cancel := context.WithCancel(context.Background())
	done, ended := make(chan error), make(chan struct{}, 10)
	go func() {
		done <- galera.Guard(ctx, r.nodes[1], slog.New(slog.DiscardHandler), func() { ended <- struct{}{} })
	}()
	r.exec(1, "SET GLOBAL wsrep_cluster_address = ''")
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if s, err := galera.Query(r.ctx(), r.nodes[1]); err == nil && s.Serving() && s.Size == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the node did not join again")
		}
	}
	if len(ended) > 0 {
		t.Error("the process of a node that joined again was to be ended")
	}
	// One that cannot, here because there is nobody to join, is to be ended and started again.
	r.kill(0)
	r.exec(1, "SET GLOBAL wsrep_cluster_address = ''")
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		t.Error("the node stays alive, alone")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestNodesThatCannotWorkAreRefused(t *testing.T) {
	if galera.Installed() != nil {
		t.Skip("MariaDB is not installed")
	}
	good := galera.Node{Name: "db1", Address: "127.90.4.1", Dir: "/tmp/x", Peers: []string{"127.90.4.1"}}
	for name, change := range map[string]func(*galera.Node){
		"plain word":       func(n *galera.Node) { n.Name = "db 1" },
		"not an IP":        func(n *galera.Node) { n.Address = "localhost" },
		"own address":      func(n *galera.Node) { n.Peers = []string{"127.90.4.2"} },
		"must be absolute": func(n *galera.Node) { n.Dir = "x" },
		"too long":         func(n *galera.Node) { n.Dir = "/" + strings.Repeat("x", 100) },
	} {
		n := good
		change(&n)
		if err := galera.Prepare(context.Background(), n); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// selfSigned returns a CA, and one certificate of it for every node.
func selfSigned(t *testing.T) *galera.TLS {
	t.Helper()
	dir := t.TempDir()
	make := func(name string, ca bool, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			BasicConstraintsValid: true, IsCA: ca, KeyUsage: x509.KeyUsageDigitalSignature}
		if ca {
			c.KeyUsage |= x509.KeyUsageCertSign
			parent, signer = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		for file, block := range map[string]*pem.Block{name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: pkcs8}} {
			if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	ca, key := make("ca", true, nil, nil)
	make("node", false, ca, key)
	return &galera.TLS{Cert: filepath.Join(dir, "node.pem"), Key: filepath.Join(dir, "node.key"), CA: filepath.Join(dir, "ca.pem")}
}
