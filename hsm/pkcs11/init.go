package pkcs11

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// PINPath says where a PIN named in a configuration lives: a path with a directory in it is itself; a bare name is the
// systemd credential of that name when the process has credentials, else a file beside the working directory.
func PINPath(name string) string {
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" && name == filepath.Base(name) {
		return filepath.Join(dir, name)
	}
	return name
}

// ReadPIN reads a PIN from a file (see PINPath) that others than owner and group cannot read.
func ReadPIN(name string) (string, error) {
	path := PINPath(name)
	f, err := os.Open(path)
	if err != nil {
		return "", hsm.Errorf(hsm.ClassRequest, "pin", "reading the PIN: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", hsm.Errorf(hsm.ClassRequest, "pin", "reading the PIN: %w", err)
	}
	if st.Mode().Perm()&0o007 != 0 {
		return "", hsm.Errorf(hsm.ClassRequest, "pin", "PIN file %s is open to everybody (mode %04o): chmod it 0600", path, st.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, 257))
	if err != nil {
		return "", hsm.Errorf(hsm.ClassRequest, "pin", "reading the PIN: %w", err)
	}
	pin := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if pin == "" || len(b) > 256 || strings.ContainsAny(pin, "\x00\n") {
		return "", hsm.Errorf(hsm.ClassRequest, "pin", "PIN file %s must hold one non-empty line of at most 255 octets", path)
	}
	return pin, nil
}

// InitConfig says which token to make.
type InitConfig struct {
	Module, TokenLabel string
	// PINFile and SOPINFile hold the PINs the token is to have. A module without security officer needs no SOPINFile.
	PINFile, SOPINFile string
	// Profile and Dir are as in Config. Dir is made if it does not exist.
	Profile, Dir string
}

// Init makes a token of that label in a slot whose token is still blank, and sets its user PIN. It tells whether it did
// anything: an initialised token keeps everything it has, so that repeating Init is harmless and no key can be lost.
func Init(cfg InitConfig) (made bool, err error) {
	const op = "init-token"
	if cfg.TokenLabel == "" || len(cfg.TokenLabel) > 32 {
		return false, hsm.Errorf(hsm.ClassRequest, op, "token label %q must have 1 to 32 octets", cfg.TokenLabel)
	}
	pin, err := ReadPIN(cfg.PINFile)
	if err != nil {
		return false, err
	}
	if cfg.Dir != "" {
		if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
			return false, hsm.Errorf(hsm.ClassRequest, op, "making the token's directory: %w", err)
		}
	}
	m, err := load(moduleConfig{cfg.Module, cfg.Profile, cfg.Dir, cfg.TokenLabel})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	soPIN := ""
	if !m.profile.EmptySO {
		if soPIN, err = ReadPIN(cfg.SOPINFile); err != nil {
			return false, err
		}
	}
	slot, info, err := m.tokenCalled(cfg.TokenLabel)
	switch {
	case err == nil && info.Flags&p11.CKF_USER_PIN_INITIALIZED != 0:
		return false, nil
	case err == nil: // a token without security officer, or a run before this one died between its two steps
	case hsm.ClassOf(err) == hsm.ClassNotFound && !m.profile.EmptySO:
		if slot, err = m.blankSlot(); err != nil {
			return false, err
		}
		if err := m.InitToken(slot, soPIN, cfg.TokenLabel); err != nil {
			return false, classify(op, fmt.Errorf("initialising the token: %w", err))
		}
	default:
		return false, err
	}
	session, err := m.OpenSession(slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		return false, classify(op, err)
	}
	defer func() { err = errors.Join(err, classify(op, m.CloseSession(session))) }()
	if err := m.Login(session, p11.CKU_SO, soPIN); err != nil {
		return false, classify(op, fmt.Errorf("logging in as security officer: %w", err))
	}
	if err := m.InitPIN(session, pin); err != nil {
		return false, classify(op, fmt.Errorf("setting the user PIN: %w", err))
	}
	return true, classify(op, m.Logout(session))
}

// blankSlot finds a token that nobody has initialised.
func (m *module) blankSlot() (uint, error) {
	slots, err := m.GetSlotList(true)
	if err != nil {
		return 0, classify("init-token", err)
	}
	for _, s := range slots {
		info, err := m.GetTokenInfo(s)
		if err != nil {
			return 0, classify("init-token", err)
		}
		if info.Flags&p11.CKF_TOKEN_INITIALIZED == 0 {
			return s, nil
		}
	}
	return 0, hsm.Errorf(hsm.ClassNotFound, "init-token", "none of %d slots holds a blank token; initialised ones are never touched", len(slots))
}
