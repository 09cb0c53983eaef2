package e2e_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	record "trivet/db"
	"trivet/load"
	"trivet/load/history"
	"trivet/ops/galera"
)

// Somebody who may write to the database changes what an open request is to be signed, and puts a request of his own beside it. No node signs either: the
// intents are abandoned, the requester is told to ask again, operators are told which rows it is, and fsck finds them.
func TestAForgedIntentIsNotSigned(t *testing.T) {
	s := up(t)
	recorder := &load.Recorder{}
	ca2 := s.directly(t, "ca2", recorder)
	db, err := galera.Admin(s.node(t, "db1"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	since := len(logOf(t, s.process(t, "ca2")))

	request, row := s.openIntent(t, recorder)
	name := []byte(request.DNS)
	forged := bytes.Replace(row.tbs, name, append([]byte("x"), name[1:]...), 1)
	if bytes.Equal(forged, row.tbs) {
		t.Fatalf("the TBSCertificate does not hold %s", name)
	}
	execute(t, db, `UPDATE trivet.intent_tbs SET tbs = ? WHERE issuer = ? AND serial = ?`, forged, row.issuer, row.serial)
	// And one out of nothing, for a request that nobody made: another serial and request key, all else as a CA node wrote it.
	never := history.RequestKey(ca2.Principal, "never-asked")
	own := bytes.Clone(row.serial)
	own[len(own)-1] ^= 1
	execute(t, db, `INSERT INTO trivet.intent (issuer, serial, req, ver, body, tbs, profile, profile_version, profile_hash, requester, reference, site_epoch, node, mac, mac_key, created)
		SELECT issuer, ?, ?, ver, body, ?, profile, profile_version, profile_hash, requester, reference, site_epoch, node, mac, mac_key, created
		FROM trivet.intent WHERE issuer = ? AND serial = ?`, own, never[:], bytes.Replace(row.tbs, row.serial, own, 1), row.issuer, row.serial)

	for _, name := range []string{"hsmd-a", "hsmd-b", "hsmd-c"} {
		s.run(t, "demo", "thaw", name)
	}
	for key, serial := range map[string][]byte{request.Key: row.serial, "never-asked": own} {
		var told said
		eventually(t, 30*time.Second, func() error {
			var err error
			if told, err = ask(t, ca2, key, bodyOf(t, request)); err == nil && told.Status == http.StatusServiceUnavailable {
				err = fmt.Errorf("answered %+v", told)
			}
			return err
		})
		if told.Status != http.StatusConflict || told.Type != "request-abandoned" || told.RetryAfter != "" || !strings.Contains(told.Text, "use a new key") {
			t.Errorf("the requester is told %+v, want 409 request-abandoned and to use a new key", told)
		}
		s.logged(t, s.process(t, "ca2"), since, "an intent in the database is not as a CA node wrote it", hex.EncodeToString(serial))
		var kind string
		if err := db.QueryRowContext(t.Context(), `SELECT kind FROM trivet.outcome WHERE issuer = ? AND serial = ?`, row.issuer, serial).Scan(&kind); err != nil || kind != "abandoned" {
			t.Errorf("%x became %q, want abandoned: %v", serial, kind, err)
		}
	}
	issues(t, s.issuer(t, recorder), 1)
	s.run(t, "demo", "start", "ca1")
	s.allWell(t)
	s.finds(t, "I8", s.fsckConfig(t, func(map[string]any) {}))

	// As if they had been true, for the scenarios after this one.
	s.vouch(t, db, "ca1", row.issuer, row.serial, row.tbs)
	s.vouch(t, db, "nobody", row.issuer, own, bytes.Replace(row.tbs, row.serial, own, 1)) // no CA node's journal has it
	s.fsck(t)
}

// vouch makes a row what a CA node of that name would have written.
func (s *site) vouch(t *testing.T, db *sql.DB, node, issuer string, serial, tbs []byte) {
	t.Helper()
	keys, err := record.LoadMACKeys(filepath.Join(s.dir, "secret", "mac-keys"))
	if err != nil {
		t.Fatal(err)
	}
	i := record.Intent{Issuer: issuer, Serial: serial, TBS: tbs, Node: node}
	if err := db.QueryRowContext(t.Context(), `SELECT req, ver, body, profile, profile_version, profile_hash, requester, site_epoch FROM trivet.intent WHERE issuer = ? AND serial = ?`, issuer, serial).
		Scan(&i.Req, &i.Ver, &i.Body, &i.Profile, &i.ProfileVersion, &i.ProfileHash, &i.Requester, &i.SiteEpoch); err != nil {
		t.Fatal(err)
	}
	keys.Seal(&i)
	execute(t, db, `UPDATE trivet.intent SET tbs = ?, node = ?, mac = ?, mac_key = ? WHERE issuer = ? AND serial = ?`, tbs, node, i.MAC, i.MACKey, issuer, serial)
}

// intentRow is what a scenario needs of an intent.
type intentRow struct {
	issuer      string
	serial, tbs []byte
}

// openIntent leaves a request of ca1 open in the record: its HSMs stand still, and then the node dies. HSMs and node are left so.
func (s *site) openIntent(t *testing.T, recorder *load.Recorder) (load.Request, intentRow) {
	t.Helper()
	ca1 := s.directly(t, "ca1", recorder)
	for _, name := range []string{"hsmd-a", "hsmd-b", "hsmd-c"} {
		s.run(t, "demo", "freeze", name)
		t.Cleanup(func() { s.try("demo", "thaw", name) })
	}
	request, err := ca1.Request(1_000)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { _, _ = ca1.Send(ctx, request) }() // nobody is there to answer it
	key := history.RequestKey(ca1.Principal, request.Key)
	var row intentRow
	eventually(t, 10*time.Second, func() error {
		return s.database(t).QueryRowContext(t.Context(), `SELECT i.issuer, i.serial, t.tbs FROM intent i JOIN intent_tbs t USING (issuer, serial) WHERE i.req = ?`, key[:]).Scan(&row.issuer, &row.serial, &row.tbs)
	})
	s.run(t, "demo", "kill", "ca1")
	t.Cleanup(func() { s.try("demo", "start", "ca1") })
	return request, row
}

func execute(t *testing.T, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.ExecContext(t.Context(), query, args...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

// bodyOf is the body of a request that a load client sends.
func bodyOf(t *testing.T, r load.Request) string {
	t.Helper()
	body, err := json.Marshal(map[string]string{"profile": "tls-server", "csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}))})
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}
