package db

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Kinds of rows in the chain of a subject key.
const (
	useIssue = "issue"
	useBlock = "block"
)

// BlockedKey is a subject key that must not be certified any more. There is no way back.
type BlockedKey struct {
	SPKI    []byte // SHA-256 of the DER SubjectPublicKeyInfo
	N       uint32 // number of the block in the key's chain; set by BlockKey
	Reason  string // 1 to 32 octets
	Comment string // up to 1000 octets
	Actor   string // principal URI
	Created time.Time
}

const (
	keyUseColumns     = "spki, n, kind, issuer, serial"
	blockedKeyColumns = "spki, n, reason, comment, actor, created"
)

var (
	keyUseTable     = &table{name: "key_use", columns: strings.Split(keyUseColumns, ", "), key: 2}
	blockedKeyTable = &table{name: "blocked_key", columns: strings.Split(blockedKeyColumns, ", "), key: 1}
)

func (b *BlockedKey) row() []any {
	return []any{b.SPKI, b.N, b.Reason, b.Comment, b.Actor, b.Created}
}

func (b *BlockedKey) dest() []any {
	return []any{&b.SPKI, &b.N, &b.Reason, &b.Comment, &b.Actor, &b.Created}
}

func (b *BlockedKey) check() error {
	for _, f := range []struct {
		name     string
		n        int
		min, max int
	}{{"spki", len(b.SPKI), 32, 32}, {"reason", len(b.Reason), 1, 32}, {"comment", len(b.Comment), 0, 1000}, {"actor", len(b.Actor), 1, 255}} {
		if f.n < f.min || f.n > f.max {
			return fmt.Errorf("blocking key %x: %s has %d octets, not %d to %d", b.SPKI, f.name, f.n, f.min, f.max)
		}
	}
	return nil
}

// BlockKey blocks a key, or finds it blocked: it returns the block that stands, which may be an earlier one, and the node that said so. Every
// intent with that key is either in the chain below the block's number (see KeyUses), or was refused. Created is filled in where zero.
func (s *Store) BlockKey(ctx context.Context, b BlockedKey) (BlockedKey, string, error) {
	if b.Created.IsZero() {
		b.Created = s.cfg.Now()
	}
	b.Created = micros(b.Created)
	if err := b.check(); err != nil {
		return BlockedKey{}, "", &Error{Class: Fatal, Op: "block key", Err: err}
	}
	for tries := 0; ; {
		var stands BlockedKey
		node, err := s.Write(ctx, "block key", func(ctx context.Context, tx *sql.Tx) error {
			stands = BlockedKey{}
			err := tx.QueryRowContext(ctx, "SELECT "+blockedKeyColumns+" FROM blocked_key WHERE spki = ?", b.SPKI).Scan(stands.dest()...)
			if !errors.Is(err, sql.ErrNoRows) {
				return err
			}
			// What is read may be old; the number is then taken, and the transaction fails.
			var n sql.Null[uint32]
			if err := tx.QueryRowContext(ctx, "SELECT MAX(n) FROM key_use WHERE spki = ?", b.SPKI).Scan(&n); err != nil {
				return err
			}
			stands = b
			stands.N = n.V + 1
			if _, err := keyUseTable.insert(ctx, tx, "INSERT", [][]any{{b.SPKI, stands.N, useBlock, "", ""}}); err != nil {
				return err
			}
			_, err = blockedKeyTable.insert(ctx, tx, "INSERT", [][]any{stands.row()})
			return err
		})
		if ClassOf(err) == Duplicate {
			tries++
			if pause(ctx, tries) == nil {
				continue // a certificate took the number, or another block: read again
			}
		}
		return stands, node, err
	}
}

// Blocked returns those of the keys that are blocked, causally read on a node other than except (see Read).
func (s *Store) Blocked(ctx context.Context, except string, spkis ...[]byte) ([]BlockedKey, error) {
	if len(spkis) == 0 {
		return nil, nil
	}
	args := make([]any, len(spkis))
	for i, k := range spkis {
		args[i] = k
	}
	return s.blockedKeys(ctx, except, "spki IN ("+marks(len(args))+")", args...)
}

