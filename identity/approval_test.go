package identity_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trivet/identity"
)

// people is a cluster with a verifier and some people.
type people struct {
	t         *testing.T
	authority *identity.Authority
	verifier  *identity.Identity
	now       time.Time
}

func newPeople(t *testing.T) *people {
	a := authority(t, "test")
	return &people{t, a, load(t, issue(t, a, principal("hsmd", "hsmd-a"))), time.Now()}
}

func (p *people) person(role identity.Role, name string) *identity.Identity {
	p.t.Helper()
	return load(p.t, issue(p.t, p.authority, principal(role, name)))
}

func (p *people) request() identity.Request {
	return identity.NewRequest(principal("sre", "sam"), "hsm-enroll", "main/hsmd-d", map[string]string{"transport": "aa", "serial": "7"}, p.now, hour)
}

func (p *people) approve(r identity.Request, by ...*identity.Identity) (out []identity.Approval) {
	p.t.Helper()
	for _, i := range by {
		a, err := i.Approve(r, p.now)
		if err != nil {
			p.t.Fatal(err)
		}
		out = append(out, a)
	}
	return out
}

// approved asks as hsmd does.
func (p *people) approved(r identity.Request, a []identity.Approval) ([]identity.Principal, error) {
	return p.verifier.Approved(r, a, 2, p.now, identity.RoleAdmin, identity.RoleCAOperator)
}

func (p *people) refuses(name, want string, r identity.Request, a []identity.Approval) {
	p.t.Helper()
	if by, err := p.approved(r, a); err == nil || !strings.Contains(err.Error(), want) {
		p.t.Errorf("%s: approved by %v, error %v; want one with %q", name, by, err, want)
	}
}

func TestTwoPeopleApprove(t *testing.T) {
	p := newPeople(t)
	r := p.request()
	alice, bob, carol := p.person("admin", "alice"), p.person("ca-operator", "bob"), p.person("admin", "carol")
	by, err := p.approved(r, p.approve(r, alice, bob))
	if err != nil || fmt.Sprint(by) != "[trivet://test/admin/alice trivet://test/ca-operator/bob]" {
		t.Error(by, err)
	}
	if by, err := p.approved(r, p.approve(r, alice, bob, carol)); err != nil || len(by) != 3 {
		t.Error("three:", by, err)
	}
	p.refuses("nobody", "needs the approval of 2 people, 0 gave it", r, nil)
	p.refuses("one", "needs the approval of 2 people, 1 gave it", r, p.approve(r, alice))
	// What travels as JSON, also in another time zone, is the same request.
	r.Created, r.Expires = r.Created.In(time.FixedZone("", 7200)), r.Expires.In(time.FixedZone("", -3600))
	text, err := json.Marshal(identity.Grant{Request: r, Approvals: p.approve(r, alice, bob)})
	if err != nil {
		t.Fatal(err)
	}
	g, err := identity.ParseGrant(text)
	if err != nil {
		t.Fatal(err)
	}
	if by, err := p.approved(g.Request, g.Approvals); err != nil || len(by) != 2 {
		t.Error("after JSON:", by, err)
	}
}

