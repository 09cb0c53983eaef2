package ca_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"database/sql"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/ca"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/holder"
	"trivet/identity"
)

// site is a few CA nodes that know one another, on one database.
type site struct {
	*pki
	authority *identity.Authority
	names     []string
	addresses map[string]string
	nodes     map[string]*member
	rounds    func(*ca.RoundsConfig)
	dirs      map[string]string
}

// member is one of them.
type member struct {
	*node
	rounds *ca.Rounds
	held   *holder.Holder
	copier *holder.Copier
	server *httptest.Server
	stop   func()
	killed atomic.Bool
}

// newSite starts nodes of those names. rounds may change their configuration.
func newSite(t *testing.T, rounds func(*ca.RoundsConfig), names ...string) *site {
	t.Helper()
	p := newPKI(t)
	authority, err := identity.CreateAuthority(filepath.Join(t.TempDir(), "authority"), "test")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{pki: p, authority: authority, names: names, addresses: map[string]string{}, nodes: map[string]*member{}, rounds: rounds, dirs: map[string]string{}}
	for i, name := range names {
		s.addresses[name] = fmt.Sprintf("127.92.9.%d:8443", i+1)
		s.dirs[name] = filepath.Join(t.TempDir(), name)
	}
	for _, name := range names {
		s.up(t, name, nil)
	}
	for _, name := range names {
		s.await(t, name)
		if len(names) == 1 {
			continue
		}
		dbtest.Until(t, name+" has a second holder", func() bool { other, _ := s.nodes[name].copier.Holder(); return other != "" })
	}
	return s
}

