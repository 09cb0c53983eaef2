package hsmsync

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/hsm"
)

// metrics are one group's. Counters and the histogram are counted where things happen; what a member or key is now is
// read from the group at each scrape.
type metrics struct {
	group                                            *Group
	sign                                             *prometheus.HistogramVec
	failovers, hedges, probes, attempts, quarantines *prometheus.CounterVec
	refused                                          prometheus.Counter

	state, inflight, verified, oldest, waiting, copies, below, epoch *prometheus.Desc
}

func newMetrics(g *Group, to prometheus.Registerer) (*metrics, error) {
	labels := prometheus.Labels{"group": g.cfg.Group}
	desc := func(name, help string, vary ...string) *prometheus.Desc {
		return prometheus.NewDesc("trivet_hsmsync_"+name, help, vary, labels)
	}
	counter := func(name, help string, vary ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_hsmsync_" + name, Help: help, ConstLabels: labels}, vary)
	}
	m := &metrics{
		group: g,
		sign: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trivet_hsmsync_sign_seconds", Help: "Time one member took for one batch of signatures.",
			ConstLabels: labels, Buckets: prometheus.ExponentialBuckets(0.0005, 2, 12),
		}, []string{"member"}),
		failovers:   counter("failovers_total", "Batches a member did not sign, by class of error; another member was asked.", "member", "cause"),
		hedges:      counter("hedges_total", "Batches with which a member took so long that another was asked beside it.", "member"),
		probes:      counter("probe_failures_total", "Health questions not answered, test signatures of its own that failed, challenges not signed.", "member", "probe"),
		attempts:    counter("recovery_attempts_total", "Attempts to recover a failed member that failed.", "member"),
		quarantines: counter("quarantines_total", "Times a member was quarantined.", "member"),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trivet_hsmsync_refused_total", Help: "Digests refused because too many waited for a member.", ConstLabels: labels,
		}),
		state:    desc("member_state", "1 for the state the member is in.", "member", "state"),
		inflight: desc("in_flight", "Digests handed to the member and not yet answered.", "member"),
		verified: desc("verified_keys", "Live keys of which the member has proved its copy.", "member"),
		oldest:   desc("oldest_proof_seconds", "Age of the oldest proof that the member is trusted by.", "member"),
		waiting:  desc("waiting", "Digests for which no member is free."),
		copies:   desc("key_copies", "Members that have proved their copy of the live key, in their present incarnation.", "key", "label", "purpose"),
		below:    desc("keys_below_min_copies", "Live keys with fewer proved copies than the group's policy wants."),
		epoch:    desc("log_position", "Position of the newest entry of the group's log that is known here."),
	}
	if to == nil {
		return m, nil
	}
	if err := to.Register(m); err != nil {
		return nil, fmt.Errorf("registering metrics of group %s: %w", g.cfg.Group, err)
	}
	return m, nil
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.sign, m.failovers, m.hedges, m.probes, m.attempts, m.quarantines, m.refused}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.collectors() {
		c.Describe(ch)
	}
	for _, d := range []*prometheus.Desc{m.state, m.inflight, m.verified, m.oldest, m.waiting, m.copies, m.below, m.epoch} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.collectors() {
		c.Collect(ch)
	}
	for _, s := range m.gauges() { // sent without the group's lock, since nobody knows when they are taken
		ch <- s
	}
}

func (m *metrics) gauges() (out []prometheus.Metric) {
	g := m.group
	g.mu.Lock()
	defer g.mu.Unlock()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out = append(out, prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...))
	}
	now := g.cfg.Now()
	for _, member := range g.members {
		is := g.stateOf(member)
		for _, s := range states {
			v := 0.0
			if s == is {
				v = 1
			}
			gauge(m.state, v, member.Name, s)
		}
		verified, oldest := 0, time.Duration(0)
		for _, p := range member.proofs {
			if !p.at.IsZero() {
				verified++
				oldest = max(oldest, now.Sub(p.at))
			}
		}
		gauge(m.inflight, float64(member.inflight), member.Name)
		gauge(m.verified, float64(verified), member.Name)
		gauge(m.oldest, oldest.Seconds(), member.Name)
	}
	below := 0
	for _, k := range g.keys {
		if hsm.MayChallenge(g.role, k.record.Purpose) {
			n := g.copies(k)
			if n < g.state.Policy.MinCopies {
				below++
			}
			gauge(m.copies, float64(n), string(k.record.ID), k.record.Label, string(k.record.Purpose))
		}
	}
	gauge(m.below, float64(below))
	gauge(m.waiting, float64(g.backlog))
	gauge(m.epoch, float64(g.state.Next-1))
	return out
}
