package db

import (
	"context"
	"database/sql"
	"strings"
	"time"
)

// Member is an event of a VA's membership: the one with the highest N is what holds.
type Member struct {
	VA          string
	N           uint32 // from 1
	Event       string // in | out
	Policy      string // strict | serve
	Address     string // host:port of its mTLS listener
	Incarnation []byte // 16 octets
	Created     time.Time

	// Prior and PriorPolicy are address and policy of the process that had the name until this event and did not go out; empty: none. Only Members
	// fills them in.
	Prior, PriorPolicy string
}

// SiteEpoch is a promotion: which site writes from then on.
type SiteEpoch struct {
	N       uint64
	Site    string
	Created time.Time
}

// GroupEvent is an event of a key group's chain; the group's state is the fold of all of them.
type GroupEvent struct {
	Group   string
	N       uint32 // from 1
	Event   string // member | domain | pending | live | abandoned | …
	Subject string // member name or key id
	Payload []byte // JSON, shape by event
	Actor   string // principal URI
	Created time.Time
}

const (
	memberColumns    = "va, n, event, policy, address, incarnation, created"
	siteEpochColumns = "n, site, created"
	groupLogColumns  = "key_group, n, event, subject, payload, actor, created"
)

var (
	memberTable    = &table{name: "va_member", columns: strings.Split(memberColumns, ", "), key: 2}
	siteEpochTable = &table{name: "site_epoch", columns: strings.Split(siteEpochColumns, ", "), key: 1}
	groupLogTable  = &table{name: "group_log", columns: strings.Split(groupLogColumns, ", "), key: 2}
)

// Members returns the latest event of every VA, causally read, so that every membership committed before the call is in it.
func (s *Store) Members(ctx context.Context) ([]Member, error) {
	var out []Member
	_, err := s.Read(ctx, "members", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var m Member
			err := r.Scan(&m.VA, &m.N, &m.Event, &m.Policy, &m.Address, &m.Incarnation, &m.Created, &m.Prior, &m.PriorPolicy)
			out = append(out, m)
			return err
		}, "SELECT "+prefixed("m", memberColumns)+`, COALESCE(p.address, ''), COALESCE(p.policy, '') FROM va_member m
			LEFT JOIN va_member p ON p.va = m.va AND p.n + 1 = m.n AND p.event = 'in'
			WHERE m.n = (SELECT MAX(x.n) FROM va_member x WHERE x.va = m.va) ORDER BY m.va`)
	})
	return out, err
}

// InsertMember commits the next event of a VA. Duplicate: somebody took N; read again.
func (s *Store) InsertMember(ctx context.Context, m Member) error {
	if m.Created.IsZero() {
		m.Created = s.cfg.Now()
	}
	return s.insertOne(ctx, memberTable, []any{m.VA, m.N, m.Event, m.Policy, m.Address, m.Incarnation, micros(m.Created)})
}

// SiteEpoch returns the present epoch, causally read; N is 0 when none was ever recorded.
func (s *Store) SiteEpoch(ctx context.Context) (SiteEpoch, error) {
	var e SiteEpoch
	_, err := s.Read(ctx, "site epoch", "", func(ctx context.Context, c *sql.Conn) error {
		return query(ctx, c, func(r *sql.Rows) error { return r.Scan(&e.N, &e.Site, &e.Created) },
			"SELECT "+siteEpochColumns+" FROM site_epoch ORDER BY n DESC LIMIT 1")
	})
	return e, err
}

// InsertSiteEpoch commits a promotion. Duplicate: that epoch is another site's.
func (s *Store) InsertSiteEpoch(ctx context.Context, e SiteEpoch) error {
	if e.Created.IsZero() {
		e.Created = s.cfg.Now()
	}
	return s.insertOne(ctx, siteEpochTable, []any{e.N, e.Site, micros(e.Created)})
}

// GroupLog returns a key group's chain by n, from position from on, causally read.
func (s *Store) GroupLog(ctx context.Context, group string, from uint32) ([]GroupEvent, error) {
	return s.groupLog(ctx, "WHERE key_group = ? AND n >= ? ORDER BY n", group, from)
}

// GroupLogEnd returns the newest event of a key group's chain, causally read: none while the chain is empty.
func (s *Store) GroupLogEnd(ctx context.Context, group string) ([]GroupEvent, error) {
	return s.groupLog(ctx, "WHERE key_group = ? ORDER BY n DESC LIMIT 1", group)
}

// GroupLogEnds returns the newest event of every chain, causally read, in the order of their names.
func (s *Store) GroupLogEnds(ctx context.Context) ([]GroupEvent, error) {
	return s.groupLog(ctx, "JOIN (SELECT key_group AS chain, MAX(n) AS newest FROM group_log GROUP BY key_group) ends ON key_group = chain AND n = newest ORDER BY key_group")
}

func (s *Store) groupLog(ctx context.Context, which string, args ...any) ([]GroupEvent, error) {
	var out []GroupEvent
	_, err := s.Read(ctx, "group log", "", func(ctx context.Context, c *sql.Conn) error {
		out = nil
		return query(ctx, c, func(r *sql.Rows) error {
			var e GroupEvent
			err := r.Scan(&e.Group, &e.N, &e.Event, &e.Subject, &e.Payload, &e.Actor, &e.Created)
			out = append(out, e)
			return err
		}, "SELECT "+groupLogColumns+" FROM group_log "+which, args...)
	})
	return out, err
}

// AppendGroupLog commits the event at its N. Duplicate: somebody took N; read again and decide anew.
func (s *Store) AppendGroupLog(ctx context.Context, e GroupEvent) error {
	if e.Created.IsZero() {
		e.Created = s.cfg.Now()
	}
	return s.insertOne(ctx, groupLogTable, []any{e.Group, e.N, e.Event, e.Subject, notNull(e.Payload), e.Actor, micros(e.Created)})
}
