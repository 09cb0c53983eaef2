// Package fsck holds the invariants of Trivet against a live cluster: journals, record, responders and CRLs must tell one story.
// It only reads. The same check serves operators (`pkictl fsck`) and every end-to-end test.
package fsck

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sort"
	"time"

	"trivet/db"
)

// Responder is one VA node, asked directly and not through a balancer.
type Responder struct {
	Name string `yaml:"name"`
	URL  string `yaml:"url"` // base of its public listener, such as http://127.77.4.1:8080
}

// Config says what to check. Store is mandatory; what is left out is not checked and not counted.
type Config struct {
	Store      *db.Store
	Journals   map[string]string // node → its journal directory, readable here
	Responders []Responder
	HTTP       *http.Client // for responders; its timeout bounds one question

	// MACKeys authenticate intents. nil: whether CA nodes wrote them is not checked, and the report says so.
	MACKeys *db.MACKeys

	// Ask, if greater than 0, is about how many certificates responders are asked: that many of the newest, as many of the others, chosen at random, and all that
	// are revoked or abandoned. The report says how many are left out. 0: all.
	Ask int

	// Open is how long an intent may stay without an outcome: the sweeper finishes it after 10 s. Default 60 s.
	Open time.Duration
	// Settle is how long a responder may take to show what the record says: an answer that is merely late is asked for again until then. Default 10 s.
	Settle time.Duration
	// CRLDelay is how long a revocation may wait for its CRL. Default 60 s (pki-profile: at most one minute).
	CRLDelay time.Duration

	Now func() time.Time // default time.Now
	Log *slog.Logger     // progress; default: none
}

// Violation is one invariant that does not hold for one object.
type Violation struct {
	Invariant string `json:"invariant"` // I1 … I12 of the design
	Object    string `json:"object"`    // what it concerns: "demo-g1:3f…", "lane ca1/…", "responder ocsp1"
	Detail    string `json:"detail"`
}

// Report is the outcome. OK means that everything that was counted holds and that nothing that had to be read was out of reach.
type Report struct {
	OK         bool           `json:"ok"`
	Checked    map[string]int `json:"checked"` // how many of what were checked: "certificates", "journal_records"…
	Violations []Violation    `json:"violations"`
	Unchecked  []string       `json:"unchecked"` // what was left out, and why
}

// key names one certificate: issuer and the serial's octets.
type key struct{ issuer, serial string }

func (k key) String() string { return fmt.Sprintf("%s:%x", k.issuer, k.serial) }

// certificate is what the record says of one serial. Digests stand for bytes so that large records fit in memory.
type certificate struct {
	der       [32]byte
	abandoned bool
	notAfter  time.Time
}

// event is the newest revocation event of one serial.
type event struct {
	n       int
	event   string
	reason  int
	created time.Time
	acked   bool // a node's journal says that it was acknowledged, or about to be
}

func (e event) revoked() bool { return e.event != "" && e.event != "release" }

// check is one run.
type check struct {
	Config
	report Report

	acked       map[key][32]byte     // released certificates, from journals: digest of the DER
	ackedEvents map[key]map[int]bool // revocation events with a done record
	ackedBlocks map[string]string    // blocked keys with a done record, by hash in hex: who says so
	generations map[string]*x509.Certificate
	certs       map[key]certificate
	events      map[key]event
}

// Run checks everything that cfg gives access to. The report holds what is wrong with the cluster; the error, if any, says why the check itself could
// not be finished: then the report is worth nothing.
func Run(ctx context.Context, cfg Config) (Report, error) {
	if cfg.Store == nil {
		return Report{}, errors.New("fsck: no database given")
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&cfg.Open, time.Minute)
	def(&cfg.Settle, 10*time.Second)
	def(&cfg.CRLDelay, time.Minute)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.HTTP == nil {
		cfg.HTTP = &http.Client{Timeout: 5 * time.Second}
	}
	c := &check{
		Config:      cfg,
		report:      Report{Checked: map[string]int{}, Violations: []Violation{}, Unchecked: []string{}},
		acked:       map[key][32]byte{},
		ackedEvents: map[key]map[int]bool{},
		ackedBlocks: map[string]string{},
		generations: map[string]*x509.Certificate{},
		certs:       map[key]certificate{},
		events:      map[key]event{},
	}
	if c.MACKeys == nil {
		c.report.Unchecked = append(c.report.Unchecked, "whether CA nodes wrote the intents: no MAC keys are given")
	}
	// Journals first: what they call done was committed before, so the record read afterwards must hold it. Responders last, for the same reason.
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"journals", c.journals},
		{"record", c.record},
		{"released against record", c.released},
		{"change feed", c.feed},
		{"recovery rounds", c.rounds},
		{"blocked keys", c.blocks},
		{"CRLs", c.crls},
		{"responders", c.responders},
	} {
		c.Log.Info("checking", "what", step.name)
		if err := step.run(ctx); err != nil {
			return Report{}, fmt.Errorf("checking %s: %w", step.name, err)
		}
	}
	sort.SliceStable(c.report.Violations, func(i, j int) bool {
		a, b := c.report.Violations[i], c.report.Violations[j]
		return a.Invariant < b.Invariant || a.Invariant == b.Invariant && a.Object < b.Object
	})
	c.report.OK = len(c.report.Violations) == 0
	return c.report, nil
}

func (c *check) violate(invariant string, object any, format string, args ...any) {
	c.report.Violations = append(c.report.Violations, Violation{Invariant: invariant, Object: fmt.Sprint(object), Detail: fmt.Sprintf(format, args...)})
}

func (c *check) count(what string, n int) { c.report.Checked[what] += n }