// Whoever may use a machine's identity must not propose under its name what he then approves.
func TestTheProposerIsAPersonWhoSaysSo(t *testing.T) {
	p := newPeople(t)
	alice, bob, sam := p.person("admin", "alice"), p.person("ca-operator", "bob"), p.person("sre", "sam")
	propose := func(by *identity.Identity) identity.Grant {
		t.Helper()
		g, err := by.Propose("hsm-enroll", "main/hsmd-d", map[string]string{"transport": "aa"}, p.now, hour)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	granted := func(g identity.Grant) ([]identity.Principal, error) {
		return p.verifier.Granted(g, 2, p.now, identity.RoleAdmin, identity.RoleCAOperator)
	}
	g := propose(sam)
	g.Approvals = p.approve(g.Request, alice, bob)
	text, err := json.Marshal(g)
	if err != nil {
		t.Fatal(err)
	}
	again, err := identity.ParseGrant(text)
	if err != nil {
		t.Fatal(err)
	}
	if by, err := granted(again); err != nil || len(by) != 2 {
		t.Fatal(by, err)
	}
	if _, err := p.person("sync", "sync1").Propose("a", "b", nil, p.now, hour); err == nil || !strings.Contains(err.Error(), "no person") {
		t.Errorf("a machine proposes: %v", err)
	}
	unsigned, machine, borrowed, approval, own := g, g, g, g, g
	unsigned.Proposal = nil
	machine.Request = identity.NewRequest(principal("sync", "sync1"), "hsm-enroll", "main/hsmd-d", nil, p.now, hour)
	machine.Approvals = p.approve(machine.Request, alice, bob)
	borrowed.Request = p.request() // sam's, too, but another one
	borrowed.Approvals = p.approve(borrowed.Request, alice, bob)
	approval.Proposal = &approval.Approvals[0] // an approval is no proposal
	mine := propose(alice)
	own.Request.Nonce = "x"
	own.Proposal, own.Approvals = mine.Proposal, p.approve(own.Request, alice, bob)
	for name, bad := range map[string]struct {
		g    identity.Grant
		want string
	}{
		"unsigned":            {unsigned, "was not signed by its proposer"},
		"a machine's":         {machine, "the signature is not over this request"},
		"another request's":   {borrowed, "the signature is not over this request"},
		"an approval":         {approval, "the signature is not over this request"},
		"under another name":  {own, "the signature is not over this request"},
		"the proposer's vote": {func() identity.Grant { mine.Approvals = g.Approvals; return mine }(), "the signature is not over this request"},
	} {
		if by, err := granted(bad.g); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%s: approved by %v, %v", name, by, err)
		}
	}
	if _, err := alice.Approve(mine.Request, p.now); err == nil || !strings.Contains(err.Error(), "somebody else must approve it") {
		t.Errorf("the proposer approves: %v", err)
	}
}

func TestAPersonCountsOnce(t *testing.T) {
	p := newPeople(t)
	r := p.request()
	alice := p.person("admin", "alice")
	for name, again := range map[string]*identity.Identity{
		"the same approval": alice, "a renewed certificate with another key": p.person("admin", "alice"), "another role": p.person("ca-operator", "alice"),
	} {
		p.refuses(name, "has approved it already", r, p.approve(r, alice, again))
		p.refuses(name+", beside another person", "has approved it already", r, p.approve(r, alice, p.person("admin", "bob"), again))
	}
}

func TestWhoMayNotApprove(t *testing.T) {
	p := newPeople(t)
	r := p.request()
	alice := p.person("admin", "alice")
	for name, c := range map[string]struct {
		who       *identity.Identity
		want, got string // of approving, of counting
	}{
		"the proposer":                   {p.person("sre", "sam"), "proposed it", ""},
		"the proposer in another role":   {p.person("admin", "sam"), "proposed it", "the proposer"},
		"a machine":                      {p.person("hsmd", "hsmd-b"), "is no person", ""},
		"the machine that carries keys":  {p.person("sync", "sync1"), "is no person", ""},
		"a person of a role not asked":   {p.person("auditor", "ann"), "", "role auditor may not approve it"},
		"somebody of a namesake cluster": {load(t, issue(t, authority(t, "test"), principal("admin", "mallory"))), "", "certificate signed by unknown authority"},
		"somebody of another cluster":    {load(t, issue(t, authority(t, "other"), identity.Principal{Cluster: "other", Role: "admin", Name: "x"})), `is for cluster "test"`, ""},
	} {
		a, err := c.who.Approve(r, p.now)
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s approved: %v, want %q", name, err, c.want)
			}
			a = forge(t, c.who, r, p.now) // one who writes a program of his own
		} else if err != nil {
			t.Fatal(name, err)
		}
		if c.got == "" {
			c.got = "approv" // any refusal
		}
		p.refuses(name, c.got, r, append(p.approve(r, alice), a))
		p.refuses(name+", first", c.got, r, append([]identity.Approval{a}, p.approve(r, alice)...))
	}
}

