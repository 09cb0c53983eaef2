package hsmsync

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"trivet/hsm"
	"trivet/identity"
)

// Act is what people approve before it is done: the words of an identity.Request.
type Act struct {
	Action string            `json:"action"`
	Object string            `json:"object"`
	Detail map[string]string `json:"detail"`
}

// Actions that need approval.
const (
	ActEnroll  = "hsm-enroll"
	ActBackup  = "hsm-backup"
	ActDestroy = "key-destroy"
	ActImport  = "key-import"
)

// Actions that need approval by the group's log alone: no member is asked to do anything, so none can check it.
const (
	ActRetire = "key-retire"
	ActPolicy = "hsm-policy"
	ActDrain  = "hsm-drain"  // forced
	ActRemove = "hsm-remove" // forced
)

// forceAct is the act of draining or removing a member that would be refused. It holds as long as the member stays where it is
// in the log.
func (c *Coordinator) forceAct(action string, m GroupMember) Act {
	return Act{action, c.cfg.Group + "/" + m.Name, map[string]string{"force": "true", "token": m.TokenSerial, "since": strconv.FormatUint(max(m.N, m.Recovered), 10)}}
}

func (c *Coordinator) retireAct(k ManifestKey) Act {
	return Act{ActRetire, c.cfg.Group + "/" + string(k.ID), map[string]string{
		"spki": hsm.Fingerprint(k.SPKI), "label": k.Label, "purpose": string(k.Purpose),
	}}
}

// policyAct is the act of weakening the policy that entry n made.
func (c *Coordinator) policyAct(was, will Policy, n uint64) Act {
	d := map[string]string{"since": strconv.FormatUint(n, 10)}
	for i, f := range was.fields() {
		if to := will.fields()[i]; to.value != f.value {
			d[f.name] = to.value + " instead of " + f.value
		}
	}
	return Act{ActPolicy, c.cfg.Group, d}
}

// field is one field of a policy, as people read it.
type field struct{ name, value string }

func (p Policy) fields() []field {
	return []field{
		{"driver", p.Driver}, {"non_extractable", strconv.FormatBool(p.NonExtractable)}, {"creation", p.Creation}, {"master", p.Master}, {"min_copies", strconv.Itoa(p.MinCopies)},
		{"prefer", p.Prefer}, {"sites", strings.Join(p.Sites, ",")}, {"destroy_after", p.DestroyAfter.String()},
	}
}

// weaker tells whether a change of the policy takes away what protects keys.
func weaker(was, will Policy) bool {
	return will.MinCopies < was.MinCopies || will.DestroyAfter < was.DestroyAfter || was.NonExtractable && !will.NonExtractable ||
		was.Creation == CreationMaster && will.Creation != CreationMaster
}

// approvedBy is approved with the first of the grants, if there is one.
func (c *Coordinator) approvedBy(grants [][]byte, a Act) (Approved, error) {
	var grant []byte
	if len(grants) > 0 {
		grant = grants[0]
	}
	return c.approved(grant, a)
}

// EnrollAct is the act of letting a token into the group. Fingerprint is its transport key's, as people have compared it.
func (c *Coordinator) EnrollAct(member, fingerprint string) Act {
	return Act{ActEnroll, c.cfg.Group + "/" + member, map[string]string{"transport": fingerprint}}
}

// BackupAct is the act of wrapping the domain key for the custodians who hold the private half of a key, DER SPKI.
func (c *Coordinator) BackupAct(recipient []byte) Act {
	return Act{ActBackup, c.cfg.Group, map[string]string{"recipient": hsm.Fingerprint(recipient)}}
}

// ImportAct is the act of taking in a key from outside; its id does not matter.
func (c *Coordinator) ImportAct(spec hsm.KeySpec, spki []byte) Act {
	return Act{ActImport, c.cfg.Group + "/" + spec.Label, map[string]string{
		"spki": hsm.Fingerprint(spki), "purpose": string(spec.Purpose), "algorithm": string(spec.Algorithm),
	}}
}

