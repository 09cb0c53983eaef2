package db_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
)

func revocation(i db.Intent, n uint32, event string, reason uint8) db.Fact {
	return db.Fact{Revocation: &db.Revocation{Issuer: i.Issuer, Serial: i.Serial, N: n, Event: event, Reason: reason,
		Date: time.Unix(1_800_000_000, 0), Actor: "trivet://test/ra/r", SiteEpoch: 1}}
}

func TestCertificatesAreFoundByStatus(t *testing.T) {
	c := cluster.Need(t)
	s := dbtest.Open(t, c.New(t))
	lane := openLane(t, s, "ca1", incarnation(1))
	if err := s.InsertGeneration(soon(t), db.Generation{Issuer: "demo-g1", CA: "demo", Generation: 1, Parent: "demo-g1", KeyGroup: "ca", KeyID: "00", SPKI: []byte("spki")}); err != nil {
		t.Fatal(err)
	}
	var in []db.Intent
	names := []string{db.StatusValid, db.StatusRevoked, db.StatusHeld, db.StatusExpired, db.StatusPending, db.StatusAbandoned, "released"}
	for _, name := range names {
		i := intent("demo-g1", "ca1", name)
		i.Requester = "trivet://test/requester/" + name
		in = append(in, i)
	}
	in = insert(t, s, in...)
	facts := []db.Fact{certificate(in[0], "ca1"), certificate(in[1], "ca1"), certificate(in[2], "ca1"), certificate(in[3], "ca1"),
		{Outcome: &db.Outcome{Issuer: in[5].Issuer, Serial: in[5].Serial, Kind: db.OutcomeAbandoned}}, certificate(in[6], "ca1"),
		revocation(in[1], 1, db.EventHold, 6), revocation(in[1], 2, db.EventRevoke, 1), revocation(in[2], 1, db.EventHold, 6),
		revocation(in[6], 1, db.EventHold, 6), revocation(in[6], 2, db.EventRelease, 0)}
	facts[3].Outcome.NotAfter = time.Now().Add(-time.Hour)
	appendAll(t, lane, facts...)

	for k, status := range names {
		want := status
		if status == "released" {
			want = db.StatusValid
		}
		got, err := s.Certificate(soon(t), "demo-g1", in[k].Serial)
		if err != nil || got == nil || got.Status(time.Now()) != want || !bytes.Equal(got.Intent.Req, in[k].Req) {
			t.Errorf("%s: got %+v, %v", status, got, err)
		}
		page, err := s.ListCertificates(soon(t), db.Filter{Status: want})
		if err != nil || !slices.ContainsFunc(page.Certificates, func(c db.Certificate) bool { return bytes.Equal(c.Intent.Serial, in[k].Serial) }) {
			t.Errorf("list %s: %v", want, err)
		}
		for _, c := range page.Certificates {
			if c.Status(time.Now()) != want {
				t.Errorf("list %s has one that is %s", want, c.Status(time.Now()))
			}
		}
		page, err = s.ListCertificates(soon(t), db.Filter{Requester: in[k].Requester})
		if err != nil || len(page.Certificates) != 1 {
			t.Errorf("list of %s: %d, %v", in[k].Requester, len(page.Certificates), err)
		}
		same, err := s.CertificatesBySerial(soon(t), in[k].Serial)
		if err != nil || len(same) != 1 {
			t.Errorf("by serial: %d, %v", len(same), err)
		}
	}
	if got, err := s.Certificate(soon(t), "demo-g1", []byte("nobody")); got != nil || err != nil {
		t.Errorf("got %+v, %v", got, err)
	}

	// Pages together are the whole list, once.
	var serials [][]byte
	f := db.Filter{Issuer: "demo-g1", Limit: 3}
	for pages := 1; ; pages++ {
		page, err := s.ListCertificates(soon(t), f)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range page.Certificates {
			serials = append(serials, c.Intent.Serial)
		}
		if f.After = page.Next; page.Next == "" {
			if pages != 3 {
				t.Errorf("%d pages", pages)
			}
			break
		}
	}
	if len(serials) != len(in) || !slices.IsSortedFunc(serials, bytes.Compare) {
		t.Errorf("pages hold %x", serials)
	}
	if _, err := s.ListCertificates(soon(t), db.Filter{After: "x"}); !errors.Is(err, db.ErrCursor) {
		t.Errorf("got %v", err)
	}

	latest, events, err := s.Revocations(soon(t), nil, "demo-g1")
	if err != nil || events != 5 || len(latest) != 3 {
		t.Fatalf("%d latest of %d events, %v", len(latest), events, err)
	}
	if latest[0].Event != db.EventRevoke || latest[0].Reason != 1 || !latest[0].Date.Equal(time.Unix(1_800_000_000, 0)) || latest[0].NotAfter.IsZero() || latest[2].Revoked() {
		t.Errorf("latest: %+v", latest)
	}
	if n, err := s.RevocationCount(soon(t), "demo-g1"); n != 5 || err != nil {
		t.Errorf("%d events, %v", n, err)
	}
	if r, err := s.LatestRevocation(soon(t), "demo-g1", in[1].Serial); err != nil || r.N != 2 {
		t.Errorf("got %+v, %v", r, err)
	}
	if r, err := s.LatestRevocation(soon(t), "demo-g1", in[0].Serial); err != nil || r != nil {
		t.Errorf("got %+v, %v", r, err)
	}

	open, err := s.OpenIntents(soon(t), 0, 10)
	if err != nil || len(open) != 1 || !bytes.Equal(open[0].Serial, in[4].Serial) || len(open[0].TBS) == 0 {
		t.Errorf("open: %+v, %v", open, err)
	}
	if open, err = s.OpenIntents(soon(t), time.Hour, 10); err != nil || len(open) != 0 {
		t.Errorf("open for an hour: %+v, %v", open, err)
	}
}

