package history

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Rules. A violation names one of them.
const (
	Stored    = "stored"     // what was acknowledged is in the record
	OneSerial = "one-serial" // a serial is given out once
	OneReq    = "one-request"
	SameBytes = "same-bytes" // every path gives the same bytes: 201, repeat, batch, GET, take-over, record
	Journaled = "journaled"  // what was acknowledged stands as done in some journal, with its bytes
	Intended  = "intended"   // signatures are of intents: every certificate has a sign record, every sign record an intent, agents signed no more than journals say
	Refused   = "refused"    // what was refused for good never came into being
	TrueGood  = "true-good"  // nobody is told good who asked after an effective revocation
	GoodRow   = "good-row"   // nobody is told good about what is not in the record
	CRLRises  = "crl-rises"  // CRL numbers rise
	CRLKeeps  = "crl-keeps"  // CRL contents never shrink
	Verifies  = "verifies"   // every answer verifies and is current
)

// Config says what to check. A part that is nil is not checked, and Report.Checked shows that it was not.
type Config struct {
	Path    string                       // of the history
	Issuers map[string]*x509.Certificate // by id, such as demo-g1: whoever signs certificates, CRLs and responder certificates

	Record   RecordReader  // the final record
	Journals JournalReader // the final journals of all CA nodes, and the ceremony's
	Agents   AgentReader   // signatures that HSM agents counted
	// Resigned is how many signatures an HSM group may have made beyond those that journals call for: digests given to a second member because the
	// first was slow or lost. It is a share of the journals' count.
	Resigned float64
}

// Violation is a rule that does not hold, with the operations that contradict each other or one that contradicts what is kept.
type Violation struct {
	Rule       string   `json:"rule"`
	Object     string   `json:"object"`
	Detail     string   `json:"detail"`
	Operations []string `json:"operations"`

	ops []uint64
}

func (v Violation) String() string {
	s := fmt.Sprintf("%s: %s: %s", v.Rule, v.Object, v.Detail)
	for _, o := range v.Operations {
		s += "\n    " + o
	}
	return s
}

// Report is what a check found.
type Report struct {
	Checked    map[string]int `json:"checked"`
	Violations []Violation    `json:"violations"` // at most maxViolations of one rule
	More       int            `json:"more"`       // violations left out
}

// OK tells whether nothing is violated.
func (r Report) OK() bool { return len(r.Violations) == 0 }

const maxViolations = 20

// check is one run. It keeps a few hundred octets per certificate and none of the bytes.
type check struct {
	Config
	report Report
	byRule map[string]int

	open    map[uint64]Event    // invoked, not returned
	certs   map[string]*cert    // by object
	reqs    map[string]*request // by client, 0, Idempotency-Key
	names   map[string]*request // by name, where no key was sent
	good    map[string]uint64   // object → an operation that was told good
	bytes   map[digest]verdict  // of everything verified
	crls    map[string]*crls    // by issuer
	signed  map[string]digest   // object → digest in its newest sign record
	crlSigs int                 // CRLs that journals say were signed
	signs   int                 // certificates, the same; a repeated signature counts again
	made    int                 // signatures that HSM agents counted
}

// cert is a certificate that clients were shown.
type cert struct {
	digest    digest
	op        uint64 // that showed it first
	req       *request
	effective int64 // when a revocation of it was known to be effective; -1: not
	by        uint64
	recorded  uint64 // an operation that was told that a revocation is on record; 0: none
	stored    bool
	done      bool
}

// request is one Idempotency-Key of one client.
type request struct {
	object  string
	op      uint64 // that was answered with object; 0: none was
	refused uint64 // an operation that was refused for good; 0: none
	status  int
	invoked uint64
}