// forge signs as Approve does, and asks nothing.
func forge(t *testing.T, who *identity.Identity, r identity.Request, at time.Time) identity.Approval {
	t.Helper()
	at = at.UTC()
	digest := sha256.Sum256(append(append([]byte("trivet-approved-v1"), r.Digest()...), at.Format(time.RFC3339Nano)...))
	sig, err := ecdsa.SignASN1(rand.Reader, who.Certificate().PrivateKey.(*ecdsa.PrivateKey), digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return identity.Approval{Chain: who.Certificate().Certificate, Signature: sig, At: at}
}

func TestNothingOfARequestCanBeChangedAfterwards(t *testing.T) {
	p := newPeople(t)
	r := p.request()
	a := p.approve(r, p.person("admin", "alice"), p.person("ca-operator", "bob"))
	if _, err := p.approved(r, a); err != nil {
		t.Fatal(err)
	}
	detail := func(f func(map[string]string)) func(*identity.Request) {
		return func(r *identity.Request) { r.Detail = maps.Clone(r.Detail); f(r.Detail) }
	}
	for name, change := range map[string]func(*identity.Request){
		"action":                       func(r *identity.Request) { r.Action = "key-destroy" },
		"object":                       func(r *identity.Request) { r.Object = "main/hsmd-e" },
		"proposer":                     func(r *identity.Request) { r.Proposer = "trivet://test/sre/sue" },
		"nonce":                        func(r *identity.Request) { r.Nonce += "x" },
		"created":                      func(r *identity.Request) { r.Created = r.Created.Add(time.Second) },
		"created by a nanosecond":      func(r *identity.Request) { r.Created = r.Created.Add(1) },
		"expires":                      func(r *identity.Request) { r.Expires = r.Expires.Add(time.Second) },
		"a detail's value":             detail(func(d map[string]string) { d["transport"] = "ab" }),
		"a detail's name":              detail(func(d map[string]string) { d["Transport"] = d["transport"]; delete(d, "transport") }),
		"one detail more":              detail(func(d map[string]string) { d["standby"] = "" }),
		"one detail less":              detail(func(d map[string]string) { delete(d, "serial") }),
		"two details' values":          detail(func(d map[string]string) { d["transport"], d["serial"] = d["serial"], d["transport"] }),
		"no detail":                    func(r *identity.Request) { r.Detail = nil },
		"octets moved between fields":  func(r *identity.Request) { r.Action, r.Object = r.Action+r.Object[:1], r.Object[1:] },
		"octets moved inside a detail": detail(func(d map[string]string) { delete(d, "serial"); d["serial7"] = "" }),
	} {
		changed := r
		change(&changed)
		p.refuses(name, "the signature is not over this request", changed, a)
	}
	for name, change := range map[string]func(*identity.Approval){
		"when":           func(a *identity.Approval) { a.At = a.At.Add(-time.Second) },
		"signature":      func(a *identity.Approval) { a.Signature[len(a.Signature)-1] ^= 1 },
		"no signature":   func(a *identity.Approval) { a.Signature = nil },
		"another's":      func(b *identity.Approval) { b.Signature = a[1].Signature },
		"whose":          func(b *identity.Approval) { b.Chain = a[1].Chain },
		"no certificate": func(a *identity.Approval) { a.Chain = nil },
		"many": func(a *identity.Approval) {
			a.Chain = [][]byte{a.Chain[0], a.Chain[0], a.Chain[0], a.Chain[0], a.Chain[0]}
		},
		"junk certificate": func(a *identity.Approval) { a.Chain = [][]byte{{0x30, 0}} },
	} {
		changed := identity.Approval{Chain: a[0].Chain, Signature: bytes.Clone(a[0].Signature), At: a[0].At}
		change(&changed)
		p.refuses(name, "approval 1 of", r, []identity.Approval{changed, a[1]})
	}
}

func TestARequestOutOfForceIsNeitherApprovedNorCounted(t *testing.T) {
	p := newPeople(t)
	alice, bob := p.person("admin", "alice"), p.person("admin", "bob")
	for name, c := range map[string]struct {
		change func(*identity.Request)
		want   string
	}{
		"expired":             {func(r *identity.Request) { r.Created, r.Expires = p.now.Add(-hour), p.now.Add(-time.Second) }, "expired"},
		"not yet":             {func(r *identity.Request) { r.Created, r.Expires = p.now.Add(2*time.Minute), p.now.Add(hour) }, "in the future"},
		"for too long":        {func(r *identity.Request) { r.Expires = r.Created.Add(identity.MaxRequestAge + 1) }, "at most 24h"},
		"for ever":            {func(r *identity.Request) { r.Expires = r.Created.AddDate(2000, 0, 0) }, "at most 24h"},
		"for nothing":         {func(r *identity.Request) { r.Expires = r.Created }, "more than nothing"},
		"without times":       {func(r *identity.Request) { r.Created, r.Expires = time.Time{}, time.Time{} }, "more than nothing"},
		"another cluster's":   {func(r *identity.Request) { r.Cluster = "other" }, "cluster"},
		"no cluster's":        {func(r *identity.Request) { r.Cluster = "" }, "cluster"},
		"no action":           {func(r *identity.Request) { r.Action = "" }, "incomplete"},
		"no object":           {func(r *identity.Request) { r.Object = "" }, "incomplete"},
		"no nonce":            {func(r *identity.Request) { r.Nonce = "" }, "incomplete"},
		"a long nonce":        {func(r *identity.Request) { r.Nonce = strings.Repeat("x", 65) }, "incomplete"},
		"no proposer":         {func(r *identity.Request) { r.Proposer = "" }, "proposer"},
		"a misspelt proposer": {func(r *identity.Request) { r.Proposer = "trivet://test/admin/alice " }, "proposer"},
		"a foreign proposer":  {func(r *identity.Request) { r.Proposer = "trivet://other/admin/alice" }, "cluster"},
	} {
		r := p.request()
		c.change(&r)
		if _, err := alice.Approve(r, p.now); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: approving gave %v, want %q", name, err, c.want)
		}
		p.refuses(name, c.want, r, []identity.Approval{forge(t, alice, r, p.now), forge(t, bob, r, p.now)})
	}
	r := p.request()
	for name, at := range map[string]time.Time{"before it was made": r.Created.Add(-2 * time.Minute), "after its end": r.Expires.Add(time.Second), "in the future": p.now.Add(2 * time.Minute)} {
		p.refuses("approved "+name, "when the request was not in force", r, []identity.Approval{forge(t, alice, r, at), forge(t, bob, r, p.now)})
	}
	// An approval outlives neither the request nor the clock: tomorrow it counts for nothing.
	a := p.approve(r, alice, bob)
	if _, err := p.verifier.Approved(r, a, 2, p.now.Add(2*hour), identity.RoleAdmin); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Error(err)
	}
}

