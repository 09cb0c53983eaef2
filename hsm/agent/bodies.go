package agent

import (
	"trivet/hsm"
	"trivet/identity"
)

// Bodies of the wire, beside those of package hsm.
type (
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
		KEK string    `json:"kek,omitempty"`
	}
	transportKey struct {
		Transport []byte `json:"transport"`
	}
	forgetRequest struct {
		Transport string `json:"transport"`
	}
	domainRequest struct {
		KEK string `json:"kek"`
	}
	wrappedDomain struct {
		KEK     string `json:"kek"`
		Wrapped []byte `json:"wrapped"`
	}
	activateRequest struct {
		PIN string `json:"pin"`
	}
	// none is the body of a request or response that has nothing to say.
	none = struct{}
)

// Bounds of what travels inside bodies, in octets.
const (
	// maxTransport is an attested transport key, RSA-3072 with a chain of 4 certificates, in base64.
	maxTransport = 16 << 10
	// maxConveyed is a domain key on its way: two RSA-3072 blocks, a chain of 4, and the transports the sender knows.
	maxConveyed = maxTransport + maxKnown*(64+64+6)
	// maxKnown is the most transport keys that travel with a domain key.
	maxKnown = 128
	// maxSealed is what hsm.Seal makes of the longest key.
	maxSealed = hsm.MaxBlob + hsm.TransportBits/8
	// maxPIN is the longest PIN there is.
	maxPIN = 255
	// fixed is more than all names, labels, numbers and punctuation of any body together.
	fixed = 2 << 10
)

// Bounds of bodies. n octets are (n+2)/3*4 characters of base64; one in a list has quotes and a comma besides.
const (
	maxSign      int64 = fixed + hsm.MaxBatch*((hsm.MaxMessage+2)/3*4+3)
	maxBlobBody  int64 = fixed + 2*((hsm.MaxBlob+2)/3*4)
	maxAct       int64 = fixed + (identity.MaxGrant+2)/3*4
	maxWithKey   int64 = maxAct + (hsm.MaxBlob+2)/3*4 + (maxSealed+2)/3*4
	maxWithRoute int64 = maxAct + (maxTransport+2)/3*4
	maxPINs      int64 = maxAct + maxKnown*(64+3)
	maxDomain    int64 = fixed + (maxConveyed+2)/3*4
)
