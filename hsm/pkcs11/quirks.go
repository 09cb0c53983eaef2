package pkcs11

import (
	"slices"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// Profile is what a PKCS#11 module does in a way of its own. What can be found out by trying is not in it: which
// mechanism is RFC 5649 and whether the module keeps non-extractable keys inside are questions for SelfTest.
type Profile struct {
	Name string
	// Manufacturer is how the library's CK_INFO.manufacturerID begins.
	Manufacturer string
	// Directory: C_Initialize must be told the token's directory, in pReserved. crypto11 cannot do that.
	Directory bool
	// EmptySO: there is no C_InitToken to call; the security officer of a new token has the empty PIN.
	EmptySO bool
	// KeyWrapPad are the mechanisms that may be AES key wrap with padding as RFC 5649 has it, the likelier first.
	KeyWrapPad []uint
	// ECPoint is an attribute that the template of an EC private key coming in must carry: 04‖X‖Y.
	ECPoint uint
	// FixUsage: a private key coming in gets uses that its template denies, and they must be taken from it afterwards, so
	// that it cannot be unmodifiable.
	FixUsage bool
	// Lacks are attributes that the module does not keep.
	Lacks []uint
	// DataAsSecret: the module stores no data objects; a secret key stands in for one, and its CKA_ID for the value.
	DataAsSecret bool
	// SessionCopy: keys in the token are slow, because each use decrypts them; sign with a copy in a session.
	SessionCopy bool
	// LostSession are codes by which C_SignInit says that the login is gone, beside those that say it plainly.
	LostSession []uint
}

// Mechanisms and key types of PKCS#11 3.0, for which the binding has no names.
const (
	ckmECEdwardsKeyPairGen = 0x1055
	ckmEDDSA               = 0x1057
	ckmAESKeyWrapKWP       = 0x210B
	ckkECEdwards           = 0x40
)

var (
	// generic is a module that does what the standard says.
	generic = Profile{Name: "generic", KeyWrapPad: []uint{ckmAESKeyWrapKWP, p11.CKM_AES_KEY_WRAP_PAD}}

	softHSM = Profile{Name: "softhsm", Manufacturer: "SoftHSM", KeyWrapPad: []uint{p11.CKM_AES_KEY_WRAP_PAD, ckmAESKeyWrapKWP}}

	// nss is NSS's software token. It wraps whatever it is asked to, keys marked as not extractable included, so that it
	// proves interoperability and protects nothing.
	nss = Profile{
		Name: "nss", Manufacturer: "Mozilla Foundation", Directory: true, EmptySO: true,
		KeyWrapPad: []uint{ckmAESKeyWrapKWP}, // 0x210A is another padding here
		ECPoint:    0xD5A0DB00,               // CKA_NSS_DB
		FixUsage:   true, Lacks: []uint{p11.CKA_COPYABLE},
		DataAsSecret: true, SessionCopy: true, LostSession: []uint{p11.CKR_KEY_TYPE_INCONSISTENT},
	}
)

// Profiles lists the profiles there are.
func Profiles() []Profile { return []Profile{generic, softHSM, nss} }

func profileNamed(name string) (Profile, error) {
	var names []string
	for _, p := range Profiles() {
		if p.Name == name {
			return p, nil
		}
		names = append(names, p.Name)
	}
	return Profile{}, hsm.Errorf(hsm.ClassRequest, "open", "module profile %q is not one of %v", name, names)
}

// profileOf picks the profile by what the library says about itself; an unknown one is generic.
func profileOf(manufacturer string) Profile {
	for _, p := range Profiles() {
		if p.Manufacturer != "" && strings.HasPrefix(manufacturer, p.Manufacturer) {
			return p
		}
	}
	return generic
}

// keeps leaves out of a template what the module does not keep.
func (p Profile) keeps(policy []attribute) []attribute {
	return slices.DeleteFunc(policy, func(a attribute) bool { return slices.Contains(p.Lacks, a.kind) })
}

// lacking are the attributes that a private key's policy has in vain.
func (p Profile) lacking() []uint {
	if p.FixUsage {
		return append([]uint{p11.CKA_MODIFIABLE}, p.Lacks...)
	}
	return p.Lacks
}

// privatePolicy is privatePolicy as far as the module keeps it.
func (p Profile) privatePolicy(extractable bool) []attribute {
	return slices.DeleteFunc(privatePolicy(extractable), func(a attribute) bool { return slices.Contains(p.lacking(), a.kind) })
}
