package pkcs11

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"math/big"

	"github.com/ThalesIgnite/crypto11"
	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// Sign returns the ASN.1 ECDSA signature over one SHA-256 digest.
func (t *Token) Sign(id hsm.KeyID, digest []byte) ([]byte, error) {
	if len(digest) != hsm.DigestSize {
		return nil, hsm.Errorf(hsm.ClassRequest, "sign", "digest of %d octets: must be %d", len(digest), hsm.DigestSize)
	}
	signer, err := t.signer(id)
	if err != nil {
		return nil, err
	}
	sig, err := signer.Sign(rand.Reader, digest, crypto.SHA256)
	return sig, classify("sign", err)
}

// signer finds the key pair once; its handle then holds for the life of the process.
func (t *Token) signer(id hsm.KeyID) (crypto11.Signer, error) {
	t.mu.RLock()
	s := t.signers[id]
	t.mu.RUnlock()
	if s != nil {
		return s, nil
	}
	k, err := t.Key(id)
	if err != nil {
		return nil, err
	}
	ckaID, err := id.Bytes()
	if err != nil {
		return nil, hsm.Errorf(hsm.ClassRequest, "sign", "%w", err)
	}
	s, err = t.p11.FindKeyPair(ckaID, []byte(k.ObjectLabel()))
	if err != nil {
		return nil, classify("find", err)
	}
	t.mu.Lock()
	t.signers[id] = s
	t.mu.Unlock()
	return s, nil
}

// Generate makes a key pair that can be cloned. Repeated with the same spec it returns the key that is there; an id
// taken by anything else is ClassRequest.
func (t *Token) Generate(spec hsm.KeySpec) (hsm.KeyRecord, error) {
	if err := spec.Check(); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "generate", "%w", err)
	}
	if spec.Purpose == hsm.PurposeProbe {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "generate", "probe keys are made by the token's own agent")
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	return t.generate(spec, true)
}

func (t *Token) generate(spec hsm.KeySpec, extractable bool) (hsm.KeyRecord, error) {
	id, err := spec.ID.Bytes()
	if err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "generate", "%w", err)
	}
	switch k, object, err := t.existing(id); {
	case err != nil:
		return k, classify("generate", err)
	case object != 0 && k.KeySpec == spec && k.Fault == "":
		return t.learn(k), nil
	case object != 0:
		return k, hsm.Errorf(hsm.ClassRequest, "generate", "id %s is taken by another key in token %s", spec.ID, t.label)
	}
	public, err := attributeSet(naming(spec, id), publicPolicy())
	if err != nil {
		return hsm.KeyRecord{}, classify("generate", err)
	}
	private, err := attributeSet(naming(spec, id), privatePolicy(extractable))
	if err != nil {
		return hsm.KeyRecord{}, classify("generate", err)
	}
	if _, err := t.p11.GenerateECDSAKeyPairWithAttributes(public, private, elliptic.P256()); err != nil {
		return hsm.KeyRecord{}, classify("generate", err)
	}
	k, object, err := t.existing(id)
	if err != nil {
		return k, classify("generate", err)
	}
	if object == 0 || k.Fault != "" || k.KeySpec != spec {
		return k, hsm.Errorf(hsm.ClassDevice, "generate", "the key just made reads back wrong: %s", k.Fault)
	}
	if err := t.obeysPolicy(object, extractable); err != nil {
		return k, classify("generate", err)
	}
	return t.learn(k), nil
}

// learn enters a record into what Key answers from.
func (t *Token) learn(k hsm.KeyRecord) hsm.KeyRecord {
	t.mu.Lock()
	t.keys[k.ID] = k
	t.mu.Unlock()
	return k
}

// existing reads the private key with that id; object is 0 when there is none.
func (t *Token) existing(id []byte) (k hsm.KeyRecord, object p11.ObjectHandle, err error) {
	objects, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)}, attribute{p11.CKA_ID, id})
	if err != nil || len(objects) == 0 {
		return k, 0, err
	}
	if len(objects) > 1 {
		return k, 0, hsm.Errorf(hsm.ClassRequest, "find", "%d private keys in token %s have id %x: an operator must look", len(objects), t.label, id)
	}
	k, _, err = t.record(objects[0])
	return k, objects[0], err
}

