package ca_test

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trivet/ca"
	"trivet/ca/catest"
	"trivet/db"
	"trivet/identity"
	"trivet/journal"
)

// lossyLane loses the answers of its first appends, after or instead of making them.
type lossyLane struct {
	ca.FactLane
	applied bool // the facts were committed all the same

	mu     sync.Mutex
	losses int
}

func (l *lossyLane) Append(ctx context.Context, facts []db.Fact) ([]db.Appended, error) {
	l.mu.Lock()
	lose := l.losses > 0
	if lose {
		l.losses--
	}
	l.mu.Unlock()
	if lose && !l.applied {
		return make([]db.Appended, len(facts)), &db.Error{Class: db.Ambiguous, Op: "append", Err: errors.New("injected: did not happen")}
	}
	out, err := l.FactLane.Append(ctx, facts)
	if lose && err == nil {
		return make([]db.Appended, len(facts)), &db.Error{Class: db.Ambiguous, Op: "append", Err: errors.New("injected: happened")}
	}
	return out, err
}

type crlRow struct {
	n      int
	number uint64
	kind   string
	der    []byte
}

func crlRows(t *testing.T, n *catest.Node, issuer string) (rows []crlRow) {
	t.Helper()
	read(t, n, func(r *sql.Rows) error {
		var row crlRow
		err := r.Scan(&row.n, &row.number, &row.kind, &row.der)
		rows = append(rows, row)
		return err
	}, "SELECT n, number, COALESCE(kind, ''), COALESCE(der, '') FROM crl LEFT JOIN crl_result USING (issuer, shard, n) WHERE issuer = ? ORDER BY n", issuer)
	return rows
}

func events(t *testing.T, n *catest.Node, c *ca.Issued) (out []string) {
	t.Helper()
	read(t, n, func(r *sql.Rows) error {
		var event string
		var reason uint8
		err := r.Scan(&event, &reason)
		out = append(out, event+" "+ca.Reason(reason).String())
		return err
	}, "SELECT event, reason FROM revocation WHERE issuer = ? AND serial = ? ORDER BY n", c.Issuer, c.Serial)
	return out
}

