package fsck

import (
	"bytes"
	"context"
	"crypto"
	crand "crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 6960 CertIDs are SHA-1 in the field
	"crypto/x509"
	"database/sql"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ocsp"
)

const (
	askers = 8  // questions put to one responder at a time
	enough = 20 // violations after which one responder is asked no further: each may have taken the whole of Settle
)

// responders asks every responder about every certificate, or those that asked chooses, and fetches every CRL from it: acknowledged certificates are good (I3's
// other half), revoked ones revoked (I4), and serials that nobody issued never good (I3).
func (c *check) responders(ctx context.Context) error {
	asked, left := c.asked()
	if left > 0 && len(c.Responders) > 0 {
		c.report.Unchecked = append(c.report.Unchecked, fmt.Sprintf("what responders say of %d certificates: they were asked about %d, the newest and the revoked ones and others at random", left, len(asked)))
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, r := range c.Responders {
		wg.Go(func() {
			found := c.responder(ctx, r, asked)
			mu.Lock()
			defer mu.Unlock()
			c.report.Violations = append(c.report.Violations, found...)
		})
	}
	wg.Wait()
	for range c.Responders {
		c.count("responders", 1)
		c.count("ocsp_answers", len(asked))
	}
	return ctx.Err()
}

// asked chooses certificates to ask about, and says of how many it left out. Expired ones are neither: nobody answers for them any more.
func (c *check) asked() (asked []key, left int) {
	var all []key
	for k, cert := range c.certs {
		if cert.abandoned || c.Now().Before(cert.notAfter) {
			all = append(all, k)
		}
	}
	if c.Ask <= 0 || len(all) <= c.Ask {
		return all, 0
	}
	slices.SortFunc(all, func(a, b key) int { return strings.Compare(b.serial, a.serial) }) // serials begin with the time
	asked = all[:c.Ask:c.Ask]
	var others []key
	for _, k := range all[c.Ask:] {
		if c.certs[k].abandoned || c.events[k].event != "" {
			asked = append(asked, k)
		} else {
			others = append(others, k)
		}
	}
	rand.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
	asked = append(asked, others[:min(c.Ask, len(others))]...)
	return asked, len(all) - len(asked)
}

// responder checks one; it touches nothing of c that others write.
func (c *check) responder(ctx context.Context, r Responder, asked []key) (found []Violation) {
	var mu sync.Mutex
	violate := func(invariant string, object any, format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		found = append(found, Violation{invariant, fmt.Sprint(object), r.Name + ": " + fmt.Sprintf(format, args...)})
	}
	if err := c.reach(ctx, r); err != nil {
		violate("I6", "responder "+r.Name, "does not answer, so nothing that it says was checked: %v", err)
		return found
	}
	tired := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(found) >= enough
	}
	work := make(chan key)
	var wg sync.WaitGroup
	for range askers {
		wg.Go(func() {
			for k := range work {
				if !tired() {
					c.settle(ctx, k, r, violate)
				}
			}
		})
	}
	for _, k := range asked {
		work <- k
	}
	close(work)
	wg.Wait()
	if tired() {
		violate("I6", "responder "+r.Name, "was asked no further after %d violations", enough)
		return found
	}
	for issuer := range c.generations {
		c.unknown(ctx, issuer, r, violate)
		c.servedCRL(ctx, issuer, r, violate)
	}
	return found
}

