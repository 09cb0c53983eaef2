package load

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"time"
)

// maxAnswer octets of an answer are read: far more than any certificate or OCSP answer has.
const maxAnswer = 1 << 20

// NewClient makes an HTTP/1.1 client with up to conns kept-alive connections per host, for one load. config may be nil
// for plain HTTP; redirects are not followed. Deadlines come from the requests' contexts.
func NewClient(config *tls.Config, conns int) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
			TLSClientConfig:     config,
			MaxIdleConns:        conns,
			MaxIdleConnsPerHost: conns,
			IdleConnTimeout:     30 * time.Second,
			DisableCompression:  true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// StatusError is an answer of another status than the one hoped for.
type StatusError struct {
	Status int
	// Type and Detail come from a problem+json body (RFC 9457); Detail is the beginning of any other body.
	Type, Detail string
	// RetryAfter is the header, empty when absent.
	RetryAfter string
}

// Error names status and problem. It leaves out Detail where there is a Type, so that failures count by their kind.
func (e *StatusError) Error() string {
	s := fmt.Sprintf("status %d", e.Status)
	if e.Type != "" {
		return s + " " + e.Type
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

// do sends a request and reads the whole answer. It sends again what met a connection that was opened, never used, and closed by the server just then: no
// request was lost there, and after a stall there may be many. Every other failure is the caller's to see.
func do(ctx context.Context, client *http.Client, req *http.Request) (*http.Response, []byte, error) {
	var sent []byte
	if req.Body != nil {
		var err error
		if sent, err = io.ReadAll(req.Body); err != nil {
			return nil, nil, err
		}
	}
	for {
		parked := false
		traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) { parked = c.WasIdle && !c.Reused }})
		if req.Body != nil {
			req.Body = io.NopCloser(bytes.NewReader(sent))
		}
		resp, err := client.Do(req.WithContext(traced))
		if err != nil && parked && ctx.Err() == nil {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		return whole(resp)
	}
}

func whole(resp *http.Response) (*http.Response, []byte, error) {
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("reading answer: %w", err)
	case len(body) > maxAnswer:
		return nil, nil, fmt.Errorf("answer exceeds %d octets", maxAnswer)
	}
	return resp, body, nil
}

func statusError(resp *http.Response, body []byte) error {
	e := &StatusError{Status: resp.StatusCode, RetryAfter: resp.Header.Get("Retry-After")}
	var p struct{ Type, Detail string }
	if json.Unmarshal(body, &p) == nil && p.Type != "" {
		e.Type, e.Detail = p.Type, p.Detail
	} else {
		e.Detail = string(body[:min(len(body), 120)])
	}
	return e
}
