package agent

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"trivet/hsm"
)

// State is what an agent must not forget and its token does not remember: which keys were destroyed, whom the domain key
// may go to, which approvals have been used, the site epoch. It is one small file, replaced as a whole, so that a crash
// leaves the old one or the new one; a checksum tells damage from either. It is safe for concurrent use.
type State struct {
	path string
	mu   sync.Mutex // guards facts
	facts
}

// facts is the file's content.
type facts struct {
	Version int `json:"version"`
	// Site and Epoch are those of the newest promotion record.
	Site  string `json:"site,omitempty"`
	Epoch uint64 `json:"epoch,omitempty"`
	// Destroyed says when a key was destroyed. Its id is taken in never again.
	Destroyed map[hsm.KeyID]time.Time `json:"destroyed,omitempty"`
	// Retired says when this agent learnt that a key signs no more, whatever the group's log says of it later.
	Retired map[hsm.KeyID]time.Time `json:"retired,omitempty"`
	// Transports names the member behind each transport key, by fingerprint, that a domain key may go to unasked.
	Transports map[string]string `json:"transports,omitempty"`
	// Guarded says that the domain came from a member that had keys already: from then on nobody new gets it unapproved.
	Guarded bool `json:"guarded,omitempty"`
	// Domains says of each domain key where it was made; one that is not listed counts as brought.
	Domains map[string]origin `json:"domains,omitempty"`
	// Used is the approvals that were acted on, by digest of the request.
	Used map[string]use `json:"used,omitempty"`
	// Rotation is the change of the token's PIN that is under way; nil: none. PIN is what became of the newest one.
	Rotation *Rotation  `json:"rotation,omitempty"`
	PIN      *pinResult `json:"pin,omitempty"`
}

// origin is where a domain key was made.
type origin string

const (
	// made in a token of the group, and known to nobody outside the group's tokens.
	made origin = "made"
	// brought in from outside a token, as from a backup: whoever brought it may know it.
	brought origin = "brought"
)

// use is an approval that was acted on.
type use struct {
	// Act is the hex SHA-256 of the act it was used for, in every particular.
	Act     string    `json:"act"`
	Expires time.Time `json:"expires"`
	// Done says that the act was finished; if not, it may be tried again.
	Done bool `json:"done"`
}

// sealed is the file: the facts as they were written, and their hex SHA-256.
type sealed struct {
	Sum   string          `json:"sum"`
	State json.RawMessage `json:"state"`
}

const (
	stateFile    = "state.json"
	stateVersion = 1
	// keepUsed is how long a used approval is remembered beyond its expiry, in case the clock goes back.
	keepUsed = 24 * time.Hour
)

// CreateState makes the state of an agent that never had one. It refuses to replace one.
func CreateState(dir string) (*State, error) {
	s := &State{path: filepath.Join(dir, stateFile), facts: facts{Version: stateVersion}}
	if _, err := os.Stat(s.path); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("creating the agent's state: %s is there already (%w)", s.path, cmp.Or(err, fs.ErrExist))
	}
	return s, s.write(s.facts)
}

// OpenState reads the state. fs.ErrNotExist is in the error's chain when there is none.
func OpenState(dir string) (*State, error) {
	s := &State{path: filepath.Join(dir, stateFile)}
	b, err := os.ReadFile(s.path)
	if err != nil {
		return nil, fmt.Errorf("reading the agent's state: %w", err)
	}
	if err := s.parse(b); err != nil {
		return nil, fmt.Errorf("the agent's state %s is damaged: put back the newest copy of it, or have people look at what this token "+
			"holds and set it up anew as another member: %w", s.path, err)
	}
	return s, nil
}

func (s *State) parse(b []byte) error {
	var file sealed
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&file); err != nil {
		return err
	}
	if sum := sha256.Sum256(file.State); hex.EncodeToString(sum[:]) != file.Sum {
		return errors.New("its checksum is wrong")
	}
	d = json.NewDecoder(bytes.NewReader(file.State))
	d.DisallowUnknownFields()
	if err := d.Decode(&s.facts); err != nil {
		return err
	}
	if s.Version != stateVersion {
		return fmt.Errorf("its version is %d, this program writes %d", s.Version, stateVersion)
	}
	return nil
}

// read looks at the facts; look must keep nothing of them.
func (s *State) read(look func(facts)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	look(s.facts)
}

// change makes a change durable before it is seen. After an error nobody knows what the disk holds, so that the process
// must end.
func (s *State) change(now time.Time, edit func(*facts)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var next facts // a copy, so that what fails to be written is not believed either
	b, err := json.Marshal(s.facts)
	if err == nil {
		err = json.Unmarshal(b, &next)
	}
	if err != nil {
		return fmt.Errorf("copying the agent's state: %w", err)
	}
	for digest, u := range next.Used {
		if now.After(u.Expires.Add(keepUsed)) {
			delete(next.Used, digest)
		}
	}
	edit(&next)
	if err := s.write(next); err != nil {
		return err
	}
	s.facts = next
	return nil
}

// write replaces the file: new content under another name, made durable, then renamed, then the name made durable.
func (s *State) write(f facts) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing the agent's state: %w", err)
		}
	}()
	state, err := json.Marshal(f)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(state)
	content, err := json.Marshal(sealed{hex.EncodeToString(sum[:]), state})
	if err != nil {
		return err
	}
	return Replace(s.path, append(content, '\n'))
}

// Replace writes a file of mode 0600 so that a crash leaves the old content or the new, and makes it durable. One caller at
// a time per path.
func Replace(path string, content []byte) error {
	dir := filepath.Dir(path)
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// destroyed tells whether a key of that id was destroyed here, and refuses what would bring it back.
func (s *State) destroyed(op string, id hsm.KeyID) (err error) {
	s.read(func(f facts) {
		if at, ok := f.Destroyed[id]; ok {
			err = &hsm.Error{Class: hsm.ClassDenied, Code: hsm.CodeDestroyed, Op: op,
				Err: fmt.Errorf("key %s was destroyed here at %s: its id is used never again", id, at.Format(time.RFC3339))}
		}
	})
	return err
}

// retired tells whether people have had a key retired, and refuses its use.
func (s *State) retired(op string, id hsm.KeyID) (err error) {
	s.read(func(f facts) {
		if at, ok := f.Retired[id]; ok {
			err = &hsm.Error{Class: hsm.ClassDenied, Code: hsm.CodeRetired, Op: op,
				Err: fmt.Errorf("key %s was retired, as this member learnt at %s: it signs no more. Where the group's log calls it live the database has lost the entry: retire it again", id, at.Format(time.RFC3339))}
		}
	})
	return err
}

// epoch is the site that may write, and its number.
func (s *State) epoch() (r hsm.EpochRecord) {
	s.read(func(f facts) { r = hsm.EpochRecord{Site: f.Site, Epoch: f.Epoch} })
	return r
}

// put enters a value into a map that may not exist yet.
func put[K comparable, V any](m *map[K]V, k K, v V) {
	if *m == nil {
		*m = map[K]V{}
	}
	(*m)[k] = v
}
