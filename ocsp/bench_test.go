package ocsp_test

import (
	"crypto"
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"testing"
)

// discard is a ResponseWriter that costs nothing.
type discard struct {
	header http.Header
	n      int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) WriteHeader(int)             {}
func (d *discard) Write(b []byte) (int, error) { d.n += len(b); return len(b), nil }

// BenchmarkAnswer is one pre-signed answer by GET, without the HTTP server.
func BenchmarkAnswer(b *testing.B) {
	a := newAuthority(b, "demo")
	m := newMemory("db1")
	m.generation(a, nil)
	m.issue("demo-g1", goodSerial)
	n := start(b, m, []*authority{a})
	n.settle(b)
	h := n.Public()
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.RequestURI = "/ocsp/demo/" + base64.StdEncoding.EncodeToString(a.request(b, goodSerial, crypto.SHA1))
	w := &discard{header: http.Header{}}
	b.ReportAllocs()
	for b.Loop() {
		w.n = 0
		h.ServeHTTP(w, r)
		if w.n < 100 {
			b.Fatal("no answer")
		}
	}
}
