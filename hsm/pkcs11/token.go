// Package pkcs11 is one token behind a PKCS#11 module: crypto11 generates, finds and signs; the module itself (miekg)
// wraps, unwraps, and lists. One process holds one token, and one token is held by one process: SoftHSM corrupts tokens
// that several processes share, and crypto11 never recovers a lost session, so that the cure for session and device
// errors is the end of the process.
package pkcs11

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/ThalesIgnite/crypto11"
	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// Config says which token to open and how.
type Config struct {
	// Module is the path of the PKCS#11 library.
	Module string
	// TokenLabel names the token. Exactly one token may have it.
	TokenLabel string
	// PINFile holds the user PIN; one trailing line end is cut off. It is read once and the PIN is kept nowhere.
	PINFile string
	// MaxSessions bounds the sessions that sign at the same time; 0 means 16. Two more are opened for management.
	MaxSessions int
	// PoolWait bounds the wait for a free session; 0 means 10 s.
	PoolWait time.Duration
	// Log receives what the token does by itself: the test signature over each imported key. Nil means silence.
	Log *slog.Logger
}

// Token is an open, logged-in token. It is safe for concurrent use: signatures run in parallel, management calls one
// after the other. No call takes a context because none can be cancelled: whoever needs a deadline gives up waiting
// and ends the process. Errors are *hsm.Error.
type Token struct {
	log   *slog.Logger
	p11   *crypto11.Context
	raw   *p11.Ctx
	label string
	info  p11.TokenInfo
	probe hsm.KeyRecord

	// manage serialises everything done with session.
	manage  sync.Mutex
	session p11.SessionHandle

	// mu guards what follows: what the token held when last looked at, and the signers found so far.
	mu        sync.RWMutex
	keys      map[hsm.KeyID]hsm.KeyRecord
	signers   map[hsm.KeyID]crypto11.Signer
	domain    string
	transport []byte
}

