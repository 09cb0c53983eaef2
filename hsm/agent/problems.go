package agent

import (
	"errors"
	"net/http"
	"strings"

	"trivet/hsm"
	"trivet/problem"
)

// toProblem is the one place where an error becomes an HTTP answer. Cause carries class and code, so that toError can
// make the same error of it on the other side.
func toProblem(err error) *problem.Problem {
	if m, ok := errors.AsType[*malformed](err); ok {
		if m.status == http.StatusRequestEntityTooLarge {
			return problem.New(m.status, "too-large", "the body is larger than any request here")
		}
		return problem.New(m.status, "malformed-request", m.Error())
	}
	e, ok := errors.AsType[*hsm.Error](err)
	if !ok {
		e = &hsm.Error{Class: hsm.ClassDevice, Err: err}
	}
	p := problem.New(http.StatusServiceUnavailable, "hsm-unavailable", e.Error())
	switch e.Class {
	case hsm.ClassRequest:
		p = problem.New(http.StatusUnprocessableEntity, "request-refused", e.Error())
	case hsm.ClassNotFound:
		p = problem.New(http.StatusNotFound, "not-found", e.Error())
	case hsm.ClassDenied:
		p = problem.New(http.StatusForbidden, "forbidden", e.Error())
	case hsm.ClassOverloaded:
		p = problem.New(http.StatusServiceUnavailable, "overloaded", e.Error())
		p.RetryAfter = 1
	default:
		p.RetryAfter = 1
	}
	p.Cause = strings.TrimSpace(e.Class.String() + " " + e.Code)
	return p
}

// toError is the reverse of toProblem; without a Cause the status decides.
func toError(op string, status int, p problem.Problem) *hsm.Error {
	class, code, _ := strings.Cut(p.Cause, " ")
	e := &hsm.Error{Class: hsm.ParseClass(class), Code: code, Op: op, Err: errors.New(p.Detail)}
	if e.Class != 0 {
		return e
	}
	switch status {
	case http.StatusNotFound:
		e.Class = hsm.ClassNotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		e.Class = hsm.ClassDenied
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity, http.StatusMethodNotAllowed:
		e.Class = hsm.ClassRequest
	default:
		e.Class = hsm.ClassDevice
	}
	return e
}
