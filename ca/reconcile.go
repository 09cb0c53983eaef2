package ca

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"trivet/db"
	"trivet/journal"
)

// putBack counts what a node did in a round. It is the JSON of its row.
type putBack struct {
	Certificates int `json:"certificates"`
	Abandoned    int `json:"abandoned"`
	Revocations  int `json:"revocations"`
	CRLs         int `json:"crls"`
	Blocked      int `json:"blocked_keys"` // that operators blocked
	Conflicts    int `json:"conflicts"`    // contradictions that operators must look at
}

func (p putBack) total() int {
	return p.Certificates + p.Abandoned + p.Revocations + p.CRLs + p.Blocked
}

// reconcile is this node's part in a round: its lanes end and others begin, the database gets back what it lacks of what the journals hold,
// and a row says so. It may be repeated from any point.
func (r *Rounds) reconcile(ctx context.Context, n uint64) error {
	report, err := r.record.Round(ctx, n)
	switch {
	case err != nil:
		return err
	case report == nil:
		return fmt.Errorf("recovery round %d is not to be seen", n)
	}
	incarnation := r.cfg.Journal.Incarnation()
	last := lastRecon(report, r.cfg.Node)
	// Once others have gone on without this node, what it puts back must not overrule what they released since.
	late := report.End != nil || last != nil && last.Event == db.ReconCovered
	if last != nil && last.Event == db.ReconDone {
		return r.reconciled(n)
	}
	if !late && (last == nil || !bytes.Equal(last.Incarnation, incarnation[:])) {
		next := db.Recon{Round: n, Node: r.cfg.Node, N: 1, Event: db.ReconBegun, Incarnation: incarnation[:], Witness: r.cfg.Node}
		if last != nil {
			next.N = last.N + 1
		}
		if err := r.record.AppendRecon(ctx, next); err != nil {
			return fmt.Errorf("beginning this node's part in recovery round %d: %w", n, err)
		}
		last = &next
	}
	if err := r.changeLanes(ctx, n, late); err != nil {
		return err
	}
	if err := r.restore(ctx, n, report.Round, late); err != nil {
		return err
	}
	if err := r.closeDoubtful(ctx, n); err != nil {
		return err
	}
	if !late {
		r.mu.Lock()
		detail, err := json.Marshal(r.putBack)
		r.mu.Unlock()
		if err != nil {
			return err
		}
		err = r.record.AppendRecon(ctx, db.Recon{Round: n, Node: r.cfg.Node, N: last.N + 1, Event: db.ReconDone, Incarnation: incarnation[:], Witness: r.cfg.Node, Detail: detail})
		if err != nil {
			return fmt.Errorf("ending this node's part in recovery round %d: %w", n, err)
		}
	}
	return r.reconciled(n)
}

func (r *Rounds) reconciled(n uint64) error {
	r.lock.Lock()
	if r.n == n {
		r.ready = true
	}
	r.lock.Unlock()
	r.gauge.WithLabelValues("done").Set(float64(n))
	r.mu.Lock()
	p := r.putBack
	r.mu.Unlock()
	r.cfg.Log.Warn("recovery round: this node has done its part", "round", n, "certificates", p.Certificates, "abandoned", p.Abandoned,
		"revocations", p.Revocations, "crls", p.CRLs, "blocked_keys", p.Blocked, "conflicts", p.Conflicts)
	r.hurry()
	return nil
}

