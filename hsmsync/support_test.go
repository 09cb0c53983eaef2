package hsmsync_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

// software is a member made of Go alone, for faults that a real token cannot be made to show. It obeys the contract of
// hsmsync.Agent except where a test says otherwise; real agents with real tokens are tested in hsmd_test.go.
type software struct {
	name string

	mu           sync.Mutex // guards all below
	incarnation  int
	serial       string
	capacity     int
	locked       string
	probe        hsm.Probe
	kek, nextKEK string
	epoch        hsm.EpochRecord
	keys         map[hsm.KeyID]softKey
	destroyed    map[hsm.KeyID]bool
	forgotten    []string // transport keys
	buried       []hsm.KeyID
	retired      []hsm.KeyID
	calls        map[string]int // by operation
	digests      int            // signed
	fault        map[string]fault
	instead      crypto.Signer // what Import leaves in the token, if set
	perDigest    time.Duration // one signature after the other, each that long
	busy         time.Time     // until when it signs what it was given
}

type softKey struct {
	hsm.KeySpec
	crypto.Signer
}

// fault stands between the group and an operation, which is done by calling do. The group sees what it returns.
type fault func(ctx context.Context, do func() error) error

func newSoftware(name string) *software {
	return &software{
		name: name, serial: "token-" + name, probe: hsm.Probe{OK: true}, keys: map[hsm.KeyID]softKey{}, destroyed: map[hsm.KeyID]bool{},
		calls: map[string]int{}, fault: map[string]fault{},
	}
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

// set changes the member under its lock.
func (s *software) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// restart gives the member a new incarnation.
func (s *software) restart() { s.set(func() { s.incarnation++ }) }

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

// slow takes that long.
func slow(d time.Duration) fault {
	return func(_ context.Context, do func() error) error { time.Sleep(d); return do() }
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

func (s *software) records() (out []hsm.KeyRecord) {
	for _, k := range s.keys {
		out = append(out, s.record(k))
	}
	return out
}

func (s *software) boot() string { return fmt.Sprintf("%s-boot-%d", s.name, s.incarnation) }

// signature is k's over digest, as tokens make it.
func (k softKey) signature(digest []byte) ([]byte, error) {
	return k.Sign(rand.Reader, digest, k.Algorithm.Hash())
}

func (s *software) Health(ctx context.Context) (info hsm.Info, err error) {
	err = s.do(ctx, "health", func() error {
		info = hsm.Info{
			Member: s.name, TokenSerial: s.serial, TokenLabel: s.name, Incarnation: s.boot(), KEK: s.kek, NextKEK: s.nextKEK, Probe: s.probe,
			Locked: s.locked, Capacity: s.capacity, Site: s.epoch.Site, Epoch: s.epoch.Epoch, Keys: len(s.keys), Digest: hsm.InventoryDigest(s.records()),
		}
		return nil
	})
	return info, err
}

func (s *software) Inventory(ctx context.Context) (keys []hsm.KeyRecord, err error) {
	err = s.do(ctx, "inventory", func() error { keys = s.records(); return nil })
	return keys, err
}

func (s *software) Sign(ctx context.Context, req hsm.SignRequest) (sigs [][]byte, err error) {
	err = s.do(ctx, "sign", func() error {
		k, err := s.get(req.Key)
		switch {
		case err != nil:
			return err
		case req.Incarnation != "" && req.Incarnation != s.boot():
			return &hsm.Error{Class: hsm.ClassSession, Code: hsm.CodeStaleIncarnation, Op: "sign", Err: errors.New("this is " + s.boot())}
		case s.epoch.Epoch != req.Epoch && (s.epoch.Epoch != 0 || req.Epoch != 0) && (k.Purpose == hsm.PurposeCA || k.Purpose == hsm.PurposeCRL):
			return &hsm.Error{Class: hsm.ClassDenied, Code: hsm.CodeEpoch, Op: "sign", Err: fmt.Errorf("epoch is %d", s.epoch.Epoch)}
		}
		if s.perDigest > 0 {
			if now := time.Now(); s.busy.Before(now) {
				s.busy = now
			}
			s.busy = s.busy.Add(time.Duration(len(req.Digests)) * s.perDigest)
			until := s.busy
			s.mu.Unlock()
			time.Sleep(time.Until(until))
			s.mu.Lock()
		}
		for _, d := range req.Digests {
			sig, err := k.signature(d)
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
		sig, err = k.signature(hsm.ChallengeDigest(k.Algorithm, group, s.name, incarnation, key, nonce))
		return err
	})
	return sig, incarnation, err
}

func (s *software) Generate(ctx context.Context, spec hsm.KeySpec) (r hsm.KeyRecord, err error) {
	err = s.do(ctx, "generate", func() error {
		if _, there := s.keys[spec.ID]; !there {
			k, err := newSigner(spec.Algorithm)
			if err != nil {
				return err
			}
			s.keys[spec.ID] = softKey{spec, k}
		}
		r = s.record(s.keys[spec.ID])
		return nil
	})
	return r, err
}

func newSigner(a hsm.Algorithm) (crypto.Signer, error) {
	switch a {
	case hsm.Ed25519:
		_, k, err := ed25519.GenerateKey(rand.Reader)
		return k, err
	case hsm.P384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case hsm.P256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	return rsa.GenerateKey(rand.Reader, a.RSABits())
}

func (s *software) Export(ctx context.Context, key hsm.KeyID, kek string) (b hsm.Blob, err error) {
	err = s.do(ctx, "export", func() error {
		k, err := s.get(key)
		if err != nil {
			return err
		}
		switch kek {
		case "":
			kek = s.kek
		case s.kek, s.nextKEK:
		default:
			return hsm.Errorf(hsm.ClassRequest, "export", "no domain key %s", kek)
		}
		der, err := x509.MarshalPKCS8PrivateKey(k.Signer)
		b = hsm.Blob{KeySpec: k.KeySpec, SPKI: s.record(k).SPKI, KEK: kek, Wrapped: der}
		return err
	})
	return b, err
}

func (s *software) Import(ctx context.Context, b hsm.Blob) (r hsm.KeyRecord, err error) {
	err = s.do(ctx, "import", func() error {
		if b.KEK == "" || b.KEK != s.kek && b.KEK != s.nextKEK {
			return hsm.Errorf(hsm.ClassRequest, "import", "no domain key %s", b.KEK)
		}
		r, err = s.take(b.KeySpec, b.SPKI, b.Wrapped)
		return err
	})
	return r, err
}

// take puts a PKCS#8 key into the token.
func (s *software) take(spec hsm.KeySpec, spki, pkcs8 []byte) (hsm.KeyRecord, error) {
	if s.destroyed[spec.ID] {
		return hsm.KeyRecord{}, &hsm.Error{Class: hsm.ClassDenied, Code: hsm.CodeDestroyed, Op: "import", Err: errors.New("it was destroyed here")}
	}
	if k, there := s.keys[spec.ID]; there {
		if r := s.record(k); s.instead != nil || bytes.Equal(r.SPKI, spki) {
			return r, nil
		}
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "import", "another key has that id")
	}
	k, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "import", "%w", err)
	}
	signer := k.(crypto.Signer)
	if s.instead != nil {
		signer = s.instead
	}
	s.keys[spec.ID] = softKey{spec, signer}
	return s.record(s.keys[spec.ID]), nil
}

// Adopt takes the PKCS#8 as it is: a software member has no transport key to seal to.
func (s *software) Adopt(ctx context.Context, req hsm.AdoptRequest) (r hsm.KeyRecord, err error) {
	err = s.do(ctx, "adopt", func() error { r, err = s.take(req.Spec, req.SPKI, req.Sealed); return err })
	return r, err
}

func (s *software) Destroy(ctx context.Context, req hsm.DestroyRequest) error {
	return s.do(ctx, "destroy", func() error {
		if k, there := s.keys[req.Key]; there && !bytes.Equal(s.record(k).SPKI, req.SPKI) {
			return hsm.Errorf(hsm.ClassRequest, "destroy", "another key has that id")
		}
		delete(s.keys, req.Key)
		s.destroyed[req.Key] = true
		return nil
	})
}

func (s *software) TransportKey(ctx context.Context) ([]byte, error) {
	return []byte(s.name), s.do(ctx, "transport", func() error { return nil })
}

func (s *software) GenerateDomain(ctx context.Context, kek string) error {
	return s.do(ctx, "domain", func() error { return s.join(kek) })
}

// join takes in a domain key: the first is the current one, the second the next one.
func (s *software) join(kek string) error {
	switch {
	case s.kek == "" || s.kek == kek:
		s.kek = kek
	case s.nextKEK == "" || s.nextKEK == kek:
		s.nextKEK = kek
	default:
		return hsm.Errorf(hsm.ClassRequest, "domain", "two domain keys are there already")
	}
	return nil
}

func (s *software) ExportDomain(ctx context.Context, req hsm.DomainRequest) (wrapped []byte, kek string, err error) {
	err = s.do(ctx, "export-domain", func() error {
		wrapped, kek = req.Recipient, req.KEK
		if kek == "" {
			kek = s.kek
		}
		return nil
	})
	return wrapped, kek, err
}

func (s *software) ImportDomain(ctx context.Context, kek string, wrapped []byte) error {
	return s.do(ctx, "import-domain", func() error {
		if string(wrapped) != s.name {
			return hsm.Errorf(hsm.ClassRequest, "import-domain", "wrapped for another member")
		}
		return s.join(kek)
	})
}

func (s *software) Rotate(ctx context.Context, kek string) error {
	return s.do(ctx, "rotate", func() error {
		switch kek {
		case s.kek:
		case s.nextKEK:
			s.kek, s.nextKEK = s.nextKEK, s.kek
		default:
			return hsm.Errorf(hsm.ClassRequest, "rotate", "no domain key %s", kek)
		}
		return nil
	})
}

func (s *software) Retire(ctx context.Context, r hsm.RetireRequest) error {
	return s.do(ctx, "retire", func() error { s.retired = append(s.retired, r.Key); return nil })
}

func (s *software) Bury(ctx context.Context, r hsm.DestroyRequest) error {
	return s.do(ctx, "bury", func() error { s.buried = append(s.buried, r.Key); return nil })
}

func (s *software) ForgetTransport(ctx context.Context, transport string) error {
	return s.do(ctx, "forget", func() error { s.forgotten = append(s.forgotten, transport); return nil })
}

func (s *software) DropDomain(ctx context.Context, kek string) error {
	return s.do(ctx, "drop", func() error {
		switch kek {
		case s.nextKEK:
			s.nextKEK = ""
		case s.kek:
			if len(s.keys) > 0 {
				return hsm.Errorf(hsm.ClassRequest, "drop", "keys are left")
			}
			s.kek = ""
		}
		return nil
	})
}

func (s *software) BackupDomain(ctx context.Context, req hsm.BackupRequest) (wrapped []byte, kek string, err error) {
	err = s.do(ctx, "backup", func() error { wrapped, kek = req.Recipient, s.kek; return nil })
	return wrapped, kek, err
}

func (s *software) SetEpoch(ctx context.Context, r hsm.EpochRecord) error {
	return s.do(ctx, "epoch", func() error { s.epoch = r; return nil })
}

func (s *software) RotatePIN(ctx context.Context, _ hsm.PINRequest) error {
	return s.do(ctx, "rotate-pin", func() error { return nil })
}

func (s *software) Activate(ctx context.Context, _ string) error {
	return s.do(ctx, "activate", func() error { s.locked = ""; return nil })
}

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
		return hsmtest.Main(m)
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