func read(t *testing.T, n *catest.Node, scan func(*sql.Rows) error, query string, args ...any) {
	t.Helper()
	_, err := n.Store.Read(soon(t), "test", "", func(ctx context.Context, c *sql.Conn) error {
		rows, err := c.QueryContext(ctx, query, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			if err := scan(rows); err != nil {
				return err
			}
		}
		return rows.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func execute(t *testing.T, cfg db.Config, statement string) {
	t.Helper()
	store, err := db.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if _, err := store.Write(soon(t), "test", func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, statement)
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// acknowledged returns the revocations that a node's journal calls done.
func acknowledged(t *testing.T, n *catest.Node, c *ca.Issued) (out []journal.Done) {
	t.Helper()
	err := n.Journal.Replay(func(e journal.Entry) error {
		var d journal.Done
		if e.Kind != journal.KindDone {
			return nil
		}
		if err := e.Decode(&d); err != nil {
			return err
		}
		if d.Kind == journal.DoneRevocation && d.Serial == hex.EncodeToString(c.Serial) {
			out = append(out, d)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRevocationChain(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	alice, operator := person(identity.RoleRequester, "alice"), person(identity.RoleCAOperator, "olga")
	for i, test := range []struct {
		steps string // reasons in order, release; a leading ! is refused
		want  string
		last  string // status
	}{
		{"superseded", "revoke superseded", "revoked"},
		{"superseded superseded", "revoke superseded", "revoked"},
		{"superseded !cessationOfOperation", "revoke superseded", "revoked"},
		{"superseded keyCompromise keyCompromise", "revoke superseded,reason-change keyCompromise", "revoked"},
		{"keyCompromise !superseded", "revoke keyCompromise", "revoked"},
		{"certificateHold certificateHold", "hold certificateHold", "held"},
		{"certificateHold release", "hold certificateHold,release certificateHold", "valid"},
		{"certificateHold release !release", "hold certificateHold,release certificateHold", "valid"},
		{"certificateHold superseded !release", "hold certificateHold,revoke superseded", "revoked"},
		{"certificateHold release superseded", "hold certificateHold,release certificateHold,revoke superseded", "revoked"},
		{"superseded !certificateHold", "revoke superseded", "revoked"},
		{"!release", "", ""},
	} {
		issued := issue(t, n, alice, strings.Repeat("k", i+1))
		var last *ca.Revoked
		for _, step := range strings.Fields(test.steps) {
			step, refused := strings.CutPrefix(step, "!")
			var done *ca.Revoked
			var err error
			if step == "release" {
				done, err = n.Revoker.Release(soon(t), ca.ReleaseRequest{Issuer: issued.Issuer, Serial: issued.Serial, Actor: operator})
			} else {
				reason, perr := ca.ParseReason(step)
				if perr != nil {
					t.Fatal(perr)
				}
				done, err = n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: reason, Actor: operator})
			}
			switch {
			case refused && step == "release" && ca.NameOf(err) != ca.NotOnHold, refused && step != "release" && ca.NameOf(err) != ca.AlreadyRevoked:
				t.Errorf("%s: %s gave %v", test.steps, step, err)
			case !refused && err != nil:
				t.Errorf("%s: %s: %v", test.steps, step, err)
			}
			if done != nil {
				if last != nil && last.Event != db.EventRelease && done.Event != db.EventRelease && !done.Date.Equal(last.Date) {
					t.Errorf("%s: the date went from %v to %v", test.steps, last.Date, done.Date)
				}
				last = done
			}
		}
		if got := strings.Join(events(t, n, issued), ","); got != test.want {
			t.Errorf("%s: events %q, want %q", test.steps, got, test.want)
		}
		if last != nil && last.Status() != test.last {
			t.Errorf("%s: status %q, want %q", test.steps, last.Status(), test.last)
		}
	}
}

func TestDateMovesBackToTheCompromise(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	alice := person(identity.RoleRequester, "alice")
	issued := issue(t, n, alice, "k")
	ask := func(r ca.Reason, since time.Time) *ca.Revoked {
		t.Helper()
		done, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: r, InvalidityDate: since, Actor: alice})
		if err != nil {
			t.Fatal(err)
		}
		return done
	}
	first := ask(ca.ReasonSuperseded, time.Time{})
	since := first.Date.Add(-48 * time.Hour)
	if changed := ask(ca.ReasonKeyCompromise, since); !changed.Date.Equal(since) || changed.N != 2 {
		t.Errorf("date %v, want %v", changed.Date, since)
	}
	_, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, InvalidityDate: time.Now().Add(time.Hour), Actor: alice})
	if ca.NameOf(err) != ca.MalformedRequest {
		t.Errorf("a future invalidity date: %v", err)
	}
}

func TestReasonsByRole(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	asker := person(identity.RoleRequester, "alice")
	for reason, want := range map[ca.Reason][3]string{ // requester, ra, ca-operator
		ca.ReasonUnspecified:          {"", "", ""},
		ca.ReasonKeyCompromise:        {"", "", ""},
		ca.ReasonAffiliationChanged:   {"", "", ""},
		ca.ReasonSuperseded:           {"", "", ""},
		ca.ReasonCessationOfOperation: {"", "", ""},
		ca.ReasonPrivilegeWithdrawn:   {ca.ReasonNotPermitted, "", ""},
		ca.ReasonCertificateHold:      {ca.ReasonNotPermitted, "", ""},
		ca.ReasonCACompromise:         {ca.ReasonNotPermitted, ca.ReasonNotPermitted, ca.ReasonNotPermitted},
		ca.Reason(7):                  {ca.ReasonNotPermitted, ca.ReasonNotPermitted, ca.ReasonNotPermitted},
		ca.Reason(8):                  {ca.ReasonNotPermitted, ca.ReasonNotPermitted, ca.ReasonNotPermitted},
	} {
		for i, role := range []identity.Role{identity.RoleRequester, identity.RoleRA, identity.RoleCAOperator} {
			issued := issue(t, n, asker, reason.String()+string(role))
			_, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: reason, Actor: person(role, "x")})
			if ca.NameOf(err) != want[i] || (err == nil) != (want[i] == "") {
				t.Errorf("%s by %s: %v, want %q", reason, role, err, want[i])
			}
		}
	}
	for _, name := range []string{"removeFromCRL", "aACompromise", "Superseded", "4", "unused"} {
		if _, err := ca.ParseReason(name); ca.NameOf(err) != ca.ReasonNotPermitted {
			t.Errorf("reason %q: %v", name, err)
		}
	}
}

