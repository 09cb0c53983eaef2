package agent

// Attest and Attested are the two ends of a transport key's way; Decode is the parser of request bodies.
var (
	Attest   = attest
	Attested = attested
	Decode   = decode
)

// SignRequest is a body.
type SignRequest = signRequest
