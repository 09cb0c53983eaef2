package db

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/go-sql-driver/mysql"
)

// Class says what an error means for whoever asked: whether the work happened, and what to do.
type Class uint8

const (
	// None: no error, or one that did not come from the database.
	None Class = iota
	// Conflict: rolled back because of somebody else's transaction. Nothing happened; retry.
	Conflict
	// NotReady: no node could do it, or the node asked could not. Nothing happened; retry elsewhere or later.
	NotReady
	// ReadOnly: the node takes no writes (drained, fenced, or at the other site). Nothing happened.
	ReadOnly
	// Duplicate: a key is taken. Compare the row that holds it with your own.
	Duplicate
	// Ambiguous: it may have happened, may not, and may still happen. Only replaying the same rows settles it.
	Ambiguous
	// Fatal: retrying cannot help: a wrong statement, missing rights, a broken invariant.
	Fatal
)

// String returns the class in lower case, as metrics label it.
func (c Class) String() string {
	switch c {
	case None:
		return "none"
	case Conflict:
		return "conflict"
	case NotReady:
		return "not-ready"
	case ReadOnly:
		return "read-only"
	case Duplicate:
		return "duplicate"
	case Ambiguous:
		return "ambiguous"
	case Fatal:
		return "fatal"
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// Error is what every method of Store returns when the database failed it.
type Error struct {
	Class Class
	Op    string // what was asked, a word of a bounded set
	Node  string // host:port of the node last tried, "" if none
	Err   error
}

func (e *Error) Error() string {
	if e.Node == "" {
		return fmt.Sprintf("database: %s: %s: %v", e.Op, e.Class, e.Err)
	}
	return fmt.Sprintf("database: %s on %s: %s: %v", e.Op, e.Node, e.Class, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// ClassOf returns the class of the first *Error in err's chain, None if there is none.
func ClassOf(err error) Class {
	var e *Error
	if errors.As(err, &e) {
		return e.Class
	}
	return None
}

// Server error numbers that this package tells apart.
const (
	errDupEntry  = 1062
	errNoParent  = 1452
	errDeadlock  = 1213
	errSnapshot  = 1020
	errReadOnly1 = 1290
	errReadOnly2 = 1792
	errReadOnly3 = 1836
)

// number returns the server's error number, 0 if err did not come from a server.
func number(err error) uint16 {
	var e *mysql.MySQLError
	if errors.As(err, &e) {
		return e.Number
	}
	return 0
}

// classify judges an error of a statement inside a transaction, of a read, or of connecting. A lost
// connection before COMMIT was sent is a definite failure: the transaction dies with it.
// None means that the error is not the database's.
func classify(err error) Class {
	if c := ClassOf(err); c != None {
		return c // judged already
	}
	switch number(err) {
	case 0:
	case errDeadlock, errSnapshot,
		1205,       // lock wait or causal wait timed out
		1317, 1969: // statement killed
		return Conflict
	case 1047, // not Primary, not ready, or rejecting queries
		1040, 1203, // too many connections
		1053, 1927, // shutting down, connection killed
		1129, 1158, 1159, 1160, 1161, // connection trouble seen by the server
		1180: // the provider failed
		return NotReady
	case errReadOnly1, errReadOnly2, errReadOnly3:
		return ReadOnly
	case errDupEntry, 1586:
		return Duplicate
	default:
		return Fatal
	}
	var ne net.Error
	for _, lost := range []error{driver.ErrBadConn, mysql.ErrInvalidConn, mysql.ErrMalformPkt, mysql.ErrPktSync, mysql.ErrPktSyncMul,
		sql.ErrConnDone, sql.ErrTxDone, io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, lost) {
			return NotReady
		}
	}
	if errors.As(err, &ne) {
		return NotReady
	}
	return None
}

// classifyCommit judges an error of COMMIT. Only what certainly rolled back is anything but Ambiguous:
// even 1047 is not believed, because the write set may have left the node before it lost its peers.
func classifyCommit(err error) Class {
	switch number(err) {
	case errDeadlock, errSnapshot:
		return Conflict // lost certification, or was aborted by an applier
	case errReadOnly1, errReadOnly2, errReadOnly3:
		return ReadOnly
	}
	switch {
	case err == nil:
		return None
	case errors.Is(err, sql.ErrTxDone), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		// database/sql and the driver report these only when they did not send COMMIT; once it
		// is sent, a context that ends closes the socket (see tx.Commit), which is a lost connection.
		return NotReady
	}
	return Ambiguous
}
