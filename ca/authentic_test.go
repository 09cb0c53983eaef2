package ca_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/ca"
	"trivet/db"
)

// counter returns the value of a counter with that label's value.
func counter(t *testing.T, registry *prometheus.Registry, name, value string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (value == "" || m.GetLabel()[0].GetValue() == value) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no metric %s for %s", name, value)
	return 0
}

// Somebody who may change rows makes an open intent say something that the profile permits: neither the sweeper nor a repeat signs it. A row
// without a MAC is no better. One whose key another node may know is left alone.
func TestRowsThatNoCANodeVouchesForAreNotSigned(t *testing.T) {
	for _, how := range []string{"sweep", "repeat"} {
		for _, c := range []struct {
			name, cause string
			tamper      func(row db.Intent, tbs []byte) string // SQL
			abandoned   bool
		}{
			{"another name", "forged", func(_ db.Intent, tbs []byte) string { return fmt.Sprintf("intent_tbs.tbs = x'%x'", tbs) }, true},
			{"another name, in the row itself", "forged", func(_ db.Intent, tbs []byte) string { return fmt.Sprintf("intent.tbs = x'%x'", tbs) }, true},
			{"no TBSCertificate", "no-tbs", func(db.Intent, []byte) string { return "intent_tbs.tbs = ''" }, true},
			{"another requester", "forged", func(db.Intent, []byte) string { return "requester = 'trivet://test/requester/mallory'" }, true},
			{"another profile version", "forged", func(db.Intent, []byte) string { return "profile_version = 7" }, true},
			{"no MAC", "missing", func(db.Intent, []byte) string { return "mac = NULL, mac_key = NULL" }, true},
			{"a key of one's own", "foreign-key", func(row db.Intent, tbs []byte) string {
				mallory, err := db.ParseMACKeys(fmt.Appendf(nil, "%064d", 1))
				if err != nil {
					t.Fatal(err)
				}
				row.TBS = tbs
				mallory.Seal(&row)
				return fmt.Sprintf("intent_tbs.tbs = x'%x', mac = x'%x', mac_key = x'%x'", tbs, row.MAC, row.MACKey)
			}, false},
		} {
			t.Run(how+", "+c.name, func(t *testing.T) {
				p := newPKI(t)
				g := newGate(steps[2])
				defer g.open()
				a := p.start(t, "ca1", g.interpose)
				registry := prometheus.NewRegistry()
				b := p.start(t, "ca2", func(cfg *ca.Config) func(*ca.Engine) {
					cfg.Metrics = registry
					return later(cfg)
				})
				r := ask(t, "k1")
				go a.engine.Issue(context.Background(), r)
				<-g.reached
				open, err := a.store.OpenIntents(t.Context(), 0, 10)
				if err != nil || len(open) != 1 {
					t.Fatalf("%d open, %v", len(open), err)
				}
				forged := bytes.ReplaceAll(open[0].TBS, []byte("www.example.org"), []byte("eve.example.org"))
				row := open[0]
				row.TBS = forged
				if err := b.engine.Recheck(row); err != nil {
					t.Fatalf("policy alone refuses the forgery, so it proves nothing: %v", err)
				}
				execute(t, p.db, "UPDATE intent JOIN intent_tbs USING (issuer, serial) SET "+c.tamper(open[0], forged)+fmt.Sprintf(" WHERE intent.serial = x'%x'", open[0].Serial))

				signed := p.keys.total()
				if how == "sweep" {
					if err := b.engine.Sweep(t.Context()); err != nil {
						t.Fatal(err)
					}
				} else {
					_, err := b.issue(t, r)
					want := ca.RequestAbandoned
					if !c.abandoned {
						want = ca.OutcomeUnknown
					}
					if ca.NameOf(err) != want {
						t.Errorf("a repeat: got %v, want %s", err, want)
					}
				}
				if got := p.keys.total() - signed; got != 0 {
					t.Errorf("%d signatures", got)
				}
				if got := counter(t, registry, "trivet_ca_forged_intents_total", c.cause); got != 1 {
					t.Errorf("the alarm counts %v for cause %s, want 1", got, c.cause)
				}
				cert, err := b.store.Certificate(t.Context(), open[0].Issuer, open[0].Serial)
				if err != nil || cert == nil || (cert.Outcome != nil) != c.abandoned || cert.Outcome != nil && cert.Outcome.Kind != db.OutcomeAbandoned {
					t.Errorf("outcome %+v, %v; abandoned should be %v", cert, err, c.abandoned)
				}
			})
		}
	}
}

// A node with the new key as its second one finishes what a node that writes with it began, and the other way round.
func TestMACKeysAreRotatedOneNodeAfterTheOther(t *testing.T) {
	keys := func(secrets ...int) *db.MACKeys {
		var text []byte
		for _, s := range secrets {
			text = fmt.Appendf(text, "%064d\n", s)
		}
		k, err := db.ParseMACKeys(text)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	p := newPKI(t)
	for i, order := range [][2]*db.MACKeys{{keys(1, 2), keys(2, 1)}, {keys(2, 1), keys(1, 2)}} {
		g := newGate(steps[2])
		defer g.open()
		a := p.start(t, fmt.Sprint("a", i), func(c *ca.Config) func(*ca.Engine) {
			c.MACKeys = order[0]
			return g.interpose(c)
		})
		b := p.start(t, fmt.Sprint("b", i), func(c *ca.Config) func(*ca.Engine) {
			c.MACKeys = order[1]
			return nil
		})
		r := ask(t, fmt.Sprint("k", i))
		go a.engine.Issue(context.Background(), r)
		<-g.reached
		if got := b.mustIssue(t, r); !got.Replayed {
			t.Error("the other node began anew")
		}
	}
	p.check(t)
}

// slippedRecord changes what is about to be signed after it was checked, as a defect in the pipeline would.
type slippedRecord struct{ ca.Record }

func (r slippedRecord) InsertIntents(ctx context.Context, in []db.Intent) ([]db.Intent, string, error) {
	rows, node, err := r.Record.InsertIntents(ctx, in)
	in[0].TBS[len(in[0].TBS)-1] ^= 1 // the job's own octets
	return rows, node, err
}

func TestTheSignerSignsOnlyWhatWasChecked(t *testing.T) {
	p := newPKI(t)
	n := p.start(t, "ca1", func(*ca.Config) func(*ca.Engine) {
		return func(e *ca.Engine) {
			e.Interpose(func(r ca.Record) ca.Record { return slippedRecord{r} }, func(l ca.FactLane) ca.FactLane { return l }, func(j ca.JournalWriter) ca.JournalWriter { return j })
		}
	})
	signed := p.keys.total()
	if _, err := n.issue(t, ask(t, "k1")); ca.NameOf(err) != ca.OutcomeUnknown {
		t.Errorf("got %v, want %s", err, ca.OutcomeUnknown)
	}
	if got := p.keys.total() - signed; got != 0 {
		t.Errorf("%d signatures", got)
	}
}
