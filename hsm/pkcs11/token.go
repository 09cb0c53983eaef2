// Package pkcs11 is one token behind a PKCS#11 module. One process holds one token, and one token is held by one process:
// SoftHSM corrupts tokens that several processes share, and a session once lost is lost for every handle in use, so that
// the cure for session and device errors is the end of the process.
package pkcs11

import (
	"errors"
	"io"
	"log/slog"
	"slices"
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
	// PIN, unless empty, is used instead of PINFile's.
	PIN string
	// Profile names one of Profiles; empty means that the module is asked.
	Profile string
	// Dir is the token's directory, for modules that must be told it when they are initialised (NSS).
	Dir string
	// Member is the member's name: the token's transport key is named after it.
	Member string
	// Test admits a module that does not keep non-extractable keys inside: for interoperability tests, never for real keys.
	Test bool
	// MaxSessions bounds the sessions that sign at the same time; 0 means 16. Two more are opened for management.
	MaxSessions int
	// PoolWait bounds the wait for a free session; 0 means 10 s.
	PoolWait time.Duration
	// Log receives what the token does by itself: the test signature over each key that comes in or is first used. Nil
	// means silence.
	Log *slog.Logger
}

// Token is an open, logged-in token. It is safe for concurrent use: signatures run in parallel, management calls one
// after the other. No call takes a context because none can be cancelled: whoever needs a deadline gives up waiting
// and ends the process. Errors are *hsm.Error.
type Token struct {
	log   *slog.Logger
	raw   *module
	p11   *crypto11.Context // nil for a module that crypto11 cannot load
	pool  *sessions
	slot  uint
	label string
	// member is the name of this token's member.
	member string
	info   p11.TokenInfo
	probe  hsm.KeyRecord
	// keyWrapPad is the mechanism that SelfTest found to be RFC 5649.
	keyWrapPad uint
	transport  []byte

	// manage serialises everything done with session.
	manage  sync.Mutex
	session p11.SessionHandle
	kept    *domains // the domains, as last read; nil: look

	// making serialises the making and unmaking of signers; copies holds their copies of keys (Profile.SessionCopy).
	making sync.Mutex
	copies p11.SessionHandle

	// mu guards what follows: what the token held when last looked at, and the signers made so far.
	mu      sync.RWMutex
	keys    map[hsm.KeyID]hsm.KeyRecord
	bad     map[hsm.KeyID]string // keys whose test signature was not theirs
	signers map[hsm.KeyID]*signer
	held    map[string]handles // by CKA_ID; nil: not known, see under
	foreign int
	// strangers are the fingerprints of other members' transport keys, which are among the foreign objects.
	strangers []string
	digest    string // of keys; empty: not computed since they changed
	current   string
	next      string
	epoch     hsm.EpochRecord
}

// Open loads the module, logs in once, makes the token-local probe and transport keys if they are missing, and lets the
// module pass SelfTest. A wrong PIN is ClassPIN and must not be tried again; so is a token that says that the next wrong
// PIN would lock it, which is not tried at all.
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
	if cfg.TokenLabel == "" {
		return nil, hsm.Errorf(hsm.ClassRequest, "open", "no token label given")
	}
	pin := cfg.PIN
	if pin == "" {
		var err error
		if pin, err = ReadPIN(cfg.PINFile); err != nil {
			return nil, err
		}
	}
	t := &Token{
		log: cfg.Log, label: cfg.TokenLabel, member: cfg.Member,
		keys: map[hsm.KeyID]hsm.KeyRecord{}, bad: map[hsm.KeyID]string{}, signers: map[hsm.KeyID]*signer{},
	}
	if err := t.login(cfg, pin); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	if err := t.load(cfg.Test); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// login finds the token and logs in, through crypto11 where it can.
func (t *Token) login(cfg Config, pin string) (err error) {
	which := moduleConfig{cfg.Module, cfg.Profile, cfg.Dir, cfg.TokenLabel}
	if t.raw, err = load(which); err != nil {
		return err
	}
	if t.slot, t.info, err = t.raw.usableToken(cfg.TokenLabel); err != nil {
		return err
	}
	if !t.raw.profile.Directory {
		// crypto11 insists on initialising the module itself; afterwards both share it, and the login.
		which.profile = t.raw.profile.Name
		if err := t.raw.close(); err != nil {
			return err
		}
		t.raw = nil
		number := int(t.slot)
		if t.p11, err = crypto11.Configure(&crypto11.Config{
			Path: cfg.Module, SlotNumber: &number, Pin: pin, MaxSessions: cfg.MaxSessions + 2, PoolWaitTimeout: cfg.PoolWait,
		}); err != nil {
			return classify("login", err)
		}
		if t.raw, err = load(which); err != nil {
			return err
		}
	}
	t.pool = newSessions(t.raw.Ctx, t.slot, cfg.MaxSessions, cfg.PoolWait)
	for _, s := range []*p11.SessionHandle{&t.session, &t.copies} {
		if *s, err = t.raw.OpenSession(t.slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION); err != nil {
			return classify("open", err)
		}
	}
	if t.p11 == nil {
		return classify("login", t.raw.Login(t.session, p11.CKU_USER, pin))
	}
	return nil
}

