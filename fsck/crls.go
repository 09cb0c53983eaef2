package fsck

import (
	"bytes"
	"context"
	"crypto/x509"
	"database/sql"
	"fmt"
	"time"
)

// history is how many of an issuer's newest CRLs are compared with one another.
const history = 20

// crls checks each generation's CRLs as recorded: rising numbers over the whole chain (I5), signatures (I7), content that shrinks only by expiry (I5), currency (I6).
func (c *check) crls(ctx context.Context) error {
	_, err := c.Store.Read(ctx, "fsck", "", func(ctx context.Context, conn *sql.Conn) error {
		c.report.Checked["crls"] = 0
		for issuer := range c.generations {
			if err := c.crlNumbers(ctx, conn, issuer); err != nil {
				return err
			}
			if err := c.crlContents(ctx, conn, issuer); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

func (c *check) crlNumbers(ctx context.Context, conn *sql.Conn, issuer string) error {
	rows, err := conn.QueryContext(ctx, `SELECT shard, n, number FROM crl WHERE issuer = ? ORDER BY shard, n`, []byte(issuer))
	if err != nil {
		return fmt.Errorf("reading CRL numbers of %s: %w", issuer, err)
	}
	defer rows.Close()
	shard, last := -1, uint64(0)
	for rows.Next() {
		var s, n int
		var number uint64
		if err := rows.Scan(&s, &n, &number); err != nil {
			return err
		}
		if s == shard && number <= last {
			c.violate("I5", fmt.Sprintf("%s CRL %d", issuer, n), "its number %d does not exceed %d, the one before", number, last)
		}
		shard, last = s, number
		c.count("crls", 1)
	}
	return rows.Err()
}

func (c *check) crlContents(ctx context.Context, conn *sql.Conn, issuer string) error {
	rows, err := conn.QueryContext(ctx, `SELECT n, der FROM crl_result WHERE issuer = ? AND kind = 'crl' AND shard = 0 ORDER BY n DESC LIMIT ?`, []byte(issuer), history)
	if err != nil {
		return fmt.Errorf("reading CRLs of %s: %w", issuer, err)
	}
	defer rows.Close()
	var newer *x509.RevocationList
	for rows.Next() {
		var n int
		var der []byte
		if err := rows.Scan(&n, &der); err != nil {
			return err
		}
		object := fmt.Sprintf("%s CRL %d", issuer, n)
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			c.violate("I7", object, "does not parse: %v", err)
			continue
		}
		if err := list.CheckSignatureFrom(c.generations[issuer]); err != nil {
			c.violate("I7", object, "does not verify: %v", err)
		}
		if newer == nil && c.Now().After(list.NextUpdate) {
			c.violate("I6", object, "is the newest, and ran out at %s", list.NextUpdate.UTC().Format(time.RFC3339))
		}
		if newer != nil {
			c.shrunk(object, issuer, list, newer)
		}
		newer = list
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if newer == nil {
		c.violate("I6", issuer, "has no CRL; an empty one precedes the first certificate")
	}
	return nil
}

// shrunk names entries of older that newer dropped although their certificate has not expired and nobody released them from hold.
func (c *check) shrunk(object, issuer string, older, newer *x509.RevocationList) {
	kept := make(map[string]bool, len(newer.RevokedCertificateEntries))
	for _, e := range newer.RevokedCertificateEntries {
		kept[string(e.SerialNumber.Bytes())] = true
	}
	for _, e := range older.RevokedCertificateEntries {
		k := key{issuer, string(e.SerialNumber.Bytes())}
		if !kept[k.serial] && c.Now().Before(c.certs[k].notAfter) && c.events[k].event != "release" {
			c.violate("I5", k, "stands on %s and is missing from its successor", object)
		}
	}
}

// onCRL checks a CRL as a responder serves it against the acknowledged revocations. It returns the serials that should be on it and are not.
func (c *check) onCRL(issuer string, der []byte) (missing []key, err error) {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("parsing: %w", err)
	}
	gen := c.generations[issuer]
	if !bytes.Equal(list.RawIssuer, gen.RawSubject) {
		return nil, fmt.Errorf("it is the CRL of another issuer")
	}
	if err := list.CheckSignatureFrom(gen); err != nil {
		return nil, fmt.Errorf("verifying: %w", err)
	}
	if c.Now().After(list.NextUpdate) {
		return nil, fmt.Errorf("it ran out at %s", list.NextUpdate.UTC().Format(time.RFC3339))
	}
	on := make(map[string]bool, len(list.RevokedCertificateEntries))
	for _, e := range list.RevokedCertificateEntries {
		on[string(e.SerialNumber.Bytes())] = true
	}
	for k, e := range c.events {
		if k.issuer == issuer && e.revoked() && !on[k.serial] && c.Now().Before(c.certs[k].notAfter) {
			missing = append(missing, k)
		}
	}
	return missing, nil
}
