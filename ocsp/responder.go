package ocsp

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// budget is how long one request may wait, for a causal read and a signature together.
	budget = time.Second
	// maxRounds bounds how often a request starts over because the status changed under it.
	maxRounds = 4

	maxAgeLeast, maxAgeSpread = 300, 600 // seconds, of answers
	maxAgeCRL                 = 3600     // seconds
	maxAgeAIA                 = 86400    // seconds
)

// Public serves relying parties over plain HTTP: GET and POST /ocsp and /ocsp/{ca} (RFC 6960 appendix A, RFC 9919),
// GET /crl/{ca}-g{n}.crl and GET /ca/{ca}-g{n}.crt. Paths are taken as sent: nothing is cleaned, nothing redirected.
// It is safe for concurrent use from the start; until the node has joined it answers tryLater.
func (v *VA) Public() http.Handler { return http.HandlerFunc(v.servePublic) }

func (v *VA) servePublic(w http.ResponseWriter, r *http.Request) {
	path := rawPath(r.RequestURI)
	switch {
	case path == "/ocsp" || strings.HasPrefix(path, "/ocsp/"):
		v.serveOCSP(w, r, strings.TrimPrefix(path, "/ocsp"))
	case strings.HasPrefix(path, "/crl/") && strings.HasSuffix(path, ".crl"):
		is := v.catalog.byName(strings.TrimSuffix(strings.TrimPrefix(path, "/crl/"), ".crl"))
		var d *document
		if is != nil {
			d = is.crlDocument()
		}
		v.serveDocument(w, r, d)
	case strings.HasPrefix(path, "/ca/") && strings.HasSuffix(path, ".crt"):
		is := v.catalog.byName(strings.TrimSuffix(strings.TrimPrefix(path, "/ca/"), ".crt"))
		var d *document
		if is != nil {
			if known := is.known.Load(); known != nil {
				d = &known.aia
			}
		}
		v.serveDocument(w, r, d)
	default:
		plainError(w, http.StatusNotFound, "not found")
	}
}

// rawPath returns the path as it was sent, without scheme and authority of an absolute request target, and without query.
func rawPath(target string) string {
	if !strings.HasPrefix(target, "/") {
		if _, rest, ok := strings.Cut(target, "://"); ok {
			if i := strings.IndexByte(rest, '/'); i >= 0 {
				target = rest[i:]
			}
		}
	}
	path, _, _ := strings.Cut(target, "?")
	return path
}

// serveOCSP answers one OCSP request; rest is what follows /ocsp in the path.
func (v *VA) serveOCSP(w http.ResponseWriter, r *http.Request, rest string) {
	rest = strings.TrimLeft(rest, "/")
	// A CA id begins with a lower-case letter, the base64 of a request with M: they cannot be mistaken.
	ca := ""
	if rest != "" && rest[0] >= 'a' && rest[0] <= 'z' {
		ca, rest, _ = strings.Cut(rest, "/")
		rest = strings.TrimLeft(rest, "/")
	}
	var der []byte
	var err error
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		der, err = decodeGet(rest)
	case http.MethodPost:
		if der, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest)); err != nil {
			err = malformed("body cannot be read or exceeds 10 KiB")
		}
	default:
		w.Header().Set("Allow", "GET, HEAD, POST")
		plainError(w, http.StatusMethodNotAllowed, "method not allowed")
		return
	}
	var req request
	if err == nil {
		req, err = parseRequest(der)
	}
	if err != nil {
		v.answerError(w, outcomeMalformed)
		return
	}
	// The whole request is read. Every clock that decides is read from here on.
	ctx, cancel := context.WithTimeout(r.Context(), budget)
	defer cancel()
	if len(req.certs) > 1 {
		v.answerMany(ctx, w, r, ca, req)
		return
	}
	v.answerOne(ctx, w, r, ca, req.certs[0])
}

// decodeGet undoes percent encoding once, then base64, with or without padding. Raw +, / and // are base64.
func decodeGet(s string) ([]byte, error) {
	if len(s) > 2*maxRequest {
		return nil, malformed("too large")
	}
	decoded, err := url.PathUnescape(s)
	if err != nil {
		return nil, malformed("percent encoding")
	}
	der, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(strings.TrimLeft(decoded, "/"), "="))
	if err != nil {
		return nil, malformed("base64")
	}
	return der, nil
}

// find returns the issuer that a CertID names, if it belongs to ca; an empty ca is any.
func (v *VA) find(ca string, id issuerID) *issuer {
	is := v.catalog.byID(id)
	if is == nil || ca != "" && ca != is.known.Load().ca {
		return nil
	}
	return is
}

