package history

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"trivet/db"
	"trivet/journal"
)

// Row is one intent with what became of it.
type Row struct {
	Issuer string
	Serial []byte
	Req    []byte // nil for rows that a restart reconstructed
	Ver    int    // of the request: the highest counts
	TBS    [32]byte
	Kind   string // cert, abandoned; empty: open
	DER    []byte // of the highest version
}

func (r *Row) object() string { return r.Issuer + ":" + hex.EncodeToString(r.Serial) }

// RecordReader reads the final record.
type RecordReader interface {
	Certificates(ctx context.Context, fn func(*Row) error) error
	// Revocations calls fn with every serial that has a revocation event.
	Revocations(ctx context.Context, fn func(issuer string, serial []byte) error) error
}

// JournalReader calls fn with every record of every node's journal.
type JournalReader func(ctx context.Context, fn func(node string, e journal.Entry) error) error

// AgentReader calls fn with every count of signatures that an HSM agent wrote down: who asked, with which key, how many.
type AgentReader func(ctx context.Context, fn func(member, caller, key string, n int) error) error

func (c *check) journals(ctx context.Context) error {
	if c.Journals == nil {
		return nil
	}
	err := c.Journals(ctx, func(node string, e journal.Entry) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		c.report.Checked["journal_records"]++
		switch e.Kind {
		case journal.KindSign:
			var p journal.Sign
			if err := e.Decode(&p); err != nil {
				return err
			}
			c.signs++
			if len(p.Digest) == sha256.Size {
				c.signed[p.Issuer+":"+p.Serial] = digest(p.Digest)
			}
		case journal.KindCRL:
			c.crlSigs++
		case journal.KindDone:
			var p journal.Done
			if err := e.Decode(&p); err != nil {
				return err
			}
			if p.Kind != journal.DoneCert {
				return nil
			}
			object := p.Issuer + ":" + p.Serial
			if k := c.certs[object]; k != nil {
				k.done = true
				if d := digest(sha256.Sum256(p.DER)); d != k.digest {
					c.violate(SameBytes, object, []uint64{k.op}, "the journal of %s has released %s, the client has %s", node, d, k.digest)
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading journals: %w", err)
	}
	for object, k := range c.certs {
		if !k.done {
			c.violate(Journaled, object, []uint64{k.op}, "a client has it, and no journal says that it was released")
		}
	}
	return nil
}

func (c *check) record(ctx context.Context) error {
	if c.Record == nil {
		return nil
	}
	type owner struct {
		ver    int
		object string
		cert   bool
	}
	owners := map[[32]byte]owner{}
	named := map[string][]string{}  // for requests without a key
	unsigned := map[string]digest{} // certificates that no journal had a sign record of when it was read
	intents := 0
	err := c.Record.Certificates(ctx, func(r *Row) error {
		intents++
		object := r.object()
		if want, ok := c.signed[object]; ok {
			if want != r.TBS {
				c.violate(Intended, object, nil, "a journal says that %s was signed, the record's intent is %s", want, digest(r.TBS))
			}
			delete(c.signed, object)
		} else if r.Kind == "cert" && c.Journals != nil {
			unsigned[object] = r.TBS
		}
		if len(r.Req) == 32 {
			if key := [32]byte(r.Req); owners[key].ver < r.Ver {
				owners[key] = owner{r.Ver, object, r.Kind == "cert"}
			}
		}
		if r.Kind != "cert" {
			return nil
		}
		c.report.Checked["record_certificates"]++
		delete(c.good, object)
		d := digest(sha256.Sum256(r.DER))
		if k := c.certs[object]; k != nil {
			k.stored = true
			if k.digest != d {
				c.violate(SameBytes, object, []uint64{k.op}, "the record has %s, the client has %s", d, k.digest)
			}
		}
		if len(c.names) > 0 {
			cert, err := x509.ParseCertificate(r.DER)
			if err != nil {
				return fmt.Errorf("%s does not parse: %w", object, err)
			}
			for _, name := range cert.DNSNames {
				if c.names[name] != nil {
					named[name] = append(named[name], object)
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the record: %w", err)
	}
	c.report.Checked["record_intents"] = intents
	if err := c.unsigned(ctx, unsigned); err != nil {
		return err
	}
	for object, k := range c.certs {
		if !k.stored {
			c.violate(Stored, object, []uint64{k.op}, "a client has it, and the record has not")
		}
	}
	for object, op := range c.good {
		c.violate(GoodRow, object, []uint64{op}, "good about a certificate that the record has not")
	}
	for object := range c.signed {
		c.violate(Intended, object, nil, "a journal says that it was signed, and the record has no intent")
	}
	for key, r := range c.reqs {
		client, idempotency, _ := strings.Cut(key, "\x00")
		o, ok := owners[RequestKey(client, idempotency)]
		switch {
		case r.op != 0 && (!ok || o.object != r.object):
			c.violate(OneReq, r.object, []uint64{r.op}, "the record says that the request's certificate is %q", o.object)
		case r.op == 0 && r.refused != 0 && ok && o.cert:
			c.violate(Refused, o.object, []uint64{r.refused}, "a request that was refused for good has a certificate in the record")
		}
	}
	for name, objects := range named {
		if len(objects) > 1 {
			slices.Sort(objects)
			c.violate(OneReq, name, []uint64{c.names[name].invoked}, "the record has %d certificates for one request without a key: %s", len(objects), strings.Join(objects, ", "))
		}
	}
	return c.revocations(ctx)
}

// unsigned looks into the journals once more: a cluster that goes on may have issued since they were read.
func (c *check) unsigned(ctx context.Context, missing map[string]digest) error {
	if len(missing) == 0 {
		return nil
	}
	err := c.Journals(ctx, func(_ string, e journal.Entry) error {
		if e.Kind != journal.KindSign {
			return nil
		}
		var p journal.Sign
		if err := e.Decode(&p); err != nil {
			return err
		}
		if want, ok := missing[p.Issuer+":"+p.Serial]; ok && bytes.Equal(want[:], p.Digest) {
			delete(missing, p.Issuer+":"+p.Serial)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading journals: %w", err)
	}
	for object := range missing {
		c.violate(Intended, object, opsOf(c.certs[object]), "the record has a certificate that no journal says was to be signed")
	}
	return nil
}

func (c *check) revocations(ctx context.Context) error {
	missing := map[string]uint64{}
	for object, k := range c.certs {
		if k.recorded != 0 {
			missing[object] = k.recorded
		}
	}
	err := c.Record.Revocations(ctx, func(issuer string, serial []byte) error {
		delete(missing, issuer+":"+hex.EncodeToString(serial))
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading revocations: %w", err)
	}
	for object, op := range missing {
		c.violate(Stored, object, []uint64{op}, "its revocation was acknowledged, and the record has not got it")
	}
	return nil
}

func opsOf(k *cert) []uint64 {
	if k == nil {
		return nil
	}
	return []uint64{k.op}
}

// agents reads what HSM agents counted. It comes before the journals, which have a sign record before there is a signature.
func (c *check) agents(ctx context.Context) error {
	if c.Agents == nil {
		return nil
	}
	err := c.Agents(ctx, func(_, caller, _ string, n int) error {
		// trivet://{cluster}/{role}/{name}: VA nodes sign answers, of which their own journals know.
		if parts := strings.Split(caller, "/"); len(parts) == 5 && (parts[3] == "ca" || parts[3] == "ceremony") {
			c.made += n
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading the HSM agents' counts: %w", err)
	}
	c.report.Checked["agent_signatures"] = c.made
	return nil
}

// counts holds what HSM agents counted against what journals say was to be signed. What an agent had counted and not yet written when it was
// killed is missing, so that only too much is a violation.
func (c *check) counts() {
	c.report.Checked["journal_signatures"] = c.signs + c.crlSigs
	if most := int(float64(c.signs+c.crlSigs) * (1 + c.Resigned)); c.Journals != nil && c.made > most {
		c.violate(Intended, "HSM agents", nil, "they made %d signatures for CA nodes, whose journals call for %d (with repeats, for at most %d)", c.made, c.signs+c.crlSigs, most)
	}
}

// Journals reads journals from directories, by node.
func Journals(dirs map[string]string) JournalReader {
	return func(ctx context.Context, fn func(string, journal.Entry) error) error {
		for node, dir := range dirs {
			if err := journal.ReadDir(dir, func(e journal.Entry) error { return fn(node, e) }); err != nil {
				return fmt.Errorf("journal of %s: %w", node, err)
			}
		}
		return nil
	}
}

// Agents reads the counts from the audit journals of HSM agents, by member.
func Agents(dirs map[string]string) AgentReader {
	return func(ctx context.Context, fn func(member, caller, key string, n int) error) error {
		for member, dir := range dirs {
			err := journal.ReadDir(dir, func(e journal.Entry) error {
				var a journal.Audit
				if e.Kind != journal.KindAudit {
					return nil
				}
				if err := e.Decode(&a); err != nil || a.Event != "signatures" {
					return err
				}
				text, _ := strings.CutPrefix(a.Detail, "count=")
				n, err := strconv.Atoi(text)
				if err != nil {
					return fmt.Errorf("a count of signatures reads %q: %w", a.Detail, err)
				}
				return fn(member, a.Actor, a.Object, n)
			})
			if err != nil {
				return fmt.Errorf("audit journal of %s: %w", member, err)
			}
		}
		return nil
	}
}

// Record reads the record from a database, with an account that may read it.
type Record struct{ DB *sql.DB }

// rows of one page; each holds a certificate, so that memory stays small.
const rowsAtOnce = 2000

// Certificates implements RecordReader.
func (r Record) Certificates(ctx context.Context, fn func(*Row) error) error {
	var issuer, serial []byte
	issuer, serial = []byte{}, []byte{}
	for {
		rows, err := r.DB.QueryContext(ctx, `SELECT i.issuer, i.serial, i.req, i.ver, IF(i.tbs = '', t.tbs, i.tbs), COALESCE(o.kind, ''), o.der
			FROM intent i LEFT JOIN intent_tbs t ON t.issuer = i.issuer AND t.serial = i.serial AND t.day = DATE(i.created) LEFT JOIN outcome o ON o.issuer = i.issuer AND o.serial = i.serial
			     AND o.ver = (SELECT MAX(ver) FROM outcome m WHERE m.issuer = i.issuer AND m.serial = i.serial)
			WHERE (i.issuer, i.serial) > (?, ?) AND i.issuer >= ? ORDER BY i.issuer, i.serial LIMIT ?`, issuer, serial, issuer, rowsAtOnce)
		if err != nil {
			return err
		}
		n := 0
		for rows.Next() {
			var row Row
			var tbs []byte
			if err = rows.Scan(&row.Issuer, &row.Serial, &row.Req, &row.Ver, &tbs, &row.Kind, &row.DER); err != nil {
				break
			}
			if tbs == nil {
				tbs = db.TBSOf(row.DER)
			}
			row.TBS = sha256.Sum256(tbs)
			if err = fn(&row); err != nil {
				break
			}
			issuer, serial = []byte(row.Issuer), row.Serial
			n++
		}
		rows.Close()
		if err == nil {
			err = rows.Err()
		}
		if err != nil || n < rowsAtOnce {
			return err
		}
	}
}

// Revocations implements RecordReader.
func (r Record) Revocations(ctx context.Context, fn func(string, []byte) error) error {
	rows, err := r.DB.QueryContext(ctx, `SELECT DISTINCT issuer, serial FROM revocation`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var issuer string
		var serial []byte
		if err := rows.Scan(&issuer, &serial); err != nil {
			return err
		}
		if err := fn(issuer, serial); err != nil {
			return err
		}
	}
	return rows.Err()
}
