package api

import (
	"context"
	"fmt"
	"net/http"
	"runtime/debug"
	"sync"

	"github.com/gin-gonic/gin"

	"trivet/identity"
	"trivet/problem"
)

// Bounds of a request for several certificates. The answer stays small enough for the balancer to hold it back until it is complete, so that a
// node's death in the middle stays hidden.
const (
	maxBulk     = 512 << 10 // octets of the body
	maxRequests = 128
)

type bulkBody struct {
	Requests []bulkRequest `json:"requests"`
}

type bulkRequest struct {
	IdempotencyKey string `json:"idempotency_key"`
	issueBody
}

type bulkAnswer struct {
	Results []bulkResult        `json:"results"` // in the order of the requests
	Chains  map[string][]string `json:"chains"`  // PEM, of every generation that issued one of them: what a single answer has as chain
}

// bulkResult is what became of one request: what it would have been answered alone.
type bulkResult struct {
	Status      int              `json:"status"`
	Replayed    bool             `json:"replayed,omitempty"`
	Certificate *certificateJSON `json:"certificate,omitempty"`
	Problem     *problem.Problem `json:"problem,omitempty"`
}

// issueBulk issues several certificates, each under an Idempotency-Key of its own and with an outcome of its own: 200 when every request got its
// certificate, 207 when some did, and the problem itself, with Retry-After, when none did because this node can issue nothing now.
func (s *server) issueBulk(c *gin.Context) {
	if media, p := accepted(c.Request); p != nil || media != mediaJSON {
		if p == nil {
			p = problem.New(http.StatusNotAcceptable, "not-acceptable", "several certificates come as "+mediaJSON)
			p.Field = "Accept"
		}
		s.fail(c, p)
		return
	}
	var body bulkBody
	if p := decodeUpTo(c.Writer, c.Request, &body, maxBulk); p != nil {
		s.fail(c, p)
		return
	}
	if p := body.check(); p != nil {
		s.fail(c, p)
		return
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.IssueTimeout)
	defer cancel()
	answer := bulkAnswer{Results: make([]bulkResult, len(body.Requests)), Chains: map[string][]string{}}
	errs := make([]error, len(body.Requests))
	by := caller(c)
	var wg sync.WaitGroup
	for i := range body.Requests {
		wg.Go(func() { answer.Results[i], errs[i] = s.bulkItem(ctx, by, &body.Requests[i]) })
	}
	wg.Wait()

	status, unavailable := http.StatusOK, 0
	for i, r := range answer.Results {
		switch {
		case r.Certificate != nil:
			issuer := fmt.Sprintf("%s-g%d", r.Certificate.CA, r.Certificate.Generation)
			if _, known := answer.Chains[issuer]; !known {
				answer.Chains[issuer] = s.chainPEM(issuer)
			}
			continue
		case r.Status == http.StatusServiceUnavailable:
			unavailable++
		}
		status = http.StatusMultiStatus
		r.Problem.RequestID = c.Writer.Header().Get(requestIDHeader)
		s.logRefusal(c, r.Problem, errs[i])
	}
	if unavailable == len(answer.Results) {
		s.fail(c, errs[0]) // so that the balancer takes it to another node
		return
	}
	c.Header("Cache-Control", "no-store")
	c.JSON(status, answer)
}

// bulkItem issues for one of several requests. A panic is this request's alone.
func (s *server) bulkItem(ctx context.Context, by identity.Principal, r *bulkRequest) (result bulkResult, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			s.cfg.Log.Error("issuing one of several panicked", "idempotency_key", r.IdempotencyKey, "panic", cause, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", cause)
			result = bulkResult{Problem: toProblem(err)}
		}
		if result.Problem != nil {
			result.Status = result.Problem.Status
		}
	}()
	view, replayed, err := s.issueOne(ctx, r.request(by, r.IdempotencyKey))
	if err != nil {
		return bulkResult{Problem: toProblem(err)}, err
	}
	shown, err := s.view(view)
	if err != nil {
		return bulkResult{Problem: toProblem(err)}, err
	}
	shown.Certificate = encodePEM(view.Outcome.DER)
	return bulkResult{Status: http.StatusCreated, Replayed: replayed, Certificate: shown}, nil
}

func (b *bulkBody) check() *problem.Problem {
	if n := len(b.Requests); n < 1 || n > maxRequests {
		return malformed("requests", fmt.Sprintf("%d are given: want 1 to %d", n, maxRequests))
	}
	keys := make(map[string]bool, len(b.Requests))
	for i := range b.Requests {
		r := &b.Requests[i]
		at := func(field string) string { return fmt.Sprintf("requests[%d].%s", i, field) }
		switch {
		case !validKey(r.IdempotencyKey):
			return malformed(at("idempotency_key"), "want 1 to 255 printable ASCII characters of your own choice, and the same with every repeat of the request")
		case keys[r.IdempotencyKey]:
			return malformed(at("idempotency_key"), "another request of this batch has it too")
		}
		keys[r.IdempotencyKey] = true
		if p := r.issueBody.check(); p != nil {
			p.Field = at(p.Field)
			return p
		}
	}
	return nil
}
