package hsmsync

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"trivet/hsm"
)

// Plan is what an act would do.
type Plan struct {
	Steps []Step `json:"steps"`
	// Wants are the acts that people must approve first.
	Wants []Act `json:"wants,omitempty"`
}

// Step is one thing that an act would do.
type Step struct {
	// Do is approve (by people), enter (into the log), or what a member would be asked: generate, import, adopt, destroy,
	// generate-domain, import-domain, rotate, drop-domain, set-epoch, backup, rotate-pin, prove.
	Do     string `json:"do"`
	Member string `json:"member,omitempty"`
	// What is the entry, key or domain key; Count how many of them, when there are several alike.
	What  string `json:"what"`
	Count int    `json:"count"`
}

// String is the step as a line of text.
func (s Step) String() string {
	out := s.Do
	if s.Member != "" {
		out = s.Member + ": " + out
	}
	if s.Count > 1 {
		return fmt.Sprintf("%s %d keys, such as %s", out, s.Count, s.What)
	}
	return out + " " + s.What
}

// DryRun does an act up to everything that it would change: act is given a coordinator that reads the real log and asks
// the real members, so that it is refused where the act would be, but enters and changes nothing. The plan is what it
// would have done, as far as it came. An approval may be missing: that it is needed is a step then.
//
//	plan, err := c.DryRun(ctx, func(c *hsmsync.Coordinator) error { return c.Drain(ctx, "hsmd-b", "new fan") })
func (c *Coordinator) DryRun(ctx context.Context, act func(*Coordinator) error) (Plan, error) {
	r := &rehearsal{group: c.cfg.Group, real: c.cfg.Chain, members: map[string]*understudy{}}
	entries, err := c.cfg.Chain.Log(ctx, c.cfg.Group, 1)
	if err == nil {
		r.entries = entries
		r.state, err = Fold(entries)
	}
	if err != nil {
		return Plan{}, fmt.Errorf("reading the log of group %s: %w", c.cfg.Group, err)
	}
	cfg := c.cfg
	cfg.Chain, cfg.Metrics, cfg.Progress = r, nil, nil
	cfg.Connect = func(name, address string) Agent { return r.member(name, c.agent(name, address)) }
	d, err := NewCoordinator(cfg)
	if err != nil {
		return Plan{}, err
	}
	d.dry, d.log = r, c.log.With("dry_run", true)
	err = act(d)
	r.mu.Lock()
	defer r.mu.Unlock()
	return Plan{Steps: r.steps, Wants: r.asked}, err
}

// rehearsal is a group as an act would have made it.
type rehearsal struct {
	group string
	real  Chain

	mu      sync.Mutex // guards all below, and every understudy
	entries []Entry
	state   *State // of entries
	steps   []Step
	asked   []Act
	members map[string]*understudy
}

// step notes what would be done. Of several alike in a row the first is named and the others counted.
func (r *rehearsal) step(do, member, what string) {
	if n := len(r.steps); n > 0 && member != "" {
		for i := n - 1; i >= 0 && r.steps[i].Member != ""; i-- {
			if r.steps[i].Do == do && r.steps[i].Member == member && (do == "import" || do == "prove") {
				r.steps[i].Count++
				return
			}
		}
	}
	r.steps = append(r.steps, Step{do, member, what, 1})
}

// Log implements Manifest.
func (r *rehearsal) Log(ctx context.Context, group string, from uint64) ([]Entry, error) {
	if group != r.group {
		return r.real.Log(ctx, group, from)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.entries[min(max(from, 1)-1, uint64(len(r.entries))):]), ctx.Err()
}

// Append implements Chain.
func (r *rehearsal) Append(_ context.Context, group string, e Entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if group != r.group || e.N != uint64(len(r.entries))+1 {
		return ErrTaken
	}
	if err := r.state.Apply(e); err != nil {
		return err
	}
	r.entries = append(r.entries, e)
	r.step("enter", "", strings.TrimSpace(e.Event+" "+e.Subject))
	return nil
}

// wants notes that people must approve an act first.
func (r *rehearsal) wants(a Act) {
	r.mu.Lock()
	defer r.mu.Unlock()
	what := a.Action + " of " + a.Object
	for _, k := range slices.Sorted(maps.Keys(a.Detail)) {
		what += ", " + k + " " + a.Detail[k]
	}
	if slices.ContainsFunc(r.asked, func(b Act) bool { return b.Action == a.Action && b.Object == a.Object }) {
		return
	}
	r.asked = append(r.asked, a)
	r.step("approve", "", what)
}

