// Package hsm holds the words that both sides of the HSM wire share: key names, purposes, blobs, error classes and the
// rule which role may use which key. It talks to nothing itself; hsm/pkcs11 is the token, hsm/agent carries it over mTLS.
package hsm

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Bounds that both sides check, so that neither has to trust the other.
const (
	// DigestSize is the length in octets of a SHA-256 digest; see Algorithm.CheckDigest for what a key signs.
	DigestSize = 32
	// MaxBatch is the greatest number of digests in one Sign call.
	MaxBatch = 128
	// MaxBlob is the greatest length in octets of a wrapped key: an RSA-4096 PKCS#8 is about 2.4 KiB.
	MaxBlob = 8 << 10
	// MinNonce and MaxNonce bound the nonce of a challenge, in octets.
	MinNonce, MaxNonce = 16, 64
)

// KeyID names a key everywhere: lower-case hex of the 16 random octets in CKA_ID. Slots, serials and handles are never
// names, because they differ between members.
type KeyID string

// NewKeyID draws a fresh key id from the operating system's generator.
func NewKeyID() KeyID {
	var b [16]byte
	_, _ = rand.Read(b[:]) // documented never to fail
	return KeyIDOf(b[:])
}

// KeyIDOf names the key whose CKA_ID is id.
func KeyIDOf(id []byte) KeyID { return KeyID(hex.EncodeToString(id)) }

// Bytes is the CKA_ID. The error says what is wrong with a malformed id.
func (k KeyID) Bytes() ([]byte, error) {
	b, err := hex.DecodeString(string(k))
	if err != nil || len(b) != 16 || strings.ToLower(string(k)) != string(k) {
		return nil, fmt.Errorf("key id %.40q is not 32 lower-case hex digits", string(k))
	}
	return b, nil
}

// Purpose is what a key is for. It is part of the unmodifiable label of the key's objects in the token, and hsmd
// checks it against the caller's role on every use.
type Purpose string

// The purposes. PurposeProbe keys stay inside one token and sign only random values of its own agent.
const (
	PurposeCA    Purpose = "ca"
	PurposeCRL   Purpose = "crl"
	PurposeOCSP  Purpose = "ocsp"
	PurposeAudit Purpose = "audit"
	PurposeInfra Purpose = "infra"
	PurposeProbe Purpose = "probe"
)

// Purposes lists every purpose there is.
func Purposes() []Purpose {
	return []Purpose{PurposeCA, PurposeCRL, PurposeOCSP, PurposeAudit, PurposeInfra, PurposeProbe}
}

// Valid tells whether p is one of Purposes.
func (p Purpose) Valid() bool {
	for _, q := range Purposes() {
		if p == q {
			return true
		}
	}
	return false
}

// KeySpec is what a key is asked to be.
type KeySpec struct {
	ID        KeyID     `json:"id"`
	Label     string    `json:"label"`
	Purpose   Purpose   `json:"purpose"`
	Algorithm Algorithm `json:"algorithm"`
	// NonExtractable keys never leave the token that made them, wrapped or not: only the vendor can clone them.
	NonExtractable bool `json:"non_extractable,omitempty"`
}

