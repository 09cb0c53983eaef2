package agent

import (
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	calls      *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	signatures *prometheus.CounterVec
	hung       prometheus.Counter
}

// newMetrics makes what is counted.
func newMetrics() *metrics {
	return &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_hsm_calls_total",
			Help: "Requests by operation and class of the outcome (ok, or an error class)."}, []string{"op", "class"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "trivet_hsm_module_seconds",
			Help:    "Time inside the PKCS#11 module by operation.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}}, []string{"op"}),
		signatures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_hsm_signatures_total",
			Help: "Signatures made, by purpose and id of the key."}, []string{"purpose", "key"}),
		hung: prometheus.NewCounter(prometheus.CounterOpts{Name: "trivet_hsm_hung_calls_total",
			Help: "Module calls that did not return in time. The process ends at the first."}),
	}
}

// gauges reads the server when it is asked.
type gauges struct{ s *Server }

// Describe says nothing: the metrics are few and fixed, and checked when they are collected.
func (g gauges) Describe(chan<- *prometheus.Desc) {}

// Collect makes one metric per figure, all of one moment.
func (g gauges) Collect(c chan<- prometheus.Metric) {
	i := g.s.Info()
	for _, m := range []struct {
		name, help string
		value      float64
	}{
		{"in_flight", "Requests running or waiting for the module.", float64(i.InFlight)},
		{"queue_depth", "Requests waiting for the module.", float64(g.s.dog.waiting())},
		{"capacity", "Module calls that may run at once.", float64(i.Capacity)},
		{"probe_ok", "1 when the newest test signature verified, and is not old.", flag(i.Probe.OK)},
		{"locked", "1 while the token waits for an operator to activate it.", flag(i.Locked != "")},
		{"keys", "Usable keys of groups in the token.", float64(i.Keys)},
		{"foreign_objects", "Objects in the token that are not ours.", float64(i.Foreign)},
		{"faulty_keys", "Keys of ours in the token that cannot be used.", float64(i.Faulty)},
		{"epoch", "Site epoch this member signs for; 0 while it has none.", float64(i.Epoch)},
	} {
		c <- prometheus.MustNewConstMetric(prometheus.NewDesc("trivet_hsm_"+m.name, m.help, nil, nil), prometheus.GaugeValue, m.value)
	}
}

func flag(on bool) float64 {
	if on {
		return 1
	}
	return 0
}