// BlockedKeys returns up to limit blocked keys in the order of their hashes, from the first one after a hash on, causally read.
func (s *Store) BlockedKeys(ctx context.Context, after []byte, limit int) ([]BlockedKey, error) {
	if after == nil {
		after = []byte{}
	}
	return s.blockedKeys(ctx, "", "spki > ? ORDER BY spki LIMIT ?", after, limit)
}

func (s *Store) blockedKeys(ctx context.Context, except, where string, args ...any) ([]BlockedKey, error) {
	var out []BlockedKey
	_, err := s.Read(ctx, "blocked keys", except, func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var b BlockedKey
			err := r.Scan(b.dest()...)
			out = append(out, b)
			return err
		}, "SELECT "+blockedKeyColumns+" FROM blocked_key WHERE "+where, args...)
	})
	return out, err
}

// KeyUse is one certificate, or attempt at one, for a subject key.
type KeyUse struct {
	N uint32 // in the key's chain
	Certificate
}

// KeyUses returns up to limit uses of a key with numbers above after, in order, causally read on a node other than except (see Read).
func (s *Store) KeyUses(ctx context.Context, except string, spki []byte, after uint32, limit int) ([]KeyUse, error) {
	var out []KeyUse
	_, err := s.Read(ctx, "key uses", except, func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var rev nullRevocation
			var use KeyUse
			var round RoundState
			row, err := scanIssued(r, append(rev.dest(), &round.N, &round.Ended, &use.N)...)
			if err != nil {
				return err
			}
			use.Certificate = Certificate{Intent: *row.Intent, Outcome: row.Outcome, Revocation: rev.revocation()}
			out = append(out, use)
			return nil
		}, keyUseQuery+"k.spki = ? AND k.kind = ? AND k.n > ? ORDER BY k.n LIMIT ?", spki, useIssue, after, limit)
	})
	return out, err
}

// keyUseQuery is certificateQuery from the key's side.
var keyUseQuery = strings.Replace(certificateQuery, " FROM intent i", ", k.n FROM key_use k JOIN intent i ON i.issuer = k.issuer AND i.serial = k.serial", 1)

// keysBlocked ends a transaction some of whose keys are blocked.
type keysBlocked struct{ spkis [][]byte }

func (e *keysBlocked) Error() string { return fmt.Sprintf("%d of the keys are blocked", len(e.spkis)) }

// use is a row of key_use that is to be inserted for an intent.
type use struct {
	intent *Intent
	n      uint32
}

func (u *use) row() []any {
	return []any{u.intent.Key, u.n, useIssue, u.intent.Issuer, u.intent.Serial}
}

// useKeys adds the intents, which are new in this transaction or were committed whole by an earlier attempt, to the chains of their keys. For
// keys that nobody has used before it is one statement. repeated tells that some intents may be in their chains already.
func useKeys(ctx context.Context, tx *sql.Tx, intents []*Intent, repeated bool) error {
	pending := make([]*use, 0, len(intents))
	for _, i := range intents {
		if i.Key != nil {
			pending = append(pending, &use{intent: i, n: 1})
		}
	}
	// The same order everywhere, as for the intents.
	slices.SortStableFunc(pending, func(a, b *use) int {
		return cmp.Or(bytes.Compare(a.intent.Key, b.intent.Key), bytes.Compare(a.intent.Serial, b.intent.Serial))
	})
	if repeated {
		done, err := usesWhere(ctx, tx, pending, "spki = ? AND issuer = ? AND serial = ?", func(u *use) []any { return []any{u.intent.Key, u.intent.Issuer, u.intent.Serial} })
		if err != nil {
			return err
		}
		pending = slices.DeleteFunc(pending, func(u *use) bool { return done[u.intent.id()] })
	}
	assign(pending, func(string) uint32 { return 0 })
	for len(pending) > 0 {
		rows := make([][]any, len(pending))
		for i, u := range pending {
			rows[i] = u.row()
		}
		n, err := keyUseTable.insert(ctx, tx, "INSERT IGNORE", rows)
		if err != nil || n == int64(len(rows)) {
			return err
		}
		in, err := usesWhere(ctx, tx, pending, "spki = ? AND n = ?", func(u *use) []any { return []any{u.intent.Key, u.n} })
		if err != nil {
			return err
		}
		pending = slices.DeleteFunc(pending, func(u *use) bool { return in[u.intent.id()] })
		tips, blocked, err := chainTips(ctx, tx, pending)
		if err != nil {
			return err
		}
		if len(blocked) > 0 {
			return &keysBlocked{blocked}
		}
		assign(pending, func(spki string) uint32 { return tips[spki] })
	}
	return nil
}

