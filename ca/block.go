package ca

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"trivet/db"
	"trivet/identity"
	"trivet/journal"
)

// Reasons for which a key is blocked.
const (
	BlockKeyCompromise = "keyCompromise" // somebody else may have the private half; a revocation for keyCompromise blocks for it too
	BlockWeakKey       = "weakKey"       // the private half can be computed or guessed
	BlockOther         = "other"
)

// maxUses is how many certificates of a blocked key are shown, and revoked, at once.
const maxUses = 1000

// BlockRequest asks that a key be certified no more. Nothing undoes it.
type BlockRequest struct {
	SPKI      []byte // SHA-256 of the DER SubjectPublicKeyInfo
	Reason    string // one of the above
	Comment   string // at most 1000 octets
	Revoke    bool   // whether the certificates that the key has are revoked for keyCompromise
	Actor     identity.Principal
	Approvers []string // who else agreed, for the audit record
}

// Approval describes the act to those who approve it: an identity.Request says exactly this.
func (q *BlockRequest) Approval() (action, object string, detail map[string]string) {
	return "key-block", "spki:" + hex.EncodeToString(q.SPKI),
		map[string]string{"reason": q.Reason, "comment": q.Comment, "revoke": strconv.FormatBool(q.Revoke)}
}

// Blocking is what stands against a key: durable, read back and journalled.
type Blocking struct {
	db.BlockedKey
	Uses []KeyUse // certificates, and intents under way, that came before it; at most 1000 from the number asked for
	Next uint32   // the number after which there are more; 0: there are none
}

// KeyUse is one certificate of a key.
type KeyUse struct {
	db.KeyUse
	Revoked *Revoked // what became of it, where revoking was asked for
	Err     error    // why it could not be revoked
}

// KeyRecord is what blocking needs of the database; *db.Store is it. Reads are causal, on a node other than except if one is healthy.
type KeyRecord interface {
	BlockKey(ctx context.Context, b db.BlockedKey) (stands db.BlockedKey, node string, err error)
	Blocked(ctx context.Context, except string, spkis ...[]byte) ([]db.BlockedKey, error)
	BlockedKeys(ctx context.Context, after []byte, limit int) ([]db.BlockedKey, error)
	KeyUses(ctx context.Context, except string, spki []byte, after uint32, limit int) ([]db.KeyUse, error)
}

// BlockerConfig is what a Blocker needs. All but Rounds, Now and Log are mandatory.
type BlockerConfig struct {
	Record      KeyRecord           // *db.Store
	Journal     *journal.Journal    //
	Revoker     *Revoker            //
	Authorities func() *Authorities // whose keys are never blocked
	Rounds      *Rounds             // so that a block survives a database that goes back; nil: none are held
	Now         func() time.Time    // default time.Now
	Log         *slog.Logger        // default slog.Default
}

// Blocker blocks subject keys. It is safe for concurrent use, also by several nodes on the same key.
type Blocker struct{ cfg BlockerConfig }

