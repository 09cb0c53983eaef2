package load

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"trivet/load/history"
)

// failed is how an operation returned that got no certificate, or no answer that says what became of it.
func failed(err error) history.Event {
	e := history.Event{Outcome: history.Unknown, Problem: err.Error()}
	var s *StatusError
	if errors.As(err, &s) {
		e.Status = s.Status
		if s.Type != "" {
			e.Problem = s.Type
		}
		// These judge the request. Others judge the way it came, or name a time to come again: by another way, or later, it may be granted.
		if slices.Contains([]int{http.StatusBadRequest, http.StatusConflict, http.StatusUnprocessableEntity}, s.Status) && s.RetryAfter == "" {
			e.Outcome = history.Failed
		}
	}
	return e
}

// Show gets a certificate by its id and returns its DER.
func (s *Issuer) Show(ctx context.Context, id string) ([]byte, error) {
	req, err := http.NewRequest(http.MethodGet, s.URL+"/v1/certificates/"+id, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/pkix-cert")
	begun := s.History.Begin(history.Event{Kind: history.Get, Client: s.Principal, Node: s.URL, Object: id})
	der, err := body(ctx, s.Client, req)
	if err == nil {
		_, err = x509.ParseCertificate(der)
	}
	if err != nil {
		e := failed(err)
		e.Outcome = history.Failed // a look changes nothing
		begun.End(e)
		return nil, err
	}
	begun.End(history.Event{Outcome: history.OK, Status: http.StatusOK, Bytes: der})
	return der, nil
}

// Revoke revokes a certificate by its id. It tells whether the revocation is effective (200), or only on record (202).
func (s *Issuer) Revoke(ctx context.Context, id, reason string) (effective bool, err error) {
	text, err := json.Marshal(map[string]string{"reason": reason})
	if err != nil {
		return false, err
	}
	req, err := http.NewRequest(http.MethodPost, s.URL+"/v1/certificates/"+id+"/revoke", bytes.NewReader(text))
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/json")
	begun := s.History.Begin(history.Event{Kind: history.Revoke, Client: s.Principal, Node: s.URL, Object: id})
	resp, answer, err := do(ctx, s.Client, req)
	if err == nil && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusAccepted {
		err = statusError(resp, answer)
	}
	if err != nil {
		begun.End(failed(err))
		return false, err
	}
	effective = resp.StatusCode == http.StatusOK
	how := history.Recorded
	if effective {
		how = history.Effective
	}
	begun.End(history.Event{Outcome: history.OK, Status: resp.StatusCode, Answer: how})
	return effective, nil
}

// Lists fetches the CRL of one issuer from one responder, asked directly: that CRL numbers rise is the promise of a node.
type Lists struct {
	URL        string // of the CRL
	Client     *http.Client
	Issuer     *x509.Certificate
	Generation string       // the issuer as ids of certificates have it: "demo-g1"
	History    *history.Log // if set, is told of every fetch
}

// Op fetches once; the CRL must verify and be current.
func (s *Lists) Op(ctx context.Context, _ int) error {
	begun := s.History.Begin(history.Event{Kind: history.CRL, Node: s.URL, Object: s.Generation})
	der, err := s.fetch(ctx)
	if err != nil {
		e := failed(err)
		e.Outcome = history.Failed
		begun.End(e)
		return err
	}
	begun.End(history.Event{Outcome: history.OK, Status: http.StatusOK, Bytes: der})
	return nil
}

func (s *Lists) fetch(ctx context.Context) ([]byte, error) {
	req, err := http.NewRequest(http.MethodGet, s.URL, nil)
	if err != nil {
		return nil, err
	}
	der, err := body(ctx, s.Client, req)
	if err != nil {
		return nil, err
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("reading a CRL: %w", err)
	}
	if err := list.CheckSignatureFrom(s.Issuer); err != nil {
		return nil, fmt.Errorf("verifying a CRL: %w", err)
	}
	if now := time.Now(); now.After(list.NextUpdate) {
		return nil, fmt.Errorf("verifying a CRL: nextUpdate %v has passed", list.NextUpdate)
	}
	return der, nil
}

// body is the body of an answer with status 200.
func body(ctx context.Context, client *http.Client, req *http.Request) ([]byte, error) {
	resp, answer, err := do(ctx, client, req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, statusError(resp, answer)
	}
	return answer, nil
}
