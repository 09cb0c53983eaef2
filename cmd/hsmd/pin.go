package main

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"trivet/hsm"
	"trivet/hsm/pkcs11"
)

// pinGuard keeps a supervisor's restarts from using up the token's attempts: once a PIN was refused, the same PIN is
// not tried again. It remembers the PIN by a slow salted hash, because credentials are new files at every start.
type pinGuard struct {
	file, token, marker string
}

// refusal is the marker's content.
type refusal struct {
	Time    time.Time `json:"time"`
	Token   string    `json:"token"`
	PINFile string    `json:"pin_file"`
	Cause   string    `json:"cause"`
	Salt    []byte    `json:"salt"`
	Hash    []byte    `json:"hash"`
}

// errPIN is the end of all attempts: exit code 78 (EX_CONFIG), which supervisors are told not to restart.
var errPIN = errors.New("the token refuses this PIN, and a further attempt could lock it for good: an operator must put the right PIN in place")

func newPINGuard(c *Config) pinGuard {
	return pinGuard{file: c.PINFile, token: c.Token, marker: filepath.Join(c.StateDir, "pin-refused.json")}
}

// open logs in at most once, and never with a PIN that was refused before.
func (g pinGuard) open(cfg pkcs11.Config) (*pkcs11.Token, error) {
	pin, err := pkcs11.ReadPIN(g.file)
	if err != nil {
		return nil, err
	}
	if err := g.check(pin); err != nil {
		return nil, err
	}
	t, err := pkcs11.Open(cfg)
	if hsm.ClassOf(err) != hsm.ClassPIN {
		return t, err
	}
	if e, ok := errors.AsType[*hsm.Error](err); ok && e.Code != "" { // an attempt was made, and used up
		if failed := g.mark(pin, err); failed != nil {
			err = errors.Join(err, failed)
		}
	}
	return nil, fmt.Errorf("%w (token %s, PIN file %s, marker %s): %w", errPIN, g.token, g.file, g.marker, err)
}

// check refuses a PIN that the marker remembers, and forgets a marker made for another. It also makes sure that a
// marker could be written, before an attempt is made that might need one.
func (g pinGuard) check(pin string) error {
	b, err := os.ReadFile(g.marker)
	if errors.Is(err, os.ErrNotExist) {
		f, err := os.CreateTemp(filepath.Dir(g.marker), "writable")
		if err != nil {
			return fmt.Errorf("checking that a refused PIN could be remembered: %w", err)
		}
		return errors.Join(f.Close(), os.Remove(f.Name()))
	}
	if err != nil {
		return fmt.Errorf("reading the refused PIN's marker: %w", err)
	}
	var r refusal
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("%w: marker %s is unreadable: remove it by hand: %w", errPIN, g.marker, err)
	}
	hash, err := slowHash(pin, r.Salt)
	if err != nil {
		return err
	}
	if r.Token == g.token && hmac.Equal(hash, r.Hash) {
		return fmt.Errorf("%w (token %s, PIN file %s; refused at %s: %s; remove %s to try the same PIN again)",
			errPIN, g.token, g.file, r.Time.Format(time.RFC3339), r.Cause, g.marker)
	}
	if err := os.Remove(g.marker); err != nil {
		return fmt.Errorf("forgetting an older refused PIN: %w", err)
	}
	return nil
}

func (g pinGuard) mark(pin string, cause error) error {
	r := refusal{Time: time.Now().UTC(), Token: g.token, PINFile: g.file, Cause: cause.Error(), Salt: make([]byte, 16)}
	_, _ = rand.Read(r.Salt) // documented never to fail
	var err error
	if r.Hash, err = slowHash(pin, r.Salt); err != nil {
		return err
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("remembering the refused PIN: %w", err)
	}
	f, err := os.OpenFile(g.marker, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("remembering the refused PIN: %w", err)
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func slowHash(pin string, salt []byte) ([]byte, error) {
	h, err := pbkdf2.Key(sha256.New, pin, salt, 600_000, 32)
	if err != nil {
		return nil, fmt.Errorf("hashing the PIN: %w", err)
	}
	return h, nil
}
