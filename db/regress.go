package db

import (
	"fmt"
	"sync"
	"time"
)

// goneFor is how long two nodes must be away together to count as gone: a process that was itself paused finds every answer late, once.
const goneFor = time.Second

// view is what a node says about the component it is in.
type view struct {
	uuid string // of the cluster's history
	conf uint64 // number of the component since the history began; rises with every change of members
	// started is when the server began to run, as this process counts time. The other two may be after an outage of all nodes what they were before.
	started time.Time
}

// startSlack is what two findings of when one server started may differ by: it tells its age in seconds.
const startSlack = 3 * time.Second

// is says whether both are of one component. Its number alone does not tell: it begins anew.
func (v view) is(other view) bool { return v.uuid == other.uuid && v.conf == other.conf }

// signs gathers what suggests that the database may have lost commits. What a sign means is for the journals to find out.
type signs struct {
	mu    sync.Mutex
	count uint64
	cause string

	last     map[*node]view // as each node last said while in the primary component, or as the newest sign has settled it
	known    view           // newest of them
	down     map[*node]time.Time
	counted  map[*node]bool // away since before the newest sign, which speaks for them too
	gone     int            // most nodes that were away together since gap began
	gap      bool           // at least two nodes have been away together for goneFor
	gapKnown view           // known when gap began
}

// Regress returns how often there has been a sign that the database may have lost commits since the store was opened, and what the last one was:
// its history has another name, its component a lower number, or at least two nodes, or all, were gone at once. Losing one node is no sign.
func (s *Store) Regress() (signs uint64, cause string) {
	s.signs.mu.Lock()
	defer s.signs.mu.Unlock()
	return s.signs.count, s.signs.cause
}

// observe takes over what a probe found. primary is false where the node did not answer, or is in no primary component.
func (g *signs) observe(n *node, v view, primary bool, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.last == nil {
		g.last, g.down = map[*node]view{}, map[*node]time.Time{}
	}
	if !primary {
		if _, seen := g.last[n]; !seen {
			return // never met: nothing was lost there that this process relied on
		}
		if _, away := g.down[n]; !away {
			g.down[n] = now
		}
		away := 0
		for n, since := range g.down {
			if now.Sub(since) >= goneFor && !g.counted[n] {
				away++
			}
		}
		if away >= 2 || away > 0 && away == len(g.last)-len(g.counted) {
			if !g.gap {
				g.gap, g.gapKnown, g.gone = true, g.known, 0
			}
			g.gone = max(g.gone, away)
		}
		return
	}
	old, seen := g.last[n]
	newStart := seen && v.started.Sub(old.started) > startSlack
	g.last[n] = v
	delete(g.down, n)
	delete(g.counted, n)
	switch {
	case g.known.uuid != "" && v.uuid != g.known.uuid:
		g.sign(fmt.Sprintf("the cluster's history is %s and was %s", v.uuid, g.known.uuid))
		g.settle(v)
	case seen && v.uuid == old.uuid && v.conf < old.conf:
		g.sign(fmt.Sprintf("the number of the cluster's component fell from %d to %d", old.conf, v.conf))
		g.settle(v)
	case g.gap && (!v.is(g.gapKnown) || newStart):
		// Where component and server are the ones of before, it was this process that was away.
		g.sign(fmt.Sprintf("%d database nodes were gone at once", g.gone))
		g.settle(v)
	case v.conf > g.known.conf || g.known.uuid == "":
		g.known = v
	}
	if g.gap && len(g.down) < 2 {
		g.gap = false
	}
}

// settle makes v what is known of every node: those that come back behind the first one after an outage say the same, and one sign is enough.
func (g *signs) settle(v view) {
	g.known, g.counted = v, map[*node]bool{}
	for n := range g.down {
		g.counted[n] = true
	}
	for n, old := range g.last {
		if old.uuid != v.uuid || old.conf > v.conf {
			g.last[n] = view{v.uuid, v.conf, old.started}
		}
	}
}

func (g *signs) sign(cause string) {
	g.count++
	g.cause = cause
	g.gap = false
}
