package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"trivet/cluster"
	"trivet/db"
	"trivet/ops/galera"
)

const (
	batchSize = 64
	inFlight  = 2
	tbsSize   = 520 // octets, as measured on tls-server certificates
	derSize   = 620
)

// rowCost measures certificates that the record takes per second in the pipeline's way (a batch of intents, a batch of outcomes with their feed rows, read back on another node)
// beside the same rows inserted one statement each, with as many writers, on the same cluster.
func rowCost(ctx context.Context, s *site) ([]Row, error) {
	store, raw, done, err := s.database(ctx, "bench")
	if err != nil {
		return nil, err
	}
	defer done()
	var incarnation [16]byte
	_, _ = rand.Read(incarnation[:]) // documented never to fail
	lane, err := store.OpenLane(ctx, "bench", incarnation, 0)
	if err != nil {
		return nil, err
	}
	batched, err := median(runs, func() (float64, error) {
		return throughput(ctx, func(ctx context.Context) (int, error) { return batch(ctx, store, lane, "bench-g1", batchSize) })
	})
	if err != nil {
		return nil, err
	}
	single, err := median(runs, func() (float64, error) {
		return throughput(ctx, func(ctx context.Context) (int, error) { return one(ctx, raw) })
	})
	if err != nil {
		return nil, err
	}
	return []Row{{
		Name: "row_cost", Value: batched, Unit: "cert/s", Reference: "single-row INSERTs of the same rows, same cluster", ReferenceValue: single,
		Ratio: batched / single, Goal: ">=5x", Met: batched >= 5*single,
	}}, nil
}

// database opens a database with an account that may do everything in it; one that is not the cluster's own is made first, with the same tables.
func (s *site) database(ctx context.Context, name string) (*db.Store, *sql.DB, func(), error) {
	st, err := s.status(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	var secret [12]byte
	_, _ = rand.Read(secret[:])
	password := fmt.Sprintf("%x", secret)
	file := filepath.Join(s.dir, "bench-password")
	if err := os.WriteFile(file, []byte(password), 0o600); err != nil {
		return nil, nil, nil, err
	}
	for _, p := range st.Processes {
		if p.Role == cluster.RoleDB {
			if err := galera.CreateAccount(ctx, galera.Node{Name: p.Name, Dir: p.Dir}, name, "bench", password); err != nil {
				return nil, nil, nil, err
			}
			break
		}
	}
	cfg := db.Config{Nodes: st.Database.Nodes, Name: name, User: "bench", PasswordFile: file, Role: "bench"}
	if err := db.Migrate(ctx, cfg); err != nil {
		return nil, nil, nil, err
	}
	store, err := db.Open(cfg)
	if err != nil {
		return nil, nil, nil, err
	}
	raw, err := sql.Open("mysql", fmt.Sprintf("bench:%s@tcp(%s)/%s?interpolateParams=true", password, st.Database.Nodes[0], name))
	if err != nil {
		return nil, nil, nil, errors.Join(err, store.Close())
	}
	probing, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = store.Run(probing) // ends with stop, without an error
	}()
	return store, raw, func() {
		stop()
		<-ended
		_ = errors.Join(raw.Close(), store.Close()) // the database goes with the cluster
	}, nil
}

// throughput runs f in inFlight goroutines and returns what they did per second.
func throughput(ctx context.Context, f func(context.Context) (int, error)) (float64, error) {
	var total atomic.Int64
	var failed error
	var once sync.Once
	began := time.Now()
	var wg sync.WaitGroup
	for range inFlight {
		wg.Go(func() {
			for time.Since(began) < seconds {
				n, err := f(ctx)
				if err != nil {
					once.Do(func() { failed = err })
					return
				}
				total.Add(int64(n))
			}
		})
	}
	wg.Wait()
	return float64(total.Load()) / time.Since(began).Seconds(), failed
}

// intentOf is an intent as a CA node would have made it then.
func intentOf(issuer string, then time.Time) db.Intent {
	serial := make([]byte, 20)
	_, _ = rand.Read(serial)
	binary.BigEndian.PutUint32(serial, uint32(then.Unix()/2))
	req := sha256.Sum256(serial)
	tbs := make([]byte, tbsSize)
	_, _ = rand.Read(tbs)
	key := sha256.Sum256(req[:]) // one of its own, as certificates mostly have
	return db.Intent{
		Issuer: issuer, Serial: serial, Created: then, Req: req[:], Body: req[:], TBS: tbs, Profile: "tls-server", ProfileVersion: 1, ProfileHash: req[:],
		Requester: "trivet://demo/requester/bench", SiteEpoch: 1, Node: "bench", Key: key[:],
	}
}

func batch(ctx context.Context, store *db.Store, lane *db.Lane, issuer string, size int) (int, error) {
	intents := make([]db.Intent, size)
	reqs := make([][]byte, size)
	facts := make([]db.Fact, size)
	for i := range intents {
		intents[i] = intentOf(issuer, time.Now())
		reqs[i] = intents[i].Req
		facts[i] = db.Fact{Outcome: &db.Outcome{Issuer: intents[i].Issuer, Serial: intents[i].Serial, Kind: db.OutcomeCert, DER: make([]byte, derSize), NotAfter: time.Now().Add(time.Hour)}}
	}
	if _, _, err := store.InsertIntents(ctx, intents); err != nil {
		return 0, err
	}
	appended, err := lane.Append(ctx, facts)
	if err != nil {
		return 0, err
	}
	back, _, err := store.ReadBack(ctx, appended[0].Node, reqs)
	if err != nil {
		return 0, err
	}
	for _, b := range back {
		if b.Outcome == nil {
			return 0, errors.New("a row that was committed cannot be read back")
		}
	}
	return size, nil
}

// one inserts a certificate's three rows with a statement each, autocommitted.
func one(ctx context.Context, raw *sql.DB) (int, error) {
	i := intentOf("bench-g1", time.Now())
	now := time.Now().UTC().Format("2006-01-02 15:04:05")
	if _, err := raw.ExecContext(ctx, `INSERT INTO intent (issuer, serial, req, body, tbs, profile, profile_version, profile_hash, requester, site_epoch, node, created)
		VALUES (?,?,?,?,?,?,?,?,?,?,?,?)`, i.Issuer, i.Serial, i.Req, i.Body, i.TBS, i.Profile, i.ProfileVersion, i.ProfileHash, i.Requester, i.SiteEpoch, i.Node, now); err != nil {
		return 0, err
	}
	if _, err := raw.ExecContext(ctx, `INSERT INTO outcome (issuer, serial, ver, kind, der, lane, seq, created) VALUES (?,?,1,'cert',?,'single',1,?)`,
		i.Issuer, i.Serial, make([]byte, derSize), now); err != nil {
		return 0, err
	}
	seq := time.Now().UnixNano()
	if _, err := raw.ExecContext(ctx, `INSERT INTO feed (lane, seq, kind, issuer, serial, payload, chain) VALUES (?,?,1,?,?,'{}',?)`,
		fmt.Sprintf("single/%x", i.Serial), seq, i.Issuer, i.Serial, i.Req); err != nil {
		return 0, err
	}
	return 1, nil
}
