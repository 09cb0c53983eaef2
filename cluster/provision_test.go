package cluster

import (
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"trivet/identity"
)

// snapshot reads every file below dir.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		files[strings.TrimPrefix(path, dir)] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func provisioned(t *testing.T) Layout {
	t.Helper()
	l, err := NewLayout(filepath.Join(t.TempDir(), "demo"), "127.95.0.0/16")
	if err != nil {
		t.Fatal(err)
	}
	if err := prepareDir(l); err != nil {
		t.Fatal(err)
	}
	if err := provision(l); err != nil {
		t.Fatal(err)
	}
	return l
}

func TestProvisioningAgainChangesNothing(t *testing.T) {
	l := provisioned(t)
	before := snapshot(t, l.Dir)
	if err := provision(l); err != nil {
		t.Fatal(err)
	}
	after := snapshot(t, l.Dir)
	for name, text := range before {
		if after[name] != text {
			t.Errorf("%s changed", name)
		}
	}
	if len(after) != len(before) {
		t.Errorf("%d files became %d", len(before), len(after))
	}
}

func TestSecretsAreTheirOwnersAlone(t *testing.T) {
	l := provisioned(t)
	for name := range snapshot(t, l.Dir) {
		if !strings.HasPrefix(name, "/secret/") && !strings.HasSuffix(name, "key.pem") && !strings.HasSuffix(name, ".key") {
			continue
		}
		st, err := os.Stat(l.Dir + name)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", name, st.Mode(), err)
		}
	}
}

