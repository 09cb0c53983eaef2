package ca

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"trivet/db"
)

func lastRecon(report *db.RoundReport, node string) *db.Recon {
	var last *db.Recon
	for i := range report.Recons { // ordered by number
		if report.Recons[i].Node == node {
			last = &report.Recons[i]
		}
	}
	return last
}

// roundEnd is the JSON of the end of a round.
type roundEnd struct {
	PutBack   int      `json:"put_back"`
	Conflicts int      `json:"conflicts,omitempty"`
	Covered   []string `json:"covered,omitempty"` // nodes that did not take part
}

// finish ends the round when every node has done its part, or others can speak for it.
func (r *Rounds) finish(ctx context.Context, n uint64) error {
	report, err := r.record.Round(ctx, n)
	if err != nil || report == nil || report.End != nil {
		return err
	}
	open, err := r.record.OpenLanes(ctx)
	if err != nil {
		return err
	}
	if last := lastRecon(report, r.cfg.Node); last == nil || last.Event == db.ReconBegun {
		// What this node wrote of its part is gone: the database went back within the round.
		r.unready()
		return r.reconcile(ctx, n)
	}
	nodes := append([]string{r.cfg.Node}, r.cfg.Peers...)
	for _, l := range open {
		if l.Role == roleCA {
			nodes = append(nodes, l.Node)
		}
	}
	proved := report.Proved
	var end roundEnd
	for _, e := range report.Recons {
		nodes = append(nodes, e.Node)
		var p putBack
		if json.Unmarshal(e.Detail, &p) == nil {
			end.PutBack += p.total()
			end.Conflicts += p.Conflicts
		}
		proved = proved || p.total() > 0
	}
	slices.Sort(nodes)
	r.mu.Lock()
	waited := time.Since(r.saw)
	r.mu.Unlock()
	var waiting, why []string
	for _, node := range slices.Compact(nodes) {
		last := lastRecon(report, node)
		if last != nil && last.Event == db.ReconDone {
			continue
		}
		if last != nil && last.Event == db.ReconCovered {
			end.Covered = append(end.Covered, node)
			continue
		}
		var how string
		covered := false
		if waited >= r.cfg.Absent {
			if how, covered, err = r.spokenFor(ctx, report, node); err != nil {
				return err
			}
		}
		if !covered && waited >= r.cfg.GiveUp && !proved {
			how, covered = "given up after "+r.cfg.GiveUp.String()+", no loss is known: "+how, true
			r.cfg.Log.Error("recovery round goes on without a node: if the database has lost what it released, that is lost until it is back", "round", n, "node", node)
		}
		if !covered {
			waiting = append(waiting, node)
			if how != "" {
				why = append(why, node+": "+how)
			}
			continue
		}
		if err := r.cover(ctx, n, node, last, open, how); err != nil {
			return err
		}
		end.Covered = append(end.Covered, node)
	}
	r.mu.Lock()
	r.waiting = waiting
	r.mu.Unlock()
	r.uncovered.Set(float64(len(why)))
	if len(waiting) > 0 {
		if proved && waited >= r.cfg.GiveUp {
			r.cfg.Log.Error("commits are lost, and nobody can tell what a node released: issuing stays shut until it is back, or until `pkictl recovery acknowledge`",
				"round", n, "nodes", strings.Join(waiting, " "), "why", strings.Join(why, "; "))
		}
		return nil
	}
	detail, err := json.Marshal(end)
	if err != nil {
		return err
	}
	err = r.record.EndRound(ctx, db.RoundEnd{N: n, Node: r.cfg.Node, Detail: detail})
	if err != nil && db.ClassOf(err) != db.Duplicate {
		return err
	}
	r.cfg.Log.Warn("recovery round has ended", "round", n, "put_back", end.PutBack, "conflicts", end.Conflicts, "covered", end.Covered)
	_, err = r.read(ctx)
	return err
}

// roleCA is how CA nodes call themselves as writers.
const roleCA = "ca"

// spokenFor tells whether the copies that the others hold are all that an absent node released and the database may lack: how is then how that is
// known, and otherwise why it is not. Copies alone prove nothing: what a node released while no holder was reached is on its own disk, and
// whatever would tell of it is there too, or was lost with the rest. So
//   - the node must have promised to release nothing without a copy;
//   - the database must still know the first incarnation that did: then nothing from before the promise is lost;
//   - whoever may have been its holder must have put back what it holds, in this round.
func (r *Rounds) spokenFor(ctx context.Context, report *db.RoundReport, node string) (how string, ok bool, err error) {
	if r.cfg.Held == nil {
		return r.cfg.Node + " keeps no copies", false, nil
	}
	since, promised := r.cfg.Held.Promised(node)
	if !promised {
		return "it may have released what nobody holds a copy of, since it does not require copies", false, nil
	}
	writers, err := r.record.Writers(ctx, node)
	if err != nil {
		return "", false, err
	}
	if !slices.ContainsFunc(writers, func(w db.Writer) bool { return hex.EncodeToString(w.Incarnation[:]) == since }) {
		return "the database has gone back to before " + node + " required copies", false, nil
	}
	for _, holder := range append([]string{r.cfg.Node}, r.cfg.Peers...) {
		if holder == node {
			continue
		}
		if last := lastRecon(report, holder); last == nil || last.Event != db.ReconDone {
			return "copies of its records may be at " + holder + " alone, which has not done its part", false, nil
		}
	}
	return "it releases nothing without a copy, and every node that may hold one has put back what it holds", true, nil
}

