package db

import (
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

// Intent is the durable record that a certificate is about to be signed. Times are UTC, to the microsecond.
type Intent struct {
	Issuer         string // generation: "demo-g1"
	Serial         []byte // 1 to 20 octets
	Req            []byte // SHA-256(principal, 0, Idempotency-Key); nil only for rows that a restart reconstructs
	Ver            uint32 // 1 if 0; only recovery writes higher
	Body           []byte // SHA-256 of the parsed request
	TBS            []byte // DER TBSCertificate
	Profile        string
	ProfileVersion uint32
	ProfileHash    []byte // SHA-256
	Requester      string // principal URI
	Reference      string
	SiteEpoch      uint64
	Node           string
	MAC            []byte // 32 octets or nil
	Created        time.Time
}

const intentColumns = "issuer, serial, req, ver, body, tbs, profile, profile_version, profile_hash, requester, reference, site_epoch, node, mac, created"

var intentTable = &table{name: "intent", columns: strings.Split(intentColumns, ", "), key: 2}

func (i *Intent) row() []any {
	return []any{i.Issuer, i.Serial, i.Req, i.Ver, i.Body, i.TBS, i.Profile, i.ProfileVersion, i.ProfileHash,
		i.Requester, i.Reference, i.SiteEpoch, i.Node, i.MAC, i.Created}
}

func (i *Intent) dest() []any {
	return []any{&i.Issuer, &i.Serial, &i.Req, &i.Ver, &i.Body, &i.TBS, &i.Profile, &i.ProfileVersion, &i.ProfileHash,
		&i.Requester, &i.Reference, &i.SiteEpoch, &i.Node, &i.MAC, &i.Created}
}

// check refuses what the columns cannot hold: INSERT IGNORE would cut it instead of failing.
func (i *Intent) check() error {
	for _, f := range []struct {
		name     string
		n        int
		min, max int
	}{
		{"issuer", len(i.Issuer), 1, 40}, {"serial", len(i.Serial), 1, 20}, {"body", len(i.Body), 32, 32}, {"tbs", len(i.TBS), 1, 65535},
		{"profile", len(i.Profile), 1, 64}, {"profile hash", len(i.ProfileHash), 32, 32}, {"requester", len(i.Requester), 1, 255},
		{"reference", len(i.Reference), 0, 255}, {"node", len(i.Node), 1, 64},
	} {
		if f.n < f.min || f.n > f.max {
			return fmt.Errorf("intent %s:%x: %s has %d octets, not %d to %d", i.Issuer, i.Serial, f.name, f.n, f.min, f.max)
		}
	}
	if i.Req != nil && len(i.Req) != 32 {
		return fmt.Errorf("intent %s:%x: req has %d octets, not 32", i.Issuer, i.Serial, len(i.Req))
	}
	if i.MAC != nil && len(i.MAC) != 32 {
		return fmt.Errorf("intent %s:%x: mac has %d octets, not 32", i.Issuer, i.Serial, len(i.MAC))
	}
	return nil
}

// InsertIntents commits the intents and returns, for each, the row that now owns its Req: the same
// one, or the row of whoever came first (another Serial), which the caller adopts. For an intent
// without Req the row with its serial is returned. One contested key does not hinder its neighbours.
// It returns the node that committed. Ver and Created are filled in where zero.
func (s *Store) InsertIntents(ctx context.Context, in []Intent) ([]Intent, string, error) {
	if len(in) == 0 {
		return nil, "", nil
	}
	now := micros(s.cfg.Now())
	order := make([]*Intent, len(in))
	for i := range in {
		if in[i].Ver == 0 {
			in[i].Ver = 1
		}
		if in[i].Created.IsZero() {
			in[i].Created = now
		}
		in[i].Created = micros(in[i].Created)
		if err := in[i].check(); err != nil {
			return nil, "", &Error{Class: Fatal, Op: "insert intents", Err: err}
		}
		order[i] = &in[i]
	}
	// The same order everywhere: contenders meet at the first key instead of dead-locking at two.
	slices.SortFunc(order, func(a, b *Intent) int { return slices.Compare(a.Req, b.Req) })
	rows := make([][]any, len(in))
	for i, r := range order {
		rows[i] = r.row()
	}
	var owners []Intent
	node, err := s.Write(ctx, "insert intents", func(ctx context.Context, tx *sql.Tx) error {
		// IGNORE passes over taken keys, and needs no right to UPDATE. If every row went
		// in, every row is ours once COMMIT succeeds.
		n, err := intentTable.insert(ctx, tx, "INSERT IGNORE", rows)
		if err != nil || n == int64(len(rows)) {
			owners = in
			return err
		}
		owners, err = intentOwners(ctx, tx, in)
		return err
	})
	if err != nil {
		return nil, node, err
	}
	return owners, node, nil
}

var errSerialTaken = errors.New("its serial is taken by another request")

// intentOwners returns the row that owns each intent's key.
func intentOwners(ctx context.Context, q Querier, in []Intent) ([]Intent, error) {
	var reqs, keys []any
	var conds []string
	for i := range in {
		if in[i].Req != nil {
			reqs = append(reqs, in[i].Req)
		} else {
			conds, keys = append(conds, "(issuer = ? AND serial = ?)"), append(keys, in[i].Issuer, in[i].Serial)
		}
	}
	if len(reqs) > 0 {
		conds = append(conds, "req IN ("+marks(len(reqs))+")")
	}
	byReq, byKey := map[string]Intent{}, map[string]Intent{}
	err := query(ctx, q, func(r *sql.Rows) error {
		var i Intent
		if err := r.Scan(i.dest()...); err != nil {
			return err
		}
		byReq[fmt.Sprintf("%x/%d", i.Req, i.Ver)] = i
		byKey[i.Issuer+"/"+string(i.Serial)] = i
		return nil
	}, "SELECT "+intentColumns+" FROM intent WHERE "+strings.Join(conds, " OR "), append(keys, reqs...)...)
	if err != nil {
		return nil, fmt.Errorf("reading intents: %w", err)
	}
	out := make([]Intent, len(in))
	for i := range in {
		var ok bool
		if in[i].Req != nil {
			out[i], ok = byReq[fmt.Sprintf("%x/%d", in[i].Req, in[i].Ver)]
		} else {
			out[i], ok = byKey[in[i].Issuer+"/"+string(in[i].Serial)]
		}
		if !ok {
			return nil, fmt.Errorf("inserting intent %s:%x: %w", in[i].Issuer, in[i].Serial, errSerialTaken)
		}
	}
	return out, nil
}

// sweep remembers how far OpenIntents found everything finished, so that it does not read the whole record every time.
type sweep struct {
	mu   sync.Mutex
	from time.Time // no intent open at the last reading was created before this
	deep time.Time // when sweepDeep was last read
	full time.Time // when everything was last read
}

// An intent is looked at once or twice in its life, since at full load an hour of them is a million. Rows are in the
// database within olderThan of their Created, but for sweepSlack of clocks apart; a minute later sweepDeep is read again for
// those that a slow retry brought in late, and everything for those that recovery puts back.
const (
	sweepSlack     = 2 * time.Second
	sweepDeep      = 2 * time.Minute
	sweepDeepEvery = time.Minute
	sweepFull      = time.Hour
)

// OpenIntents returns up to limit intents that were created more than olderThan ago and have no outcome, the oldest
// first, as causally read. Those that came into the database more than olderThan after their Created may be missing for
// sweepDeepEvery, those that are older than sweepDeep then for sweepFull.
func (s *Store) OpenIntents(ctx context.Context, olderThan time.Duration, limit int) ([]Intent, error) {
	s.sweep.mu.Lock()
	defer s.sweep.mu.Unlock()
	now := s.cfg.Now()
	before, from := micros(now.Add(-olderThan)), s.sweep.from
	full, deep := now.Sub(s.sweep.full) >= sweepFull, now.Sub(s.sweep.deep) >= sweepDeepEvery
	switch deepest := before.Add(-sweepDeep); {
	case full:
		from = time.Unix(0, 0)
	case deep && deepest.Before(from):
		from = deepest
	}
	var out []Intent
	_, err := s.Read(ctx, "open intents", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var i Intent
			err := r.Scan(i.dest()...)
			out = append(out, i)
			return err
		}, "SELECT "+prefixed("i", intentColumns)+` FROM intent i FORCE INDEX (created)
			LEFT JOIN outcome o ON o.issuer = i.issuer AND o.serial = i.serial
			WHERE i.created >= ? AND i.created < ? AND o.serial IS NULL ORDER BY i.created LIMIT ?`, micros(from), before, limit)
	})
	if err != nil {
		return nil, err
	}
	if full {
		s.sweep.full = now
	}
	if full || deep {
		s.sweep.deep = now
	}
	s.sweep.from = before.Add(-sweepSlack)
	if len(out) > 0 && out[0].Created.Before(s.sweep.from) {
		s.sweep.from = out[0].Created
	}
	return out, nil
}

