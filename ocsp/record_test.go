package ocsp_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"testing"
	"time"

	"trivet/db"
	"trivet/db/dbtest"
	"trivet/ocsp"
)

// Every reading has the rows of every lane, also of lanes that began after the reading before. A lane's rows are read beyond where the reader
// is, and not at all once it has ended.
func TestHeadKnowsEveryLane(t *testing.T) {
	store := dbtest.Open(t, database(t))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var incarnation [16]byte
	rand.Read(incarnation[:])
	self := db.Member{VA: "ocsp1", Policy: "strict", Address: "127.93.2.1:8443", Incarnation: incarnation[:]}
	record := ocsp.NewRecord(store, self)
	vector := map[string]uint64{}
	head := func() map[string]int {
		t.Helper()
		h, _, err := record.Head(ctx, "", vector, 500)
		must(t, err)
		if h.Member != nil {
			t.Errorf("a member before joining: %+v", h.Member)
		}
		rows := map[string]int{}
		for _, r := range h.Rows {
			if r.Seq != vector[r.Lane]+uint64(rows[r.Lane])+1 {
				t.Errorf("lane %s has row %d after %d others beyond %d", r.Lane, r.Seq, rows[r.Lane], vector[r.Lane])
			}
			rows[r.Lane]++
		}
		return rows
	}
	if rows := head(); len(rows) != 0 {
		t.Errorf("an empty feed has rows: %v", rows)
	}
	var names []string
	for i := range 120 { // more than one statement asks for
		w := newWriter(t, store, fmt.Sprintf("ca%d", i))
		w.issue("demo-g1", []byte{1, byte(i)})
		if i%3 == 0 {
			w.issue("demo-g1", []byte{2, byte(i)})
		}
		names = append(names, w.lane.Name())
		if i > 3 && i < 117 {
			continue
		}
		rows := head()
		for j, name := range names {
			if want := 2 - min(j%3, 1); rows[name] != want {
				t.Fatalf("with %d lanes, lane %d has %d rows, not %d", len(names), j, rows[name], want)
			}
		}
	}
	vector[names[0]], vector[names[1]] = 2, ocsp.LaneEnded
	rows := head()
	if rows[names[0]] != 0 || rows[names[1]] != 0 || rows[names[2]] != 1 || len(rows) != 118 {
		t.Errorf("read what was not asked for: %d lanes, %d %d %d", len(rows), rows[names[0]], rows[names[1]], rows[names[2]])
	}
	n, err := record.Join(ctx)
	must(t, err)
	h, _, err := record.Head(ctx, "", vector, 1)
	must(t, err)
	if h.Member == nil || h.Member.N != n || h.Member.Event != "in" || string(h.Member.Incarnation) != string(incarnation[:]) {
		t.Errorf("joined as row %d: %+v", n, h.Member)
	}
	if !h.More {
		t.Error("a lane at the limit does not say that there may be more")
	}
}