// proves tells that a member would prove a key: one that it was given in this rehearsal. Any other it is asked to prove.
func (r *rehearsal) proves(member string, k hsm.KeyRecord) (incarnation string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.members[member]
	if m == nil {
		return "", false
	}
	r.step("prove", member, string(k.ID)+" ("+k.Label+")")
	_, given := m.keys[k.ID]
	return m.incarnation, given
}

func (r *rehearsal) member(name string, a Agent) Agent {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.members[name] == nil {
		r.members[name] = &understudy{Agent: a, r: r, name: name, keys: map[hsm.KeyID]hsm.KeyRecord{}, gone: map[hsm.KeyID]bool{}}
	}
	return r.members[name]
}

// understudy answers questions as the member would, and only notes what would change it.
type understudy struct {
	Agent
	r    *rehearsal
	name string

	incarnation string
	keys        map[hsm.KeyID]hsm.KeyRecord // what it was given
	gone        map[hsm.KeyID]bool          // what it destroyed
	change      []func(*hsm.Info)           // what became of it otherwise
}

func (u *understudy) note(do, what string, change func(*hsm.Info)) {
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	u.r.step(do, u.name, what)
	if change != nil {
		u.change = append(u.change, change)
	}
}

// Health implements Agent.
func (u *understudy) Health(ctx context.Context) (hsm.Info, error) {
	i, err := u.Agent.Health(ctx)
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	u.incarnation = i.Incarnation
	for _, change := range u.change {
		change(&i)
	}
	return i, err
}

// Inventory implements Agent.
func (u *understudy) Inventory(ctx context.Context) ([]hsm.KeyRecord, error) {
	all, err := u.Agent.Inventory(ctx)
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	all = slices.DeleteFunc(all, func(k hsm.KeyRecord) bool { _, given := u.keys[k.ID]; return given || u.gone[k.ID] })
	for _, k := range u.keys {
		all = append(all, k)
	}
	return all, err
}

// Generate implements Agent.
func (u *understudy) Generate(_ context.Context, spec hsm.KeySpec) (hsm.KeyRecord, error) {
	public, err := example(spec.Algorithm)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(public)
	k := hsm.KeyRecord{KeySpec: spec, SPKI: spki}
	u.note("generate", string(spec.Purpose)+":"+spec.Label+" ("+string(spec.Algorithm)+")", nil)
	u.give(k)
	return k, err
}

// example is a public key of that kind; a fresh one, so that nobody takes it for somebody's.
func example(a hsm.Algorithm) (any, error) {
	var curve elliptic.Curve
	switch a {
	case hsm.P256:
		curve = elliptic.P256()
	case hsm.P384:
		curve = elliptic.P384()
	default:
		if bits := a.RSABits(); bits > 0 {
			k, err := rsa.GenerateKey(rand.Reader, bits)
			if err != nil {
				return nil, err
			}
			return &k.PublicKey, nil
		}
		return nil, fmt.Errorf("a dry run cannot make a %s key", a)
	}
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		return nil, err
	}
	return &k.PublicKey, nil
}

func (u *understudy) give(k hsm.KeyRecord) {
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	u.keys[k.ID] = k
	delete(u.gone, k.ID)
}

// Export implements Agent. The blob holds nothing.
func (u *understudy) Export(ctx context.Context, id hsm.KeyID, kek string) (hsm.Blob, error) {
	all, err := u.Inventory(ctx)
	if err != nil {
		return hsm.Blob{}, err
	}
	i := slices.IndexFunc(all, func(k hsm.KeyRecord) bool { return k.ID == id && !k.Foreign && k.Fault == "" })
	if i < 0 {
		return hsm.Blob{}, hsm.Errorf(hsm.ClassNotFound, "export", "no key %s", id)
	}
	return hsm.Blob{KeySpec: all[i].KeySpec, SPKI: all[i].SPKI, KEK: kek, Wrapped: make([]byte, 24), MAC: make([]byte, 32)}, nil
}