func TestEverybodyHasTheIdentityOfTheirRole(t *testing.T) {
	l := provisioned(t)
	want := map[string]identity.Role{}
	for _, p := range people {
		want[p.name] = p.role
	}
	for _, p := range l.Parts() {
		want[p.Name] = identity.Role(p.Role)
	}
	for _, p := range l.role(RoleCA) {
		want["sync-"+p.Name] = identity.RoleSync
	}
	for name, role := range want {
		id, err := identity.Load(l.Files(name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if p := id.Principal(); p != (identity.Principal{Cluster: Name, Role: role, Name: name}) {
			t.Errorf("%s is %s", name, p)
		}
		if left := time.Until(id.NotAfter()); left < identityLifetime/2 {
			t.Errorf("identity of %s ends in %s", name, left)
		}
	}
}

func TestAddedMemberIsPartOfTheClusterUntilRemoved(t *testing.T) {
	l := provisioned(t)
	a := Added{Name: "hsmd-d", Module: "/faulty.so", Env: []string{"FAULTS=/x"}}
	if err := provision(l.with(a)); err != nil {
		t.Fatal(err)
	}
	again, err := layoutFor(l.Dir, "")
	if err != nil {
		t.Fatal(err)
	}
	p, err := again.Part("hsmd-d")
	if err != nil || p.Addresses["agent"] != "127.95.2.4:7443" {
		t.Errorf("%+v, %v", p, err)
	}
	text, err := os.ReadFile(again.Config("hsmd-d"))
	if err != nil || !strings.Contains(string(text), "module: /faulty.so") {
		t.Errorf("its configuration: %v\n%s", err, text)
	}
	if text, err := os.ReadFile(again.Config("ca1")); err != nil || strings.Contains(string(text), "hsmd-d") {
		t.Errorf("a node's configuration names it, but only the group's log may: %v\n%s", err, text)
	}
	if err := again.without("hsmd-d").describe(); err != nil {
		t.Fatal(err)
	}
	if again, err = layoutFor(l.Dir, ""); err != nil || len(again.added) != 0 {
		t.Errorf("after its removal: %+v, %v", again.added, err)
	}
	for _, name := range []string{"hsmd-a", "hsmd-d2", "hsmd-", "ca3", "hsmd-D", "../x"} {
		if err := (Added{Name: name}).check(); err == nil {
			t.Errorf("%q may be added", name)
		}
	}
}

func TestDirectoryWithOtherFilesIsRefusedAndNeverRemoved(t *testing.T) {
	dir := t.TempDir()
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := NewLayout(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := prepareDir(l); err == nil || !strings.Contains(err.Error(), "--dir") {
		t.Errorf("preparing it: %v, want a refusal that says what to do", err)
	}
	if err := removeDir(l); err == nil {
		t.Error("it was removed")
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
}

func TestBusyAddressIsNamedWithItsHolder(t *testing.T) {
	l, err := NewLayout(t.TempDir(), "127.95.0.0/16")
	if err != nil {
		t.Fatal(err)
	}
	if err := checkAddresses(l, 0); err != nil {
		t.Fatal(err)
	}
	addr := l.role(RoleLB)[0].Addresses["public"]
	ln := listenOn(t, addr)
	defer ln.Close()
	err = checkAddresses(l, 0)
	if err == nil {
		t.Fatal("a busy address was not noticed")
	}
	for _, want := range []string{addr, "lb1", "--network", "pid "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %s", err, want)
		}
	}
}

func TestControlSocketWorksInADeepDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("deep/", 40))
	l, err := NewLayout(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(l.run(), 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := listenControl(l)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	st, err := os.Stat(l.socket())
	if err != nil || st.Mode().Perm()&0o077 != 0 {
		t.Errorf("the socket is open to others: %v, %v", st.Mode(), err)
	}
	go func() { _ = http.Serve(ln, http.NotFoundHandler()) }()
	if err := newControl(l).call(t.Context(), "GET", "/status", nil, nil); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("error %v, want the server's own", err)
	}
}

func listenOn(t *testing.T, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// With groups the keys go where their names say; without, all to one.
func TestKeysAreInTheGroupsThatWereAskedFor(t *testing.T) {
	for _, test := range []struct {
		groups            []string
		hsmds             int
		root, issuing, va string
		others            string // asked for later

	}{
		{nil, 3, "ca", "ca", "ca", "root,ca"},
		{[]string{"ca"}, 3, "ca", "ca", "ca", "root,ca,va"},
		{[]string{"va", "ca"}, 5, "ca", "ca", "va", "ca"},
		{[]string{"root", "ca", "va"}, 7, "root", "ca", "va", "root,ca"},
	} {
		t.Run(strings.Join(test.groups, ","), func(t *testing.T) {
			l, err := NewLayout(filepath.Join(t.TempDir(), "demo"), "127.95.0.0/16")
			if err == nil {
				l, err = l.withGroups(test.groups)
			}
			if err == nil {
				err = errors.Join(prepareDir(l), provision(l))
			}
			if err != nil {
				t.Fatal(err)
			}
			type group struct {
				Group, Name string
				Members     []struct{ Name, Address string }
			}
			var c struct {
				HSM       group
				Groups    []group
				Root      struct{ Group string }
				OCSPGroup string `yaml:"ocsp_group"`
			}
			text, err := os.ReadFile(l.Config("init"))
			if err == nil {
				err = yaml.Unmarshal(text, &c)
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.HSM.Group != test.issuing || c.Root.Group != test.root || c.OCSPGroup != test.va {
				t.Errorf("%+v", c)
			}
			all := append([]group{c.HSM}, c.Groups...)
			addresses, members := map[string]bool{}, 0
			for _, g := range all {
				for _, m := range g.Members {
					members++
					addresses[m.Address] = true
				}
			}
			if members != test.hsmds || len(addresses) != test.hsmds || len(l.role(RoleHSMD)) != test.hsmds {
				t.Errorf("%d members at %d addresses, %d agents; want %d: %+v", members, len(addresses), len(l.role(RoleHSMD)), test.hsmds, all)
			}
			again, err := layoutFor(l.Dir, "")
			if err != nil || len(again.Parts()) != len(l.Parts()) {
				t.Errorf("opened again it has %d parts instead of %d: %v", len(again.Parts()), len(l.Parts()), err)
			}
			if _, err := again.withGroups(test.groups); err != nil {
				t.Errorf("asked for the same again: %v", err)
			}
			if _, err := again.withGroups(strings.Split(test.others, ",")); err == nil || !strings.Contains(err.Error(), "--dir") {
				t.Errorf("asked for others: %v", err)
			}
		})
	}
	for _, bad := range [][]string{{"root"}, {"ca", "other"}, {"root,ca"}} {
		if CheckGroups(bad) == nil {
			t.Errorf("%q is let through", bad)
		}
	}
}
