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

// Intent is the durable record that a certificate is about to be signed. Times are UTC, to the microsecond.
type Intent struct {
	Issuer         string // generation: "demo-g1"
	Serial         []byte // 1 to 20 octets
	Req            []byte // SHA-256(principal, 0, Idempotency-Key); nil only for rows that a restart reconstructs
	Ver            uint32 // 1 if 0; only recovery writes higher
	Body           []byte // SHA-256 of the parsed request
	TBS            []byte // DER TBSCertificate; nil once it is no longer needed, see tbs.go
	Profile        string
	ProfileVersion uint32
	ProfileHash    []byte // SHA-256
	Requester      string // principal URI
	Reference      string
	SiteEpoch      uint64
	Node           string
	MAC            []byte // HMAC-SHA-256, see MACKeys; nil: none
	Created        time.Time
	MACKey         []byte // id of the key that made MAC, 8 octets; nil: none

	// Key is the SHA-256 of the subject's DER SubjectPublicKeyInfo, 32 octets: InsertIntents adds the intent to that key's chain, unless the key
	// is blocked. nil: it is not looked at. It is not a column, and not filled in by reading.
	Key []byte
	// Blocked says that InsertIntents did not insert the intent because its key is blocked.
	Blocked bool
}

// id is the primary key, for maps.
func (i *Intent) id() string { return i.Issuer + "/" + string(i.Serial) }

const intentColumns = "issuer, serial, req, ver, body, tbs, profile, profile_version, profile_hash, requester, reference, site_epoch, node, mac, created, mac_key"

var intentTable = &table{name: "intent", columns: strings.Split(intentColumns, ", "), key: 2}

// row is the intent's row, without its TBSCertificate if that is kept apart.
func (i *Intent) row(apart bool) []any {
	tbs := notNull(i.TBS)
	if apart {
		tbs = []byte{}
	}
	return []any{i.Issuer, i.Serial, i.Req, i.Ver, i.Body, tbs, i.Profile, i.ProfileVersion, i.ProfileHash,
		i.Requester, i.Reference, i.SiteEpoch, i.Node, i.MAC, i.Created, i.MACKey}
}

func (i *Intent) dest() []any {
	return []any{&i.Issuer, &i.Serial, &i.Req, &i.Ver, &i.Body, &i.TBS, &i.Profile, &i.ProfileVersion, &i.ProfileHash,
		&i.Requester, &i.Reference, &i.SiteEpoch, &i.Node, &i.MAC, &i.Created, &i.MACKey}
}