var label = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$`)

// Check refuses a spec that no token of ours would accept, naming the field.
func (s KeySpec) Check() error {
	if _, err := s.ID.Bytes(); err != nil {
		return err
	}
	switch {
	case !label.MatchString(s.Label):
		return fmt.Errorf("label %.80q must be 1-64 letters, digits, '.', '_', '/' or '-', beginning with a letter or digit", s.Label)
	case !s.Purpose.Valid():
		return fmt.Errorf("purpose %.20q is not one of %v", string(s.Purpose), Purposes())
	case !s.Algorithm.Valid():
		return fmt.Errorf("algorithm %.20q is not one of %v", string(s.Algorithm), Algorithms())
	}
	return nil
}

// TransportPrefix begins the label of each member's transport key.
const TransportPrefix = "trivet-transport"

const labelPrefix = "trivet:"

// ObjectLabel is the CKA_LABEL of the key's objects: trivet:{purpose}:{label}.
func (s KeySpec) ObjectLabel() string { return labelPrefix + string(s.Purpose) + ":" + s.Label }

// ParseObjectLabel reads purpose and label back from a CKA_LABEL; ok is false for an object that is not ours.
func ParseObjectLabel(s string) (p Purpose, name string, ok bool) {
	rest, found := strings.CutPrefix(s, labelPrefix)
	if !found {
		return "", "", false
	}
	purpose, name, found := strings.Cut(rest, ":")
	p = Purpose(purpose)
	if !found || !p.Valid() || !label.MatchString(name) {
		return "", "", false
	}
	return p, name, true
}

// KeyRecord is one key as a token holds it.
type KeyRecord struct {
	KeySpec
	// SPKI is the DER SubjectPublicKeyInfo; empty when the token holds no usable public half.
	SPKI []byte `json:"spki,omitempty"`
	// Extractable and Local are the token's attributes: may be wrapped; was made in this token.
	Extractable bool `json:"extractable"`
	Local       bool `json:"local"`
	// Attributes is the hex SHA-256 of the policy attributes, equal for an original and its clone. It leaves out what
	// cloning must change (LOCAL, ALWAYS_SENSITIVE, NEVER_EXTRACTABLE).
	Attributes string `json:"attributes"`
	// Foreign marks an object that is not ours; it is reported and never used. Its Label is the raw one, Purpose empty.
	Foreign bool `json:"foreign,omitempty"`
	// Fault says why a key of ours cannot be used: public half missing, two objects with one id.
	Fault string `json:"fault,omitempty"`
}

// Blob is one private key wrapped with the group's domain key (AES key wrap with padding, RFC 5649, over PKCS#8).
type Blob struct {
	KeySpec
	SPKI    []byte `json:"spki"`
	KEK     string `json:"kek"`
	Wrapped []byte `json:"wrapped"`
	// MAC is HMAC-SHA256 over Authenticated with the domain's second key. Key wrap itself authenticates the key alone;
	// without the MAC a carrier could bring a CA key back in with purpose ocsp.
	MAC []byte `json:"mac"`
}

// Authenticated is what MAC covers: every other field, each preceded by its length in 4 octets.
func (b Blob) Authenticated() []byte {
	return frame("hsmd-blob-v1", []byte(b.ID), []byte(b.Label), []byte(b.Purpose), []byte(b.Algorithm), b.SPKI, []byte(b.KEK), b.Wrapped)
}

// Check refuses a blob that cannot be imported, before any of it reaches the token.
func (b Blob) Check() error {
	if err := b.KeySpec.Check(); err != nil {
		return err
	}
	switch n := len(b.Wrapped); {
	case n < 24 || n > MaxBlob || n%8 != 0:
		return fmt.Errorf("wrapped key of %d octets: must be a multiple of 8 between 24 and %d", n, MaxBlob)
	case len(b.SPKI) == 0 || len(b.SPKI) > MaxBlob:
		return fmt.Errorf("spki of %d octets: must be 1 to %d", len(b.SPKI), MaxBlob)
	case b.NonExtractable || !b.Algorithm.Cloneable():
		return fmt.Errorf("key %s (%s) cannot have been wrapped: it never leaves its token", b.ID, b.Algorithm)
	case len(b.MAC) != 32:
		return fmt.Errorf("mac of %d octets: must be 32", len(b.MAC))
	}
	return CheckDomainName(b.KEK)
}

// CheckDomainName refuses a name that no domain key may have.
func CheckDomainName(kek string) error {
	if !label.MatchString(kek) {
		return fmt.Errorf("domain key name %.80q must be 1-64 letters, digits, '.', '_', '/' or '-', beginning with a letter or digit", kek)
	}
	return nil
}

// NewDomainName draws a fresh name for a domain key of that group: the group's name, '/', and a random part. The name is in
// the token, so that an agent knows which group its token belongs to without being told.
func NewDomainName(group string) string { return group + "/" + string(NewKeyID()) }

// DomainGroup is the group that a domain key belongs to by its name; empty for a name that says none.
func DomainGroup(kek string) string {
	group, _, named := strings.Cut(kek, "/")
	if !named {
		return ""
	}
	return group
}

// InventoryDigest is the hex SHA-256 over id, purpose, label, SPKI and attributes of the given keys, in the order of their
// ids: two members with the same keys have the same, whatever made them. Probe keys, foreign and faulty ones do not count.
func InventoryDigest(keys []KeyRecord) string {
	keys = slices.Clone(keys)
	slices.SortFunc(keys, func(a, b KeyRecord) int { return strings.Compare(string(a.ID), string(b.ID)) })
	h := sha256.New()
	for _, k := range keys {
		if k.Foreign || k.Fault != "" || k.Purpose == PurposeProbe {
			continue
		}
		h.Write(frame("", []byte(k.ID), []byte(k.Purpose), []byte(k.Label), []byte(k.Algorithm), k.SPKI, []byte(k.Attributes)))
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Fingerprint is the hex SHA-256 by which people and programs compare keys: of a DER SubjectPublicKeyInfo.
func Fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// Info is what a member says about itself.
type Info struct {
	Member      string `json:"member"`
	TokenSerial string `json:"token_serial"`
	TokenLabel  string `json:"token_label"`
	Model       string `json:"model"`
	// Incarnation is random per start of the agent; a proof holds for one incarnation only.
	Incarnation string `json:"incarnation"`
	// KEK names the domain key the token holds; empty when it has none. NextKEK names a second one, which it holds while the
	// group changes from one to the other.
	KEK     string `json:"kek,omitempty"`
	NextKEK string `json:"next_kek,omitempty"`
	// Transport is the hex SHA-256 of the transport key's SPKI: the identity of a token whose serial says nothing.
	Transport string `json:"transport,omitempty"`
	// Strangers are the hex SHA-256 of other members' transport keys in the token, which are among the foreign objects: a vendor
	// that clones whole partitions leaves them there, and so does a copy of another member's token.
	Strangers []string `json:"strangers,omitempty"`
	// Locked says why the token cannot be used before an operator acts: not activated yet, or its PIN was refused.
	Locked string `json:"locked,omitempty"`
	// Site is the site that may write and Epoch its number, as this member learnt them from signed promotion records.
	Site  string `json:"site,omitempty"`
	Epoch uint64 `json:"epoch,omitempty"`
	// Digest is InventoryDigest over the usable keys, Foreign and Faulty the number of objects that are not ours or broken.
	Digest  string `json:"digest,omitempty"`
	Foreign int    `json:"foreign,omitempty"`
	Faulty  int    `json:"faulty,omitempty"`
	// Keys counts the usable keys in the token, InFlight the module calls running or queued now, Capacity how many may run at once.
	Keys     int   `json:"keys"`
	InFlight int   `json:"in_flight"`
	Capacity int   `json:"capacity"`
	Probe    Probe `json:"probe"`
	PIN      PIN   `json:"pin,omitzero"`
}

// PIN is how a token's user PIN stands. It says nothing of the PIN itself.
type PIN struct {
	// Rotated is when this agent last gave the token a new PIN; zero: never. Request is the hex digest of the approved request
	// (identity.Request.Digest) that the newest rotation was for, done or not.
	Rotated time.Time `json:"rotated,omitzero"`
	Request string    `json:"request,omitempty"`
	// Unfinished says that a rotation is under way: the agent ends it, one way or the other, when it starts.
	Unfinished string `json:"unfinished,omitempty"`
	// Undone says why the newest rotation left the old PIN in place.
	Undone string `json:"undone,omitempty"`
	// Warning is what the token says: wrong PINs were tried, it is locked, or wants another PIN. It is asked once a minute.
	Warning string `json:"warning,omitempty"`
}

// Probe is the newest result of the agent's own test signature.
type Probe struct {
	OK     bool      `json:"ok"`
	At     time.Time `json:"at"`
	Millis float64   `json:"millis"`
	Cause  string    `json:"cause,omitempty"`
}
