package ca_test

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/ca"
	"trivet/db"
	"trivet/db/dbtest"
	"trivet/journal"
)

// gate stops a node at one step of the protocol, as death or a pause would.
type gate struct {
	point   string
	once    sync.Once
	reached chan struct{} // closed when the node is there
	resume  chan struct{} // closed to let it go on
	dead    bool          // whether it goes on with an error, for the test's own cleaning up
}

// newGate makes a gate. Defer its open, so that it is open before the node's cleaning up waits for what is under way.
func newGate(point string) *gate {
	return &gate{point: point, reached: make(chan struct{}), resume: make(chan struct{}), dead: true}
}

func (g *gate) open() { g.once.Do(func() { close(g.resume) }) }

// thaw lets the node go on as if it had only been paused.
func (g *gate) thaw() { g.dead = false; g.open() }

var errDead = errors.New("this node is dead")

func (g *gate) at(point string) error {
	if point != g.point {
		return nil
	}
	select {
	case <-g.resume:
	default:
		close(g.reached)
		<-g.resume
	}
	if g.dead {
		return errDead
	}
	return nil
}

// steps are the points between the steps of the protocol, in order.
var steps = []string{"before the journal has the intent", "after the journal has the intent", "after the database has the intent", "after the journal has the digest",
	"after the signature", "after the database has the certificate", "after the read-back", "after the journal has it done"}

type gatedRecord struct {
	ca.Record
	*gate
}

func (r gatedRecord) InsertIntents(ctx context.Context, in []db.Intent) ([]db.Intent, string, error) {
	if err := r.at(steps[1]); err != nil {
		return nil, "", err
	}
	rows, node, err := r.Record.InsertIntents(ctx, in)
	if err == nil {
		err = r.at(steps[2])
	}
	return rows, node, err
}

func (r gatedRecord) ReadBack(ctx context.Context, except string, reqs [][]byte) ([]db.Issued, string, error) {
	rows, node, err := r.Record.ReadBack(ctx, except, reqs)
	if err == nil {
		err = r.at(steps[6])
	}
	return rows, node, err
}

type gatedLane struct {
	ca.FactLane
	*gate
}

func (l gatedLane) Append(ctx context.Context, facts []db.Fact) ([]db.Appended, error) {
	if err := l.at(steps[4]); err != nil {
		return nil, err
	}
	appended, err := l.FactLane.Append(ctx, facts)
	if err == nil {
		err = l.at(steps[5])
	}
	return appended, err
}

type gatedJournal struct {
	ca.JournalWriter
	*gate
}

func (j gatedJournal) Append(records ...journal.Record) error {
	kind := records[len(records)-1].Kind
	if kind == journal.KindIntent {
		if err := j.at(steps[0]); err != nil {
			return err
		}
	}
	if err := j.JournalWriter.Append(records...); err != nil {
		return err
	}
	switch kind {
	case journal.KindSign:
		return j.at(steps[3])
	case journal.KindDone:
		return j.at(steps[7])
	}
	return nil
}

func (g *gate) interpose(*ca.Config) func(*ca.Engine) {
	return func(e *ca.Engine) {
		e.Interpose(func(r ca.Record) ca.Record { return gatedRecord{r, g} }, func(l ca.FactLane) ca.FactLane { return gatedLane{l, g} },
			func(j ca.JournalWriter) ca.JournalWriter { return gatedJournal{j, g} })
	}
}

// A node is stopped at each step. Another finishes the request; the first, had it only paused, then shows the same bytes, and had it died, its
// next incarnation does.
func TestAnotherNodeFinishesWhatAStoppedOneBegan(t *testing.T) {
	p := newPKI(t)
	b := p.start(t, "ca2", nil)
	for i, point := range steps {
		for _, end := range []string{"paused", "died"} {
			t.Run(point+", "+end, func(t *testing.T) {
				g := newGate(point)
				defer g.open()
				name := fmt.Sprintf("ca-%d-%s", i, end)
				a := p.start(t, name, g.interpose)
				r := ask(t, "k-"+name)
				type answer struct {
					issued *ca.Issued
					err    error
				}
				first := make(chan answer, 1)
				go func() {
					issued, err := a.engine.Issue(context.Background(), r)
					first <- answer{issued, err}
				}()
				<-g.reached
				second := b.mustIssue(t, r)

				if end == "paused" {
					g.thaw()
					got := <-first
					if got.err != nil || string(got.issued.DER) != string(second.DER) {
						t.Errorf("the paused node says %+v, %v", got.issued, got.err)
					}
				} else {
					g.open()
					if got := <-first; got.err == nil {
						t.Error("a dead node answered")
					}
				}
				a.stop(t)
				again := p.startIn(t, name, a.dir, nil)
				if got := again.mustIssue(t, r); string(got.DER) != string(second.DER) {
					t.Error("the next incarnation shows other bytes")
				}
			})
		}
	}
	if open, err := b.store.OpenIntents(t.Context(), 0, 10); err != nil || len(open) > 0 {
		t.Errorf("%d intents are open (%v): what a journal had and the database had not should be abandoned", len(open), err)
	}
	p.check(t)
}

