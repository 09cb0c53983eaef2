package lb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/health"
	"trivet/identity"
)

// Balancer balances capabilities over nodes. It is safe for concurrent use.
type Balancer struct {
	cfg         Config
	incarnation string
	metrics     *metrics
	budget      budget
	draining    atomic.Bool
	current     atomic.Pointer[[]*node]

	mu     sync.Mutex      // one change of the node list at a time
	ctx    context.Context // of Run; nil before
	probes sync.WaitGroup
}

// New checks cfg. Nothing is probed or sent before Run.
func New(cfg Config) (*Balancer, error) {
	if cfg.Identity == nil || cfg.Node == "" {
		return nil, errors.New("balancer: identity and node must be given")
	}
	if err := checkNodes(cfg.Nodes); err != nil {
		return nil, fmt.Errorf("balancer: %w", err)
	}
	cfg.Timing = cfg.Timing.withDefaults()
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
	}
	b := &Balancer{cfg: cfg, incarnation: random(8)}
	var nodes []*node
	for _, n := range cfg.Nodes {
		nodes = append(nodes, newNode(n, cfg.Identity, cfg.Timing))
	}
	b.current.Store(&nodes)
	b.metrics = newMetrics(b)
	for _, c := range b.metrics.all() {
		if err := cfg.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("balancer: registering metrics: %w", err)
		}
	}
	return b, nil
}

// Run probes the nodes until ctx ends. started is called when every node has been probed once: traffic must not come before.
func (b *Balancer) Run(ctx context.Context, started func()) error {
	b.mu.Lock()
	b.ctx = ctx
	first := b.start(b.nodes())
	b.mu.Unlock()
	first.Wait()
	started()
	<-ctx.Done()
	b.mu.Lock() // a change of the node list that began before is finished, none begins after
	defer b.mu.Unlock()
	b.probes.Wait()
	for _, n := range b.nodes() {
		n.close()
	}
	return nil
}

// start begins to probe nodes; b.mu is held. The returned group is done when each was probed once.
func (b *Balancer) start(nodes []*node) *sync.WaitGroup {
	var first sync.WaitGroup
	for _, n := range nodes {
		ctx, stop := context.WithCancel(b.ctx)
		n.stop = stop
		first.Add(1)
		b.probes.Go(func() { b.poll(ctx, n, sync.OnceFunc(first.Done)) })
	}
	return &first
}

