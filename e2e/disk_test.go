package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// onDisk moves what the process must not lose to a file system of its own, and back at the end. mount puts an empty one on dir, with room for what was used.
func (s *site) onDisk(t *testing.T, name string, mount func(dir string, used int64) error) string {
	t.Helper()
	dir := s.process(t, name).Dir
	used := int64(0)
	if err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			used += max(info.Size(), info.Sys().(*syscall.Stat_t).Blocks*512)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	copyTo := func(from, to string) error {
		if out, err := exec.Command("cp", "-a", from+"/.", to).CombinedOutput(); err != nil {
			return fmt.Errorf("copying %s to %s: %w\n%s", from, to, err, out)
		}
		return nil
	}
	kept := t.TempDir()
	s.run(t, "demo", "kill", name)
	t.Cleanup(func() { s.run(t, "demo", "start", name) })
	if err := copyTo(dir, kept); err != nil {
		t.Fatal(err)
	}
	if err := mount(dir, used); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.run(t, "demo", "kill", name)
		if err := moveBack(dir, copyTo); err != nil {
			t.Errorf("moving %s back: %v", name, err)
		}
	})
	if err := copyTo(kept, dir); err != nil {
		t.Fatal(err)
	}
	s.run(t, "demo", "start", name)
	return dir
}

// moveBack puts what is on the file system mounted on dir into dir itself.
func moveBack(dir string, copyTo func(from, to string) error) error {
	now, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+"-")
	if err != nil {
		return err
	}
	if err := copyTo(dir, now); err != nil {
		return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	}
	if err := unix.Unmount(dir, 0); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(now, dir)
}

// onHangingDisk moves a process's directory to a disk that hang makes hang: what is written then waits, whoever writes it, until mend.
func (s *site) onHangingDisk(t *testing.T, name string) (hang, mend func()) {
	t.Helper()
	dir := s.onDisk(t, name, func(dir string, used int64) error {
		image := filepath.Join(t.TempDir(), "disk")
		file, err := os.Create(image)
		if err == nil {
			err = errors.Join(file.Truncate(2*used+1<<30), file.Close())
		}
		if err != nil {
			return err
		}
		for _, c := range [][]string{{"mkfs.ext4", "-q", "-F", image}, {"mount", "-o", "loop", image, dir}} {
			if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%v: %w\n%s", c, err, out)
			}
		}
		return nil
	})
	freeze := func(how string) error {
		out, err := exec.Command("fsfreeze", how, dir).CombinedOutput()
		if err != nil {
			return fmt.Errorf("fsfreeze %s %s: %w\n%s", how, dir, err, out)
		}
		return nil
	}
	hangs := false
	mend = func() {
		if !hangs {
			return
		}
		if err := freeze("--unfreeze"); err != nil {
			t.Error(err)
		}
		hangs = false
	}
	t.Cleanup(mend) // before the directory is moved back
	return func() {
		t.Helper()
		// Whoever writes to the disk meanwhile cannot even be killed: should this process be, another one mends it.
		guard := exec.Command("sh", "-c", `sleep 60; exec fsfreeze --unfreeze "$0"`, dir)
		guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := guard.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = syscall.Kill(-guard.Process.Pid, syscall.SIGKILL)
			_ = guard.Wait()
		})
		if err := freeze("--freeze"); err != nil {
			t.Fatal(err)
		}
		hangs = true
	}, mend
}
