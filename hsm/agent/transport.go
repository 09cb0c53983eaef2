package agent

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"trivet/hsm"
	"trivet/identity"
)

// A domain key goes only to a token that some hsmd of this cluster vouches for: the transport key is signed with the
// agent's own identity. The sync role carries it and cannot put a key of its own in its place.
type attestation struct {
	SPKI      []byte   `json:"spki"`
	Chain     [][]byte `json:"chain"` // the agent's identity, leaf first, DER
	Signature []byte   `json:"signature"`
}

func attestedMessage(spki []byte) []byte { return append([]byte("hsmd-transport-v1\x00"), spki...) }

func attest(id *identity.Identity, spki []byte) ([]byte, error) {
	cert := id.Certificate()
	signer, ok := cert.PrivateKey.(crypto.Signer)
	if !ok || cert.Leaf.PublicKeyAlgorithm != x509.ECDSA {
		return nil, hsm.Errorf(hsm.ClassRequest, "transport-key", "the agent's identity is not an ECDSA key")
	}
	digest := sha256.Sum256(attestedMessage(spki))
	sig, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, hsm.Errorf(hsm.ClassRequest, "transport-key", "attesting the transport key: %w", err)
	}
	return json.Marshal(attestation{spki, cert.Certificate, sig})
}

// attested checks that a live hsmd of this cluster vouches for a transport key, and says which.
func attested(id *identity.Identity, transport []byte, now time.Time) (spki []byte, by identity.Principal, err error) {
	var a attestation
	if err := json.Unmarshal(transport, &a); err != nil {
		return nil, by, fmt.Errorf("parsing the transport key: %w", err)
	}
	if len(a.Chain) == 0 || len(a.Chain) > 4 {
		return nil, by, errors.New("the transport key comes without its agent's certificate")
	}
	chain := make([]*x509.Certificate, len(a.Chain))
	for i, der := range a.Chain {
		if chain[i], err = x509.ParseCertificate(der); err != nil {
			return nil, by, fmt.Errorf("parsing the transport key's certificate: %w", err)
		}
	}
	if by, err = id.Verify(chain, now); err != nil {
		return nil, by, err
	}
	if by.Role != identity.RoleHSMD {
		return nil, by, fmt.Errorf("the transport key is vouched for by %s, which is no hsmd", by)
	}
	if err := chain[0].CheckSignature(x509.ECDSAWithSHA256, attestedMessage(a.SPKI), a.Signature); err != nil {
		return nil, by, fmt.Errorf("checking the signature of %s over the transport key: %w", by, err)
	}
	return a.SPKI, by, nil
}
