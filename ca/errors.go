package ca

import (
	"errors"
	"fmt"
	"time"

	"trivet/db"
	"trivet/journal"
)

// Names of the errors of this package, as in the type of an RFC 9457 problem without its prefix. They are stable.
const (
	MalformedRequest      = "malformed-request"
	MalformedCSR          = "malformed-csr"
	BadCSRSignature       = "bad-csr-signature"
	Forbidden             = "forbidden"
	NotFound              = "not-found"
	AmbiguousSerial       = "ambiguous-serial"
	AlreadyRevoked        = "already-revoked"
	NotOnHold             = "not-on-hold"
	CANotActive           = "ca-not-active"
	RequestInProgress     = "request-in-progress"
	RequestAbandoned      = "request-abandoned"
	TooLarge              = "too-large"
	RateLimited           = "rate-limited"
	IdempotencyMismatch   = "idempotency-mismatch"
	WeakKey               = "weak-key"
	BlockedKey            = "blocked-key"
	KeyNotPermitted       = "key-not-permitted"
	NameNotPermitted      = "name-not-permitted"
	ExtensionNotPermitted = "extension-not-permitted"
	ValidityNotPermitted  = "validity-not-permitted"
	ReasonNotPermitted    = "reason-not-permitted"
	LintFailed            = "lint-failed"
	DatabaseUnavailable   = "database-unavailable"
	HSMUnavailable        = "hsm-unavailable"
	JournalUnavailable    = "journal-unavailable"
	OutcomeUnknown        = "outcome-unknown"
	Halted                = "halted"
	Overloaded            = "overloaded"
)

// What Retry-After says: long enough for a database or HSM failover, and long enough for operators.
const (
	retrySoon  = time.Second
	retryLater = 30 * time.Second
)

// Error is a refusal or a failure that a client is told about. Callers find it with errors.As and map Name to a status in one place.
type Error struct {
	Name       string        // one of the names above
	Field      string        // the request's field to blame, such as "csr.subject_alt_name"; empty if none is
	Detail     string        // what happened and what to do; holds nothing secret
	RetryAfter time.Duration // when a repeat may succeed; 0 means that it will not
	Err        error         // the cause, for the log alone; may be nil
}

// Error states name, field, detail and cause in one line.
func (e *Error) Error() string {
	s := e.Name
	if e.Field != "" {
		s += " (" + e.Field + ")"
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Retryable tells whether the same request may succeed later.
func (e *Error) Retryable() bool { return e.RetryAfter > 0 }

// NameOf returns the name of the *Error in err's chain, or "" if there is none.
func NameOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Name
	}
	return ""
}

// refuse is an error that a repeat cannot cure.
func refuse(name, field, format string, args ...any) *Error {
	return &Error{Name: name, Field: field, Detail: fmt.Sprintf(format, args...)}
}

// unavailable is an error that a repeat may cure.
func unavailable(name string, err error, format string, args ...any) *Error {
	return &Error{Name: name, Detail: fmt.Sprintf(format, args...), RetryAfter: retrySoon, Err: err}
}

// JournalError says what a failed append means to a client. A full disk passes only when somebody makes room; after any other failure the process ends,
// and other nodes go on.
func JournalError(err error, format string, args ...any) *Error {
	e := unavailable(JournalUnavailable, err, format, args...)
	if errors.Is(err, journal.ErrFull) {
		e.Detail += "; its disk is full"
		e.RetryAfter = retryLater
	}
	return e
}

// databaseError says what a failed call of db means to a client: an ambiguous one leaves the outcome open, any other did nothing.
func databaseError(doing string, err error) *Error {
	if db.ClassOf(err) == db.Ambiguous {
		return unavailable(OutcomeUnknown, err, "%s: the database's answer was lost; repeat the request with the same Idempotency-Key", doing)
	}
	return unavailable(DatabaseUnavailable, err, "%s: no database node can be used now; repeat the request with the same Idempotency-Key", doing)
}
