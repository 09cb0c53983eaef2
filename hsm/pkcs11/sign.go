package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"math/big"
	"slices"
	"sync"
	"time"

	"github.com/ThalesIgnite/crypto11"
	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// signer signs with one key for the life of the process, or until the key is destroyed.
type signer struct {
	algorithm hsm.Algorithm
	// mu is held by signatures for reading and by the key's destruction for writing, so that no signature meets a handle
	// that is gone, which would look like a lost session.
	mu   sync.RWMutex
	sign func(digest []byte) ([]byte, error) // nil once the key is gone
	// copied is the copy that signs, 0 when the key itself does.
	copied p11.ObjectHandle
}

// Sign returns a signature over one digest, or for Ed25519 over one message, as hsm.Verify takes it.
func (t *Token) Sign(id hsm.KeyID, digest []byte) ([]byte, error) {
	s, err := t.signer(id)
	if err != nil {
		return nil, err
	}
	if err := s.algorithm.CheckDigest(digest); err != nil {
		return nil, hsm.Errorf(hsm.ClassRequest, "sign", "%w", err)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.sign == nil {
		return nil, hsm.Errorf(hsm.ClassNotFound, "sign", "key %s in token %s was destroyed", id, t.label)
	}
	sig, err := s.sign(digest)
	return sig, classify("sign", err)
}

func (t *Token) signer(id hsm.KeyID) (*signer, error) {
	t.mu.RLock()
	s := t.signers[id]
	t.mu.RUnlock()
	if s != nil {
		return s, nil
	}
	t.making.Lock()
	defer t.making.Unlock()
	t.mu.RLock()
	s = t.signers[id]
	t.mu.RUnlock()
	if s != nil {
		return s, nil
	}
	k, err := t.Key(id)
	if err != nil {
		return nil, err
	}
	if s, err = t.makeSigner(k); err != nil {
		return nil, err
	}
	t.mu.Lock()
	t.signers[id] = s
	t.mu.Unlock()
	return s, nil
}

// fewKeys is in how many keys crypto11 may look for one. It knows no other way to a key, and where the module looks at every
// object a search among thousands takes longer than a signature may.
const fewKeys = 100

// crypto11Pair is a key as crypto11 has found it, or nil for one that is signed with directly. A search must not meet an object
// that is being made: SoftHSM's locks keep processes apart and not threads, so that the search reads half an object, takes it
// for broken, and the making fails with CKR_GENERAL_ERROR. So none is made while the token is being managed.
func (t *Token) crypto11Pair(k hsm.KeyRecord, id []byte) (crypto11.Signer, error) {
	t.mu.RLock()
	few := len(t.keys) <= fewKeys
	t.mu.RUnlock()
	if t.p11 == nil || !few || k.Algorithm == hsm.Ed25519 || !t.manage.TryLock() { // crypto11 does not know Ed25519
		return nil, nil
	}
	defer t.manage.Unlock()
	return t.p11.FindKeyPair(id, []byte(k.ObjectLabel()))
}

// makeSigner finds the private key, and has it sign once: what answers to the key's name must be the key. One that is
// another is faulty from now on.
func (t *Token) makeSigner(k hsm.KeyRecord) (*signer, error) {
	id, err := k.ID.Bytes()
	if err != nil {
		return nil, hsm.Errorf(hsm.ClassRequest, "sign", "%w", err)
	}
	pub, err := parseSPKI(k.Algorithm, k.SPKI)
	if err != nil {
		return nil, hsm.Errorf(hsm.ClassNotFound, "sign", "key %s in token %s: %w", k.ID, t.label, err)
	}
	s := &signer{algorithm: k.Algorithm}
	if pair, err := t.crypto11Pair(k, id); err != nil {
		return nil, classify("find", err)
	} else if pair != nil {
		s.sign = func(digest []byte) ([]byte, error) { return pair.Sign(rand.Reader, digest, k.Algorithm.Hash()) }
	} else if err := t.signDirectly(s, k, id); err != nil {
		return nil, classify("find", err)
	}
	err = t.prove(k.ID, k.Algorithm, pub, s.sign)
	if err == nil {
		return s, nil
	}
	t.retire(s)
	fault := ""
	switch {
	case errors.Is(err, errOtherKey):
		fault = "the private key does not belong to the public one"
	case errors.Is(err, errCannotSign) && t.signsWithProbe():
		fault = "the private key cannot sign"
	default:
		return nil, asIs("sign", err)
	}
	t.log.Error("a key is not what it is called", "key", k.ID, "token", t.label, "fault", fault, "error", err)
	k.Fault = fault
	t.mu.Lock()
	t.keys[k.ID], t.bad[k.ID], t.digest = k, fault, ""
	t.mu.Unlock()
	return nil, hsm.Errorf(hsm.ClassNotFound, "sign", "key %s in token %s is unusable: %s", k.ID, t.label, fault)
}

// signsWithProbe tells a broken key from a broken token: a token that is well signs with its probe key.
func (t *Token) signsWithProbe() bool {
	id, err := t.probe.ID.Bytes()
	if err != nil {
		return false
	}
	return t.pool.with(func(session p11.SessionHandle) error {
		objects, err := find(t.raw.Ctx, session, append(naming(t.probe.KeySpec, id), attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)})...)
		if err == nil && len(objects) == 1 {
			_, err = t.rawSign(session, objects[0], t.probe.Algorithm, t.probe.Algorithm.Digest([]byte("hsmd-well-v1")))
		}
		return err
	}) == nil
}

