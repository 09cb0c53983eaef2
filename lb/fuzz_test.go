package lb

import (
	"bufio"
	"net/http"
	"net/textproto"
	"slices"
	"strings"
	"testing"

	"trivet/identity"
)

// FuzzRequest throws requests at what decides where they go and what is passed on. Whatever comes, a node is told nothing that only the balancer may say, and gets
// the target octet for octet.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		"POST /v1/certificates HTTP/1.1\r\nHost: x\r\nIdempotency-Key: a\r\nContent-Length: 2\r\n\r\n{}",
		"GET /ocsp/MFQwUjBQME4wTDAJBgUrDgMCGgUA//%2F+ HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://x/crl/demo-g1.crl?a=b HTTP/1.1\r\nHost: y\r\n\r\n",
		"POST /v1/certificates/demo-g1:00/revoke HTTP/1.1\r\nHost: x\r\nClient-Cert: :AA==:\r\nclient_cert: x\r\nConnection: Idempotency-Key, X-Request-Id\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "GET //../v1/cas HTTP/1.1\r\nHost: x\r\nX-Request-Id: a b\r\n\r\n", "CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(string(raw))))
		if err != nil {
			return
		}
		uri, path, ok := target(r)
		if ok && (!strings.HasPrefix(uri, "/") || !strings.HasPrefix(uri, path) || !strings.HasSuffix(r.RequestURI, uri)) {
			t.Errorf("%q became %q with path %q", r.RequestURI, uri, path)
		}
		if ok {
			if rt, found := routeAPI(r.Method, path); found && (rt.role != identity.RoleCA || rt.need == "" || rt.body > 0 != (r.Method == http.MethodPost)) {
				t.Errorf("%s %q goes to %+v", r.Method, path, rt)
			}
			if rt, found := routePublic(r.Method, path); found && (rt.role != identity.RoleOCSP || rt.need == "" || rt.write) {
				t.Errorf("%s %q goes to %+v", r.Method, path, rt)
			}
		}
		out := outbound(r, requestID(r.Header))
		for name, values := range out {
			switch {
			case name == headerRequestID:
				if len(values) != 1 || requestID(out) != values[0] {
					t.Errorf("%s is %q", name, values)
				}
			case name == "User-Agent" && values == nil:
			case name == headerClientCert, textproto.CanonicalMIMEHeaderKey(name) != name, !slices.Contains(passed, name), !slices.Equal(values, r.Header[name]):
				t.Errorf("%s: %q is passed on", name, values)
			}
		}
	})
}