// NewBlocker returns a Blocker.
func NewBlocker(cfg BlockerConfig) (*Blocker, error) {
	if cfg.Record == nil || cfg.Journal == nil || cfg.Revoker == nil || cfg.Authorities == nil {
		return nil, errors.New("ca: a mandatory field of BlockerConfig is missing")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Blocker{cfg}, nil
}

// Block blocks a key, or finds it blocked, and returns every certificate that the key has: none can come later. A repeat is safe, and revokes
// what is left to revoke. Every error is an *Error.
func (b *Blocker) Block(ctx context.Context, q BlockRequest) (*Blocking, error) {
	if !slices.Contains([]string{BlockKeyCompromise, BlockWeakKey, BlockOther}, q.Reason) {
		return nil, refuse(MalformedRequest, "reason", "want %s, %s or %s", BlockKeyCompromise, BlockWeakKey, BlockOther)
	}
	if len(q.SPKI) != 32 {
		return nil, refuse(MalformedRequest, "spki_sha256", "want the SHA-256 of the key's DER SubjectPublicKeyInfo")
	}
	if err := checkComment(q.Comment); err != nil {
		return nil, err
	}
	if err := b.mayBlock(ctx, q.SPKI); err != nil {
		return nil, err
	}
	if err := b.audit(q, "begun"); err != nil {
		return nil, err
	}
	at, err := b.cfg.Rounds.reads(ctx)
	if err != nil {
		return nil, err
	}
	stands, err := blockKey(ctx, b.cfg.Record, b.cfg.Log, db.BlockedKey{
		SPKI: q.SPKI, Reason: q.Reason, Comment: q.Comment, Actor: q.Actor.String(), Created: b.cfg.Now().UTC(),
	})
	if err != nil {
		return nil, err
	}
	err = b.cfg.Rounds.done(ctx, b.cfg.Journal, at, &journal.Done{
		Kind: journal.DoneBlock, Serial: hex.EncodeToString(stands.SPKI), Ver: 1, Created: stands.Created,
		Block: &journal.Block{Reason: stands.Reason, Comment: stands.Comment, Actor: stands.Actor},
	})
	if err != nil && NameOf(err) == "" {
		err = JournalError(err, "this node cannot record what it does: repeat the request")
	}
	if err != nil {
		return nil, err
	}
	out, err := b.uses(ctx, stands, 0)
	if err != nil {
		return nil, err
	}
	if err := b.audit(q, fmt.Sprintf("recorded as %d, %d certificates", stands.N, len(out.Uses))); err != nil {
		return nil, err
	}
	b.cfg.Log.Warn("a key is blocked", "spki_sha256", hex.EncodeToString(q.SPKI), "reason", stands.Reason, "actor", q.Actor.String(), "approvers", q.Approvers, "certificates", len(out.Uses))
	if q.Revoke {
		b.revoke(ctx, out.Uses, q)
	}
	return out, nil
}

// Get returns the block of a key with up to 1000 of its certificates, from the number after on; nil if it is not blocked. Every error is an *Error.
func (b *Blocker) Get(ctx context.Context, spki []byte, after uint32) (*Blocking, error) {
	found, err := b.cfg.Record.Blocked(ctx, "", spki)
	if err != nil {
		return nil, databaseError("reading the blocked key", err)
	}
	if len(found) == 0 {
		return nil, nil
	}
	return b.uses(ctx, found[0], after)
}

// List returns up to limit blocked keys in the order of their hashes, from the first after a hash on. Every error is an *Error.
func (b *Blocker) List(ctx context.Context, after []byte, limit int) ([]db.BlockedKey, error) {
	found, err := b.cfg.Record.BlockedKeys(ctx, after, limit)
	if err != nil {
		return nil, databaseError("reading the blocked keys", err)
	}
	return found, nil
}

func (b *Blocker) uses(ctx context.Context, stands db.BlockedKey, after uint32) (*Blocking, error) {
	uses, err := b.cfg.Record.KeyUses(ctx, "", stands.SPKI, after, maxUses+1)
	if err != nil {
		return nil, databaseError("reading the key's certificates", err)
	}
	out := &Blocking{BlockedKey: stands, Uses: []KeyUse{}}
	for i, u := range uses {
		if i == maxUses {
			out.Next = uses[i-1].N
			break
		}
		out.Uses = append(out.Uses, KeyUse{KeyUse: u})
	}
	return out, nil
}

// mayBlock refuses the keys of CAs and responders: blocking one would end the installation, and is done by revoking its certificate.
func (b *Blocker) mayBlock(ctx context.Context, spki []byte) error {
	for _, a := range b.cfg.Authorities().All() {
		if bytes.Equal(keyHash(a.SPKI), spki) {
			return refuse(KeyNotPermitted, "spki_sha256", "it is the key of %s, a CA of this installation", a.Issuer)
		}
	}
	uses, err := b.cfg.Record.KeyUses(ctx, "", spki, 0, maxUses)
	if err != nil {
		return databaseError("reading the key's certificates", err)
	}
	for i := range uses {
		if isInfrastructure(&uses[i].Certificate) {
			return refuse(KeyNotPermitted, "spki_sha256", "it is the key of a CA or an OCSP responder of this installation")
		}
	}
	return nil
}

func (b *Blocker) audit(q BlockRequest, outcome string) error {
	detail := fmt.Sprintf("reason %s, revoke %v, approved by %s, comment %q", q.Reason, q.Revoke, strings.Join(q.Approvers, " "), q.Comment)
	record, err := journal.New(journal.Audit{Actor: q.Actor.String(), Event: "key-blocked", Object: "spki:" + hex.EncodeToString(q.SPKI), Outcome: outcome, Detail: detail})
	if err == nil {
		err = b.cfg.Journal.Append(record)
	}
	if err != nil {
		return unavailable(JournalUnavailable, err, "this node cannot record what it does: repeat the request")
	}
	return nil
}

// revokers is how many certificates are revoked at once: each waits for the responders.
const revokers = 16

func (b *Blocker) revoke(ctx context.Context, uses []KeyUse, q BlockRequest) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, revokers)
	now := b.cfg.Now()
	for i := range uses {
		u := &uses[i]
		switch u.Status(now) {
		case db.StatusAbandoned, db.StatusExpired:
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			u.Revoked, u.Err = b.cfg.Revoker.Revoke(ctx, RevokeRequest{
				Issuer: u.Intent.Issuer, Serial: u.Intent.Serial, Reason: ReasonKeyCompromise, Comment: q.Comment, Actor: q.Actor,
			})
		})
	}
	wg.Wait()
}

// blockRecord is the part of KeyRecord that blockKey needs.
type blockRecord interface {
	BlockKey(ctx context.Context, b db.BlockedKey) (stands db.BlockedKey, node string, err error)
	Blocked(ctx context.Context, except string, spkis ...[]byte) ([]db.BlockedKey, error)
}

// blockKey blocks a key and returns the block that stands once another database node shows it: a commit can be lost.
func blockKey(ctx context.Context, record blockRecord, log *slog.Logger, b db.BlockedKey) (db.BlockedKey, error) {
	for range maxAttempts {
		_, node, err := record.BlockKey(ctx, b)
		if err != nil {
			return b, databaseError("blocking the key", err)
		}
		found, err := record.Blocked(ctx, node, b.SPKI)
		if err != nil {
			return b, databaseError("reading the blocked key back", err)
		}
		if len(found) == 1 {
			return found[0], nil
		}
		log.Error("a block that was committed is not there when read back on another node", "spki_sha256", hex.EncodeToString(b.SPKI))
	}
	return b, &Error{Name: OutcomeUnknown, RetryAfter: retryLater, Detail: "the database does not keep the block: repeat the request"}
}
