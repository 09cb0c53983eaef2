package main

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/health"
	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsmsync"
	"trivet/identity"
)

// cluster is a real database; nil where MariaDB is not installed.
var cluster *dbtest.Cluster

func TestMain(m *testing.M) {
	os.Exit(dbtest.Main(m, "127.92.3", 2, func(c *dbtest.Cluster) { cluster = c }))
}

var discard = slog.New(slog.DiscardHandler)

// lab is a site with two HSM members, CAs established, and a configuration for one CA node.
type lab struct {
	*hsmtest.Lab
	dir      string // of identities
	members  []*hsmtest.Member
	database db.Config
	config   string
	journal  string
}

const (
	apiAddress   = "127.92.4.1:8443"
	adminAddress = "127.92.4.1:9443"
)

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{database: cluster.Need(t).New(t), Lab: hsmtest.NewLab(t), journal: t.TempDir()}
	for _, name := range []string{"hsmd-a", "hsmd-b"} {
		m := l.Start(name)
		l.members = append(l.members, m)
	}
	l.dir = filepath.Dir(l.members[0].Dir)
	l.establish(t)
	l.Identity(identity.RoleCA, "ca1")
	l.Identity(identity.RoleSync, "sync-ca1")
	id := filepath.Join(l.dir, "ca-ca1")
	nodes, err := json.Marshal(l.database.Nodes)
	if err != nil {
		t.Fatal(err)
	}
	l.config = filepath.Join(t.TempDir(), "ca.yaml")
	hsmtest.Write(t, l.config, fmt.Sprintf(`cluster: lab
node: ca1
identity: {cert: %s/cert.pem, key: %s/key.pem, trust: %s/trust.pem}
listen: {api: %q, admin: %q}
state_dir: %s
site: here
base_url: http://pki.test
mac_key_file: %[12]s
database: {nodes: %[7]s, name: %s, user: %s, password_file: %s}
sync: {identity: {cert: %[11]s/cert.pem, key: %[11]s/key.pem, trust: %[11]s/trust.pem}, user: %[9]s, password_file: %[10]q}
`, id, id, id, apiAddress, adminAddress, l.journal, nodes, l.database.Name, l.database.User, l.database.PasswordFile, filepath.Join(l.dir, "sync-sync-ca1"), macKeys(t, t.TempDir())))
	return l
}

// macKeys makes a file of MAC keys in dir.
func macKeys(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(dir, "mac-keys")
	hsmtest.Write(t, file, strings.Repeat("7e57", 16))
	return file
}

