// Package weakkey recognises public keys whose private half somebody else can find: keys that are too small, and those that well-known
// defects made guessable. It says nothing about who may have a key certified.
//
// Checks are ordered by cost, so that a hostile key is refused before anything expensive looks at it.
package weakkey

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"fmt"
)

// Defects, as Error.Defect names them. They are stable.
const (
	Size         = "size"          // fewer bits than are safe, or more than anybody can be made to compute with
	Exponent     = "exponent"      // of an RSA key: even or too small
	SmallFactor  = "small-factor"  // of an RSA modulus
	ClosePrimes  = "close-primes"  // of an RSA modulus: Fermat's method factors it (CVE-2022-26320)
	ROCA         = "roca"          // made by Infineon's RSALib (CVE-2017-15361)
	Listed       = "listed"        // in a list of keys that are known, such as Debian's of 2008 (CVE-2008-0166)
	InvalidPoint = "invalid-point" // of an EC key: not on its curve, or infinity
	Curve        = "curve"         // neither P-256, P-384 nor P-521
	Kind         = "kind"          // neither RSA nor EC
)

// Error says what is wrong with a key.
type Error struct {
	Defect string // one of the above
	Detail string // for people: what was found and what to do
}

// Error is the detail.
func (e *Error) Error() string { return e.Detail }

func weak(defect, format string, args ...any) error {
	return &Error{Defect: defect, Detail: fmt.Sprintf(format, args...)}
}

// Check returns nil, or an *Error that names the first defect found. known may be nil. It is safe for concurrent use, and needs at most a
// millisecond whatever it is given.
func Check(pub crypto.PublicKey, known *List) error {
	var err error
	switch key := pub.(type) {
	case *rsa.PublicKey:
		if known.hasModulus(key.N) {
			return weak(Listed, "the RSA key is one of a list of keys whose private half is known: make another, with a sound random number generator")
		}
		err = checkRSA(key)
	case *ecdsa.PublicKey:
		err = checkEC(key)
	default:
		return weak(Kind, "a key of type %T cannot be judged: use EC P-256 or P-384, or RSA", pub)
	}
	if err == nil && known.hasKey(pub) {
		return weak(Listed, "the key is one of a list of keys whose private half is known: make another, with a sound random number generator")
	}
	return err
}

// checkEC refuses points that are no keys. The curves have cofactor 1: every other point on them has the curve's own order.
func checkEC(key *ecdsa.PublicKey) error {
	switch key.Curve {
	case elliptic.P256(), elliptic.P384(), elliptic.P521():
	case nil:
		return weak(Curve, "the EC key names no curve: use P-256 or P-384")
	default:
		return weak(Curve, "the EC key is on %s: use P-256 or P-384", key.Curve.Params().Name)
	}
	//lint:ignore SA1019 a key made of raw coordinates is just what is to be recognised
	if key.X == nil || key.Y == nil || key.X.Sign() == 0 && key.Y.Sign() == 0 {
		return weak(InvalidPoint, "the EC key is the point at infinity")
	}
	if _, err := key.ECDH(); err != nil { // which checks that the point is on the curve
		return weak(InvalidPoint, "the EC key is not a point on %s", key.Curve.Params().Name)
	}
	return nil
}
