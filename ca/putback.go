package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"trivet/db"
	"trivet/journal"
)

// putBackChunk is how many facts are compared and put back at once.
const putBackChunk = 100

// putBackPasses bounds how often what was put back is looked at again; each pass but the last finds less.
const putBackPasses = 8

// restorer puts facts back in one round.
type restorer struct {
	r     *Rounds
	round uint64
	late  bool   // others have gone on: nothing of theirs is overruled
	ended uint64 // newest round that ended before this one
}

// mayOverrule tells whether a released fact wins over what the database has in its place: that was not released, because nothing has been since
// the fact was, or since a round in which it stood (see Rounds.standing). Of any older fact an earlier round decided.
func (b *restorer) mayOverrule(d journal.Done) bool { return !b.late && d.Round >= b.ended }

// conflict reports a contradiction that is left as it is.
func (b *restorer) conflict(d journal.Done, what string) {
	b.r.conflicts.Inc()
	b.r.mu.Lock()
	b.r.putBack.Conflicts++
	b.r.mu.Unlock()
	b.r.cfg.Log.Error("the database contradicts what was released: look at both", "round", b.round, "issuer", d.Issuer, "serial", d.Serial, "kind", d.Kind, "what", what)
}

func (b *restorer) count(add func(*putBack), n int) {
	b.r.restored.Add(float64(n))
	b.r.mu.Lock()
	defer b.r.mu.Unlock()
	for range n {
		add(&b.r.putBack)
	}
}

// lane returns the lane that facts are put back in.
func (b *restorer) lane(kind int) (*db.Lane, error) {
	for _, m := range b.r.moving() {
		if l := m.current(); l != nil && (m.index == kind || len(b.r.moving()) == 1) {
			return l, nil
		}
	}
	return nil, errors.New("there is no lane to put facts back in")
}

func keyOf(d journal.Done) (db.CertificateKey, error) {
	serial, err := hex.DecodeString(d.Serial)
	if err != nil {
		return db.CertificateKey{}, fmt.Errorf("reading what was released: serial %q of %s: %w", d.Serial, d.Issuer, err)
	}
	return db.CertificateKey{Issuer: d.Issuer, Serial: serial}, nil
}

// outcomes puts back certificates and abandonments, their intents with them, and looks again until nothing is missing.
func (b *restorer) outcomes(ctx context.Context, dones []journal.Done) error {
	lane, err := b.lane(0)
	if err != nil {
		return err
	}
	said := map[string]bool{}
	for range putBackPasses {
		facts, from, err := b.planOutcomes(ctx, dones, said)
		if err != nil || len(facts) == 0 {
			return err
		}
		appended, err := lane.Append(ctx, facts)
		if err != nil {
			return fmt.Errorf("putting back: %w", err)
		}
		var records []*journal.Done
		for i, a := range appended {
			if a.Err != nil {
				b.r.cfg.Log.Warn("putting back: looking again", "issuer", from[i].Issuer, "serial", from[i].Serial, "err", a.Err)
				continue
			}
			d, o := from[i], facts[i].Outcome
			d.Ver, d.Lane, d.Seq = int(o.Ver), o.Lane, o.Seq
			if facts[i].Intent != nil {
				in := *d.Intent
				in.Req, in.Ver = facts[i].Intent.Req, int(facts[i].Intent.Ver)
				in.MAC, in.MACKey = facts[i].Intent.MAC, facts[i].Intent.MACKey
				d.Intent = &in
			}
			records = append(records, &d)
			b.r.cfg.Log.Warn("put back what the database had lost", "round", b.round, "issuer", d.Issuer, "serial", d.Serial, "kind", d.Kind, "ver", d.Ver)
			if d.Kind == journal.DoneCert {
				b.count(func(p *putBack) { p.Certificates++ }, 1)
			} else {
				b.count(func(p *putBack) { p.Abandoned++ }, 1)
			}
		}
		if err := b.record(ctx, records); err != nil {
			return err
		}
	}
	return fmt.Errorf("some of %d facts could not be put back in %d tries", len(dones), putBackPasses)
}

// record journals where facts are now, so that another loss is noticed, and gives them to the second holder.
func (b *restorer) record(ctx context.Context, dones []*journal.Done) error {
	if len(dones) == 0 {
		return nil
	}
	_, err := b.r.write(b.r.cfg.Journal, putBackRound, dones)
	return err
}