// changeLanes ends every lane of this node, where the database sees its end, and begins others: what is still on its way in an old one can get
// in no more, and no lane goes on beyond rows that were lost.
func (r *Rounds) changeLanes(ctx context.Context, n uint64, late bool) error {
	incarnation := r.cfg.Journal.Incarnation()
	moving := r.moving()
	keep := map[string]bool{}
	for _, m := range moving {
		// One that others have ended, because this node came too late, is replaced again.
		if in, ok := m.in(); ok && in == n && !(late && m.current().Name() == db.LaneName(r.cfg.Node, incarnation, roundLane(n, m.index, 0))) {
			keep[m.current().Name()] = true
			continue
		}
		m.retire()
	}
	open, err := r.record.OpenLanes(ctx)
	if err != nil {
		return err
	}
	for _, l := range open {
		if l.Node != r.cfg.Node || keep[l.Lane] || l.Incarnation == incarnation && r.opensIn(l.Lane, n) {
			continue
		}
		if _, err := r.record.CloseLane(ctx, l.Lane, r.cfg.Node); err != nil {
			return fmt.Errorf("closing lane %s: %w", l.Lane, err)
		}
	}
	// Those that the database has no longer heard of, too: a commit that is still on its way must not bring them back.
	for _, m := range moving {
		if !keep[m.first.Name()] {
			if _, err := r.record.CloseLane(ctx, m.first.Name(), r.cfg.Node); err != nil {
				return fmt.Errorf("closing lane %s: %w", m.first.Name(), err)
			}
		}
	}
	for _, m := range moving {
		if in, ok := m.in(); ok && in == n {
			continue
		}
		for try := 0; ; try++ {
			if late && try == 0 {
				continue
			}
			lane, err := r.record.OpenLane(ctx, r.cfg.Node, incarnation, roundLane(n, m.index, try))
			if errors.Is(err, db.ErrLaneClosed) && late && try < 40 {
				continue
			}
			if err != nil {
				return fmt.Errorf("opening a lane for recovery round %d: %w", n, err)
			}
			m.set(lane, n)
			break
		}
	}
	return nil
}

// opensIn tells whether the lane is one that this incarnation opens in that round.
func (r *Rounds) opensIn(lane string, n uint64) bool {
	for kind := range laneKinds {
		for try := range 41 {
			if lane == db.LaneName(r.cfg.Node, r.cfg.Journal.Incarnation(), roundLane(n, kind, try)) {
				return true
			}
		}
	}
	return false
}

// closeDoubtful ends the lanes that somebody knows to have been longer: what was in their lost rows is elsewhere now, and they must not go on,
// whoever wrote them.
func (r *Rounds) closeDoubtful(ctx context.Context, n uint64) error {
	doubts, err := r.doubts(ctx, true)
	if err != nil {
		return err
	}
	for _, d := range doubts {
		for _, m := range r.moving() {
			if l := m.current(); l != nil && l.Name() == d.lane {
				return fmt.Errorf("lane %s, begun in recovery round %d, has been lost again", d.lane, n)
			}
		}
		if _, err := r.record.CloseLane(ctx, d.lane, r.cfg.Node); err != nil {
			return fmt.Errorf("closing lane %s: %w", d.lane, err)
		}
	}
	return nil
}

// restore puts back what the database lacks.
func (r *Rounds) restore(ctx context.Context, n uint64, round db.Round, late bool) error {
	lost, err := r.lost(ctx)
	if err != nil {
		return err
	}
	ended := r.lastEnded()
	missed, err := r.standing(ctx, lost, ended)
	if err != nil {
		return err
	}
	var work [4][]journal.Done
	for _, d := range lost {
		if d.Round >= missed[d.owner] {
			d.Round = max(d.Round, ended)
		}
		d := d.Done
		switch d.Kind {
		case journal.DoneCert:
			work[0] = append(work[0], d)
		case journal.DoneAbandoned:
			work[1] = append(work[1], d)
		case journal.DoneRevocation:
			work[2] = append(work[2], d)
		case doneCRL:
			work[3] = append(work[3], d)
		}
	}
	b := &restorer{r: r, round: n, late: late, ended: ended}
	for kind, dones := range work {
		for chunk := range slices.Chunk(dones, putBackChunk) {
			switch kind {
			case 0, 1:
				err = b.outcomes(ctx, chunk)
			case 2:
				err = b.revocations(ctx, chunk)
			case 3:
				err = b.crls(ctx, chunk)
			}
			if err != nil {
				return err
			}
		}
	}
	return b.blockedKeys(ctx)
}

