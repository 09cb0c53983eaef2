package load

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"

	"trivet/load/history"
)

// PrepareBulk is Prepare for requests that are sent size at a time; each Op is one such batch.
func (s *Issuer) PrepareBulk(batches, size int) (Op, error) {
	bodies := make([][]byte, batches)
	requests := make([]Request, batches*size)
	for b := range bodies {
		for i := range size {
			r, err := s.Request(b*size + i)
			if err != nil {
				return nil, err
			}
			requests[b*size+i] = r
		}
		var err error
		if bodies[b], err = s.bulkBody(requests[b*size : (b+1)*size]); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context, i int) error {
		if i >= batches {
			return fmt.Errorf("only %d batches were prepared", batches)
		}
		return s.sendBulk(ctx, requests[i*size:(i+1)*size], bodies[i])
	}, nil
}

// SendBulk sends several requests at once, each with its key. The error joins those of the requests that got no certificate.
func (s *Issuer) SendBulk(ctx context.Context, requests []Request) error {
	body, err := s.bulkBody(requests)
	if err != nil {
		return err
	}
	return s.sendBulk(ctx, requests, body)
}

func (s *Issuer) bulkBody(requests []Request) ([]byte, error) {
	type item struct {
		Key     string `json:"idempotency_key"`
		Profile string `json:"profile"`
		CA      string `json:"ca,omitempty"`
		CSR     string `json:"csr"`
	}
	items := make([]item, len(requests))
	for i, r := range requests {
		items[i] = item{r.Key, s.Profile, s.CA, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}))}
	}
	return json.Marshal(map[string]any{"requests": items})
}

// sendBulk sends several requests at once and checks that each got its certificate.
func (s *Issuer) sendBulk(ctx context.Context, requests []Request, body []byte) error {
	req, err := http.NewRequest(http.MethodPost, s.URL+"/v1/certificates:batch", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	begun := make([]history.Pending, len(requests))
	for i, r := range requests {
		begun[i] = s.History.Begin(history.Event{Kind: history.Batch, Client: s.Principal, Node: s.URL, Key: r.Key, Name: r.DNS})
	}
	var got struct {
		Results []struct {
			Replayed    bool
			Certificate *issued
			Problem     json.RawMessage
			Status      int
		}
		Chains map[string][]string
	}
	resp, answer, err := do(ctx, s.Client, req)
	switch {
	case err != nil:
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusMultiStatus:
		err = statusError(resp, answer)
	default:
		if err = json.Unmarshal(answer, &got); err == nil && len(got.Results) != len(requests) {
			err = fmt.Errorf("%d results for %d requests", len(got.Results), len(requests))
		}
	}
	if err != nil {
		for _, b := range begun {
			b.End(failed(err))
		}
		return err
	}
	var errs []error
	for i, r := range requests {
		item := got.Results[i]
		if item.Certificate == nil {
			e := &StatusError{Status: item.Status}
			var p struct {
				Type       string
				RetryAfter int `json:"retry_after"`
			}
			if json.Unmarshal(item.Problem, &p) == nil {
				e.Type = p.Type
				if p.RetryAfter > 0 {
					e.RetryAfter = fmt.Sprint(p.RetryAfter)
				}
			}
			begun[i].End(failed(e))
			errs = append(errs, e)
			continue
		}
		item.Certificate.Chain = got.Chains[fmt.Sprintf("%s-g%d", item.Certificate.CA, item.Certificate.Generation)]
		a, err := s.check(r, *item.Certificate)
		if err != nil {
			begun[i].End(failed(err))
			errs = append(errs, fmt.Errorf("status %d, but %w", item.Status, err))
			continue
		}
		begun[i].End(history.Event{Outcome: history.OK, Status: item.Status, Object: a.ID, Replayed: item.Replayed, Bytes: a.DER})
		if s.Recorder != nil {
			s.Recorder.Add(a)
		}
	}
	return errors.Join(errs...)
}