// Import implements Agent.
func (u *understudy) Import(_ context.Context, b hsm.Blob) (hsm.KeyRecord, error) {
	k := hsm.KeyRecord{KeySpec: b.KeySpec, SPKI: b.SPKI}
	u.note("import", string(b.ID)+" ("+b.Label+")", nil)
	u.r.mu.Lock()
	if original, ok := u.r.state.Key(b.ID); ok {
		k.Attributes = original.Attributes
	}
	u.r.mu.Unlock()
	u.give(k)
	return k, nil
}

// Adopt implements Agent.
func (u *understudy) Adopt(_ context.Context, req hsm.AdoptRequest) (hsm.KeyRecord, error) {
	k := hsm.KeyRecord{KeySpec: req.Spec, SPKI: req.SPKI}
	u.note("adopt", string(req.Spec.Purpose)+":"+req.Spec.Label, nil)
	u.give(k)
	return k, nil
}

// Destroy implements Agent.
func (u *understudy) Destroy(_ context.Context, req hsm.DestroyRequest) error {
	u.note("destroy", string(req.Key), nil)
	u.r.mu.Lock()
	defer u.r.mu.Unlock()
	delete(u.keys, req.Key)
	u.gone[req.Key] = true
	return nil
}

// Bury implements Agent.
func (u *understudy) Bury(context.Context, hsm.DestroyRequest) error { return nil }

// Retire implements Agent.
func (u *understudy) Retire(context.Context, hsm.RetireRequest) error { return nil }

// GenerateDomain implements Agent.
func (u *understudy) GenerateDomain(_ context.Context, kek string) error {
	u.note("generate-domain", kek, func(i *hsm.Info) { take(i, kek) })
	return nil
}

// take is what a token does with a domain key that comes in.
func take(i *hsm.Info, kek string) {
	switch {
	case holds(*i, kek):
	case i.KEK == "":
		i.KEK = kek
	default:
		i.NextKEK = kek
	}
}

// ExportDomain implements Agent. What it returns holds nothing. Whether an approval is needed is not found out.
func (u *understudy) ExportDomain(_ context.Context, req hsm.DomainRequest) ([]byte, string, error) {
	return []byte("rehearsed"), req.KEK, nil
}

// ImportDomain implements Agent.
func (u *understudy) ImportDomain(_ context.Context, kek string, _ []byte) error {
	u.note("import-domain", kek, func(i *hsm.Info) { take(i, kek) })
	return nil
}

// Rotate implements Agent.
func (u *understudy) Rotate(_ context.Context, kek string) error {
	u.note("rotate", kek, func(i *hsm.Info) {
		if i.NextKEK == kek {
			i.KEK, i.NextKEK = kek, i.KEK
		}
	})
	return nil
}

// DropDomain implements Agent.
func (u *understudy) DropDomain(_ context.Context, kek string) error {
	u.note("drop-domain", kek, func(i *hsm.Info) {
		switch kek {
		case i.NextKEK:
			i.NextKEK = ""
		case i.KEK:
			i.KEK = ""
		}
	})
	return nil
}

// ForgetTransport implements Agent.
func (u *understudy) ForgetTransport(context.Context, string) error { return nil }

// BackupDomain implements Agent.
func (u *understudy) BackupDomain(ctx context.Context, _ hsm.BackupRequest) ([]byte, string, error) {
	i, err := u.Health(ctx)
	u.note("backup", i.KEK, nil)
	return make([]byte, 768), i.KEK, err
}

// SetEpoch implements Agent.
func (u *understudy) SetEpoch(_ context.Context, r hsm.EpochRecord) error {
	u.note("set-epoch", fmt.Sprintf("%d (%s)", r.Epoch, r.Site), func(i *hsm.Info) { i.Site, i.Epoch = r.Site, r.Epoch })
	return nil
}

// RotatePIN implements Agent. Whether the agent could is not found out.
func (u *understudy) RotatePIN(_ context.Context, req hsm.PINRequest) error {
	u.note("rotate-pin", req.Detail()["pin"]+" PIN, start anew, prove every key", nil)
	return nil
}

var errRehearsal = errors.New("not in a dry run")

// Sign implements Agent.
func (u *understudy) Sign(context.Context, hsm.SignRequest) ([][]byte, error) {
	return nil, errRehearsal
}

// Activate implements Agent.
func (u *understudy) Activate(context.Context, string) error { return errRehearsal }
