package custody

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"trivet/hsm"
)

const (
	bundleVersion = 1
	// MaxBundle is the greatest length of an encoded bundle in octets, MaxKeys the most keys in one.
	MaxBundle = 64 << 20
	MaxKeys   = 4096

	maxPolicy = 64 << 10
)

// Bundle is a backup of one group: its keys, wrapped by its domain key, and the domain key wrapped to the recipient. It holds
// nothing that can be read without the custodians. Every live and retired key is listed; Missing says of those without a blob
// why there is none.
type Bundle struct {
	Version int       `json:"version"`
	Cluster string    `json:"cluster"`
	Group   string    `json:"group"`
	Created time.Time `json:"created"`
	// Policy is the group's, as its log has it: a JSON object.
	Policy json.RawMessage `json:"policy"`
	// Domain names the domain key, Wrapped is its two halves as Token.ExportDomain gives them.
	Domain    string          `json:"domain"`
	Wrapped   []byte          `json:"wrapped"`
	Recipient Recipient       `json:"recipient"`
	Keys      []hsm.KeyRecord `json:"keys"`
	Blobs     []hsm.Blob      `json:"blobs"`
	// Retired are those of Keys that sign no more, and are restored as such.
	Retired []hsm.KeyID `json:"retired,omitempty"`
	// Missing says why a key has no blob.
	Missing map[hsm.KeyID]string `json:"missing,omitempty"`
	// Digest is the hex SHA-256 of all the above. It finds damage, not malice: who alters a bundle can make a new one. Write
	// it down at the ceremony, apart from the bundle.
	Digest string `json:"digest"`
}

// Encode checks the bundle and gives its text, with version and digest set.
func (b Bundle) Encode() ([]byte, error) {
	b.Version = bundleVersion
	b.Created = b.Created.UTC().Truncate(time.Second)
	err := b.check()
	if err == nil {
		b.Digest, err = b.digest()
	}
	if err != nil {
		return nil, fmt.Errorf("writing the backup of group %s: %w", b.Group, err)
	}
	text, err := json.MarshalIndent(b, "", " ")
	if err == nil && len(text) > MaxBundle {
		err = fmt.Errorf("%d octets: must be at most %d", len(text), MaxBundle)
	}
	if err != nil {
		return nil, fmt.Errorf("writing the backup of group %s: %w", b.Group, err)
	}
	return append(text, '\n'), nil
}

// ParseBundle reads what Encode wrote. It is whole and undamaged; whether it is genuine shows when it is unlocked, and in the
// public keys that the CAs' certificates have.
func ParseBundle(text []byte) (Bundle, error) {
	b, err := decode[Bundle](text, MaxBundle+1)
	if err == nil {
		err = b.check()
	}
	if err != nil {
		return Bundle{}, fmt.Errorf("reading a backup: %w", err)
	}
	if sum, err := b.digest(); err != nil || sum != b.Digest {
		return Bundle{}, fmt.Errorf("reading a backup: the digest is %.64q, and of what is there %s: it is damaged, take another copy", b.Digest, sum)
	}
	return b, nil
}

func (b Bundle) digest() (string, error) {
	b.Digest = ""
	text, err := json.Marshal(b)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append([]byte("trivet-backup-v1\n"), text...))
	return hex.EncodeToString(sum[:]), nil
}

// check refuses a bundle from which nothing could be restored, or that says two things.
func (b Bundle) check() error {
	switch {
	case b.Version != bundleVersion:
		return fmt.Errorf("version %d: this program reads version %d", b.Version, bundleVersion)
	case b.Cluster == "" || len(b.Cluster) > 63 || b.Group == "" || len(b.Group) > 64:
		return fmt.Errorf("cluster %.70q, group %.70q: both are needed, at most 63 and 64 octets", b.Cluster, b.Group)
	case b.Created.IsZero() || b.Created.Year() > 9999:
		return errors.New("created is missing")
	case len(b.Policy) > maxPolicy || !json.Valid(b.Policy) || !bytes.HasPrefix(bytes.TrimSpace(b.Policy), []byte("{")):
		return fmt.Errorf("policy is no JSON object of at most %d octets", maxPolicy)
	case len(b.Wrapped) != 2*hsm.TransportBits/8:
		return fmt.Errorf("wrapped domain key of %d octets: must be %d", len(b.Wrapped), 2*hsm.TransportBits/8)
	case len(b.Keys) > MaxKeys:
		return fmt.Errorf("%d keys: must be at most %d", len(b.Keys), MaxKeys)
	}
	if err := errors.Join(hsm.CheckDomainName(b.Domain), b.Recipient.Check()); err != nil {
		return err
	}
	keys := map[hsm.KeyID]hsm.KeyRecord{}
	for _, k := range b.Keys {
		if err := k.Check(); err != nil {
			return err
		}
		if _, twice := keys[k.ID]; twice || k.Foreign || k.Fault != "" || k.Purpose == hsm.PurposeProbe {
			return fmt.Errorf("key %s is there twice, or is not a key of the group", k.ID)
		}
		if _, err := k.Algorithm.ParsePublic(k.SPKI); err != nil {
			return fmt.Errorf("key %s: %w", k.ID, err)
		}
		keys[k.ID] = k
	}
	for _, blob := range b.Blobs {
		if err := blob.Check(); err != nil {
			return fmt.Errorf("blob of key %s: %w", blob.ID, err)
		}
		k, ok := keys[blob.ID]
		if !ok || k.KeySpec != blob.KeySpec || !bytes.Equal(k.SPKI, blob.SPKI) {
			return fmt.Errorf("blob of key %s does not match the list of keys, or is there twice", blob.ID)
		}
		if blob.KEK != b.Domain {
			return fmt.Errorf("blob of key %s is wrapped with domain key %s, not %s", blob.ID, blob.KEK, b.Domain)
		}
		delete(keys, blob.ID)
	}
	for id, k := range keys {
		switch {
		case k.NonExtractable || !k.Algorithm.Cloneable():
		case !b.IsRetired(id):
			return fmt.Errorf("key %s (%s) has no blob", id, k.Label)
		case b.Missing[id] == "":
			return fmt.Errorf("key %s (%s) has no blob, and nothing says why", id, k.Label)
		}
	}
	for id := range b.Missing {
		if _, lacks := keys[id]; !lacks {
			return fmt.Errorf("key %s is said to be missing, and has a blob or is not listed", id)
		}
	}
	for i, id := range b.Retired {
		if slices.Contains(b.Retired[:i], id) || !slices.ContainsFunc(b.Keys, func(k hsm.KeyRecord) bool { return k.ID == id }) {
			return fmt.Errorf("retired key %s is there twice, or is not listed", id)
		}
	}
	return nil
}

// IsRetired tells whether a key signed no more when the backup was made.
func (b Bundle) IsRetired(id hsm.KeyID) bool { return slices.Contains(b.Retired, id) }

// Holds tells whether the bundle has a key itself, and if not, why.
func (b Bundle) Holds(id hsm.KeyID) (holds bool, why string) {
	if slices.ContainsFunc(b.Blobs, func(blob hsm.Blob) bool { return blob.ID == id }) {
		return true, ""
	}
	return false, cmp.Or(b.Missing[id], "it never leaves its token")
}