// DestroyAct is the act of destroying every copy of a key. An abandoned key's public half is not in the log: the members
// that hold it are asked.
func (c *Coordinator) DestroyAct(ctx context.Context, id hsm.KeyID) (Act, error) {
	s, err := c.State(ctx)
	if err != nil {
		return Act{}, err
	}
	k, ok := s.Key(id)
	if !ok {
		return Act{}, fmt.Errorf("group %s has no key %s", c.cfg.Group, id)
	}
	spki, err := c.publicHalf(ctx, s, k)
	if err != nil {
		return Act{}, err
	}
	return c.destroyAct(id, spki), nil
}

func (c *Coordinator) destroyAct(id hsm.KeyID, spki []byte) Act {
	return Act{ActDestroy, c.cfg.Group + "/" + string(id), map[string]string{"spki": hsm.Fingerprint(spki)}}
}

// approved checks that people enough have approved exactly this act. The members check it again. The result is the
// evidence for the log.
func (c *Coordinator) approved(grant []byte, a Act) (Approved, error) {
	fail := func(format string, args ...any) (Approved, error) {
		return Approved{}, fmt.Errorf("%s of %s needs the approval of %d people: %w", a.Action, a.Object, c.cfg.Approvals, fmt.Errorf(format, args...))
	}
	if len(grant) == 0 && c.dry != nil {
		c.dry.wants(a)
		return Approved{}, nil
	}
	if len(grant) == 0 {
		return fail("none was given (detail: %v)", a.Detail)
	}
	var g identity.Grant
	if err := json.Unmarshal(grant, &g); err != nil {
		return fail("parsing it: %w", err)
	}
	r := g.Request
	switch {
	case r.Action != a.Action || r.Object != a.Object:
		return fail("what was approved is %s of %s", r.Action, r.Object)
	}
	for k, v := range r.Detail {
		if a.Detail[k] != v {
			return fail("what was approved says %s=%s, here it is %q", k, v, a.Detail[k])
		}
	}
	everything := slices.Contains([]string{ActRetire, ActPolicy, ActDrain, ActRemove, ActPIN}, a.Action)
	for _, k := range slices.Sorted(maps.Keys(a.Detail)) {
		// What the members insist on; the rest may be left out.
		if _, said := r.Detail[k]; !said && (everything || slices.Contains([]string{"spki", "transport", "recipient"}, k)) {
			return fail("what was approved does not say %s", k)
		}
	}
	people, err := c.cfg.Identity.Granted(g, c.cfg.Approvals, c.cfg.Now(), identity.RoleAdmin, identity.RoleCAOperator)
	if err != nil {
		return fail("%w", err)
	}
	var out Approved
	for _, p := range people {
		out.By = append(out.By, p.String())
	}
	if out.Request, err = json.Marshal(r); err == nil {
		out.Approvals, err = json.Marshal(g.Approvals)
	}
	if err == nil {
		out.Proposal, err = json.Marshal(g.Proposal)
	}
	return out, err
}

// grant is the approval as it travelled, for members that come back later; nil when there is none, or not any more.
func (a Approved) grant(now time.Time) []byte {
	if g, ok := a.evidence(); ok && !now.After(g.Request.Expires) {
		b, _ := json.Marshal(g) // of what was just unmarshalled
		return b
	}
	return nil
}

// evidence is the approval as it travelled, expired or not.
func (a Approved) evidence() (g identity.Grant, ok bool) {
	ok = len(a.Request) > 0 && json.Unmarshal(a.Request, &g.Request) == nil && json.Unmarshal(a.Approvals, &g.Approvals) == nil && json.Unmarshal(a.Proposal, &g.Proposal) == nil
	return g, ok
}

// publicOf is the DER SPKI of a private key of that algorithm.
func publicOf(pkcs8 []byte, a hsm.Algorithm) ([]byte, error) {
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, fmt.Errorf("parsing the private key: want PKCS#8 in DER: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("the private key is of a kind that does not sign")
	}
	spki, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err == nil {
		_, err = a.ParsePublic(spki)
	}
	return spki, err
}
