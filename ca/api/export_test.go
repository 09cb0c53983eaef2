package api

import (
	"net/http"
)

// DecodeIssue reads the body of a request for a certificate and returns it as it was understood, or the name of the problem.
func DecodeIssue(body []byte) (profile, csr, name string) {
	var v issueBody
	if p := decodeJSON(body, &v); p != nil {
		return "", "", p.Name()
	}
	return v.Profile, v.CSR, ""
}

// ParseClientCert tells whether the header's values are one certificate.
func ParseClientCert(values []string) bool {
	_, ok := parseClientCert(values)
	return ok
}

// Accepted returns the media type chosen.
func Accepted(accept string) string {
	media, _ := accepted(&http.Request{Header: http.Header{"Accept": {accept}}})
	return media
}

// DecodeBlock reads the body of a request to block a key and returns the hash of the key that it names.
func DecodeBlock(body []byte) ([]byte, bool) {
	var v blockBody
	if p := decodeJSON(body, &v); p != nil {
		return nil, false
	}
	spki, p := v.key()
	return spki, p == nil
}

// DecodeBulk reads the body of a request for several certificates and returns the key of each.
func DecodeBulk(body []byte) (keys []string, ok bool) {
	var v bulkBody
	if p := decodeJSON(body, &v); p != nil {
		return nil, false
	}
	if p := v.check(); p != nil {
		return nil, false
	}
	for i := range v.Requests {
		keys = append(keys, v.Requests[i].IdempotencyKey)
	}
	return keys, true
}