func (b *restorer) planOutcomes(ctx context.Context, dones []journal.Done, said map[string]bool) (facts []db.Fact, from []journal.Done, err error) {
	keys := make([]db.CertificateKey, len(dones))
	for i, d := range dones {
		if keys[i], err = keyOf(d); err != nil {
			return nil, nil, err
		}
	}
	found, err := b.r.record.CertificatesByKey(ctx, keys)
	if err != nil {
		return nil, nil, err
	}
	have := map[string]*db.Certificate{}
	for i := range found {
		have[found[i].Intent.Issuer+"/"+string(found[i].Intent.Serial)] = &found[i]
	}
	reqs, err := b.requests(ctx, dones, keys, have)
	if err != nil {
		return nil, nil, err
	}
	taken := map[string]bool{}
	for i, d := range dones {
		id := d.Issuer + "/" + string(keys[i].Serial)
		if taken[id] {
			continue // another record of the same serial: the next pass looks at it
		}
		fact, why := b.planOutcome(d, keys[i], have[id], reqs)
		if why != "" && !said[id+why] {
			said[id+why] = true
			b.conflict(d, why)
		}
		if fact != nil {
			taken[id] = true
			facts, from = append(facts, *fact), append(from, d)
		}
	}
	return facts, from, nil
}

// requests returns who owns the request keys of those facts whose intents are lost.
func (b *restorer) requests(ctx context.Context, dones []journal.Done, keys []db.CertificateKey, have map[string]*db.Certificate) (map[string]*db.Intent, error) {
	var reqs [][]byte
	for i, d := range dones {
		if have[d.Issuer+"/"+string(keys[i].Serial)] == nil && d.Intent != nil && len(d.Intent.Req) == 32 {
			reqs = append(reqs, d.Intent.Req)
		}
	}
	out := map[string]*db.Intent{}
	rows, _, err := b.r.record.ReadBack(ctx, "", reqs)
	if err != nil {
		return nil, err
	}
	for i, row := range rows {
		if row.Intent != nil {
			out[string(reqs[i])] = row.Intent
		}
	}
	return out, nil
}

// planOutcome says what must be inserted for a released fact, nil if nothing, and what contradicts it.
func (b *restorer) planOutcome(d journal.Done, key db.CertificateKey, have *db.Certificate, reqs map[string]*db.Intent) (*db.Fact, string) {
	o := &db.Outcome{Issuer: d.Issuer, Serial: key.Serial, Ver: uint32(max(d.Ver, 1)), Kind: outcomeAbandoned, Created: d.Created}
	var tbs, subjectKey []byte
	if d.Kind == journal.DoneCert {
		cert, err := x509.ParseCertificate(d.DER)
		if err != nil {
			return nil, "the certificate in the journal does not parse: " + err.Error()
		}
		o.Kind, o.DER, o.NotAfter, tbs = outcomeCert, d.DER, cert.NotAfter.UTC(), cert.RawTBSCertificate
		sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
		subjectKey = sum[:]
	}
	if have == nil {
		if d.Intent == nil {
			return nil, "its intent is lost, and the journal is of a version that did not keep it"
		}
		intent := intentRow(d.Issuer, key.Serial, d.Intent, tbs)
		intent.Key = subjectKey
		why := ""
		if owner := reqs[string(intent.Req)]; owner != nil && intent.Req != nil && !bytes.Equal(owner.Serial, key.Serial) {
			vouched := b.r.cfg.MACKeys.Verify(intent) == nil
			if b.mayOverrule(d) {
				intent.Ver = owner.Ver + 1
				why = "its request key was taken meanwhile by " + hex.EncodeToString(owner.Serial) + ": it gets the key back"
			} else {
				intent.Req, intent.Ver = nil, 1
				why = "its request key is that of " + hex.EncodeToString(owner.Serial) + ", which may have been released too: both are kept"
			}
			if vouched { // the MAC is over what changed; a row that nobody vouched for stays so
				b.r.cfg.MACKeys.Seal(intent)
			}
		}
		return &db.Fact{Outcome: o, Intent: intent}, why
	}
	switch got := have.Outcome; {
	case got == nil:
		return &db.Fact{Outcome: o}, ""
	case got.Kind == o.Kind && bytes.Equal(got.DER, o.DER):
		return nil, ""
	case b.mayOverrule(d):
		o.Ver = got.Ver + 1
		return &db.Fact{Outcome: o}, fmt.Sprintf("the database has version %d, a %s that was not released: version %d overrules it", got.Ver, got.Kind, o.Ver)
	default:
		return nil, fmt.Sprintf("the database has version %d, a %s, in its place", got.Ver, got.Kind)
	}
}

