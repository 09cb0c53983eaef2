package db

import (
	"context"
	"database/sql"
	"io/fs"
	"slices"

	"github.com/pressly/goose/v3"
)

// Tables are those that grants know of.
var Tables = all

// MayAdd tells whether a role's account may insert into a table.
func MayAdd(role, table string) bool { return slices.Contains(rights[role].add, table) }

// MigrateTo brings an empty database to what an earlier version of the program left.
func MigrateTo(ctx context.Context, cfg Config, version int64) error {
	return withAdmin(ctx, cfg, "migrate", func(ctx context.Context, db *sql.DB) error {
		dir, err := fs.Sub(migrations, "migrations")
		if err != nil {
			return err
		}
		p, err := goose.NewProvider(goose.DialectMySQL, db, dir)
		if err != nil {
			return err
		}
		_, err = p.UpTo(ctx, version)
		return err
	})
}
