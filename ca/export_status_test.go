package ca

import (
	"context"
	"crypto/x509"
	"time"

	"trivet/db"
)

// Interpose puts a fault between a Revoker and its lane.
func (r *Revoker) Interpose(between func(FactLane) FactLane) { r.lane = between(r.lane) }

// InterposeRecord puts a fault between a Revoker and its record.
func (r *Revoker) InterposeRecord(between func(RevocationRecord) RevocationRecord) {
	r.cfg.Record = between(r.cfg.Record)
}

// OnFatal sets what is called when the lane is lost.
func (r *Revoker) OnFatal(f func(error)) { r.cfg.Fatal = f }

// Interpose puts a fault between the CRL job and its lane.
func (c *CRLs) Interpose(between func(FactLane) FactLane) { c.lane = between(c.lane) }

// Due tells whether the job would issue a CRL of the generation now.
func (c *CRLs) Due(a *Authority) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.due(ctx, a)
}

// Step is one look of the job at the generation, as Run takes it again and again.
func (c *CRLs) Step(ctx context.Context, a *Authority) error { return c.step(ctx, a) }

// CRLNumber is how numbers are made.
var CRLNumber = crlNumber

// ListedSerials returns what crlContent puts on a CRL and what it finds lost.
func ListedSerials(latest []db.Revoked, previous *x509.RevocationList, now time.Time) (content, lost [][]byte) {
	c, l := crlContent(latest, previous, now)
	for _, e := range c {
		content = append(content, e.serial)
	}
	for _, e := range l {
		lost = append(lost, e.serial)
	}
	return content, lost
}