// lastEnded is the newest round in which anything may have been released.
func (r *Rounds) lastEnded() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(min(r.ended, r.n-1), min(r.state.Ended, r.n-1)) // the database may have forgotten that it ended
}

// standing returns, of each owner of the facts, the newest round that it missed, or did not do its part in in time, up to the newest that ended. Whatever
// it released in that round or later is as good as released in the newest: it stood then, so what contradicts it came after it, and was not released.
func (r *Rounds) standing(ctx context.Context, facts []released, ended uint64) (map[string]uint64, error) {
	missed := map[string]uint64{}
	oldest := ended
	for _, f := range facts {
		missed[f.owner] = 0
		oldest = min(oldest, f.Round)
	}
	for n := oldest + 1; n <= ended; n++ {
		report, err := r.record.Round(ctx, n)
		if err != nil {
			return nil, fmt.Errorf("reading recovery round %d: %w", n, err)
		}
		for owner := range missed {
			var last *db.Recon
			if report != nil {
				last = lastRecon(report, owner)
			}
			if last == nil || last.Event != db.ReconDone {
				missed[owner] = n
			}
		}
	}
	return missed, nil
}

// released is a done record, and whose it is.
type released struct {
	journal.Done
	owner string
}

// lost returns the done records of this node's journal, and of the copies it holds, whose place in the feed the database does not show.
func (r *Rounds) lost(ctx context.Context) ([]released, error) {
	highest, err := r.highest()
	if err != nil {
		return nil, err
	}
	if r.cfg.Held != nil {
		for lane, seq := range r.cfg.Held.Lanes() {
			highest[lane] = max(highest[lane], seq)
		}
	}
	lanes := make([]string, 0, len(highest))
	for lane := range highest {
		lanes = append(lanes, lane)
	}
	slices.Sort(lanes)
	tips, err := r.record.LaneTips(ctx, lanes)
	if err != nil {
		return nil, err
	}
	from := map[string]uint64{} // first number in doubt
	for _, lane := range lanes {
		switch tip := tips[lane]; {
		case tip.Closed && tip.Seq <= highest[lane]:
			from[lane] = tip.Seq
		case !tip.Closed && tip.Seq < highest[lane]:
			from[lane] = tip.Seq + 1
		}
	}
	if len(from) == 0 {
		return nil, nil
	}
	seen := map[string]bool{}
	var out []released
	take := func(owner string, d journal.Done) {
		first, doubt := from[d.Lane]
		key := fmt.Sprintf("%s/%s/%s/%d/%d/%d", d.Kind, d.Issuer, d.Serial, d.Ver, d.Round, eventNumber(d))
		if doubt && d.Seq >= first && !seen[key] {
			seen[key] = true
			out = append(out, released{d, owner})
		}
	}
	err = r.cfg.Journal.Replay(func(e journal.Entry) error {
		if e.Kind != journal.KindDone {
			return nil
		}
		var d journal.Done
		if err := e.Decode(&d); err != nil {
			return err
		}
		take(r.cfg.Node, d)
		return nil
	})
	if err == nil && r.cfg.Held != nil {
		err = r.cfg.Held.Each(func(owner, _ string, d journal.Done) error { take(owner, d); return nil })
	}
	if err != nil {
		return nil, fmt.Errorf("reading what was released: %w", err)
	}
	// Newest rounds last: what a later round made of a fact is what counts.
	slices.SortStableFunc(out, func(a, b released) int {
		if a.Round != b.Round {
			return int(int64(a.Round) - int64(b.Round))
		}
		return int(eventNumber(a.Done)) - int(eventNumber(b.Done))
	})
	return out, nil
}

func eventNumber(d journal.Done) int {
	if d.Event == nil {
		return 0
	}
	return d.Event.N
}
