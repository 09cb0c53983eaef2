package ocsp_test

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"testing"

	xocsp "golang.org/x/crypto/ocsp"

	"trivet/ocsp"
)

func seeds(t testing.TB) [][]byte {
	a := newAuthority(t, "demo")
	id := certIDOf(a, goodSerial)
	return [][]byte{
		a.request(t, goodSerial, crypto.SHA1), a.request(t, goodSerial, crypto.SHA256), requestOf(id, id), requestOf(),
		withNonce(id, 0), withNonce(id, 16), withNonce(id, 129), withCritical(id), versioned(id, 0), requestorName(id), {0x30, 0},
	}
}

// FuzzParseRequest: nothing panics, what is accepted is within bounds, and another parser agrees that it is a request.
func FuzzParseRequest(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		certs, _, err := ocsp.ParseRequest(der)
		if err != nil {
			if certs > 16 {
				t.Fatalf("read %d certificates", certs)
			}
			return
		}
		if certs < 1 || certs > 16 {
			t.Fatalf("accepted %d certificates", certs)
		}
		other, err := xocsp.ParseRequest(der)
		if err != nil {
			return // it knows fewer hash algorithms and no requestorName
		}
		if other.SerialNumber.Sign() <= 0 || other.SerialNumber.BitLen() > 159 {
			t.Fatalf("accepted serial %v", other.SerialNumber)
		}
	})
}

// FuzzPublic: whatever is sent, the handler answers, never redirects, and never fails inside.
func FuzzPublic(f *testing.F) {
	a := newAuthority(f, "demo")
	m := newMemory("db1")
	m.generation(a, a.crl(f, 1))
	m.issue("demo-g1", goodSerial)
	n := start(f, m, []*authority{a})
	n.settle(f)
	for _, s := range seeds(f) {
		f.Add("/ocsp/demo", s)
		f.Add("/ocsp/"+base64.StdEncoding.EncodeToString(s), []byte(nil))
	}
	for _, p := range []string{"/", "//", "/ocsp//", "/ocsp/demo//%2f", "/crl/demo-g1.crl", "/ca/demo-g1.crt", "/crl/.crl", "*", "http://x"} {
		f.Add(p, []byte(nil))
	}
	f.Fuzz(func(t *testing.T, target string, body []byte) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		if body != nil {
			r = httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(body))
		}
		r.RequestURI = target
		w := httptest.NewRecorder()
		n.Public().ServeHTTP(w, r)
		if w.Code/100 == 3 && w.Code != http.StatusNotModified || w.Code >= 500 {
			t.Fatalf("%q answered %d", target, w.Code)
		}
		if w.Header().Get("Content-Type") == "application/ocsp-response" && bytes.Equal(w.Body.Bytes(), []byte{0x30, 3, 10, 1, 2}) {
			t.Fatalf("%q answered internalError", target)
		}
	})
}
