package ocsp

import (
	"context"
	"time"
)

// Hooks for the external tests.

// Poll waits for a causal read that begins after the call.
func (v *VA) Poll(ctx context.Context) error { return v.feed.poll(ctx) }

// Applied waits for a row as /internal/applied does.
func (v *VA) Applied(ctx context.Context, lane string, seq uint64) bool {
	_, ok := v.feed.applied(ctx, lane, seq)
	return ok
}

// Lookup shows the table's view of one serial.
func (v *VA) Lookup(issuer string, serial Serial) (View, bool) {
	return v.catalog.issuer(issuer).table.Lookup(serial)
}

// LeaseRemaining is what is left of the lease.
func (v *VA) LeaseRemaining() time.Duration { return v.lease.remaining() }

// ParseRequest is the strict check; it returns how many certificates are asked about.
func ParseRequest(der []byte) (certs int, nonce bool, err error) {
	req, err := parseRequest(der)
	return len(req.certs), req.nonce, err
}

// RefreshCause is what the last refresh could not use of an issuer.
func (v *VA) RefreshCause(issuer string) string { return v.catalog.cause(issuer) }
