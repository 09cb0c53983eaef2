package hsmsync_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
	"trivet/identity"
)

// software is a member made of Go alone, for faults that a real token cannot be made to show. It obeys the contract of
// hsmsync.Agent except where a test says otherwise; real agents with real tokens are tested in hsmd_test.go.
type software struct {
	name string

	mu          sync.Mutex // guards all below
	incarnation int
	serial      string
	kek         string
	keys        map[hsm.KeyID]softKey
	calls       map[string]int // by operation
	digests     int            // signed
	fault       map[string]fault
	instead     *ecdsa.PrivateKey // what Import leaves in the token, if set
}

type softKey struct {
	hsm.KeySpec
	*ecdsa.PrivateKey
}

// fault stands between the group and an operation, which is done by calling do. The group sees what it returns.
type fault func(ctx context.Context, do func() error) error

func newSoftware(name string) *software {
	return &software{name: name, serial: "token-" + name, keys: map[hsm.KeyID]softKey{}, calls: map[string]int{}, fault: map[string]fault{}}
}

// with sets the fault of an operation; nil lifts it.
func (s *software) with(op string, f fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault[op] = f
}

func (s *software) count(op string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[op]
}

// restart gives the member a new incarnation.
func (s *software) restart() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.incarnation++
}

// do runs an operation under the lock, through its fault and that of all operations ("*").
func (s *software) do(ctx context.Context, op string, act func() error) error {
	s.mu.Lock()
	s.calls[op]++
	f := s.fault[op]
	if f == nil {
		f = s.fault["*"]
	}
	s.mu.Unlock()
	locked := func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		return act()
	}
	if f == nil {
		return locked()
	}
	return f(ctx, locked)
}

// dead is the fault of a member that is not there; hung that of one that never answers.
func dead(context.Context, func() error) error {
	return hsm.Errorf(hsm.ClassDevice, "call", "connection refused")
}

func hung(ctx context.Context, _ func() error) error {
	<-ctx.Done()
	return &hsm.Error{Class: hsm.ClassDevice, Op: "call", Err: ctx.Err()}
}

func failing(c hsm.Class) fault {
	return func(context.Context, func() error) error { return hsm.Errorf(c, "call", "as the test wants it") }
}

func (s *software) get(id hsm.KeyID) (softKey, error) {
	k, ok := s.keys[id]
	if !ok {
		return k, hsm.Errorf(hsm.ClassNotFound, "find", "no key %s", id)
	}
	return k, nil
}

func (s *software) record(k softKey) hsm.KeyRecord {
	spki, _ := x509.MarshalPKIXPublicKey(k.Public())
	return hsm.KeyRecord{KeySpec: k.KeySpec, SPKI: spki, Extractable: true, Attributes: "software"}
}

func (s *software) boot() string { return fmt.Sprintf("%s-boot-%d", s.name, s.incarnation) }

func (s *software) Health(ctx context.Context) (info hsm.Info, err error) {
	err = s.do(ctx, "health", func() error {
		info = hsm.Info{Member: s.name, TokenSerial: s.serial, TokenLabel: s.name, Incarnation: s.boot(), KEK: s.kek, Probe: hsm.Probe{OK: true}}
		return nil
	})
	return info, err
}

func (s *software) Sign(ctx context.Context, key hsm.KeyID, digests [][]byte) (sigs [][]byte, err error) {
	err = s.do(ctx, "sign", func() error {
		k, err := s.get(key)
		if err != nil {
			return err
		}
		for _, d := range digests {
			sig, err := ecdsa.SignASN1(rand.Reader, k.PrivateKey, d)
			if err != nil {
				return err
			}
			sigs = append(sigs, sig)
			s.digests++
		}
		return nil
	})
	if errors.Is(err, errFlip) {
		var at flipAt
		errors.As(err, &at)
		sigs[at][20] ^= 1
		err = nil
	}
	return sigs, err
}

// errFlip has Sign flip a bit of the first signature, or of the one flipAt says; flipping is the fault that does it.
var errFlip = errors.New("flip")

type flipAt int

func (flipAt) Error() string { return "flip there" }

func flipping(_ context.Context, do func() error) error { return errors.Join(do(), errFlip) }

func (s *software) Challenge(ctx context.Context, group string, key hsm.KeyID, nonce []byte) (sig []byte, incarnation string, err error) {
	err = s.do(ctx, "challenge", func() error {
		k, err := s.get(key)
		if err != nil {
			return err
		}
		incarnation = s.boot()
		sig, err = ecdsa.SignASN1(rand.Reader, k.PrivateKey, hsm.ChallengeDigest(group, s.name, incarnation, key, nonce))
		return err
	})
	return sig, incarnation, err
}

func (s *software) Generate(ctx context.Context, spec hsm.KeySpec) (r hsm.KeyRecord, err error) {
	err = s.do(ctx, "generate", func() error {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		s.keys[spec.ID] = softKey{spec, k}
		r = s.record(s.keys[spec.ID])
		return err
	})
	return r, err
}

