// Package e2e_test runs the whole cluster as real processes and holds it to what it promises: one scenario per file, named for the behaviour, each
// ended by fsck.
package e2e_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "github.com/go-sql-driver/mysql"

	"trivet/cluster"
	"trivet/load"
	"trivet/load/history"
)

// network is the loopback block of the scenarios' cluster; the demo of a developer on the same machine has another.
const network = "127.88.0.0/16"

// chaosTable makes the kill scenarios print their table and write build/chaos.json.
var chaosTable = flag.Bool("chaos-table", false, "print the kill table and write build/chaos.json")

// chaosRowOnly leaves the kill scenarios of all other rows out.
var chaosRowOnly = flag.String("chaos-row", "", "run only the kill scenario of this row of the table")

// shared is the one cluster that the scenarios use one after another; each leaves it as it found it.
var shared struct {
	once sync.Once
	dir  string
	err  error
}

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if *chaosTable && !writeChaos() {
		code = 1
	}
	if shared.dir != "" {
		out, err := exec.Command(pkictl(), "demo", "down", "--dir", shared.dir).CombinedOutput()
		if err != nil {
			fmt.Fprintf(os.Stderr, "taking the cluster down: %v\n%s", err, out)
			code = 1
		}
		if _, err := os.Stat(shared.dir); !os.IsNotExist(err) {
			fmt.Fprintf(os.Stderr, "%s is still there after demo down\n", shared.dir)
			code = 1
		}
		if err := os.RemoveAll(filepath.Dir(shared.dir)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func pkictl() string {
	path, err := filepath.Abs("../bin/pkictl")
	if err != nil {
		panic(err)
	}
	return path
}

// needTools skips a scenario where what it needs is not installed.
func needTools(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a whole cluster")
	}
	for _, tool := range []string{"mariadbd", "openssl", "softhsm2-util"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is missing; run ops/install.sh test", tool)
			}
			t.Skipf("%s is missing; run ops/install.sh test", tool)
		}
	}
}

// up returns the shared cluster, started by whoever asks first.
func up(t *testing.T) *site {
	t.Helper()
	needTools(t)
	shared.once.Do(func() {
		if _, err := os.Stat(pkictl()); err != nil {
			shared.err = fmt.Errorf("%w; run make build", err)
			return
		}
		shared.dir, shared.err = directory("trivet-e2e-")
		if shared.err != nil {
			return
		}
		shared.err = os.Chmod(shared.dir, 0o755)
		shared.dir = filepath.Join(shared.dir, "cluster")
		began := time.Now()
		out, err := exec.Command(pkictl(), "demo", "up", "--dir", shared.dir, "--network", network).CombinedOutput()
		if err != nil {
			shared.err = fmt.Errorf("demo up: %w\n%s", err, out)
			return
		}
		t.Logf("cluster up in %s", time.Since(began).Round(100*time.Millisecond))
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	s := &site{dir: shared.dir, history: beginHistory(t)}
	t.Cleanup(func() { s.keepLogs(t) })
	s.allWell(t)
	return s
}

// keepLogs leaves what every process has said in build/log if the scenario failed: the cluster's own directory goes.
func (s *site) keepLogs(t *testing.T) {
	if !t.Failed() {
		return
	}
	dir := filepath.Join("..", "build", "log", strings.ReplaceAll(t.Name(), "/", "_"))
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(s.dir, "log"))); err != nil {
		t.Errorf("keeping the logs: %v", err)
		return
	}
	t.Logf("the logs are in %s", dir)
}

// site is the cluster as its users see it.
type site struct {
	dir     string
	history *history.Log // of this scenario
}

// run calls pkictl against the cluster; the test ends if it fails.
func (s *site) run(t *testing.T, args ...string) []byte {
	t.Helper()
	out, stderr, err := s.try(args...)
	if err != nil {
		t.Fatalf("pkictl %s: %v\n%s%s", strings.Join(args, " "), err, stderr, out)
	}
	return out
}

func (s *site) try(args ...string) (stdout, stderr []byte, err error) {
	var o, e bytes.Buffer
	cmd := exec.Command(pkictl(), append(args, "--dir", s.dir)...)
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	return o.Bytes(), e.Bytes(), err
}

func (s *site) status(t *testing.T) cluster.Status {
	t.Helper()
	var st cluster.Status
	if err := json.Unmarshal(s.run(t, "demo", "status", "--output", "json"), &st); err != nil {
		t.Fatalf("reading demo status: %v", err)
	}
	return st
}

func (s *site) process(t *testing.T, name string) cluster.Process {
	t.Helper()
	for _, p := range s.status(t).Processes {
		if p.Name == name {
			return p
		}
	}
	t.Fatalf("no process %s", name)
	return cluster.Process{}
}

// allWell waits until every process runs and reports every capability.
func (s *site) allWell(t *testing.T) {
	t.Helper()
	var stdout, stderr []byte
	eventually(t, 60*time.Second, func() error {
		var err error
		if st := s.status(t); st.State != cluster.Running {
			return fmt.Errorf("the cluster is %s", st.State)
		}
		if stdout, stderr, err = s.try("health"); err != nil {
			return fmt.Errorf("pkictl health: %w\n%s%s", err, stdout, stderr)
		}
		return nil
	})
}

