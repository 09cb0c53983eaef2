package pkcs11

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// A domain is two secret keys with one name: the AES-256 key that wraps, and the HMAC key that authenticates blobs.
// Both travel together, each under RSA-OAEP to the receiving token's transport key. OAEP is with SHA-1, the only hash
// that every module offers here; OAEP's security does not rest on the hash's collision resistance.
//
// A token holds one domain, or two while the group changes from the one to the other. Which is current of two is in a
// note, written before the second comes in, so that there is no moment at which it is in doubt. A half of a domain, left
// by a process that died while it came or went, counts as none, and is removed when another comes in.
const (
	kekPrefix = "trivet-kek:"
	macPrefix = "trivet-mac:"
)

// parseDomainLabel reads the label of one of a domain's keys.
func parseDomainLabel(label string) (prefix, name string, ok bool) {
	for _, p := range []string{kekPrefix, macPrefix} {
		if name, ok := strings.CutPrefix(label, p); ok && hsm.CheckDomainName(name) == nil {
			return p, name, true
		}
	}
	return "", "", false
}

// kekPolicy: wraps and unwraps, and nothing that would turn either into reading a key.
func kekPolicy(token bool) []attribute {
	return []attribute{
		{p11.CKA_TOKEN, token}, {p11.CKA_PRIVATE, true}, {p11.CKA_SENSITIVE, true}, {p11.CKA_EXTRACTABLE, true},
		{p11.CKA_WRAP, true}, {p11.CKA_UNWRAP, true}, {p11.CKA_ENCRYPT, false}, {p11.CKA_DECRYPT, false},
		{p11.CKA_SIGN, false}, {p11.CKA_VERIFY, false}, {p11.CKA_DERIVE, false}, {p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false},
	}
}

func macPolicy(token bool) []attribute {
	return []attribute{
		{p11.CKA_TOKEN, token}, {p11.CKA_PRIVATE, true}, {p11.CKA_SENSITIVE, true}, {p11.CKA_EXTRACTABLE, true},
		{p11.CKA_SIGN, true}, {p11.CKA_VERIFY, true}, {p11.CKA_ENCRYPT, false}, {p11.CKA_DECRYPT, false},
		{p11.CKA_WRAP, false}, {p11.CKA_UNWRAP, false}, {p11.CKA_DERIVE, false}, {p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false},
	}
}

// secret names a secret key. Its id is random, because there are modules that keep one object per id.
func secret(keyType uint, label string) []attribute {
	id, _ := hsm.NewKeyID().Bytes() // well-formed by construction
	return []attribute{{p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)}, {p11.CKA_KEY_TYPE, keyType}, {p11.CKA_ID, id}, {p11.CKA_LABEL, []byte(label)}}
}

// domainKeys are the keys of one domain; 0 is one that is missing.
type domainKeys struct {
	name     string
	kek, mac p11.ObjectHandle
}

func (d domainKeys) whole() bool { return d.kek != 0 && d.mac != 0 }

// domains is what the token holds, in no order but that whole[0] is the current one.
type domains struct{ whole, halves []domainKeys }

func (d domains) names() (current, next string) {
	if len(d.whole) > 0 {
		current = d.whole[0].name
	}
	if len(d.whole) > 1 {
		next = d.whole[1].name
	}
	return current, next
}

// named is the whole domain of that name; empty means the current one.
func (d domains) named(kek string) (domainKeys, bool) {
	i := slices.IndexFunc(d.whole, func(k domainKeys) bool { return kek == "" || k.name == kek })
	if i < 0 {
		return domainKeys{}, false
	}
	return d.whole[i], true
}

// domainOrder is the note that says which domain is current; the highest Sequence counts.
type domainOrder struct {
	Sequence uint64 `json:"sequence"`
	Current  string `json:"current"`
}

func (t *Token) order() (domainOrder, error) {
	notes, err := t.notes(noteDomains)
	o, _ := newest(notes, func(a, b domainOrder) int { return cmp.Compare(a.Sequence, b.Sequence) })
	return o, err
}