func (l *lab) groups(t *testing.T, store *db.Store, role identity.Role) *hsmsync.Groups {
	t.Helper()
	g, err := hsmsync.NewGroups(hsmsync.Config{Identity: l.Identity(role, "init"), Manifest: hsmsync.NewManifest(store), Epoch: 1, Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return g
}

// establish makes keys and CAs as pkictl init does.
func (l *lab) establish(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	store := dbtest.Open(t, l.database)
	coordinator, err := hsmsync.NewCoordinator(hsmsync.CoordinatorConfig{
		Group: "main", Identity: l.Identity(identity.RoleSync, "init"), Chain: hsmsync.NewManifest(store), Log: discard,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer coordinator.Close()
	var members []hsmsync.Member
	for _, m := range l.members {
		members = append(members, hsmsync.Member{Name: m.Name, Address: m.Addr})
	}
	if err := coordinator.Setup(ctx, members, hsmsync.Policy{}); err != nil {
		t.Fatal(err)
	}
	if err := coordinator.SetEpoch(ctx, hsm.EpochRecord{Site: "here", Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	key := func(label string, p hsm.Purpose) hsm.KeyRecord {
		record, err := coordinator.CreateKey(ctx, hsm.KeySpec{Label: label, Purpose: p, Algorithm: hsm.P256})
		if err != nil {
			t.Fatal(err)
		}
		return record
	}
	spec := ca.EstablishSpec{Requester: "trivet://lab/ceremony/init"}
	for _, g := range []struct {
		into     *ca.GenerationSpec
		id       string
		lifetime time.Duration
	}{{&spec.Root, "root", 3650 * 24 * time.Hour}, {&spec.Issuing, "demo", 1825 * 24 * time.Hour}} {
		sign, status := key(g.id+"-g1", "ca"), key(g.id+"-g1-ocsp", "ocsp")
		*g.into = ca.GenerationSpec{
			CA: g.id, Generation: 1, Subject: pkix.Name{CommonName: "Lab " + g.id}, Lifetime: g.lifetime, KeyGroup: "main", KeyID: string(sign.ID),
			ResponderGroup: "main", ResponderKeyID: string(status.ID), ResponderSPKI: status.SPKI,
		}
	}
	ceremony := l.groups(t, store, identity.RoleCeremony)
	n := catest.Start(t, l.database, keys{ceremony}, catest.Config{Name: "init"})
	insist(t, ctx, func() error { return ca.Establish(ctx, n.Engine, spec) })
}

// insist repeats what fails while members are still being proved.
func insist(t *testing.T, ctx context.Context, fn func() error) {
	t.Helper()
	for {
		err := fn()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// client speaks to the node as that person or process.
func (l *lab) client(t *testing.T, role identity.Role) *http.Client {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: l.Identity(role, "x").ClientTLS(identity.RoleCA)}, Timeout: 20 * time.Second}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func reportOf(c *http.Client, address string) (r health.Report, err error) {
	res, err := c.Get("https://" + address + "/healthz")
	if err != nil {
		return r, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return r, fmt.Errorf("status %d", res.StatusCode)
	}
	return r, json.NewDecoder(res.Body).Decode(&r)
}

// Phases: the node starts and reports what it can; it issues; one HSM member dies, then the other; one comes back; it drains and ends.
func TestNodeServesReportsAndDrains(t *testing.T) {
	l := newLab(t)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- run(ctx, l.config, false, discard) }()
	lb, alice := l.client(t, identity.RoleLB), l.client(t, identity.RoleRequester)
	var report health.Report
	until := func(what string, cond func() bool) {
		t.Helper()
		dbtest.Until(t, what, func() bool {
			select {
			case err := <-done:
				done <- err
				t.Fatalf("waiting until %s: the node ended: %v", what, err)
			default:
			}
			var err error
			report, err = reportOf(lb, apiAddress)
			return err == nil && cond()
		})
	}
	until("the node can issue", func() bool { return report.State == health.OK && report.Can("issue:demo") })
	for _, c := range []string{"read", "revoke", "admin", "crl:demo-g1", "crl:root-g1"} {
		if !report.Can(c) {
			t.Errorf("not %s: %+v", c, report.Capabilities[c])
		}
	}
	if _, offered := report.Capabilities["issue:root"]; offered {
		t.Error("the node offers to issue from the root")
	}

	until("it shows the members of the HSM group", func() bool {
		for _, c := range report.Checks {
			if c.Name == "hsm" && c.OK && c.Detail == "hsmd-a active, hsmd-b active" {
				return true
			}
		}
		return false
	})
	store := dbtest.Open(t, l.database)
	until("its key-sync job is at work", func() bool {
		lease, err := hsmsync.NewManifest(store).Log(t.Context(), "main/lease", 1)
		return err == nil && len(lease) > 0
	})

	body, err := json.Marshal(map[string]string{"profile": "tls-server", "ca": "demo", "csr": string(catest.CSR(t, "www.example.org"))})
	if err != nil {
		t.Fatal(err)
	}
	issue := func(key string) (int, []byte, error) {
		r, err := http.NewRequest(http.MethodPost, "https://"+apiAddress+"/v1/certificates", strings.NewReader(string(body)))
		if err != nil {
			return 0, nil, err
		}
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Accept", "application/pkix-cert")
		r.Header.Set("Idempotency-Key", key)
		res, err := alice.Do(r)
		if err != nil {
			return 0, nil, err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return res.StatusCode, b, err
	}
	status, der, err := issue("one")
	if err != nil || status != http.StatusCreated {
		t.Fatalf("%d %s %v", status, der, err)
	}
	if _, err := x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}

	l.members[0].Kill()
	if status, again, err := issue("two"); err != nil || status != http.StatusCreated {
		t.Errorf("one member left: %d %s %v", status, again, err)
	}
	l.members[1].Kill()
	until("the node says that it cannot issue", func() bool {
		return !report.Can("issue:demo") && !report.Can("crl:demo-g1") && report.Can("read") && report.Can("revoke") && report.State == health.Degraded
	})
	if cause := report.Capabilities["issue:demo"].Cause; cause == "" {
		t.Error("without a cause")
	}
	if status, text, err := issue("three"); err != nil || status != http.StatusServiceUnavailable || !strings.Contains(string(text), "hsm-unavailable") {
		t.Errorf("no member left: %d %s %v", status, text, err)
	}
	l.members[1].Start()
	l.members[1].WaitReady()
	until("the node can issue again", func() bool { return report.Can("issue:demo") })
	if status, text, err := issue("three"); err != nil || status != http.StatusCreated {
		t.Errorf("the member is back: %d %s %v", status, text, err)
	}
	if status, again, err := issue("one"); err != nil || status != http.StatusCreated || string(again) != string(der) {
		t.Errorf("the repeat differs: %d %v", status, err)
	}

	// A second process of the node is kept out by the journal's lock.
	if err := run(ctx, l.config, false, discard); err == nil || !strings.Contains(err.Error(), "journal") {
		t.Errorf("a second process: %v", err)
	}

	stop()
	draining := false
	dbtest.Until(t, "the node ends", func() bool {
		if r, err := reportOf(lb, adminAddress); err == nil && r.State == health.Draining {
			draining = true
		}
		select {
		case err := <-done:
			done <- err
			return true
		default:
			return false
		}
	})
	if err := <-done; err != nil {
		t.Errorf("it ended with %v", err)
	}
	if !draining {
		t.Error("it did not say that it was draining")
	}
	lanes, open := l.lanes(t)
	if lanes != 4 || open != 2 { // those of init, which still runs
		t.Errorf("%d lanes, %d open", lanes, open)
	}
}

// lanes counts lanes, and those without an end.
func (l *lab) lanes(t *testing.T) (all, open int) {
	t.Helper()
	s := dbtest.Open(t, l.database)
	if _, err := s.Read(catest.Soon(t), "test", "", readLanes(&all, &open)); err != nil {
		t.Fatal(err)
	}
	return all, open
}

func TestConfigurationMistakesAreNamed(t *testing.T) {
	dir := t.TempDir()
	infra, err := identity.CreateAuthority(filepath.Join(dir, "infra"), "lab")
	if err != nil {
		t.Fatal(err)
	}
	files, err := infra.IssueTo(filepath.Join(dir, "id"), identity.Principal{Cluster: "lab", Role: identity.RoleCA, Name: "ca1"}, nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	mover, err := infra.IssueTo(filepath.Join(dir, "sync"), identity.Principal{Cluster: "lab", Role: identity.RoleSync, Name: "sync-ca1"}, nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	macs := macKeys(t, dir)
	good := fmt.Sprintf(`cluster: lab
node: ca1
identity: {cert: %s, key: %s, trust: %s}
listen: {api: "127.92.4.2:8443", admin: "127.92.4.2:9443"}
state_dir: %s
site: here
base_url: http://pki.test
mac_key_file: %[9]s
database: {nodes: ["127.92.4.9:3306"], user: ca, password_file: %[5]s}
sync: {identity: {cert: %[6]s, key: %[7]s, trust: %[8]s}, user: sync, password_file: %[7]s}
`, files.Cert, files.Key, files.Trust, dir, files.Key, mover.Cert, mover.Key, mover.Trust, macs)
	list := filepath.Join(dir, "weak")
	hsmtest.Write(t, list, "no hex")
	path := filepath.Join(dir, "ca.yaml")
	check := func(text string) error {
		hsmtest.Write(t, path, text)
		return run(t.Context(), path, true, discard)
	}
	if err := check(good); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	for _, test := range []struct{ from, to, want string }{
		{"site: here", "site: here\nsight: x", "sight"},
		{"site: here", "", "site is missing"},
		{"node: ca1", "node: ca2", "the configuration says"},
		{"node: ca1", "node: CA 1", "node"},
		{"cluster: lab", "cluster: other", "the configuration says"},
		{"127.92.4.2:9443", "127.92.4.2:8443", "must differ"},
		{"127.92.4.2:8443", "127.92.4.2", "listen.api"},
		{"http://pki.test", "https://pki.test", "base_url"},
		{"http://pki.test", "http://pki.test/x", "base_url"},
		{"http://pki.test", "http://" + strings.Repeat("x", 60), "base_url"},
		{"state_dir: " + dir, "state_dir: " + dir + "/nonesuch", "state_dir"},
		{"state_dir: " + dir, "state_dir: " + files.Key, "no directory"},
		{`["127.92.4.9:3306"]`, "[]", "database.nodes"},
		{"user: ca, ", "", "database.user"},
		{"password_file: " + files.Key, "password_file: " + dir + "/nonesuch", "password_file"},
		{"site: here", "site: here\nprofiles: " + dir + "/infra", "profile"},
		{files.Trust, files.Key, "trust"},
		{"mac_key_file: " + macs, "", "mac_key_file is missing"},
		{"mac_key_file: " + macs, "mac_key_file: " + files.Cert, "mac_key_file"},
		{"site: here", "site: here\nweak_keys: [" + list + "]", "weak_keys"},
		{"user: sync, ", "", "sync.user"},
		{"password_file: " + mover.Key, "password_file: " + dir + "/nonesuch", "sync.password_file"},
		{"password_file: " + mover.Key, "every: 2h, password_file: " + mover.Key, "sync.every"},
		{"cert: " + mover.Cert + ", key: " + mover.Key, "cert: " + files.Cert + ", key: " + files.Key, "role sync"},
		{"cert: " + mover.Cert, "cert: ''", "sync.identity"},
	} {
		if err := check(strings.Replace(good, test.from, test.to, 1)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s instead of %s: %v", test.to, test.from, err)
		}
	}
	if err := run(t.Context(), dir+"/nonesuch.yaml", true, discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func readLanes(all, open *int) func(context.Context, *sql.Conn) error {
	return func(ctx context.Context, c *sql.Conn) error {
		return c.QueryRowContext(ctx, "SELECT COUNT(*), COALESCE(SUM(NOT EXISTS (SELECT 1 FROM feed f WHERE f.lane = l.lane AND f.kind = ?)), 0) FROM lane l",
			uint8(db.FeedClosed)).Scan(all, open)
	}
}
