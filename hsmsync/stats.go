package hsmsync

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// stats are a coordinator's metrics: how the group is, as its reconciliation sees it.
type stats struct {
	lag      *prometheus.HistogramVec
	findings *prometheus.GaugeVec
	fewest   prometheus.Gauge
	last     prometheus.Gauge
	seconds  prometheus.Histogram
	leading  prometheus.Gauge
	buried   prometheus.Counter
}

func newStats(group string, to prometheus.Registerer) (*stats, error) {
	labels := prometheus.Labels{"group": group}
	gauge := func(name, help string) prometheus.GaugeOpts {
		return prometheus.GaugeOpts{Name: "trivet_hsmsync_" + name, Help: help, ConstLabels: labels}
	}
	s := &stats{
		lag: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trivet_hsmsync_copy_lag_seconds", ConstLabels: labels, Buckets: prometheus.ExponentialBuckets(1, 4, 10),
			Help: "Time between a key's becoming live, or its last having been seen on the member, and its being brought to the member that lacked it.",
		}, []string{"member"}),
		findings: prometheus.NewGaugeVec(gauge("findings", "What the last reconciliation found and could not repair, by kind."), []string{"kind"}),
		fewest:   prometheus.NewGauge(gauge("fewest_copies", "Copies, on members that answer, of the live key that has the fewest.")),
		last:     prometheus.NewGauge(gauge("reconciled_timestamp_seconds", "When the last reconciliation ended.")),
		leading:  prometheus.NewGauge(gauge("reconciling", "1 if this process is the one that reconciles the group.")),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "trivet_hsmsync_reconcile_seconds", Help: "Time one reconciliation took.", ConstLabels: labels, Buckets: prometheus.ExponentialBuckets(0.001, 4, 10),
		}),
		buried: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trivet_hsmsync_late_destructions_total", Help: "Destroyed keys that were destroyed on a member that had been away.", ConstLabels: labels,
		}),
	}
	if to == nil {
		return s, nil
	}
	for _, c := range []prometheus.Collector{s.lag, s.findings, s.fewest, s.last, s.leading, s.seconds, s.buried} {
		if err := to.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics of the coordinator of group %s: %w", group, err)
		}
	}
	return s, nil
}

func (s *stats) copied(member string, lag time.Duration) {
	s.lag.WithLabelValues(member).Observe(lag.Seconds())
}

func (s *stats) report(r Report, took time.Duration) {
	s.findings.Reset()
	for _, f := range r.Findings {
		if f.Alarm {
			s.findings.WithLabelValues(f.Kind).Inc()
		}
	}
	s.fewest.Set(float64(r.Fewest))
	s.buried.Add(float64(r.Destroyed))
	s.seconds.Observe(took.Seconds())
	s.last.SetToCurrentTime()
	s.leading.Set(1)
}

// idle says that another process reconciles: what it finds is for it to tell.
func (s *stats) idle() {
	s.findings.Reset()
	s.leading.Set(0)
}
