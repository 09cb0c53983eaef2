package agent

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"trivet/hsm"
	"trivet/identity"
)

// vouched is octets with the signature of the agent that stands for them, and its certificates.
type vouched struct {
	Chain     [][]byte `json:"chain"` // the agent's identity, leaf first, DER
	Signature []byte   `json:"signature"`
}

func vouch(id *identity.Identity, op string, message []byte) (vouched, error) {
	cert := id.Certificate()
	signer, ok := cert.PrivateKey.(crypto.Signer)
	if !ok || cert.Leaf.PublicKeyAlgorithm != x509.ECDSA {
		return vouched{}, hsm.Errorf(hsm.ClassRequest, op, "the agent's identity is not an ECDSA key")
	}
	digest := sha256.Sum256(message)
	sig, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return vouched{}, hsm.Errorf(hsm.ClassRequest, op, "vouching with the agent's identity: %w", err)
	}
	return vouched{cert.Certificate, sig}, nil
}

// by checks that a live hsmd of this cluster vouches for message, and says which.
func (v vouched) by(id *identity.Identity, message []byte, now time.Time) (identity.Principal, error) {
	if len(v.Chain) == 0 || len(v.Chain) > 4 {
		return identity.Principal{}, errors.New("it comes without its agent's certificate")
	}
	chain := make([]*x509.Certificate, len(v.Chain))
	for i, der := range v.Chain {
		var err error
		if chain[i], err = x509.ParseCertificate(der); err != nil {
			return identity.Principal{}, fmt.Errorf("parsing its agent's certificate: %w", err)
		}
	}
	p, err := id.Verify(chain, now)
	if err != nil {
		return p, err
	}
	if p.Role != identity.RoleHSMD {
		return p, fmt.Errorf("%s vouches for it, which is no hsmd", p)
	}
	if err := chain[0].CheckSignature(x509.ECDSAWithSHA256, message, v.Signature); err != nil {
		return p, fmt.Errorf("checking the signature of %s: %w", p, err)
	}
	return p, nil
}

// attestation is a transport key as it travels. A domain key goes only to a token that some hsmd of this cluster vouches
// for: the sync role carries the key and cannot put one of its own in its place.
type attestation struct {
	SPKI []byte `json:"spki"`
	vouched
}

func attestedMessage(spki []byte) []byte { return append([]byte("hsmd-transport-v1\x00"), spki...) }

func attest(id *identity.Identity, spki []byte) ([]byte, error) {
	v, err := vouch(id, "transport-key", attestedMessage(spki))
	if err != nil {
		return nil, err
	}
	return json.Marshal(attestation{spki, v})
}

// attested checks that a live hsmd of this cluster vouches for a transport key, and says which.
func attested(id *identity.Identity, transport []byte, now time.Time) (spki []byte, by identity.Principal, err error) {
	if len(transport) > maxTransport {
		return nil, by, fmt.Errorf("transport key of %d octets: must be at most %d", len(transport), maxTransport)
	}
	var a attestation
	if err := json.Unmarshal(transport, &a); err != nil {
		return nil, by, fmt.Errorf("parsing the transport key: %w", err)
	}
	if by, err = a.by(id, attestedMessage(a.SPKI), now); err != nil {
		return nil, by, fmt.Errorf("transport key: %w", err)
	}
	return a.SPKI, by, nil
}

// TransportSPKI opens what Client.TransportKey returned: the transport key, and the member whose agent vouches for it.
// Nobody else's word counts.
func TransportSPKI(id *identity.Identity, transport []byte, now time.Time) (spki []byte, member string, err error) {
	spki, by, err := attested(id, transport, now)
	return spki, by.Name, err
}

// TransportFingerprint is TransportSPKI with the fingerprint that people compare and approve.
func TransportFingerprint(id *identity.Identity, transport []byte, now time.Time) (hexSHA256, member string, err error) {
	spki, member, err := TransportSPKI(id, transport, now)
	if err != nil {
		return "", "", err
	}
	return hsm.Fingerprint(spki), member, nil
}

// conveyed is a domain key as it travels. The receiving agent takes it because another agent says what it is; the carrier,
// which could wrap a domain key of its own making to any transport key, is not asked.
type conveyed struct {
	KEK     string `json:"kek"`
	To      string `json:"to"` // fingerprint of the transport key it is wrapped to
	Wrapped []byte `json:"wrapped"`
	Origin  origin `json:"origin"`
	// Guarded says that the sender's token holds keys of a group: see facts.Guarded.
	Guarded bool `json:"guarded"`
	// Known is the transport keys that hold the domain as far as the sender knows, its own among them.
	Known map[string]string `json:"known"`
	vouched
}

// message is what the sending agent signs: every field, each preceded by its length in 4 octets.
func (c conveyed) message() []byte {
	out := []byte("hsmd-domain-v1\x00")
	add := func(field string) {
		out = binary.BigEndian.AppendUint32(out, uint32(len(field)))
		out = append(out, field...)
	}
	for _, f := range []string{c.KEK, c.To, string(c.Wrapped), string(c.Origin), fmt.Sprint(c.Guarded)} {
		add(f)
	}
	for _, k := range slices.Sorted(maps.Keys(c.Known)) {
		add(k)
		add(c.Known[k])
	}
	return out
}

func (c conveyed) seal(id *identity.Identity) (_ []byte, err error) {
	if c.vouched, err = vouch(id, "domain-export", c.message()); err != nil {
		return nil, err
	}
	return json.Marshal(c)
}

// openConveyed reads a domain key as it came in. Bare octets, which no agent vouches for, are brought.
func openConveyed(id *identity.Identity, kek string, wrapped []byte, own string, now time.Time) (conveyed, error) {
	if len(wrapped) > maxConveyed {
		return conveyed{}, hsm.Errorf(hsm.ClassRequest, "domain-import", "wrapped domain key of %d octets: must be at most %d", len(wrapped), maxConveyed)
	}
	var c conveyed
	if decode(bytes.NewReader(wrapped), &c) != nil || c.Chain == nil {
		return conveyed{KEK: kek, Wrapped: wrapped, Origin: brought}, nil
	}
	by, err := c.by(id, c.message(), now)
	switch {
	case err != nil:
		return c, hsm.Errorf(hsm.ClassDenied, "domain-import", "domain key: %w", err)
	case c.KEK != kek || c.To != own:
		return c, hsm.Errorf(hsm.ClassRequest, "domain-import", "%s wrapped domain key %.80q for transport key %.64s; this is %q for %s", by, c.KEK, c.To, kek, own)
	case c.Origin != made && c.Origin != brought:
		return c, hsm.Errorf(hsm.ClassRequest, "domain-import", "domain key of origin %.20q", string(c.Origin))
	}
	return c, nil
}