func TestCertificatesOfTheCAsThemselvesAreNotRevokedByOnePerson(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	for _, issuer := range []string{"root-g1", "demo-g1"} {
		page, err := n.Store.ListCertificates(soon(t), db.Filter{Issuer: issuer})
		if err != nil || len(page.Certificates) == 0 {
			t.Fatal(err)
		}
		for _, c := range page.Certificates {
			for _, reason := range []ca.Reason{ca.ReasonCACompromise, ca.ReasonKeyCompromise} {
				_, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issuer, Serial: c.Intent.Serial, Reason: reason, Actor: person(identity.RoleCAOperator, "olga")})
				if ca.NameOf(err) != ca.Forbidden {
					t.Errorf("%s of %s: %v", c.Intent.Profile, issuer, err)
				}
			}
		}
	}
}

// The answer to the commit is lost, with and without the commit. A repeat, on this node or another, ends with one event and an
// acknowledgement that every record bears out.
func TestRevocationUnderLostAnswers(t *testing.T) {
	n, keys, cfg := established(t, nil, nil)
	other := catest.Start(t, cfg, keys, catest.Config{Name: "ca2"})
	alice := person(identity.RoleRequester, "alice")
	for _, applied := range []bool{false, true} {
		for _, second := range []*catest.Node{n, other} {
			name := second.Name + " did not happen"
			if applied {
				name = second.Name + " happened but reported failed"
			}
			t.Run(name, func(t *testing.T) {
				issued := issue(t, n, alice, name)
				var inner ca.FactLane
				n.Revoker.Interpose(func(l ca.FactLane) ca.FactLane {
					inner = l
					return &lossyLane{FactLane: l, applied: applied, losses: 1}
				})
				t.Cleanup(func() { n.Revoker.Interpose(func(ca.FactLane) ca.FactLane { return inner }) })
				q := ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: ca.ReasonSuperseded, Actor: alice}
				if _, err := n.Revoker.Revoke(soon(t), q); ca.NameOf(err) != ca.OutcomeUnknown {
					t.Fatalf("the lost answer was reported as %v", err)
				}
				if got := acknowledged(t, n, issued); len(got) != 0 {
					t.Errorf("acknowledged in the journal although the answer was lost: %+v", got)
				}
				done, err := second.Revoker.Revoke(soon(t), q)
				if err != nil || done.N != 1 || !done.Reach.Effective() {
					t.Fatalf("the repeat: %v %+v", err, done)
				}
				if got := events(t, n, issued); !slices.Equal(got, []string{"revoke superseded"}) {
					t.Errorf("events %v", got)
				}
				if got := acknowledged(t, second, issued); len(got) != 1 || got[0].Event.N != 1 || got[0].Seq == 0 {
					t.Errorf("journal of the node that acknowledged: %+v", got)
				}
			})
		}
	}
}

// blind is a database that cannot be read any more once a fact was committed.
type blind struct {
	ca.RevocationRecord
	ca.FactLane
	committed atomic.Bool
}

func (b *blind) Append(ctx context.Context, facts []db.Fact) ([]db.Appended, error) {
	out, err := b.FactLane.Append(ctx, facts)
	b.committed.Store(err == nil)
	return out, err
}

func (b *blind) Read(ctx context.Context, op, except string, body func(context.Context, *sql.Conn) error) (string, error) {
	if b.committed.Load() {
		return "", &db.Error{Class: db.NotReady, Op: op, Err: errors.New("injected: no node")}
	}
	return b.RevocationRecord.Read(ctx, op, except, body)
}

// A release that was committed and cannot be read back may have happened. Told that nothing was done, the balancer would take it to another node,
// which would refuse it: the certificate is no longer on hold.
func TestCommittedChangeIsNeverReportedAsNotDone(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	alice, operator := person(identity.RoleRequester, "alice"), person(identity.RoleCAOperator, "olga")
	issued := issue(t, n, alice, "k")
	if _, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: ca.ReasonCertificateHold, Actor: operator}); err != nil {
		t.Fatal(err)
	}
	b := &blind{}
	n.Revoker.Interpose(func(l ca.FactLane) ca.FactLane { b.FactLane = l; return b })
	n.Revoker.InterposeRecord(func(r ca.RevocationRecord) ca.RevocationRecord { b.RevocationRecord = r; return b })
	_, err := n.Revoker.Release(soon(t), ca.ReleaseRequest{Issuer: issued.Issuer, Serial: issued.Serial, Actor: operator})
	if ca.NameOf(err) != ca.OutcomeUnknown {
		t.Errorf("got %v, want %s", err, ca.OutcomeUnknown)
	}
	if got := events(t, n, issued); !slices.Equal(got, []string{"hold certificateHold", "release certificateHold"}) {
		t.Errorf("events %v", got)
	}
}