// assign gives the uses of each key the numbers after its tip. They are sorted by key.
func assign(uses []*use, tip func(spki string) uint32) {
	for i, u := range uses {
		if i > 0 && bytes.Equal(u.intent.Key, uses[i-1].intent.Key) {
			u.n = uses[i-1].n + 1
		} else {
			u.n = tip(string(u.intent.Key)) + 1
		}
	}
}

// usesWhere returns the ids of the intents that rows of key_use name which the condition finds, one for each use.
func usesWhere(ctx context.Context, tx *sql.Tx, uses []*use, one string, args func(*use) []any) (map[string]bool, error) {
	found := make(map[string]bool)
	if len(uses) == 0 {
		return found, nil
	}
	var all []any
	for _, u := range uses {
		all = append(all, args(u)...)
	}
	where := strings.TrimSuffix(strings.Repeat("("+one+") OR ", len(uses)), " OR ")
	err := query(ctx, tx, func(r *sql.Rows) error {
		var i Intent
		err := r.Scan(&i.Issuer, &i.Serial)
		found[i.id()] = true
		return err
	}, "SELECT issuer, serial FROM key_use WHERE "+where, all...)
	if err != nil {
		return nil, fmt.Errorf("reading uses of keys: %w", err)
	}
	return found, nil
}

// chainTips returns the highest number in each key's chain, and the keys that are blocked.
func chainTips(ctx context.Context, tx *sql.Tx, uses []*use) (tips map[string]uint32, blocked [][]byte, err error) {
	tips = make(map[string]uint32)
	if len(uses) == 0 {
		return tips, nil, nil
	}
	var keys []any
	for _, u := range uses {
		keys = append(keys, u.intent.Key)
	}
	err = query(ctx, tx, func(r *sql.Rows) error {
		var spki []byte
		var n uint32
		err := r.Scan(&spki, &n)
		tips[string(spki)] = n
		return err
	}, "SELECT spki, MAX(n) FROM key_use WHERE spki IN ("+marks(len(keys))+") GROUP BY spki", keys...)
	if err == nil {
		err = query(ctx, tx, func(r *sql.Rows) error {
			var spki []byte
			err := r.Scan(&spki)
			blocked = append(blocked, spki)
			return err
		}, "SELECT spki FROM blocked_key WHERE spki IN ("+marks(len(keys))+")", keys...)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reading the chains of keys: %w", err)
	}
	return tips, blocked, nil
}

// blockedCache remembers blocked keys that were asked for, so that whoever asks again does not undo the transaction of others in his batch. A
// block stands for ever, so nothing in it grows old.
type blockedCache struct {
	mu   sync.Mutex
	keys map[[32]byte]struct{}
}

const blockedCacheSize = 1 << 16

func (c *blockedCache) add(spkis [][]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keys == nil || len(c.keys)+len(spkis) > blockedCacheSize {
		c.keys = make(map[[32]byte]struct{})
	}
	for _, k := range spkis {
		c.keys[[32]byte(k)] = struct{}{}
	}
}

func (c *blockedCache) has(spki []byte) bool {
	if len(spki) != 32 {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.keys[[32]byte(spki)]
	return ok
}