// choice is what to answer for one serial: either an outcome that is an error, or a status.
type choice struct {
	failure string // outcome label, empty when view may be shown
	view    View
	now     time.Time
}

// choose decides what the serial's answer shows, by a clock read now; known is false when no lane has named it.
func (v *VA) choose(is *issuer, serial Serial) (c choice, known bool) {
	// The lease is looked at before the table: it vouches for what was applied when it was granted.
	leased, entitled := v.lease.valid(), v.mayAnswerGood()
	c.view, known = is.table.Lookup(serial)
	c.now = v.cfg.Now()
	switch {
	case !known && leased:
		c.failure = outcomeUnauthorized
	case !known, c.view.State == TryLater:
		c.failure = outcomeTryLater
	case c.view.ended(c.now):
		c.failure = outcomeUnauthorized
	case c.view.State == Good && !entitled:
		c.failure = outcomeTryLater
	}
	return c, known
}

// look is choose, with one causal read when the serial is not known: its certificate may be a moment old.
func (v *VA) look(ctx context.Context, is *issuer, serial Serial) choice {
	c, known := v.choose(is, serial)
	if known || !v.joined() || !v.lease.valid() {
		return c // without a lease the database has been silent for seconds: waiting longer helps nobody
	}
	if err := v.feed.poll(ctx); err != nil {
		c.failure = outcomeTryLater
		return c
	}
	c, _ = v.choose(is, serial)
	return c
}

func (v *VA) answerOne(ctx context.Context, w http.ResponseWriter, r *http.Request, ca string, id certID) {
	is := v.find(ca, id.issuer)
	if is == nil {
		v.answerForeign(w)
		return
	}
	for range maxRounds {
		c := v.look(ctx, is, id.serial)
		if c.failure != "" {
			v.answerError(w, c.failure)
			return
		}
		sig := c.view.signatures[id.issuer.hash]
		if sig == nil || c.now.Unix() >= sig.nextUpdate {
			if err := v.presigner.demand(ctx, job{is, id.serial, id.issuer.hash}); err != nil && !errors.Is(err, errOutdated) {
				v.answerError(w, outcomeTryLater)
				return
			}
			continue // choose again: time has passed and the status may have changed
		}
		der, err := sig.encode(&id.issuer, id.serial, c.view.Status)
		if err != nil {
			v.log.Error("OCSP answer not encoded", "issuer", is.name, "serial", id.serial.String(), "err", err)
			v.answerError(w, outcomeInternal)
			return
		}
		v.metrics.served.observe(c.now, sig.thisUpdate)
		outcome := outcomeGood
		if c.view.State == Revoked {
			outcome = outcomeRevoked
		}
		v.answerSigned(w, r, outcome, der, c.now, sig.thisUpdate, sig.nextUpdate)
		return
	}
	v.answerError(w, outcomeTryLater)
}

// answerMany answers 2 to maxCertIDs certificates of one generation with one signature made for the occasion.
func (v *VA) answerMany(ctx context.Context, w http.ResponseWriter, r *http.Request, ca string, req request) {
	is := v.find(ca, req.certs[0].issuer)
	if is == nil {
		v.answerForeign(w)
		return
	}
	for i := range req.certs {
		if v.find(ca, req.certs[i].issuer) != is {
			v.answerError(w, outcomeUnauthorized)
			return
		}
	}
	if !v.presigner.live.TryAcquire(1) {
		v.answerError(w, outcomeTryLater)
		return
	}
	defer v.presigner.live.Release(1)
	signed := make(chan manySigned, 1)
	epochs := make([]uint32, len(req.certs))
	for range maxRounds {
		singles := make([]single, len(req.certs))
		var revokedAt int64
		var now time.Time
		for i := range req.certs {
			c := v.look(ctx, is, req.certs[i].serial)
			if c.failure != "" {
				v.answerError(w, c.failure)
				return
			}
			singles[i] = single{&req.certs[i].issuer, req.certs[i].serial, c.view.Status}
			epochs[i], revokedAt, now = c.view.Epoch, max(revokedAt, c.view.RevokedAt), c.now
		}
		go func() { signed <- is.signMany(singles, now, revokedAt) }()
		var m manySigned
		select {
		case m = <-signed:
		case <-ctx.Done():
			m.err = ctx.Err()
		}
		if m.err != nil {
			v.answerError(w, outcomeTryLater)
			return
		}
		current := true
		for i := range req.certs {
			c, _ := v.choose(is, req.certs[i].serial)
			current = current && c.failure == "" && c.view.Epoch == epochs[i]
			now = c.now
		}
		if current {
			v.answerSigned(w, r, outcomeMulti, m.der, now, m.this, m.next)
			return
		}
	}
	v.answerError(w, outcomeTryLater)
}

