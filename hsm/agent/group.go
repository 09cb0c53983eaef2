package agent

import (
	"cmp"

	"trivet/hsm"
	"trivet/identity"
)

// A token belongs to the group whose domain key it holds: the key's name says which (hsm.DomainGroup). What an approval says
// of one group must not be used in another by whoever carries it, and no token is in two groups: whoever breaks into one
// would have the keys of both. A token without a domain key belongs to nobody yet, and one whose domain key does not name its
// group takes the caller's word.

// own refuses what is meant for another group than the token's, and records that somebody tried.
func (s *Server) own(by identity.Principal, op, object string, t Token, group string) error {
	current, next := t.Domains()
	mine := cmp.Or(hsm.DomainGroup(current), hsm.DomainGroup(next)) // empty: nobody's
	if mine == "" || mine == group {
		return nil
	}
	err := hsm.Errorf(hsm.ClassDenied, op, "this token belongs to group %q, by its domain key %q, and this is for group %q: a token is in one group; initialise it before it joins another",
		mine, cmp.Or(current, next), group)
	return s.refused(by, op, object, err)
}
