package health

import (
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// CAStages is the histogram of a CA node's issuing pipeline, with the label stage; CAStageOrder is the way of a request through it.
const CAStages = "trivet_ca_stage_seconds"

// CAStageOrder lists the stages in the order that a request passes them: wait to queue are of one request, intent to release of its batch.
var CAStageOrder = []string{"wait", "check", "build", "queue", "intent", "sign", "outcome", "release"}

// Stage is how long one stage of some work took, as a histogram.
type Stage struct {
	Name  string
	Count uint64
	Total time.Duration

	bounds []float64 // seconds, rising
	below  []uint64  // observations up to each bound
}

// ReadStages reads the stages of a histogram from a process's metrics in Prometheus text format, by name.
func ReadStages(metrics io.Reader, histogram string) (map[string]Stage, error) {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(metrics)
	if err != nil {
		return nil, fmt.Errorf("reading metrics: %w", err)
	}
	stages := make(map[string]Stage)
	for _, m := range families[histogram].GetMetric() {
		s := Stage{Count: m.GetHistogram().GetSampleCount(), Total: seconds(m.GetHistogram().GetSampleSum())}
		for _, l := range m.GetLabel() {
			if l.GetName() == "stage" {
				s.Name = l.GetValue()
			}
		}
		for _, b := range m.GetHistogram().GetBucket() {
			s.bounds, s.below = append(s.bounds, b.GetUpperBound()), append(s.below, b.GetCumulativeCount())
		}
		stages[s.Name] = s
	}
	return stages, nil
}

// ReadGauges reads those of the named gauges without labels that a process's metrics hold.
func ReadGauges(metrics io.Reader, names ...string) (map[string]float64, error) {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(metrics)
	if err != nil {
		return nil, fmt.Errorf("reading metrics: %w", err)
	}
	gauges := make(map[string]float64)
	for _, name := range names {
		for _, m := range families[name].GetMetric() {
			if m.GetGauge() != nil && len(m.GetLabel()) == 0 {
				gauges[name] = m.GetGauge().GetValue()
			}
		}
	}
	return gauges, nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// Since returns what was observed after an earlier reading of the same process.
func (s Stage) Since(earlier Stage) Stage {
	if len(earlier.below) != len(s.below) {
		return s
	}
	s.Count, s.Total, s.below = s.Count-earlier.Count, s.Total-earlier.Total, slices.Clone(s.below)
	for i, n := range earlier.below {
		s.below[i] -= n
	}
	return s
}

// Add returns the observations of two processes together, whose histograms have the same bounds.
func (s Stage) Add(other Stage) Stage {
	if s.Count == 0 {
		return other
	}
	if len(s.below) != len(other.below) {
		return s
	}
	s.Count, s.Total, s.below = s.Count+other.Count, s.Total+other.Total, slices.Clone(s.below)
	for i, n := range other.below {
		s.below[i] += n
	}
	return s
}

// Mean is the average; 0 of nothing.
func (s Stage) Mean() time.Duration {
	if s.Count == 0 {
		return 0
	}
	return s.Total / time.Duration(s.Count)
}

// Quantile estimates what the fraction q of observations stayed below, taking them as spread evenly within a bucket. Beyond the last bound it is
// that bound.
func (s Stage) Quantile(q float64) time.Duration {
	rank := uint64(math.Ceil(q * float64(s.Count)))
	var from float64
	var before uint64
	for i, n := range s.below {
		if n >= rank && n > before {
			to := s.bounds[i]
			if math.IsInf(to, 1) {
				break
			}
			return seconds(from + (to-from)*float64(rank-before)/float64(n-before))
		}
		if !math.IsInf(s.bounds[i], 1) {
			from = s.bounds[i]
		}
		before = n
	}
	if s.Count == 0 {
		return 0
	}
	return seconds(from)
}