// SetNodes replaces the node list, or keeps the old one and says why. Nodes that stay keep their connections and standing; new ones are
// probed before they get traffic; requests under way on a removed one are finished.
func (b *Balancer) SetNodes(list []Node) error {
	if err := checkNodes(list); err != nil {
		return fmt.Errorf("changing the node list, the old one stays in use: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx == nil || b.ctx.Err() != nil {
		return errors.New("changing the node list, the old one stays in use: the balancer is not running")
	}
	old := b.nodes()
	var next, added []*node
	for _, want := range list {
		if i := slices.IndexFunc(old, func(n *node) bool { return n.Node == want }); i >= 0 {
			next = append(next, old[i])
			continue
		}
		n := newNode(want, b.cfg.Identity, b.cfg.Timing)
		next, added = append(next, n), append(added, n)
	}
	b.start(added).Wait()
	b.current.Store(&next)
	for _, n := range old {
		if !slices.Contains(next, n) {
			n.close()
		}
	}
	return nil
}

// Drain makes the health report say that this balancer takes nothing new, so that whatever stands before it looks elsewhere. Requests are still served.
func (b *Balancer) Drain() { b.draining.Store(true) }

func (b *Balancer) nodes() []*node { return *b.current.Load() }

// pick chooses a node for rt that was not tried, or none.
func (b *Balancer) pick(rt route, tried []*node) *node {
	now := b.cfg.Now()
	all := b.nodes()
	var can, live, rest []*node
	for _, n := range all {
		if n.Role != rt.role || slices.Contains(tried, n) {
			continue
		}
		s := n.standing()
		in := b.in(all, n, s, now)
		switch {
		case in && s.report.Can(rt.need):
			can = append(can, n)
		case in:
			live = append(live, n)
		default:
			rest = append(rest, n)
		}
	}
	best := can
	if !rt.write { // a node never gives a false answer to a read; at worst it refuses too
		if len(best) == 0 {
			best = live
		}
		if len(best) == 0 {
			best = rest
		}
	}
	switch len(best) {
	case 0:
		return nil
	case 1:
		return best[0]
	}
	if rt.gather {
		if n := fullest(best, now); n != nil {
			return n
		}
	}
	// Two random ones, then the lighter: near the balance of the best of all, without the herd.
	i := rand.IntN(len(best))
	j := rand.IntN(len(best) - 1)
	if j >= i {
		j++
	}
	if best[j].score(now) < best[i].score(now) {
		i = j
	}
	return best[i]
}

// Bounds of gathering.
const (
	gatherUpTo = 32                     // requests on one node, before others get those that gather
	gatherPace = 200 * time.Millisecond // what takes less on average is never slow: a full batch takes longer than a small one
)

// fullest returns the node that has the most gathered and room for more, unless something is held against it: an error of late, a request overdue, or
// that it takes more than twice as long as another. nil if none has anything.
func fullest(nodes []*node, now time.Time) (best *node) {
	most := int64(0)
	for _, n := range nodes {
		if load := n.gathered.Load(); load > most && load < gatherUpTo && n.blameless(now) && !outpaced(n, nodes) {
			best, most = n, load
		}
	}
	return best
}

// outpaced tells whether n is slow by itself and beside another. Being the fullest may come from that.
func outpaced(n *node, nodes []*node) bool {
	mine := n.paced()
	if mine < gatherPace {
		return false
	}
	return slices.ContainsFunc(nodes, func(o *node) bool {
		theirs := o.paced()
		return o != n && theirs > 0 && 2*theirs < mine
	})
}

// in tells whether n gets traffic for what it can do. A node that is down only because probes time out does, as long as it was heard of lately, while
// they time out at more than half of its role's nodes, or it is the last one: then the trouble is shared, perhaps this balancer's own.
func (b *Balancer) in(all []*node, n *node, s standing, now time.Time) bool {
	if s.live || s.ejected || s.up || !s.timedOut || s.reportAt.IsZero() || now.Sub(s.heardAt) > b.cfg.Timing.Hope {
		return s.live
	}
	of, silent, live := 0, 0, 0
	for _, o := range all {
		if o.Role != n.Role {
			continue
		}
		of++
		switch os := o.standing(); {
		case os.live:
			live++
		case !os.up && os.timedOut:
			silent++
		}
	}
	return 2*silent > of || live == 0
}

// late notes a missing answer, and ejects the node if it is the node's fault: not when that would leave fewer than half in.
func (b *Balancer) late(n *node) {
	if !n.late() {
		return
	}
	of, in := 0, 0
	for _, o := range b.nodes() {
		if o.Role != n.Role {
			continue
		}
		of++
		if o != n && o.standing().live {
			in++
		}
	}
	if 2*in >= of {
		b.eject(n, "slow", "requests are not answered")
	}
}

func (b *Balancer) eject(n *node, reason, cause string) {
	if n.eject(b.cfg.Now(), cause) {
		b.metrics.ejections.WithLabelValues(n.Name, reason).Inc()
		b.cfg.Log.Warn("node is out", "node", n.Name, "cause", cause)
	}
}

// hope tells whether need was offered so recently that it is worth waiting for.
func (b *Balancer) hope(rt route) bool {
	now := b.cfg.Now()
	for _, n := range b.nodes() {
		if n.Role == rt.role && now.Sub(n.lastOffered(rt.need)) < b.cfg.Timing.Hope {
			return true
		}
	}
	return false
}

// why says, node by node, why need is not offered.
func (b *Balancer) why(rt route) string {
	var parts []string
	for _, n := range b.nodes() {
		if n.Role != rt.role {
			continue
		}
		s := n.standing()
		switch {
		case !s.live && s.cause != "":
			parts = append(parts, n.Name+": "+s.cause)
		case !s.live:
			parts = append(parts, n.Name+": out")
		case s.report.State == health.Draining:
			parts = append(parts, n.Name+": draining")
		default:
			if c := missing(s.report, rt.need); c != "" {
				parts = append(parts, n.Name+": "+c)
			}
		}
	}
	if len(parts) == 0 {
		return "no node of role " + string(rt.role) + " answered"
	}
	return strings.Join(parts, "; ")
}

// missing says why a report lacks need; empty if it does not.
func missing(r health.Report, need string) string {
	if r.Can(need) {
		return ""
	}
	prefix, any := strings.CutSuffix(need, "*")
	var names []string
	for name := range r.Capabilities {
		if name == need || any && strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return need + " is not offered"
	}
	sort.Strings(names)
	for i, name := range names {
		if c := r.Capabilities[name].Cause; c != "" {
			names[i] = name + ": " + c
		} else {
			names[i] = name + " is not offered"
		}
	}
	return strings.Join(names, ", ")
}

// NodeState is a node as this balancer sees it.
type NodeState struct {
	Node
	In           bool                         `json:"in"` // gets traffic for what it can do
	Cause        string                       `json:"cause,omitempty"`
	InFlight     int64                        `json:"inflight"`
	ReportAgeMS  int64                        `json:"report_age_ms"` // -1: it never reported
	State        string                       `json:"state,omitempty"`
	Capabilities map[string]health.Capability `json:"capabilities,omitempty"`
}

// State returns the table of nodes and capabilities.
func (b *Balancer) State() []NodeState {
	now := b.cfg.Now()
	all := b.nodes()
	out := make([]NodeState, 0, len(all))
	for _, n := range all {
		s := n.standing()
		ns := NodeState{Node: n.Node, In: b.in(all, n, s, now), Cause: s.cause, InFlight: n.inflight.Load(), ReportAgeMS: -1,
			State: s.report.State, Capabilities: s.report.Capabilities}
		if !s.reportAt.IsZero() {
			ns.ReportAgeMS = now.Sub(s.reportAt).Milliseconds()
		}
		out = append(out, ns)
	}
	return out
}

// Report is this balancer's own health: a capability is good while some node offers it.
func (b *Balancer) Report() health.Report {
	r := health.Report{Node: b.cfg.Node, Role: string(identity.RoleLB), Incarnation: b.incarnation, Version: b.cfg.Version, Time: b.cfg.Now().UTC(),
		State: health.OK, Capabilities: map[string]health.Capability{}}
	for _, n := range b.State() {
		r.Checks = append(r.Checks, health.Check{Name: n.Name, OK: n.In, Detail: n.Cause, AgeMS: n.ReportAgeMS})
		if !n.In {
			r.State = health.Degraded
		}
		for name, c := range n.Capabilities {
			if name == "admin" { // never through a balancer
				continue
			}
			offered := n.In && c.OK && n.State != health.Draining
			was := r.Capabilities[name]
			switch {
			case offered || was.OK:
				r.Capabilities[name] = health.Capability{OK: true}
			case c.Cause != "" && !c.OK:
				r.Capabilities[name] = health.Capability{Cause: strings.TrimPrefix(was.Cause+"; "+n.Name+": "+c.Cause, "; ")}
			default:
				r.Capabilities[name] = health.Capability{Cause: strings.TrimPrefix(was.Cause+"; "+n.Name+": "+n.Cause, "; ")}
			}
		}
	}
	for _, c := range r.Capabilities {
		if !c.OK {
			r.State = health.Degraded
		}
	}
	if b.draining.Load() {
		r.State = health.Draining
	}
	return r
}
