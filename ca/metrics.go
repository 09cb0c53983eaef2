package ca

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are one engine's. Labels come from bounded sets: never from error texts or requests.
type metrics struct {
	requests *prometheus.HistogramVec // by outcome: issued, replayed, or the name of an error
	stages   *prometheus.HistogramVec // by stage of a batch
	batch    prometheus.Histogram
	finished *prometheus.CounterVec // intents finished for another request: takeover, sweep, abandoned, recovered
	bad      prometheus.Counter
	lost     prometheus.Counter
}

func newMetrics(registry prometheus.Registerer) (*metrics, error) {
	fine := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	m := &metrics{
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trivet_ca_request_seconds", Help: "Time to answer a request for a certificate, by outcome.", Buckets: fine}, []string{"outcome"}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trivet_ca_stage_seconds", Help: "Time a batch spends in a stage of the issuing pipeline.", Buckets: fine}, []string{"stage"}),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "trivet_ca_batch_certificates", Help: "Certificates in a batch.", Buckets: []float64{1, 2, 4, 8, 16, 32, 64}}),
		finished: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trivet_ca_intents_finished_total", Help: "Open intents that were finished or abandoned later, by how."}, []string{"how"}),
		bad: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trivet_ca_bad_signatures_total", Help: "Signatures that did not verify and were thrown away."}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trivet_ca_record_lost_total", Help: "Rows that had been committed and were not there when read back."}),
	}
	if registry == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.requests, m.stages, m.batch, m.finished, m.bad, m.lost} {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) request(began time.Time, issued *Issued, err error) {
	outcome := "issued"
	switch {
	case err != nil:
		if outcome = NameOf(err); outcome == "" {
			outcome = "internal"
		}
	case issued.Replayed:
		outcome = "replayed"
	}
	m.requests.WithLabelValues(outcome).Observe(time.Since(began).Seconds())
}

// stage observes the time since began and returns the present, for the next stage.
func (m *metrics) stage(name string, began time.Time) time.Time {
	now := time.Now()
	m.stages.WithLabelValues(name).Observe(now.Sub(began).Seconds())
	return now
}
