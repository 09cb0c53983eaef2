package lb

import (
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests  *prometheus.CounterVec
	seconds   *prometheus.HistogramVec
	retries   *prometheus.CounterVec
	hedges    *prometheus.CounterVec
	denied    *prometheus.CounterVec
	ejections *prometheus.CounterVec
	table     *table
}

func newMetrics(b *Balancer) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_lb_" + name, Help: help}, labels)
	}
	return &metrics{
		requests: counter("requests_total", "Requests answered, by class and HTTP status; 499: the client left first.", "class", "status"),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "trivet_lb_request_seconds", Help: "From a request's headers to its last octet written.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .2, .35, .5, 1, 2, 4, 8, 12}}, []string{"class"}),
		retries:   counter("retries_total", "Requests sent again because a node failed.", "class"),
		hedges:    counter("hedges_total", "Requests sent to one more node because a node was slow.", "class"),
		denied:    counter("hedges_denied_total", "Hedges not sent because their budget was spent.", "class"),
		ejections: counter("ejections_total", "Times a node was taken out, by reason: probe, connection, slow.", "node", "reason"),
		table: &table{b: b,
			up:         prometheus.NewDesc("trivet_lb_node_up", "1 while the node gets traffic.", []string{"node"}, nil),
			capability: prometheus.NewDesc("trivet_lb_node_capability", "1 while the node gets traffic for the capability.", []string{"node", "capability"}, nil),
			inflight:   prometheus.NewDesc("trivet_lb_node_inflight", "Requests under way on the node.", []string{"node"}, nil)},
	}
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.requests, m.seconds, m.retries, m.hedges, m.denied, m.ejections, m.table}
}

// table shows the nodes' standing as it is when it is asked for.
type table struct {
	b                        *Balancer
	up, capability, inflight *prometheus.Desc
}

func (t *table) Describe(ch chan<- *prometheus.Desc) {
	ch <- t.up
	ch <- t.capability
	ch <- t.inflight
}

func (t *table) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	flag := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	for _, n := range t.b.State() {
		gauge(t.up, flag(n.In), n.Name)
		gauge(t.inflight, float64(n.InFlight), n.Name)
		for name, c := range n.Capabilities {
			gauge(t.capability, flag(n.In && c.OK && n.State != "draining"), n.Name, name)
		}
	}
}
