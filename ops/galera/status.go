package galera

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os/user"
	"strconv"
	"time"

	"github.com/go-sql-driver/mysql"
)

// Status is what a running node says about itself.
type Status struct {
	Ready     bool   // accepts queries
	Connected bool   // its group communication runs; see Guard
	Primary   bool   // belongs to the majority
	State     string // Synced, Donor/Desynced, Joined, …
	Size      int    // nodes in its component
	StateUUID string // history
	Committed int64  // last seqno
}

// Serving reports whether clients may use the node.
func (s Status) Serving() bool { return s.Ready && s.Primary && s.State == "Synced" }

// Query asks a running node for its status through its socket. It never waits for replication.
func Query(ctx context.Context, n Node) (Status, error) {
	db, err := Admin(n)
	if err != nil {
		return Status{}, err
	}
	defer db.Close()
	s, err := query(ctx, db)
	if err != nil {
		return Status{}, fmt.Errorf("asking %s for its status: %w", n.Name, err)
	}
	return s, nil
}

func query(ctx context.Context, db *sql.DB) (Status, error) {
	rows, err := db.QueryContext(ctx, `SHOW GLOBAL STATUS WHERE Variable_name IN
		('wsrep_ready', 'wsrep_connected', 'wsrep_cluster_status', 'wsrep_local_state_comment', 'wsrep_cluster_size', 'wsrep_local_state_uuid', 'wsrep_last_committed')`)
	if err != nil {
		return Status{}, err
	}
	defer rows.Close()
	var s Status
	for rows.Next() {
		var name, value string
		if err := rows.Scan(&name, &value); err != nil {
			return Status{}, err
		}
		switch name {
		case "wsrep_ready":
			s.Ready = value == "ON"
		case "wsrep_connected":
			s.Connected = value == "ON"
		case "wsrep_cluster_status":
			s.Primary = value == "Primary"
		case "wsrep_local_state_comment":
			s.State = value
		case "wsrep_cluster_size":
			s.Size, _ = strconv.Atoi(value) // empty while it starts
		case "wsrep_local_state_uuid":
			s.StateUUID = value
		case "wsrep_last_committed":
			s.Committed, _ = strconv.ParseInt(value, 10, 64)
		}
	}
	return s, rows.Err()
}

// WaitSynced returns when the node serves, or with the last obstacle when ctx ends. The caller
// watches the process itself: this function cannot see that it died.
func WaitSynced(ctx context.Context, n Node) error {
	db, err := Admin(n)
	if err != nil {
		return err
	}
	defer db.Close()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for last := errors.New("not asked yet"); ; {
		s, err := query(ctx, db)
		switch {
		case err == nil && s.Serving():
			return nil
		case err == nil:
			last = fmt.Errorf("ready %t, primary %t, state %q", s.Ready, s.Primary, s.State)
		case ctx.Err() == nil:
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s is synced: %w (last: %w)", n.Name, ctx.Err(), last)
		}
	}
}

// vain is how many times Guard has a node join again before it gives the process up.
const vain = 3

// Guard watches a running node until ctx ends, and then returns nil. A node that was frozen, or cut off from
// all others, sometimes gives up on the group for good ("failed to form singleton view": about every second
// thaw under load, with 26.4.23) while mariadbd goes on running; Guard then has it join again, which takes an incremental
// transfer. Where that does not help either, because mariadbd hangs while it leaves, Guard calls end, which is to end the process with SIGKILL and have it started
// again; every vain attempts anew. Run one Guard beside every node; it bears a node that is stopped, starting or frozen.
func Guard(ctx context.Context, n Node, log *slog.Logger, end func()) error {
	db, err := Admin(n)
	if err != nil {
		return err
	}
	defer db.Close()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for out, tries := 0, 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		qctx, cancel := context.WithTimeout(ctx, time.Second)
		s, err := query(qctx, db)
		cancel()
		if err != nil || s.Connected {
			out, tries = 0, 0
			continue
		}
		if out++; out < 2 {
			continue // it may be just starting
		}
		out = 0
		if tries++; tries > vain {
			log.Error("database node cannot join the group again, its process is ended", "node", n.Name, "tries", vain)
			tries = 0
			end()
			continue
		}
		log.Warn("database node left the group, joining again", "node", n.Name)
		// Setting the address, even to what it is, connects anew.
		if _, err := db.ExecContext(ctx, "SET GLOBAL wsrep_cluster_address = "+quote(n.clusterAddress())); err != nil && ctx.Err() == nil {
			log.Error("database node could not join again", "node", n.Name, "error", err)
		}
	}
}

// Admin opens the node as its administrator, through the socket, as the current operating-system
// user. The caller closes it.
func Admin(n Node) (*sql.DB, error) {
	u, err := user.Current()
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", n.Name, err)
	}
	cfg := mysql.NewConfig()
	cfg.Net, cfg.Addr, cfg.User = "unix", n.Socket(), u.Username
	cfg.Timeout, cfg.ReadTimeout, cfg.WriteTimeout = time.Second, 10*time.Second, 10*time.Second
	cfg.Params = map[string]string{"wsrep_sync_wait": "0"}
	cfg.InterpolateParams = true
	cfg.Logger = &mysql.NopLogger{} // a node that is starting refuses connections
	c, err := mysql.NewConnector(cfg)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", n.Name, err)
	}
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(2)
	return db, nil
}

// ReloadTLS makes a running node use the files that Prepare copied since it started, for new connections.
func ReloadTLS(ctx context.Context, n Node) error {
	db, err := Admin(n)
	if err != nil {
		return err
	}
	defer db.Close()
	for _, q := range []string{"FLUSH LOCAL SSL", "SET GLOBAL wsrep_provider_options = 'socket.ssl_reload=1'"} {
		if _, err := db.ExecContext(ctx, q); err != nil {
			return fmt.Errorf("reloading TLS files of %s: %w", n.Name, err)
		}
	}
	return nil
}