// revocations puts back events. Where another event has the number, and the certificate does not read as revoked, the event comes after it: what
// was acknowledged as revoked must not read good.
func (b *restorer) revocations(ctx context.Context, dones []journal.Done) error {
	lane, err := b.lane(1)
	if err != nil {
		return err
	}
	said := map[string]bool{}
	for range putBackPasses {
		keys := make([]db.CertificateKey, len(dones))
		for i, d := range dones {
			if keys[i], err = keyOf(d); err != nil {
				return err
			}
		}
		rows, err := b.r.record.RevocationsOf(ctx, keys)
		if err != nil {
			return err
		}
		events := map[string][]db.Revocation{}
		for _, row := range rows {
			id := row.Issuer + "/" + string(row.Serial)
			events[id] = append(events[id], row)
		}
		var facts []db.Fact
		var from []journal.Done
		taken := map[string]bool{}
		for i, d := range dones {
			id := d.Issuer + "/" + string(keys[i].Serial)
			if taken[id] {
				continue
			}
			e, why := planRevocation(d, keys[i], events[id])
			if why != "" && !said[id+why] {
				said[id+why] = true
				b.conflict(d, why)
			}
			if e != nil {
				taken[id] = true
				facts, from = append(facts, db.Fact{Revocation: e}), append(from, d)
			}
		}
		if len(facts) == 0 {
			return b.blocks(ctx, dones)
		}
		appended, err := lane.Append(ctx, facts)
		if err != nil {
			return fmt.Errorf("putting back: %w", err)
		}
		var records []*journal.Done
		var orphans error
		for i, a := range appended {
			switch {
			case db.ClassOf(a.Err) == db.Fatal:
				orphans = fmt.Errorf("revocation %d of %s:%s waits for its certificate, which another node must put back: %w", from[i].Event.N, from[i].Issuer, from[i].Serial, a.Err)
				continue
			case a.Err != nil:
				continue
			}
			d, e := from[i], facts[i].Revocation
			event := *d.Event
			event.N = int(e.N)
			d.Event, d.Lane, d.Seq = &event, e.Lane, e.Seq
			records = append(records, &d)
			b.count(func(p *putBack) { p.Revocations++ }, 1)
			b.r.cfg.Log.Warn("put back what the database had lost", "round", b.round, "issuer", d.Issuer, "serial", d.Serial, "kind", d.Kind, "n", e.N)
		}
		if err := b.record(ctx, records); err != nil {
			return err
		}
		if orphans != nil {
			if err := b.orphaned(orphans); err != nil {
				return err
			}
			return b.blocks(ctx, dones)
		}
	}
	return fmt.Errorf("some of %d revocations could not be put back in %d tries", len(dones), putBackPasses)
}

// orphaned decides whether a revocation whose certificate is still lost is waited for: the node that released the certificate may be late.
func (b *restorer) orphaned(err error) error {
	b.r.mu.Lock()
	waited := time.Since(b.r.saw)
	b.r.mu.Unlock()
	if waited < b.r.cfg.GiveUp {
		return err
	}
	b.r.conflicts.Inc()
	b.r.cfg.Log.Error("a revocation cannot be put back: it stays on the CRL", "round", b.round, "err", err)
	return nil
}

// crls puts back the numbers of CRLs, so that the next one is above every one published. Their content needs no putting back: it is the
// revocations', and responders keep the newest CRL they have.
func (b *restorer) crls(ctx context.Context, dones []journal.Done) error {
	lane, err := b.lane(1)
	if err != nil {
		return err
	}
	highest := map[string]journal.Done{}
	for _, d := range dones {
		if d.CRL != nil && (highest[d.Issuer].CRL == nil || d.CRL.Number > highest[d.Issuer].CRL.Number) {
			highest[d.Issuer] = d
		}
	}
	for issuer, d := range highest {
		tip, err := b.r.record.NextCRL(ctx, nil, issuer, uint32(d.CRL.Shard))
		if err != nil {
			return err
		}
		if tip.Number >= d.CRL.Number {
			continue
		}
		now := time.Now()
		row := db.CRL{Issuer: issuer, Shard: uint32(d.CRL.Shard), N: tip.N + 1, Number: d.CRL.Number, ThisUpdate: now, NextUpdate: now, TBSHash: d.CRL.TBSHash, Node: b.r.cfg.Node}
		if err := b.r.record.InsertCRL(ctx, row); err != nil && db.ClassOf(err) != db.Duplicate {
			return fmt.Errorf("putting back the number of a CRL of %s: %w", issuer, err)
		}
		result := &db.CRLResult{Issuer: issuer, Shard: row.Shard, N: row.N, Kind: db.CRLVoid, Number: row.Number}
		appended, err := lane.Append(ctx, []db.Fact{{CRL: result}})
		if err == nil {
			err = appended[0].Err
		}
		if err != nil && db.ClassOf(err) != db.Duplicate {
			return fmt.Errorf("putting back the number of a CRL of %s: %w", issuer, err)
		}
		b.count(func(p *putBack) { p.CRLs++ }, 1)
	}
	return nil
}