// Open loads the module, logs in once, and makes the token-local probe and transport keys if they are missing. A wrong
// PIN is ClassPIN and must not be tried again; so is a token that says that the next wrong PIN would lock it, which is
// not tried at all.
func Open(cfg Config) (*Token, error) {
	if cfg.MaxSessions == 0 {
		cfg.MaxSessions = 16
	}
	if cfg.PoolWait == 0 {
		cfg.PoolWait = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	pin, err := ReadPIN(cfg.PINFile)
	if err != nil {
		return nil, err
	}
	slot, err := findToken(cfg.Module, cfg.TokenLabel)
	if err != nil {
		return nil, err
	}
	number := int(slot)
	context, err := crypto11.Configure(&crypto11.Config{
		Path: cfg.Module, SlotNumber: &number, Pin: pin, MaxSessions: cfg.MaxSessions + 2, PoolWaitTimeout: cfg.PoolWait,
	})
	if err != nil {
		return nil, classify("login", err)
	}
	t := &Token{
		log: cfg.Log, p11: context, label: cfg.TokenLabel,
		keys: map[hsm.KeyID]hsm.KeyRecord{}, signers: map[hsm.KeyID]crypto11.Signer{},
	}
	if err := t.load(cfg.Module, slot); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// load opens the management session beside crypto11's (same module, same login), and reads the token.
func (t *Token) load(module string, slot uint) error {
	t.raw = p11.New(module)
	if t.raw == nil {
		return hsm.Errorf(hsm.ClassDevice, "open", "loading module %s a second time failed", module)
	}
	if err := t.raw.Initialize(); err != nil && !is(err, p11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return classify("open", err)
	}
	var err error
	if t.info, err = t.raw.GetTokenInfo(slot); err != nil {
		return classify("open", err)
	}
	if t.session, err = t.raw.OpenSession(slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION); err != nil {
		return classify("open", err)
	}
	if err := t.requireMechanisms(slot); err != nil {
		return err
	}
	if _, err := t.Inventory(); err != nil {
		return err
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	if t.domain, err = t.findDomain(); err != nil {
		return err
	}
	if t.transport, err = t.ensureTransport(); err != nil {
		return err
	}
	return t.ensureProbe()
}

// requireMechanisms refuses a module that could not do its part later, in the middle of an enrolment.
func (t *Token) requireMechanisms(slot uint) error {
	for _, m := range []struct {
		kind uint
		name string
		flag uint
	}{
		{p11.CKM_ECDSA, "CKM_ECDSA", p11.CKF_SIGN}, {p11.CKM_EC_KEY_PAIR_GEN, "CKM_EC_KEY_PAIR_GEN", p11.CKF_GENERATE_KEY_PAIR},
		{p11.CKM_AES_KEY_WRAP_PAD, "CKM_AES_KEY_WRAP_PAD", p11.CKF_WRAP | p11.CKF_UNWRAP}, {p11.CKM_RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP", p11.CKF_UNWRAP},
		{p11.CKM_SHA256_HMAC, "CKM_SHA256_HMAC", p11.CKF_SIGN},
	} {
		info, err := t.raw.GetMechanismInfo(slot, []*p11.Mechanism{p11.NewMechanism(m.kind, nil)})
		if err != nil || info.Flags&m.flag != m.flag {
			return hsm.Errorf(hsm.ClassDevice, "open", "token %s does not offer %s as it is needed here", t.label, m.name)
		}
	}
	return nil
}

// Close logs out and unloads the module. It waits for running calls, so it must not be called once one hangs.
func (t *Token) Close() error {
	err := t.p11.Close() // finalises the module, and with it the management session
	if t.raw != nil {
		t.raw.Destroy()
	}
	if err != nil {
		return classify("close", err)
	}
	return nil
}

// Info fills in what the token knows of hsm.Info: serial, label, model, domain key, number of usable keys.
func (t *Token) Info() hsm.Info {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := 0
	for _, k := range t.keys {
		if !k.Foreign && k.Fault == "" && k.Purpose != hsm.PurposeProbe {
			n++
		}
	}
	return hsm.Info{
		TokenSerial: t.info.SerialNumber, TokenLabel: t.label, Model: strings.TrimSpace(t.info.ManufacturerID + " " + t.info.Model),
		KEK: t.domain, Keys: n,
	}
}

// Probe is the token-local key that the agent signs its test values with.
func (t *Token) Probe() hsm.KeyRecord { return t.probe }

// Key is the record of a key as last seen, without asking the token. ClassNotFound when it is absent, foreign or faulty.
func (t *Token) Key(id hsm.KeyID) (hsm.KeyRecord, error) {
	t.mu.RLock()
	k, ok := t.keys[id]
	t.mu.RUnlock()
	switch {
	case !ok, k.Foreign:
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassNotFound, "find", "token %s holds no key %.40s", t.label, id)
	case k.Fault != "":
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassNotFound, "find", "key %s in token %s is unusable: %s", id, t.label, k.Fault)
	}
	return k, nil
}

// findToken gives the slot of the one initialised token with that label, and refuses one whose PIN has no try to spare.
func findToken(module, label string) (uint, error) {
	if label == "" {
		return 0, hsm.Errorf(hsm.ClassRequest, "open", "no token label given")
	}
	ctx, done, err := loadModule(module)
	if err != nil {
		return 0, err
	}
	defer done()
	slot, info, err := slotOf(ctx, label)
	if err != nil {
		return 0, err
	}
	switch {
	case info.Flags&p11.CKF_USER_PIN_LOCKED != 0:
		return 0, hsm.Errorf(hsm.ClassPIN, "login", "the user PIN of token %s is locked: the security officer must set a new one", label)
	case info.Flags&p11.CKF_USER_PIN_FINAL_TRY != 0:
		return 0, hsm.Errorf(hsm.ClassPIN, "login", "one more wrong PIN locks token %s: an operator must log in by hand once, then restart", label)
	case info.Flags&p11.CKF_USER_PIN_INITIALIZED == 0:
		return 0, hsm.Errorf(hsm.ClassPIN, "login", "token %s has no user PIN yet: run hsmd init-token", label)
	}
	return slot, nil
}

// slotOf finds the initialised token called label.
func slotOf(ctx *p11.Ctx, label string) (uint, p11.TokenInfo, error) {
	slots, err := ctx.GetSlotList(true)
	if err != nil {
		return 0, p11.TokenInfo{}, classify("open", err)
	}
	var slot uint
	var info p11.TokenInfo
	found := 0
	for _, s := range slots {
		i, err := ctx.GetTokenInfo(s)
		if err != nil {
			return 0, info, classify("open", err)
		}
		if i.Label == label && i.Flags&p11.CKF_TOKEN_INITIALIZED != 0 {
			slot, info = s, i
			found++
		}
	}
	switch found {
	case 0:
		return 0, info, hsm.Errorf(hsm.ClassNotFound, "open", "no token is labelled %q in any of %d slots: check the label, or run hsmd init-token", label, len(slots))
	case 1:
		return slot, info, nil
	}
	return 0, info, hsm.Errorf(hsm.ClassRequest, "open", "%d tokens are labelled %q: labels must be unique", found, label)
}

// loadModule loads and initialises the module by itself; done finalises and unloads it again.
func loadModule(module string) (ctx *p11.Ctx, done func(), err error) {
	ctx = p11.New(module)
	if ctx == nil {
		return nil, nil, hsm.Errorf(hsm.ClassDevice, "open", "loading module %s: it is missing or no PKCS#11 library", module)
	}
	if err := ctx.Initialize(); err != nil {
		ctx.Destroy()
		return nil, nil, classify("open", fmt.Errorf("initialising module %s: %w", module, err))
	}
	return ctx, func() { _ = ctx.Finalize(); ctx.Destroy() }, nil
}

// find lists the objects that match.
func (t *Token) find(match ...attribute) (objects []p11.ObjectHandle, err error) {
	if err := t.raw.FindObjectsInit(t.session, template(match)); err != nil {
		return nil, fmt.Errorf("finding objects: %w", err)
	}
	defer func() { err = errors.Join(err, t.raw.FindObjectsFinal(t.session)) }()
	for {
		some, _, err := t.raw.FindObjects(t.session, 100)
		if err != nil {
			return nil, fmt.Errorf("finding objects: %w", err)
		}
		if len(some) == 0 {
			return objects, nil
		}
		objects = append(objects, some...)
	}
}

// read gives the values of attributes that every object of the kind has.
func (t *Token) read(object p11.ObjectHandle, kinds ...uint) ([][]byte, error) {
	ask := make([]*p11.Attribute, len(kinds))
	for i, k := range kinds {
		ask[i] = p11.NewAttribute(k, nil)
	}
	got, err := t.raw.GetAttributeValue(t.session, object, ask)
	if err != nil {
		return nil, fmt.Errorf("reading attributes: %w", err)
	}
	out := make([][]byte, len(got))
	for i, a := range got {
		out[i] = a.Value
	}
	return out, nil
}

var _ io.Closer = (*Token)(nil)
