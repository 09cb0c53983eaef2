package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/hmac"
	"errors"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// errRefused is the one answer to a blob that is not right, whatever is wrong with it.
var errRefused = errors.New("the wrapped key was refused")

// Generate makes a key pair. Repeated with the same spec it returns the key that is there; what a process that died in
// the middle of it has left is removed first; an id taken by anything else is ClassRequest. An Ed25519 key is made
// non-extractable whatever spec says, since nothing could wrap it.
func (t *Token) Generate(spec hsm.KeySpec) (hsm.KeyRecord, error) {
	const op = "generate"
	if err := spec.Check(); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if spec.Purpose == hsm.PurposeProbe {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "probe keys are made by the token's own agent")
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	return t.generate(spec)
}

func (t *Token) generate(spec hsm.KeySpec) (hsm.KeyRecord, error) {
	const op = "generate"
	spec.NonExtractable = spec.NonExtractable || !spec.Algorithm.Cloneable()
	id, err := spec.ID.Bytes()
	if err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	p, err := t.pair(id)
	if err != nil {
		return p.record, classify(op, err)
	}
	if p.record.KeySpec == spec && p.record.Fault == "" {
		pub, err := parseSPKI(spec.Algorithm, p.record.SPKI)
		if err == nil {
			err = t.proves(p.privates[0], spec.ID, spec.Algorithm, pub)
		}
		if err == nil {
			return t.learn(p.record), nil
		} else if !errors.Is(err, errCannotSign) {
			return p.record, classify(op, err)
		}
	}
	if !p.empty() {
		if err := t.clear(p, spec); err != nil {
			return p.record, classify(op, err)
		}
	}
	k := kinds[spec.Algorithm]
	if !t.raw.offers(t.slot, k.generate, p11.CKF_GENERATE_KEY_PAIR) || !t.raw.offers(t.slot, k.sign, p11.CKF_SIGN) {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "token %s cannot make %s keys", t.label, spec.Algorithm)
	}
	public, private, err := t.raw.GenerateKeyPair(t.session, []*p11.Mechanism{p11.NewMechanism(k.generate, nil)},
		template(naming(spec, id), k.generation(), t.raw.profile.keeps(publicPolicy())),
		template(naming(spec, id), t.raw.profile.privatePolicy(!spec.NonExtractable)))
	if err != nil {
		t.doubt(id) // perhaps it was made
		return hsm.KeyRecord{}, classify(op, err)
	}
	t.holds(id, handles{privates: []p11.ObjectHandle{private}, publics: []p11.ObjectHandle{public}})
	record, err := t.asMade(spec, id, private)
	if err != nil {
		t.doubt(id)
		if gone := t.remove(private, public); gone != nil {
			t.log.Error("removing a key that came out wrong", "key", spec.ID, "error", gone)
		}
		return record, classify(op, err)
	}
	return t.learn(record), nil
}

// asMade reads back a key pair just generated.
func (t *Token) asMade(spec hsm.KeySpec, id []byte, private p11.ObjectHandle) (hsm.KeyRecord, error) {
	if err := t.fixUsage(private); err != nil {
		return hsm.KeyRecord{}, err
	}
	p, err := t.pair(id)
	if err != nil {
		return p.record, err
	}
	if p.record.Fault != "" || p.record.KeySpec != spec {
		return p.record, hsm.Errorf(hsm.ClassDevice, "generate", "the key just made reads back wrong (%s): %+v", p.record.Fault, p.record.KeySpec)
	}
	return p.record, t.obeysPolicy(private, !spec.NonExtractable)
}

// clear removes what is under an id when it is plainly the remains of a key of that spec that was never finished: all of
// it has the spec's label, and there is no private key that can sign. Anything else is an operator's matter.
func (t *Token) clear(p pair, spec hsm.KeySpec) error {
	taken := hsm.Errorf(hsm.ClassRequest, "find", "id %s is taken by another key in token %s", spec.ID, t.label)
	for _, object := range append(p.privates, p.publics...) {
		if v, err := t.read(object, p11.CKA_LABEL); err != nil {
			return err
		} else if string(v[0]) != spec.ObjectLabel() {
			return taken
		}
	}
	for _, object := range p.privates {
		if p.record.Algorithm == "" {
			continue // hollow
		}
		digest := p.record.Algorithm.Digest([]byte("hsmd-whole-v1"))
		t.log.Info("signing", "class", "pop", "key", spec.ID, "digest", digest)
		_, err := t.rawSign(t.session, object, p.record.Algorithm, digest)
		if err == nil {
			return taken
		} else if e := opaque("find", err); hsm.ClassOf(e) != hsm.ClassRequest {
			return e
		} else if !t.signsWithProbe() { // it is the token that cannot sign
			return asIs("find", err)
		}
	}
	t.log.Warn("removing an unfinished key", "key", spec.ID, "token", t.label, "fault", p.record.Fault)
	t.forget(spec.ID)
	id, err := spec.ID.Bytes()
	if err != nil {
		return err
	}
	return t.removePair(id, p)
}

