// Package problem is the error body of every HTTP interface of Trivet: RFC 9457 problem details with a stable type.
package problem

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// Prefix begins the type of every problem.
const Prefix = "urn:trivet:problem:"

// ContentType is the media type of a problem body (RFC 9457 §3).
const ContentType = "application/problem+json"

// Problem is one error as told to a client. It holds no stack, no secret and no name of another client's object.
// A Problem is an error, so that inner layers can return it and the HTTP layer find it with errors.As.
type Problem struct {
	Type       string `json:"type"`                  // Prefix + name; stable, meant for programs
	Title      string `json:"title"`                 // the same for every occurrence of the type
	Status     int    `json:"status"`                // HTTP status
	Detail     string `json:"detail,omitempty"`      // what happened here and what to do
	Field      string `json:"field,omitempty"`       // the request's field to blame, if one is
	RequestID  string `json:"request_id,omitempty"`  // as in X-Request-Id
	RetryAfter int    `json:"retry_after,omitempty"` // seconds; 0 means that no Retry-After is sent
	Cause      string `json:"cause,omitempty"`       // why a capability is missing, in the words of the health reports
}

// New returns a problem of type Prefix+name whose title is the name in words.
func New(status int, name, detail string) *Problem {
	return &Problem{Type: Prefix + name, Title: title(name), Status: status, Detail: detail}
}

// Name returns the type without its prefix, such as "not-found".
func (p *Problem) Name() string { return strings.TrimPrefix(p.Type, Prefix) }

// Error states name, detail and cause in one line.
func (p *Problem) Error() string {
	s := p.Name()
	if p.Detail != "" {
		s += ": " + p.Detail
	}
	if p.Field != "" {
		s += fmt.Sprintf(" (field %s)", p.Field)
	}
	if p.Cause != "" {
		s += fmt.Sprintf(" (cause: %s)", p.Cause)
	}
	return s
}

// Write sends p as the whole response: application/problem+json, never cached, with Retry-After if p has one.
// An empty RequestID is taken from the X-Request-Id already set on the response. p itself is not changed.
func Write(w http.ResponseWriter, p *Problem) {
	out := *p
	h := w.Header()
	if out.RequestID == "" {
		out.RequestID = h.Get("X-Request-Id")
	}
	if out.Status < 400 || out.Status > 599 {
		out.Status = http.StatusInternalServerError
	}
	body, err := json.Marshal(out)
	if err != nil { // strings and ints always marshal; kept so that a future field cannot send an empty body
		body = []byte(`{"type":"about:blank","status":500}`)
	}
	body = append(body, '\n')
	h.Set("Content-Type", ContentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if out.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(out.RetryAfter))
	}
	w.WriteHeader(out.Status)
	_, _ = w.Write(body) // the client is gone when this fails: nobody is left to tell
}

func title(name string) string {
	words := strings.Split(name, "-")
	for i, word := range words {
		switch {
		case word == "ca", word == "csr", word == "hsm":
			words[i] = strings.ToUpper(word)
		case i == 0 && word != "":
			words[i] = strings.ToUpper(word[:1]) + word[1:]
		}
	}
	return strings.Join(words, " ")
}
