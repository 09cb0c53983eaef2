package lb

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"net/textproto"
	"strings"

	"trivet/identity"
)

// Headers this balancer sets.
const (
	headerClientCert  = "Client-Cert" // RFC 9440
	headerIdempotency = "Idempotency-Key"
	headerRequestID   = "X-Request-Id"
)

// passed lists the request headers that are forwarded. What is not listed is not: so no spelling of an identity header, no Upgrade, no
// Forwarded and no hop-by-hop header can get through.
var passed = []string{
	"Accept", "Accept-Language", "Cache-Control", "Content-Type", headerIdempotency, "If-Match", "If-Modified-Since", "If-None-Match",
	"If-Unmodified-Since", "If-Range", "Pragma", "Range", "Traceparent", "Tracestate", "User-Agent",
}

// hopByHop lists the response headers that speak of the node's connection (RFC 9110 §7.6.1).
var hopByHop = []string{
	"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
}

// outbound makes the headers of the forwarded request. What Connection lists is the client's word to us, so it is left out first; our own headers come last.
func outbound(r *http.Request, requestID string) http.Header {
	listed := connectionListed(r.Header)
	out := make(http.Header, len(passed)+2)
	for _, name := range passed {
		if v := r.Header[name]; len(v) > 0 && !listed[name] {
			out[name] = v
		}
	}
	if _, ok := out["User-Agent"]; !ok {
		out["User-Agent"] = nil // else the transport names itself
	}
	out[headerRequestID] = []string{requestID}
	if _, ok := identity.Peer(r); ok {
		out[headerClientCert] = []string{":" + base64.StdEncoding.EncodeToString(r.TLS.PeerCertificates[0].Raw) + ":"}
	}
	return out
}

// inbound copies a node's response headers to the client's.
func inbound(dst, src http.Header) {
	listed := connectionListed(src)
	for _, name := range hopByHop {
		listed[name] = true
	}
	for name, v := range src {
		if !listed[name] && name != headerRequestID {
			dst[name] = v
		}
	}
}

func connectionListed(h http.Header) map[string]bool {
	listed := map[string]bool{}
	for _, line := range h["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			listed[textproto.CanonicalMIMEHeaderKey(textproto.TrimString(name))] = true
		}
	}
	return listed
}

// requestID takes the client's X-Request-Id if it is one short word, else makes one.
func requestID(h http.Header) string {
	if v := h[headerRequestID]; len(v) == 1 && v[0] != "" && len(v[0]) <= 64 && strings.IndexFunc(v[0], func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.')
	}) < 0 {
		return v[0]
	}
	return random(8)
}

// random returns n random octets in hex.
func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails; it ends the process instead
	return hex.EncodeToString(b)
}
