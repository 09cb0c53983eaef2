package main

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/pkcs11"
)

// pinFiles changes the PIN of the token that this process has open: the PIN file, and the new PIN's beside it, path.new.
type pinFiles struct {
	path  string
	token *pkcs11.Token
	// mark tells, without keeping the PIN, whether the file still holds the one that the token was opened with.
	key, mark []byte
}

const opPIN = "rotate-pin"

// whyNoPINs says why the agent cannot change the token's PIN, and what to do instead; empty when it can.
func whyNoPINs(cfg *Config) string {
	switch {
	case cfg.Activation == activationManual:
		return "with `activation: manual` a person gives the PIN, and no file here has it. Stop the agent, change the PIN with the vendor's tool, start the agent " +
			"and give it the new one (pkictl hsm activate)"
	case pkcs11.PINPath(cfg.PINFile) != cfg.PINFile:
		return "its PIN is a systemd credential, which no process can replace: make pin_file the path of a file, in a directory that the agent may write. Or stop the agent, " +
			"change the PIN with the vendor's tool, replace the credential and start the agent"
	}
	return ""
}

// newPINFiles is to be called when the token has just been opened with the PIN file's PIN.
func newPINFiles(cfg *Config, token *pkcs11.Token) (*pinFiles, error) {
	p := &pinFiles{path: pkcs11.PINPath(cfg.PINFile), token: token, key: make([]byte, 32)}
	_, _ = rand.Read(p.key) // documented never to fail
	pin, err := pkcs11.ReadPIN(p.path)
	p.mark = p.marked(pin)
	return p, err
}

func (p *pinFiles) marked(pin string) []byte {
	h := hmac.New(sha256.New, p.key)
	h.Write([]byte(pin))
	return h.Sum(nil)
}

func (p *pinFiles) next() string { return p.path + ".new" }

// old is the PIN that the token has, as long as nobody has touched the file: a wrong one would cost an attempt.
func (p *pinFiles) old() (string, error) {
	pin, err := pkcs11.ReadPIN(p.path)
	if err == nil && !hmac.Equal(p.mark, p.marked(pin)) {
		err = hsm.Errorf(hsm.ClassRequest, opPIN, "%s does not hold the PIN any more that the token was opened with: put that one back", p.path)
	}
	return pin, err
}

// Check implements agent.PINs.
func (p *pinFiles) Check(prepared bool) error {
	old, err := p.old()
	if err != nil {
		return err
	}
	if st, err := os.Lstat(p.path); err != nil || !st.Mode().IsRegular() {
		return hsm.Errorf(hsm.ClassRequest, opPIN, "%s is a link, or no file, so that it cannot be replaced: name the file itself in pin_file (%v)", p.path, err)
	}
	probe, err := os.CreateTemp(filepath.Dir(p.path), ".pin-probe-")
	if err != nil {
		return hsm.Errorf(hsm.ClassRequest, opPIN, "the PIN file cannot be replaced: let the agent write its directory: %w", err)
	}
	if err := errors.Join(probe.Close(), os.Remove(probe.Name())); err != nil {
		return hsm.Errorf(hsm.ClassRequest, opPIN, "the PIN file cannot be replaced: %w", err)
	}
	_, err = os.Lstat(p.next())
	switch {
	case errors.Is(err, fs.ErrNotExist) && !prepared:
		_, err := p.token.RandomPIN() // whether the token takes one
		return err
	case errors.Is(err, fs.ErrNotExist):
		return hsm.Errorf(hsm.ClassRequest, opPIN, "there is no prepared PIN: write it to %s, mode 0600, or leave out --prepared", p.next())
	case err != nil:
		return hsm.Errorf(hsm.ClassRequest, opPIN, "looking for a prepared PIN: %w", err)
	case !prepared:
		return hsm.Errorf(hsm.ClassRequest, opPIN, "%s is there: rotate with --prepared to use it, or remove it", p.next())
	}
	pin, err := pkcs11.ReadPIN(p.next())
	if err != nil {
		return err
	}
	least, most := p.token.PINLimits()
	switch {
	case pin == old:
		return hsm.Errorf(hsm.ClassRequest, opPIN, "%s holds the PIN that the token has already", p.next())
	case len(pin) < least, most > 0 && len(pin) > most:
		return hsm.Errorf(hsm.ClassRequest, opPIN, "the prepared PIN's length is not between %d and %d octets, as the token wants it", least, most)
	}
	return nil
}

// Prepare implements agent.PINs.
func (p *pinFiles) Prepare(prepared bool) error {
	if !prepared {
		pin, err := p.token.RandomPIN()
		if err == nil {
			err = agent.Replace(p.next(), []byte(pin+"\n"))
		}
		return err
	}
	f, err := os.OpenFile(p.next(), os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(f.Chmod(0o600), f.Sync(), f.Close(), syncDir(p.path))
	}
	return err
}

