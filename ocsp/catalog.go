package ocsp

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"sync"
	"sync/atomic"
	"time"
)

// issuer is one CA generation. Facts about its serials may arrive before the generation itself is known.
type issuer struct {
	name      string // "demo-g1"
	table     *Table
	known     atomic.Pointer[known]
	responder atomic.Pointer[responder]
	crl       atomic.Pointer[crl]
}

// known is what the record says about a generation. It is replaced, never changed.
type known struct {
	ca   string // "demo"
	cert *x509.Certificate
	ids  issuerHashes
	aia  document
}

// crl is the newest complete CRL that passed the checks.
type crl struct {
	number *big.Int
	next   time.Time
	document
}

func (is *issuer) crlDocument() *document {
	if c := is.crl.Load(); c != nil {
		return &c.document
	}
	return nil
}

// catalog is every issuer of the record, and how CertIDs and paths find it. It is safe for concurrent use.
type catalog struct {
	record Record
	signer func(ctx context.Context, group, key string) (Signer, error)
	ready  func(*issuer) // called when an issuer can sign from now on
	log    *slog.Logger

	loaded atomic.Bool // all issuers have been read at least once
	dirty  atomic.Bool // the feed named a change that was not read yet
	wake   chan struct{}

	mu      sync.RWMutex
	issuers map[string]*issuer   // mu; by name
	ids     map[issuerID]*issuer // mu; only known ones
	causes  map[string]string    // mu; by name, what the last refresh could not use
}

// issuer returns the issuer of that name, which it makes if need be.
func (c *catalog) issuer(name string) *issuer {
	if is := c.byName(name); is != nil {
		return is
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	is, ok := c.issuers[name]
	if !ok {
		is = &issuer{name: name, table: NewTable()}
		c.issuers[name] = is
	}
	return is
}

// byName returns nil for a name that the record has not.
func (c *catalog) byName(name string) *issuer {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.issuers[name]
}

// byID returns the issuer that CertIDs call so, nil when none is known.
func (c *catalog) byID(id issuerID) *issuer {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.ids[id]
}

func (c *catalog) all() []*issuer {
	c.mu.RLock()
	defer c.mu.RUnlock()
	all := make([]*issuer, 0, len(c.issuers))
	for _, is := range c.issuers {
		all = append(all, is)
	}
	return all
}

func (c *catalog) cause(name string) string {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.causes[name]
}

func (c *catalog) counts() Counts {
	var sum Counts
	for _, is := range c.all() {
		n := is.table.Counts()
		sum.Good += n.Good
		sum.Revoked += n.Revoked
		sum.TryLater += n.TryLater
		sum.Unsigned += n.Unsigned
	}
	return sum
}

// stale says that there may be an issuer in the record that is not known here.
func (c *catalog) stale() bool { return !c.loaded.Load() || c.dirty.Load() }

// changed asks for a refresh: the feed named a generation, responder or CRL.
func (c *catalog) changed() {
	c.dirty.Store(true)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

const (
	catalogEvery   = 30 * time.Second // a refresh that nobody asked for, against whatever was missed
	catalogRetry   = 500 * time.Millisecond
	catalogRefused = 2 * time.Second // until what could not be used is looked at again: a key may have become live
	catalogTimeout = 10 * time.Second
)

// run keeps the catalog fresh until ctx ends.
func (c *catalog) run(ctx context.Context) error {
	for {
		wait := catalogEvery
		switch refused, err := c.refresh(ctx); {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			c.log.Warn("issuers not refreshed, trying again", "err", err)
			wait = catalogRetry
		case refused:
			wait = catalogRefused
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-c.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// refresh reads generations, responders and CRLs. What it cannot verify it does not use: the old one stays, the
// health report says why, and refused is true.
func (c *catalog) refresh(ctx context.Context) (refused bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, catalogTimeout)
	defer cancel()
	c.dirty.Store(false) // before reading, so that a change meanwhile makes it true again
	generations, err := c.record.Generations(ctx)
	if err != nil {
		c.dirty.Store(true)
		return false, fmt.Errorf("reading generations: %w", err)
	}
	causes := map[string]string{}
	for _, g := range generations {
		if err := c.refreshIssuer(ctx, g); err != nil {
			causes[g.Issuer] = err.Error()
			if c.cause(g.Issuer) != err.Error() {
				c.log.Warn("issuer not fully usable", "issuer", g.Issuer, "err", err)
			}
		}
	}
	c.mu.Lock()
	c.causes = causes
	c.mu.Unlock()
	c.loaded.Store(true)
	return len(causes) > 0, nil
}

func (c *catalog) refreshIssuer(ctx context.Context, g Generation) error {
	is := c.issuer(g.Issuer)
	if len(g.Certificate) == 0 {
		return nil // pending: there is nothing to answer for
	}
	if k := is.known.Load(); k == nil || string(k.cert.Raw) != string(g.Certificate) {
		cert, err := x509.ParseCertificate(g.Certificate)
		if err != nil {
			return fmt.Errorf("parsing its certificate: %w", err)
		}
		ids, err := hashIssuer(cert)
		if err != nil {
			return err
		}
		is.known.Store(&known{
			ca: g.CA, cert: cert, ids: ids,
			aia: newDocument(cert.Raw, "application/pkix-cert", cert.NotBefore, time.Time{}, maxAgeAIA),
		})
		c.mu.Lock()
		for _, id := range ids {
			c.ids[id] = is
		}
		c.mu.Unlock()
	}
	return errors.Join(c.refreshResponder(ctx, is, g.Responder), c.refreshCRL(is, g.CRL))
}

func (c *catalog) refreshResponder(ctx context.Context, is *issuer, r *Responder) error {
	if r == nil {
		return nil
	}
	if have := is.responder.Load(); have != nil && string(have.cert.Raw) == string(r.Certificate) {
		return nil
	}
	cert, err := x509.ParseCertificate(r.Certificate)
	if err != nil {
		return fmt.Errorf("parsing its responder certificate: %w", err)
	}
	signer, err := c.signer(ctx, r.KeyGroup, r.KeyID)
	if err != nil {
		return fmt.Errorf("finding its responder key %s in group %s: %w", r.KeyID, r.KeyGroup, err)
	}
	made, err := newResponder(is.known.Load().cert, cert, signer)
	if err != nil {
		return err
	}
	is.responder.Store(made)
	c.ready(is)
	return nil
}

func (c *catalog) refreshCRL(is *issuer, der []byte) error {
	if len(der) == 0 {
		return nil
	}
	have := is.crl.Load()
	if have != nil && string(have.der) == string(der) {
		return nil
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return fmt.Errorf("parsing its CRL: %w", err)
	}
	if err := list.CheckSignatureFrom(is.known.Load().cert); err != nil {
		return fmt.Errorf("checking its CRL's signature: %w", err)
	}
	if list.Number == nil {
		return errors.New("its CRL has no number")
	}
	if have != nil && list.Number.Cmp(have.number) <= 0 {
		return fmt.Errorf("its CRL has number %s, not above the published %s: refused", list.Number, have.number)
	}
	is.crl.Store(&crl{
		number: list.Number, next: list.NextUpdate,
		document: newDocument(der, "application/pkix-crl", list.ThisUpdate, list.NextUpdate, maxAgeCRL),
	})
	return nil
}
