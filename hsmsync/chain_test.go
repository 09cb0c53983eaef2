package hsmsync_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsmsync"
)

// memory is a group log that obeys the rule of chains: one entry per position, no holes.
type memory struct {
	mu        sync.Mutex // guards all below
	entries   []hsmsync.Entry
	logs      map[string][]hsmsync.Entry            // of other groups
	reads     int                                   // entries read
	down      error                                 // no reading, no writing
	before    func(hsmsync.Entry) error             // before an entry is added: an error prevents it
	after     func(hsmsync.Entry) error             // after it was: an error is reported all the same
	elsewhere func([]hsmsync.Entry) []hsmsync.Entry // what another database node knows
}

// of is the log of a group. The caller holds mu.
func (m *memory) of(group string) *[]hsmsync.Entry {
	if group == "ca" {
		return &m.entries
	}
	if m.logs == nil {
		m.logs = map[string][]hsmsync.Entry{}
	}
	log := m.logs[group]
	return &log
}

func (m *memory) Log(ctx context.Context, group string, from uint64) ([]hsmsync.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := slices.Clone(*m.of(group))
	if m.elsewhere != nil {
		out = m.elsewhere(out)
	}
	out = slices.DeleteFunc(out, func(e hsmsync.Entry) bool { return e.N < from })
	m.reads += len(out)
	return out, errors.Join(m.down, ctx.Err())
}

// Groups implements hsmsync.Lister.
func (m *memory) Groups(ctx context.Context) ([]hsmsync.Known, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []hsmsync.Known
	know := func(name string, log []hsmsync.Entry) {
		if n := len(log); n > 0 && !strings.Contains(name, "/") {
			all = append(all, hsmsync.Known{Name: name, Deleted: log[n-1].Event == "deleted"})
		}
	}
	know("ca", m.entries)
	for _, name := range slices.Sorted(maps.Keys(m.logs)) {
		know(name, m.logs[name])
	}
	return all, errors.Join(m.down, ctx.Err())
}

func (m *memory) Append(ctx context.Context, group string, e hsmsync.Entry) error {
	m.mu.Lock()
	before := m.before
	m.mu.Unlock()
	if before != nil {
		if err := before(e); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	log := m.of(group)
	switch {
	case m.down != nil:
		return m.down
	case ctx.Err() != nil:
		return ctx.Err()
	case e.N <= uint64(len(*log)):
		return hsmsync.ErrTaken
	case e.N != uint64(len(*log))+1:
		return fmt.Errorf("entry %d would leave a hole after %d", e.N, len(*log))
	case e.Event == "" || len(e.Event) > 16 || e.Subject == "" || len(e.Subject) > 64 || e.Actor == "" || e.Created.IsZero():
		return fmt.Errorf("entry %+v is incomplete", e)
	}
	*log = append(*log, e)
	if group != "ca" {
		m.logs[group] = *log
	}
	if m.after != nil {
		return m.after(e)
	}
	return nil
}

// enter adds an entry as some coordinator would.
func (m *memory) enter(t testing.TB, event, subject string, payload any) {
	t.Helper()
	b, err := json.Marshal(payload)
	if err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	n := uint64(len(m.entries)) + 1
	m.mu.Unlock()
	e := hsmsync.Entry{N: n, Event: event, Subject: subject, Payload: b, Actor: "trivet://test/sync/sync1", Created: time.Now().UTC()}
	if err := m.Append(context.Background(), "ca", e); err != nil {
		t.Fatal(err)
	}
}

// live enters a key as pending, then live.
func (m *memory) live(t testing.TB, r hsm.KeyRecord) {
	t.Helper()
	m.enter(t, "pending", string(r.ID), hsm.KeyRecord{KeySpec: r.KeySpec})
	m.enter(t, "live", string(r.ID), r)
}

// cut takes the last n entries away, as a database that went back does.
func (m *memory) cut(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries = slices.Clone(m.entries[:len(m.entries)-n])
}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = err
}

// events lists what the log says.
func (m *memory) events() (out []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.entries {
		out = append(out, e.Event)
	}
	return out
}

// manifest is a Manifest that is no Chain: what a process that only signs has.
type manifest struct{ *memory }

func (manifest) Append() {} // hides the chain's