// up starts a node, or another incarnation of it. It may have to wait for others before it admits anything: see await.
func (s *site) up(t *testing.T, name string, prepare func(*ca.Config) func(*ca.Engine)) *member {
	t.Helper()
	m := &member{}
	idDir := filepath.Join(t.TempDir(), "id-"+name)
	if _, err := s.authority.IssueTo(idDir, identity.Principal{Cluster: "test", Role: identity.RoleCA, Name: name}, nil, nil, time.Hour); err != nil {
		t.Fatal(err)
	}
	id, err := identity.Load(identity.Files{Cert: filepath.Join(idDir, "cert.pem"), Key: filepath.Join(idDir, "key.pem"), Trust: filepath.Join(idDir, "trust.pem")})
	if err != nil {
		t.Fatal(err)
	}
	fatal := func(err error) { t.Errorf("%s: fatal: %v", name, err) }
	m.node = s.make(t, name, s.dirs[name], func(c *ca.Config) func(*ca.Engine) {
		m.held, err = holder.Open(holder.Config{Dir: filepath.Join(s.dirs[name], "held"), Node: name, Log: slog.New(slog.DiscardHandler), Round: func() (uint64, func()) { return m.rounds.Enter() }})
		if err != nil {
			t.Fatal(err)
		}
		incarnation := c.Journal.Incarnation()
		cfg := ca.RoundsConfig{
			Node: name, Store: c.Store, Journal: c.Journal, MACKeys: c.MACKeys, Held: m.held, Every: 50 * time.Millisecond, Absent: 2 * time.Second, GiveUp: 3 * time.Second, Settle: time.Second, Fatal: fatal, Log: slog.New(slog.DiscardHandler),
		}
		var peers []holder.Peer
		for _, other := range s.names {
			if other != name {
				peers = append(peers, holder.Peer{Name: other, Address: s.addresses[other]})
				cfg.Peers = append(cfg.Peers, other)
			}
		}
		if s.rounds != nil {
			s.rounds(&cfg)
		}
		m.copier, err = holder.NewCopier(holder.CopierConfig{
			Incarnation: hex.EncodeToString(incarnation[:]), Peers: peers, Round: func() uint64 { return m.rounds.Current() }, Fatal: fatal, Log: slog.New(slog.DiscardHandler),
			Client:  &http.Client{Transport: &http.Transport{TLSClientConfig: id.ClientTLS(identity.RoleCA)}},
			Records: ca.DoneRecords(c.Journal), CopyRequired: cfg.RequireCopy,
		})
		if err != nil {
			t.Fatal(err)
		}
		cfg.Copies = m.copier
		if m.rounds, err = ca.NewRounds(cfg); err != nil {
			t.Fatal(err)
		}
		c.Rounds = m.rounds
		if prepare != nil {
			return prepare(c)
		}
		return nil
	})
	m.serve(t, s.addresses[name], id)
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	var wg sync.WaitGroup
	wg.Go(func() { m.done <- m.engine.Run(ctx) })
	wg.Go(func() { _ = m.rounds.Run(ctx) })
	wg.Go(func() { _ = m.copier.Run(ctx) })
	var once sync.Once
	m.stop = func() {
		once.Do(func() {
			if m.killed.Load() {
				return
			}
			m.server.Close()
			m.node.stop(t)
			wg.Wait()
			if err := m.held.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(m.stop)
	s.nodes[name] = m
	return m
}

func (m *member) serve(t *testing.T, address string, id *identity.Identity) {
	t.Helper()
	l, err := tls.Listen("tcp", address, id.ServerTLS())
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(holder.Path, m.held.Handler())
	m.server = httptest.NewUnstartedServer(mux)
	m.server.Listener.Close()
	m.server.Listener = l
	m.server.Start()
}

// await waits until a node releases again.
func (s *site) await(t *testing.T, name string) {
	t.Helper()
	m := s.nodes[name]
	dbtest.Until(t, name+" releases", func() bool {
		st := m.rounds.Status()
		holder, _ := m.copier.Holder()
		return m.engine.Running() && st.Err == nil && (st.Alone == nil || holder != "")
	})
}

// lose takes the last rows of the record away, as a database does that comes back from an older copy of itself: of each node's lanes what
// comes after the first keep rows, and the facts that go with it. It returns the certificates lost.
func (s *site) lose(t *testing.T, keep int, intents bool) {
	t.Helper()
	run := func(q string, args ...any) {
		t.Helper()
		for i, a := range args {
			q = strings.Replace(q, fmt.Sprintf("$%d", i+1), fmt.Sprint(a), 1)
		}
		cluster.Exec(t, 0, strings.ReplaceAll(q, "{db}", s.db.Name))
	}
	where := fmt.Sprintf("seq > %d AND lane NOT LIKE 'init/%%'", keep)
	run("CREATE TABLE {db}.gone (issuer VARBINARY(40), serial VARBINARY(20), PRIMARY KEY (issuer, serial)) ENGINE=InnoDB")
	run("INSERT IGNORE INTO {db}.gone SELECT issuer, serial FROM {db}.feed WHERE " + where + " AND kind IN (1, 2)")
	run("DELETE FROM {db}.revocation WHERE " + where)
	run("DELETE FROM {db}.outcome WHERE " + where)
	run("DELETE FROM {db}.feed WHERE " + where)
	if intents {
		run("DELETE FROM {db}.intent WHERE EXISTS (SELECT 1 FROM {db}.gone g WHERE g.issuer = intent.issuer AND g.serial = intent.serial) AND NOT EXISTS (SELECT 1 FROM {db}.outcome o WHERE o.issuer = intent.issuer AND o.serial = intent.serial)")
		run("DELETE FROM {db}.intent_tbs WHERE NOT EXISTS (SELECT 1 FROM {db}.intent i WHERE i.issuer = intent_tbs.issuer AND i.serial = intent_tbs.serial)")
	}
	run("DROP TABLE {db}.gone")
}

// issueSome issues certificates, by several nodes in turn, and returns them by request.
func (s *site) issueSome(t *testing.T, from, n int, names ...string) map[string]*ca.Issued {
	t.Helper()
	out := map[string]*ca.Issued{}
	for i := range n {
		key := fmt.Sprintf("k%d", from+i)
		out[key] = s.nodes[names[i%len(names)]].persist(t, s.request(t, key))
	}
	return out
}

var requests sync.Map // by test and key, so that repeats are identical

func (s *site) request(t *testing.T, key string) ca.Request {
	r, _ := requests.LoadOrStore(t.Name()+key, ask(t, key))
	return r.(ca.Request)
}

// same demands that every request gets, on every node, the certificate that it got before.
func (s *site) same(t *testing.T, issued map[string]*ca.Issued, names ...string) {
	t.Helper()
	for key, want := range issued {
		for _, name := range names {
			got, err := s.nodes[name].issue(t, s.request(t, key))
			if err != nil {
				t.Fatalf("%s on %s: %v", key, name, err)
			}
			if !bytes.Equal(got.DER, want.DER) || !got.Replayed {
				t.Errorf("%s on %s: another certificate than before", key, name)
			}
		}
	}
}

// intact demands that the feed has no holes, and that every fact is announced where it says.
func (s *site) intact(t *testing.T) {
	t.Helper()
	for name, m := range s.nodes {
		dbtest.Until(t, "what was under way at "+name+" is settled", func() bool { return m.rounds.Status().Settled })
	}
	s.check(t)
	store := dbtest.Open(t, s.db)
	_, err := store.Read(t.Context(), "check", "", func(ctx context.Context, c *sql.Conn) error {
		for what, q := range map[string]string{
			"lanes with holes":              "SELECT COUNT(*) FROM (SELECT lane FROM feed GROUP BY lane HAVING COUNT(*) <> MAX(seq)) x",
			"outcomes unannounced":          "SELECT COUNT(*) FROM outcome o LEFT JOIN feed f USING (lane, seq) WHERE f.serial IS NULL OR f.serial <> o.serial",
			"rows beyond a lane's end":      fmt.Sprintf("SELECT COUNT(*) FROM feed f JOIN feed e ON e.lane = f.lane AND e.kind = %d AND f.seq > e.seq", db.FeedClosed),
			"serials with two certificates": "SELECT COUNT(*) FROM (SELECT issuer, serial FROM outcome WHERE kind = 'cert' GROUP BY issuer, serial HAVING COUNT(DISTINCT der) > 1) x",
		} {
			var n int
			if err := c.QueryRowContext(ctx, q).Scan(&n); err != nil {
				return err
			}
			if n > 0 {
				t.Errorf("%d %s", n, what)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// round returns what the record says of the newest round.
func (s *site) round(t *testing.T) *db.RoundReport {
	t.Helper()
	store := dbtest.Open(t, s.db)
	state, err := store.RoundState(t.Context())
	if err != nil || state.N == 0 {
		t.Fatalf("no recovery round was held: %v", err)
	}
	report, err := store.Round(t.Context(), state.N)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// rows are all intents and certificates, without where the feed announces them.
func (s *site) rows(t *testing.T) (out []string) {
	t.Helper()
	store := dbtest.Open(t, s.db)
	_, err := store.Read(t.Context(), "check", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		rows, err := c.QueryContext(ctx, `SELECT CONCAT_WS(' ', i.issuer, HEX(i.serial), COALESCE(HEX(i.req), '-'), i.ver, HEX(i.body), i.profile, i.profile_version,
			HEX(i.profile_hash), i.requester, i.reference, i.site_epoch, i.node, COALESCE(HEX(i.mac), '-'), i.created, o.ver, o.kind, MD5(o.der), o.not_after, o.created)
			FROM intent i LEFT JOIN outcome o USING (issuer, serial) ORDER BY 1`)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var line string
			if err := rows.Scan(&line); err != nil {
				return err
			}
			out = append(out, line)
		}
		return rows.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