func (s *software) Export(ctx context.Context, key hsm.KeyID) (b hsm.Blob, err error) {
	err = s.do(ctx, "export", func() error {
		k, err := s.get(key)
		if err != nil {
			return err
		}
		der, err := x509.MarshalECPrivateKey(k.PrivateKey)
		b = hsm.Blob{KeySpec: k.KeySpec, SPKI: s.record(k).SPKI, KEK: s.kek, Wrapped: der}
		return err
	})
	return b, err
}

func (s *software) Import(ctx context.Context, b hsm.Blob) (r hsm.KeyRecord, err error) {
	err = s.do(ctx, "import", func() error {
		if b.KEK != s.kek {
			return hsm.Errorf(hsm.ClassRequest, "import", "no domain key %s", b.KEK)
		}
		k, err := x509.ParseECPrivateKey(b.Wrapped)
		if err != nil {
			return err
		}
		if s.instead != nil {
			k = s.instead
		}
		s.keys[b.ID] = softKey{b.KeySpec, k}
		r = s.record(s.keys[b.ID])
		return nil
	})
	return r, err
}

func (s *software) TransportKey(ctx context.Context) ([]byte, error) {
	return []byte(s.name), s.do(ctx, "transport", func() error { return nil })
}

func (s *software) GenerateDomain(ctx context.Context, kek string) error {
	return s.do(ctx, "domain", func() error { s.kek = kek; return nil })
}

func (s *software) ExportDomain(ctx context.Context, transport []byte) (wrapped []byte, kek string, err error) {
	err = s.do(ctx, "export-domain", func() error { wrapped, kek = transport, s.kek; return nil })
	return wrapped, kek, err
}

func (s *software) ImportDomain(ctx context.Context, kek string, wrapped []byte) error {
	return s.do(ctx, "import-domain", func() error {
		if string(wrapped) != s.name {
			return hsm.Errorf(hsm.ClassRequest, "import-domain", "wrapped for another member")
		}
		s.kek = kek
		return nil
	})
}

// memory is a group log that obeys the rule of chains: one entry per position, no holes.
type memory struct {
	mu        sync.Mutex // guards all below
	entries   []hsmsync.Entry
	down      error                                 // no reading, no writing
	before    func(hsmsync.Entry) error             // before an entry is added: an error prevents it
	after     func(hsmsync.Entry) error             // after it was: an error is reported all the same
	elsewhere func([]hsmsync.Entry) []hsmsync.Entry // what another database node knows
}

func (m *memory) Log(ctx context.Context, _ string) ([]hsmsync.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := slices.Clone(m.entries)
	if m.elsewhere != nil {
		out = m.elsewhere(out)
	}
	return out, errors.Join(m.down, ctx.Err())
}

func (m *memory) Append(ctx context.Context, _ string, e hsmsync.Entry) error {
	m.mu.Lock()
	before := m.before
	m.mu.Unlock()
	if before != nil {
		if err := before(e); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.down != nil:
		return m.down
	case ctx.Err() != nil:
		return ctx.Err()
	case e.N <= uint64(len(m.entries)):
		return hsmsync.ErrTaken
	case e.N != uint64(len(m.entries))+1:
		return fmt.Errorf("entry %d would leave a hole after %d", e.N, len(m.entries))
	case e.Event == "" || e.Subject == "" || len(e.Subject) > 64 || e.Actor == "" || e.Created.IsZero():
		return fmt.Errorf("entry %+v is incomplete", e)
	}
	m.entries = append(m.entries, e)
	if m.after != nil {
		return m.after(e)
	}
	return nil
}

func (m *memory) Keys(ctx context.Context, group string) ([]hsmsync.ManifestKey, error) {
	entries, err := m.Log(ctx, group)
	if err != nil {
		return nil, err
	}
	f, err := hsmsync.Fold(entries)
	return f.Keys, err
}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = err
}

// events lists what the log says, as "event label-or-subject".
func (m *memory) events() (out []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.entries {
		out = append(out, e.Event)
	}
	return out
}

// manifest is a Manifest that is no Chain: what a process that only signs has.
type manifest struct{ *memory }

func (m manifest) Keys(ctx context.Context, group string) ([]hsmsync.ManifestKey, error) {
	return m.memory.Keys(ctx, group)
}
func (manifest) Append() {} // hides the chain's

var people struct {
	sync.Mutex
	authority *identity.Authority
	dir       string
	ids       map[identity.Role]*identity.Identity
}

// as is the identity of a process in a role.
func as(t testing.TB, role identity.Role) *identity.Identity {
	t.Helper()
	people.Lock()
	defer people.Unlock()
	if id := people.ids[role]; id != nil {
		return id
	}
	files := certify(t, identity.Principal{Cluster: "test", Role: role, Name: string(role) + "1"})
	id, err := identity.Load(files)
	if err != nil {
		t.Fatal(err)
	}
	people.ids[role] = id
	return id
}

// certify has the test's infrastructure CA issue an identity. The caller holds people.
func certify(t testing.TB, p identity.Principal) identity.Files {
	t.Helper()
	files, err := people.authority.IssueTo(people.dir+"/"+string(p.Role)+"-"+p.Name, p, nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "hsmsync-test-")
		if err == nil {
			defer func() { _ = os.RemoveAll(dir) }()
			people.dir, people.ids = dir, map[identity.Role]*identity.Identity{}
			people.authority, err = identity.CreateAuthority(dir+"/infra", "test")
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

func logger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func newSoftKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}
