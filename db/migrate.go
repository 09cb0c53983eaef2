package db

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

//go:embed migrations/*.sql
var migrations embed.FS

// ddlTimeout bounds one statement of a migration.
const ddlTimeout = 5 * time.Minute

// Migrate brings the schema up to this program's version. Several processes may run it at once, on
// different nodes: a lock row lets one at a time through, and whoever comes later finds nothing to do. A
// migration that was interrupted is run again from its beginning, so each must be repeatable
// (IF NOT EXISTS), and only expand: processes of the version before go on working. cfg.User needs DDL rights.
func Migrate(ctx context.Context, cfg Config) error {
	return withAdmin(ctx, cfg, "migrate", func(ctx context.Context, db *sql.DB) error {
		dir, err := fs.Sub(migrations, "migrations")
		if err != nil {
			return err
		}
		// GET_LOCK is local to a node and so would be no lock; a row is not.
		locker, err := lock.NewMySQLTableLocker(lock.WithTableLockTimeout(250*time.Millisecond, 1200))
		if err != nil {
			return err
		}
		// Out of order: branches of the program that were made side by side each bring a number.
		p, err := goose.NewProvider(goose.DialectMySQL, db, dir, goose.WithLocker(locker), goose.WithAllowOutofOrder(true))
		if err != nil {
			return err
		}
		if _, err = p.Up(ctx); err != nil {
			return err
		}
		return firstTBSPartitions(ctx, db, cfg)
	})
}

// withAdmin runs fn with a pool for DDL to one healthy node, again and elsewhere while what stops it is passing. Every statement
// waits for what other nodes have committed.
func withAdmin(ctx context.Context, cfg Config, op string, fn func(context.Context, *sql.DB) error) error {
	s, err := Open(cfg)
	if err != nil {
		return err
	}
	defer s.Close()
	return s.ddl(ctx, op, fn)
}

// ddl is withAdmin on a store that is open. What fn runs must bear being run again after it took effect.
func (s *Store) ddl(ctx context.Context, op string, fn func(context.Context, *sql.DB) error) error {
	a := attempts{s: s, op: op}
	for {
		nodes, err := s.await(ctx, op)
		if err != nil {
			return err
		}
		if len(nodes) > 1 && a.avoid != nil {
			nodes = without(nodes, a.avoid)
		}
		a.avoid, a.node = nil, nodes[0]
		c, err := newConnector(s.cfg, a.node, kind{syncWait: 15, io: ddlTimeout})
		if err != nil {
			return err
		}
		db := sql.OpenDB(c)
		err = fn(ctx, db)
		err = errors.Join(err, db.Close())
		if err == nil {
			return nil
		}
		class := classify(err)
		if class == None {
			return fmt.Errorf("database: %s on %s: %w", op, a.address(), err)
		}
		a.judge(ctx, class, err)
		if err := a.next(ctx, &Error{Class: class, Op: op, Node: a.address(), Err: err}); err != nil {
			return err
		}
	}
}