// signDirectly has s sign through the module itself.
func (t *Token) signDirectly(s *signer, k hsm.KeyRecord, id []byte) error {
	object, err := t.located(k, id)
	if err != nil {
		return err
	}
	if t.raw.profile.SessionCopy {
		if object, err = t.raw.CopyObject(t.copies, object, template([]attribute{{p11.CKA_TOKEN, false}})); err != nil {
			return err
		}
		s.copied = object
	}
	s.sign = func(digest []byte) (sig []byte, err error) {
		err = t.pool.with(func(session p11.SessionHandle) error {
			sig, err = t.rawSign(session, object, k.Algorithm, digest)
			return err
		})
		if e, ok := errors.AsType[p11.Error](err); ok && slices.Contains(t.raw.profile.LostSession, uint(e)) {
			err = &hsm.Error{Class: hsm.ClassSession, Code: codeName(e), Op: "sign", Err: err}
		}
		return sig, err
	}
	return nil
}

// located is the private key's handle, from memory if it still has the key's name.
func (t *Token) located(k hsm.KeyRecord, id []byte) (p11.ObjectHandle, error) {
	if object := t.private(id); object != 0 {
		ask := []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, nil), p11.NewAttribute(p11.CKA_ID, nil), p11.NewAttribute(p11.CKA_LABEL, nil)}
		v, err := t.raw.GetAttributeValue(t.copies, object, ask)
		if err == nil && bytes.Equal(v[0].Value, ulong(p11.CKO_PRIVATE_KEY)) && bytes.Equal(v[1].Value, id) && string(v[2].Value) == k.ObjectLabel() {
			return object, nil
		}
	}
	objects, err := find(t.raw.Ctx, t.copies, append(naming(k.KeySpec, id), attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)})...)
	if err != nil {
		return 0, err
	}
	if len(objects) != 1 {
		return 0, hsm.Errorf(hsm.ClassNotFound, "find", "%d private keys in token %s are key %s", len(objects), t.label, k.ID)
	}
	return objects[0], nil
}

// retire ends a signer. The caller holds making.
func (t *Token) retire(s *signer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sign = nil
	if s.copied != 0 {
		if err := t.raw.DestroyObject(t.copies, s.copied); err != nil {
			t.log.Error("removing a key's copy in memory", "error", err)
		}
		s.copied = 0
	}
}

// digestInfo is what comes before a SHA-256 digest in a PKCS#1 v1.5 signature.
var digestInfo = []byte{0x30, 0x31, 0x30, 0x0D, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}

