package cluster

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// softHSMModule is where Debian and Ubuntu put SoftHSM's PKCS#11 module.
const softHSMModule = "/usr/lib/softhsm/libsofthsm2.so"

// checkTools names every tool that is missing, with the Debian package that has it.
func checkTools(binaries string) error {
	var missing []string
	packages := map[string]bool{}
	for _, t := range []struct{ file, pkg string }{
		{"mariadbd", "mariadb-server"},
		{"mariadb-install-db", "mariadb-server"},
		{"/usr/lib/galera/libgalera_smm.so", "galera-4"},
		{"rsync", "rsync"},
		{"ss", "iproute2"}, // the state transfer script asks it for its port
		{softHSMModule, "softhsm2"},
	} {
		if !findTool(t.file) {
			missing = append(missing, t.file)
			packages[t.pkg] = true
		}
	}
	if len(missing) > 0 {
		var names []string
		for p := range packages {
			names = append(names, p)
		}
		slices.Sort(names)
		return fmt.Errorf("missing %s: install with `apt-get install --no-install-recommends %s`", strings.Join(missing, ", "), strings.Join(names, " "))
	}
	for _, b := range []string{"ca", "ocsp", "lb", "hsmd", "pkictl"} {
		if st, err := os.Stat(filepath.Join(binaries, b)); err != nil || st.IsDir() {
			return fmt.Errorf("program %s is not in %s: build it with `make build`", b, binaries)
		}
	}
	return nil
}

func findTool(file string) bool {
	if filepath.IsAbs(file) {
		_, err := os.Stat(file)
		return err == nil
	}
	if _, err := exec.LookPath(file); err == nil {
		return true
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin", "/sbin"} { // not on everybody's PATH
		if _, err := exec.LookPath(filepath.Join(dir, file)); err == nil {
			return true
		}
	}
	return false
}

// checkAddresses tries every listening address of the cluster and names the first that stays taken, by whom, and what to do. An address is
// waited for up to patience: a process that was killed holds its own until the kernel has buried it.
func checkAddresses(l Layout, patience time.Duration) error {
	end := time.Now().Add(patience)
	for _, p := range l.Parts() {
		for _, name := range slices.Sorted(maps.Keys(p.Addresses)) {
			addr := p.Addresses[name]
			err := tryAddress(addr)
			for errors.Is(err, syscall.EADDRINUSE) && time.Now().Before(end) {
				time.Sleep(20 * time.Millisecond)
				err = tryAddress(addr)
			}
			switch {
			case err == nil:
			case errors.Is(err, syscall.EADDRINUSE):
				return fmt.Errorf("address %s, which %s needs, is in use%s: end that process, or choose another block with --network 127.x.0.0/16", addr, p.Name, holder(addr))
			case errors.Is(err, syscall.EADDRNOTAVAIL):
				return fmt.Errorf("address %s, which %s needs, is not this machine's: on Linux all of 127.0.0.0/8 is; elsewhere add it to the loopback interface", addr, p.Name)
			default:
				return fmt.Errorf("trying address %s of %s: %w", addr, p.Name, err)
			}
		}
	}
	return nil
}

func tryAddress(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	return ln.Close()
}

// holder names the process that listens on addr, or on its port on all addresses, as far as this user may know.
func holder(addr string) string {
	want, err := netip.ParseAddrPort(addr)
	if err != nil {
		return ""
	}
	inodes := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if err != nil {
			continue
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			fields := strings.Fields(lines.Text())
			if len(fields) < 10 || fields[3] != "0A" { // LISTEN
				continue
			}
			host, port, _ := strings.Cut(fields[1], ":")
			if n, err := strconv.ParseUint(port, 16, 16); err != nil || uint16(n) != want.Port() {
				continue
			}
			a := want.Addr().As4()
			little := fmt.Sprintf("%02X%02X%02X%02X", a[3], a[2], a[1], a[0])
			if host == little || strings.Trim(host, "0") == "" {
				inodes["socket:["+fields[9]+"]"] = true
			}
		}
		_ = f.Close()
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && inodes[target] {
			pid := strings.Split(fd, "/")[2]
			comm, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf(" by %s, pid %s", strings.TrimSpace(string(comm)), pid)
		}
	}
	return ""
}
