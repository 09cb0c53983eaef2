package problem_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"testing"

	"trivet/problem"
)

func TestWriteSendsTheWholeResponse(t *testing.T) {
	p := problem.New(503, "database-unavailable", "the record cannot be written: try again")
	p.RetryAfter, p.Cause = 2, "no node is primary"
	w := httptest.NewRecorder()
	w.Header().Set("X-Request-Id", "r1")
	problem.Write(w, p)
	for k, want := range map[string]string{"Content-Type": "application/problem+json", "Retry-After": "2", "Cache-Control": "no-store",
		"Content-Length": fmt.Sprint(w.Body.Len())} {
		if got := w.Header().Get(k); got != want {
			t.Errorf("%s: %q, want %q", k, got, want)
		}
	}
	var got map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"type": "urn:trivet:problem:database-unavailable", "title": "Database unavailable", "status": 503.0,
		"detail": "the record cannot be written: try again", "request_id": "r1", "retry_after": 2.0, "cause": "no node is primary"}
	if fmt.Sprint(got) != fmt.Sprint(want) || w.Code != 503 {
		t.Errorf("%d %v, want %v", w.Code, got, want)
	}
	if p.RequestID != "" {
		t.Error("the problem was changed; it may be shared")
	}
}

func TestImpossibleStatusBecomes500(t *testing.T) {
	w := httptest.NewRecorder()
	problem.Write(w, problem.New(0, "x", ""))
	if w.Code != 500 {
		t.Error(w.Code)
	}
}

func TestProblemIsFoundInAChainOfErrors(t *testing.T) {
	err := fmt.Errorf("issuing: %w", problem.New(422, "weak-key", "RSA 1024"))
	var p *problem.Problem
	if !errors.As(err, &p) || p.Name() != "weak-key" || err.Error() != "issuing: weak-key: RSA 1024" {
		t.Error(err)
	}
}
