package hsm

import (
	"errors"
	"fmt"
)

// Class says what the caller should do about an error.
type Class uint8

// The classes. The zero Class is no class: ClassOf returns it for errors that did not come from an HSM.
const (
	// ClassSession: the login or a handle is gone. The member restarts itself; use another one meanwhile.
	ClassSession Class = iota + 1
	// ClassDevice: the device failed, hung, or could not be reached. Use another member.
	ClassDevice
	// ClassRequest: the request itself is at fault; it fails on every member. Do not retry.
	ClassRequest
	// ClassPIN: the PIN was refused or is locked. Never retry; an operator is needed.
	ClassPIN
	// ClassDenied: this caller may not do that. Do not retry.
	ClassDenied
	// ClassNotFound: this member does not hold the key. Another may.
	ClassNotFound
	// ClassOverloaded: the member's queue is full. Use another member, or come back.
	ClassOverloaded
)

var classes = [...]string{"none", "session", "device", "request", "pin", "denied", "not-found", "overloaded"}

// String is the class's stable name, used on the wire and as metric label.
func (c Class) String() string {
	if int(c) < len(classes) {
		return classes[c]
	}
	return classes[0]
}

// ParseClass is the reverse of String; an unknown name is the zero Class.
func ParseClass(s string) Class {
	for i, n := range classes {
		if n == s {
			return Class(i)
		}
	}
	return 0
}

// Error is every error of a token or its agent.
type Error struct {
	Class Class
	// Code is the module's return value (CKR_…), empty when the module was not at fault.
	Code string
	// Op is the operation that failed: sign, import, …
	Op  string
	Err error
}

// Error names operation, class and code before the cause.
func (e *Error) Error() string {
	s := e.Op + ": " + e.Class.String()
	if e.Code != "" {
		s += " (" + e.Code + ")"
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap gives the cause, so that errors.Is finds a context's end behind a ClassDevice.
func (e *Error) Unwrap() error { return e.Err }

// ClassOf is the class of the first *Error in err's chain, or the zero Class.
func ClassOf(err error) Class {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Class
	}
	return 0
}

// Errorf makes an *Error without module code.
func Errorf(c Class, op, format string, args ...any) *Error {
	return &Error{Class: c, Op: op, Err: fmt.Errorf(format, args...)}
}
