package db

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

// UserSpec is an account of one kind of process.
type UserSpec struct {
	Name         string // [a-z][a-z0-9_]*
	PasswordFile string
	Role         string // a key of rights: ca, ocsp, sync, ceremony, fsck, auditor
	RequireX509  bool   // the account must also present a certificate of the server's ssl_ca
}

// all is every table of the record.
var all = []string{"writer", "lane", "intent", "outcome", "revocation", "feed", "generation", "generation_log", "responder",
	"crl", "crl_result", "va_member", "site_epoch", "group_log", "round", "recon", "round_end", "key_use", "blocked_key",
	"intent_tbs", "intent_tbs_reader", "intent_tbs_turn"}

// rights says what each role may read and add to, and whose partitions it may make and drop. Nobody may change or remove a row.
var rights = map[string]struct{ read, add, keep []string }{
	"ca": {read: all, add: []string{"writer", "lane", "intent", "outcome", "revocation", "feed", "generation", "generation_log", "responder",
		"crl", "crl_result", "va_member", "round", "recon", "round_end", "key_use", "blocked_key", "intent_tbs", "intent_tbs_reader", "intent_tbs_turn"},
		keep: []string{"intent_tbs"}},
	"ocsp": {read: []string{"writer", "lane", "intent", "outcome", "revocation", "feed", "generation", "generation_log", "responder",
		"crl", "crl_result", "va_member", "site_epoch", "round", "recon", "round_end", "group_log"}, add: []string{"va_member"}},
	"sync":     {read: []string{"generation", "generation_log", "responder", "site_epoch", "group_log"}, add: []string{"group_log"}},
	"ceremony": {read: all, add: all},
	"fsck":     {read: all},
	"auditor":  {read: all},
}

var accountName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,31}$`)

// Grant creates the accounts, sets their passwords, and gives each what its role needs. It is repeatable, also while the
// accounts are in use. It takes nothing away: an account of another role needs another name. cfg.User
// must own the database and may create accounts; run Migrate first.
func Grant(ctx context.Context, cfg Config, users []UserSpec) error {
	name := cfg.Name
	if name == "" {
		name = "trivet"
	}
	var statements []string
	for _, u := range users {
		st, err := u.statements(name)
		if err != nil {
			return err
		}
		statements = append(statements, st...)
	}
	return withAdmin(ctx, cfg, "grant", func(ctx context.Context, db *sql.DB) error {
		for _, q := range statements {
			if _, err := db.ExecContext(ctx, q); err != nil {
				return err // the statement may hold a password: it is not part of the message
			}
		}
		return nil
	})
}

func (u UserSpec) statements(database string) ([]string, error) {
	r, ok := rights[u.Role]
	if !ok {
		return nil, fmt.Errorf("granting rights to %q: unknown role %q: want one of %v", u.Name, u.Role, slices.Sorted(maps.Keys(rights)))
	}
	if !accountName.MatchString(u.Name) {
		return nil, fmt.Errorf("granting rights: account name %q: want lower-case letters, digits and _", u.Name)
	}
	b, err := os.ReadFile(u.PasswordFile)
	if err != nil {
		return nil, fmt.Errorf("granting rights to %s: reading its password: %w", u.Name, err)
	}
	password := string(bytes.TrimSpace(b))
	if password == "" {
		return nil, fmt.Errorf("granting rights to %s: %s is empty", u.Name, u.PasswordFile)
	}
	account := "'" + u.Name + "'@'%'"
	alter := "ALTER USER " + account + " IDENTIFIED BY '" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(password) + "'"
	if u.RequireX509 {
		alter += " REQUIRE X509"
	}
	out := []string{"CREATE USER IF NOT EXISTS " + account, alter}
	for _, t := range all {
		var p []string
		if slices.Contains(r.read, t) {
			p = append(p, "SELECT")
		}
		if slices.Contains(r.add, t) {
			p = append(p, "INSERT")
		}
		if slices.Contains(r.keep, t) {
			p = append(p, "ALTER", "DROP")
		}
		if len(p) > 0 {
			out = append(out, fmt.Sprintf("GRANT %s ON `%s`.`%s` TO %s", strings.Join(p, ", "), strings.ReplaceAll(database, "`", "``"), t, account))
		}
	}
	return out, nil
}