func TestChainsHaveOneWinnerPerNumber(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	s := dbtest.Open(t, cfg)
	lane := openLane(t, s, "ca1", incarnation(1))
	hash := make([]byte, 32)
	crl := db.CRL{Issuer: "demo-g1", N: 1, Number: 1<<48 + 5, ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour), TBSHash: hash, Node: "ca1", SiteEpoch: 1, Created: time.Now()}
	if tip, err := s.NextCRL(soon(t), nil, "demo-g1", 0); err != nil || tip != (db.CRLTip{}) {
		t.Errorf("got %+v, %v", tip, err)
	}
	for range 2 { // a repetition is not a rival
		if err := s.InsertCRL(soon(t), crl); err != nil {
			t.Fatal(err)
		}
	}
	rival := crl
	rival.Node = "ca2"
	if err := s.InsertCRL(soon(t), rival); db.ClassOf(err) != db.Duplicate {
		t.Errorf("got %v", err)
	}
	tip, err := s.NextCRL(soon(t), nil, "demo-g1", 0)
	if err != nil || tip.N != 1 || tip.Number != 1<<48+5 || tip.Open == nil || tip.Open.Node != "ca1" {
		t.Errorf("got %+v, %v", tip, err)
	}
	appendAll(t, lane, db.Fact{CRL: &db.CRLResult{Issuer: "demo-g1", N: 1, Number: crl.Number, Kind: db.CRLIssued, DER: bytes.Repeat([]byte("crl"), 1<<20)}})
	got, res, err := s.LatestCRL(soon(t), nil, "demo-g1", 0)
	if err != nil || got.Number != crl.Number || len(res.DER) != 3<<20 || res.Seq != 1 {
		t.Errorf("got %+v, %v", got, err)
	}

	g := db.Generation{Issuer: "demo-g1", CA: "demo", Generation: 1, Parent: "demo-g1", KeyGroup: "ca", KeyID: "00", SPKI: []byte("spki"), Created: time.Now()}
	if err := errors.Join(s.InsertGeneration(soon(t), g), s.InsertGeneration(soon(t), g)); err != nil {
		t.Error(err)
	}
	g.SPKI = []byte("another")
	if err := s.InsertGeneration(soon(t), g); db.ClassOf(err) != db.Duplicate {
		t.Errorf("got %v", err)
	}
	appendAll(t, lane, db.Fact{Generation: &db.GenerationEvent{Issuer: "demo-g1", N: 1, Event: db.EventCertificate, DER: []byte("der")}},
		db.Fact{Generation: &db.GenerationEvent{Issuer: "demo-g1", N: 2, Event: db.EventState, State: "active"}},
		db.Fact{Responder: &db.Responder{Issuer: "demo-g1", N: 1, KeyGroup: "va", KeyID: "01", CertSerial: []byte{1}, DER: []byte("der")}})
	all, err := s.Generations(soon(t))
	if err != nil || len(all) != 1 || all[0].State() != "active" || string(all[0].Certificate()) != "der" {
		t.Errorf("got %+v, %v", all, err)
	}
	if r, err := s.Responders(soon(t)); err != nil || len(r) != 1 || r[0].KeyID != "01" {
		t.Errorf("got %+v, %v", r, err)
	}

	inc := incarnation(9)
	for n, event := range []string{"in", "out", "in"} {
		if err := s.InsertMember(soon(t), db.Member{VA: "ocsp1", N: uint32(n + 1), Event: event, Policy: "strict", Address: "127.0.0.1:1", Incarnation: inc[:]}); err != nil {
			t.Fatal(err)
		}
	}
	if m, err := s.Members(soon(t)); err != nil || len(m) != 1 || m[0].N != 3 {
		t.Errorf("got %+v, %v", m, err)
	}
	if e, err := s.SiteEpoch(soon(t)); err != nil || e.N != 0 {
		t.Errorf("got %+v, %v", e, err)
	}
	if err := s.InsertSiteEpoch(soon(t), db.SiteEpoch{N: 1, Site: "primary"}); err != nil {
		t.Error(err)
	}
	if err := s.InsertSiteEpoch(soon(t), db.SiteEpoch{N: 1, Site: "second"}); db.ClassOf(err) != db.Duplicate {
		t.Errorf("got %v", err)
	}
	if e, err := s.SiteEpoch(soon(t)); err != nil || e.N != 1 || e.Site != "primary" {
		t.Errorf("got %+v, %v", e, err)
	}
	if l, err := s.GroupLogEnd(soon(t), "ca"); err != nil || len(l) != 0 {
		t.Errorf("got %+v, %v", l, err)
	}
	for n, event := range []string{"pending", "live", "retired"} {
		if err := s.AppendGroupLog(soon(t), db.GroupEvent{Group: "ca", N: uint32(n + 1), Event: event, Subject: "k", Payload: []byte("{}"), Actor: "a"}); err != nil {
			t.Error(err)
		}
	}
	for from, want := range []int{3, 3, 2, 1, 0} {
		l, err := s.GroupLog(soon(t), "ca", uint32(from))
		if err != nil || len(l) != want || want > 0 && l[want-1].Event != "retired" {
			t.Errorf("from %d: got %+v, %v", from, l, err)
		}
	}
	if err := s.AppendGroupLog(soon(t), db.GroupEvent{Group: "ca/lease", N: 1, Event: "lease", Subject: "k", Payload: []byte("{}"), Actor: "a"}); err != nil {
		t.Fatal(err)
	}
	if l, err := s.GroupLogEnds(soon(t)); err != nil || len(l) != 2 || l[0].Group != "ca" || l[0].N != 3 || l[1].Group != "ca/lease" {
		t.Errorf("ends: %+v %v", l, err)
	}
	if l, err := s.GroupLogEnd(soon(t), "ca"); err != nil || len(l) != 1 || l[0].N != 3 {
		t.Errorf("got %+v, %v", l, err)
	}
	rows := checkLanes(t, s)
	if p, err := rows[0].Decode(); err != nil || p.Number != crl.Number || p.Kind != db.CRLIssued || len(p.Digest) != 32 {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestAccountsMayAddButNotChange(t *testing.T) {
	c := cluster.Need(t)
	cfg := c.New(t)
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("it's a \\ secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	users := []db.UserSpec{{Name: cfg.Name + "_ca", PasswordFile: password, Role: "ca"}, {Name: cfg.Name + "_ocsp", PasswordFile: password, Role: "ocsp"},
		{Name: cfg.Name + "_fsck", PasswordFile: password, Role: "fsck"}}
	for range 2 {
		if err := db.Grant(soon(t), cfg, users); err != nil {
			t.Fatal(err)
		}
	}
	as := func(i int) *db.Store {
		cfg := cfg
		cfg.User, cfg.PasswordFile = users[i].Name, password
		return dbtest.Open(t, cfg)
	}
	ca, ocsp, fsck := as(0), as(1), as(2)
	lane := openLane(t, ca, "ca1", incarnation(1))
	rows := insert(t, ca, intent("demo-g1", "ca1", "a"), intent("demo-g1", "ca1", "b"))
	// The path that meets its own rows needs no more rights.
	if again := insert(t, ca, rows...); !bytes.Equal(again[1].Serial, rows[1].Serial) {
		t.Error("not the same row")
	}
	appendAll(t, lane, certificate(rows[0], "ca1"))
	exec := func(s *db.Store, q string) error {
		_, err := s.Write(soon(t), "test", func(ctx context.Context, tx *sql.Tx) error {
			_, err := tx.ExecContext(ctx, q)
			return err
		})
		return err
	}
	for _, q := range []string{"UPDATE outcome SET der = NULL", "DELETE FROM revocation", "DELETE FROM feed", "UPDATE intent SET tbs = ''", "DROP TABLE feed",
		"UPDATE intent_tbs SET tbs = ''", "DELETE FROM intent_tbs", "DROP TABLE intent", "ALTER TABLE intent DROP COLUMN tbs", "DELETE FROM intent_tbs_turn",
		"REPLACE INTO site_epoch VALUES (1, 'x', NOW())", "INSERT INTO group_log VALUES ('ca', 1, 'live', 'k', '', '', NOW())", "CREATE TABLE x (a INT PRIMARY KEY)", "SET GLOBAL read_only = 0"} {
		if err := exec(ca, q); db.ClassOf(err) != db.Fatal {
			t.Errorf("ca: %s: %v", q, err)
		}
	}
	if err := exec(ocsp, "INSERT INTO feed VALUES ('l', 1, 1, 'i', 's', '', REPEAT('x', 32))"); db.ClassOf(err) != db.Fatal {
		t.Errorf("ocsp wrote the feed: %v", err)
	}
	if rows := checkLanes(t, ocsp); len(rows) != 1 {
		t.Errorf("ocsp reads %d feed rows", len(rows))
	}
	if state, err := ca.KeepTBS(soon(t), db.TBSKeeping{Node: "ca1", Keep: 24 * time.Hour, Ahead: 9}); err != nil || state.Made != 2 && state.Made != 3 || state.Ahead(time.Now()) < 9 {
		t.Errorf("ca keeps partitions: %+v, %v", state, err)
	}
	if _, err := fsck.KeepTBS(soon(t), db.TBSKeeping{Node: "ca1", Keep: 24 * time.Hour, Ahead: 20}); db.ClassOf(err) != db.Fatal {
		t.Errorf("fsck made partitions: %v", err)
	}
	inc := incarnation(1)
	if err := ocsp.InsertMember(soon(t), db.Member{VA: "ocsp1", N: 1, Event: "in", Policy: "strict", Address: "a", Incarnation: inc[:]}); err != nil {
		t.Error(err)
	}
	if got, err := fsck.Certificate(soon(t), "demo-g1", rows[0].Serial); err != nil || got == nil {
		t.Errorf("fsck: %v", err)
	}
	if _, _, err := fsck.InsertIntents(soon(t), rows); db.ClassOf(err) != db.Fatal {
		t.Errorf("fsck wrote: %v", err)
	}
}

func TestReadOnlyNodeIsNotWritten(t *testing.T) {
	c := cluster.Need(t)
	s := dbtest.Open(t, c.New(t))
	c.Exec(t, 0, "SET GLOBAL read_only = 1")
	defer c.Exec(t, 0, "SET GLOBAL read_only = 0")
	if _, node, err := s.InsertIntents(soon(t), []db.Intent{intent("demo-g1", "ca1", "a")}); err != nil || node == c.Nodes[0].SQL() {
		t.Errorf("written on %s, %v", node, err)
	}
	dbtest.Until(t, "the probe says read-only", func() bool { return s.Nodes()[0].Cause == "read-only" })
	if err := s.Ready(); err != nil {
		t.Errorf("two nodes are left: %v", err)
	}
	c.Exec(t, 0, "SET GLOBAL read_only = 0")
	dbtest.Until(t, "the node is preferred again", func() bool {
		_, node, err := s.InsertIntents(soon(t), []db.Intent{intent("demo-g1", "ca1", "b")})
		return err == nil && node == c.Nodes[0].SQL()
	})
}

func TestWithoutAnyNodeTheErrorNamesEach(t *testing.T) {
	s, err := db.Open(db.Config{Nodes: []string{"127.90.9.1:1", "127.90.9.2:1"}, User: "u"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, _, err = s.InsertIntents(ctx, []db.Intent{intent("demo-g1", "ca1", "a")})
	if db.ClassOf(err) != db.NotReady || !bytes.Contains([]byte(err.Error()), []byte("127.90.9.2:1")) {
		t.Errorf("got %v", err)
	}
}
