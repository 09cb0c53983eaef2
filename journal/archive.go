package journal

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Archive is where sealed segments are copied to, with their indexes: a directory, or whatever a command stores to. The zero value is none.
type Archive struct {
	// Dir is an existing directory that no other journal is archived to, such as a mounted share.
	Dir string
	// Command is a program and its first arguments. It is run with two or three more: "put FILE SHA256" stores a file under its base name, "verify NAME
	// SHA256" reads it back and compares. Exit code 0 means done, durably; both may come more than once for one file.
	Command []string
	// Timeout is for one run of Command; default 10 min.
	Timeout time.Duration
	// Keep is how long a segment stays here after its last record. Default: for ever. It goes only when the archive has just been found to hold it.
	Keep time.Duration
}

func (a *Archive) on() bool { return a.Dir != "" || len(a.Command) > 0 }

func (a *Archive) validate() error {
	switch {
	case a.Dir != "" && len(a.Command) > 0:
		return errors.New("archive: give a directory or a command, not both")
	case a.Keep < 0 || a.Keep > 0 && !a.on():
		return errors.New("archive: segments are removed after a time only if they are archived")
	}
	return nil
}

// receipt is the content of an archivedSuffix file.
type receipt struct {
	Time  time.Time         `json:"time"`
	To    string            `json:"to"`
	Files map[string]string `json:"files"` // name to SHA-256, lower-case hex
}

// put archives the segment at path with its index, verifies both, and remembers it durably.
func (a *Archive) put(ctx context.Context, dir string, number uint64, path string, now time.Time) error {
	m := receipt{Time: now.UTC(), To: a.Dir, Files: map[string]string{}}
	if a.Dir == "" {
		m.To = a.Command[0]
	}
	for _, file := range []string{path, filepath.Join(dir, fileName(number, indexSuffix))} {
		sum, err := digest(file)
		if err != nil {
			return err
		}
		if err := a.copy(ctx, file, sum); err != nil {
			return err
		}
		if err := a.verify(ctx, filepath.Base(file), sum); err != nil {
			return err
		}
		m.Files[filepath.Base(file)] = sum
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(dir, fileName(number, archivedSuffix)), func(f *os.File) error {
		_, err := f.Write(append(text, '\n'))
		return err
	})
}

// check verifies that the archive holds what was put there.
func (a *Archive) check(ctx context.Context, dir string, number uint64) error {
	text, err := os.ReadFile(filepath.Join(dir, fileName(number, archivedSuffix)))
	if err != nil {
		return err
	}
	var m receipt
	if err := json.Unmarshal(text, &m); err != nil {
		return err
	}
	for name, sum := range m.Files {
		if err := a.verify(ctx, name, sum); err != nil {
			return err
		}
	}
	if len(m.Files) != 2 {
		return fmt.Errorf("%s names %d files", fileName(number, archivedSuffix), len(m.Files))
	}
	return nil
}

func (a *Archive) copy(ctx context.Context, path, sum string) error {
	if a.Dir == "" {
		return a.run(ctx, "put", path, sum)
	}
	to := filepath.Join(a.Dir, filepath.Base(path))
	switch there, err := digest(to); {
	case err == nil && there == sum:
		return nil
	case err == nil:
		return fmt.Errorf("%s holds something else: is another journal archived there?", to)
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	return replaceFile(to, func(f *os.File) error {
		from, err := os.Open(path)
		if err != nil {
			return err
		}
		defer from.Close()
		if _, err := io.Copy(f, from); err != nil {
			return err
		}
		return settle(f)
	})
}

func (a *Archive) verify(ctx context.Context, name, sum string) error {
	if a.Dir == "" {
		return a.run(ctx, "verify", name, sum)
	}
	path := filepath.Join(a.Dir, name)
	there, err := digest(path)
	if err == nil && there != sum {
		err = fmt.Errorf("%w: %s has another digest than what was put there", ErrCorrupt, path)
	}
	return err
}

func (a *Archive) run(ctx context.Context, args ...string) error {
	timeout := a.Timeout
	if timeout <= 0 {
		timeout = 10 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	args = append(append([]string(nil), a.Command[1:]...), args...)
	cmd := exec.CommandContext(ctx, a.Command[0], args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", a.Command[0], args[len(args)-3], err, bytes.TrimSpace(out[max(0, len(out)-500):]))
	}
	return nil
}

// digest returns the SHA-256 of a file in lower-case hex.
func digest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