// Change implements agent.PINs.
func (p *pinFiles) Change() error {
	from, err := p.old()
	if err != nil {
		return err
	}
	to, err := pkcs11.ReadPIN(p.next())
	if err != nil {
		return err
	}
	return p.token.SetPIN(from, to)
}

// syncDir makes the names in a file's directory durable.
func syncDir(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// settler opens the token at a start, and brings a rotation of its PIN that is under way to its end, whatever point it was
// interrupted at. Of the two PINs each is tried once at most: a refused one is remembered (pinGuard), and after a crash in a
// try the other one comes first, so that no two wrong ones follow each other.
type settler struct {
	cfg   *Config
	state *agent.State
	audit func(agent.Act) error
	self  string
	log   *slog.Logger
}

func (s settler) open() (*pkcs11.Token, error) {
	r := s.state.Rotation()
	if r == nil {
		return login(s.cfg, s.log)
	}
	s.log.Warn("a rotation of the PIN is unfinished; it is settled now", "phase", r.Phase, "began", r.Began)
	switch r.Phase {
	case agent.RotationAsked:
		return s.find(r)
	case agent.RotationTaken:
		if err := s.finish(r); err != nil {
			return nil, err
		}
	case agent.RotationBegun, agent.RotationRefused:
		if err := s.undo(r); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("the agent's state says that a rotation of the PIN is %q, which this program does not know: start the program that wrote it", r.Phase)
	}
	return login(s.cfg, s.log)
}

// find logs in with the new PIN, or else the old one, and so knows which one the token has.
func (s settler) find(r *agent.Rotation) (*pkcs11.Token, error) {
	path := pkcs11.PINPath(s.cfg.PINFile)
	type try struct{ which, from string }
	tries := []try{{"new", path + ".new"}, {"old", path}}
	if r.Tried == "new" {
		tries[0], tries[1] = tries[1], tries[0]
	}
	var refusals []error
	for _, t := range tries {
		pin, err := pkcs11.ReadPIN(t.from)
		if err != nil { // nothing was tried; somebody has taken it away
			refusals = append(refusals, err)
			continue
		}
		if err := s.state.Rotate(time.Now(), func(r *agent.Rotation) { r.Tried = t.which }); err != nil {
			return nil, err
		}
		token, err := newPINGuard(s.cfg, t.from).open(s.cfg.open(s.log), pin)
		if err == nil {
			phase, end := agent.RotationTaken, s.finish
			if t.which == "old" {
				phase, end = agent.RotationRefused, s.undo
			}
			if err = s.state.Rotate(time.Now(), func(r *agent.Rotation) { r.Phase = phase }); err == nil {
				err = end(s.state.Rotation())
			}
			if err != nil {
				return nil, errors.Join(err, token.Close())
			}
			return token, nil
		}
		if !errors.Is(err, errPIN) {
			return nil, err
		}
		refusals = append(refusals, err)
	}
	return nil, fmt.Errorf("a rotation of the PIN is unfinished, and the token takes neither the new PIN (%s.new) nor the old one (%s); no other was tried: %w", path, path, errors.Join(refusals...))
}

// finish puts the new PIN's file in the old one's place, which gives the old PIN up for good.
func (s settler) finish(r *agent.Rotation) error {
	path := pkcs11.PINPath(s.cfg.PINFile)
	syscall.Sync() // a token that is files may not have reached the disk, and would have the old PIN again after a power failure
	err := os.Rename(path+".new", path)
	if errors.Is(err, fs.ErrNotExist) { // done before a crash
		err = nil
	}
	if err == nil {
		err = syncDir(path)
	}
	if err != nil {
		return fmt.Errorf("putting the new PIN's file in place: %w", err)
	}
	return s.end(r, "ok", "")
}

// undo removes the new PIN's file if the agent made it; one that somebody prepared is theirs.
func (s settler) undo(r *agent.Rotation) error {
	path := pkcs11.PINPath(s.cfg.PINFile)
	if !r.Prepared {
		err := os.Remove(path + ".new")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the PIN that the token did not take: %w", err)
		}
		if err := syncDir(path); err != nil {
			return fmt.Errorf("removing the PIN that the token did not take: %w", err)
		}
	}
	why := "it was interrupted before the token had taken the new PIN"
	if r.Cause != "" {
		why = "the token did not take the new PIN: " + r.Cause
	}
	return s.end(r, "undone", why)
}

// end records what became of the rotation, and ends its note.
func (s settler) end(r *agent.Rotation, outcome, undone string) error {
	detail := "the token has the new PIN; " + r.Approval
	if undone != "" {
		detail = "the token has its old PIN: " + undone + "; " + r.Approval
	}
	if err := s.audit(agent.Act{Actor: s.self, Event: opPIN, Object: s.cfg.Token, Outcome: outcome, Detail: detail}); err != nil {
		return err
	}
	if err := s.state.EndRotation(time.Now(), undone); err != nil {
		return err
	}
	s.log.Info("a rotation of the PIN has ended", "outcome", outcome, "detail", detail)
	return nil
}
