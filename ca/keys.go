package ca

import (
	"crypto/ecdsa"
	"crypto/rsa"

	"trivet/ca/weakkey"
)

// Bounds of RSA keys, in bits (DESIGN §8).
const (
	minRSA = weakkey.MinRSA
	maxRSA = weakkey.MaxRSA
)

// checkKey says whether a subject key may be certified. A key of a kind that the profile does not permit is key-not-permitted; one that an
// attacker could break, or that known lists, is weak-key.
func (p *Profile) checkKey(pub any, known *weakkey.List) (kind string, err error) {
	weak := func(err error) error {
		return &Error{Name: WeakKey, Field: "csr.public_key", Detail: err.Error()}
	}
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		name := key.Curve.Params().Name
		for _, permitted := range p.Keys.EC {
			if name == permitted {
				if err := weakkey.Check(key, known); err != nil {
					return "", weak(err)
				}
				return "ec", nil
			}
		}
		return "", refuse(KeyNotPermitted, "csr.public_key", "EC keys on %s are not permitted by profile %s: use one of %v", name, p.Name, p.Keys.EC)
	case *rsa.PublicKey:
		if p.Keys.RSA == nil {
			return "", refuse(KeyNotPermitted, "csr.public_key", "RSA keys are not permitted by profile %s", p.Name)
		}
		if err := weakkey.Check(key, known); err != nil {
			return "", weak(err)
		}
		if bits := key.N.BitLen(); bits < p.Keys.RSA.Min || bits > p.Keys.RSA.Max {
			return "", refuse(KeyNotPermitted, "csr.public_key", "an RSA key of %d bits is not permitted by profile %s: use %d to %d",
				bits, p.Name, p.Keys.RSA.Min, p.Keys.RSA.Max)
		}
		return "rsa", nil
	}
	return "", refuse(KeyNotPermitted, "csr.public_key", "the kind of key is not permitted: use EC P-256 or P-384, or RSA")
}