// rawSign signs without crypto11.
func (t *Token) rawSign(session p11.SessionHandle, object p11.ObjectHandle, a hsm.Algorithm, digest []byte) ([]byte, error) {
	k := kinds[a]
	if err := t.raw.SignInit(session, []*p11.Mechanism{p11.NewMechanism(k.sign, nil)}, object); err != nil {
		return nil, err
	}
	if k.bits > 0 {
		digest = slices.Concat(digestInfo, digest)
	}
	sig, err := t.raw.Sign(session, digest)
	if err != nil || k.sign != p11.CKM_ECDSA {
		return sig, err
	}
	if len(sig) == 0 || len(sig)%2 != 0 {
		return nil, hsm.Errorf(hsm.ClassDevice, "sign", "the module made a signature of %d octets", len(sig))
	}
	r, s := new(big.Int).SetBytes(sig[:len(sig)/2]), new(big.Int).SetBytes(sig[len(sig)/2:])
	return asn1.Marshal(struct{ R, S *big.Int }{r, s})
}

// What is wrong with a key that prove has refused.
var (
	errOtherKey   = errors.New("the private key does not belong to the public key")
	errCannotSign = errors.New("the private key cannot sign")
)

// prove has a private key sign something of this process's making, and verifies it in Go. Such signatures are logged
// with the challenges (class pop), since every signature of a key must have a record. An error of ClassRequest is
// errOtherKey or errCannotSign.
func (t *Token) prove(id hsm.KeyID, a hsm.Algorithm, pub crypto.PublicKey, sign func([]byte) ([]byte, error)) error {
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce) // documented never to fail
	digest := a.Digest(bytes.Join([][]byte{[]byte("hsmd-import-check-v1"), []byte(id), nonce}, nil))
	t.log.Info("signing", "class", "pop", "key", id, "digest", digest)
	sig, err := sign(digest)
	if err != nil {
		if e := opaque("prove", err); hsm.ClassOf(e) != hsm.ClassRequest {
			return e
		}
		return hsm.Errorf(hsm.ClassRequest, "prove", "%w: %w", errCannotSign, err)
	}
	if hsm.Verify(pub, digest, sig) != nil {
		return hsm.Errorf(hsm.ClassRequest, "prove", "%w", errOtherKey)
	}
	return nil
}

// proves is prove for an object in the management session.
func (t *Token) proves(object p11.ObjectHandle, id hsm.KeyID, a hsm.Algorithm, pub crypto.PublicKey) error {
	return t.prove(id, a, pub, func(digest []byte) ([]byte, error) { return t.rawSign(t.session, object, a, digest) })
}

// sessions lends sessions of a logged-in token, at most so many at once.
type sessions struct {
	ctx  *p11.Ctx
	slot uint
	wait time.Duration
	idle chan p11.SessionHandle // 0 is one that is not open yet
}

func newSessions(ctx *p11.Ctx, slot uint, limit int, wait time.Duration) *sessions {
	s := &sessions{ctx: ctx, slot: slot, wait: wait, idle: make(chan p11.SessionHandle, limit)}
	for range limit {
		s.idle <- 0
	}
	return s
}

// with runs f in a session of its own. One in which something failed is closed, because an operation may still be active.
func (s *sessions) with(f func(p11.SessionHandle) error) (err error) {
	var h p11.SessionHandle
	select {
	case h = <-s.idle:
	default:
		late := time.NewTimer(s.wait)
		defer late.Stop()
		select {
		case h = <-s.idle:
		case <-late.C:
			return hsm.Errorf(hsm.ClassDevice, "sign", "no session became free within %s", s.wait)
		}
	}
	if h == 0 {
		if h, err = s.ctx.OpenSession(s.slot, p11.CKF_SERIAL_SESSION); err != nil {
			s.idle <- 0
			return err
		}
	}
	if err = f(h); err != nil {
		_ = s.ctx.CloseSession(h) // the cause counts
		h = 0
	}
	s.idle <- h
	return err
}
