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
	// Probe is the token-local key for the server's test signatures.
	Probe() hsm.KeyRecord
	Inventory() ([]hsm.KeyRecord, error)
	// Sign returns an ASN.1 signature over one SHA-256 digest.
	Sign(key hsm.KeyID, digest []byte) ([]byte, error)
	// Generate, Import, GenerateDomain and ImportDomain are idempotent, and durable when they return.
	Generate(hsm.KeySpec) (hsm.KeyRecord, error)
	Export(hsm.KeyID) (hsm.Blob, error)
	Import(hsm.Blob) (hsm.KeyRecord, error)
	// TransportKey is the SPKI to which ExportDomain of another token wraps.
	TransportKey() ([]byte, error)
	GenerateDomain(kek string) error
	ExportDomain(transportSPKI []byte) (wrapped []byte, kek string, err error)
	ImportDomain(kek string, wrapped []byte) error
}

// Bodies of the wire, beside those of package hsm.
type (
	signRequest struct {
		Key     hsm.KeyID `json:"key"`
		Digests [][]byte  `json:"digests"`
	}
	signResponse struct {
		Signatures [][]byte `json:"signatures"`
	}
	challengeRequest struct {
		Group string    `json:"group"`
		Key   hsm.KeyID `json:"key"`
		Nonce []byte    `json:"nonce"`
	}
	challengeResponse struct {
		Signature   []byte `json:"signature"`
		Incarnation string `json:"incarnation"`
	}
	keysResponse struct {
		Keys []hsm.KeyRecord `json:"keys"`
	}
	exportRequest struct {
		Key hsm.KeyID `json:"key"`
	}
	transportKey struct {
		Transport []byte `json:"transport"`
	}
	domainRequest struct {
		KEK string `json:"kek"`
	}
	wrappedDomain struct {
		KEK     string `json:"kek"`
		Wrapped []byte `json:"wrapped"`
	}
)

// maxBody bounds request bodies: the largest is a Sign of hsm.MaxBatch digests or a blob of hsm.MaxBlob, both below 32 KiB.
const maxBody = 32 << 10
