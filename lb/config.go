// Package lb is a load balancer that knows what each node can do now. It polls every node's own health report, sends a request only where
// the capability it needs is offered, and hides the death of a node from the client: reads are hedged and fail open, issuing is retried under one
// Idempotency-Key and fails closed.
package lb

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/identity"
)

// Node is one node to send requests to.
type Node struct {
	Name    string        `yaml:"name" json:"name"`       // as in its health report
	Role    identity.Role `yaml:"role" json:"role"`       // ca (serves /v1) or ocsp (serves /ocsp, /crl, /ca); its certificate must say the same
	Address string        `yaml:"address" json:"address"` // host:port of its mTLS listener
}

// Config is what a Balancer needs.
type Config struct {
	Node     string             // this balancer's own name, in its health report
	Version  string             // likewise
	Identity *identity.Identity // of role lb
	Nodes    []Node
	Timing   Timing                // zero fields take their defaults
	Now      func() time.Time      // default time.Now; must have a monotonic part
	Log      *slog.Logger          // default slog.Default()
	Metrics  prometheus.Registerer // default: a registry of its own
}

// Timing holds every duration of a Balancer.
type Timing struct {
	ProbeEvery   time.Duration // between health probes of a node, ±20 %; default 250 ms
	ProbeTimeout time.Duration // default 250 ms
	ReadHedge    time.Duration // a read without an answer for so long is also sent to another node; default 300 ms
	ReadTotal    time.Duration // for a read in all; below the 5 s lease under which a responder says "good"; default 4 s
	WriteHedge   time.Duration // as ReadHedge, for issuing and revoking; default 400 ms
	WriteTotal   time.Duration // for issuing and revoking in all; default 12 s
	Hope         time.Duration // a capability seen so recently is waited for; default 3 s
}

func (t Timing) withDefaults() Timing {
	for _, f := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&t.ProbeEvery, 250 * time.Millisecond}, {&t.ProbeTimeout, 250 * time.Millisecond},
		{&t.ReadHedge, 300 * time.Millisecond}, {&t.ReadTotal, 4 * time.Second},
		{&t.WriteHedge, 400 * time.Millisecond}, {&t.WriteTotal, 12 * time.Second},
		{&t.Hope, 3 * time.Second},
	} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	return t
}

// Bounds of what clients may send and of what is kept of an answer.
const (
	maxHeader   = 8 << 10   // request line and headers
	maxBody     = 64 << 10  // of a request to issue or revoke
	maxBulk     = 512 << 10 // of a request to issue several
	maxOCSPBody = 10 << 10  // of an OCSP request
	maxHeld     = 256 << 10 // of an answer held back until it is complete, so that a node's death in the middle can still be hidden
	maxReport   = 256 << 10 // of a health report
)

var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

func checkNodes(nodes []Node) error {
	if len(nodes) == 0 {
		return errors.New("no nodes are given")
	}
	seen := map[string]bool{}
	for _, n := range nodes {
		switch {
		case !nameForm.MatchString(n.Name):
			return fmt.Errorf("node name %q: want 1 to 63 lower-case letters, digits, '.', '_' and '-'", n.Name)
		case n.Role != identity.RoleCA && n.Role != identity.RoleOCSP:
			return fmt.Errorf("node %s: role %q: want ca or ocsp", n.Name, n.Role)
		}
		if host, port, err := net.SplitHostPort(n.Address); err != nil || host == "" || port == "" {
			return fmt.Errorf("node %s: address %q: want host:port", n.Name, n.Address)
		}
		for _, key := range []string{"name " + n.Name, "address " + n.Address} {
			if seen[key] {
				return fmt.Errorf("node %s: %s is used twice", n.Name, key)
			}
			seen[key] = true
		}
	}
	return nil
}
