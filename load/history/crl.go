package history

import (
	"cmp"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"time"
)

// crls are the CRLs of one issuer that clients fetched.
type crls struct {
	byNumber map[string]*crl
	newest   map[string]*fetched // by node: a node never goes back
}

type crl struct {
	number *big.Int
	digest digest
	op     uint64
	at     int64 // line of the history that has its bytes
}

type fetched struct {
	number   *big.Int
	op       uint64
	returned int64
}

// crl takes in a CRL. Numbers are compared per node: two nodes may be some time apart, which is no falling.
func (c *check) crl(b, e Event, issuer string, d digest) {
	list := c.crls[issuer]
	if list == nil {
		list = &crls{byNumber: map[string]*crl{}, newest: map[string]*fetched{}}
		c.crls[issuer] = list
	}
	v := c.bytes[d]
	if v.number == nil {
		return // it does not verify, and was reported
	}
	known := list.byNumber[v.number.String()]
	switch {
	case known == nil:
		list.byNumber[v.number.String()] = &crl{v.number, d, e.Op, v.at}
	case known.digest != d:
		c.violate(CRLRises, issuer, []uint64{known.op, e.Op}, "two CRLs have number %s", v.number)
	}
	newest := list.newest[b.Node]
	if newest != nil && b.Mono > newest.returned && v.number.Cmp(newest.number) < 0 {
		c.violate(CRLRises, issuer, []uint64{newest.op, e.Op}, "%s gave CRL %s, and later %s", b.Node, newest.number, v.number)
	}
	if newest == nil || v.number.Cmp(newest.number) > 0 {
		list.newest[b.Node] = &fetched{v.number, e.Op, e.Mono}
	}
}

// contents compares each CRL with the next: what is on one is on the next, until it was expired or released from hold. Two are in memory at a time.
func (c *check) contents(issuer string, list *crls) error {
	all := make([]*crl, 0, len(list.byNumber))
	for _, l := range list.byNumber {
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b *crl) int { return a.number.Cmp(b.number) })
	var before *x509.RevocationList
	for i, l := range all {
		e, err := eventAt(c.Path, l.at)
		if err != nil {
			return fmt.Errorf("reading CRL %s: %w", l.number, err)
		}
		list, err := x509.ParseRevocationList(e.Bytes)
		if err != nil {
			return fmt.Errorf("parsing CRL %s: %w", l.number, err)
		}
		c.report.Checked["distinct_crls"]++
		if before != nil {
			c.shrunk(issuer, all[i-1], before, l, list)
		}
		before = list
	}
	return nil
}

func (c *check) shrunk(issuer string, was *crl, before *x509.RevocationList, is *crl, after *x509.RevocationList) {
	if after.ThisUpdate.Before(before.ThisUpdate) {
		c.violate(CRLRises, issuer, []uint64{was.op, is.op}, "CRL %s is of %s, and %s, with a higher number, of %s", was.number, stamp(before.ThisUpdate), is.number, stamp(after.ThisUpdate))
	}
	serials := make([]string, len(after.RevokedCertificateEntries))
	for i, r := range after.RevokedCertificateEntries {
		serials[i] = string(r.SerialNumber.Bytes())
	}
	slices.Sort(serials)
	for _, r := range before.RevokedCertificateEntries {
		const hold = 6
		if _, there := slices.BinarySearchFunc(serials, string(r.SerialNumber.Bytes()), cmp.Compare[string]); there || r.ReasonCode == hold {
			continue
		}
		object := issuer + ":" + hex.EncodeToString(r.SerialNumber.Bytes())
		if k := c.certs[object]; k == nil || c.bytes[k.digest].notAfter.After(after.ThisUpdate) {
			c.violate(CRLKeeps, object, []uint64{was.op, is.op}, "it stands on CRL %s and not on %s", was.number, is.number)
		}
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
