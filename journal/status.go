package journal

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Status is how a journal does.
type Status struct {
	Segments   int       // in this directory, the one that is written included
	Bytes      int64     // of them
	Oldest     time.Time // earliest record in this directory
	Unarchived int       // sealed segments that are not in the archive yet; 0 without an archive
	Waiting    time.Time // when the oldest of these ended; the zero time if there is none
	Reserve    int64     // bytes held back
	Full       error     // why new work is refused, or nil; ErrFull is in its chain
	Trouble    error     // why sealed segments are not compressed or archived, or nil
}

// Status asks the disk for free space if there was none, so that a journal that nobody writes to finds out that there is room again.
func (j *Journal) Status() Status {
	s := Status{Full: j.room.lack(), Reserve: j.room.held()}
	j.cat.mu.Lock()
	for _, g := range j.cat.segments {
		if (g.seal != nil || g.indexed) && !g.archived && j.cfg.Archive.on() {
			if s.Unarchived++; s.Waiting.IsZero() && g.seal != nil {
				s.Waiting = g.seal.Last
			}
		}
		if !g.here() {
			continue
		}
		s.Segments++
		s.Bytes += g.bytes
		if s.Oldest.IsZero() && g.seal != nil {
			s.Oldest = g.seal.First
		}
	}
	j.cat.mu.Unlock()
	j.keeper.mu.Lock()
	s.Trouble = j.keeper.trouble
	j.keeper.mu.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	s.Bytes += j.tip.size
	if s.Oldest.IsZero() {
		s.Oldest = j.tally.first
	}
	return s
}

// metrics shows the Status to Prometheus.
type metrics struct {
	j                                                                *Journal
	segments, bytes, oldest, unarchived, lag, reserve, full, trouble *prometheus.Desc
}

func register(j *Journal) error {
	if j.cfg.Metrics == nil {
		return nil
	}
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc("trivet_journal_"+name, help, nil, nil)
	}
	m := &metrics{
		j:          j,
		segments:   desc("segments", "Segments of the journal in its directory."),
		bytes:      desc("bytes", "Size of the journal in its directory."),
		oldest:     desc("oldest_record_timestamp_seconds", "Time of the earliest record in the journal's directory."),
		unarchived: desc("unarchived_segments", "Sealed segments that are not in the archive yet."),
		lag:        desc("archive_lag_seconds", "Time since the oldest segment ended that is not in the archive yet; 0 if all are."),
		reserve:    desc("reserve_bytes", "Disk space held back for finishing what was begun."),
		full:       desc("full", "1 while the disk has too little room and new work is refused."),
		trouble:    desc("keeping_failed", "1 while sealed segments cannot be indexed, compressed or archived."),
	}
	if err := j.cfg.Metrics.Register(m); err != nil {
		return fmt.Errorf("registering metrics: %w", err)
	}
	return nil
}

// Describe sends the metrics' descriptions.
func (m *metrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.segments, m.bytes, m.oldest, m.unarchived, m.lag, m.reserve, m.full, m.trouble} {
		out <- d
	}
}

// Collect sends the present values.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	s := m.j.Status()
	gauge := func(d *prometheus.Desc, v float64) { out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	truth := func(err error) float64 {
		if err != nil {
			return 1
		}
		return 0
	}
	lag := 0.0
	if !s.Waiting.IsZero() {
		lag = m.j.cfg.Now().Sub(s.Waiting).Seconds()
	}
	gauge(m.segments, float64(s.Segments))
	gauge(m.bytes, float64(s.Bytes))
	gauge(m.oldest, float64(s.Oldest.Unix()))
	gauge(m.unarchived, float64(s.Unarchived))
	gauge(m.lag, max(0, lag))
	gauge(m.reserve, float64(s.Reserve))
	gauge(m.full, truth(s.Full))
	gauge(m.trouble, truth(s.Trouble))
}