// load reads the token and completes what it must hold.
func (t *Token) load(test bool) error {
	if err := t.requireMechanisms(); err != nil {
		return err
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	var err error
	if t.transport, err = t.ensureTransport(); err != nil {
		return err
	}
	if t.keyWrapPad, err = t.selfTest(test); err != nil {
		return err
	}
	if _, err := t.inventory(); err != nil {
		return err
	}
	if err := t.readDomains(); err != nil {
		return err
	}
	if err := t.readEpoch(); err != nil {
		return err
	}
	if err := t.lookAtPIN(); err != nil { // the login has changed what it says
		return err
	}
	return t.ensureProbe()
}

// requireMechanisms refuses a module that could not do its part later, in the middle of an enrolment.
func (t *Token) requireMechanisms() error {
	for _, m := range []struct {
		kind uint
		name string
		uses uint
	}{
		{p11.CKM_ECDSA, "CKM_ECDSA", p11.CKF_SIGN}, {p11.CKM_EC_KEY_PAIR_GEN, "CKM_EC_KEY_PAIR_GEN", p11.CKF_GENERATE_KEY_PAIR},
		{p11.CKM_RSA_PKCS, "CKM_RSA_PKCS", p11.CKF_SIGN}, {p11.CKM_RSA_PKCS_KEY_PAIR_GEN, "CKM_RSA_PKCS_KEY_PAIR_GEN", p11.CKF_GENERATE_KEY_PAIR},
		{p11.CKM_RSA_PKCS_OAEP, "CKM_RSA_PKCS_OAEP", p11.CKF_WRAP | p11.CKF_UNWRAP}, {p11.CKM_SHA256_HMAC, "CKM_SHA256_HMAC", p11.CKF_SIGN},
	} {
		if !t.raw.offers(t.slot, m.kind, m.uses) {
			return hsm.Errorf(hsm.ClassDevice, "open", "token %s does not offer %s as it is needed here", t.label, m.name)
		}
	}
	return nil
}

// Close logs out and unloads the module. It waits for running calls, so it must not be called once one hangs.
func (t *Token) Close() error {
	switch {
	case t.p11 != nil:
		err := classify("close", t.p11.Close()) // finalises the module, and with it every session
		if t.raw != nil {
			t.raw.unload()
		}
		return err
	case t.raw != nil:
		return t.raw.close()
	}
	return nil
}

// Info fills in what the token knows of hsm.Info, without asking the module.
func (t *Token) Info() hsm.Info {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := hsm.Info{
		TokenSerial: t.info.SerialNumber, TokenLabel: t.label, Model: strings.TrimSpace(t.info.ManufacturerID + " " + t.info.Model),
		KEK: t.current, NextKEK: t.next, Transport: hsm.Fingerprint(t.transport), Foreign: t.foreign,
		Strangers: slices.Clone(t.strangers), PIN: hsm.PIN{Warning: pinWarning(t.info.Flags)},
	}
	list := make([]hsm.KeyRecord, 0, len(t.keys))
	for _, k := range t.keys {
		switch {
		case k.Fault != "":
			out.Faulty++
		case k.Purpose != hsm.PurposeProbe:
			out.Keys++
		}
		if t.digest == "" {
			list = append(list, k)
		}
	}
	if t.digest == "" {
		t.digest = hsm.InventoryDigest(list)
	}
	out.Digest = t.digest
	return out
}

// Domains names the current domain key and the next one, empty where there is none, without asking the module.
func (t *Token) Domains() (current, next string) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.current, t.next
}

// Probe is the token-local key that the agent signs its test values with.
func (t *Token) Probe() hsm.KeyRecord { return t.probe }

// Key is the record of a key as last seen, without asking the token. ClassNotFound when it is absent, foreign or faulty.
func (t *Token) Key(id hsm.KeyID) (hsm.KeyRecord, error) {
	t.mu.RLock()
	k, ok := t.keys[id]
	t.mu.RUnlock()
	switch {
	case !ok:
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassNotFound, "find", "token %s holds no key %.40s", t.label, id)
	case k.Fault != "":
		return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassNotFound, "find", "key %s in token %s is unusable: %s", id, t.label, k.Fault)
	}
	return k, nil
}

// learn enters a record into what Key and Info answer from.
func (t *Token) learn(k hsm.KeyRecord) hsm.KeyRecord {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys[k.ID], t.digest = k, ""
	delete(t.bad, k.ID)
	return k
}

// forget takes a key and its signer out of memory, and waits for the signatures that are being made with it.
func (t *Token) forget(id hsm.KeyID) {
	t.making.Lock()
	defer t.making.Unlock()
	t.mu.Lock()
	delete(t.keys, id)
	delete(t.bad, id)
	t.digest = ""
	t.mu.Unlock()
	t.unmake(id)
}

// unmake removes a key's signer. The caller holds making.
func (t *Token) unmake(id hsm.KeyID) {
	t.mu.Lock()
	s := t.signers[id]
	delete(t.signers, id)
	t.mu.Unlock()
	if s != nil {
		t.retire(s)
	}
}

var _ io.Closer = (*Token)(nil)
