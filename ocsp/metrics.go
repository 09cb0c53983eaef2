package ocsp

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// outcome labels of trivet_ocsp_requests_total.
const (
	outcomeGood         = "good"
	outcomeRevoked      = "revoked"
	outcomeMulti        = "multi"
	outcomeNotModified  = "not_modified"
	outcomeTryLater     = "try_later"
	outcomeUnauthorized = "unauthorized"
	outcomeMalformed    = "malformed"
	outcomeInternal     = "internal_error"
)

type metrics struct {
	requests     map[string]prometheus.Counter
	signed       prometheus.Counter
	signFailures prometheus.Counter
	polls        prometheus.Counter
	pollFailures prometheus.Counter
	divergences  prometheus.Counter
	applied      prometheus.Counter
	served       servedAge
}

func newMetrics(v *VA, reg prometheus.Registerer) (*metrics, error) {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "trivet_ocsp_requests_total", Help: "OCSP requests by what was answered.",
	}, []string{"outcome"})
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "trivet_ocsp_" + name, Help: help})
	}
	m := &metrics{
		requests:     map[string]prometheus.Counter{},
		signed:       counter("signatures_total", "OCSP answers signed and verified."),
		signFailures: counter("signature_failures_total", "OCSP answers that could not be signed."),
		polls:        counter("feed_polls_total", "Causal reads of the change feed."),
		pollFailures: counter("feed_poll_failures_total", "Causal reads of the change feed that failed."),
		divergences:  counter("feed_divergences_total", "Holes or hash breaks met: a database node has another history."),
		applied:      counter("feed_rows_total", "Rows of the change feed applied."),
	}
	for _, o := range []string{outcomeGood, outcomeRevoked, outcomeMulti, outcomeNotModified, outcomeTryLater,
		outcomeUnauthorized, outcomeMalformed, outcomeInternal} {
		m.requests[o] = requests.WithLabelValues(o)
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "trivet_ocsp_" + name, Help: help}, value)
	}
	collectors := []prometheus.Collector{
		requests, m.signed, m.signFailures, m.polls, m.pollFailures, m.divergences, m.applied,
		gauge("lease_remaining_seconds", "How long good may still be answered without another causal read; 0 is not at all.",
			func() float64 { return max(v.lease.remaining(), 0).Seconds() }),
		gauge("feed_lag_seconds", "Age of the moment up to which every fact is applied; -1 before the first.",
			func() float64 { return v.feed.lag().Seconds() }),
		gauge("unsigned_entries", "Serials with a status and no signed answer.",
			func() float64 { return float64(v.catalog.counts().Unsigned) }),
		gauge("entries", "Serials with a status.",
			func() float64 { c := v.catalog.counts(); return float64(c.Good + c.Revoked) }),
		gauge("served_age_seconds", "Age of the oldest answer served within the last minute or two.",
			func() float64 { return m.served.oldest(v.cfg.Now()).Seconds() }),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range collectors {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics of the validation authority: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) request(outcome string) { m.requests[outcome].Inc() }

// servedAge keeps the greatest age served in this minute and in the one before.
type servedAge struct {
	minute, now, before atomic.Int64
}

func (s *servedAge) turn(minute int64) {
	if old := s.minute.Load(); old != minute && s.minute.CompareAndSwap(old, minute) {
		last := s.now.Swap(0)
		if old+1 != minute {
			last = 0
		}
		s.before.Store(last)
	}
}

func (s *servedAge) observe(now time.Time, thisUpdate int64) {
	s.turn(now.Unix() / 60)
	age := now.Unix() - thisUpdate
	for {
		old := s.now.Load()
		if age <= old || s.now.CompareAndSwap(old, age) {
			return
		}
	}
}

func (s *servedAge) oldest(now time.Time) time.Duration {
	s.turn(now.Unix() / 60)
	return time.Duration(max(s.now.Load(), s.before.Load())) * time.Second
}
