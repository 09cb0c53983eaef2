package db

import (
	"strings"
	"testing"
	"time"
)

// played is what the probes of three nodes find, on a clock of its own.
type played struct {
	signs
	nodes   [3]*node
	started [3]time.Time
	now     time.Time
	uuid    string
	conf    uint64
}

func newPlayed() *played {
	p := &played{now: time.Now(), uuid: "h1", conf: 3}
	for i := range p.nodes {
		p.nodes[i], p.started[i] = &node{}, p.now.Add(-time.Hour)
	}
	p.probe(0, 1, 2)
	return p
}

// probe has these nodes answer, all others not, for three seconds.
func (p *played) probe(up ...int) {
	for range 12 {
		for i, n := range p.nodes {
			primary := false
			for _, u := range up {
				primary = primary || u == i
			}
			p.observe(n, view{p.uuid, p.conf, p.started[i]}, primary, p.now)
		}
		p.now = p.now.Add(250 * time.Millisecond)
	}
}

// restart has nodes begin anew.
func (p *played) restart(nodes ...int) {
	for _, i := range nodes {
		p.started[i] = p.now
	}
}

func (p *played) want(t *testing.T, what string, count uint64, cause string) {
	t.Helper()
	if p.count != count || count > 0 && !strings.Contains(p.cause, cause) {
		t.Errorf("%s: %d signs, the last %q; want %d, %q", what, p.count, p.cause, count, cause)
	}
}

// TestEveryOutageOfAllNodesIsOneSign: after each the component may have the number it had after the one before.
func TestEveryOutageOfAllNodesIsOneSign(t *testing.T) {
	p := newPlayed()
	for outage := uint64(1); outage <= 3; outage++ {
		p.probe()
		p.restart(0, 1, 2)
		p.conf = 0
		p.probe(1)
		p.probe(1, 2)
		p.probe(0, 1, 2)
		p.want(t, "outage", outage, "")
	}
}

// TestTheOnlyNodeThatCameBackGoesAgain: what it took in since is in doubt, too.
func TestTheOnlyNodeThatCameBackGoesAgain(t *testing.T) {
	p := newPlayed()
	p.probe()
	p.restart(0, 1, 2)
	p.conf = 0
	p.probe(1)
	p.want(t, "the first outage", 1, "")
	p.probe()
	p.restart(0, 1, 2)
	p.probe(2)
	p.probe(0, 1, 2)
	p.want(t, "the second outage", 2, "")
}

func TestLosingOneNodeIsNoSign(t *testing.T) {
	p := newPlayed()
	for i := range p.nodes { // one after another, as for an upgrade
		others := []int{(i + 1) % 3, (i + 2) % 3}
		p.conf++
		p.probe(others...)
		p.restart(i)
		p.conf++
		p.probe(0, 1, 2)
	}
	p.want(t, "a rolling restart", 0, "")
}

func TestLosingTwoNodesIsASign(t *testing.T) {
	p := newPlayed()
	p.probe(0)
	p.restart(1, 2)
	p.conf = 5
	p.probe(0, 1)
	p.probe(0, 1, 2)
	p.want(t, "two of three", 1, "2 database nodes were gone at once")
}

// TestAProcessThatWasAwayItselfSeesNoSign: it was paused, or cut off from the databases, which went on as they were.
func TestAProcessThatWasAwayItselfSeesNoSign(t *testing.T) {
	p := newPlayed()
	p.probe()
	p.probe(0, 1, 2)
	p.want(t, "cut off", 0, "")
	p.now = p.now.Add(time.Minute)
	p.probe(0, 1, 2)
	p.want(t, "paused", 0, "")
}

func TestAnotherHistoryAndALowerNumberAreSigns(t *testing.T) {
	p := newPlayed()
	p.uuid = "h2"
	p.probe(0, 1, 2)
	p.want(t, "another history", 1, "the cluster's history is h2 and was h1")
	p.conf = 1
	p.probe(0, 1, 2)
	p.want(t, "a lower number", 2, "fell from 3 to 1")
	p.probe(0, 1, 2)
	p.want(t, "the same again", 2, "fell from 3 to 1")
}
