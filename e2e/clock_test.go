package e2e_test

import (
	"bytes"
	"crypto/x509"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"trivet/load"
)

// The clock of one CA node is set while it runs: it signs nothing that would lie about when it was made, says so, and others go on. With the clock right
// again so does the node, without a restart.
func TestANodeWhoseClockIsSetSignsNothing(t *testing.T) {
	s := up(t)
	ca1 := s.process(t, "ca1")
	clock := clockOf(t, ca1.PID)
	defer clock.shift(t, 0)
	since := len(logOf(t, ca1))
	clients := s.keepIssuing(t, false)
	direct := s.directly(t, "ca1", &load.Recorder{})
	for i, by := range []time.Duration{time.Hour, -time.Hour} {
		clock.shift(t, by)
		refuses(t, direct, fmt.Sprintf("clock-%d", i), "halted", "this node's clock is 1h0m0s "+[]string{"ahead of", "behind"}[i], "database nodes")
		clients.more(t)
		clock.shift(t, 0)
		issues(t, direct, i)
	}
	s.logged(t, ca1, since, "clock-off", "clock-restored")
	s.allWell(t)
	if now := s.process(t, "ca1").PID; now != ca1.PID {
		t.Errorf("ca1 was restarted: pid %d became %d", ca1.PID, now)
	}
	for _, a := range append(clients.recorder.All(), direct.Recorder.All()...) {
		cert, err := x509.ParseCertificate(a.DER)
		if err != nil {
			t.Fatal(err)
		}
		if off := time.Since(cert.NotBefore); off < 0 || off > 30*time.Minute {
			t.Errorf("%s is valid from %s on", a.ID, cert.NotBefore)
		}
	}
	clients.end(t, s)
	s.fsck(t)
}

// clock is the wall clock of one process. The kernel gives no process a clock of its own, but a page of code with which it reads everybody's: in this
// process that code is made to add something.
type clock struct {
	pid int
	add int64 // where the number of seconds is
}

// clockOf takes the clock of a process in hand.
func clockOf(t *testing.T, pid int) *clock {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("sets the clock of one process by a few bytes of amd64 code")
	}
	start, size := vdso(t, pid)
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if errors.Is(err, os.ErrPermission) {
		t.Skipf("may not write to the memory of a process of the same user: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	image := make([]byte, size)
	if _, err := mem.ReadAt(image, start); err != nil {
		t.Fatal(err)
	}
	file, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := file.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	entry := int64(-1)
	for _, sym := range symbols {
		if sym.Name == "__vdso_clock_gettime" {
			entry = int64(sym.Value)
		}
	}
	code := []byte{
		0xb8, 228, 0, 0, 0, // mov eax, SYS_clock_gettime
		0x0f, 0x05, // syscall
		0x85, 0xff, // test edi, edi: CLOCK_REALTIME?
		0x75, 7, // jne +7
		0x48, 0x81, 0x06, 0, 0, 0, 0, // add qword [rsi], 0
		0xc3, // ret
	}
	const number = 14 // where in code the 0 is
	at := size - 64   // behind all that is in use
	if entry < 0 || bytes.Trim(image[at:], "\x00") != nil {
		t.Skipf("this kernel's vDSO has no clock_gettime (%d), or no room", entry)
	}
	jump := binary.LittleEndian.AppendUint32([]byte{0xe9}, uint32(int64(at)-entry-5))
	c := &clock{pid, start + int64(at) + number}
	c.write(t, start+int64(at), code)
	c.write(t, start+entry, jump)
	return c
}

// shift sets the clock that much off.
func (c *clock) shift(t *testing.T, by time.Duration) {
	t.Helper()
	c.write(t, c.add, binary.LittleEndian.AppendUint32(nil, uint32(int32(by/time.Second))))
}

// write changes code of the process while it stands still.
func (c *clock) write(t *testing.T, at int64, code []byte) {
	t.Helper()
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", c.pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := syscall.Kill(c.pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(c.pid, syscall.SIGCONT) }()
	eventually(t, 10*time.Second, func() error {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.pid))
		if err == nil && !bytes.Contains(stat, []byte(") T ")) {
			err = errors.New("the process has not stopped")
		}
		return err
	})
	if _, err := mem.WriteAt(code, at); err != nil {
		t.Fatal(err)
	}
}

// vdso finds the kernel's code in a process.
func vdso(t *testing.T, pid int) (start int64, size int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var end int64
		if strings.HasSuffix(line, "[vdso]\n") {
			if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
				t.Fatal(err)
			}
			return start, int(end - start)
		}
	}
	t.Skip("the process has no vDSO")
	return 0, 0
}