func TestAnApprovalEndsWithItsCertificate(t *testing.T) {
	p := newPeople(t)
	f, err := p.authority.IssueTo(filepath.Join(t.TempDir(), "id"), principal("admin", "eve"), nil, nil, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	r := p.request()
	a := p.approve(r, load(t, f))
	for after, want := range map[time.Duration]bool{0: true, 2 * time.Minute: false} {
		if by, err := p.verifier.Approved(r, a, 1, p.now.Add(after), identity.RoleAdmin); (err == nil) != want {
			t.Errorf("after %s: approved by %v, %v", after, by, err)
		}
	}
}

func TestAnApprovalMustBeAskedFor(t *testing.T) {
	p := newPeople(t)
	r := p.request()
	a := p.approve(r, p.person("admin", "alice"), p.person("admin", "bob"))
	for _, need := range []int{0, -1} {
		if _, err := p.verifier.Approved(r, a, need, p.now, identity.RoleAdmin); err == nil {
			t.Errorf("approved by %d people", need)
		}
	}
	if _, err := p.verifier.Approved(r, a, 2, p.now); err == nil {
		t.Error("approved by nobody's role")
	}
	if _, err := p.verifier.Approved(r, a, 2, time.Time{}, identity.RoleAdmin); err == nil {
		t.Error("approved at no time")
	}
	var many []identity.Approval
	for n := range identity.MaxApprovals + 1 {
		many = append(many, p.approve(r, p.person("admin", fmt.Sprintf("p%d", n)))...)
	}
	p.refuses("a crowd", "at most 8", r, many)
}

func TestRequestsForTheSameThingAreTwo(t *testing.T) {
	p := newPeople(t)
	r, s := p.request(), p.request()
	if bytes.Equal(r.Digest(), s.Digest()) {
		t.Error("an approval of one is one of the other")
	}
	if got := identity.NewRequest(principal("sre", "sam"), "a", "b", nil, p.now, 100*hour); got.Expires.Sub(got.Created) != identity.MaxRequestAge {
		t.Error(got)
	}
}

func TestMergeGathersCopies(t *testing.T) {
	p := newPeople(t)
	r := p.request()
	alice, bob := p.person("admin", "alice"), p.person("admin", "bob")
	g := identity.Grant{Request: r, Approvals: p.approve(r, alice)}
	if err := g.Merge(identity.Grant{Request: r, Approvals: p.approve(r, alice, bob)}); err != nil || len(g.Approvals) != 2 {
		t.Fatal(len(g.Approvals), err)
	}
	if _, err := p.approved(g.Request, g.Approvals); err != nil {
		t.Error(err)
	}
	if err := g.Merge(identity.Grant{Request: p.request()}); err == nil {
		t.Error("approvals of another request were merged")
	}
	if err := g.Merge(identity.Grant{Request: r, Approvals: []identity.Approval{{}, {Signature: []byte("x")}}}); err != nil || len(g.Approvals) != 4 {
		t.Error("what nobody signed must be seen:", len(g.Approvals), err)
	}
}

func TestGrantIsReadStrictly(t *testing.T) {
	good := `{"request":{"cluster":"c","action":"a","object":"o","proposer":"p","nonce":"n","created":"2026-01-01T00:00:00Z","expires":"2026-01-01T01:00:00Z"},"approvals":[]}`
	if _, err := identity.ParseGrant([]byte(good + "\n")); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"empty": "", "cut": good[:len(good)-1], "more": good + "{}", "an unknown field": strings.Replace(good, `"nonce"`, `"once"`, 1),
		"no UTF-8": strings.Replace(good, `"o"`, "\"\xff\"", 1), "long": good + strings.Repeat(" ", identity.MaxGrant),
		"a crowd": strings.Replace(good, "[]", "["+strings.Repeat("{},", identity.MaxApprovals)+"{}]", 1), "a number": strings.Replace(good, `"o"`, "1", 1),
	} {
		if g, err := identity.ParseGrant([]byte(bad)); err == nil {
			t.Errorf("%s: read as %+v", name, g)
		}
	}
}

