// Package agent is hsmd's HTTP interface and its client: one token behind mTLS, with a deadline on every call, the
// caller's role checked against the key's purpose, and a record of every act that is not a plain signature.
package agent

import "trivet/hsm"

// Token is what the server needs of a token; pkcs11.Token is the real one. Calls may come from many goroutines at once.
// None takes a context, because none can be cancelled: the server's watchdog ends the process instead. Errors are
// *hsm.Error; ClassSession and ClassDevice mean that this process cannot use the token any more.
type Token interface {
	// Info fills in serial, label, model, domain key and number of keys. It and Key answer from memory at once.
	Info() hsm.Info
	Key(hsm.KeyID) (hsm.KeyRecord, error)
	// Domains names the current and the next domain key. Info does so too, and digests every key for it.
	Domains() (current, next string)
	// Probe is the token-local key for the server's test signatures.
	Probe() hsm.KeyRecord
	Inventory() ([]hsm.KeyRecord, error)
	// Sign returns a signature over one digest (for Ed25519: message), as hsm.Verify takes it.
	Sign(key hsm.KeyID, digest []byte) ([]byte, error)
	// What changes the token is idempotent, and durable when it returns.
	Generate(hsm.KeySpec) (hsm.KeyRecord, error)
	// Export wraps with the domain key called kek; empty is the current one.
	Export(key hsm.KeyID, kek string) (hsm.Blob, error)
	Import(hsm.Blob) (hsm.KeyRecord, error)
	// Adopt takes in a key sealed by hsm.Seal to the transport key; its public key must be spki.
	Adopt(spec hsm.KeySpec, spki, sealed []byte) (hsm.KeyRecord, error)
	// Destroy removes both halves; a key with another SPKI under that id is refused and left alone.
	Destroy(key hsm.KeyID, spki []byte) error
	// TransportKey is the SPKI to which ExportDomain of another token wraps.
	TransportKey() ([]byte, error)
	// A token holds the current domain key and, while the group changes to it, the next one. The first that comes in is the
	// current one; Rotate makes the next one current; DropDomain removes the one that is not, or the last one when no key of
	// a group is left.
	GenerateDomain(kek string) error
	ExportDomain(kek string, transportSPKI []byte) (wrapped []byte, name string, err error)
	ImportDomain(kek string, wrapped []byte) error
	Rotate(kek string) error
	DropDomain(kek string) error
	// Epoch is the site epoch kept in the token; the zero record where there is none. SetEpoch replaces it.
	Epoch() (hsm.EpochRecord, error)
	SetEpoch(hsm.EpochRecord) error
}
