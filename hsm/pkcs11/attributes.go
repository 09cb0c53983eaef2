package pkcs11

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// attribute is one line of a template.
type attribute struct {
	kind  uint
	value any
}

// template keeps the order of its lines, because SoftHSM refuses whatever follows MODIFIABLE=false in an unwrap.
func template(parts ...[]attribute) []*p11.Attribute {
	var out []*p11.Attribute
	for _, part := range parts {
		for _, a := range part {
			out = append(out, p11.NewAttribute(a.kind, a.value))
		}
	}
	return out
}

func naming(spec hsm.KeySpec, id []byte) []attribute {
	return []attribute{{p11.CKA_ID, id}, {p11.CKA_LABEL, []byte(spec.ObjectLabel())}}
}

// privatePolicy is what every private key of ours looks like, generated or imported: it signs and does nothing else,
// and nobody can change that afterwards, its label (and so its purpose) included. MODIFIABLE stays last.
func privatePolicy(extractable bool) []attribute {
	return []attribute{
		{p11.CKA_TOKEN, true}, {p11.CKA_PRIVATE, true}, {p11.CKA_SENSITIVE, true}, {p11.CKA_SIGN, true},
		{p11.CKA_EXTRACTABLE, extractable},
		{p11.CKA_SIGN_RECOVER, false}, {p11.CKA_DECRYPT, false}, {p11.CKA_UNWRAP, false}, {p11.CKA_DERIVE, false},
		{p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false},
	}
}

// forced are the uses that a module with FixUsage gives to keys coming in, whatever the template says.
var forced = []attribute{{p11.CKA_SIGN_RECOVER, false}, {p11.CKA_DECRYPT, false}, {p11.CKA_UNWRAP, false}, {p11.CKA_DERIVE, false}}

func publicPolicy() []attribute {
	return []attribute{
		{p11.CKA_TOKEN, true}, {p11.CKA_PRIVATE, false}, {p11.CKA_VERIFY, true},
		{p11.CKA_ENCRYPT, false}, {p11.CKA_WRAP, false}, {p11.CKA_VERIFY_RECOVER, false}, {p11.CKA_DERIVE, false},
		{p11.CKA_COPYABLE, false}, {p11.CKA_MODIFIABLE, false},
	}
}

// digested are the attributes whose digest a clone shares with its original, in this order. LOCAL, ALWAYS_SENSITIVE and
// NEVER_EXTRACTABLE differ by nature and are left out.
var digested = []struct {
	kind uint
	name string
}{
	{p11.CKA_TOKEN, "TOKEN"}, {p11.CKA_PRIVATE, "PRIVATE"}, {p11.CKA_SENSITIVE, "SENSITIVE"}, {p11.CKA_EXTRACTABLE, "EXTRACTABLE"},
	{p11.CKA_WRAP_WITH_TRUSTED, "WRAP_WITH_TRUSTED"}, {p11.CKA_SIGN, "SIGN"}, {p11.CKA_SIGN_RECOVER, "SIGN_RECOVER"},
	{p11.CKA_DECRYPT, "DECRYPT"}, {p11.CKA_UNWRAP, "UNWRAP"}, {p11.CKA_DERIVE, "DERIVE"}, {p11.CKA_MODIFIABLE, "MODIFIABLE"},
	{p11.CKA_COPYABLE, "COPYABLE"}, {p11.CKA_ALWAYS_AUTHENTICATE, "ALWAYS_AUTHENTICATE"},
}

// flags reads the digested attributes of a private key. One that the module does not know is false; one that it does not
// keep (Profile) is taken for what the policy says, so that a clone in another vendor's token has the same digest.
func (t *Token) flags(o object) (map[uint]bool, error) {
	out := make(map[uint]bool, len(digested))
	ask := t.flagKinds()
	values, err := o.read(ask...)
	if is(err, p11.CKR_ATTRIBUTE_TYPE_INVALID) { // one of them is unknown: ask one by one
		values = make([][]byte, len(ask))
		for i, kind := range ask {
			v, err := o.read(kind)
			switch {
			case is(err, p11.CKR_ATTRIBUTE_TYPE_INVALID):
			case err != nil:
				return nil, err
			default:
				values[i] = v[0]
			}
		}
	} else if err != nil {
		return nil, err
	}
	for i, kind := range ask {
		out[kind] = isTrue(values[i])
	}
	return out, nil
}

// flagKinds are the digested attributes that the module keeps.
func (t *Token) flagKinds() (kinds []uint) {
	lacking := t.raw.profile.lacking()
	for _, a := range digested {
		if !slices.Contains(lacking, a.kind) {
			kinds = append(kinds, a.kind)
		}
	}
	return kinds
}

// attributeDigest hashes what a private key is and may do, as NAME=value lines.
func attributeDigest(k hsm.KeyRecord, flags map[uint]bool) string {
	h := sha256.New()
	fmt.Fprintf(h, "ALGORITHM=%s\nLABEL=%s\n", k.Algorithm, k.ObjectLabel())
	for _, a := range digested {
		fmt.Fprintf(h, "%s=%t\n", a.name, flags[a.kind])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// obeysPolicy tells whether a private key has exactly the attributes of privatePolicy, as far as the module keeps them.
func (t *Token) obeysPolicy(object p11.ObjectHandle, extractable bool) error {
	got, err := t.flags(t.object(object))
	if err != nil {
		return err
	}
	for _, want := range t.raw.profile.privatePolicy(extractable) {
		if got[want.kind] != want.value {
			return hsm.Errorf(hsm.ClassRequest, "policy", "the token set attribute 0x%X against its template", want.kind)
		}
	}
	return nil
}

func isTrue(b []byte) bool { return len(b) == 1 && b[0] != 0 }
