package hsm

import "encoding/binary"

// signers is the whole rule which machine role may sign with which keys. What is not here is denied.
var signers = map[string][]Purpose{
	"ca":       {PurposeCA, PurposeCRL, PurposeAudit},
	"ocsp":     {PurposeOCSP},
	"ceremony": {PurposeCA, PurposeCRL},
}

// MaySign tells whether role may have digests of its choice signed by keys of purpose p. Default deny.
func MaySign(role string, p Purpose) bool {
	for _, q := range signers[role] {
		if p == q {
			return true
		}
	}
	return false
}

// MayChallenge tells whether role may ask for a proof of possession. The agent builds what is signed, so the sync role
// may ask for any key although it may sign with none.
func MayChallenge(role string, p Purpose) bool {
	return p.Valid() && (role == "sync" || MaySign(role, p))
}

// MayManage tells whether role may generate, export and import keys and handle the domain key.
func MayManage(role string) bool { return role == "sync" || role == "ceremony" }

// ChallengeDigest is what a member signs with a key of kind alg to prove that it holds it: the digest over
// "hsmsync-pop-v1" and the fields, each preceded by its length in 4 octets, so that no two tuples give the same octets. A
// proof is bound to one incarnation of one member.
func ChallengeDigest(alg Algorithm, group, member, incarnation string, key KeyID, nonce []byte) []byte {
	return alg.Digest(frame("hsmsync-pop-v1", []byte(group), []byte(member), []byte(incarnation), []byte(key), nonce))
}

// frame joins a domain-separating tag and length-prefixed fields.
func frame(tag string, fields ...[]byte) []byte {
	out := []byte(tag)
	for _, f := range fields {
		out = binary.BigEndian.AppendUint32(out, uint32(len(f)))
		out = append(out, f...)
	}
	return out
}