// setCurrent makes kek the current one of two.
func (t *Token) setCurrent(kek string) error {
	o, err := t.order()
	if err != nil {
		return err
	}
	if o.Current != kek {
		o = domainOrder{o.Sequence + 1, kek}
	}
	value, err := json.Marshal(o)
	if err != nil {
		return err
	}
	return t.write(noteDomains, value)
}

// known is domains without looking for them, as long as the keys are where they were: see handles.go.
func (t *Token) known() (domains, error) {
	if t.kept != nil && len(t.kept.whole) > 0 && len(t.kept.halves) == 0 && !slices.ContainsFunc(t.kept.whole, func(k domainKeys) bool {
		return !t.labelled(k.kek, kekPrefix+k.name) || !t.labelled(k.mac, macPrefix+k.name)
	}) {
		return *t.kept, nil
	}
	d, err := t.domains()
	if err == nil {
		t.kept = &d
	}
	return d, err
}

func (t *Token) labelled(object p11.ObjectHandle, label string) bool {
	v, err := t.read(object, p11.CKA_LABEL)
	return err == nil && string(v[0]) == label
}

// domains reads what the token holds.
func (t *Token) domains() (d domains, err error) {
	t.kept = nil // whoever asks is about to change it, or does not believe it
	objects, err := t.find(attribute{p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)})
	if err != nil {
		return d, err
	}
	var all []domainKeys
	for _, object := range objects {
		v, err := t.read(object, p11.CKA_LABEL)
		if err != nil {
			return d, err
		}
		prefix, name, ok := parseDomainLabel(string(v[0]))
		if !ok {
			continue
		}
		i := slices.IndexFunc(all, func(k domainKeys) bool { return k.name == name })
		if i < 0 {
			i, all = len(all), append(all, domainKeys{name: name})
		}
		at := &all[i].kek
		if prefix == macPrefix {
			at = &all[i].mac
		}
		if *at != 0 {
			return d, hsm.Errorf(hsm.ClassRequest, "domain", "token %s holds two keys labelled %s: an operator must look", t.label, v[0])
		}
		*at = object
	}
	slices.SortFunc(all, func(a, b domainKeys) int { return strings.Compare(a.name, b.name) })
	for _, k := range all {
		if k.whole() {
			d.whole = append(d.whole, k)
		} else {
			d.halves = append(d.halves, k)
		}
	}
	if len(d.whole) > 1 {
		o, err := t.order()
		if err != nil {
			return d, err
		}
		if i := slices.IndexFunc(d.whole, func(k domainKeys) bool { return k.name == o.Current }); i > 0 {
			d.whole[0], d.whole[i] = d.whole[i], d.whole[0]
		}
	}
	return d, nil
}

// readDomains brings what Info answers up to date.
func (t *Token) readDomains() error {
	d, err := t.domains()
	if err != nil {
		return classify("domain", err)
	}
	t.kept = &d
	t.mu.Lock()
	t.current, t.next = d.names()
	t.mu.Unlock()
	return nil
}

// domain is a domain that the token holds whole, or ClassRequest. Empty is the current one.
func (t *Token) domain(op, kek string) (domainKeys, error) {
	d, err := t.known()
	if err != nil {
		return domainKeys{}, classify(op, err)
	}
	k, ok := d.named(kek)
	switch current, next := d.names(); {
	case ok:
		return k, nil
	case current == "":
		return k, hsm.Errorf(hsm.ClassRequest, op, "token %s holds no domain key yet", t.label)
	case next == "":
		return k, hsm.Errorf(hsm.ClassRequest, op, "token %s holds domain key %q, not %q", t.label, current, kek)
	default:
		return k, hsm.Errorf(hsm.ClassRequest, op, "token %s holds domain keys %q and %q, not %q", t.label, current, next, kek)
	}
}

// admit prepares for a domain to come in: there must be room, the current one is noted as such, and halves are removed.
func (t *Token) admit(op string, d domains) error {
	switch len(d.whole) {
	case 0:
	case 1:
		if err := t.setCurrent(d.whole[0].name); err != nil {
			return err
		}
	default:
		return hsm.Errorf(hsm.ClassRequest, op, "token %s already holds domain keys %q and %q: drop one first", t.label, d.whole[0].name, d.whole[1].name)
	}
	for _, half := range d.halves {
		t.log.Warn("removing half a domain", "domain", half.name, "token", t.label)
		if err := t.removeDomain(half); err != nil {
			return err
		}
	}
	return nil
}