type manySigned struct {
	der        []byte
	this, next int64
	err        error
}

func (is *issuer) signMany(singles []single, now time.Time, revokedAt int64) (m manySigned) {
	known, r := is.known.Load(), is.responder.Load()
	if known == nil || r == nil {
		m.err = errNoResponder
		return m
	}
	if m.this, m.next, m.err = window(known, r, now, revokedAt); m.err != nil {
		return m
	}
	tbs, err := encodeTBS(r, singles, m.this, m.next)
	if err != nil {
		m.err = err
		return m
	}
	digest := sha256.Sum256(tbs)
	value, err := r.sign(digest[:])
	if err != nil {
		m.err = err
		return m
	}
	m.der, m.err = encodeResponse(r, tbs, value)
	return m
}

// answerForeign answers for an issuer that this node does not know: certainly none of ours, once it knows all of ours.
func (v *VA) answerForeign(w http.ResponseWriter) {
	if !v.joined() || v.catalog.stale() {
		v.answerError(w, outcomeTryLater)
		return
	}
	v.answerError(w, outcomeUnauthorized)
}

func (v *VA) answerSigned(w http.ResponseWriter, r *http.Request, outcome string, der []byte, now time.Time, this, next int64) {
	sum := sha256.Sum256(der)
	h := w.Header()
	setValidators(h, `"`+hex.EncodeToString(sum[:])+`"`, time.Unix(this, 0))
	h.Set("Expires", time.Unix(next, 0).UTC().Format(http.TimeFormat))
	age := min(int64(maxAgeLeast+rand.IntN(maxAgeSpread+1)), next-now.Unix())
	h.Set("Cache-Control", "max-age="+strconv.FormatInt(age, 10)+",public,no-transform,must-revalidate")
	if r.Method != http.MethodPost && matches(r.Header.Get("If-None-Match"), h.Get("Etag")) {
		v.metrics.request(outcomeNotModified)
		w.WriteHeader(http.StatusNotModified)
		return
	}
	v.metrics.request(outcome)
	write(w, "application/ocsp-response", der)
}

// answerError sends an unsigned error body: status 200, as RFC 9919 wants it, and never cached.
func (v *VA) answerError(w http.ResponseWriter, outcome string) {
	body := bodyInternal
	switch outcome {
	case outcomeTryLater:
		body = bodyTryLater
	case outcomeUnauthorized:
		body = bodyUnauthorized
	case outcomeMalformed:
		body = bodyMalformed
	}
	v.metrics.request(outcome)
	w.Header().Set("Cache-Control", "no-store")
	write(w, "application/ocsp-response", body)
}

// document is a DER file served as it is.
type document struct {
	der      []byte
	kind     string // media type
	etag     string
	modified time.Time
	expires  time.Time // zero: no Expires
	maxAge   int64     // seconds
}

func newDocument(der []byte, kind string, modified, expires time.Time, maxAge int64) document {
	sum := sha256.Sum256(der)
	return document{der: der, kind: kind, etag: `"` + hex.EncodeToString(sum[:]) + `"`, modified: modified, expires: expires, maxAge: maxAge}
}

func (v *VA) serveDocument(w http.ResponseWriter, r *http.Request, d *document) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		plainError(w, http.StatusMethodNotAllowed, "method not allowed")
		return
	}
	if d == nil {
		plainError(w, http.StatusNotFound, "not found")
		return
	}
	h := w.Header()
	setValidators(h, d.etag, d.modified)
	age := d.maxAge
	if !d.expires.IsZero() {
		h.Set("Expires", d.expires.UTC().Format(http.TimeFormat))
		age = max(min(age, int64(d.expires.Sub(v.cfg.Now())/time.Second)), 0)
	}
	h.Set("Cache-Control", fmt.Sprintf("max-age=%d,public,no-transform,must-revalidate", age))
	if matches(r.Header.Get("If-None-Match"), d.etag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	write(w, d.kind, d.der)
}

func setValidators(h http.Header, etag string, modified time.Time) {
	h.Set("Etag", etag)
	h.Set("Last-Modified", modified.UTC().Format(http.TimeFormat))
}

// matches is If-None-Match (RFC 9110 13.1.2), with the weak comparison.
func matches(header, etag string) bool {
	for _, tag := range strings.Split(header, ",") {
		if tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/"); tag == etag || tag == "*" {
			return true
		}
	}
	return false
}

func write(w http.ResponseWriter, kind string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", kind)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body) // a client that has gone is not ours to mend
}

func plainError(w http.ResponseWriter, status int, text string) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text+"\n")
}
