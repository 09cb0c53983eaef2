package fsck

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"fmt"
	"time"

	"trivet/db"
)

// page is how many rows one query of a scan returns.
const page = 5000

// record scans the database: generations, then every intent with its outcome, then every revocation.
func (c *check) record(ctx context.Context) error {
	tbs, join, err := c.Store.TBSColumn(ctx)
	if err != nil {
		return fmt.Errorf("looking where intents keep their TBSCertificates: %w", err)
	}
	_, err = c.Store.Read(ctx, "fsck", "", func(ctx context.Context, conn *sql.Conn) error {
		if err := c.readGenerations(ctx, conn); err != nil {
			return fmt.Errorf("reading CA generations: %w", err)
		}
		if err := c.readCertificates(ctx, conn, tbs, join); err != nil {
			return fmt.Errorf("reading certificates: %w", err)
		}
		if err := c.readRevocations(ctx, conn); err != nil {
			return fmt.Errorf("reading revocations: %w", err)
		}
		return nil
	})
	return err
}

func (c *check) readGenerations(ctx context.Context, conn *sql.Conn) error {
	clear(c.generations)
	rows, err := conn.QueryContext(ctx, `SELECT g.issuer, g.parent, l.der FROM generation g JOIN generation_log l ON l.issuer = g.issuer
		WHERE l.n = (SELECT MAX(n) FROM generation_log m WHERE m.issuer = g.issuer AND m.event = 'certificate')`)
	if err != nil {
		return err
	}
	defer rows.Close()
	parents := map[string]string{}
	for rows.Next() {
		var issuer, parent string
		var der []byte
		if err := rows.Scan(&issuer, &parent, &der); err != nil {
			return err
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			c.violate("I7", issuer, "the generation's certificate does not parse: %v", err)
			continue
		}
		c.generations[issuer], parents[issuer] = cert, parent
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for issuer, parent := range parents {
		if up, ok := c.generations[parent]; !ok {
			c.violate("I7", issuer, "its parent %s is not in the record", parent)
		} else if err := c.generations[issuer].CheckSignatureFrom(up); err != nil {
			c.violate("I7", issuer, "its certificate does not verify under %s: %v", parent, err)
		}
	}
	c.report.Checked["generations"] = len(c.generations)
	return nil
}

// readCertificates pages through intents by primary key. A certificate must carry the very bytes of its intent (I1, I8), its own serial (I2) and a good signature (I7).
// The intent's MAC vouches for those bytes also when the record keeps them in the certificate alone. tbs and join are of Store.TBSColumn.
func (c *check) readCertificates(ctx context.Context, conn *sql.Conn, tbs, join string) error {
	clear(c.certs)
	c.report.Checked["certificates"], c.report.Checked["intents"] = 0, 0
	delete(c.report.Checked, "intent_macs")
	delete(c.report.Checked, "abandoned_without_tbs")
	after := key{}
	for {
		rows, err := conn.QueryContext(ctx, `SELECT i.issuer, i.serial, `+tbs+`, i.created,
			i.req, i.ver, i.body, i.profile, i.profile_version, i.profile_hash, i.requester, i.reference, i.site_epoch, i.node, i.mac, i.mac_key, COALESCE(o.kind, ''), o.der, o.not_after
			FROM intent i`+join+` LEFT JOIN outcome o ON o.issuer = i.issuer AND o.serial = i.serial
			     AND o.ver = (SELECT MAX(ver) FROM outcome m WHERE m.issuer = i.issuer AND m.serial = i.serial)
			WHERE (i.issuer, i.serial) > (?, ?) AND i.issuer >= ? ORDER BY i.issuer, i.serial LIMIT ?`,
			[]byte(after.issuer), []byte(after.serial), []byte(after.issuer), page)
		if err != nil {
			return err
		}
		n := 0
		for rows.Next() {
			var i db.Intent
			var kind string
			var der []byte
			var notAfter sql.NullTime
			if err := rows.Scan(&i.Issuer, &i.Serial, &i.TBS, &i.Created, &i.Req, &i.Ver, &i.Body, &i.Profile, &i.ProfileVersion, &i.ProfileHash,
				&i.Requester, &i.Reference, &i.SiteEpoch, &i.Node, &i.MAC, &i.MACKey, &kind, &der, &notAfter); err != nil {
				rows.Close()
				return err
			}
			after = key{i.Issuer, string(i.Serial)}
			n++
			c.intent(after, i, kind, der)
			c.outcome(after, kind, i.TBS, der, i.Created)
		}
		if err := rows.Err(); err != nil {
			return err
		}
		c.count("intents", n)
		if n < page {
			return nil
		}
	}
}

// intent checks that a CA node wrote the row. What was abandoned keeps no TBSCertificate for long, and nothing is signed for it.
func (c *check) intent(k key, i db.Intent, kind string, der []byte) {
	switch {
	case len(i.TBS) > 0:
	case kind == db.OutcomeAbandoned:
		c.count("abandoned_without_tbs", 1)
		return
	case kind == "":
		c.violate("I1", k, "its intent is open, and its TBSCertificate is not in the record: it can only be abandoned")
		return
	default:
		i.TBS = db.TBSOf(der)
	}
	if c.MACKeys == nil {
		return
	}
	c.count("intent_macs", 1)
	if err := c.MACKeys.Verify(&i); err != nil {
		c.violate("I8", k, "its intent is not as a CA node wrote it: %v", err)
	}
}

func (c *check) outcome(k key, kind string, tbs, der []byte, created time.Time) {
	switch kind {
	case "":
		if age := c.Now().Sub(created); age > c.Open {
			c.violate("I1", k, "its intent has had no outcome for %s; a running CA node finishes it within seconds", age.Round(time.Second))
		}
		return
	case "abandoned":
		c.certs[k] = certificate{abandoned: true}
		return
	}
	c.count("certificates", 1)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		c.violate("I7", k, "the certificate does not parse: %v", err)
		return
	}
	c.certs[k] = certificate{der: sha256.Sum256(der), notAfter: cert.NotAfter}
	if len(tbs) > 0 && !bytes.Equal(cert.RawTBSCertificate, tbs) {
		c.violate("I8", k, "the certificate is not what its intent recorded")
	}
	if string(cert.SerialNumber.Bytes()) != k.serial {
		c.violate("I2", k, "the certificate carries serial %x", cert.SerialNumber.Bytes())
	}
	issuer, ok := c.generations[k.issuer]
	if !ok {
		c.violate("I7", k, "its issuer %s has no generation row", k.issuer)
	} else if err := issuer.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		c.violate("I7", k, "the signature does not verify under %s: %v", k.issuer, err)
	} else if !bytes.Equal(cert.RawIssuer, issuer.RawSubject) {
		c.violate("I7", k, "the issuer name is not the subject of %s", k.issuer)
	}
}