// Recorded tells whether the database has the lanes up to these numbers, or has put elsewhere what it lost of them: for holder.Config.
func (r *Rounds) Recorded(ctx context.Context, lanes map[string]uint64) (bool, error) {
	if err := r.err(); err != nil {
		return false, err
	}
	tips, err := r.record.LaneTips(ctx, slices.Sorted(maps.Keys(lanes)))
	if err != nil {
		return false, err
	}
	for lane, seq := range lanes {
		if tip := tips[lane]; !tip.Closed && tip.Seq < seq {
			return false, nil
		}
	}
	return true, nil
}

// cover lets a round go on without a node. Its lanes end first, those that it would open in this round too: should it wake up, nothing that it
// is about to put back gets in, and its own row comes second.
func (r *Rounds) cover(ctx context.Context, n uint64, node string, last *db.Recon, open []db.LaneInfo, how string) error {
	return coverNode(ctx, r.record, n, node, last, open, r.cfg.Node, how)
}

type coverRecord interface {
	CloseLane(ctx context.Context, lane, by string) (bool, error)
	AppendRecon(ctx context.Context, r db.Recon) error
}

func coverNode(ctx context.Context, record coverRecord, n uint64, node string, last *db.Recon, open []db.LaneInfo, by, how string) error {
	var lanes []string
	for _, l := range open {
		if l.Node == node {
			lanes = append(lanes, l.Lane)
		}
	}
	next := uint32(1)
	if last != nil {
		next = last.N + 1
		if len(last.Incarnation) == 16 {
			for kind := range laneKinds {
				lanes = append(lanes, db.LaneName(node, [16]byte(last.Incarnation), roundLane(n, kind, 0)))
			}
		}
	}
	for _, lane := range lanes {
		if _, err := record.CloseLane(ctx, lane, by); err != nil {
			return fmt.Errorf("closing lane %s: %w", lane, err)
		}
	}
	detail, err := json.Marshal(map[string]string{"how": how})
	if err != nil {
		return err
	}
	err = record.AppendRecon(ctx, db.Recon{Round: n, Node: node, N: next, Event: db.ReconCovered, Witness: by, Detail: detail})
	if db.ClassOf(err) == db.Duplicate {
		return fmt.Errorf("recovery round %d: %s has moved meanwhile: %w", n, node, errMovedOn)
	}
	return err
}

var errMovedOn = errors.New("look again")

// laneKinds is how many lanes a node has at once: of certificates and of status.
const laneKinds = 2

// roundLane is the index of a lane that is opened in a round. The tries after the first are for nodes that came too late: others have ended
// the first one's lanes.
func roundLane(round uint64, kind, try int) int { return int(round)*100 + try*laneKinds + kind }

// acknowledgeAfter is the default of RoundsConfig.Absent: a node that was paused for less may release what it read before.
const acknowledgeAfter = 10 * time.Second

// Nodes returns the names of the CA nodes that the record knows: those that ever wrote, and those that have rows in the round. A node that the
// database lost altogether is not among them.
func Nodes(ctx context.Context, record interface {
	WriterNodes(ctx context.Context, role string) ([]string, error)
}, report *db.RoundReport) ([]string, error) {
	names, err := record.WriterNodes(ctx, roleCA)
	if err != nil {
		return nil, err
	}
	for _, e := range report.Recons {
		names = append(names, e.Node)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// acknowledging is what AcknowledgeAbsent asks of the database; *db.Store is it.
type acknowledging interface {
	RoundState(ctx context.Context) (db.RoundState, error)
	Round(ctx context.Context, n uint64) (*db.RoundReport, error)
	OpenLanes(ctx context.Context) ([]db.LaneInfo, error)
	WriterNodes(ctx context.Context, role string) ([]string, error)
	coverRecord
}

// ErrUnknownNode is in the chain of AcknowledgeAbsent's error for a name that the record does not know.
var ErrUnknownNode = errors.New("the record knows no such CA node")

// AcknowledgeAbsent lets the round that is under way end without a node, on an operator's word, and returns its number. A name that the record does
// not know is refused unless unknown says that it is meant: what the database lost may include all of a node.
func AcknowledgeAbsent(ctx context.Context, record acknowledging, node, by string, unknown bool) (uint64, error) {
	for {
		state, err := record.RoundState(ctx)
		if err != nil {
			return 0, err
		}
		report, err := record.Round(ctx, state.N)
		switch {
		case err != nil:
			return 0, err
		case report == nil || report.End != nil:
			return 0, errors.New("no recovery round is under way: there is nothing to acknowledge")
		case time.Since(report.Created) < acknowledgeAfter:
			return 0, fmt.Errorf("recovery round %d began just now: give the node %s to take part", state.N, acknowledgeAfter)
		}
		known, err := Nodes(ctx, record, report)
		if err != nil {
			return 0, err
		}
		if !unknown && !slices.Contains(known, node) {
			return 0, fmt.Errorf("%w %q: it knows %s", ErrUnknownNode, node, strings.Join(known, ", "))
		}
		last := lastRecon(report, node)
		if last != nil && last.Event != db.ReconBegun {
			return state.N, fmt.Errorf("nothing is to be acknowledged: recovery round %d does not wait for %s, which is %s in it", state.N, node, last.Event)
		}
		open, err := record.OpenLanes(ctx)
		if err != nil {
			return 0, err
		}
		err = coverNode(ctx, record, state.N, node, last, open, by, "acknowledged by an operator: what it released and the database lost is lost")
		if errors.Is(err, errMovedOn) {
			continue
		}
		return state.N, err
	}
}
