package health_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"trivet/health"
)

// read gathers a registry as a scrape would.
func read(t *testing.T, r *prometheus.Registry) map[string]health.Stage {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			t.Fatal(err)
		}
	}
	stages, err := health.ReadStages(&text, health.CAStages)
	if err != nil {
		t.Fatal(err)
	}
	return stages
}

func TestStagesAreReadFromMetrics(t *testing.T) {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: health.CAStages, Buckets: []float64{.01, .1, 1}}, []string{"stage"})
	r := prometheus.NewRegistry()
	r.MustRegister(h)
	for range 98 {
		h.WithLabelValues("sign").Observe(.005)
	}
	first := read(t, r)
	for range 2 {
		h.WithLabelValues("sign").Observe(.5)
	}
	h.WithLabelValues("late").Observe(5)
	all := read(t, r)
	s := all["sign"]
	if s.Count != 100 || s.Mean() != 14900*time.Microsecond || s.Quantile(.5) > 10*time.Millisecond || s.Quantile(.99) < 100*time.Millisecond || s.Quantile(.99) > time.Second {
		t.Errorf("%d, mean %v, p50 %v, p99 %v", s.Count, s.Mean(), s.Quantile(.5), s.Quantile(.99))
	}
	if since := s.Since(first["sign"]); since.Count != 2 || since.Mean() != 500*time.Millisecond || since.Quantile(.5) < 100*time.Millisecond {
		t.Errorf("since: %d, mean %v, p50 %v", since.Count, since.Mean(), since.Quantile(.5))
	}
	if both := s.Add(s); both.Count != 200 || both.Mean() != s.Mean() || both.Quantile(.99) != s.Quantile(.99) {
		t.Errorf("added: %+v", both)
	}
	if one := (health.Stage{}).Add(s); one.Count != s.Count || s.Add(health.Stage{}).Count != s.Count {
		t.Errorf("nothing and something: %+v", one)
	}
	if late := all["late"]; late.Quantile(.99) != time.Second {
		t.Errorf("beyond the last bound: %v", late.Quantile(.99))
	}
	if none := (health.Stage{}); none.Mean() != 0 || none.Quantile(.5) != 0 {
		t.Errorf("of nothing: %v %v", none.Mean(), none.Quantile(.5))
	}
}

func TestGaugesAreReadFromMetrics(t *testing.T) {
	set, labelled := prometheus.NewGauge(prometheus.GaugeOpts{Name: "set"}), prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "labelled"}, []string{"node"})
	r := prometheus.NewRegistry()
	r.MustRegister(set, labelled)
	set.Set(-1)
	labelled.WithLabelValues("a").Set(1)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			t.Fatal(err)
		}
	}
	got, err := health.ReadGauges(&text, "set", "labelled", "unknown")
	if err != nil || len(got) != 1 || got["set"] != -1 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := health.ReadGauges(bytes.NewReader([]byte("{{")), "set"); err == nil {
		t.Error("nonsense was read")
	}
}
