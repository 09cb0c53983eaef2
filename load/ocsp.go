package load

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/load/history"
)

// Responder asks an OCSP responder for the status of certificates, one per Op, and verifies every answer. It is safe
// for concurrent use; its fields are not changed once it is in use.
type Responder struct {
	// URL is what certificates name as their responder, such as http://127.77.5.1:8080/ocsp/demo.
	URL    string
	Client *http.Client
	// Issuer is the CA of all certificates asked for.
	Issuer *x509.Certificate
	// Pick is the certificate to ask for in the i-th request.
	Pick func(i int) *x509.Certificate
	// GET sends the request in the path (RFC 6960 A.1) instead of a POST body.
	GET bool
	// Want, if set, says what is wrong with a verified answer: its status, its times. Without it Good is demanded.
	Want func(i int, cert *x509.Certificate, answer *ocsp.Response) error
	// History, if set, is told of every question and its answer. Generation is the issuer as ids of certificates have it: "demo-g1".
	History    *history.Log
	Generation string
	// Now is nil for time.Now.
	Now func() time.Time
}

// Op asks once.
func (s *Responder) Op(ctx context.Context, i int) error {
	cert := s.Pick(i)
	answer, err := s.Ask(ctx, cert)
	switch {
	case err != nil:
		return err
	case s.Want != nil:
		return s.Want(i, cert, answer)
	case answer.Status != ocsp.Good:
		return fmt.Errorf("status is %s, not good", StatusName(answer.Status))
	}
	return nil
}

// Ask asks for one certificate and returns the answer if it is about this certificate, current, and signed by the
// issuer or by a responder the issuer delegated (RFC 6960 4.2.2.2).
func (s *Responder) Ask(ctx context.Context, cert *x509.Certificate) (*ocsp.Response, error) {
	begun := s.History.Begin(history.Event{
		Kind: history.Status, Node: s.URL, Object: fmt.Sprintf("%s:%x", s.Generation, cert.SerialNumber.Bytes()),
	})
	answer, err := s.ask(ctx, cert)
	if err != nil {
		e := failed(err)
		e.Outcome = history.Failed // a question changes nothing
		begun.End(e)
		return nil, err
	}
	begun.End(history.Event{Outcome: history.OK, Status: http.StatusOK, Answer: StatusName(answer.Status), Bytes: answer.Raw})
	return answer, nil
}

func (s *Responder) ask(ctx context.Context, cert *x509.Certificate) (*ocsp.Response, error) {
	question, err := ocsp.CreateRequest(cert, s.Issuer, nil)
	if err != nil {
		return nil, fmt.Errorf("making an OCSP request: %w", err)
	}
	req, err := s.request(question)
	if err != nil {
		return nil, err
	}
	resp, body, err := do(ctx, s.Client, req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, statusError(resp, body)
	}
	answer, err := ocsp.ParseResponseForCert(body, cert, s.Issuer)
	if err != nil {
		return nil, fmt.Errorf("verifying OCSP answer: %w", err)
	}
	now := time.Now()
	if s.Now != nil {
		now = s.Now()
	}
	switch by := answer.Certificate; {
	case by != nil && !by.Equal(s.Issuer) && !slices.Contains(by.ExtKeyUsage, x509.ExtKeyUsageOCSPSigning):
		return nil, fmt.Errorf("verifying OCSP answer: its signer %q may not sign OCSP answers", by.Subject)
	case by != nil && (now.Before(by.NotBefore) || now.After(by.NotAfter)):
		return nil, fmt.Errorf("verifying OCSP answer: its signer's certificate is valid from %v to %v", by.NotBefore, by.NotAfter)
	case now.Before(answer.ThisUpdate):
		return nil, fmt.Errorf("verifying OCSP answer: thisUpdate %v is in the future", answer.ThisUpdate)
	case !answer.NextUpdate.IsZero() && !now.Before(answer.NextUpdate):
		return nil, fmt.Errorf("verifying OCSP answer: nextUpdate %v has passed", answer.NextUpdate)
	}
	return answer, nil
}

func (s *Responder) request(question []byte) (*http.Request, error) {
	if s.GET {
		return http.NewRequest(http.MethodGet, strings.TrimSuffix(s.URL, "/")+"/"+url.PathEscape(base64.StdEncoding.EncodeToString(question)), nil)
	}
	req, err := http.NewRequest(http.MethodPost, s.URL, bytes.NewReader(question))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/ocsp-request")
	req.Header["Idempotency-Key"] = nil // sends nothing: a kept connection that the server closes just then is replaced, as for a GET
	return req, nil
}

// StatusName is the name of an OCSP certificate status.
func StatusName(status int) string {
	switch status {
	case ocsp.Good:
		return "good"
	case ocsp.Revoked:
		return "revoked"
	case ocsp.Unknown:
		return "unknown"
	}
	return fmt.Sprintf("%d", status)
}
