package api

import (
	"crypto/rand"
	"errors"
	"log/slog"
	"net/http"
	"regexp"
	"runtime/debug"
	"time"

	"github.com/gin-gonic/gin"

	"trivet/ca"
	"trivet/problem"
)

const requestIDHeader = "X-Request-Id"

// statuses maps the name of every error of package ca to its HTTP status (pki-profile §4): the one place that does.
var statuses = map[string]int{
	ca.MalformedRequest: http.StatusBadRequest,
	ca.MalformedCSR:     http.StatusBadRequest,
	ca.BadCSRSignature:  http.StatusBadRequest,

	ca.Forbidden: http.StatusForbidden,
	ca.NotFound:  http.StatusNotFound,

	ca.AmbiguousSerial:   http.StatusConflict,
	ca.AlreadyRevoked:    http.StatusConflict,
	ca.NotOnHold:         http.StatusConflict,
	ca.CANotActive:       http.StatusConflict,
	ca.RequestInProgress: http.StatusConflict,
	ca.RequestAbandoned:  http.StatusConflict,

	ca.TooLarge: http.StatusRequestEntityTooLarge,

	ca.RateLimited: http.StatusTooManyRequests,

	ca.IdempotencyMismatch:   http.StatusUnprocessableEntity,
	ca.WeakKey:               http.StatusUnprocessableEntity,
	ca.BlockedKey:            http.StatusUnprocessableEntity,
	ca.KeyNotPermitted:       http.StatusUnprocessableEntity,
	ca.NameNotPermitted:      http.StatusUnprocessableEntity,
	ca.ExtensionNotPermitted: http.StatusUnprocessableEntity,
	ca.ValidityNotPermitted:  http.StatusUnprocessableEntity,
	ca.ReasonNotPermitted:    http.StatusUnprocessableEntity,
	ca.LintFailed:            http.StatusUnprocessableEntity,

	ca.DatabaseUnavailable: http.StatusServiceUnavailable,
	ca.HSMUnavailable:      http.StatusServiceUnavailable,
	ca.JournalUnavailable:  http.StatusServiceUnavailable,
	ca.OutcomeUnknown:      http.StatusServiceUnavailable,
	ca.Halted:              http.StatusServiceUnavailable,
	ca.Overloaded:          http.StatusServiceUnavailable,
	ca.WrongSite:           http.StatusServiceUnavailable,
}

// toProblem turns any error of a handler into what the client is told. An error that nobody named is an internal one: its text goes to the
// log, not to the client.
func toProblem(err error) *problem.Problem {
	if p := new(problem.Problem); errors.As(err, &p) {
		return p
	}
	var e *ca.Error
	if !errors.As(err, &e) {
		return problem.New(http.StatusInternalServerError, "internal-error", "the node failed on this request; its log holds the cause under the request id")
	}
	status, known := statuses[e.Name]
	if !known {
		status = http.StatusInternalServerError
	}
	p := problem.New(status, e.Name, e.Detail)
	p.Field = e.Field
	if e.RetryAfter > 0 || status == http.StatusServiceUnavailable {
		p.RetryAfter = max(1, int((e.RetryAfter+time.Second-1)/time.Second))
	}
	return p
}

// fail answers with a problem and logs what the client is not told.
func (s *server) fail(c *gin.Context, err error) {
	p := toProblem(err)
	s.logRefusal(c, p, err)
	problem.Write(c.Writer, p)
	c.Abort()
}

func (s *server) logRefusal(c *gin.Context, p *problem.Problem, err error) {
	level := slog.LevelInfo
	if p.Status >= 500 {
		level = slog.LevelWarn
	}
	s.cfg.Log.Log(c.Request.Context(), level, "request refused", "request_id", c.Writer.Header().Get(requestIDHeader), "method", c.Request.Method, "route", c.FullPath(),
		"status", p.Status, "problem", p.Name(), "err", err)
}

var requestIDForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// requestID gives every response the request's id: the caller's, if it is a harmless one, so that the balancer's log and ours agree.
func requestID(c *gin.Context) {
	id := c.Request.Header.Get(requestIDHeader)
	if !requestIDForm.MatchString(id) {
		id = rand.Text()
	}
	c.Header(requestIDHeader, id)
}

// recovered answers a panic with 500: one request's defect must not end the others. The stack goes to the log alone.
func (s *server) recovered(c *gin.Context) {
	defer func() {
		cause := recover()
		if cause == nil {
			return
		}
		if cause == http.ErrAbortHandler {
			panic(cause)
		}
		s.cfg.Log.Error("handler panicked", "request_id", c.Writer.Header().Get(requestIDHeader), "route", c.FullPath(), "panic", cause, "stack", string(debug.Stack()))
		c.Abort()
		if !c.Writer.Written() {
			problem.Write(c.Writer, problem.New(http.StatusInternalServerError, "internal-error", "the node failed on this request; its log holds the cause under the request id"))
		}
	}()
	c.Next()
}
