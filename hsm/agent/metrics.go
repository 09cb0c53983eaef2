package agent

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	calls      *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	inFlight   prometheus.Gauge
	signatures *prometheus.CounterVec
	probe      prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_hsm_calls_total",
			Help: "Requests by operation and class of the outcome (ok, or an error class)."}, []string{"op", "class"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "trivet_hsm_module_seconds",
			Help:    "Time inside the PKCS#11 module by operation.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}}, []string{"op"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{Name: "trivet_hsm_in_flight",
			Help: "Requests running or waiting for the module."}),
		signatures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trivet_hsm_signatures_total",
			Help: "Signatures made, by purpose of the key."}, []string{"purpose"}),
		probe: prometheus.NewGauge(prometheus.GaugeOpts{Name: "trivet_hsm_probe_ok",
			Help: "1 when the newest test signature verified."}),
	}
	if r != nil {
		r.MustRegister(m.calls, m.seconds, m.inFlight, m.signatures, m.probe)
	}
	return m
}