// A journalled intent that never reached the database gets a row without a request key, and is abandoned.
func TestARestartBuriesWhatOnlyItsJournalKnows(t *testing.T) {
	p := newPKI(t)
	g := newGate(steps[1])
	defer g.open()
	a := p.start(t, "ca1", g.interpose)
	go a.engine.Issue(context.Background(), ask(t, "k1"))
	<-g.reached
	g.open()
	a.stop(t)
	var serial string
	if err := a.replay(t, func(e journal.Entry) error {
		if e.Kind == journal.KindIntent {
			var i journal.Intent
			serial = i.Serial
			if err := e.Decode(&i); err != nil {
				return err
			}
			serial = i.Serial
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	again := p.startIn(t, "ca1", a.dir, nil)
	octets, err := hex.DecodeString(serial)
	if err != nil || serial == "" {
		t.Fatalf("serial %q: %v", serial, err)
	}
	row, err := again.store.Certificate(t.Context(), "demo-g1", octets)
	if err != nil || row == nil || row.Outcome == nil || row.Outcome.Kind != db.OutcomeAbandoned || row.Intent.Req != nil {
		t.Fatalf("the row is %+v, %v", row, err)
	}
	// And it is done only once.
	again.stop(t)
	p.startIn(t, "ca1", a.dir, nil)
	p.check(t)
}

func (n *node) replay(t *testing.T, fn func(journal.Entry) error) error {
	t.Helper()
	return journal.ReadDir(n.dir, fn)
}

func TestANodeAheadOfTheDatabaseDoesNotStart(t *testing.T) {
	p := newPKI(t)
	a := p.start(t, "ca1", nil)
	a.mustIssue(t, ask(t, "k1"))
	a.stop(t)
	// The same journal over a database that has none of it.
	other := newPKI(t)
	other.keys = p.keys
	n := other.make(t, "ca1", a.dir, nil)
	err := n.engine.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "gone back in time") {
		t.Fatalf("Run returned %v", err)
	}
	if n.engine.Running() {
		t.Error("it admits requests")
	}
	n.journal.Close()
}

// faulty fails the next call of one kind, before or after it did its work.
type faulty struct {
	mu   sync.Mutex
	call string
	done bool // whether the work is done all the same
	err  error
}

func (f *faulty) arm(call string, done bool, class db.Class) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.call, f.done, f.err = call, done, &db.Error{Class: class, Op: call, Err: errors.New("injected")}
}

func (f *faulty) take(call string) (fail error, done bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.call != call {
		return nil, true
	}
	f.call = ""
	return f.err, f.done
}

type faultyRecord struct {
	ca.Record
	*faulty
}

func (r faultyRecord) InsertIntents(ctx context.Context, in []db.Intent) ([]db.Intent, string, error) {
	fail, done := r.take("InsertIntents")
	if done {
		if rows, node, err := r.Record.InsertIntents(ctx, in); fail == nil || err != nil {
			return rows, node, err
		}
	}
	return nil, "", fail
}

func (r faultyRecord) ReadBack(ctx context.Context, except string, reqs [][]byte) ([]db.Issued, string, error) {
	if fail, done := r.take("ReadBack"); fail != nil {
		if done { // the rows were lost: they were committed, and are not to be seen
			return make([]db.Issued, len(reqs)), "", nil
		}
		return nil, "", fail
	}
	return r.Record.ReadBack(ctx, except, reqs)
}

type faultyLane struct {
	ca.FactLane
	*faulty
}

func (l faultyLane) Append(ctx context.Context, facts []db.Fact) ([]db.Appended, error) {
	fail, done := l.take("Append")
	if done {
		if appended, err := l.FactLane.Append(ctx, facts); fail == nil || err != nil {
			return appended, err
		}
	}
	return make([]db.Appended, len(facts)), fail
}

// Every fault of the database in two forms: it did nothing, and it did it and said that it failed.
func TestDatabaseTroubleIsSaidAndARepeatGetsTheOneCertificate(t *testing.T) {
	p := newPKI(t)
	f := &faulty{}
	a := p.start(t, "ca1", func(*ca.Config) func(*ca.Engine) {
		return func(e *ca.Engine) {
			e.Interpose(func(r ca.Record) ca.Record { return faultyRecord{r, f} }, func(l ca.FactLane) ca.FactLane { return faultyLane{l, f} }, nil)
		}
	})
	b := p.start(t, "ca2", nil)
	for i, c := range []struct {
		call  string
		done  bool
		class db.Class
		want  string // "" if the node gets over it by itself
	}{
		{"InsertIntents", false, db.NotReady, ca.DatabaseUnavailable},
		{"InsertIntents", true, db.Ambiguous, ca.OutcomeUnknown},
		{"Append", false, db.NotReady, ca.DatabaseUnavailable},
		{"Append", true, db.Ambiguous, ca.OutcomeUnknown},
		{"ReadBack", false, db.NotReady, ca.DatabaseUnavailable},
		{"ReadBack", true, db.None, ""},
	} {
		for j, n := range []*node{a, b} {
			t.Run(fmt.Sprintf("%s, done %v, repeated on node %d", c.call, c.done, j+1), func(t *testing.T) {
				f.arm(c.call, c.done, c.class)
				r := ask(t, fmt.Sprintf("k-%d-%d", i, j))
				issued, err := a.issue(t, r)
				var e *ca.Error
				switch {
				case c.want == "" && err != nil:
					t.Fatalf("got %v", err)
				case c.want != "" && (!errors.As(err, &e) || e.Name != c.want || !e.Retryable()):
					t.Fatalf("got %v, want %s with Retry-After", err, c.want)
				}
				again := n.mustIssue(t, r)
				if issued != nil && string(issued.DER) != string(again.DER) {
					t.Error("the repeat has other bytes")
				}
			})
		}
	}
	p.check(t)
}

func TestAFailedJournalEndsTheNode(t *testing.T) {
	p := newPKI(t)
	f := &brokenJournal{failed: make(chan struct{})}
	a := p.start(t, "ca1", func(*ca.Config) func(*ca.Engine) {
		return func(e *ca.Engine) {
			e.Interpose(nil, nil, func(j ca.JournalWriter) ca.JournalWriter { f.JournalWriter = j; return f })
		}
	})
	signed := p.keys.total()
	if _, err := a.issue(t, ask(t, "k1")); ca.NameOf(err) != ca.JournalUnavailable {
		t.Errorf("got %v, want %s", err, ca.JournalUnavailable)
	}
	if p.keys.total() != signed {
		t.Error("something was signed without a record")
	}
	close(f.failed)
	dbtest.Until(t, "the engine stops", func() bool { return !a.engine.Running() })
	if err := a.stop(t); err == nil {
		t.Error("Run returned no error")
	}
}

type brokenJournal struct {
	ca.JournalWriter
	failed chan struct{}
}

func (j *brokenJournal) Append(...journal.Record) error { return journal.ErrFailed }
func (j *brokenJournal) Failed() <-chan struct{}        { return j.failed }

// later is a node whose clock runs ahead, so that everybody's open intents are old enough to be swept.
func later(c *ca.Config) func(*ca.Engine) {
	c.Now = func() time.Time { return time.Now().Add(time.Minute) }
	return nil
}

func TestTheSweeperFinishesOpenIntents(t *testing.T) {
	p := newPKI(t)
	g := newGate(steps[2])
	defer g.open()
	a := p.start(t, "ca1", g.interpose)
	r := ask(t, "k1")
	first := make(chan string, 1)
	go func() {
		issued, err := a.engine.Issue(context.Background(), r)
		if err != nil {
			t.Error(err)
			first <- ""
			return
		}
		first <- string(issued.DER)
	}()
	<-g.reached
	b := p.start(t, "ca2", later)
	if err := b.engine.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if open, err := b.store.OpenIntents(t.Context(), 0, 10); err != nil || len(open) != 0 {
		t.Fatalf("%d intents are open, %v", len(open), err)
	}
	swept := b.mustIssue(t, r)
	g.thaw()
	if der := <-first; der != string(swept.DER) {
		t.Error("the node that was slow shows other bytes")
	}
	p.check(t)
}

func TestWhatPolicyRefusesNowIsAbandonedAndNeverShown(t *testing.T) {
	p := newPKI(t)
	g := newGate(steps[4]) // it has a signature already
	defer g.open()
	a := p.start(t, "ca1", g.interpose)
	r := ask(t, "k1", "www.example.org")
	first := make(chan error, 1)
	go func() {
		_, err := a.engine.Issue(context.Background(), r)
		first <- err
	}()
	<-g.reached
	b := p.start(t, "ca2", func(c *ca.Config) func(*ca.Engine) {
		stricter, err := ca.NewProfiles(profile(t, "version: 1", "version: 2", "under: []", "under: [example.com]"))
		if err != nil {
			t.Fatal(err)
		}
		c.Profiles = stricter
		return later(c)
	})
	if err := b.engine.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := p.start(t, "ca3", nil)
	if _, err := c.issue(t, r); ca.NameOf(err) != ca.RequestAbandoned {
		t.Errorf("a repeat elsewhere: got %v, want %s", err, ca.RequestAbandoned)
	}
	told := 0
	if err := c.journal.Replay(func(e journal.Entry) error {
		if e.Kind == journal.KindDone {
			told++
		}
		return nil
	}); err != nil || told != 1 {
		t.Errorf("the node that told of it has %d records of it, %v: a database that loses it would give the request a certificate", told, err)
	}
	g.thaw()
	if err := <-first; ca.NameOf(err) != ca.RequestAbandoned {
		t.Errorf("the node that had signed: got %v, want %s", err, ca.RequestAbandoned)
	}
	p.check(t)
}

// elsewhere notes which database node an abandonment was committed on, and which were asked for it.
type elsewhere struct {
	ca.Record
	ca.FactLane
	committed, except, asked string
}

func (r *elsewhere) Append(ctx context.Context, facts []db.Fact) ([]db.Appended, error) {
	appended, err := r.FactLane.Append(ctx, facts)
	if err == nil {
		r.committed = appended[0].Node
	}
	return appended, err
}

func (r *elsewhere) CertificateElsewhere(ctx context.Context, except, issuer string, serial []byte) (*db.Certificate, string, error) {
	c, node, err := r.Record.CertificateElsewhere(ctx, except, issuer, serial)
	r.except, r.asked = except, node
	return c, node, err
}

// Should the only database node that has an abandonment die with it, somebody might finish the request after all.
func TestAnAbandonmentIsReadBackFromAnotherDatabaseNode(t *testing.T) {
	p := newPKI(t)
	g := newGate(steps[2])
	defer g.open()
	a := p.start(t, "ca1", g.interpose)
	go a.engine.Issue(context.Background(), ask(t, "k1", "www.example.org"))
	<-g.reached
	var seen elsewhere
	b := p.start(t, "ca2", func(c *ca.Config) func(*ca.Engine) {
		stricter, err := ca.NewProfiles(profile(t, "version: 1", "version: 2", "under: []", "under: [example.com]"))
		if err != nil {
			t.Fatal(err)
		}
		c.Profiles = stricter
		later(c)
		return func(e *ca.Engine) {
			e.Interpose(func(r ca.Record) ca.Record { seen.Record = r; return &seen }, func(l ca.FactLane) ca.FactLane { seen.FactLane = l; return &seen },
				func(j ca.JournalWriter) ca.JournalWriter { return j })
		}
	})
	if err := b.engine.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if seen.committed == "" || seen.except != seen.committed || seen.asked == "" || seen.asked == seen.committed {
		t.Errorf("committed on %q, asked %q and not %q", seen.committed, seen.asked, seen.except)
	}
}

// Whoever can write to the database cannot have anything signed that the profile would not have made.
func TestTamperedIntentsAreNotSigned(t *testing.T) {
	p := newPKI(t)
	b := p.start(t, "ca2", later)
	g := newGate(steps[2])
	defer g.open()
	a := p.start(t, "ca1", g.interpose)
	go a.engine.Issue(context.Background(), ask(t, "k1", "www.example.org"))
	<-g.reached
	open, err := a.store.OpenIntents(t.Context(), 0, 10)
	if err != nil || len(open) != 1 {
		t.Fatalf("%d open, %v", len(open), err)
	}
	genuine := open[0]
	if err := b.engine.Recheck(genuine); err != nil {
		t.Fatalf("the genuine row: %v", err)
	}
	demo, _ := b.engine.Authorities().Issuer("demo-g1")
	forge := func(change func(*x509.Certificate)) []byte { return forgeTBS(t, genuine.TBS, demo, change) }
	if same := forge(func(*x509.Certificate) {}); string(same) != string(genuine.TBS) {
		t.Fatal("the forger does not reproduce the genuine bytes, so its forgeries prove nothing")
	}
	for i, c := range []struct {
		name string
		tbs  []byte
	}{
		{"CA certificate", forge(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid, c.MaxPathLen = true, true, -1 })},
		{"certificate signing", forge(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })},
		{"OCSP signing", forge(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning} })},
		{"wildcard", forge(func(c *x509.Certificate) {
			c.DNSNames = []string{"*.example.org"}
			c.RawSubject = nil
			c.Subject.CommonName = "*.example.org"
		})},
		{"e-mail address", forge(func(c *x509.Certificate) { c.EmailAddresses = []string{"a@example.org"} })},
		{"another organisation", forge(func(c *x509.Certificate) { c.RawSubject = nil; c.Subject.Organization = []string{"Evil"} })},
		{"longer", forge(func(c *x509.Certificate) { c.NotAfter = c.NotAfter.AddDate(1, 0, 0) })},
		{"from the future", forge(func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(time.Hour) })},
		{"without status addresses", forge(func(c *x509.Certificate) { c.OCSPServer, c.CRLDistributionPoints = nil, nil })},
		{"elsewhere for status", forge(func(c *x509.Certificate) { c.OCSPServer = []string{"http://evil.test/"} })},
		{"a CA's key", forge(func(c *x509.Certificate) { c.PublicKey = demo.Certificate.PublicKey })},
		{"not a certificate", []byte("hello")},
		{"trailing octet", append(append([]byte(nil), genuine.TBS...), 0)},
	} {
		t.Run(c.name, func(t *testing.T) {
			row := genuine
			row.TBS = c.tbs
			if err := b.engine.Recheck(row); err == nil {
				t.Fatal("it would have been signed")
			}
			row.Serial = append([]byte{genuine.Serial[0], byte(i)}, genuine.Serial[2:]...)
			req := ca.RequestKey(alice, "forged-"+c.name)
			row.Req = req[:]
			if _, _, err := b.store.InsertIntents(t.Context(), []db.Intent{row}); err != nil {
				t.Fatal(err)
			}
		})
	}
	another := genuine
	another.Serial = append([]byte{genuine.Serial[0], 0xff}, genuine.Serial[2:]...)
	if err := b.engine.Recheck(another); err == nil {
		t.Error("a TBSCertificate under another row's serial would have been signed")
	}
	signed := p.keys.total()
	if err := b.engine.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := p.keys.total() - signed; got != 1 {
		t.Errorf("%d signatures; only the genuine intent should get one", got)
	}
	p.check(t)
}