// prefixed qualifies a list of columns.
func prefixed(alias, columns string) string {
	return alias + "." + strings.ReplaceAll(columns, ", ", ", "+alias+".")
}

// Issued is a request's intent and what became of it; either may be nil. Intent.TBS is not filled in.
type Issued struct {
	Intent  *Intent
	Outcome *Outcome
}

// ReadBack reads what the record holds for each request key, causally, on a node other than except (see Read). The result
// has one element per key, in order; where a key or serial has several versions, the highest.
func (s *Store) ReadBack(ctx context.Context, except string, reqs [][]byte) ([]Issued, string, error) {
	if len(reqs) == 0 {
		return nil, "", nil
	}
	args := make([]any, len(reqs))
	for i, r := range reqs {
		args[i] = r
	}
	var found map[string]Issued
	node, err := s.Read(ctx, "read back", except, func(ctx context.Context, c *sql.Conn) error {
		found = make(map[string]Issued, len(reqs))
		return query(ctx, c, func(r *sql.Rows) error {
			row, err := scanIssued(r)
			if err != nil {
				return err
			}
			key := string(row.Intent.Req)
			if old, ok := found[key]; !ok || row.newer(old) {
				found[key] = row
			}
			return nil
		}, "SELECT "+issuedColumns+` FROM intent i LEFT JOIN outcome o ON o.issuer = i.issuer AND o.serial = i.serial
			WHERE i.req IN (`+marks(len(args))+")", args...)
	})
	if err != nil {
		return nil, node, err
	}
	out := make([]Issued, len(reqs))
	for i, r := range reqs {
		out[i] = found[string(r)]
	}
	return out, node, nil
}

// issuedColumns leave the TBS out: it is the bulk of an intent, and is not needed once there is an outcome.
var issuedColumns = strings.Replace(prefixed("i", intentColumns), "i.tbs", "NULL", 1) + ", " + prefixed("o", outcomeColumns)

func scanIssued(r *sql.Rows, more ...any) (Issued, error) {
	var i Intent
	var o nullOutcome
	if err := r.Scan(append(append(i.dest(), o.dest()...), more...)...); err != nil {
		return Issued{}, err
	}
	return Issued{Intent: &i, Outcome: o.outcome()}, nil
}

// newer reports whether a row stands above another of the same request.
func (a Issued) newer(b Issued) bool {
	if c := cmp.Compare(a.Intent.Ver, b.Intent.Ver); c != 0 {
		return c > 0
	}
	return b.Outcome == nil || a.Outcome != nil && a.Outcome.Ver > b.Outcome.Ver
}
