package hsmsync

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are one group's. Counters and the histogram are counted where things happen; what a member is now is read
// from the group at each scrape.
type metrics struct {
	group       *Group
	sign        *prometheus.HistogramVec
	failovers   *prometheus.CounterVec
	quarantines *prometheus.CounterVec

	state, inflight, verified *prometheus.Desc
}

func newMetrics(g *Group, to prometheus.Registerer) (*metrics, error) {
	labels := prometheus.Labels{"group": g.cfg.Group}
	desc := func(name, help string, vary ...string) *prometheus.Desc {
		return prometheus.NewDesc("trivet_hsmsync_"+name, help, vary, labels)
	}
	m := &metrics{
		group: g,
		sign: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trivet_hsmsync_sign_seconds", Help: "Time one member took for one batch of signatures.",
			ConstLabels: labels, Buckets: prometheus.ExponentialBuckets(0.0005, 2, 12),
		}, []string{"member"}),
		failovers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trivet_hsmsync_failovers_total", Help: "Batches a member did not sign, by class of error; another member was asked.",
			ConstLabels: labels,
		}, []string{"member", "cause"}),
		quarantines: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trivet_hsmsync_quarantines_total", Help: "Times a member was quarantined.", ConstLabels: labels,
		}, []string{"member"}),
		state:    desc("member_state", "1 for the state the member is in.", "member", "state"),
		inflight: desc("in_flight", "Digests handed to the member and not yet answered.", "member"),
		verified: desc("verified_keys", "Live keys of which the member has proved its copy.", "member"),
	}
	if to == nil {
		return m, nil
	}
	if err := to.Register(m); err != nil {
		return nil, fmt.Errorf("registering metrics of group %s: %w", g.cfg.Group, err)
	}
	return m, nil
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	m.sign.Describe(ch)
	m.failovers.Describe(ch)
	m.quarantines.Describe(ch)
	ch <- m.state
	ch <- m.inflight
	ch <- m.verified
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	m.sign.Collect(ch)
	m.failovers.Collect(ch)
	m.quarantines.Collect(ch)
	for _, ms := range m.group.Status().Groups[0].Members {
		for _, s := range states {
			v := 0.0
			if s == ms.State {
				v = 1
			}
			ch <- prometheus.MustNewConstMetric(m.state, prometheus.GaugeValue, v, ms.Name, s)
		}
		verified := 0
		for _, k := range ms.Keys {
			if k.State == "verified" {
				verified++
			}
		}
		ch <- prometheus.MustNewConstMetric(m.inflight, prometheus.GaugeValue, float64(ms.InFlight), ms.Name)
		ch <- prometheus.MustNewConstMetric(m.verified, prometheus.GaugeValue, float64(verified), ms.Name)
	}
}
