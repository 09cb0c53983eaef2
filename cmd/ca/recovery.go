package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"trivet/ca"
	"trivet/ca/api"
	"trivet/db"
	"trivet/holder"
	"trivet/identity"
)

// heldDir is where copies of other nodes' records are kept, below the state directory.
const heldDir = "held"

// second is what lets released certificates survive a database that goes back: this node's part in recovery rounds, the copies that it gives to
// others, and those that it keeps for them.
type second struct {
	rounds *ca.Rounds
	held   *holder.Holder
	copier *holder.Copier
	macs   *db.MACKeys
	lost   chan error // why the process must end
	begun  chan struct{}
}

// openSecond reads the journals. It connects to nothing.
func (n *node) openSecond() error {
	macs, err := db.LoadMACKeys(n.cfg.MACKeyFile)
	if err != nil {
		return err
	}
	s := &second{macs: macs, lost: make(chan error, 1), begun: make(chan struct{})}
	s.held, err = holder.Open(holder.Config{
		Dir: filepath.Join(n.cfg.StateDir, heldDir), Node: n.cfg.Node, Log: n.log, Round: func() (uint64, func()) { return s.rounds.Enter() },
		Keep: n.cfg.HeldKeep, Recorded: s.recorded,
	})
	if err != nil {
		return err
	}
	n.second = s
	fatal := func(err error) {
		select {
		case s.lost <- err:
		default: // it is ending already
		}
	}
	incarnation := n.journal.Incarnation()
	transport := &http.Transport{TLSClientConfig: n.id.ClientTLS(identity.RoleCA), MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute}
	s.copier, err = holder.NewCopier(holder.CopierConfig{
		Incarnation: hex.EncodeToString(incarnation[:]), Peers: n.cfg.Peers, CopyRequired: n.cfg.RequireCopy, Client: &http.Client{Transport: transport},
		Round: func() uint64 { return s.rounds.Current() }, Records: ca.DoneRecords(n.journal), Fatal: fatal, Log: n.log, Metrics: n.registry,
	})
	if err != nil {
		return err
	}
	peers := make([]string, len(n.cfg.Peers))
	for i, p := range n.cfg.Peers {
		peers[i] = p.Name
	}
	s.rounds, err = ca.NewRounds(ca.RoundsConfig{
		Node: n.cfg.Node, Store: n.store, Journal: n.journal, Copies: s.copier, Held: s.held, Peers: peers, MACKeys: macs,
		RequireCopy: n.cfg.RequireCopy, AllowSingleCopy: n.cfg.AllowSingleCopy,
		Positions: n.positions, Fatal: fatal, Log: n.log, Metrics: n.registry,
	})
	return err
}

// recorded asks the database for what copies held for others tell of, once this node is in step with it.
func (s *second) recorded(ctx context.Context, lanes map[string]uint64) (bool, error) {
	select {
	case <-s.begun:
		return s.rounds.Recorded(ctx, lanes)
	default:
		return false, errors.New("this node is starting")
	}
}

// positions asks the responders how far they are, once the barrier knows them.
func (n *node) positions(ctx context.Context) (map[string]map[string]uint64, error) {
	return n.barrier.Positions(ctx)
}

// start runs it among tasks.
func (s *second) start(work context.Context, tasks *errgroup.Group) {
	close(s.begun)
	tasks.Go(func() error { return s.rounds.Run(work) })
	tasks.Go(func() error { return s.copier.Run(work) })
	tasks.Go(func() error {
		select {
		case <-work.Done():
			return nil
		case err := <-s.lost:
			return err
		case <-s.held.Failed():
			return fmt.Errorf("the journal of copies held for other nodes has failed: see the log")
		}
	})
}

// handler serves other nodes' copies beside the interface, where nodes reach one another.
func (s *second) handler(on api.Listener, next http.Handler) http.Handler {
	if on != api.Public {
		return next
	}
	copies := s.held.Handler()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == holder.Path {
			copies.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}
