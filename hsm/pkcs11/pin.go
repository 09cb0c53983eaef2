package pkcs11

import (
	"crypto/rand"
	"fmt"
	"math/big"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// SetPIN gives the token another user PIN. Sessions stay logged in. An error does not say which of the two the token has now:
// only a login in another process does. A wrong old PIN costs one of the token's attempts.
func (t *Token) SetPIN(from, to string) error {
	t.manage.Lock()
	defer t.manage.Unlock()
	if err := t.raw.SetPIN(t.session, from, to); err != nil {
		return classify("set-pin", fmt.Errorf("giving the token its new PIN: %w", err))
	}
	return nil
}

// PIN lengths: what the agent makes has pinLength characters, fewer where the token wants fewer, and never less than leastPIN.
const (
	pinLength, leastPIN = 32, 12
	pinLetters          = "ABCDEFGHJKLMNPQRSTUVWXYZ"
	pinAlphabet         = pinLetters + "abcdefghijkmnopqrstuvwxyz" + "23456789"
)

// PINLimits is how short and how long a user PIN of this token may be, in octets, as the token says. Zero: it does not say.
func (t *Token) PINLimits() (least, most int) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	least, most = int(t.info.MinPinLen), int(t.info.MaxPinLen)
	if t.info.MaxPinLen > 255 { // also CK_UNAVAILABLE_INFORMATION
		most = 255
	}
	if t.info.MinPinLen > 255 {
		least = 0
	}
	return least, most
}

// RandomPIN draws a PIN that the token takes by its own word: capital and small letters and digits, each at least once, 32 where
// it allows that (186 bits), and never less than 12.
func (t *Token) RandomPIN() (string, error) {
	least, most := t.PINLimits()
	n := max(pinLength, least)
	if most > 0 {
		n = min(n, most)
	}
	if n < leastPIN {
		return "", hsm.Errorf(hsm.ClassRequest, "set-pin", "token %s takes PINs of at most %d octets, too few for one that is drawn: prepare one in a file", t.label, most)
	}
	for {
		pin := make([]byte, n)
		for i := range pin {
			k, err := rand.Int(rand.Reader, big.NewInt(int64(len(pinAlphabet))))
			if err != nil {
				return "", hsm.Errorf(hsm.ClassDevice, "set-pin", "drawing a PIN: %w", err)
			}
			pin[i] = pinAlphabet[k.Int64()]
		}
		s := string(pin)
		if strings.ContainsAny(s, pinLetters) && strings.ContainsAny(s, strings.ToLower(pinLetters)) && strings.ContainsAny(s, "23456789") {
			return s, nil
		}
	}
}

// pinWarning is what the token says of its user PIN that somebody should know; empty when it is well.
func pinWarning(flags uint) string {
	switch {
	case flags&p11.CKF_USER_PIN_LOCKED != 0:
		return "the token says that its user PIN is locked: its agent serves until it ends, and cannot log in again"
	case flags&p11.CKF_USER_PIN_FINAL_TRY != 0:
		return "the token says that one more wrong PIN locks it: somebody has tried wrong ones"
	case flags&p11.CKF_USER_PIN_COUNT_LOW != 0:
		return "the token says that a wrong PIN was tried since the last right one"
	case flags&p11.CKF_USER_PIN_TO_BE_CHANGED != 0:
		return "the token says that its user PIN is to be changed"
	}
	return ""
}

// lookAtPIN asks the token anew what it says of its PIN.
func (t *Token) lookAtPIN() error {
	info, err := t.raw.GetTokenInfo(t.slot)
	if err != nil {
		return classify("count", err)
	}
	t.mu.Lock()
	t.info.Flags = info.Flags
	t.mu.Unlock()
	return nil
}
