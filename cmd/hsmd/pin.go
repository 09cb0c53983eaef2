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
	"trivet/hsm/agent"
	"trivet/hsm/pkcs11"
)

// pinGuard keeps a supervisor's restarts, and a person's repetitions, from using up the token's attempts: once a PIN was
// refused, the same PIN is not tried again. It remembers PINs by a slow salted hash, because credentials are new files at
// every start.
type pinGuard struct {
	token, marker string
	// from is where the PIN comes from, for messages.
	from string
}

// refusals is the marker's content: the PINs that the token refused since it last took one.
type refusals struct {
	Token string `json:"token"`
	Salt  []byte `json:"salt"`
	// Refused has the newest last.
	Refused []refusal `json:"refused"`
}

type refusal struct {
	Time  time.Time `json:"time"`
	From  string    `json:"from"`
	Cause string    `json:"cause"`
	Hash  []byte    `json:"hash"`
}

// errPIN is the end of all attempts: exit code 78 (EX_CONFIG), which supervisors are told not to restart.
var errPIN = errors.New("the token refuses this PIN, and a further attempt could lock it for good: an operator must put the right PIN in place")

func newPINGuard(c *Config, from string) pinGuard {
	return pinGuard{token: c.Token, from: from, marker: filepath.Join(c.StateDir, "pin-refused.json")}
}

// open logs in at most once, and never with a PIN that was refused before. A refused PIN is errPIN and ClassPIN.
func (g pinGuard) open(cfg pkcs11.Config, pin string) (*pkcs11.Token, error) {
	before, err := g.read()
	if err != nil {
		return nil, err
	}
	if len(before.Refused) > 0 {
		hash, err := before.hash(pin)
		if err != nil {
			return nil, err
		}
		for _, r := range before.Refused {
			if hmac.Equal(hash, r.Hash) {
				return nil, g.refused("refused at "+r.Time.Format(time.RFC3339)+" and not tried again; remove the marker to try the same PIN again", errors.New(r.Cause))
			}
		}
	}
	cfg.PIN = pin
	t, err := pkcs11.Open(cfg)
	if err == nil {
		return t, g.forget()
	}
	e, ok := errors.AsType[*hsm.Error](err)
	switch {
	case hsm.ClassOf(err) == hsm.ClassPIN && ok && e.Code != "": // an attempt was made, and used up
		err = g.refused("refused now", errors.Join(err, g.remember(before, pin, err)))
	case hsm.ClassOf(err) == hsm.ClassPIN: // the token says that it would take none
		err = g.refused("not tried", err)
	case len(before.Refused) == 0:
		err = errors.Join(err, g.forget())
	}
	return nil, err
}

func (g pinGuard) refused(when string, cause error) error {
	code := ""
	if e, ok := errors.AsType[*hsm.Error](cause); ok {
		code = e.Code
	}
	return &hsm.Error{Class: hsm.ClassPIN, Code: code, Op: "login",
		Err: fmt.Errorf("%w (token %s, PIN from %s, marker %s; %s): %w", errPIN, g.token, g.from, g.marker, when, cause)}
}

// read gives what the marker remembers, and makes sure that it can be written before an attempt is made that might need it.
func (g pinGuard) read() (refusals, error) {
	r := refusals{Token: g.token, Salt: make([]byte, 16)}
	_, _ = rand.Read(r.Salt) // documented never to fail
	b, err := os.ReadFile(g.marker)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if err := g.write(r); err != nil {
			return r, err
		}
		return r, nil
	case err != nil:
		return r, fmt.Errorf("reading the refused PIN's marker: %w", err)
	}
	var known refusals
	if err := json.Unmarshal(b, &known); err != nil || len(known.Salt) < 16 {
		return r, fmt.Errorf("%w: marker %s is unreadable: remove it by hand: %w", errPIN, g.marker, err)
	}
	if known.Token != g.token { // another token's
		return r, nil
	}
	return known, nil
}

// remember enters a PIN among the refused ones.
func (g pinGuard) remember(r refusals, pin string, cause error) error {
	hash, err := r.hash(pin)
	if err != nil {
		return err
	}
	r.Refused = append(r.Refused, refusal{Time: time.Now().UTC(), From: g.from, Cause: cause.Error(), Hash: hash})
	return g.write(r)
}

// forget is for a PIN that was taken: what was refused before it matters no more.
func (g pinGuard) forget() error {
	if err := os.Remove(g.marker); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forgetting refused PINs: %w", err)
	}
	return nil
}

func (g pinGuard) write(r refusals) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = agent.Replace(g.marker, b)
	}
	if err != nil {
		return fmt.Errorf("remembering refused PINs: %w", err)
	}
	return nil
}

func (r refusals) hash(pin string) ([]byte, error) {
	h, err := pbkdf2.Key(sha256.New, pin, r.Salt, 600_000, 32)
	if err != nil {
		return nil, fmt.Errorf("hashing the PIN: %w", err)
	}
	return h, nil
}
