// Package history records what clients of a cluster did and were told, one line of JSON per event, and checks it afterwards against the record, the
// journals and the HSM agents' counts. It knows the promises and nothing of the code that keeps them.
package history

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"
)

// Kind is what a client asked for.
type Kind string

// Kinds of operations.
const (
	Issue  Kind = "issue"  // a certificate, alone: the first request or a repeat, at whatever node
	Batch  Kind = "batch"  // a certificate as one item of a batch: an operation of its own
	Get    Kind = "get"    // a certificate that was issued
	Revoke Kind = "revoke" // a revocation or a hold
	Free   Kind = "free"   // the release of a hold
	Status Kind = "status" // OCSP
	CRL    Kind = "crl"
)

// Outcome is what a client knows when an operation has returned.
type Outcome string

// Outcomes. Whatever is not certain is Unknown: it may have happened, may happen later, or never.
const (
	OK      Outcome = "ok"
	Failed  Outcome = "failed"  // refused for good: it did not happen and never will
	Unknown Outcome = "unknown" // no answer, or one that says "later"
)

// Phases of an operation.
const (
	Invoke = "invoke"
	Return = "return"
)

// Event is one line of a history. An operation is two of them with the same Op. Object and Key may be known at the beginning or at the end.
type Event struct {
	Op    uint64    `json:"op"`
	Phase string    `json:"phase"`
	Wall  time.Time `json:"wall"`
	Mono  int64     `json:"mono"` // nanoseconds since the history began; orders the events of one history, whatever is done to clocks

	Kind   Kind   `json:"kind,omitempty"`
	Client string `json:"client,omitempty"` // principal, as the request key is made of it
	Node   string `json:"node,omitempty"`   // who was asked: its base URL
	Key    string `json:"key,omitempty"`    // Idempotency-Key
	Name   string `json:"name,omitempty"`   // the DNS name asked for
	Object string `json:"object,omitempty"` // "demo-g1:3f…"; of a CRL "demo-g1"

	Outcome  Outcome `json:"outcome,omitempty"`
	Status   int     `json:"status,omitempty"`  // of HTTP; 0: there was no answer
	Answer   string  `json:"answer,omitempty"`  // good, revoked, unknown; effective, recorded
	Problem  string  `json:"problem,omitempty"` // type of the problem, or the error
	Replayed bool    `json:"replayed,omitempty"`
	Digest   string  `json:"sha256,omitempty"` // of the bytes that were answered
	Bytes    []byte  `json:"bytes,omitempty"`  // DER; left out when a line before has the same
}

// Answers of revocations.
const (
	Effective = "effective" // 200
	Recorded  = "recorded"  // 202
)

// digest is the SHA-256 that stands for bytes.
type digest [sha256.Size]byte

func (d digest) String() string { return hex.EncodeToString(d[:8]) + "…" }

func parseDigest(s string) (digest, error) {
	raw, err := hex.DecodeString(s)
	if err != nil || len(raw) != sha256.Size {
		return digest{}, fmt.Errorf("%q is no SHA-256", s)
	}
	return digest(raw), nil
}

// RequestKey is what the record knows a client's request by.
func RequestKey(client, key string) [32]byte {
	return sha256.Sum256([]byte(client + "\x00" + key))
}