// Check reads a whole history, and what is kept. The error says why the check could not be finished; then the report is worth nothing.
func Check(ctx context.Context, cfg Config) (Report, error) {
	c := &check{
		Config: cfg, report: Report{Checked: map[string]int{}}, byRule: map[string]int{},
		open: map[uint64]Event{}, certs: map[string]*cert{}, reqs: map[string]*request{}, names: map[string]*request{}, good: map[string]uint64{},
		bytes: map[digest]verdict{}, crls: map[string]*crls{}, signed: map[string]digest{},
	}
	last := int64(-1)
	err := scan(cfg.Path, func(e Event, at int64) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.Mono < last {
			return fmt.Errorf("operation %d goes back in time", e.Op)
		}
		last = e.Mono
		switch e.Phase {
		case Invoke:
			c.open[e.Op] = e
			c.invoked(e)
			return nil
		case Return:
			begun, ok := c.open[e.Op]
			if !ok {
				return fmt.Errorf("operation %d returned without having been invoked", e.Op)
			}
			delete(c.open, e.Op)
			return c.returned(begun, e, at)
		}
		return fmt.Errorf("operation %d: phase %q", e.Op, e.Phase)
	})
	if err != nil {
		return Report{}, fmt.Errorf("checking a history: %w", err)
	}
	c.report.Checked["unknown"] += len(c.open) // never returned: open for good
	for issuer, list := range c.crls {
		if err := c.contents(issuer, list); err != nil {
			return Report{}, fmt.Errorf("checking the CRLs of %s: %w", issuer, err)
		}
	}
	// In the order in which the cluster, which may go on, writes backwards: a signature that is counted is in a journal by then, one that a journal
	// calls for has its intent in the record.
	for _, step := range []func(context.Context) error{c.agents, c.journals, c.record} {
		if err := step(ctx); err != nil {
			return Report{}, fmt.Errorf("checking a history: %w", err)
		}
	}
	c.counts()
	if err := c.describe(); err != nil {
		return Report{}, err
	}
	slices.SortStableFunc(c.report.Violations, func(a, b Violation) int { return strings.Compare(a.Rule+a.Object, b.Rule+b.Object) })
	return c.report, nil
}

func (c *check) violate(rule, object string, ops []uint64, format string, args ...any) {
	if c.byRule[rule]++; c.byRule[rule] > maxViolations {
		c.report.More++
		return
	}
	c.report.Violations = append(c.report.Violations, Violation{Rule: rule, Object: object, Detail: fmt.Sprintf(format, args...), ops: ops})
}

func (c *check) request(e Event) *request {
	from, key := c.reqs, e.Client+"\x00"+e.Key
	if e.Key == "" {
		from, key = c.names, e.Name
	}
	if from[key] == nil {
		from[key] = &request{}
	}
	return from[key]
}

func (c *check) invoked(e Event) {
	switch e.Kind {
	case Issue, Batch:
		if r := c.request(e); r.invoked == 0 {
			r.invoked = e.Op
		}
	case Free:
		// From here on good may be true again.
		if k := c.certs[e.Object]; k != nil {
			k.effective, k.recorded = -1, 0
		}
	}
}

func (c *check) returned(b, e Event, at int64) error {
	c.report.Checked[string(b.Kind)]++
	c.report.Checked[string(e.Outcome)]++
	object := e.Object
	if object == "" {
		object = b.Object
	}
	var d digest
	if e.Digest != "" {
		var err error
		if d, err = parseDigest(e.Digest); err != nil {
			return fmt.Errorf("operation %d: %w", e.Op, err)
		}
		c.verify(b, e, object, d, at)
	}
	switch b.Kind {
	case Issue, Batch:
		c.issued(b, e, object, d)
	case Get:
		if e.Outcome == OK {
			c.shown(e.Op, object, d, nil)
		}
	case Revoke:
		if e.Outcome == OK {
			c.revoked(e, object)
		}
	case Status:
		if e.Outcome == OK && e.Answer == "good" {
			c.toldGood(b, e, object)
		}
	case CRL:
		if e.Outcome == OK {
			c.crl(b, e, object, d)
		}
	}
	return nil
}