// kill sends SIGKILL to a process as a crash would: the supervisor is to start it again.
func (s *site) kill(t *testing.T, name string) (pid int) {
	t.Helper()
	p := s.process(t, name)
	if p.PID <= 1 {
		t.Fatalf("%s has no process: %+v", name, p)
	}
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
		t.Fatalf("killing %s (pid %d): %v", name, p.PID, err)
	}
	return p.PID
}

// client is an HTTPS client with the given person's identity; none if pair is empty.
func (s *site) client(t *testing.T, pair cluster.KeyPair, conns int) *http.Client {
	t.Helper()
	trust, err := os.ReadFile(s.status(t).Credentials.Trust)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS13}
	cfg.RootCAs.AppendCertsFromPEM(trust)
	if pair.Cert != "" {
		cert, err := tls.LoadX509KeyPair(pair.Cert, pair.Key)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	return load.NewClient(cfg, conns)
}

// authority returns the issuing CA's certificate and a pool with its root.
func (s *site) authority(t *testing.T) (*x509.Certificate, *x509.CertPool) {
	t.Helper()
	cas := s.status(t).CAs
	if len(cas) == 0 {
		t.Fatal("demo status lists no CA")
	}
	raw, err := os.ReadFile(cas[0].Chain)
	if err != nil {
		t.Fatal(err)
	}
	var chain []*x509.Certificate
	for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	if len(chain) < 2 {
		t.Fatalf("%s holds %d certificates; want the CA and its root", cas[0].Chain, len(chain))
	}
	pool := x509.NewCertPool()
	pool.AddCert(chain[len(chain)-1])
	return chain[0], pool
}

// issuer is a load client with the requester's identity.
func (s *site) issuer(t *testing.T, recorder *load.Recorder) *load.Issuer {
	t.Helper()
	st := s.status(t)
	_, roots := s.authority(t)
	i := load.NewIssuer(st.Endpoints.API[0], s.client(t, st.Credentials.Requester, 128))
	i.Roots, i.Recorder = roots, recorder
	i.History, i.Principal = s.history, principal(t, st.Credentials.Requester)
	return i
}

// directory makes one in the system's temporary directory, not the test's own: the database server's user must be able to reach it.
func directory(prefix string) (string, error) {
	return os.MkdirTemp(cmp.Or(os.Getenv("TMPDIR"), "/var/tmp"), prefix)
}

// principal is whom an identity names.
func principal(t *testing.T, pair cluster.KeyPair) string {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(pair.Cert, pair.Key)
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.Leaf.URIs) != 1 {
		t.Fatalf("%s names %v", pair.Cert, cert.Leaf.URIs)
	}
	return cert.Leaf.URIs[0].String()
}

// fsck ends a scenario: what its clients saw is true, and every invariant holds on the live cluster. Responders are asked about what the scenario has issued and some
// of what others have; after all of them, see soak_test.go, about everything.
func (s *site) fsck(t *testing.T) { t.Helper(); s.fsckAsking(t, 200) }

func (s *site) fsckAsking(t *testing.T, about int) {
	t.Helper()
	s.allWell(t)
	s.check(t)
	out, stderr, err := s.try("fsck", "--output", "json", "--ask", strconv.Itoa(about))
	if err != nil {
		t.Fatalf("fsck: %v\n%s%s", err, stderr, out)
	}
	var report struct {
		OK        bool           `json:"ok"`
		Checked   map[string]int `json:"checked"`
		Unchecked []string       `json:"unchecked"`
	}
	if err := json.Unmarshal(out, &report); err != nil || !report.OK {
		t.Fatalf("fsck: %v\n%s", err, out)
	}
	if report.Checked["certificates"] == 0 || report.Checked["ocsp_answers"] == 0 || report.Checked["journal_records"] == 0 {
		t.Fatalf("fsck looked at nothing: %v", report.Checked)
	}
	if about == 0 && len(report.Unchecked) > 0 {
		t.Fatalf("fsck left something out: %v", report.Unchecked)
	}
	t.Logf("fsck: %v, left out: %v", report.Checked, report.Unchecked)
}

// database opens the record with the account that may only read. What it reads has everything that was committed before.
func (s *site) database(t *testing.T) *sql.DB {
	t.Helper()
	db := s.databaseAt(t, s.status(t).Database.Nodes[0])
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func (s *site) databaseAt(t *testing.T, node string) *sql.DB {
	t.Helper()
	d := s.status(t).Database
	password, err := os.ReadFile(d.PasswordFile)
	if err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("mysql", fmt.Sprintf("%s:%s@tcp(%s)/%s?parseTime=true&wsrep_sync_wait=1", d.User, strings.TrimSpace(string(password)), node, d.Name))
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// eventually calls f until it succeeds; a failure that outlasts the limit ends the test.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	for tick := time.NewTicker(100 * time.Millisecond); ; {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not so after %s: %v", limit, err)
		case <-tick.C:
		}
	}
}
