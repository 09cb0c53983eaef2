package ca

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"

	"trivet/db"
)

// Causes of trivet_ca_forged_intents_total.
const (
	causeMissing = "missing"
	causeForged  = "forged"
	causeForeign = "foreign-key"
	causeNoTBS   = "no-tbs"
)

var errUnchecked = errors.New("what is to be signed is not what was checked")

// pass notes that a TBSCertificate passed every check; the signer asks for it by passed.
func (j *job) pass(tbs []byte) { j.checked = sha256.Sum256(tbs) }

func (j *job) passed(tbs []byte) bool { return j.checked == sha256.Sum256(tbs) }

// seal returns the row as it is inserted, with its MAC.
func (e *Engine) seal(row db.Intent) db.Intent {
	e.cfg.MACKeys.Seal(&row)
	return row
}

// authentic tells whether a CA node wrote the row as it is: without that, whoever can write to the database could have certificates signed. A row
// that nobody vouches for is refused for good; one whose key is not known here may be another node's business.
func (e *Engine) authentic(row db.Intent) error {
	err := e.cfg.MACKeys.Verify(&row)
	if err == nil {
		return nil
	}
	cause := causeForged
	switch {
	case errors.Is(err, db.ErrNoMAC):
		cause = causeMissing
	case errors.Is(err, db.ErrNoTBS):
		cause = causeNoTBS // and no sweep can bring it back
	case errors.Is(err, db.ErrForeignMAC):
		cause = causeForeign
	}
	e.metrics.forged.WithLabelValues(cause).Inc()
	e.cfg.Log.Error("an intent in the database is not as a CA node wrote it: it is not signed", "issuer", row.Issuer, "serial", hex.EncodeToString(row.Serial),
		"node", row.Node, "requester", row.Requester, "cause", cause, "err", err)
	if cause == causeForeign {
		return unavailable(OutcomeUnknown, err, "this node does not know the key that vouches for the earlier request: repeat the request, and tell the operators")
	}
	return refuse(LintFailed, "", "the record does not vouch for the earlier request: %v", err)
}

// unblocked tells whether the key of an open intent may still be certified.
func (e *Engine) unblocked(ctx context.Context, j *job) error {
	spki, err := spkiOf(j.intent.TBS)
	if err != nil {
		return refuse(LintFailed, "", "the stored TBSCertificate cannot be read: %v", err)
	}
	j.intent.Key = keyHash(spki)
	blocked, err := e.record.Blocked(ctx, "", j.intent.Key)
	if err != nil {
		return databaseError("looking whether the key is blocked", err)
	}
	if len(blocked) > 0 {
		return keyBlocked()
	}
	return nil
}

func keyBlocked() error {
	return refuse(BlockedKey, "csr.public_key", "the key is blocked: its private half is known to others, or it must not be used for another reason; make another")
}
