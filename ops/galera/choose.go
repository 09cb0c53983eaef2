package galera

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Accept is what an operator says that a program may not assume.
type Accept struct {
	// Without names nodes, or gives their addresses, whose content is given up: they will fetch everything anew.
	Without []string
	// Loss says that whatever only those nodes hold is lost, acknowledged commits included.
	Loss bool
}

// Plan is how a cluster of which every node is down starts again.
type Plan struct {
	Cluster   string    `json:"cluster"`
	Bootstrap string    `json:"bootstrap"` // the node to start first, with a plan: it founds the primary component
	Address   string    `json:"address"`
	Position  Position  `json:"position"` // where that node stands
	Join      []Joiner  `json:"join"`     // the others, to be started afterwards, without the plan
	GivenUp   []string  `json:"given_up"` // nodes whose content is lost by the operator's word
	Reasons   []string  `json:"reasons"`  // why nothing is lost, or what may be
	At        time.Time `json:"at"`       // of the oldest inspection

	// NewHistory: the state UUID changes, because some node may hold more than the one that founds. No node of the old history
	// can then rejoin incrementally and bring a different past along; and the CA nodes see that commits may be missing.
	NewHistory bool `json:"new_history"`
	// Reunion: all nodes remember the same last view and would also find together by themselves, when started without a plan.
	Reunion bool `json:"reunion"`
}

// Joiner is a node that joins the one that was bootstrapped.
type Joiner struct {
	Node     string `json:"node"` // its address when nobody inspected it
	Behind   int64  `json:"behind"`
	Transfer string `json:"transfer"` // incremental (if a peer's gcache still holds what is missing) or full
}

// Refusal says why no node is chosen: a wrong choice would lose what another node holds, silently.
type Refusal struct {
	Reasons []Reason `json:"reasons"`
}

// Reason is one thing that stands in the way.
type Reason struct {
	Node    string `json:"node"`    // "" when it is about all
	Problem string `json:"problem"` // what is not known, or wrong
	Do      string `json:"do"`      // what resolves it
	Flag    string `json:"flag"`    // what an operator who cannot do that may say instead; "" when nothing overrides it
}

// Error lists everything that is missing.
func (r *Refusal) Error() string {
	var b strings.Builder
	b.WriteString("no database node is chosen to start the cluster from:")
	for _, w := range r.Reasons {
		b.WriteString("\n  ")
		if w.Node != "" {
			b.WriteString(w.Node + ": ")
		}
		b.WriteString(w.Problem + "\n    " + w.Do)
		if w.Flag != "" {
			b.WriteString("\n    or give up what only it holds: " + w.Flag)
		}
	}
	return b.String()
}

// Choose finds the node that holds everything any node holds, from inspections of all of them, or refuses (*Refusal). It may lack
// an inspection, or the position, of a node only when what is there proves that the node was not in the last
// primary component; or when accept gives its content up. Ties are no trouble: equal positions of one history are equal contents.
func Choose(inspections []Inspection, accept Accept) (Plan, error) {
	c, err := newChoice(inspections, accept)
	if err != nil {
		return Plan{}, err
	}
	c.judge()
	seed := c.seed()
	if len(c.refusal.Reasons) > 0 {
		return Plan{}, c.refusal
	}
	return c.plan(seed), nil
}

// choice is the state of one Choose.
type choice struct {
	peers   []string // addresses
	by      map[string]Inspection
	without map[string]bool // addresses
	accept  Accept
	proof   string   // why nodes that cannot tell held nothing more; "" when nothing proves it
	unknown []string // addresses whose content nobody knows and nobody needs
	known   []string // addresses with a position that counts
	refusal *Refusal
}

func (c *choice) refuse(r Reason) { c.refusal.Reasons = append(c.refusal.Reasons, r) }