// removePair removes all that is under one id, the private half first.
func (t *Token) removePair(id []byte, p pair) error {
	if err := t.remove(append(p.privates, p.publics...)...); err != nil {
		t.doubt(id)
		return err
	}
	t.holds(id, handles{})
	return nil
}

// fixUsage takes from a private key the uses that the module has given it against its template.
func (t *Token) fixUsage(object p11.ObjectHandle) error {
	if !t.raw.profile.FixUsage {
		return nil
	}
	flags, err := t.flags(t.object(object))
	if err != nil {
		return err
	}
	var wrong []attribute
	for _, a := range forced {
		if flags[a.kind] {
			wrong = append(wrong, a)
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	return t.raw.SetAttributeValue(t.session, object, template(wrong))
}

// Export wraps a key with the domain key called kek, or the current one, and authenticates what belongs to it.
func (t *Token) Export(id hsm.KeyID, kek string) (hsm.Blob, error) {
	const op = "export"
	ckaID, err := id.Bytes()
	if err != nil {
		return hsm.Blob{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	k, err := t.Key(id)
	if err != nil {
		return hsm.Blob{}, err
	}
	switch { // before the module is asked: not every module refuses
	case k.Purpose == hsm.PurposeProbe:
		err = errors.New("probe keys stay in their token")
	case !k.Algorithm.Cloneable():
		err = errors.New("key " + string(id) + " cannot be cloned: no token wraps " + string(k.Algorithm) + " keys")
	case k.NonExtractable:
		err = errors.New("key " + string(id) + " cannot be cloned: it was made non-extractable and never leaves its token")
	}
	if err != nil {
		return hsm.Blob{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domain(op, kek)
	if err != nil {
		return hsm.Blob{}, err
	}
	p, err := t.pair(ckaID)
	if err != nil {
		return hsm.Blob{}, classify(op, err)
	}
	if k = p.record; len(p.privates) == 0 || k.Fault != "" || k.Foreign || k.NonExtractable {
		return hsm.Blob{}, hsm.Errorf(hsm.ClassNotFound, op, "key %s is no longer usable in token %s: %s", id, t.label, k.Fault)
	}
	wrapped, err := t.raw.wrap(t.session, t.keyWrapPad, d.kek, p.privates[0])
	if err != nil {
		return hsm.Blob{}, classify(op, err)
	}
	b := hsm.Blob{KeySpec: k.KeySpec, SPKI: k.SPKI, KEK: d.name, Wrapped: wrapped}
	if b.MAC, err = t.mac(d.mac, b.Authenticated()); err != nil {
		return hsm.Blob{}, classify(op, err)
	}
	return b, nil
}

// Import brings a key in and returns it when it has made a signature that blob.SPKI verifies, so that it is durable,
// whole and the right one. Repeating it returns the key that is there; what a process that died has left of it is
// completed or replaced. Whatever this call made is removed again when the call fails; nothing else is.
func (t *Token) Import(b hsm.Blob) (hsm.KeyRecord, error) {
	const op = "import"
	if err := b.Check(); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	in, err := newArrival(op, b.KeySpec, b.SPKI)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domain(op, b.KEK)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	want, err := t.mac(d.mac, b.Authenticated())
	if err != nil {
		return hsm.KeyRecord{}, classify(op, err)
	}
	if !hmac.Equal(want, b.MAC) {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", errRefused)
	}
	in.with, in.wrapped = d.kek, b.Wrapped
	k, err := t.bringIn(in)
	return k, classify(op, err)
}

// Adopt takes in a key that hsm.Seal closed for this token's transport key. It holds to the same rules as Import.
func (t *Token) Adopt(spec hsm.KeySpec, spki, sealed []byte) (hsm.KeyRecord, error) {
	const op, head = "adopt", hsm.TransportBits / 8
	if err := spec.Check(); err != nil {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if !spec.Algorithm.Cloneable() {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "%s keys cannot come in from outside: no token unwraps them", spec.Algorithm)
	}
	if n := len(sealed) - head; n < 24 || n > hsm.MaxBlob || n%8 != 0 {
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, op, "sealed key of %d octets: must be %d and a multiple of 8 between 24 and %d", len(sealed), head, hsm.MaxBlob)
	}
	in, err := newArrival(op, spec, spki)
	if err != nil {
		return hsm.KeyRecord{}, err
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	transport, err := t.transportPrivate()
	if err != nil {
		return hsm.KeyRecord{}, classify(op, err)
	}
	if in.with, err = t.raw.unwrap(t.session, p11.CKM_RSA_PKCS_OAEP, transport, sealed[:head],
		template(secret(p11.CKK_AES, "adopt"), t.raw.profile.keeps(kekPolicy(false)))); err != nil {
		return hsm.KeyRecord{}, opaque(op, err)
	}
	defer func() { _ = t.remove(in.with) }() // a session object: gone with the process at the latest
	in.wrapped = sealed[head:]
	k, err := t.bringIn(in)
	return k, classify(op, err)
}

// arrival is a private key on its way in.
type arrival struct {
	op      string
	spec    hsm.KeySpec
	id      []byte
	spki    []byte
	pub     crypto.PublicKey
	with    p11.ObjectHandle // unwraps wrapped
	wrapped []byte
}

func newArrival(op string, spec hsm.KeySpec, spki []byte) (arrival, error) {
	if spec.Purpose == hsm.PurposeProbe {
		return arrival{}, hsm.Errorf(hsm.ClassRequest, op, "probe keys stay in their token")
	}
	pub, err := parseSPKI(spec.Algorithm, spki)
	if err != nil {
		return arrival{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	id, err := spec.ID.Bytes()
	if err != nil {
		return arrival{}, hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	return arrival{op: op, spec: spec, id: id, spki: spki, pub: pub}, nil
}

// template is what the private key is to look like.
func (t *Token) arrivalTemplate(in arrival) ([]*p11.Attribute, error) {
	lines := []attribute{{p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)}, {p11.CKA_KEY_TYPE, kinds[in.spec.Algorithm].keyType}}
	if kind := t.raw.profile.ECPoint; kind != 0 && kinds[in.spec.Algorithm].keyType == p11.CKK_EC {
		point, err := pointOf(in.pub)
		if err != nil {
			return nil, err
		}
		lines = append(lines, attribute{kind, point})
	}
	return template(lines, naming(in.spec, in.id), t.raw.profile.privatePolicy(!in.spec.NonExtractable)), nil
}

// bringIn unwraps a key unless it is there already, has it sign, makes its public half, and reads the pair back.
func (t *Token) bringIn(in arrival) (k hsm.KeyRecord, err error) {
	p, err := t.pair(in.id)
	if err != nil {
		return k, err
	}
	taken := hsm.Errorf(hsm.ClassRequest, in.op, "id %s is taken by another key in token %s", in.spec.ID, t.label)
	if len(p.record.SPKI) > 0 && !bytes.Equal(p.record.SPKI, in.spki) || p.record.Foreign || len(p.publics) > 1 {
		return k, taken
	}
	var object p11.ObjectHandle
	if len(p.privates) == 1 {
		if p.record.Algorithm != "" && p.record.KeySpec != in.spec {
			return k, taken
		}
		object = p.privates[0]
		switch err = t.proves(object, in.spec.ID, in.spec.Algorithm, in.pub); {
		case err == nil:
		case errors.Is(err, errOtherKey):
			return k, taken
		case hsm.ClassOf(err) == hsm.ClassRequest: // it cannot sign: left by a process that died
			if err := t.clear(p, in.spec); err != nil {
				return k, err
			}
			p, object = pair{}, 0
		default:
			return k, err
		}
	}
	var made []p11.ObjectHandle
	defer func() {
		if err != nil {
			t.doubt(in.id) // perhaps more was made than is known
		}
		if err != nil && len(made) > 0 {
			if gone := t.remove(made...); gone != nil {
				t.log.Error("removing the key of a failed import", "key", in.spec.ID, "error", gone)
			}
		}
	}()
	if object == 0 {
		lines, err := t.arrivalTemplate(in)
		if err != nil {
			return k, err
		}
		if object, err = t.raw.unwrap(t.session, t.keyWrapPad, in.with, in.wrapped, lines); err != nil {
			// The sender is told nothing of it; whoever looks after this token wants to know.
			t.log.Warn("the module refused to unwrap a key", "key", in.spec.ID, "token", t.label, "error", err)
			return k, opaque(in.op, err)
		}
		made = append(made, object)
		t.holds(in.id, handles{privates: []p11.ObjectHandle{object}, publics: p.publics})
		if err := t.proves(object, in.spec.ID, in.spec.Algorithm, in.pub); err != nil {
			return k, err
		}
	}
	if err := t.fixUsage(object); err != nil {
		return k, err
	}
	if err := t.obeysPolicy(object, !in.spec.NonExtractable); err != nil {
		return k, err
	}
	if len(p.publics) == 0 {
		lines, err := publicTemplate(in.spec.Algorithm, in.pub)
		if err != nil {
			return k, err
		}
		public, err := t.raw.CreateObject(t.session, template(lines, naming(in.spec, in.id), t.raw.profile.keeps(publicPolicy())))
		if err != nil {
			return k, err
		}
		made = append(made, public)
		t.holds(in.id, handles{privates: []p11.ObjectHandle{object}, publics: []p11.ObjectHandle{public}})
	}
	if p, err = t.pair(in.id); err != nil {
		return k, err
	}
	if k = p.record; k.Fault != "" || k.KeySpec != in.spec || !bytes.Equal(k.SPKI, in.spki) {
		return k, hsm.Errorf(hsm.ClassDevice, in.op, "the key just brought in reads back wrong (%s): %+v", k.Fault, k.KeySpec)
	}
	return t.learn(k), nil
}

// Destroy removes the key with that id and public key, the private half first. It does nothing where there is none, and
// refuses, with everything left as it is, where another key has that id. Signatures under way are finished before.
func (t *Token) Destroy(id hsm.KeyID, spki []byte) error {
	const op = "destroy"
	ckaID, err := id.Bytes()
	if err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	a, pub, err := anyKey(spki)
	if err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	p, err := t.pair(ckaID)
	if err != nil {
		return classify(op, err)
	}
	if !p.empty() {
		other := hsm.Errorf(hsm.ClassRequest, op, "id %s is another key in token %s, which is left alone", id, t.label)
		if p.record.Foreign || p.record.Purpose == hsm.PurposeProbe || len(p.publics) > 1 || len(p.record.SPKI) > 0 && !bytes.Equal(p.record.SPKI, spki) {
			return other
		}
		for _, object := range p.privates { // one that cannot sign at all is as good as gone
			if p.record.Algorithm == "" {
				continue
			}
			if p.record.Algorithm != a {
				return other
			}
			switch err := t.proves(object, id, a, pub); {
			case err == nil, errors.Is(err, errCannotSign) && t.signsWithProbe():
			case errors.Is(err, errOtherKey):
				return other
			default:
				return asIs(op, err)
			}
		}
	}
	t.forget(id)
	return classify(op, t.removePair(ckaID, p))
}

// anyKey parses a public key whatever its kind.
func anyKey(spki []byte) (hsm.Algorithm, crypto.PublicKey, error) {
	for _, a := range hsm.Algorithms() {
		if pub, err := parseSPKI(a, spki); err == nil {
			return a, pub, nil
		}
	}
	return "", nil, errors.New("the spki is no public key of a known kind in canonical DER")
}

// ensureProbe finds or makes the token's own probe key, which can never leave it, and removes what is left of others.
func (t *Token) ensureProbe() error {
	const name = "self"
	var broken []hsm.KeyRecord
	t.mu.RLock()
	for _, k := range t.keys {
		switch {
		case k.Purpose != hsm.PurposeProbe || k.Label != name:
		case k.Fault != "":
			broken = append(broken, k)
		case t.probe.ID == "" || k.ID < t.probe.ID:
			t.probe = k
		}
	}
	t.mu.RUnlock()
	for _, k := range broken {
		id, err := k.ID.Bytes()
		if err != nil {
			return classify("probe", err)
		}
		p, err := t.pair(id)
		if err == nil {
			t.forget(k.ID)
			err = t.removePair(id, p)
		}
		if err != nil {
			return classify("probe", err)
		}
	}
	if t.probe.ID != "" {
		return nil
	}
	k, err := t.generate(hsm.KeySpec{ID: hsm.NewKeyID(), Label: name, Purpose: hsm.PurposeProbe, Algorithm: hsm.P256, NonExtractable: true})
	t.probe = k
	return err
}