// A node whose lane was closed under it can record no revocation any more. Going on would be to refuse them all for ever, and look well.
func TestRevokerWithoutALaneEndsItsProcess(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	alice := person(identity.RoleRequester, "alice")
	issued := issue(t, n, alice, "k")
	var fatal []error
	n.Revoker.OnFatal(func(err error) { fatal = append(fatal, err) })
	if err := n.Status.Close(soon(t)); err != nil {
		t.Fatal(err)
	}
	_, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: ca.ReasonSuperseded, Actor: alice})
	if ca.NameOf(err) != ca.DatabaseUnavailable || len(fatal) != 1 || !errors.Is(fatal[0], db.ErrLaneClosed) {
		t.Errorf("%v; the process was told %v", err, fatal)
	}
}

func TestRevokersOnTwoNodesMakeOneEvent(t *testing.T) {
	n, keys, cfg := established(t, nil, nil)
	cfg.Nodes = append(slices.Clone(cfg.Nodes[1:]), cfg.Nodes[0])
	other := catest.Start(t, cfg, keys, catest.Config{Name: "ca2"})
	alice := person(identity.RoleRequester, "alice")
	issued := issue(t, n, alice, "k")
	var wg sync.WaitGroup
	for i := range 8 {
		node := []*catest.Node{n, other}[i%2]
		wg.Go(func() {
			done, err := node.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Reason: ca.ReasonSuperseded, Actor: alice})
			if err != nil || done.N != 1 {
				t.Errorf("%v %+v", err, done)
			}
		})
	}
	wg.Wait()
	if got := events(t, n, issued); len(got) != 1 {
		t.Errorf("events %v", got)
	}
}

// A responder is registered and hears nothing: the revocation is recorded and no more, also on repeats.
func TestUnreachedResponderMeansRecordedOnly(t *testing.T) {
	silent := newResponder("ocsp1", 1)
	n, _, _ := established(t, newChain(silent.member("serve")), network{})
	alice := person(identity.RoleRequester, "alice")
	issued := issue(t, n, alice, "k")
	for range 2 {
		ctx, cancel := context.WithTimeout(context.Background(), 400*time.Millisecond)
		done, err := n.Revoker.Revoke(ctx, ca.RevokeRequest{Issuer: issued.Issuer, Serial: issued.Serial, Actor: alice})
		cancel()
		if err != nil || done.Reach.Effective() || !slices.Equal(done.Reach.Pending, []string{"ocsp1"}) || done.N != 1 {
			t.Errorf("%v %+v", err, done)
		}
	}
}

func TestUnknownSerialIsNotFound(t *testing.T) {
	n, _, _ := established(t, nil, nil)
	before := journalled(t, n)[journal.KindDone]
	_, err := n.Revoker.Revoke(soon(t), ca.RevokeRequest{Issuer: "demo-g1", Serial: make([]byte, 20), Actor: person(identity.RoleCAOperator, "olga")})
	if ca.NameOf(err) != ca.NotFound {
		t.Errorf("got %v", err)
	}
	if after := journalled(t, n)[journal.KindDone]; after != before {
		t.Error("something was recorded as done")
	}
}

func TestViewerJournalsWhatItShows(t *testing.T) {
	n, keys, cfg := established(t, nil, nil)
	other := catest.Start(t, cfg, keys, catest.Config{Name: "ca2"})
	issued := issue(t, n, person(identity.RoleRequester, "alice"), "k")
	v := ca.NewViewer(other.Engine)
	for range 3 {
		c, err := v.Certificate(soon(t), issued.Issuer, issued.Serial)
		if err != nil || c == nil || string(c.Outcome.DER) != string(issued.DER) {
			t.Fatalf("%v %+v", err, c)
		}
	}
	if got := journalled(t, other)[journal.KindDone]; got != 1 {
		t.Errorf("%d done records for one certificate shown three times", got)
	}
	if c, err := v.Certificate(soon(t), "demo-g1", []byte{1, 2, 3}); c != nil || err != nil {
		t.Errorf("an unknown serial: %+v, %v", c, err)
	}
}