func newChoice(inspections []Inspection, accept Accept) (*choice, error) {
	c := &choice{by: map[string]Inspection{}, without: map[string]bool{}, accept: accept, refusal: &Refusal{}}
	if len(inspections) == 0 {
		return nil, &Refusal{Reasons: []Reason{{Problem: "nothing was inspected", Do: "run `pkictl galera inspect` on every node's host"}}}
	}
	first := inspections[0]
	c.peers = first.Peers
	for _, in := range inspections {
		switch {
		case in.Format != inspectionFormat:
			return nil, &Refusal{Reasons: []Reason{{Node: in.Node, Problem: fmt.Sprintf("its inspection has format %d instead of %d", in.Format, inspectionFormat), Do: "inspect all nodes with the same version of pkictl"}}}
		case in.Cluster != first.Cluster || !sameSet(in.Peers, first.Peers) || !slices.Contains(in.Peers, in.Address):
			return nil, &Refusal{Reasons: []Reason{{Node: in.Node, Problem: fmt.Sprintf("it is configured for cluster %q of %s, %s for cluster %q of %s", in.Cluster, strings.Join(in.Peers, ", "), first.Node, first.Cluster, strings.Join(first.Peers, ", ")),
				Do: "give inspections of one cluster, and make the configurations of its nodes alike"}}}
		}
		if old, twice := c.by[in.Address]; twice {
			return nil, &Refusal{Reasons: []Reason{{Node: in.Node, Problem: fmt.Sprintf("two inspections are of %s: %s (%s) and %s (%s)", in.Address, old.Node, old.At.Format(time.RFC3339), in.Node, in.At.Format(time.RFC3339)), Do: "give the newest of each node"}}}
		}
		c.by[in.Address] = in
	}
	for _, w := range accept.Without {
		at := slices.IndexFunc(c.peers, func(p string) bool { return p == w || c.by[p].Node == w })
		if at < 0 {
			return nil, &Refusal{Reasons: []Reason{{Node: w, Problem: "--without names no node of the cluster", Do: "its nodes are " + strings.Join(c.names(c.peers), ", ")}}}
		}
		c.without[c.peers[at]] = true
	}
	if len(accept.Without) > 0 && !accept.Loss {
		return nil, &Refusal{Reasons: []Reason{{Problem: "--without gives up what only " + strings.Join(accept.Without, ", ") + " may hold, acknowledged certificates and revocations included", Do: "say so: add --i-accept-loss"}}}
	}
	if accept.Loss && len(accept.Without) == 0 {
		return nil, &Refusal{Reasons: []Reason{{Problem: "--i-accept-loss alone says nothing", Do: "name each node to do without: --without NODE"}}}
	}
	return c, nil
}

// name is what an operator calls the node at an address.
func (c *choice) name(address string) string {
	if in, ok := c.by[address]; ok {
		return in.Node
	}
	return address
}

func (c *choice) names(addresses []string) []string {
	var out []string
	for _, a := range addresses {
		out = append(out, c.name(a))
	}
	return out
}

func (c *choice) flag(addresses ...string) string {
	var f strings.Builder
	for _, a := range addresses {
		f.WriteString("--without " + c.name(a) + " ")
	}
	return f.String() + "--i-accept-loss"
}

// judge sorts the nodes into known, unknown but not needed, given up, and in the way.
func (c *choice) judge() {
	for _, p := range c.peers {
		if in, asked := c.by[p]; asked && !in.Running && in.Position != nil && !c.without[p] {
			c.known = append(c.known, p)
		}
	}
	c.proof = c.prove()
	for _, p := range c.peers {
		in, asked := c.by[p]
		switch {
		case in.Running && in.Primary:
			c.refuse(Reason{Node: in.Node, Problem: "it runs and belongs to a primary component: the cluster lives", Do: "start the other nodes as usual, they join it"})
		case in.Running:
			c.refuse(Reason{Node: in.Node, Problem: "a mariadbd is running there, so that its position cannot be read and may still change", Do: "stop it (frozen: kill it) and inspect again"})
		case slices.Contains(c.known, p), c.without[p]:
		case c.proof != "":
			c.unknown = append(c.unknown, p)
		case !asked:
			c.refuse(Reason{Node: p, Problem: "nobody has inspected it, and it may hold commits that no other node holds",
				Do: "run `pkictl galera inspect` on its host and add the result", Flag: c.flag(p)})
		default:
			c.refuse(Reason{Node: in.Node, Problem: "its position is unknown, and it may have held commits that no other node holds: " + in.Problem,
				Do: "bring its data directory back (" + in.Data + ") and inspect again", Flag: c.flag(p)})
		}
	}
}

// prove returns why nodes that cannot tell their position do not matter, "" if nothing says so. Either the most advanced known node
// was the only one left when it stopped, or nobody but known nodes was in the last primary component that any of them remembers. A view that
// names anybody else, however old it may be, spoils the proof.
func (c *choice) prove() string {
	selves, members := map[string]bool{}, map[string]bool{}
	top := ""
	for _, p := range c.known {
		in := c.by[p]
		if top == "" || in.Position.Seqno > c.by[top].Position.Seqno {
			top = p
		}
		if in.View != nil {
			selves[in.View.Self] = true
			for _, m := range in.View.Members {
				members[m] = true
			}
		}
	}
	for m := range members {
		if !selves[m] {
			return ""
		}
	}
	switch {
	case top == "":
		return ""
	case c.by[top].State.SafeToBootstrap && c.by[top].State.Seqno >= 0:
		return c.name(top) + " was the last to stop, alone"
	case len(members) > 0 && c.by[top].View != nil:
		return "nobody but " + strings.Join(c.names(c.known), " and ") + " was in the last primary component"
	}
	return ""
}

