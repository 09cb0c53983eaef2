package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"trivet/cluster"
	"trivet/db"
	"trivet/ops/galera"
)

const (
	largeCount = 200_000   // certificates that the large record holds: 600 MB
	largePool  = 128 << 20 // octets of each database node's buffer pool meanwhile
	smallPool  = 24 << 20  // and in the end: less than the indexes in which every certificate has a place of its own by a hash
	fillBatch  = 250
	fillers    = 4
)

// issueLarge measures issuing onto a record more than four times the databases' buffer pools beside issuing onto an empty one, and then with pools that
// are far smaller still. No responder runs meanwhile: they would be busy with signing answers for what the record was filled with.
func issueLarge(ctx context.Context, s *site) ([]Row, error) {
	for _, name := range []string{"ocsp1", "ocsp2"} {
		if _, err := s.pkictl(ctx, "demo", "kill", name); err != nil {
			return nil, err
		}
	}
	if err := s.setPool(ctx, largePool); err != nil {
		return nil, err
	}
	empty, err := s.rate(ctx, 32)
	if err != nil {
		return nil, err
	}
	before, err := s.recordSize(ctx)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := s.fill(ctx, largeCount); err != nil {
		return nil, fmt.Errorf("filling the record: %w", err)
	}
	size, err := s.recordSize(ctx)
	if err != nil {
		return nil, err
	}
	total, grown := int64(0), int64(0)
	for _, table := range slices.Sorted(maps.Keys(size)) {
		total += size[table]
		if more := size[table] - before[table]; more > 0 {
			grown += more
			fmt.Printf("  %-12s %6.0f octets a certificate\n", table, float64(more)/largeCount)
		}
	}
	each := float64(grown) / largeCount
	fmt.Printf("issue_large: %d certificates put in within %v; tables and indexes are %.1f times the buffer pool, then %.1f times\n", largeCount,
		time.Since(began).Round(time.Second), float64(total)/largePool, float64(total)/smallPool)
	if total < 4*largePool {
		return nil, fmt.Errorf("the record has %d octets: less than four times the buffer pool", total)
	}
	large, err := s.rate(ctx, 32)
	if err != nil {
		return nil, err
	}
	if err := s.setPool(ctx, smallPool); err != nil {
		return nil, err
	}
	starved, err := s.rate(ctx, 32)
	if err != nil {
		return nil, err
	}
	return []Row{{
		Name: "issue_large", Value: large, Unit: "cert/s", Reference: "onto an empty record, same cluster, no responders", ReferenceValue: empty,
		Ratio: large / empty, Goal: ">=0.8x", Met: large >= .8*empty,
	}, {
		Name: "issue_starved", Value: starved, Unit: "cert/s", Reference: "onto an empty record, with more than the pool for it", ReferenceValue: empty,
		Ratio: starved / empty,
	}, {
		Name: "record_bytes", Value: each, Unit: "octets", Reference: "a certificate and its TBSCertificate alone, per database node", ReferenceValue: derSize + tbsSize,
		Ratio: (derSize + tbsSize) / each,
	}}, nil
}

// fill puts certificates into the record as the pipeline does, made over the last 90 days.
func (s *site) fill(ctx context.Context, count int) error {
	store, _, done, err := s.database(ctx, "trivet")
	if err != nil {
		return err
	}
	defer done()
	var incarnation [16]byte
	_, _ = rand.Read(incarnation[:]) // documented never to fail
	step := 90 * 24 * time.Hour / time.Duration(count)
	start := time.Now().Add(-90 * 24 * time.Hour)
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		next int
		errs []error
	)
	for f := range fillers {
		lane, err := store.OpenLane(ctx, "bench", incarnation, f)
		if err != nil {
			return err
		}
		wg.Go(func() {
			for {
				mu.Lock()
				from := next
				next += fillBatch
				stop := from >= count || len(errs) > 0
				mu.Unlock()
				if stop {
					return
				}
				if err := fillOne(ctx, store, lane, start.Add(time.Duration(from)*step), step); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func fillOne(ctx context.Context, store *db.Store, lane *db.Lane, from time.Time, step time.Duration) error {
	intents := make([]db.Intent, fillBatch)
	facts := make([]db.Fact, fillBatch)
	for i := range intents {
		intents[i] = intentOf("demo-g1", from.Add(time.Duration(i)*step))
		der := make([]byte, derSize)
		_, _ = rand.Read(der)
		facts[i] = db.Fact{Outcome: &db.Outcome{Issuer: intents[i].Issuer, Serial: intents[i].Serial, Kind: db.OutcomeCert, DER: der, NotAfter: time.Now().AddDate(0, 0, 90)}}
	}
	if _, _, err := store.InsertIntents(ctx, intents); err != nil {
		return err
	}
	_, err := lane.Append(ctx, facts)
	return err
}

// setPool sets every database node's buffer pool.
func (s *site) setPool(ctx context.Context, octets int) error {
	return s.eachDatabase(ctx, func(p cluster.Process) error {
		admin, err := galera.Admin(galera.Node{Name: p.Name, Dir: p.Dir})
		if err != nil {
			return err
		}
		defer admin.Close()
		if _, err := admin.ExecContext(ctx, fmt.Sprintf("SET GLOBAL innodb_buffer_pool_size = %d", octets)); err != nil {
			return fmt.Errorf("setting the buffer pool of %s: %w", p.Name, err)
		}
		now := 0
		if err := admin.QueryRowContext(ctx, "SELECT @@GLOBAL.innodb_buffer_pool_size").Scan(&now); err != nil || now != octets {
			return errors.Join(fmt.Errorf("the buffer pool of %s has %d octets and not %d", p.Name, now, octets), err)
		}
		return nil
	})
}

// recordSize is the size of one database node's tables on disk, indexes included, by table.
func (s *site) recordSize(ctx context.Context) (map[string]int64, error) {
	var sizes map[string]int64
	err := s.eachDatabase(ctx, func(p cluster.Process) error {
		if sizes != nil {
			return nil
		}
		sizes = map[string]int64{}
		return filepath.WalkDir(p.Dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(path, ".ibd") && filepath.Base(filepath.Dir(path)) == "trivet" {
				info, err := os.Stat(path)
				if err != nil {
					return err
				}
				table, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(path), ".ibd"), "#") // a partition's file is table#P#name.ibd
				sizes[table] += info.Size()
			}
			return err
		})
	})
	return sizes, err
}

func (s *site) eachDatabase(ctx context.Context, f func(cluster.Process) error) error {
	st, err := s.status(ctx)
	if err != nil {
		return err
	}
	for _, p := range st.Processes {
		if p.Role == cluster.RoleDB {
			if err := f(p); err != nil {
				return err
			}
		}
	}
	return nil
}