func (t *Token) removeDomain(d domainKeys) error {
	for _, object := range []p11.ObjectHandle{d.mac, d.kek} {
		if object != 0 {
			if err := t.remove(object); err != nil {
				return err
			}
		}
	}
	return nil
}

// GenerateDomain makes the domain called kek. It does nothing when the token holds it.
func (t *Token) GenerateDomain(kek string) error {
	const op = "generate-domain"
	if err := hsm.CheckDomainName(kek); err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domains()
	if err != nil {
		return classify(op, err)
	}
	if _, held := d.named(kek); held {
		return nil
	}
	if err := t.admit(op, d); err != nil {
		return classify(op, err)
	}
	for _, k := range []struct {
		mechanism uint
		template  []*p11.Attribute
	}{
		{p11.CKM_AES_KEY_GEN, template(secret(p11.CKK_AES, kekPrefix+kek), []attribute{{p11.CKA_VALUE_LEN, 32}}, t.raw.profile.keeps(kekPolicy(true)))},
		{p11.CKM_GENERIC_SECRET_KEY_GEN, template(secret(p11.CKK_GENERIC_SECRET, macPrefix+kek), []attribute{{p11.CKA_VALUE_LEN, 32}}, t.raw.profile.keeps(macPolicy(true)))},
	} {
		if _, err := t.raw.GenerateKey(t.session, []*p11.Mechanism{p11.NewMechanism(k.mechanism, nil)}, k.template); err != nil {
			return classify(op, err)
		}
	}
	return t.readDomains()
}