// seed returns the address of the node to found from, "" when the histories differ or nobody has one.
func (c *choice) seed() string {
	histories := map[string][]string{}
	for _, p := range c.known {
		histories[c.by[p].Position.UUID] = append(histories[c.by[p].Position.UUID], p)
	}
	switch len(histories) {
	case 0:
		if len(c.refusal.Reasons) == 0 {
			c.refuse(Reason{Problem: "no node is left that has a position", Do: "restore one from a backup, or from the other site (see the runbook)"})
		}
		return ""
	case 1:
	default:
		for _, uuid := range slices.Sorted(maps.Keys(histories)) {
			var at []string
			for _, p := range histories[uuid] {
				at = append(at, fmt.Sprintf("%s at %d", c.name(p), c.by[p].Position.Seqno))
			}
			c.refuse(Reason{Node: strings.Join(c.names(histories[uuid]), ", "), Problem: fmt.Sprintf("history %s (%s) is not the others': the nodes went separate ways", uuid, strings.Join(at, ", ")),
				Do: "keep copies of all data directories, find out which history is right, and do without the nodes of the others", Flag: c.flag(histories[uuid]...)})
		}
		return ""
	}
	best := c.known[0]
	for _, p := range c.known[1:] {
		if c.by[p].Position.Seqno > c.by[best].Position.Seqno {
			best = p
		}
	}
	return best
}

func (c *choice) plan(seed string) Plan {
	from := c.by[seed]
	p := Plan{Cluster: from.Cluster, Bootstrap: from.Node, Address: seed, Position: *from.Position, At: from.At, Join: []Joiner{}, GivenUp: []string{}, Reunion: c.reunion()}
	for _, w := range c.peers {
		if c.without[w] && c.costs(w, p.Position) {
			p.GivenUp = append(p.GivenUp, c.name(w))
		}
	}
	p.NewHistory = len(p.GivenUp) > 0
	for _, a := range c.peers {
		if in, ok := c.by[a]; ok && in.At.Before(p.At) {
			p.At = in.At
		}
		if a == seed {
			continue
		}
		j := Joiner{Node: c.name(a), Transfer: "full"}
		if pos := c.by[a].Position; pos != nil && pos.UUID == p.Position.UUID {
			j.Behind = p.Position.Seqno - pos.Seqno
			if !p.NewHistory && !c.without[a] {
				j.Transfer = "incremental"
			}
		}
		p.Join = append(p.Join, j)
	}
	switch {
	case p.NewHistory:
		p.Reasons = append(p.Reasons, fmt.Sprintf("%s stands highest of the nodes that count, at %d; what only %s held is given up", from.Node, p.Position.Seqno, strings.Join(p.GivenUp, ", ")),
			"the state UUID changes, so that every other node fetches everything anew, and CA nodes learn that commits may be missing")
	case len(c.unknown) > 0 && c.proof != "":
		p.Reasons = append(p.Reasons, fmt.Sprintf("%s stands highest, at %d; %s cannot have held more: %s", from.Node, p.Position.Seqno, strings.Join(c.names(c.unknown), ", "), c.proof))
	default:
		p.Reasons = append(p.Reasons, fmt.Sprintf("%s stands highest of all nodes, at %d", from.Node, p.Position.Seqno))
	}
	return p
}

// costs tells whether doing without the node may lose anything.
func (c *choice) costs(address string, best Position) bool {
	if pos := c.by[address].Position; pos != nil {
		return pos.UUID != best.UUID || pos.Seqno > best.Seqno
	}
	return c.proof == ""
}

// reunion: every node is known, and all remember one view, which is of them all.
func (c *choice) reunion() bool {
	var selves []string
	for _, p := range c.peers {
		in := c.by[p]
		if !slices.Contains(c.known, p) || in.View == nil || in.View.ID != c.by[c.peers[0]].View.ID {
			return false
		}
		selves = append(selves, in.View.Self)
	}
	return sameSet(selves, c.by[c.peers[0]].View.Members)
}

func sameSet(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}
