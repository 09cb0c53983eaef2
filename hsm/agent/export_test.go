package agent

import (
	"time"

	"trivet/identity"
)

// Attest and Attested are the two ends of a transport key's way; Decode is the parser of request bodies.
var (
	Attest   = attest
	Attested = attested
	Decode   = decode
)

// Convey and Conveyed are the two ends of a domain key's way.
func Convey(id *identity.Identity, kek, to, from string, wrapped []byte) ([]byte, error) {
	return conveyed{KEK: kek, To: to, Wrapped: wrapped, Origin: origin(from)}.seal(id)
}

func Conveyed(id *identity.Identity, kek string, wrapped []byte, own string, now time.Time) ([]byte, string, error) {
	c, err := openConveyed(id, kek, wrapped, own, now)
	return c.Wrapped, string(c.Origin), err
}