// A draft that one node began is finished by another from its own copy of it; a different draft under the same key is not.
func TestADraftIsFinishedByAnotherNode(t *testing.T) {
	p := newPKI(t)
	g := newGate(steps[2])
	defer g.open()
	a, b := p.start(t, "ca1", g.interpose), p.start(t, "ca2", nil)
	pub := newKey(t).Public()
	draft := func(name string) ca.Draft {
		now := time.Now().UTC().Truncate(time.Second)
		d := ca.Draft{Issuer: "root-g1", PublicKey: pub, Profile: "test-sub-ca", ProfileVersion: 1, Requester: alice, Template: &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, NotBefore: now, NotAfter: now.AddDate(1, 0, 0), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, CRLDistributionPoints: []string{"http://pki.example.org/crl/root-g1.crl"}}}
		copy(d.Req[:], sha256Sum([]byte("draft")))
		copy(d.Body[:], sha256Sum([]byte(name)))
		return d
	}
	go a.engine.IssueDraft(context.Background(), draft("Sub"))
	<-g.reached
	if _, err := b.engine.IssueDraft(t.Context(), draft("Another")); ca.NameOf(err) != ca.IdempotencyMismatch {
		t.Errorf("another draft under the same key: %v", err)
	}
	second, err := b.engine.IssueDraft(t.Context(), draft("Sub"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(second.DER)
	if err != nil {
		t.Fatal(err)
	}
	root, _ := b.engine.Authorities().Issuer("root-g1")
	if err := cert.CheckSignatureFrom(root.Certificate); err != nil || !cert.IsCA || cert.Subject.CommonName != "Sub" {
		t.Errorf("%v: %v", cert.Subject, err)
	}
	p.check(t)
}

// While no HSM signs, intents pile up; the sweeper finishes them all.
func TestTheSweeperWorksOffAHeap(t *testing.T) {
	p := newPKI(t)
	a := p.start(t, "ca1", nil)
	p.keys.set(func(context.Context, [][]byte) error { return errors.New("CKR_DEVICE_ERROR") }, nil)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			if _, err := a.issue(t, ask(t, fmt.Sprintf("k%d", i))); ca.NameOf(err) != ca.HSMUnavailable {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
	p.keys.set(nil, nil)
	if err := a.engine.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if open, err := a.store.OpenIntents(t.Context(), 0, 100); err != nil || len(open) != 0 {
		t.Errorf("%d intents are open, %v", len(open), err)
	}
	p.check(t)
}