// No two different requests have one digest, however their fields are cut.
func TestDigestTellsRequestsApart(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		field := rapid.StringMatching(`[ab\x00\x01]{0,3}`)
		draw := func(name string) identity.Request {
			at := time.Unix(rapid.Int64Range(0, 3).Draw(t, name+" created"), 0)
			return identity.Request{
				Cluster: field.Draw(t, name+" cluster"), Action: field.Draw(t, name+" action"), Object: field.Draw(t, name+" object"),
				Detail:   rapid.MapOfN(field, field, 0, 2).Draw(t, name+" detail"),
				Proposer: field.Draw(t, name+" proposer"), Nonce: field.Draw(t, name+" nonce"), Created: at, Expires: at,
			}
		}
		a, b := draw("a"), draw("b")
		same := fmt.Sprintf("%q", fmt.Sprint(a)) == fmt.Sprintf("%q", fmt.Sprint(b)) && a.Cluster == b.Cluster && a.Action == b.Action && a.Object == b.Object &&
			maps.Equal(a.Detail, b.Detail) && a.Proposer == b.Proposer && a.Nonce == b.Nonce
		if bytes.Equal(a.Digest(), b.Digest()) != same {
			t.Fatalf("%+v and %+v", a, b)
		}
	})
}

func FuzzParseGrant(f *testing.F) {
	a, err := identity.CreateAuthority(filepath.Join(f.TempDir(), "infra"), "test")
	if err != nil {
		f.Fatal(err)
	}
	identityOf := func(role identity.Role, name string) *identity.Identity {
		files, err := a.IssueTo(filepath.Join(f.TempDir(), name), principal(role, name), nil, nil, hour)
		if err != nil {
			f.Fatal(err)
		}
		i, err := identity.Load(files)
		if err != nil {
			f.Fatal(err)
		}
		return i
	}
	now := time.Now()
	verifier, alice := identityOf("hsmd", "hsmd-a"), identityOf("admin", "alice")
	r := identity.NewRequest(principal("sre", "sam"), "hsm-enroll", "main/hsmd-d", map[string]string{"transport": "aa"}, now, hour)
	approval, err := alice.Approve(r, now)
	if err != nil {
		f.Fatal(err)
	}
	text, _ := json.Marshal(identity.Grant{Request: r, Approvals: []identity.Approval{approval}})
	f.Add(text)
	f.Add([]byte(`{"request":{"created":"0000-01-01T00:00:00Z","detail":null},"approvals":[{"chain":[""]}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		g, err := identity.ParseGrant(text)
		if err != nil {
			return
		}
		again, err := json.Marshal(g)
		if err != nil {
			return // a time that JSON cannot say
		}
		h, err := identity.ParseGrant(again)
		if err == nil && !bytes.Equal(g.Request.Digest(), h.Request.Digest()) {
			t.Fatalf("%s became another request: %s", text, again)
		}
		if by, err := verifier.Approved(g.Request, g.Approvals, 1, now, identity.RoleAdmin); err == nil && !bytes.Equal(g.Request.Digest(), r.Digest()) {
			t.Fatalf("%s was approved by %v", text, by)
		}
	})
}