// issued takes in an answer to a request for a certificate. An unknown outcome says nothing and contradicts nothing.
func (c *check) issued(b, e Event, object string, d digest) {
	r := c.request(b)
	switch e.Outcome {
	case OK:
		if r.op != 0 && r.object != object {
			c.violate(OneReq, object, []uint64{r.op, e.Op}, "one request was answered with %s and with %s", r.object, object)
		}
		if r.refused != 0 {
			c.violate(Refused, object, []uint64{r.refused, e.Op}, "a request that had been refused for good was answered with a certificate")
		}
		if r.op == 0 {
			r.op, r.object = e.Op, object
		}
		c.shown(e.Op, object, d, r)
	case Failed:
		if e.Status == 422 && strings.Contains(e.Problem, "idempotency") {
			return // it speaks of this request's body, not of what became of the key
		}
		if r.op != 0 {
			c.violate(Refused, r.object, []uint64{r.op, e.Op}, "a request that had been answered with a certificate was refused for good")
		}
		if r.refused == 0 {
			r.refused, r.status = e.Op, e.Status
		}
	}
}

// shown takes in a certificate that a client was given, on whatever path.
func (c *check) shown(op uint64, object string, d digest, r *request) {
	k := c.certs[object]
	if k == nil {
		c.certs[object] = &cert{digest: d, op: op, req: r, effective: -1}
		return
	}
	if k.req != nil && r != nil && k.req != r {
		c.violate(OneSerial, object, []uint64{k.op, op}, "one serial was given to two requests")
		return
	}
	if k.digest != d {
		c.violate(SameBytes, object, []uint64{k.op, op}, "the bytes shown are %s and %s", k.digest, d)
	}
	if k.req == nil {
		k.req = r
	}
}

func (c *check) revoked(e Event, object string) {
	k := c.certs[object]
	if k == nil {
		return // issued before this history began
	}
	if k.recorded == 0 {
		k.recorded = e.Op
	}
	if e.Answer == Effective && k.effective < 0 {
		k.effective, k.by = e.Mono, e.Op
	}
}

func (c *check) toldGood(b, e Event, object string) {
	if _, ok := c.good[object]; !ok {
		c.good[object] = e.Op
	}
	if k := c.certs[object]; k != nil && k.effective >= 0 && b.Mono > k.effective {
		c.violate(TrueGood, object, []uint64{k.by, e.Op}, "good to a request begun %s after its revocation was effective",
			time.Duration(b.Mono-k.effective).Round(time.Microsecond))
	}
}

// describe writes out the operations that violations name.
func (c *check) describe() error {
	events := map[uint64][2]Event{}
	for _, v := range c.report.Violations {
		for _, op := range v.ops {
			events[op] = [2]Event{}
		}
	}
	if len(events) == 0 {
		return nil
	}
	err := scan(c.Path, func(e Event, _ int64) error {
		pair, ok := events[e.Op]
		if !ok {
			return nil
		}
		if e.Phase == Invoke {
			pair[0] = e
		} else {
			pair[1] = e
		}
		events[e.Op] = pair
		return nil
	})
	for i := range c.report.Violations {
		v := &c.report.Violations[i]
		for _, op := range v.ops {
			v.Operations = append(v.Operations, line(events[op][0], events[op][1]))
		}
	}
	return err
}

// line is an operation as a report shows it.
func line(b, e Event) string {
	s := fmt.Sprintf("operation %d: %s of %s", b.Op, b.Kind, strings.Join(slices.DeleteFunc([]string{b.Key, b.Name, b.Object}, func(s string) bool { return s == "" }), " "))
	s += fmt.Sprintf(" at %s, begun %s", b.Node, at(b))
	if e.Phase == "" {
		return s + ", never returned"
	}
	return s + fmt.Sprintf(", returned %s: %s", at(e), strings.TrimSpace(fmt.Sprintf("%s %d %s %s %s", e.Outcome, e.Status, e.Answer, e.Problem, e.Object)))
}

func at(e Event) string {
	return fmt.Sprintf("%s (+%s)", e.Wall.Format("15:04:05.000000"), time.Duration(e.Mono).Round(time.Microsecond))
}