// check refuses what the columns cannot hold: INSERT IGNORE would cut it instead of failing.
func (i *Intent) check() error {
	for _, f := range []struct {
		name     string
		n        int
		min, max int
	}{
		{"issuer", len(i.Issuer), 1, 40}, {"serial", len(i.Serial), 1, 20}, {"body", len(i.Body), 32, 32}, {"tbs", len(i.TBS), 0, 65535},
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
	if i.MAC != nil && (len(i.MAC) != 32 || len(i.MACKey) != 8) {
		return fmt.Errorf("intent %s:%x: mac has %d octets and its key's id %d, not 32 and 8", i.Issuer, i.Serial, len(i.MAC), len(i.MACKey))
	}
	if i.Key != nil && len(i.Key) != 32 {
		return fmt.Errorf("intent %s:%x: the hash of its key has %d octets, not 32", i.Issuer, i.Serial, len(i.Key))
	}
	return nil
}

// InsertIntents commits the intents and returns, for each, the row that now owns its Req: the same
// one, or the row of whoever came first (another Serial), which the caller adopts. For an intent
// without Req the row with its serial is returned. One contested key does not hinder its neighbours.
// An intent whose key is blocked is not inserted: unless its Req has an owner already, what is returned for it has Blocked
// set. It returns the node that committed. Ver and Created are filled in where zero.
func (s *Store) InsertIntents(ctx context.Context, in []Intent) ([]Intent, string, error) {
	if len(in) == 0 {
		return nil, "", nil
	}
	now := micros(s.cfg.Now())
	for i := range in {
		if in[i].Ver == 0 {
			in[i].Ver = 1
		}
		if in[i].Created.IsZero() {
			in[i].Created = now
		}
		in[i].Created = micros(in[i].Created)
		err := in[i].check()
		if err == nil && len(in[i].TBS) == 0 {
			err = fmt.Errorf("intent %s:%x: it has no TBSCertificate", in[i].Issuer, in[i].Serial)
		}
		if err != nil {
			return nil, "", &Error{Class: Fatal, Op: "insert intents", Err: err}
		}
	}
	place, err := s.tbsPlace(ctx)
	if err != nil {
		return nil, "", err
	}
	refused := make(map[int]bool)
	for i := range in {
		refused[i] = s.blocked.has(in[i].Key)
	}
	for {
		owners, node, err := s.insertIntents(ctx, in, refused, place)
		var b *keysBlocked
		if !errors.As(err, &b) || ClassOf(err) == Ambiguous {
			return owners, node, err
		}
		// Again, without them.
		s.blocked.add(b.spkis)
		for i := range in {
			refused[i] = refused[i] || slices.ContainsFunc(b.spkis, func(k []byte) bool { return bytes.Equal(k, in[i].Key) })
		}
	}
}

// insertIntents is InsertIntents but for those that are refused, which are only looked up. It fails with keysBlocked if there are more of those.
func (s *Store) insertIntents(ctx context.Context, in []Intent, refused map[int]bool, place tbsPlace) ([]Intent, string, error) {
	order := make([]*Intent, 0, len(in))
	for i := range in {
		if !refused[i] {
			order = append(order, &in[i])
		}
	}
	owners := make([]Intent, len(in))
	copy(owners, in)
	if len(order) < len(in) {
		if err := s.refusedOwners(ctx, in, refused, owners, place); err != nil {
			return nil, "", err
		}
		if len(order) == 0 {
			return owners, "", nil
		}
	}
	// The same order everywhere: contenders meet at the first key instead of dead-locking at two.
	slices.SortFunc(order, func(a, b *Intent) int { return slices.Compare(a.Req, b.Req) })
	rows := make([][]any, len(order))
	for i, r := range order {
		rows[i] = r.row(place.apart)
	}
	node, err := s.Write(ctx, "insert intents", func(ctx context.Context, tx *sql.Tx) error {
		for i := range in { // an earlier attempt may have found other owners, and was undone
			if !refused[i] {
				owners[i] = in[i]
			}
		}
		// IGNORE passes over taken keys, and needs no right to UPDATE. If every row went
		// in, every row is ours once COMMIT succeeds.
		n, err := intentTable.insert(ctx, tx, "INSERT IGNORE", rows)
		if err != nil {
			return err
		}
		mine := order
		if n < int64(len(rows)) {
			if mine, err = settleOwners(ctx, tx, in, refused, owners, place); err != nil {
				return err
			}
		}
		repeated := n < int64(len(rows))
		if place.apart {
			if err := insertTBS(ctx, tx, mine, repeated); err != nil {
				return err
			}
		}
		return useKeys(ctx, tx, mine, repeated)
	})
	if err != nil {
		return nil, node, err
	}
	return owners, node, nil
}

// settleOwners fills in who owns each intent that is not refused, and returns those of in that own their keys themselves.
func settleOwners(ctx context.Context, tx *sql.Tx, in []Intent, refused map[int]bool, owners []Intent, place tbsPlace) (mine []*Intent, err error) {
	var asked []Intent
	for i := range in {
		if !refused[i] {
			asked = append(asked, in[i])
		}
	}
	found, err := intentOwners(ctx, tx, asked, place)
	if err != nil {
		return nil, err
	}
	next := 0
	for i := range in {
		if refused[i] {
			continue
		}
		owners[i] = found[next]
		next++
		if owners[i].id() == in[i].id() {
			mine = append(mine, &in[i])
		}
	}
	return mine, nil
}

// refusedOwners fills in what becomes of intents whose key is blocked: a request that has its row already keeps it.
func (s *Store) refusedOwners(ctx context.Context, in []Intent, refused map[int]bool, owners []Intent, place tbsPlace) error {
	_, err := s.Read(ctx, "intents of blocked keys", "", func(ctx context.Context, c *sql.Conn) error {
		for i := range in {
			if !refused[i] {
				continue
			}
			found, err := intentOwners(ctx, c, in[i:i+1], place)
			switch {
			case errors.Is(err, errSerialTaken): // that is to say that nobody has it
				owners[i] = in[i]
				owners[i].Blocked = true
			case err != nil:
				return err
			default:
				owners[i] = found[0]
			}
		}
		return nil
	})
	return err
}

var errSerialTaken = errors.New("its serial is taken by another request")

// intentOwners returns the row that owns each intent's key.
func intentOwners(ctx context.Context, q Querier, in []Intent, place tbsPlace) ([]Intent, error) {
	var reqs, keys []any
	var conds []string
	for i := range in {
		if in[i].Req != nil {
			reqs = append(reqs, in[i].Req)
		} else {
			conds, keys = append(conds, "(i.issuer = ? AND i.serial = ?)"), append(keys, in[i].Issuer, in[i].Serial)
		}
	}
	if len(reqs) > 0 {
		conds = append(conds, "i.req IN ("+marks(len(reqs))+")")
	}
	byReq, byKey := map[string]Intent{}, map[string]Intent{}
	columns, join := place.intents()
	err := query(ctx, q, func(r *sql.Rows) error {
		var i Intent
		if err := r.Scan(i.dest()...); err != nil {
			return err
		}
		i.TBS = notEmpty(i.TBS)
		if old, ok := byReq[string(i.Req)]; !ok || i.Ver > old.Ver {
			byReq[string(i.Req)] = i // recovery may have given the key a higher version
		}
		byKey[i.id()] = i
		return nil
	}, "SELECT "+columns+" FROM intent i"+join+" WHERE "+strings.Join(conds, " OR "), append(keys, reqs...)...)
	if err != nil {
		return nil, fmt.Errorf("reading intents: %w", err)
	}
	out := make([]Intent, len(in))
	for i := range in {
		var ok bool
		if in[i].Req != nil {
			out[i], ok = byReq[string(in[i].Req)]
		} else {
			out[i], ok = byKey[in[i].id()]
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
	place, err := s.tbsPlace(ctx)
	if err != nil {
		return nil, err
	}
	columns, join := place.intents()
	before, from := micros(now.Add(-olderThan)), s.sweep.from
	full, deep := now.Sub(s.sweep.full) >= sweepFull, now.Sub(s.sweep.deep) >= sweepDeepEvery
	switch deepest := before.Add(-sweepDeep); {
	case full:
		from = time.Unix(0, 0)
	case deep && deepest.Before(from):
		from = deepest
	}
	var out []Intent
	_, err = s.Read(ctx, "open intents", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var i Intent
			err := r.Scan(i.dest()...)
			i.TBS = notEmpty(i.TBS)
			out = append(out, i)
			return err
		}, "SELECT "+columns+` FROM (
			SELECT c.issuer, c.serial FROM intent c FORCE INDEX (created)
				LEFT JOIN outcome o ON o.issuer = c.issuer AND o.serial = c.serial
				WHERE c.created >= ? AND c.created < ? AND o.serial IS NULL ORDER BY c.created LIMIT ?
			) open JOIN intent i ON i.issuer = open.issuer AND i.serial = open.serial`+join+" ORDER BY i.created", micros(from), before, limit)
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
	Round   RoundState // as of the same reading; only where there is an Intent
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
			var round RoundState
			row, err := scanIssued(r, &round.N, &round.Ended)
			if err != nil {
				return err
			}
			row.Round = round
			key := string(row.Intent.Req)
			if old, ok := found[key]; !ok || row.newer(old) {
				found[key] = row
			}
			return nil
		}, "SELECT "+issuedColumns+", "+roundColumns+` FROM intent i LEFT JOIN outcome o ON o.issuer = i.issuer AND o.serial = i.serial
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
