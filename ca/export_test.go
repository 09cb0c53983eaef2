package ca

import (
	"context"
	"crypto/x509"
	"time"

	"trivet/db"
)

// CheckDNS is what names are judged by.
func CheckDNS(name string, wildcard bool) error { return checkDNS(name, wildcard) }

// NewSerial makes a serial.
var NewSerial = newSerial

// Permit judges a request up to the names and key of the certificate, as Issue does.
func (p *Profile) Permit(r Request) (commonName string, dns []string, err error) {
	if err := r.check(); err != nil {
		return "", nil, err
	}
	c, err := parseCSR(r.CSR)
	if err != nil {
		return "", nil, err
	}
	v, err := p.permitRequest(&r, c, nil)
	return v.names.commonName, v.names.dns, err
}

// BodyHash is the hash by which repeats are recognised.
func BodyHash(r Request) [32]byte {
	c, err := parseCSR(r.CSR)
	if err != nil {
		panic(err)
	}
	return bodyHash(&r, c.Raw)
}

// CheckLint judges a draft as the rules of a profile say.
func CheckLint(der []byte, rules Lint, now time.Time) error { return drafts.check(der, rules, now) }

// Misencode compares what a request is permitted with a draft of something else.
func (p *Profile) Misencode(r Request, a *Authority, change func(*x509.Certificate)) error {
	c, err := parseCSR(r.CSR)
	if err != nil {
		return err
	}
	v, err := p.permitRequest(&r, c, nil)
	if err != nil {
		return err
	}
	now := time.Now()
	if v.notBefore, v.notAfter, err = p.validity(a, now, nil); err != nil {
		return err
	}
	if v.serial, err = newSerial(now, rand0{}); err != nil {
		return err
	}
	t, err := p.template(a, "http://pki.example.org", v)
	if err != nil {
		return err
	}
	lie := *t
	change(&lie)
	der, _, err := draft(&lie, parentOf(a), v.key)
	if err != nil {
		return err
	}
	return v.agree(der, t, parentOf(a))
}

// Draft makes the draft of a certificate that nobody signed, linted, as Issue does before anything is recorded.
func (p *Profile) Draft(r Request, a *Authority, now time.Time) ([]byte, error) {
	c, err := parseCSR(r.CSR)
	if err != nil {
		return nil, err
	}
	v, err := p.permitRequest(&r, c, nil)
	if err != nil {
		return nil, err
	}
	if v.notBefore, v.notAfter, err = p.validity(a, now, r.NotAfter); err != nil {
		return nil, err
	}
	if v.serial, err = newSerial(now, rand0{}); err != nil {
		return nil, err
	}
	t, err := p.template(a, "http://pki.example.org", v)
	if err != nil {
		return nil, err
	}
	der, _, err := draft(t, parentOf(a), v.key)
	if err != nil {
		return nil, err
	}
	return der, drafts.check(der, p.Lint, now)
}

var drafts = newLinter()

type rand0 struct{}

func (rand0) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 0xa5
	}
	return len(b), nil
}

// What tests put between the engine and what it records in.
type (
	Record        = record
	FactLane      = lane
	JournalWriter = journalWriter
)

// Interpose puts faults between an engine and its record, lane and journal; nil leaves one alone. Call it before Run.
func (e *Engine) Interpose(r func(Record) Record, l func(FactLane) FactLane, j func(JournalWriter) JournalWriter) {
	if r != nil {
		e.record = r(e.record)
	}
	if l != nil {
		e.lane = l(e.lane)
	}
	if j != nil {
		e.log = j(e.log)
	}
}

// Sweep sweeps once.
func (e *Engine) Sweep(ctx context.Context) error { return e.sweep(ctx) }

// Recheck judges a stored intent.
func (e *Engine) Recheck(row db.Intent) error { return e.recheck(row) }

// RequestKey is the key of a request in the database.
func RequestKey(principal, key string) [32]byte { return requestKey(principal, key) }

// Running tells whether the engine admits requests, or would if it were not halted.
func (e *Engine) Running() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.unready == nil
}

// InFlight returns how many request keys are under way.
func (e *Engine) InFlight() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.inflight)
}

// MedianOffset is how clocks are judged.
var MedianOffset = medianOffset

// SPKIOf finds the public key in a TBSCertificate.
var SPKIOf = spkiOf

// PermitStored judges what a TBSCertificate, as the database might hold it, asks for.
func (p *Profile) PermitStored(tbs []byte, a *Authority) error {
	der, err := dress(tbs, parentOf(a))
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if _, err = p.checkKey(cert.PublicKey, nil); err == nil {
		_, err = p.permit(asked{commonName: cert.Subject.CommonName, dns: cert.DNSNames}, "")
	}
	return err
}
