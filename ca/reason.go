package ca

import (
	"fmt"

	"trivet/identity"
)

// Reason says why a certificate was revoked: a CRLReason of RFC 5280 §5.3.1, by its number.
type Reason uint8

// Reasons. removeFromCRL (8) is none: it exists on delta CRLs alone. aACompromise (10) is for attribute certificates.
const (
	ReasonUnspecified          Reason = 0
	ReasonKeyCompromise        Reason = 1
	ReasonCACompromise         Reason = 2
	ReasonAffiliationChanged   Reason = 3
	ReasonSuperseded           Reason = 4
	ReasonCessationOfOperation Reason = 5
	ReasonCertificateHold      Reason = 6
	ReasonPrivilegeWithdrawn   Reason = 9
)

var reasonNames = map[Reason]string{
	ReasonUnspecified:          "unspecified",
	ReasonKeyCompromise:        "keyCompromise",
	ReasonCACompromise:         "cACompromise",
	ReasonAffiliationChanged:   "affiliationChanged",
	ReasonSuperseded:           "superseded",
	ReasonCessationOfOperation: "cessationOfOperation",
	ReasonCertificateHold:      "certificateHold",
	ReasonPrivilegeWithdrawn:   "privilegeWithdrawn",
}

// String returns the name of RFC 5280.
func (r Reason) String() string {
	if name, ok := reasonNames[r]; ok {
		return name
	}
	return fmt.Sprintf("reason(%d)", uint8(r))
}

// ParseReason reads a name of RFC 5280, in its spelling; "" is unspecified.
func ParseReason(name string) (Reason, error) {
	if name == "" {
		return ReasonUnspecified, nil
	}
	for r, n := range reasonNames {
		if n == name {
			return r, nil
		}
	}
	return 0, refuse(ReasonNotPermitted, "reason", "%q is no reason for revocation", name)
}

// mayGive tells whether somebody of that role may give the reason for an end-entity certificate of a profile that allows hold or not.
func (r Reason) mayGive(role identity.Role, hold bool) error {
	switch r {
	case ReasonUnspecified, ReasonKeyCompromise, ReasonAffiliationChanged, ReasonSuperseded, ReasonCessationOfOperation:
		return nil
	case ReasonCACompromise:
		return refuse(ReasonNotPermitted, "reason", "%s is for certificates of CAs", r)
	case ReasonPrivilegeWithdrawn, ReasonCertificateHold:
		if role != identity.RoleRA && role != identity.RoleCAOperator {
			return refuse(ReasonNotPermitted, "reason", "%s is for roles ra and ca-operator", r)
		}
		if r == ReasonCertificateHold && !hold {
			return refuse(ReasonNotPermitted, "reason", "the certificate's profile does not allow %s", r)
		}
		return nil
	}
	return refuse(ReasonNotPermitted, "reason", "%s is not permitted", r)
}
