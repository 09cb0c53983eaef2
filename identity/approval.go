package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"
	"unicode/utf8"
)

const (
	// MaxRequestAge is how long a request may wait for its approvals: from Created to Expires.
	MaxRequestAge = 24 * time.Hour
	// MaxApprovals is the most people one request takes, MaxGrant the greatest length of an encoded Grant in octets.
	MaxApprovals = 8
	MaxGrant     = 16 << 10

	clockLeeway = time.Minute // how far the clocks of two machines may differ
)

// Request is one act, described completely, that happens only when several people have signed exactly this. Whoever acts
// on it compares every field that matters to the act, Detail included, with what it is about to do. It can be presented
// again until it expires, so the act must be one that a repeat does not change.
type Request struct {
	Cluster string `json:"cluster"`
	// Action names the act, such as hsm-enroll or key-destroy; Object what it is done to, such as group/member.
	Action string `json:"action"`
	Object string `json:"object"`
	// Detail is everything else that the act depends on, such as a key's fingerprint.
	Detail map[string]string `json:"detail,omitempty"`
	// Proposer is the principal URI of who asks; it approves nothing. By itself it is a claim: Grant.Proposal proves it.
	Proposer string `json:"proposer"`
	// Nonce makes two requests for the same thing two requests: 1 to 64 octets.
	Nonce   string    `json:"nonce"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

// Approval is one person's signature over a request and At, with the certificate that says who it is.
type Approval struct {
	Chain     [][]byte  `json:"chain"` // leaf first, DER
	Signature []byte    `json:"signature"`
	At        time.Time `json:"at"` // by the person's own clock
}

// Grant is a request with its approvals, as it travels to whoever acts on it.
type Grant struct {
	Request Request `json:"request"`
	// Proposal is the proposer's own signature, so that nobody who approves can have proposed it under another name.
	Proposal  *Approval  `json:"proposal,omitempty"`
	Approvals []Approval `json:"approvals"`
}

// ParseGrant reads a grant strictly: what it does not know, or what follows, is an error. It verifies nothing.
func ParseGrant(text []byte) (Grant, error) {
	if len(text) > MaxGrant {
		return Grant{}, fmt.Errorf("reading a grant: %d octets: must be at most %d", len(text), MaxGrant)
	}
	// A field that is no UTF-8 would be another one once decoded, and so not the one that people read.
	if !utf8.Valid(text) {
		return Grant{}, errors.New("reading a grant: it is no UTF-8 text")
	}
	var g Grant
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&g); err != nil {
		return Grant{}, fmt.Errorf("reading a grant: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Grant{}, errors.New("reading a grant: something follows it")
	}
	if n := len(g.Approvals); n > MaxApprovals {
		return Grant{}, fmt.Errorf("reading a grant: %d approvals: must be at most %d", n, MaxApprovals)
	}
	return g, nil
}

// Merge adds the approvals of a copy of the same grant, one of each person, and verifies none.
func (g *Grant) Merge(other Grant) error {
	if !bytes.Equal(g.Request.Digest(), other.Request.Digest()) {
		return fmt.Errorf("merging approvals: one is for %s of %s, another for %s of %s, or for another request of that kind",
			g.Request.Action, g.Request.Object, other.Request.Action, other.Request.Object)
	}
	if g.Proposal == nil {
		g.Proposal = other.Proposal
	}
	for _, a := range other.Approvals {
		if !slices.ContainsFunc(g.Approvals, func(b Approval) bool { return claims(a) == claims(b) }) {
			g.Approvals = append(g.Approvals, a)
		}
	}
	return nil
}

// claims is whose approval it says to be; without a readable certificate, its own signature.
func claims(a Approval) string {
	if len(a.Chain) > 0 {
		if c, err := x509.ParseCertificate(a.Chain[0]); err == nil {
			if p, err := FromCertificate(c); err == nil {
				return p.String()
			}
		}
	}
	return string(a.Signature)
}

// NewRequest makes a request that may be approved and used for lifetime, at most MaxRequestAge.
func NewRequest(by Principal, action, object string, detail map[string]string, now time.Time, lifetime time.Duration) Request {
	now = now.UTC().Truncate(time.Second)
	return Request{
		Cluster: by.Cluster, Action: action, Object: object, Detail: maps.Clone(detail), Proposer: by.String(),
		Nonce: rand.Text(), Created: now, Expires: now.Add(min(lifetime, MaxRequestAge)),
	}
}

// Digest is SHA-256 over every field, each preceded by its length, so that no two requests share one.
func (r Request) Digest() []byte {
	out := []byte("trivet-approval-v1")
	add := func(field string) {
		out = binary.BigEndian.AppendUint32(out, uint32(len(field)))
		out = append(out, field...)
	}
	for _, f := range []string{r.Cluster, r.Action, r.Object, r.Proposer, r.Nonce, stamp(r.Created), stamp(r.Expires)} {
		add(f)
	}
	for _, k := range slices.Sorted(maps.Keys(r.Detail)) {
		add(k)
		add(r.Detail[k])
	}
	sum := sha256.Sum256(out)
	return sum[:]
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// What a signature over a request says.
const (
	saysApproved = "trivet-approved-v1"
	saysProposed = "trivet-proposed-v1"
)

// statement is what is signed: the request, what is said of it, and when.
func (r Request) statement(says string, at time.Time) []byte {
	sum := sha256.Sum256(append(append([]byte(says), r.Digest()...), stamp(at)...))
	return sum[:]
}

// Propose makes a request that a person signs as its proposer.
func (i *Identity) Propose(action, object string, detail map[string]string, now time.Time, lifetime time.Duration) (Grant, error) {
	p := i.Principal()
	if p.Role.Machine() {
		return Grant{}, fmt.Errorf("proposing %s of %s: %s is no person", action, object, p)
	}
	g := Grant{Request: NewRequest(p, action, object, detail, now, lifetime), Approvals: []Approval{}}
	a, err := i.say(saysProposed, g.Request, now)
	if err != nil {
		return Grant{}, fmt.Errorf("proposing %s of %s: %w", action, object, err)
	}
	g.Proposal = &a
	return g, nil
}

// say signs a statement about a request.
func (i *Identity) say(says string, r Request, now time.Time) (Approval, error) {
	cert := i.Certificate()
	signer, ok := cert.PrivateKey.(crypto.Signer)
	if !ok || cert.Leaf.PublicKeyAlgorithm != x509.ECDSA {
		return Approval{}, errors.New("the identity's key is not an ECDSA key")
	}
	at := now.UTC().Truncate(time.Second)
	sig, err := signer.Sign(rand.Reader, r.statement(says, at), crypto.SHA256)
	if err != nil {
		return Approval{}, err
	}
	return Approval{Chain: cert.Certificate, Signature: sig, At: at}, nil
}

// Proposed checks that the person whom a grant's request names as its proposer has signed it.
func (i *Identity) Proposed(g Grant, now time.Time) error {
	r := g.Request
	proposer, err := r.open(i.Principal().Cluster, now)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("%.64q of %.128q", r.Action, r.Object)
	if g.Proposal == nil {
		return fmt.Errorf("%s was not signed by its proposer, %s: whoever proposes it must say so with a key of their own", what, proposer)
	}
	by, err := i.signer(saysProposed, r, *g.Proposal, now)
	switch {
	case err != nil:
		return fmt.Errorf("proposal of %s: %w", what, err)
	case by != proposer || by.Role.Machine():
		return fmt.Errorf("proposal of %s: it names %s and is signed by %s: must be one person", what, proposer, by)
	}
	return nil
}

// Granted is Approved for a grant that was Proposed.
func (i *Identity) Granted(g Grant, need int, now time.Time, roles ...Role) ([]Principal, error) {
	if err := i.Proposed(g, now); err != nil {
		return nil, err
	}
	return i.Approved(g.Request, g.Approvals, need, now, roles...)
}

// Approve signs a request with a person's own identity. Machines approve nothing.
func (i *Identity) Approve(r Request, now time.Time) (Approval, error) {
	p := i.Principal()
	proposer, err := r.open(p.Cluster, now)
	if err != nil {
		return Approval{}, err
	}
	if p.Role.Machine() {
		return Approval{}, fmt.Errorf("approving %s of %s: %s is no person", r.Action, r.Object, p)
	}
	if samePerson(p, proposer) {
		return Approval{}, fmt.Errorf("approving %s of %s: %s proposed it, so somebody else must approve it", r.Action, r.Object, proposer)
	}
	a, err := i.say(saysApproved, r, now)
	if err != nil {
		return Approval{}, fmt.Errorf("approving %s of %s: %w", r.Action, r.Object, err)
	}
	return a, nil
}

// samePerson tells whether two principals are one person: a name means the same person in every role, so that nobody
// counts twice by having two roles. A machine is no person.
func samePerson(a, b Principal) bool {
	return a.Cluster == b.Cluster && a.Name == b.Name && !a.Role.Machine() && !b.Role.Machine()
}

// open refuses a request that is not this cluster's, or not in force at now. It returns the proposer.
func (r Request) open(cluster string, now time.Time) (Principal, error) {
	what := fmt.Sprintf("request for %.64q of %.128q", r.Action, r.Object)
	if r.Action == "" || r.Object == "" || r.Nonce == "" || len(r.Nonce) > 64 {
		return Principal{}, fmt.Errorf("%s is incomplete: action, object and a nonce of 1 to 64 octets are all needed", what)
	}
	proposer, err := ParsePrincipal(r.Proposer)
	switch {
	case err != nil: // another spelling would not be recognised as the approver's
		return Principal{}, fmt.Errorf("%s: proposer: %w", what, err)
	case r.Cluster != cluster || proposer.Cluster != cluster:
		return Principal{}, fmt.Errorf("%s is for cluster %.64q, proposed by %s: this is %q", what, r.Cluster, proposer, cluster)
	case r.Expires.Sub(r.Created) > MaxRequestAge || !r.Expires.After(r.Created):
		return Principal{}, fmt.Errorf("%s is in force from %s to %s: must be more than nothing and at most %s", what, stamp(r.Created), stamp(r.Expires), MaxRequestAge)
	case now.After(r.Expires):
		return Principal{}, fmt.Errorf("%s expired at %s: propose it again", what, stamp(r.Expires))
	case now.Add(clockLeeway).Before(r.Created):
		return Principal{}, fmt.Errorf("%s was made at %s, which is in the future: compare the clocks", what, stamp(r.Created))
	}
	return proposer, nil
}

// Approved tells who approved a request, if they are enough: need different people of the given roles, none of them the
// proposer, each with a certificate of this cluster that is valid now and a good signature. An approval that does not count
// is an error, so that nobody believes to have been counted. It verifies against i's trust.
func (i *Identity) Approved(r Request, approvals []Approval, need int, now time.Time, roles ...Role) ([]Principal, error) {
	proposer, err := r.open(i.Principal().Cluster, now)
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("%.64q of %.128q", r.Action, r.Object)
	if need < 1 { // a number that somebody forgot to set must not approve everything
		return nil, fmt.Errorf("%s: the approval of %d people was asked for: must be 1 or more", what, need)
	}
	if n := len(approvals); n > MaxApprovals {
		return nil, fmt.Errorf("%s has %d approvals: must be at most %d", what, n, MaxApprovals)
	}
	var by []Principal
	for n, a := range approvals {
		p, err := i.signer(saysApproved, r, a, now)
		if err != nil {
			return nil, fmt.Errorf("approval %d of %s: %w", n+1, what, err)
		}
		switch {
		case p.Role.Machine() || !slices.Contains(roles, p.Role):
			return nil, fmt.Errorf("approval %d of %s, by %s: role %s may not approve it", n+1, what, p, p.Role)
		case samePerson(p, proposer):
			return nil, fmt.Errorf("approval %d of %s, by %s: the proposer, %s, approves nothing", n+1, what, p, proposer)
		case slices.ContainsFunc(by, func(q Principal) bool { return samePerson(p, q) }):
			return nil, fmt.Errorf("approval %d of %s, by %s: this person has approved it already", n+1, what, p)
		}
		by = append(by, p)
	}
	if len(by) < need {
		return by, fmt.Errorf("%s needs the approval of %d people, %d gave it", what, need, len(by))
	}
	return by, nil
}

// signer is who said that of a request.
func (i *Identity) signer(says string, r Request, a Approval, now time.Time) (Principal, error) {
	if len(a.Chain) == 0 || len(a.Chain) > 4 {
		return Principal{}, fmt.Errorf("it has %d certificates: must be 1 to 4", len(a.Chain))
	}
	chain, err := parseChain(a.Chain)
	if err != nil {
		return Principal{}, fmt.Errorf("parsing its certificate: %w", err)
	}
	p, err := i.Verify(chain, now)
	if err != nil {
		return Principal{}, err
	}
	if key, ok := chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !ecdsa.VerifyASN1(key, r.statement(says, a.At), a.Signature) {
		return Principal{}, fmt.Errorf("by %s: the signature is not over this request", p)
	}
	if a.At.Before(r.Created.Add(-clockLeeway)) || a.At.After(r.Expires) || a.At.After(now.Add(clockLeeway)) {
		return Principal{}, fmt.Errorf("by %s: it was given at %s, when the request was not in force: compare the clocks", p, stamp(a.At))
	}
	return p, nil
}
