package ca

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are one engine's. Labels come from bounded sets: never from error texts or requests.
type metrics struct {
	requests                                  *prometheus.HistogramVec // by outcome: issued, replayed, or the name of an error
	stages                                    *prometheus.HistogramVec // by stage of a batch
	batch                                     prometheus.Histogram
	finished                                  *prometheus.CounterVec // intents finished for another request: takeover, sweep, abandoned, recovered
	bad                                       prometheus.Counter
	lost                                      prometheus.Counter
	clock                                     prometheus.Gauge
	tbsAhead, tbsOverdue, tbsBytes, tbsInRows prometheus.Gauge // of intent_tbs, as last kept

	forged *prometheus.CounterVec // intents that no CA node wrote as they are, by cause: missing, forged, foreign-key, no-tbs
}

func newMetrics(registry prometheus.Registerer, a *admission) (*metrics, error) {
	fine := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	m := &metrics{
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trivet_ca_request_seconds", Help: "Time to answer a request for a certificate, by outcome.", Buckets: fine}, []string{"outcome"}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trivet_ca_stage_seconds", Help: "Time in a stage of the issuing pipeline: of a request (wait, check, build, queue) or of a batch (intent, sign, outcome, release).", Buckets: fine}, []string{"stage"}),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "trivet_ca_batch_certificates", Help: "Certificates in a batch.", Buckets: []float64{1, 2, 4, 8, 16, 32, 64}}),
		finished: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trivet_ca_intents_finished_total", Help: "Open intents that were finished or abandoned later, by how."}, []string{"how"}),
		bad: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trivet_ca_bad_signatures_total", Help: "Signatures that did not verify and were thrown away."}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trivet_ca_record_lost_total", Help: "Rows that had been committed and were not there when read back."}),
		clock: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "trivet_ca_clock_offset_seconds", Help: "By how much this node's clock is ahead of the middle one of the database nodes' for certain; beyond 1 or -1 nothing is signed."}),
		forged: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trivet_ca_forged_intents_total", Help: "Intents in the database that were not signed because their MAC does not hold, or what it covers is not there, by cause."}, []string{"cause"}),
	}
	m.tbsAhead = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "trivet_ca_tbs_days_ahead", Help: "Days after today for which the database has a partition for TBSCertificates."})
	m.tbsOverdue = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "trivet_ca_tbs_days_overdue", Help: "Partitions of TBSCertificates that should have been dropped more than two days ago: some intent in them has no outcome."})
	m.tbsBytes = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "trivet_ca_tbs_bytes", Help: "Estimated size of the stored TBSCertificates on one database node."})
	m.tbsInRows = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "trivet_ca_tbs_old_nodes", Help: "Nodes that may run a version that looks for TBSCertificates in the rows of intents alone; while there is one, they are written there and stay for ever."})
	m.tbsAhead.Set(-1) // until it was looked
	for _, cause := range []string{causeMissing, causeForged, causeForeign, causeNoTBS} {
		m.forged.WithLabelValues(cause) // shown as 0 from the start, so that an alert sees the first one
	}
	if registry == nil {
		return m, nil
	}
	working := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "trivet_ca_requests_working", Help: "Requests for certificates that are worked on."}, func() float64 { n, _ := a.depth(); return float64(n) })
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "trivet_ca_requests_waiting", Help: "Requests for certificates that wait for their turn."}, func() float64 { _, n := a.depth(); return float64(n) })
	for _, c := range []prometheus.Collector{m.requests, m.stages, m.batch, m.finished, m.bad, m.lost, m.clock, m.forged, m.tbsAhead, m.tbsOverdue, m.tbsBytes, m.tbsInRows, working, waiting} {
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
