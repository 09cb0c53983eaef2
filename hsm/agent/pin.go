package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"trivet/hsm"
	"trivet/identity"
)

// A token's PIN is changed by a process that then ends, and the change is settled by the next one, before it serves: a login in a
// new process is the only proof of which PIN the token has, so that what happens after a crash is what always happens.
//
//	begun    it is noted; the new PIN's file may be there; the token has the old PIN
//	asked    C_SetPIN was, or may have been, called: a login says which PIN the token has
//	taken    a login with the new PIN went well: its file takes the old one's place, the note ends
//	refused  a login with the old PIN went well: the new one's file goes, if the agent made it, and the note ends

// PINs is what the server needs to change the token's PIN. It knows the PINs; nothing that it returns holds one.
type PINs interface {
	// Check refuses what would fail: a PIN file that cannot be replaced, or is no more the one the token was opened with; a
	// prepared PIN that is missing or no other, or one that is there and not to be used.
	Check(prepared bool) error
	// Prepare makes sure that the new PIN is durably in its file, and draws one unless it is prepared.
	Prepare(prepared bool) error
	// Change calls C_SetPIN, once, with the PINs of both files.
	Change() error
}

// Rotation is the note of a change of the PIN that is under way.
type Rotation struct {
	Phase    RotationPhase `json:"phase"`
	Began    time.Time     `json:"began"`
	Prepared bool          `json:"prepared,omitempty"`
	// Tried is the PIN that was tried last, or was about to be: "new", "old" or empty.
	Tried string `json:"tried,omitempty"`
	// Approval is what it was done under, for the audit record; Request the digest of the request in it.
	Approval string `json:"approval"`
	Request  string `json:"request"`
	Cause    string `json:"cause,omitempty"` // what the token said to C_SetPIN, if it was an error
}

// RotationPhase is how far a rotation has come.
type RotationPhase string

// The phases.
const (
	RotationBegun   RotationPhase = "begun"
	RotationAsked   RotationPhase = "asked"
	RotationTaken   RotationPhase = "taken"
	RotationRefused RotationPhase = "refused"
)

// pinResult is what became of the newest rotation.
type pinResult struct {
	Rotated time.Time `json:"rotated,omitzero"` // when the newest one was done, whether or not it is this one
	Request string    `json:"request"`
	Undone  string    `json:"undone,omitempty"`
}

const opRotatePIN = "rotate-pin"

// Rotation is the change of the PIN that is under way, or nil.
func (s *State) Rotation() (r *Rotation) {
	s.read(func(f facts) {
		if f.Rotation != nil {
			is := *f.Rotation
			r = &is
		}
	})
	return r
}

// pin fills in what the state knows of the PIN.
func (s *State) pin(p *hsm.PIN) {
	s.read(func(f facts) {
		if r := f.PIN; r != nil {
			p.Rotated, p.Request, p.Undone = r.Rotated, r.Request, r.Undone
		}
		if r := f.Rotation; r != nil {
			p.Request, p.Undone = r.Request, ""
			p.Unfinished = fmt.Sprintf("a rotation of the PIN began at %s and is not finished (%s)", r.Began.Format(time.RFC3339), r.Phase)
		}
	})
}

// Rotate changes the note, durably. It is for who settles a rotation before the server serves.
func (s *State) Rotate(now time.Time, edit func(*Rotation)) error {
	return s.change(now, func(f *facts) { edit(f.Rotation) })
}

// EndRotation ends the note, durably: the token has the new PIN, or, with a reason, the old one. An approval is used up by a
// rotation that was done; one that was undone may be tried again under it.
func (s *State) EndRotation(now time.Time, undone string) error {
	return s.change(now, func(f *facts) {
		result := pinResult{Request: f.Rotation.Request, Undone: undone}
		if f.PIN != nil {
			result.Rotated = f.PIN.Rotated
		}
		if undone == "" {
			result.Rotated = now.UTC().Truncate(time.Second)
			approval{digest: f.Rotation.Request}.finish(f)
		}
		f.PIN, f.Rotation = &result, nil
	})
}

// rotatePIN gives the token a new PIN and ends the process, so that the next one finds out by a login which PIN the token has.
// Before the note nothing is touched and the process lives on.
func (s *Server) rotatePIN(ctx context.Context, by identity.Principal, req hsm.PINRequest) (none, error) {
	t, err := s.token(opRotatePIN)
	if err != nil {
		return none{}, err
	}
	if err := checkGroup(opRotatePIN, req.Group); err != nil {
		return none{}, err
	}
	if err := s.own(by, opRotatePIN, req.Group, t, req.Group); err != nil {
		return none{}, err
	}
	if !slices.Contains(req.Members, s.cfg.Member) || len(req.Members) > maxKnown {
		return none{}, hsm.Errorf(hsm.ClassRequest, opRotatePIN, "this is member %s, which is not among those named", s.cfg.Member)
	}
	if s.cfg.PINs == nil {
		return none{}, hsm.Errorf(hsm.ClassRequest, opRotatePIN, "the PIN of token %s cannot be changed by its agent: %s", s.cfg.Label, s.cfg.NoPINs)
	}
	if r := s.cfg.State.Rotation(); r != nil { // the process is about to end
		return none{}, hsm.Errorf(hsm.ClassDevice, opRotatePIN, "a rotation that began at %s is being finished: look again in a moment", r.Began.Format(time.RFC3339))
	}
	d := rotatingPIN(req)
	a, err := s.approved(req.Grant, d)
	if err != nil {
		return none{}, s.refused(by, opRotatePIN, s.cfg.Label, err)
	}
	var finished bool
	s.cfg.State.read(func(f facts) { finished = f.Used[a.digest].Done })
	if !finished {
		err = s.cfg.PINs.Check(req.Prepared) // before the approval is used
	}
	if err == nil {
		finished, err = s.take(a, d)
	}
	if err != nil {
		return none{}, s.refused(by, opRotatePIN, s.cfg.Label, err)
	}
	if finished {
		return none{}, nil
	}
	began := s.cfg.Now().UTC().Truncate(time.Second)
	note := Rotation{Phase: RotationBegun, Began: began, Prepared: req.Prepared, Approval: a.String() + " by=" + by.String(), Request: a.digest}
	if err := s.change(opRotatePIN, func(f *facts) { f.Rotation = &note }); err != nil {
		return none{}, err
	}
	_, err = managed(ctx, s, by, act{op: opRotatePIN, object: s.cfg.Label, detail: "pin=" + d.facts["pin"] + " " + a.String()}, func() (none, error) {
		if err := s.cfg.PINs.Prepare(req.Prepared); err != nil {
			return none{}, err
		}
		if err := s.change(opRotatePIN, func(f *facts) { f.Rotation.Phase = RotationAsked }); err != nil {
			return none{}, err
		}
		err := s.cfg.PINs.Change()
		if err != nil {
			// The next process needs no cause to go on; it is for people.
			return none{}, errors.Join(err, s.change(opRotatePIN, func(f *facts) { f.Rotation.Cause = err.Error() }))
		}
		return none{}, nil
	})
	s.cfg.Restart("the token's PIN was changed, or an attempt was made: a login by a new process shows which one it has")
	if err != nil {
		return none{}, &hsm.Error{Class: hsm.ClassDevice, Code: codeOf(err), Op: opRotatePIN,
			Err: fmt.Errorf("the agent starts anew to find out which PIN the token has, and `pkictl hsm status` says so: %w", err)}
	}
	return none{}, nil
}

func codeOf(err error) string {
	if e, ok := errors.AsType[*hsm.Error](err); ok {
		return e.Code
	}
	return ""
}