// Export wraps a key with the domain key and authenticates what belongs to it.
func (t *Token) Export(id hsm.KeyID) (hsm.Blob, error) {
	ckaID, err := id.Bytes()
	if err != nil {
		return hsm.Blob{}, hsm.Errorf(hsm.ClassRequest, "export", "%w", err)
	}
	k, err := t.Key(id)
	if err != nil {
		return hsm.Blob{}, err
	}
	if k.Purpose == hsm.PurposeProbe {
		return hsm.Blob{}, hsm.Errorf(hsm.ClassRequest, "export", "probe keys stay in their token")
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	domain, err := t.domainKeys("export")
	if err != nil {
		return hsm.Blob{}, err
	}
	k, object, err := t.existing(ckaID)
	if err != nil {
		return hsm.Blob{}, classify("export", err)
	}
	if object == 0 || k.Fault != "" {
		return hsm.Blob{}, hsm.Errorf(hsm.ClassNotFound, "export", "key %s is no longer usable in token %s: %s", id, t.label, k.Fault)
	}
	wrapped, err := t.raw.WrapKey(t.session, keyWrapPad(), domain.kek, object)
	if err != nil {
		return hsm.Blob{}, classify("export", err)
	}
	b := hsm.Blob{KeySpec: k.KeySpec, SPKI: k.SPKI, KEK: domain.name, Wrapped: wrapped}
	if b.MAC, err = t.mac(domain.mac, b.Authenticated()); err != nil {
		return hsm.Blob{}, classify("export", err)
	}
	return b, nil
}

// Import brings a key in and returns it when it has made a signature that blob.SPKI verifies, so that it is durable,
// whole and the right one. Repeating it returns the key that is there. A key half imported by a process that died is
// completed. Whatever this call made is removed again when the call fails; nothing else ever is.
func (t *Token) Import(b hsm.Blob) (hsm.KeyRecord, error) {
	const op = "import"
	if err := b.Check(); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if b.Purpose == hsm.PurposeProbe {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "probe keys stay in their token")
	}
	pub, err := parseSPKI(b.SPKI)
	if err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	id, _ := b.ID.Bytes() // checked above

	t.manage.Lock()
	defer t.manage.Unlock()
	domain, err := t.domainKeys(op)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	if domain.name != b.KEK {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "the blob is wrapped with domain key %q, token %s holds %q", b.KEK, t.label, domain.name)
	}
	want, err := t.mac(domain.mac, b.Authenticated())
	if err != nil {
		return hsm.KeyRecord{}, classify(op, err)
	}
	if !hmac.Equal(want, b.MAC) {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "the wrapped key was refused")
	}

	k, object, err := t.existing(id)
	if err != nil {
		return hsm.KeyRecord{}, classify(op, err)
	}
	if object != 0 {
		if k.KeySpec != b.KeySpec || len(k.SPKI) > 0 && string(k.SPKI) != string(b.SPKI) {
			return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "id %s is taken by another key in token %s", b.ID, t.label)
		}
		if err := t.proves(object, b.ID, pub); err != nil {
			return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "id %s is taken by a key that does not sign: an operator must look: %w", b.ID, err)
		}
		return t.complete(b, id, pub)
	}

	object, err = t.raw.UnwrapKey(t.session, keyWrapPad(), domain.kek, b.Wrapped, template(
		[]attribute{{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)}, {p11.CKA_KEY_TYPE, uint(p11.CKK_EC)}},
		naming(b.KeySpec, id), privatePolicy(true)))
	if err != nil {
		return hsm.KeyRecord{}, opaque(op, err)
	}
	err = t.proves(object, b.ID, pub)
	if err == nil {
		err = t.obeysPolicy(object, true)
	}
	if err == nil {
		k, err = t.complete(b, id, pub)
	}
	if err != nil {
		if gone := t.raw.DestroyObject(t.session, object); gone != nil {
			t.log.Error("removing the key of a failed import", "key", b.ID, "error", gone)
		}
		return hsm.KeyRecord{}, classify(op, err)
	}
	return k, nil
}

// complete makes the public half of a proved private key if it is missing, and reads the pair back.
func (t *Token) complete(b hsm.Blob, id []byte, pub *ecdsa.PublicKey) (hsm.KeyRecord, error) {
	spki, fault, err := t.publicHalf(id)
	if err != nil {
		return hsm.KeyRecord{}, classify("import", err)
	}
	if fault == noPublic {
		point, err := ecPoint(pub)
		if err != nil {
			return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "import", "%w", err)
		}
		if _, err := t.raw.CreateObject(t.session, template(
			[]attribute{{p11.CKA_CLASS, uint(p11.CKO_PUBLIC_KEY)}, {p11.CKA_KEY_TYPE, uint(p11.CKK_EC)}, {p11.CKA_EC_PARAMS, oidP256}, {p11.CKA_EC_POINT, point}},
			naming(b.KeySpec, id), publicPolicy())); err != nil {
			return hsm.KeyRecord{}, classify("import", err)
		}
	} else if fault != "" || string(spki) != string(b.SPKI) {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "import", "token %s holds another public key with id %s (%s): an operator must look", t.label, b.ID, fault)
	}
	k, _, err := t.existing(id)
	if err != nil {
		return k, classify("import", err)
	}
	if k.Fault != "" || k.KeySpec != b.KeySpec || string(k.SPKI) != string(b.SPKI) {
		return k, hsm.Errorf(hsm.ClassDevice, "import", "the key just imported reads back wrong: %s", k.Fault)
	}
	return t.learn(k), nil
}

// proves has a private key sign a digest of this process's making, and verifies it in Go. Such signatures are logged
// with the challenges (class pop), since every signature of a key must have a record.
func (t *Token) proves(object p11.ObjectHandle, id hsm.KeyID, pub *ecdsa.PublicKey) error {
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce) // documented never to fail
	digest := sha256.Sum256(append([]byte("hsmd-import-check-v1"+string(id)), nonce...))
	t.log.Info("signing", "class", "pop", "key", id, "digest", digest[:])
	if err := t.raw.SignInit(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_ECDSA, nil)}, object); err != nil {
		return opaque("import", err)
	}
	sig, err := t.raw.Sign(t.session, digest[:])
	if err != nil {
		return opaque("import", err)
	}
	if len(sig) != 64 || !ecdsa.Verify(pub, digest[:], new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
		return hsm.Errorf(hsm.ClassRequest, "import", "the unwrapped key does not belong to the blob's spki")
	}
	return nil
}

// ensureProbe finds or makes the token's own probe key, which can never leave it.
func (t *Token) ensureProbe() error {
	const name = "self"
	t.mu.RLock()
	for _, k := range t.keys {
		if k.Purpose == hsm.PurposeProbe && k.Label == name && k.Fault == "" {
			t.probe = k
		}
	}
	t.mu.RUnlock()
	if t.probe.ID != "" {
		return nil
	}
	k, err := t.generate(hsm.KeySpec{ID: hsm.NewKeyID(), Label: name, Purpose: hsm.PurposeProbe, Algorithm: hsm.P256}, false)
	t.probe = k
	return err
}