// reach waits until the responder answers anything at all.
func (c *check) reach(ctx context.Context, r Responder) error {
	for deadline := time.Now().Add(c.Settle); ; {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL+"/", http.NoBody)
		if err != nil {
			return err
		}
		resp, err := c.HTTP.Do(req)
		if err == nil {
			return resp.Body.Close()
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

type report func(invariant string, object any, format string, args ...any)

// settle asks until the answer is what the record says, or the time for that is over. Good for a revocation that was acknowledged is wrong at once.
func (c *check) settle(ctx context.Context, k key, r Responder, violate report) {
	want := "good"
	if c.certs[k].abandoned || c.events[k].revoked() {
		want = "revoked"
	}
	deadline := time.Now().Add(c.Settle)
	for {
		got, err := c.ask(ctx, k, r)
		if err == nil && got == want {
			return
		}
		if got == "good" && c.events[k].revoked() && c.events[k].acked {
			violate("I4", k, "says good although its revocation was acknowledged")
			return
		}
		if got == "revoked" && c.revokedSince(ctx, k) {
			return
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			switch {
			case err != nil:
				violate("I6", k, "no true answer: %v", err)
			case want == "revoked":
				violate("I4", k, "says %s, the record says revoked", got)
			default:
				violate("I3", k, "says %s, the record says good", got)
			}
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// revokedSince looks whether a certificate was revoked after the record was read: the cluster goes on while it is checked.
func (c *check) revokedSince(ctx context.Context, k key) bool {
	newest := ""
	_, err := c.Store.Read(ctx, "fsck", "", func(ctx context.Context, conn *sql.Conn) error {
		err := conn.QueryRowContext(ctx, `SELECT event FROM revocation WHERE issuer = ? AND serial = ? ORDER BY n DESC LIMIT 1`,
			[]byte(k.issuer), []byte(k.serial)).Scan(&newest)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		return err
	})
	return err == nil && event{event: newest}.revoked()
}

// unknown asks about serials that nobody issued.
func (c *check) unknown(ctx context.Context, issuer string, r Responder, violate report) {
	for range 3 {
		serial := make([]byte, 20)
		if _, err := crand.Read(serial); err != nil {
			violate("I3", issuer, "no randomness for a serial: %v", err)
			return
		}
		serial[0] = 1 // of a time long gone
		k := key{issuer, string(serial)}
		if got, err := c.ask(ctx, k, r); err == nil && got != "unknown" {
			violate("I3", k, "says %s about a serial that nobody issued", got)
		}
	}
}

// ask puts one question and verifies the answer. An error is also an answer without a status (tryLater, unauthorized).
func (c *check) ask(ctx context.Context, k key, r Responder) (string, error) {
	issuer := c.generations[k.issuer]
	if issuer == nil {
		return "", fmt.Errorf("its issuer %s is not known", k.issuer)
	}
	question, err := certID(issuer, k.serial)
	if err != nil {
		return "", err
	}
	body, err := c.fetch(ctx, http.MethodPost, r.URL+"/ocsp", "application/ocsp-request", question)
	if err != nil {
		return "", err
	}
	answer, err := ocsp.ParseResponse(body, issuer)
	if err != nil {
		return "", err
	}
	if answer.SerialNumber.Cmp(new(big.Int).SetBytes([]byte(k.serial))) != 0 {
		return "", errors.New("it answered for another certificate")
	}
	if now := c.Now(); now.After(answer.NextUpdate) || now.Before(answer.ThisUpdate) {
		return "", fmt.Errorf("its answer is valid from %s to %s", answer.ThisUpdate.Format(time.RFC3339), answer.NextUpdate.Format(time.RFC3339))
	}
	switch answer.Status {
	case ocsp.Good:
		return "good", nil
	case ocsp.Revoked:
		return "revoked", nil
	}
	return "unknown", nil
}

// certID encodes an OCSP request for a serial under an issuer, SHA-1 as most clients send it.
func certID(issuer *x509.Certificate, serial string) ([]byte, error) {
	var spki struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(issuer.RawSubjectPublicKeyInfo, &spki); err != nil {
		return nil, fmt.Errorf("parsing the issuer's key: %w", err)
	}
	name, pub := sha1.Sum(issuer.RawSubject), sha1.Sum(spki.Key.RightAlign())
	return (&ocsp.Request{HashAlgorithm: crypto.SHA1, IssuerNameHash: name[:], IssuerKeyHash: pub[:], SerialNumber: new(big.Int).SetBytes([]byte(serial))}).Marshal()
}

// servedCRL fetches the newest CRL of an issuer until every revocation stands on it, for as long as a CRL may take.
func (c *check) servedCRL(ctx context.Context, issuer string, r Responder, violate report) {
	deadline := time.Now().Add(c.CRLDelay)
	for {
		der, err := c.fetch(ctx, http.MethodGet, r.URL+"/crl/"+issuer+".crl", "", nil)
		var missing []key
		if err == nil {
			missing, err = c.onCRL(issuer, der)
		}
		if err == nil && len(missing) == 0 {
			return
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			if err != nil {
				violate("I6", issuer+" CRL", "no true CRL: %v", err)
			}
			for _, k := range missing {
				violate("I4", k, "its revocation of %s is not on the CRL", c.events[k].created.UTC().Format(time.RFC3339))
			}
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(250 * time.Millisecond):
		}
	}
}

func (c *check) fetch(ctx context.Context, method, url, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return nil, fmt.Errorf("reading the answer of %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %s", url, resp.Status)
	}
	return got, nil
}