// readRevocations pages through the chains of events; a chain has no gap (I4).
func (c *check) readRevocations(ctx context.Context, conn *sql.Conn) error {
	clear(c.events)
	c.report.Checked["revocation_events"] = 0
	after, afterN := key{}, 0
	for {
		rows, err := conn.QueryContext(ctx, `SELECT issuer, serial, n, event, reason, created FROM revocation
			WHERE (issuer, serial, n) > (?, ?, ?) AND issuer >= ? ORDER BY issuer, serial, n LIMIT ?`,
			[]byte(after.issuer), []byte(after.serial), afterN, []byte(after.issuer), page)
		if err != nil {
			return err
		}
		count := 0
		for rows.Next() {
			var issuer, serial string
			var e event
			if err := rows.Scan(&issuer, &serial, &e.n, &e.event, &e.reason, &e.created); err != nil {
				rows.Close()
				return err
			}
			after, afterN = key{issuer, serial}, e.n
			count++
			if want := c.events[after].n + 1; e.n != want {
				c.violate("I4", after, "its chain of revocation events jumps to %d where %d is due", e.n, want)
			}
			e.acked = c.events[after].acked || c.ackedEvents[after][e.n]
			c.events[after] = e
		}
		if err := rows.Err(); err != nil {
			return err
		}
		c.count("revocation_events", count)
		if count < page {
			return nil
		}
	}
}

// released holds what journals call released against the record: the record must have it, byte for byte (I1, I2, I4).
func (c *check) released(context.Context) error {
	for k, digest := range c.acked {
		have, ok := c.certs[k]
		switch {
		case !ok:
			c.violate("I1", k, "was released, and the database does not have it")
		case have.abandoned:
			c.violate("I2", k, "was released, and the database calls it abandoned")
		case have.der != digest:
			c.violate("I2", k, "was released with other bytes than the database has")
		}
	}
	for k, acked := range c.ackedEvents {
		for n := range acked {
			if c.events[k].n < n {
				c.violate("I4", k, "its revocation event %d was acknowledged, and the database does not have it", n)
			}
		}
	}
	return nil
}