// ExportDomain wraps the domain called kek, or the current one, for the token with that transport key. Whether the key
// really is a token's is for the caller to know: whoever holds its private half learns every key of the group.
func (t *Token) ExportDomain(kek string, transport []byte) (wrapped []byte, name string, err error) {
	const op = "export-domain"
	pub, err := hsm.ParseTransport(transport)
	if err != nil {
		return nil, "", hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domain(op, kek)
	if err != nil {
		return nil, "", err
	}
	to, err := t.recipient(pub)
	if err != nil {
		return nil, "", opaque(op, err)
	}
	defer func() { _ = t.remove(to) }() // a session object: gone with the process at the latest
	for _, object := range []p11.ObjectHandle{d.kek, d.mac} {
		half, err := t.raw.wrap(t.session, p11.CKM_RSA_PKCS_OAEP, to, object)
		if err != nil {
			return nil, "", classify(op, err)
		}
		wrapped = append(wrapped, half...)
	}
	return wrapped, d.name, nil
}

// ImportDomain takes the domain called kek as wrapped by ExportDomain for this token's transport key. It does nothing
// when the token holds that very domain, and refuses when it holds another with the same name.
func (t *Token) ImportDomain(kek string, wrapped []byte) error {
	const op, half = "import-domain", hsm.TransportBits / 8
	if err := hsm.CheckDomainName(kek); err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if len(wrapped) != 2*half {
		return hsm.Errorf(hsm.ClassRequest, op, "wrapped domain key of %d octets: must be %d", len(wrapped), 2*half)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domains()
	if err != nil {
		return classify(op, err)
	}
	transport, err := t.transportPrivate()
	if err != nil {
		return classify(op, err)
	}
	unwrap := func(token bool) (in domainKeys, err error) {
		in.name = kek
		if in.kek, err = t.raw.unwrap(t.session, p11.CKM_RSA_PKCS_OAEP, transport, wrapped[:half], template(secret(p11.CKK_AES, kekPrefix+kek), t.raw.profile.keeps(kekPolicy(token)))); err != nil {
			return in, opaque(op, err)
		}
		if in.mac, err = t.raw.unwrap(t.session, p11.CKM_RSA_PKCS_OAEP, transport, wrapped[half:], template(secret(p11.CKK_GENERIC_SECRET, macPrefix+kek), t.raw.profile.keeps(macPolicy(token)))); err != nil {
			return in, opaque(op, err)
		}
		return in, nil
	}
	// Both halves come in as session objects first: nothing in the token changes unless the whole is good.
	in, err := unwrap(false)
	defer func() { _ = t.removeDomain(in) }()
	if err != nil {
		return err
	}
	if err := t.fit(in); err != nil {
		return opaque(op, err)
	}
	if held, ok := d.named(kek); ok {
		same, err := t.sameDomain(held, in)
		if err == nil && !same {
			err = hsm.Errorf(hsm.ClassRequest, op, "token %s already holds another domain key called %q", t.label, kek)
		}
		return classify(op, err)
	}
	if err := t.admit(op, d); err != nil {
		return classify(op, err)
	}
	if _, err := unwrap(true); err != nil {
		return err // a half that has come in already counts as none
	}
	return t.readDomains()
}

// fit refuses a domain whose keys cannot do their work, or are shorter than they must be. Modules do not agree on telling a
// secret key's length, but it shows when the key is wrapped: 32 octets become 40.
func (t *Token) fit(d domainKeys) error {
	for _, key := range []p11.ObjectHandle{d.kek, d.mac} {
		wrapped, err := t.canary(d.kek, key)
		if err != nil {
			return err
		}
		if len(wrapped) != 40 {
			return hsm.Errorf(hsm.ClassRequest, "import-domain", "a domain consists of two keys of 32 octets")
		}
	}
	_, err := t.mac(d.mac, []byte("canary"))
	return err
}

// sameDomain tells whether two domains are the same: the same canary gives the same octets, since key wrap and HMAC are
// deterministic.
func (t *Token) sameDomain(held, in domainKeys) (bool, error) {
	a, err := t.canary(held.kek, held.mac)
	if err != nil {
		return false, err
	}
	b, err := t.canary(in.kek, in.mac)
	if err != nil {
		return false, err
	}
	// Each has wrapped its own HMAC key: equal octets mean that both keys are equal.
	return bytes.Equal(a, b), nil
}

// canary is key wrapped with kek.
func (t *Token) canary(kek, key p11.ObjectHandle) ([]byte, error) {
	return t.raw.wrap(t.session, t.keyWrapPad, kek, key)
}

// mac is HMAC-SHA256 with a key in the token.
func (t *Token) mac(key p11.ObjectHandle, message []byte) ([]byte, error) {
	if err := t.raw.SignInit(t.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_SHA256_HMAC, nil)}, key); err != nil {
		return nil, err
	}
	return t.raw.Sign(t.session, message)
}

// Rotate makes kek the current domain; the one that was stays until DropDomain.
func (t *Token) Rotate(kek string) error {
	const op = "rotate"
	if err := hsm.CheckDomainName(kek); err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	if _, err := t.domain(op, kek); err != nil {
		return err
	}
	t.kept = nil
	if err := t.setCurrent(kek); err != nil {
		return classify(op, err)
	}
	return t.readDomains()
}

// DropDomain removes the domain called kek. The current one goes only as the last, from a token without keys of a group.
func (t *Token) DropDomain(kek string) error {
	const op = "drop-domain"
	if err := hsm.CheckDomainName(kek); err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	d, err := t.domains()
	if err != nil {
		return classify(op, err)
	}
	if current, next := d.names(); current == kek {
		if next != "" {
			return hsm.Errorf(hsm.ClassRequest, op, "%q is the current domain key of token %s: rotate to %q first", kek, t.label, next)
		}
		list, err := t.inventory()
		if err != nil {
			return err
		}
		for _, k := range list {
			if !k.Foreign && k.Purpose != hsm.PurposeProbe {
				return hsm.Errorf(hsm.ClassRequest, op, "%q is the only domain key of token %s, which still holds key %s: destroy its keys first", kek, t.label, k.ID)
			}
		}
	}
	for _, k := range append(d.whole, d.halves...) {
		if k.name == kek {
			if err := t.removeDomain(k); err != nil {
				return classify(op, err)
			}
		}
	}
	return t.readDomains()
}
